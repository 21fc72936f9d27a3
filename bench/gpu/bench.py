"""One run of all measurements: what they share, and how pieces of work are compared.

Runs in: the main thread; owns: the rig.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.rig import Pass, Rig
from bench.gpu.row import Times
from bench.gpu.sizes import Sizes
from edgekv.kernels.common.prepared import Prepared
from edgekv.kernels.rt.registry import KernelSpec

Calls = Sequence[Callable[[], object]]
Works = Mapping[str, Callable[[], Calls]]
"""What makes the calls of each piece of work, by its name."""


class NotMeasured(Exception):
    """Something cannot be measured here, and why."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What became of each piece of work: its times, or why there are none."""

    times: Mapping[str, Times]
    reasons: Mapping[str, str]

    def of(self, name: str) -> Times:
        """Raises NotMeasured."""
        if name not in self.times:
            raise NotMeasured(self.reasons[name])
        return self.times[name]


class Bench:
    """The rig, how large things are, until when to go on, and what the card's memory was found to do."""

    def __init__(self, rig: Rig, sizes: Sizes, limit_s: float) -> None:
        self.rig, self.sizes = rig, sizes
        self._ends_at = time.perf_counter() + limit_s
        self._compiled: set[KernelSpec] = set()
        self.read_bytes_s: float | None = None
        """Bytes that can be read in a second."""
        self.copy_bytes_s: float | None = None
        """Bytes, those read and those written, that a copy moves in a second."""
        self.flops_s: float | None = None
        """Of a large product in bfloat16, or float16 where the card has no units for that."""

    @property
    def device(self) -> torch.device:
        """The card, as torch knows it."""
        return self.rig.card.device

    @property
    def act(self) -> torch.dtype:
        """What models compute in."""
        return torch.bfloat16 if self.rig.card.has_bf16_units else torch.float16

    @property
    def left_s(self) -> float:
        """Until time is up."""
        return self._ends_at - time.perf_counter()

    def need(self, num_bytes: int) -> None:
        """Raises NotMeasured where the card has not so much free."""
        free = self.rig.free_bytes()
        if num_bytes > 0.9 * free:
            raise NotMeasured(f"takes {num_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")

    def share_of_read(self, num_bytes: float, times: Times) -> float | None:
        """Of the bandwidth that was measured, None where it was not."""
        return None if self.read_bytes_s is None else num_bytes / times.median / self.read_bytes_s

    def share_of_copy(self, num_bytes: float, times: Times) -> float | None:
        """The same of what a copy moves."""
        return None if self.copy_bytes_s is None else num_bytes / times.median / self.copy_bytes_s

    def share_of_flops(self, flops: float, times: Times) -> float | None:
        """The same of a large product's arithmetic."""
        return None if self.flops_s is None else flops / times.median / self.flops_s

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """On the card."""
        return torch.empty(*shape, dtype=dtype or self.act, device=self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, made there."""
        return self.empty(*shape, dtype=dtype).normal_()

    def launches(self, prepared: Iterable[Prepared]) -> Callable[[], None]:
        """What makes these launches, compiled and loaded. Whoever prepared them keeps their tensors alive."""
        card, made = self.rig.card, list(prepared)
        if wanted := tuple({each.spec for each in made} - self._compiled):
            card.compile(wanted, lambda done, total: None)
            self._compiled.update(wanted)
        bound = [(card.launchers.launcher(each.spec), each.grid, each.args) for each in made]

        def launch() -> None:
            stream = card.stream
            for launcher, grid, args in bound:
                launcher(grid, args, stream)

        return launch

    def compare(self, works: Works) -> Compared:
        """Times of one call of each piece of work, taken in turns.

        The calls of a piece of work are made one after the other, each on memory of its own, and timed together.
        """
        passes: dict[str, Pass] = {}
        counts: dict[str, int] = {}
        reasons: dict[str, str] = {}
        for name, make in works.items():
            try:
                calls = make()
                passes[name], counts[name] = self.rig.pass_of(_all(calls)), len(calls)
            except NotMeasured as reason:
                reasons[name] = str(reason)
            except Exception as error:
                # What does not compile, or is not there in this version, must not keep the others from being measured.
                reasons[name] = told(error)
        samples: dict[str, list[float]] = {name: [] for name in passes}
        least, most = self.sizes.rounds
        begun = time.perf_counter()
        budget = self.sizes.budget_s * max(1, len(passes))
        for number in range(most):
            if number >= least and time.perf_counter() - begun > budget:
                break
            for name, each in passes.items():
                samples[name].append(each.seconds() / counts[name])
        times = {name: Times(tuple(found)) for name, found in samples.items() if found}
        return Compared(times, reasons)

    def time(self, calls: Calls) -> Times:
        """Of one piece of work alone. Raises NotMeasured."""
        return self.compare({"": lambda: calls}).of("")


def copies_of(arena_bytes: int, num_bytes: int, most: int = 256) -> int:
    """How many of so many bytes each add up to the arena."""
    return max(1, min(most, -(-arena_bytes // num_bytes)))


def _all(calls: Calls) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def told(error: BaseException) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
