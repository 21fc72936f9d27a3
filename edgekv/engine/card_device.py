"""A card as the engine uses it: memory, streams, events and graphs are torch's, kernels are launched by the driver.

Runs in: engine thread, in which the card is set; owns: the loader of kernels. Tests put a card in its place whose
kernels run on fibers of the host.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from edgekv.engine.card_compile import compile_all
from edgekv.kernels.common.prepared import Launchers
from edgekv.kernels.rt.driver import DriverKind
from edgekv.kernels.rt.registry import KernelSpec, Loader, open_loader

# What HIP calls a multiprocessor is a pair of compute units on AMD's cards.
_COMPUTE_UNITS: dict[DriverKind, int] = {"cuda": 1, "hip": 2}
# Thread blocks of decode_split that a multiprocessor has registers for. HIP's has room for six (RDNA 2) to nine
# (RDNA 3) of queries and keys of 16 bits, and for fewer where keys are quantised.
_DECODE_BLOCKS: dict[DriverKind, int] = {"cuda": 3, "hip": 6}
_WITHOUT_BF16 = ("sm_7", "gfx90", "gfx101", "gfx103")


class Event(Protocol):
    """A point on the stream."""

    def record(self) -> None:
        """It is here."""

    def synchronize(self) -> None:
        """Wait until the device has come past it."""


class Graph(Protocol):
    """Work that was captured once and runs again at one call."""

    def replay(self) -> None:
        """Put it on the stream."""


class Card(Protocol):
    """One device and its stream."""

    @property
    def device(self) -> torch.device:
        """As torch knows it."""

    @property
    def launchers(self) -> Launchers:
        """Where kernels come from."""

    @property
    def compute_units(self) -> int:
        """Multiprocessors as the matrix kernels count them: what HIP calls one is two of them, on AMD's cards."""

    @property
    def decode_blocks(self) -> int:
        """Thread blocks of decode_split that it has at a time."""

    @property
    def has_bf16_units(self) -> bool:
        """Whether its matrix units multiply bfloat16; those of Turing and RDNA 2 multiply float16 only."""

    @property
    def stream(self) -> int:
        """What work is put on now: another one while a graph is captured."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Bytes of the card, uint8. Raises torch.OutOfMemoryError or MemoryError."""

    def staging(self, num_bytes: int) -> Tensor:
        """Bytes of main memory that copies to and from the card need not wait for, uint8."""

    def event(self) -> Event:
        """A new one."""

    def call(self, function: Callable[[], object]) -> None:
        """Have torch put something on the stream."""

    def capture(self, run: Callable[[], None], owner: object) -> Graph:
        """What `run` puts on the stream, captured instead of run. Raises torch.OutOfMemoryError or MemoryError.

        What one `owner` has captured may share memory; it lives as long as its graphs.
        """

    def compile(self, specs: tuple[KernelSpec, ...], progress: Callable[[int, int], None]) -> None:
        """Have the kernels' code at hand, so that loading them takes no time.

        `progress` hears of (kernels done, kernels in all), and may raise to stop it. Raises KernelUnavailable,
        CompileFailed.
        """

    def free_bytes(self) -> int:
        """Of the device, as its driver says, once torch's allocator has given back what it only keeps."""

    def product(self, x: Tensor, weights: Tensor, out: Tensor, rounded: Tensor) -> None:
        """To `out` [rows, outputs] float32 goes x · weightsᵀ of 16 bits; `rounded` of x's type is room for it."""


class TorchCard:
    """The card that torch calls `device`; it is set in this thread from now on."""

    def __init__(self, device: torch.device) -> None:
        """Raises DriverMissing or DriverError where the driver cannot be used beside torch."""
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # the context, which the driver's calls need
        self.device = device
        properties: Any = torch.cuda.get_device_properties(device)
        multiprocessors: int = properties.multi_processor_count
        self.target = target_of(properties)
        self.has_bf16_units = not self.target.startswith(_WITHOUT_BF16)
        kind: DriverKind = "hip" if torch.version.hip else "cuda"
        self.compute_units = _COMPUTE_UNITS[kind] * multiprocessors
        self.decode_blocks = _DECODE_BLOCKS[kind] * multiprocessors
        self._captures: WeakKeyDictionary[object, tuple[Any, torch.cuda.Stream]] = WeakKeyDictionary()
        self._has_wide_products = _has_wide_products(device)
        major = None if torch.version.cuda is None else int(torch.version.cuda.split(".")[0])
        self.loader: Loader = open_loader(kind, self.target, torch_folders(), major=major)

    @property
    def launchers(self) -> Launchers:
        """The loader."""
        return self.loader

    @property
    def stream(self) -> int:
        """The current one of torch."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def allocate(self, num_bytes: int) -> Tensor:
        """By torch's allocator."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def staging(self, num_bytes: int) -> Tensor:
        """Pinned."""
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def event(self) -> Event:
        """One that is waited for asleep: a core that spins is one less for whoever shares the machine."""
        event: Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        return event

    def call(self, function: Callable[[], object]) -> None:
        """Now."""
        function()

    def capture(self, run: Callable[[], None], owner: object) -> Graph:
        """By torch, on a stream of the owner's: `stream` is that one meanwhile."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # They run one at a time, so that what torch allocates within them can be the same memory for all of an owner.
        # So is the stream: with the first of a stream's graphs goes the workspace that libraries have for that stream,
        # and those of a model that stays must keep theirs when another one's go.
        if owner not in self._captures:
            stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._captures[owner] = torch.cuda.graph_pool_handle(), stream
        pool, stream = self._captures[owner]
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run()
        return graph

    def compile(self, specs: tuple[KernelSpec, ...], progress: Callable[[int, int], None]) -> None:
        """On all cores."""
        compile_all(self.loader, specs, progress)

    def free_bytes(self) -> int:
        """By the driver; waits for what runs."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def product(self, x: Tensor, weights: Tensor, out: Tensor, rounded: Tensor) -> None:
        """By torch's library, which can tell what it has added up without rounding it."""
        if self._has_wide_products:
            torch.mm(x, weights.t(), out_dtype=torch.float32, out=out)
        else:
            torch.mm(x, weights.t(), out=rounded)
            out.copy_(rounded)


def _has_wide_products(device: torch.device) -> bool:
    """Whether this torch multiplies 16-bit matrices to float32 there; not every build does."""
    x = torch.zeros(16, 16, dtype=torch.float16, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32, out=torch.empty(16, 16, device=device))
    except (RuntimeError, TypeError):
        return False
    return True


def target_of(properties: Any) -> str:
    """What compilers call the card: sm_89, gfx1100."""
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def torch_folders() -> tuple[Path, ...]:
    """Where torch's own libraries are."""
    return (Path(torch.__file__).parent / "lib",)
