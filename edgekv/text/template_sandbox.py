"""A jinja2 environment for templates nobody vouches for: immutable and sandboxed, with a box of time and size.

The sandbox alone lets `'a' * 10**9`, nested loops and lists that contain themselves twice forty times over run for
hours. Here every loop pass, call and filter is counted against a budget; every operation that can make a value much
larger than its inputs is predicted first; and every value made is weighed. One operation is thus bounded by
`Limits.value_size`, and their number by `Limits.steps` and `Limits.seconds`.

Runs in: anywhere, several renderings at once on several threads; owns: one budget per thread while it renders.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

ELEMENT_WEIGHT = 32  # what an element takes in memory, and in time to look at, compared to a character
_WEIGHED_FILTERS = frozenset(["join", "format", "indent", "tojson", "replace", "pprint", "list"])
_PERCENT_SPEC = re.compile(r"%(?:\([^)]*\))?([-#0 +]*[\d.*]+)")
_BRACE_SPEC = re.compile(r":([^{}]*)")
_BORROWING_FILTERS = frozenset(["first", "last", "random", "default", "d", "attr", "min", "max"])


@dataclass(frozen=True, slots=True)
class Limits:
    """The box of one rendering.

    `steps`: loop passes, calls and filters. `value_size`: the weight of any one value and of all output, where a
    character weighs one and an element of a list or dict `ELEMENT_WEIGHT`. `range_size`: the longest `range()`.
    """

    seconds: float = 5.0
    steps: int = 300_000
    value_size: int = 16_000_000
    range_size: int = 10_000


class LimitExceeded(jinja2.TemplateError):
    """The template wanted more than its box holds."""


class _Budget:
    """What one rendering has used so far."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._steps = 0
        self._size = 0
        self._deadline = time.monotonic() + limits.seconds

    def step(self) -> None:
        self._steps += 1
        if self._steps > self._limits.steps:
            raise LimitExceeded(f"more than {self._limits.steps:,} steps")
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"more than {self._limits.seconds:g} seconds")

    def write(self, size: int) -> None:
        self._size += size
        if self._size > self._limits.value_size:
            raise LimitExceeded(f"more than {self._limits.value_size:,} characters of output")


class _GenerationBlock(Extension):
    """`{% generation %}` … `{% endgeneration %}`: a mark for training, plain text here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass_through"), [], [], body).set_lineno(line)

    def _pass_through(self, caller: Macro) -> str:
        return caller()


class _SafeNamespace(Namespace):
    """A namespace without underscore names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _DictMaker:
    """`dict(…)` without the type behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The settings of transformers' chat templates inside a box."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._local = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
            finalize=self._written,
        )
        del self.globals["lipsum"]  # random text, as much as asked for
        for name in ("urlize", "striptags", "wordwrap"):  # quadratic in their input
            del self.filters[name]
        self.globals["range"] = self._range
        self.globals["dict"] = _DictMaker()
        self.globals["namespace"] = _SafeNamespace
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Put a filter into the environment, counted and weighed like the others."""
        self.filters[name] = self._guarded_filter(name, function)

    @contextmanager
    def budget(self) -> Iterator[None]:
        """Everything rendered inside, on this thread, shares one budget."""
        self._local.budget = _Budget(self._limits)
        try:
            yield
        finally:
            self._local.budget = None

    def step(self, size: int = 0) -> bool:
        """Count one step and `size` characters of the template's own text; called by the instrumented template."""
        budget: _Budget | None = getattr(self._local, "budget", None)
        if budget is not None:
            budget.step()
            if size:
                budget.write(size)
        return True

    def weighed(self, value: Any) -> Any:
        """The value, if it is not too heavy; called by the instrumented template around what it builds."""
        self._weight(value)
        return value

    def concatenated(self, *values: Any) -> str:
        """The `~` operator."""
        self._bound(sum(self._weight(value) for value in values))
        return "".join(map(str, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        __self.step()
        __self._predict_call(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        # Other calls give what was there before, or pieces of a text.
        if isinstance(result, str | int | Namespace) or isinstance(getattr(__obj, "__self__", __obj), _DictMaker):
            __self._weight(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # noqa: D102
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template: str = value.__self__

        def guarded(*args: Any, **kwargs: Any) -> str:
            self._predict_format(template, "{", (args, kwargs))
            return wrapped(*args, **kwargs)

        return guarded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: D102
        if isinstance(obj, bytes | bytearray) or (isinstance(obj, str) and attr in ("encode", "translate")):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: D102
        for value in (left, right):
            if isinstance(value, int):
                self._bound_bits(value.bit_length())
        if operator == "+":
            self._bound(self._weight(left) + self._weight(right))
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                self._bound_bits(left.bit_length() + right.bit_length())
            elif isinstance(right, int):
                self._bound(self._weight(left) * right)
            elif isinstance(left, int):
                self._bound(self._weight(right) * left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._bound_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            self._predict_format(left, "%", right)
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _Instrument().visit(template)
        return template

    def _written(self, value: Any) -> Any:
        budget: _Budget | None = getattr(self._local, "budget", None)
        if budget is not None:
            budget.write(self._weight(value))
        return value

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        if len(numbers) > self._limits.range_size:
            raise LimitExceeded(f"a range of more than {self._limits.range_size:,} numbers")
        return numbers

    def _stepping(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def _guarded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # Filters may take the context, the evaluation context or the environment before the value.
        at = 1 if hasattr(function, "jinja_pass_arg") else 0

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.step()
            args = self._predict_filter(name, args, at, kwargs)
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                return self._stepping(result)
            return result if name in _BORROWING_FILTERS else self.weighed(result)

        if at:
            guarded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return guarded

    # -- predictions: each an upper bound, in the unit of `Limits.value_size`

    def _predict_filter(self, name: str, args: tuple[Any, ...], at: int, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        value, rest = args[at], [*args[at + 1 :], *kwargs.values()]
        numbers = [abs(item) for item in rest if isinstance(item, int)]
        if any(number > 100_000 for number in numbers):
            raise LimitExceeded(f"{name} with a number above 100,000")
        if name == "sum" and any(isinstance(item, list | tuple) for item in rest):
            raise LimitExceeded("sum of lists")
        if name not in _WEIGHED_FILTERS:
            return args
        if name == "join" and not isinstance(value, str | list | tuple):
            value = list(value)  # a generator, weighed before it is joined
            args = (*args[:at], value, *args[at + 1 :])
        weight, texts = self._weight(value), max((self._weight(item) for item in rest), default=0)
        match name:
            case "replace" if len(rest) >= 2:
                self._bound(weight + str(value).count(str(rest[0])) * self._weight(rest[1]))
            case "join":
                self._bound(weight + len(value) * texts)
            case "format":
                self._predict_format(str(value), "%", rest)
            case "indent":
                self._bound(weight + (str(value).count("\n") + 1) * (texts + sum(numbers)))
            case "pprint":
                self._bound(weight * 50)  # so much slower than other ways to write a value
            case "list" if isinstance(value, str):
                self._bound(weight * ELEMENT_WEIGHT)
            case "tojson":
                self._bound(weight * (1 + sum(numbers)))
        return args

    def _predict_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        rest = [*args, *kwargs.values()]
        if isinstance(owner, str):
            if name == "replace" and len(args) >= 2:
                self._bound(len(owner) + owner.count(str(args[0])) * self._weight(args[1]))
            elif name == "join" and args:
                if not isinstance(args[0], str | list | tuple | dict):
                    raise LimitExceeded("str.join of something other than a list")
                self._bound(self._weight(args[0]) + len(args[0]) * len(owner))
            elif name in ("split", "rsplit", "splitlines"):
                at_text = args and isinstance(args[0], str) and args[0]
                cuts = owner.count(args[0]) if at_text else sum(map(str.isspace, owner))
                self._bound(len(owner) + cuts * ELEMENT_WEIGHT)
            elif name in ("center", "ljust", "rjust", "zfill"):
                self._bound(len(owner) + sum(abs(item) for item in rest if isinstance(item, int)))
            elif name == "expandtabs":
                columns = max((abs(item) for item in rest if isinstance(item, int)), default=8)
                self._bound(len(owner) + owner.count("\t") * columns)
        elif isinstance(owner, int) and name == "to_bytes":
            self._bound(sum(abs(item) for item in rest if isinstance(item, int)))

    def _predict_format(self, template: str, sign: str, values: Any) -> None:
        """`%` and `str.format`: fields times the largest value or width."""
        value_size = self._weight(values)
        specs = _PERCENT_SPEC.findall(template) if sign == "%" else _BRACE_SPEC.findall(template)
        widths = [int(digits[:12]) for spec in specs for digits in re.findall(r"\d+", spec)]
        computed = "*" in template if sign == "%" else "{" in re.sub(r"\{[^{}]*\}", "", template)
        if computed:
            widths += [abs(item) for item in _flat(values) if isinstance(item, int)]
        self._bound(len(template) + template.count(sign) * (max(widths, default=0) + value_size))

    def _bound(self, size: int) -> None:
        if size > self._limits.value_size:
            raise LimitExceeded(f"a value larger than {self._limits.value_size:,} characters or elements")

    def _bound_bits(self, bits: int) -> None:
        if bits > 4096:
            raise LimitExceeded("a number of more than 4,096 bits")

    def _weight(self, value: Any) -> int:
        """The size of a value written out, counting what is in it twice twice. Raises when it is too large."""
        if isinstance(value, str):
            self._bound(len(value))
            return len(value)
        weight = 0
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str | bytes):
                weight += len(item)
            elif isinstance(item, int):
                self._bound_bits(item.bit_length())
            elif isinstance(item, list | tuple | set | frozenset):
                waiting.extend(item)
            elif isinstance(item, dict):
                waiting.extend(item)
                waiting.extend(item.values())
            elif isinstance(item, Namespace):
                waiting.extend(item._Namespace__attrs.values())
            weight += ELEMENT_WEIGHT
            self._bound(weight + len(waiting) * ELEMENT_WEIGHT)
        return weight


class _Instrument(NodeTransformer):
    """Puts the calls into a template's syntax tree that make `TemplateEnvironment` see what it does."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_call("step", []), node.test).set_lineno(node.lineno)
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return self._counted(node)

    visit_CallBlock = visit_FilterBlock = visit_AssignBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes).set_lineno(node.lineno)

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return _call("weighed", [node]).set_lineno(node.lineno)

    visit_Dict = visit_Tuple = visit_List

    @staticmethod
    def _counted(node: Any) -> nodes.Node:
        size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("step", [nodes.Const(size)])).set_lineno(node.lineno))
        return node  # type: ignore[no-any-return]


def _call(method: str, args: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)


def _flat(value: Any) -> Iterator[Any]:
    match value:
        case dict():
            yield from _flat(list(value.values()))
        case list() | tuple():
            for item in value:
                yield from _flat(item)
        case _:
            yield value


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the underscore name {name!r}")
