import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.guard.trace import MIB, Trace, TraceError, load_trace, parse_trace

TRACES = sorted((Path(__file__).parents[3] / "bench" / "traces").glob("*.json"))


def document(**changes: Any) -> dict[str, Any]:
    points = [{"t": 0, "others_mib": 600}, {"t": 10}]
    return {"vendor": "amd", "total_mib": 8192, "points": points, **changes}


def parse(value: object) -> Trace:
    return parse_trace(value if isinstance(value, str) else json.dumps(value), "game", "game.json")


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_every_trace_that_is_shipped_can_be_played(path: Path) -> None:
    trace = load_trace(path)
    assert trace.name == path.stem
    assert trace.about
    assert trace.at(trace.duration_s).others_bytes <= trace.total_bytes


def test_there_is_a_trace_for_each_kind_of_device_and_each_way_a_driver_can_fail() -> None:
    traces = [load_trace(path) for path in TRACES]
    assert {trace.vendor for trace in traces} == {"nvidia", "amd", "amd-apu", "cpu"}
    for fails in ("hang_s", "gone"):
        failing = {trace.vendor for trace in traces if any(getattr(point, fails) for point in trace.points)}
        assert failing == {"nvidia", "amd"}


def test_a_value_holds_until_a_point_changes_it() -> None:
    points = [{"t": 0, "others_mib": 600, "gtt_mib": 5}, {"t": 4, "spill_mib": 64}, {"t": 6, "gtt_mib": 7}, {"t": 9}]
    trace = parse(document(points=points))
    assert trace.at(3.9).spill_bytes == 0
    assert trace.at(4).spill_bytes == trace.at(8.9).spill_bytes == trace.at(100).spill_bytes == 64 * MIB
    assert trace.at(6).others_bytes == 600 * MIB
    assert [trace.at(t).gtt_bytes // MIB for t in (0, 5.9, 6, 9)] == [5, 5, 7, 7]
    assert trace.duration_s == 9


def test_a_ramp_is_a_straight_line_that_begins_at_its_point() -> None:
    points = [{"t": 0, "others_mib": 600}, {"t": 5, "others_mib": 1000, "ramp_s": 2}, {"t": 10}]
    trace = parse(document(points=points))
    assert [trace.at(t).others_bytes // MIB for t in (4.99, 5, 5.5, 6, 7, 9)] == [600, 600, 700, 800, 1000, 1000]


def test_a_hang_lasts_as_long_as_it_says_beyond_later_points_too() -> None:
    points = [{"t": 0}, {"t": 5, "hang_s": 5}, {"t": 6, "others_mib": 9}, {"t": 20}]
    trace = parse(document(points=points))
    assert [trace.at(t).hanging for t in (4.9, 5, 6, 9.9, 10)] == [False, True, True, True, False]


def test_blind_spells_that_touch_are_one() -> None:
    points = [{"t": 0}, {"t": 5, "hang_s": 5}, {"t": 8, "gone": True}, {"t": 12, "gone": False}, {"t": 15, "hang_s": 1}]
    assert parse(document(points=[*points, {"t": 20}])).blind_spells() == [(5, 12), (15, 16)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vendor": "intel"}, "vendor: expected one of nvidia, amd, amd-apu, cpu, not 'intel'"),
        ({"total_mib": "8192"}, 'total_mib: expected a number, not "8192"'),
        ({"total_mib": 1}, "total_mib: expected a number from 64 to 16,777,216, not 1"),
        ({"clients": 1.5}, "clients: expected a whole number, not 1.5"),
        ({"clients": True}, "clients: expected a number, not true"),
        ({"name": 5}, "name: expected a text, not 5"),
        ({"card": "x"}, "card: unknown; there are name, about, vendor, total_mib, clients, points"),
        ({"points": [{"t": 0}]}, "points: expected a list of at least two points"),
        ({"points": [{"t": 0}, 7]}, "points[1]: expected an object, not 7"),
        ({"points": [{"t": 1}, {"t": 2}]}, "points[0].t: the first point is at 0, not 1"),
        ({"points": [{"t": 0}, {"t": 2.5}, {"t": 2}]}, "points[2].t: 2 is not after 2.5, the point before it"),
        ({"points": [{"t": 0, "ramp_s": 3}, {"t": 2}]}, "points[1].t: 2 is within the ramp that began at 0"),
        ({"points": [{"t": 0}, {"others_mib": 2}]}, "points[1].t: missing"),
        ({"points": [{"t": 0, "gone": 1}, {"t": 2}]}, "points[0].gone: expected true or false, not 1"),
        ({"points": [{"t": 0, "others_mib": -1}, {"t": 2}]}, "points[0].others_mib: expected a number from 0 to"),
        ({"points": [{"t": 0, "other": 1}, {"t": 2}]}, "points[0].other: unknown; there are t, others_mib, gtt_mib"),
        ({"vendor": "nvidia", "points": [{"t": 0, "spill_mib": 1}, {"t": 2}]}, "points[0].spill_mib: NVIDIA's driver"),
        ({"vendor": "nvidia", "points": [{"t": 0, "gtt_mib": 1}, {"t": 2}]}, "points[0].gtt_mib: there is no GTT"),
        ({"vendor": "cpu", "points": [{"t": 0}, {"t": 2, "gone": True}]}, "points[1].gone: main memory has no driver"),
        ({"vendor": "cpu", "points": [{"t": 0, "hang_s": 1}, {"t": 2}]}, "points[0].hang_s: main memory has no driver"),
    ],
)
def test_what_cannot_be_played_is_named_with_file_field_and_number(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(TraceError) as refused:
        parse(document(**changes))
    assert str(refused.value).startswith(f"game.json: {told}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "the document: expected an object"),
        ('{"vendor": "amd", "vendor": "amd"}', "'vendor' is there twice"),
        ('{"total_mib": NaN}', "NaN is not a number"),
        ('{"vendor": "amd", "total_mib": 1e999, "points": []}', "total_mib: expected a number from"),
        (f'{{"vendor": "amd", "total_mib": {"9" * 400}, "points": []}}', "total_mib: expected a number from"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_trace_at_all_is_refused_as_well(text: str, told: str) -> None:
    with pytest.raises(TraceError, match=r"^game\.json: ") as refused:
        parse(text)
    assert told in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"^none\.json: cannot be read"):
        load_trace(tmp_path / "none.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
POINT = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("t", "others_mib", "gtt_mib", "spill_mib", "hang_s", "gone", "ramp_s"), JSON)
)


@given(
    st.fixed_dictionaries(
        {}, optional={"vendor": JSON | st.just("amd"), "total_mib": JSON | st.just(100), "points": st.lists(POINT)}
    )
)
def test_nothing_but_a_trace_error_comes_of_any_document(value: dict[str, object]) -> None:
    with contextlib.suppress(TraceError):
        parse(value)
