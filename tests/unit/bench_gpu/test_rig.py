"""How time is told on a card, with torch's streams, graphs and events played by objects that note what is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench.gpu import rig
from bench.gpu.rig import HostRig, WatchedCard

TICK_MS = 2.0


class Played:
    """torch.cuda, as far as passes use it: an event knows at which piece of work it was recorded."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.where = "current"
        self.error: Exception | None = None

    def work(self) -> None:
        if self.where == "graph" and self.error is not None:
            raise self.error
        self.done.append(self.where)

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.where = "side"
        yield
        self.where = "current"

    @contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        self.where = "graph"
        try:
            yield
        finally:
            self.where = "current"


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


def make_event(played: Played) -> Callable[..., Any]:
    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing, "an event without times has none"
            self.at = -1

        def record(self) -> None:
            self.at = len(played.done)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return TICK_MS * (end.at - self.at)

    return Event


def make_graph(played: Played) -> Callable[[], Any]:
    class Graph:
        def replay(self) -> None:
            played.done.append("replay")

    return Graph


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    made = Played()
    for name, value in {
        "current_stream": Stream, "Stream": Stream, "stream": made.stream, "graph": made.graph,
        "synchronize": lambda *_: None, "Event": make_event(made), "CUDAGraph": make_graph(made),
    }.items():  # fmt: skip
        assert hasattr(torch.cuda, name), f"torch.cuda has no {name}"
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_a_pass_is_warmed_up_beside_captured_once_and_replayed(played: Played) -> None:
    one = rig._CardPass(played.work)
    assert played.done == ["side", "side", "graph", "replay"]
    assert one.captured
    assert one.seconds() == pytest.approx(TICK_MS / 1e3)
    assert played.done[4:] == ["replay"]


def test_what_cannot_be_captured_is_called(played: Played) -> None:
    played.error = RuntimeError("operation not permitted when stream is capturing")
    one = rig._CardPass(played.work)
    assert not one.captured
    assert one.seconds() == pytest.approx(TICK_MS / 1e3)
    assert played.done == ["side", "side", "current", "current"]


def test_a_card_that_is_full_is_no_reason_to_go_on_without_a_graph(played: Played) -> None:
    played.error = torch.OutOfMemoryError("none left")
    with pytest.raises(torch.OutOfMemoryError):
        rig._CardPass(played.work)


def test_all_that_is_asked_of_torch_is_there() -> None:
    names = ("mem_get_info", "memory_reserved", "empty_cache", "utilization", "clock_rate", "get_device_properties")
    assert [name for name in names if not hasattr(torch.cuda, name)] == []


def test_gaps_are_between_the_graphs_that_ran() -> None:
    host = HostRig()
    host.mark = iter(range(100)).__next__  # type: ignore[method-assign, assignment]
    card = WatchedCard(host)
    graph = card.capture(lambda: None, card)
    for _ in range(3):
        graph.replay()
    assert card.graph_times().samples == (1, 1, 1)
    assert card.gaps().samples == (1, 1)
    assert card.compute_units == host.card.compute_units
