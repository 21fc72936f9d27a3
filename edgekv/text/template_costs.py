"""What an operation of a template makes and compares, said before it is done: too much of either is refused.

One call into C holds the interpreter until it is over, and no clock stops it. A few digits ask for gigabytes, and some
searches take the product of their inputs. Estimates are upper bounds, except that an escape may take twelve characters.

Runs in: anywhere; owns: nothing that changes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import jinja2
from jinja2.utils import Namespace

ELEMENT_WEIGHT = 32  # what an element takes in memory, and in time to look at, compared to a character
MAX_NUMBER_KEYS = 1_000
_COMPARISONS = 8  # that take as long as a character takes to make
_MAX_BITS = 4096
_MAX_ARGUMENT = 100_000
_LONGEST_FLOAT = 320  # '%f' of 1e308
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
# CPython reads nested parentheses in a key, which this does not: it stops there.
_PERCENT_FIELD = re.compile(
    r"%(?:\([^()]*(?P<stop>[()]|\Z))?[-#0 +]*(?P<width>\*|[0-9]*)(?:\.(?P<precision>\*|[0-9]*))?[hlL]?.?", re.DOTALL
)
_VIEWS: tuple[type[Iterable[Any]], ...] = (type({}.keys()), type({}.values()), type({}.items()))
_HOLDERS: tuple[type[Iterable[Any]], ...] = (list, tuple, set, frozenset, *_VIEWS)
_PREDICTED_FILTERS = frozenset(["format", "indent", "pprint", "replace", "tojson", "trim"])
_ITERATING_FILTERS = frozenset(["groupby", "join", "list", "max", "min", "slice", "sort"])
_SPLITTING_FILTERS = frozenset(["title", "urlencode", "wordcount"])


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


class Costs:
    """Weights and predictions in the unit of `Limits.value_size`; every method raises LimitExceeded for too much."""

    def __init__(self, limits: Limits) -> None:
        self._value_size = limits.value_size

    def bound(self, size: int) -> None:
        """Refuse a value of this weight if it is too heavy."""
        if size > self._value_size:
            raise LimitExceeded(f"a value larger than {self._value_size:,} characters or elements")

    def weight(self, value: Any) -> int:
        """The size of a value written out, counting what is in it twice twice."""
        if isinstance(value, str):
            self.bound(len(value))
            return len(value)
        weight = 0
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str | bytes):
                weight += len(item)
            elif isinstance(item, int):
                _bound_bits(item.bit_length())
                weight += item.bit_length()  # no base writes it longer
            elif isinstance(item, _HOLDERS):
                waiting.extend(item)
            elif isinstance(item, dict):
                waiting.extend(item)
                waiting.extend(item.values())
            elif isinstance(item, Namespace):
                waiting.extend(item._Namespace__attrs.values())
            weight += ELEMENT_WEIGHT
            self.bound(weight + len(waiting) * ELEMENT_WEIGHT)
        return weight

    def binary(self, operator: str, left: Any, right: Any) -> None:
        """An arithmetic operator."""
        for value in (left, right):
            if isinstance(value, int):
                _bound_bits(value.bit_length())
        match operator, left, right:
            case "+", _, _:
                self.bound(self.weight(left) + self.weight(right))
            case "*", int(), int():
                _bound_bits(left.bit_length() + right.bit_length())
            case "*", _, int():
                self.bound(self.weight(left) * right)
            case "*", int(), _:
                self.bound(self.weight(right) * left)
            case "**", int(), int():
                _bound_bits(left.bit_length() * abs(right))
            case "%", str(), _:
                self.percent(left, right)

    def filter(self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A filter of `value`, which is no iterator where the filter is "join"."""
        given = [*args, *kwargs.values()]
        numbers = [abs(item) for item in given if isinstance(item, int)]
        if any(number > _MAX_ARGUMENT for number in numbers):
            raise LimitExceeded(f"{name} with a number above {_MAX_ARGUMENT:,}")
        if name == "sum" and any(isinstance(item, list | tuple) for item in given):
            raise LimitExceeded("sum of lists")
        if name in _ITERATING_FILTERS and isinstance(value, str):
            self.bound(len(value) * ELEMENT_WEIGHT)
        elif name in _SPLITTING_FILTERS:
            self.bound(self.weight(value) * 8)
        if name == "join":
            self.bound(self.weight(value) + len(value) * sum(map(self.weight, given)))
        elif name in _PREDICTED_FILTERS:
            self._predicted_filter(name, value, args, kwargs, sum(numbers))

    def _predicted_filter(
        self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any], number: int
    ) -> None:
        weight = self.weight(value)
        given = [*args, *kwargs.values()]

        def argument(place: int, name: str) -> Any:
            return args[place] if place < len(args) else kwargs.get(name, "")

        match name:
            case "format":
                self.percent(str(value), kwargs or tuple(args))
            case "indent":
                columns = 4 + number + sum(len(item) for item in given if isinstance(item, str))
                self.bound(weight + (_count_lines(str(value)) + 1) * (ELEMENT_WEIGHT + columns))
            case "pprint":
                self.bound(weight * 50)  # so much slower than other ways to write a value
            case "replace":
                self.replace(str(value), argument(0, "old"), argument(1, "new"))
            case "tojson":
                if any(isinstance(item, Iterator) for item in given):
                    raise LimitExceeded("tojson with separators that are no list")
                # A text of its own is an indent, of which an element gets one for each level; others go between them.
                columns = number + sum(len(item) for item in given if isinstance(item, str))
                self.bound(weight * (1 + columns) + weight // ELEMENT_WEIGHT * sum(map(self.weight, given)))
            case "trim":
                self.search(str(value), argument(0, "chars"))

    def call(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call; of interest are the methods of strings."""
        text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if not isinstance(text, str):
            return
        given = [*args, *kwargs.values()]
        first = given[0] if given else None
        numbers = [abs(item) for item in given if isinstance(item, int)]
        match name:
            case "replace" if len(args) >= 2:
                self.replace(text, args[0], args[1])
            case "join" if args:
                if not isinstance(first, str | list | tuple | dict):
                    raise LimitExceeded("str.join of something other than a list")
                self.bound(self.weight(first) + len(first) * len(text))
            case "split" | "rsplit":
                self._split(text, name, args[0] if args else kwargs.get("sep"))
            case "splitlines":
                self.bound(len(text) + _count_lines(text) * ELEMENT_WEIGHT)
            case "rfind" | "rindex" | "rpartition" | "strip" | "lstrip" | "rstrip":
                self.search(text, first)
            case "center" | "ljust" | "rjust" | "zfill":
                self.bound(len(text) + sum(numbers))
            case "expandtabs":
                self.bound(len(text) + text.count("\t") * max(numbers, default=8))

    def _split(self, text: str, name: str, separator: Any) -> None:
        if isinstance(separator, str) and separator:
            cuts = text.count(separator)
            if name == "rsplit":
                self.search(text, separator)
        else:
            cuts = sum(map(str.isspace, text))
        self.bound(len(text) + cuts * ELEMENT_WEIGHT)

    def replace(self, text: str, old: Any, new: Any) -> None:
        """Every `old` in a text becomes `new`."""
        self.bound(len(text) + text.count(str(old)) * self.weight(new))

    def search(self, text: str, wanted: Any) -> None:
        """Compare `wanted` at every place of a text: searching from the right, or each character with a set of them.

        Searching from the left has no such worst case (CPython's two-way search).
        """
        if isinstance(wanted, str) and len(text) * len(wanted) > self._value_size * _COMPARISONS:
            raise LimitExceeded(f"a search of {len(text):,} characters for {len(wanted):,}")

    def percent(self, template: str, values: Any) -> None:
        """`template % values`."""
        self.bound(template.count("%") // 2 * _LONGEST_FLOAT)
        computed = max((abs(item) for item in _flat(values) if isinstance(item, int)), default=0)
        fields = written = 0
        for field in _PERCENT_FIELD.finditer(template):
            if field["stop"] not in (None, ")"):
                raise LimitExceeded("a key with a parenthesis in a format")
            fields += 1
            for width in (field["width"], field["precision"]):
                written += computed if width == "*" else _width(width or "")
        self._format(template, fields, written, values)

    def braces(self, template: str, values: Any) -> None:
        """`template.format(…)`."""
        self.bound(template.count("{") // 2 * _LONGEST_FLOAT)
        fields = [field for _, name, field, _ in Formatter().parse(template) if name is not None]
        if any("{" in field for field in fields if field):
            raise LimitExceeded("a field inside of a field's format")
        written = sum(_width(digits) for field in fields for digits in re.findall(r"\d+", field or ""))
        self._format(template, len(fields), written, values)

    def _format(self, template: str, fields: int, written: int, values: Any) -> None:
        self.bound(len(template) + written + fields * (self.weight(values) + _LONGEST_FLOAT))


def refuse_many_numbers(keys: Iterable[Any]) -> None:
    """Numbers can be chosen that all have one hash: each new key of a dict is then compared with all before it."""
    if sum(not isinstance(key, str) for key in keys) > MAX_NUMBER_KEYS:
        raise LimitExceeded(f"more than {MAX_NUMBER_KEYS:,} keys that are no strings")


def _bound_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise LimitExceeded(f"a number of more than {_MAX_BITS:,} bits")


def _width(digits: str) -> int:
    if len(digits) > 9:  # leading zeros count for nothing, but nobody writes them
        raise LimitExceeded("a width of more than nine digits")
    return int(digits or "0")


def _count_lines(text: str) -> int:
    return sum(map(text.count, _LINE_ENDS))


def _flat(value: Any) -> Iterator[Any]:
    match value:
        case dict():
            yield from _flat(list(value.values()))
        case list() | tuple():
            for item in value:
                yield from _flat(item)
        case _:
            yield value
