import io
from dataclasses import replace

import pytest
from rich.console import Console

from bench.guard.measure import Answers, Figures
from bench.guard.report import Result, table
from bench.guard.trace import parse_trace

MIB = 1 << 20
TRACE = parse_trace('{"vendor": "amd", "total_mib": 1000, "points": [{"t": 0}, {"t": 9}]}', "game", "game.json")
KEPT = Figures(
    steps=100, longest_step_s=0.05, spilled_steps=0, spilled_bytes=0, lag_s=0.3, reversals=1, reversals_allowed=1,
    hasty_growths=0, longest_pause_s=0.1, reached_bytes=0, denied_s=0.2, share_of_ideal=0.91,
    lowest_own=0, highest_own=9,
)  # fmt: skip
ANSWERED = Answers(finished=9)


def shown(*results: Result) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table(results))
    return out.getvalue()


def test_a_trace_that_broke_nothing_kept_its_promises() -> None:
    result = Result(TRACE, KEPT, ANSWERED)
    assert list(result.broken()) == []
    assert "kept" in shown(result)
    assert result.as_json()["broken"] == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"spilled_steps": 2, "spilled_bytes": 64 * MIB}, "2 steps ran with up to 64 MiB spilled"),
        ({"lag_s": 0.31}, "given back after 310 ms, at most 300 ms promised"),
        ({"reversals": 2}, "2 growths soon given back, at most 1 can be forced"),
        ({"hasty_growths": 1}, "1 times grown again right after giving back"),
        ({"reached_bytes": 3 * MIB}, "grew 3 MiB into others' room"),
    ],
)
def test_each_broken_promise_is_told_with_its_numbers(changes: dict[str, float], told: str) -> None:
    result = Result(TRACE, replace(KEPT, **changes), ANSWERED)  # type: ignore[arg-type]
    assert list(result.broken()) == [told]
    assert "broken" in shown(result)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (Answers(finished=9, lost=1), "1 requests lost"),
        (Answers(finished=9, changed=2), "2 answers changed"),
        (Answers(refused=7), "no request was finished"),
    ],
)
def test_what_clients_miss_is_a_broken_promise(answers: Answers, told: str) -> None:
    assert list(Result(TRACE, KEPT, answers).broken()) == [told]


def test_a_run_that_did_not_come_to_its_end_is_broken_and_still_in_the_table() -> None:
    result = Result(TRACE, None, Answers(finished=1), "the server ended with 70")
    assert list(result.broken()) == ["the server ended with 70"]
    assert "broken" in shown(result)
