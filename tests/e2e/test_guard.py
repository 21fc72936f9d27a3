"""The trace player with the real server: simulated driver, real bindings, real chats."""

import json
from pathlib import Path

import pytest

from bench.guard.play import play, undisturbed
from bench.guard.report import Result
from bench.guard.trace import Trace, parse_trace

MIB = 1 << 20
POINTS = [
    {"t": 0, "others_mib": 600},
    {"t": 3, "others_mib": 2900, "ramp_s": 0.2},
    {"t": 7, "others_mib": 600},
    {"t": 8},
]


def game(**changes: object) -> Trace:
    """A game that leaves room for few of the pool's segments, then leaves."""
    told = {"vendor": "nvidia", "total_mib": 4096, "clients": 6, "points": POINTS, **changes}
    return parse_trace(json.dumps(told), "game", "game.json")


def silent(at: float, words: str) -> None:
    pass


def played(trace: Trace, folder: Path) -> Result:
    for name in ("undisturbed", "run"):
        (folder / name).mkdir()
    expected = undisturbed(folder / "undisturbed", trace.clients, silent, questions=8)
    return play(trace, expected, folder / "run", silent, folder / "game.png")


@pytest.mark.slow
def test_a_game_that_starts_gets_its_memory_and_no_request_notices(tmp_path: Path) -> None:
    result = played(game(), tmp_path)
    assert result.fault is None
    figures, answers = result.figures, result.answers
    assert figures is not None
    assert (answers.lost, answers.changed, answers.faults) == (0, 0, ())
    assert answers.finished > 5
    assert list(result.broken()) == []
    # It did give memory back: the game left it 4096 - 2900 MiB, of which the critical headroom stayed free.
    assert figures.highest_own > 2800 * MIB
    assert figures.lowest_own < (4096 - 2900 - 256) * MIB
    assert figures.steps > 20
    assert (tmp_path / "game.png").read_bytes().startswith(b"\x89PNG")
