"""A jinja2 environment for templates nobody vouches for: immutable and sandboxed, with a box of time and size.

The sandbox alone lets `'a' * 10**9`, nested loops and lists that contain themselves twice forty times over run for
hours. Here every loop pass, call and filter is counted against a budget; every operation that can make a value much
larger than its inputs, or compare them at length, is predicted first; and every value made is weighed. One operation is
thus bounded by `Limits.value_size`, and their number by `Limits.steps` and `Limits.seconds`.

Runs in: anywhere, several renderings at once on several threads; owns: one budget per thread while it renders.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edgekv.text.template_costs import ELEMENT_WEIGHT, Costs, LimitExceeded, Limits, refuse_many_numbers

_BORROWING_FILTERS = frozenset(["first", "last", "random", "default", "d", "attr", "min", "max"])
# Methods of strings that nothing here predicts: bytes have a `%` of their own, and one takes quadratic time.
_UNSAFE_OF_TEXT = frozenset(["encode", "maketrans", "striptags", "translate"])
_UNSAFE = frozenset(["fromkeys", "from_bytes", "isdisjoint", "to_bytes"])


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
        self.check_clock()

    def check_clock(self) -> None:
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
        attributes = _DictMaker()(*args[1:], **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _DictMaker:
    """`dict(…)` without the type behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        given = [arg if isinstance(arg, str | dict) else list(arg) for arg in args]
        for pairs in given:
            if isinstance(pairs, list):
                refuse_many_numbers(pair[0] for pair in pairs)
        return dict(*given, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        keys = keys if isinstance(keys, str) else list(keys)
        refuse_many_numbers(keys)
        return dict.fromkeys(keys, value)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The settings of transformers' chat templates inside a box."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._costs = Costs(limits)
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
        for name, function in list(self.tests.items()):
            self.tests[name] = self._clocked_test(function)

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

    @property
    def in_time(self) -> bool:
        """True, or an error; looked at by the instrumented template where calling `step` would cost it too much."""
        self._check_clock()
        return True

    def weighed(self, value: Any) -> Any:
        """The value, if it is not too heavy; called by the instrumented template around what it builds."""
        self._costs.weight(value)
        return value

    def concatenated(self, *values: Any) -> str:
        """The `~` operator."""
        self._costs.bound(sum(map(self._costs.weight, values)))
        return "".join(map(str, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        __self.step()
        __self._costs.call(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        # Other calls give what was there before, or pieces of a text.
        if isinstance(result, str | int | Namespace) or isinstance(getattr(__obj, "__self__", __obj), _DictMaker):
            __self._costs.weight(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # noqa: D102
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template: str = value.__self__

        def guarded(*args: Any, **kwargs: Any) -> str:
            self._costs.braces(template, (args, kwargs))
            return wrapped(*args, **kwargs)

        return guarded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: D102
        if attr in _UNSAFE and not isinstance(obj, _DictMaker):
            return False
        if isinstance(obj, str) and attr in _UNSAFE_OF_TEXT:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: D102
        self._check_clock()
        self._costs.binary(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | int):
            self._costs.weight(result)
        return result

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _Instrument().visit(template)
        return template

    def _check_clock(self) -> None:
        budget: _Budget | None = getattr(self._local, "budget", None)
        if budget is not None:
            budget.check_clock()

    def _written(self, value: Any) -> Any:
        budget: _Budget | None = getattr(self._local, "budget", None)
        if budget is not None:
            budget.write(self._costs.weight(value))
        return value

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        if len(numbers) > self._limits.range_size:
            raise LimitExceeded(f"a range of more than {self._limits.range_size:,} numbers")
        return numbers

    def _stepping(self, items: Iterator[Any]) -> Iterator[Any]:
        weight = 0  # of all of them, since whoever asks may keep them
        for item in items:
            self.step()
            weight += ELEMENT_WEIGHT + self._costs.weight(item)
            self._costs.bound(weight)
            yield item

    def _guarded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # Filters may take the context, the evaluation context or the environment before the value.
        at = 1 if hasattr(function, "jinja_pass_arg") else 0

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.step()
            before, value, rest = args[:at], args[at], args[at + 1 :]
            if name == "join" and not isinstance(value, str | list | tuple):
                value = list(value)
            elif name == "unique":  # passes over equal elements without a word
                value = self._stepping(iter(value))
            self._costs.filter(name, value, rest, kwargs)
            result = function(*before, value, *rest, **kwargs)
            if isinstance(result, Iterator):
                return self._stepping(result)
            return result if name in _BORROWING_FILTERS else self.weighed(result)

        if at:
            guarded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return guarded

    def _clocked_test(self, function: Any) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            return self.in_time and function(*args, **kwargs)

        if hasattr(function, "jinja_pass_arg"):
            clocked.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return clocked


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

    visit_Tuple = visit_List

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        refuse_many_numbers(pair.key.value if isinstance(pair.key, nodes.Const) else None for pair in node.items)
        return self.visit_List(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for operand in node.ops:
            operand.expr = _in_time(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _in_time(node) if isinstance(node.arg, nodes.Slice) else node

    @staticmethod
    def _counted(node: Any) -> nodes.Node:
        size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("step", [nodes.Const(size)])).set_lineno(node.lineno))
        return node  # type: ignore[no-any-return]


def _call(method: str, args: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)


def _in_time(node: nodes.Expr) -> nodes.And:
    """The same value, looked up after the clock: strings may be long, and expressions of a line many."""
    return nodes.And(nodes.EnvironmentAttribute("in_time"), node, lineno=node.lineno)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the underscore name {name!r}")
