"""What a template's operation costs is known before it is done: formats, searches, numbers as keys, and the clock."""

import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.text.chat_template import ChatTemplate
from edgekv.text.errors import TemplateError
from edgekv.text.template_costs import ELEMENT_WEIGHT, MAX_NUMBER_KEYS, Costs, LimitExceeded, Limits

MESSAGES = [{"role": "user", "content": "x"}]
SMALL = Costs(Limits(value_size=5_000))
HASH = 2**61 - 1  # whose multiples all have the hash 0


def render(source: str, limits: Limits | None = None, **variables: Any) -> str:
    return ChatTemplate({"default": source}, limits=limits).render(MESSAGES, add_generation_prompt=True, **variables)


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(
        [*"%%%%(()).*0-# +hla", "a", "(a)", "(a(b))", "d", "s", "%%", "%(a)", "5", "9999", "00001234", "0000000000999"]
    ), max_size=12),
    values=st.sampled_from([
        1, "abc", (1, 2), (999, 7), (3, "abc", 1.5), {"a": "xyz", "a(b)": 5, "%9999d": 1}, {"a": 2**4000}, 1e308
    ]),
)  # fmt: skip
def test_a_percent_format_is_never_longer_than_predicted(pieces: list[str], values: Any) -> None:
    template = "".join(pieces)
    try:
        SMALL.percent(template, values)
        assert len(template % values) <= 5_000, template
    except (LimitExceeded, ValueError, TypeError, KeyError, OverflowError):
        pass


def test_a_long_fraction_is_counted_in_full() -> None:
    with pytest.raises(LimitExceeded):
        SMALL.percent("%(a)f" * 20, {"a": 1e308})


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(
        [*"{}:0df.>^5", "{{", "}}", "{}", "{:", "{0", "{a", "!r", "9999", "000000009999"]
    ), max_size=12),
    args=st.sampled_from([(1, 9999), ("9999", "9999"), (1e308, 2**4000), ("abc", [1, 2])]),
)  # fmt: skip
def test_a_brace_format_is_never_longer_than_predicted(pieces: list[str], args: tuple[Any, ...]) -> None:
    template = "".join(pieces)
    try:
        SMALL.braces(template, (args, {"a": 5}))
        assert len(template.format(*args, a=5)) <= 5_000, template
    except (LimitExceeded, ValueError, TypeError, LookupError, AttributeError):
        pass


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ('{{ "%-5s|%(a)5.1f%%" | format(a=1.25) if false else "%-5s|%5.1f%%" % ("a", 1.25) }}', "a    |  1.2%"),
        ('{{ "%(a)s %(b)03d" % {"a": "x", "b": 7} }}', "x 007"),
        ('{{ "%*d|%s" % (4, 7, [1]) }}', "   7|[1]"),
        ('{{ "{:>5}|{a:.2f}|{{}}".format("x", a=1.5) }}', "    x|1.50|{}"),
        ('{{ {"a": [1, 2]} | tojson(separators=(",", ":"), indent=1) }}', '{\n "a":[\n  1,\n  2\n ]\n}'),
        ('{{ "a-b" | replace(new="+", old="-") }}{{ "xa".strip("x") }}{{ " a"|trim }}{{ "-a"|trim("-") }}', "a+baaa"),
        ('{{ "a,b".split(sep=",") }}{{ "a,b".rsplit(",", 1) }}', "['a', 'b']['a', 'b']"),
        ('{{ "a\r\nb" | indent }}|{{ "a\nb" | indent(width="> ", first=true) }}', "a\n    b|> a\n> b"),
        ('{{ dict([("a", 1), (2, 3)]) }}{{ dict(a=1) }}{{ dict.fromkeys("ab") | length }}', "{'a': 1, 2: 3}{'a': 1}2"),
        ('{{ namespace({"a": 1}).a }}{{ [1, 1, 2] | unique | list }}{{ {1: 2}.items() | list }}', "1[1, 2][(1, 2)]"),
        ('{{ 1 < 2 <= 2 }} {{ "b" in "abc" }} {{ "abc"[1:] }} {{ 4 is divisibleby(num=2) }}', "True True bc True"),
        ('{{ ["b", "a"] | sort | join(",") }}{{ "ba" | list | sort | first }}{{ [3, 5] | max }}', "a,ba5"),
    ],
)  # fmt: skip
def test_harmless_templates_say_what_they_said(source: str, written: str) -> None:
    assert render(source) == written


def test_long_messages_may_be_searched_and_cut() -> None:
    said = "word " * 600_000 + "</think>" + "\n" * 1000
    source = "{{ said.rsplit('</think>', 1)[0] | length }} {{ said.rstrip('\n').rfind('</tool_response>') }}"
    assert render(source, said=said) == "3000000 -1"


WIDTH = 100_000_000
FORMATTER = int.from_bytes(f"%{WIDTH}d".encode(), "big")
HEAVY = {
    "a width behind a key with parentheses": f'{{{{ "%(a(b)){WIDTH}d" % {{"a(b)": 1}} }}}}',
    "a width behind a doubled sign": f'{{{{ "%%(%{WIDTH}d)5d" % 1 }}}}',
    "a precision behind zeros": f'{{{{ "%.000000000000{WIDTH}d" % 1 }}}}',
    "a width behind zeros": f'{{{{ "{{:000000000000{WIDTH}d}}".format(1) }}}}',
    "a width from a text": f'{{{{ "{{:{{}}}}".format(1, "{WIDTH}") }}}}',
    "a width of three numbers": '{{ "{:1{}{}}".format(1, 9999, 9999) }}',
    "a format of bytes": f'{{{{ ({FORMATTER}).to_bytes(11, "big") % 1 }}}}',
    "replace by name": "{{ ('a' * 9999) | replace(new='b' * 9999, old='a') }}",
    "separators": "{{ ([0] * 9999) | tojson(separators=('x' * 9999, ':')) }}",
    "separators of a generator": "{{ ([0] * 9999) | tojson(separators=(['x' * 9999, ':'] | map('string'))) }}",
    "an indent of text": "{{ ([0] * 9999) | tojson(indent='x' * 9999) }}",
    "split by name": "{{ ('aa,' * 3000000).split(sep=',') | length }}",
    "an indent of text for each level": "{{ [[[[[[[[[[[0] * 9999]]]]]]]]]] | tojson(indent='x' * 999) }}",
    "lines that end otherwise": "{{ ('a\\r' * 9999) | indent(9999) }}",
    "all that a generator gives": "{{ range(9999) | map('string') | map('center', 9999) | list | length }}",
    "views": "{% set d = dict(a='x' * 9999999) %}{{ [d.items(), d.values()] * 20 }}",
    "sorted characters": "{{ ('a' * 3000000) | sort | length }}",
    "joined characters": "{{ ('a' * 9000000) | join | length }}",
    "words": "{{ ('aa ' * 3000000) | wordcount }}",
    "what escapes make of a text": "{{ ('%r' % ('\\x01' * 9000000)) | length }}",
    "long numbers": "{{ [10 ** 1230] * 99999 }}",
}


@pytest.mark.parametrize("name", HEAVY)
def test_nothing_heavy_is_made_before_it_is_refused(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            render(HEAVY[name])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


MANY = (
    f"{{% set ns = namespace(x=[]) %}}{{% for i in range(8) %}}{{% set from = i * {10_000 * HASH} %}}"
    f"{{% set ns.x = ns.x + (range(from, from + {10_000 * HASH}, {HASH}) | list) %}}{{% endfor %}}"
)
SEARCHES = {
    name: f"{{{{ ('a' * 480000).{name}('ab' ~ 'a' * 240000) }}}}"
    for name in ("rfind", "rindex", "rsplit", "rpartition")
}
SETS = {name: f"{{{{ ('a' * 1500000).{name}('b' * 600000 ~ 'a') }}}}" for name in ("strip", "lstrip", "rstrip")}
SLOW = {
    **SEARCHES,
    **SETS,
    "trim": "{{ ('a' * 1500000) | trim('b' * 600000 ~ 'a') }}",
    "trim by name": "{{ ('a' * 1500000) | trim(chars='b' * 600000 ~ 'a') }}",
    "percent signs": "{{ ('%%' * 4000000) % () }}",
    "braces": "{{ ('{{' * 4000000).format() }}",
    "keys of one hash": MANY + "{{ dict.fromkeys(ns.x) | length }}",
    "pairs of one hash": MANY + "{{ dict(ns.x | batch(2)) | length }}",
    "names of one hash": MANY + "{{ namespace(ns.x | batch(2)) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_one_call_does_not_hold_the_interpreter(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(TemplateError, match=r"stopped: (a search of|more than 1,000 keys|a value larger)"):
        render(SLOW[name])
    assert time.thread_time() - began < 1.0


LONG = "{% set x = 'a' * 15000000 %}"
UNCOUNTED = {
    "slices": LONG + "{% set y = x[1:] %}" * 1000,
    "sums": LONG + "{% set y = x + 'b' %}" * 1000,
    "comparisons": LONG + "{% set y = [" + "'bb' in x, " * 1000 + "] %}",
    "chains": LONG + "{% set y = x[0] in x" + " in x" * 1500 + " %}",
    "tests": LONG + "{% set y = [" + "'bb' is in x, " * 1000 + "] %}",
    "tests in a filter": LONG + "{{ ('bb,' * 1000).split(',') | select('in', x) | list }}",
    "equal elements": "{% set x = range(0, " + str(3000 * HASH) + f", {HASH}) | list %}}"
                      "{{ (x + [x | last] * 90000) | unique | list | length }}",
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOUNTED)
def test_the_clock_stops_what_is_no_step(name: str) -> None:
    template = ChatTemplate({"default": UNCOUNTED[name]}, limits=Limits(seconds=0.1))
    began = time.thread_time()
    with pytest.raises(TemplateError, match=r"stopped: more than 0\.1 seconds"):
        template.render(MESSAGES, add_generation_prompt=True)
    assert time.thread_time() - began < 0.5


@pytest.mark.parametrize(
    "source",
    [
        "{{ (5).to_bytes(1) }}", "{{ (5).from_bytes([1]) }}", "{{ {}.fromkeys('ab') }}",
        "{{ {}.keys().isdisjoint('a') }}", "{{ ''.maketrans('a', 'b') }}", "{{ ('<a>' | safe).striptags() }}",
        "{{ ['a'] | map(attribute='encode') | map('string') | list }}{{ 'a'.encode() }}",
    ],
)  # fmt: skip
def test_methods_that_nothing_predicts_are_unsafe(source: str) -> None:
    with pytest.raises(TemplateError, match="is unsafe"):
        render(source)


def test_a_dict_written_out_has_few_numbers_as_keys() -> None:
    def display(count: int) -> str:
        return "{{ {" + ", ".join(f"{i * HASH}: 0" for i in range(count)) + "} | length }}"

    assert render(display(MAX_NUMBER_KEYS)) == "1000"
    with pytest.raises(TemplateError, match="more than 1,000 keys that are no strings"):
        ChatTemplate({"default": display(MAX_NUMBER_KEYS + 1)})
    assert render("{{ {" + ", ".join(f"'{i}': 0" for i in range(2000)) + "} | length }}") == "2000"


def test_the_weight_of_a_value_is_not_less_than_its_text() -> None:
    costs = Costs(Limits())
    for value in ("abc", 10**1200, [10**1200] * 3, {"a": {1: "b"}.items()}, [{"a": 1}.keys()], (1.5, None, True)):
        assert costs.weight(value) >= len(str(value)) - ELEMENT_WEIGHT
