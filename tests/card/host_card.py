"""A card of the host: its memory is main memory, its kernels run on fibers, and its graphs are what was put in them.

As on a card, what a launch is given is copied when it is put on the stream, and a graph replays those copies, so that
whoever changes a number of a captured launch finds that nothing changes. Memory that is handed out is full of NaN.
"""

from collections.abc import Callable
from ctypes import Structure

import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Grid
from edgekv.kernels.rt.registry import KernelSpec
from tests.kernels.fibers.harness import FiberKernel, fiber_kernel

MULTIPROCESSORS = 3


class HostEvent:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class HostGraph:
    """Closures, in the order in which they were put on the stream."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def replay(self) -> None:
        for each in self.work:
            each()


class HostLauncher:
    def __init__(self, card: "HostCard", spec: KernelSpec) -> None:
        self._card, self._kernel = card, fiber_kernel(spec)

    def __call__(self, grid: Grid, args: Structure, stream: int) -> None:
        kept = type(args).from_buffer_copy(args)
        self._card.put(lambda: self._card.run(self._kernel, kept, grid))


class HostCard:
    """`fail_allocation`: which allocation from now on (0 is the next) is out of memory.

    `fail_launch` is asked before every launch, and with None before every call of torch, what to raise instead.
    """

    def __init__(self, *, multiprocessors: int = MULTIPROCESSORS) -> None:
        self.device = torch.device("cpu")
        self.compute_units = multiprocessors
        self.decode_blocks = 3 * multiprocessors
        self.launchers = self
        self.stream = 0
        self.has_bf16_units = True
        self.fail_allocation: int | None = None
        self.fail_launch: Callable[[KernelSpec | None], BaseException | None] = lambda spec: None
        self.num_launches = 0
        self.launched: list[KernelSpec] = []
        self.taken_bytes = 0
        self.graph_bytes = 0
        self._launchers: dict[KernelSpec, HostLauncher] = {}
        self._capturing: HostGraph | None = None

    def launcher(self, spec: KernelSpec) -> HostLauncher:
        if spec not in self._launchers:
            self._launchers[spec] = HostLauncher(self, spec)
        return self._launchers[spec]

    def put(self, work: Callable[[], object]) -> None:
        if self._capturing is not None:
            self._capturing.work.append(work)
        else:
            work()

    def run(self, kernel: FiberKernel, args: Structure, grid: Grid) -> None:
        error = self.fail_launch(kernel.spec)
        if error is not None:
            raise error
        self.num_launches += 1
        self.launched.append(kernel.spec)
        kernel(args, grid, seed=self.num_launches)

    def call(self, function: Callable[[], object]) -> None:
        def run() -> None:
            if (error := self.fail_launch(None)) is not None:
                raise error
            function()

        self.put(run)

    def allocate(self, num_bytes: int) -> Tensor:
        self._maybe_fail(num_bytes)
        self.taken_bytes += num_bytes
        # Kernels load 16 bytes at a time.
        whole = torch.full((num_bytes + 256,), 0xFF, dtype=torch.uint8)
        first = -whole.data_ptr() % 256
        return whole[first : first + num_bytes]

    def staging(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def event(self) -> HostEvent:
        return HostEvent()

    def product(self, x: Tensor, weights: Tensor, out: Tensor, rounded: Tensor) -> None:
        torch.mm(x.float(), weights.float().t(), out=out)

    def capture(self, run: Callable[[], None], owner: object) -> HostGraph:
        self._maybe_fail(self.graph_bytes)
        self.taken_bytes += self.graph_bytes
        graph = self._capturing = HostGraph()
        try:
            run()
        finally:
            self._capturing = None
        return graph

    def compile(self, specs: tuple[KernelSpec, ...], progress: Callable[[int, int], None]) -> None:
        for done, spec in enumerate(specs):
            progress(done, len(specs))
            self.launcher(spec)

    def free_bytes(self) -> int:
        return (1 << 40) - self.taken_bytes

    def _maybe_fail(self, num_bytes: int) -> None:
        if self.fail_allocation is None:
            return
        self.fail_allocation -= 1
        if self.fail_allocation < 0:
            self.fail_allocation = None
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes} bytes")
