"""The card that is measured, and how time is told on it: all that a run needs of torch.cuda is here.

Runs in: the main thread; owns: the card, its graphs and events. With `--on-host` the card's kernels run on fibers and
a pass is a loop: everything is executed, and no time means anything.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.gpu.row import Times
from edgekv.engine.card_device import Card, TorchCard

Run = Callable[[], None]


class Pass(Protocol):
    """Work that can be timed again and again; `captured`: it is one graph, so that launching it costs nothing."""

    captured: bool

    def seconds(self) -> float:
        """Do it once more: how long it took."""


class Rig(Protocol):
    """A card and its clock."""

    card: Card
    is_real: bool

    def wait(self) -> None:
        """Until the card has done everything."""

    def free_bytes(self) -> int:
        """Of the card, with what torch's allocator keeps for nobody."""

    def pass_of(self, run: Run) -> Pass:
        """`run` made ready to be timed, and warm. Raises what it raises."""

    def mark(self) -> Any:
        """Now, on the card's stream."""

    def between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to another, once the card has come past both."""

    def about(self) -> list[str]:
        """What it is, in words."""

    def load(self) -> str:
        """What else it is doing now."""


class CardRig:
    """The card that torch has as its current one."""

    is_real = True

    def __init__(self) -> None:
        """Raises what the driver says where it cannot be used."""
        self.card: Card = TorchCard(torch.device("cuda", torch.cuda.current_device()))
        self._device = self.card.device

    def wait(self) -> None:
        """See `Rig`."""
        torch.cuda.synchronize(self._device)

    def free_bytes(self) -> int:
        """See `Rig`."""
        self.wait()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def pass_of(self, run: Run) -> Pass:
        """A graph; where something in it cannot be captured, the calls themselves."""
        return _CardPass(run)

    def mark(self) -> torch.cuda.Event:
        """An event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """See `Rig`."""
        second.synchronize()
        return first.elapsed_time(second) / 1e3

    def about(self) -> list[str]:
        """Card, driver, torch."""
        properties: Any = torch.cuda.get_device_properties(self._device)
        card = self.card
        assert isinstance(card, TorchCard)
        cache = getattr(properties, "L2_cache_size", 0)
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return [
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {card.target}, "
            f"{card.compute_units} compute units" + (f", {cache / 2**20:.0f} MiB of L2" if cache else ""),
            f"driver {_driver_version() or card.loader.driver.version}, torch {torch.__version__} ({kind})",
        ]

    def load(self) -> str:
        """As far as NVML or the allocator know."""
        free, total = torch.cuda.mem_get_info(self._device)
        others = max(0, total - free - torch.cuda.memory_reserved(self._device))
        told = [f"{others / 2**20:,.0f} MiB of the card are the context's and other programs'"]
        try:
            told.append(f"{torch.cuda.utilization(self._device)} % of the last second busy")
            told.append(f"{torch.cuda.clock_rate(self._device)} MHz")
        except Exception as error:
            # Another library, and no part of what is measured: where it is missing, that is all there is to say.
            told.append(f"utilisation not known ({type(error).__name__})")
        return ", ".join(told)


class _CardPass:
    def __init__(self, run: Run) -> None:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
            run()
        current.wait_stream(side)
        torch.cuda.synchronize()
        self._play: Run
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize()
            self._play, self.captured = run, False
        else:
            self._play, self.captured = graph.replay, True
        self.seconds()

    def seconds(self) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._play()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class HostRig:
    """Fibers of the host. Takes the card that tests have."""

    is_real = False

    def __init__(self) -> None:
        """Skips, as pytest does it, where there is no compiler."""
        from tests.card.host_card import HostCard

        self.card: Card = HostCard()

    def wait(self) -> None:
        """There is nothing to wait for."""

    def free_bytes(self) -> int:
        """More than anybody asks for."""
        return 1 << 40

    def pass_of(self, run: Run) -> Pass:
        """The calls themselves."""
        return _HostPass(run)

    def mark(self) -> float:
        """Of the host's clock."""
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        """See `Rig`."""
        return second - first

    def about(self) -> list[str]:
        """That it is none."""
        return ["no card: kernels ran on fibers of the host, and no time means anything"]

    def load(self) -> str:
        """Nothing to say."""
        return ""


class _HostPass:
    captured = False

    def __init__(self, run: Run) -> None:
        begun = time.perf_counter()
        run()
        self._took = time.perf_counter() - begun

    def seconds(self) -> float:
        """What it took once: to do it again would show nothing."""
        return self._took


class WatchedCard:
    """A card whose graphs are noted down each time they run: `spans` are the marks before and behind each."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.spans: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        """Everything else is the card's own."""
        return getattr(self._rig.card, name)

    def capture(self, run: Run, owner: object) -> "_WatchedGraph":
        """As the card does."""
        return _WatchedGraph(self._rig.card.capture(run, owner), self._rig, self.spans)

    def graph_times(self) -> Times:
        """Seconds of each graph that ran."""
        return Times(tuple(self._rig.between(*span) for span in self.spans))

    def gaps(self) -> Times:
        """Seconds between one's end and the next one's beginning; there are at least two."""
        pairs = zip(self.spans, self.spans[1:], strict=False)
        return Times(tuple(self._rig.between(before[1], after[0]) for before, after in pairs))


class _WatchedGraph:
    def __init__(self, graph: Any, rig: Rig, spans: list[tuple[Any, Any]]) -> None:
        self._graph, self._rig, self._spans = graph, rig, spans

    def replay(self) -> None:
        begin = self._rig.mark()
        self._graph.replay()
        self._spans.append((begin, self._rig.mark()))


def _driver_version() -> str | None:
    """As its kernel module says."""
    for path, find in (
        (Path("/proc/driver/nvidia/version"), lambda text: text.split("Module")[-1].split()[0]),
        (Path("/sys/module/amdgpu/version"), str.strip),
    ):
        try:
            return str(find(path.read_text()))
        except (OSError, IndexError):
            continue
    return None
