"""What the tests in this folder run on: a card, or fibers of the host in its place.

    make test-gpu                            on the card that torch sees
    EDGEKV_GPU_TESTS=host make test-gpu      on fibers: everything that needs no real card, with small shapes
    EDGEKV_GPU_TESTS=host-once ...           the first case of each test alone

The host's variant proves nothing about a card. It keeps the tests themselves from rotting where there is none.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor

from edgekv.engine.card_device import Card, TorchCard
from edgekv.kernels.attn.gpu_layout import GpuCache
from edgekv.kernels.common.prepared import Prepared, launch
from tests.kernels.fibers.paged_memory import Pool

ASKED = os.environ.get("EDGEKV_GPU_TESTS", "")
ON_HOST = ASKED in ("host", "host-once")
ONCE = ASKED == "host-once"

T = TypeVar("T")


class Bed:
    """A card with what tests want of it. `lost`: what it said when it was lost, in which test."""

    def __init__(self, card: Card, *, is_real: bool) -> None:
        self.card, self.is_real = card, is_real
        self.lost: str | None = None

    @property
    def device(self) -> torch.device:
        return self.card.device

    def sized(self, *, card: T, host: T) -> T:
        """What suits a card, or the host, where a thread is a fiber and slow."""
        return card if self.is_real else host

    def operands(self, act: torch.dtype) -> torch.dtype:
        """What the card's matrix units multiply where activations are `act`."""
        return act if self.card.has_bf16_units else torch.float16

    def put(self, tensor: Tensor) -> Tensor:
        """A copy on the device, with whatever lies beside it in its memory."""
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
        copied = whole.to(self.device) if self.is_real else whole.clone()
        made = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return made.set_(copied.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    def cache(self, pool: Pool) -> GpuCache:
        """A pool's segments on the device, holes and all."""
        segments = {index: self.put(segment) for index, segment in pool.segments.items()}
        addresses = torch.zeros(len(pool.cache.table), dtype=torch.int64)
        for index, segment in segments.items():
            addresses[index] = segment.data_ptr()
        return GpuCache(pool.layout, segments, self.put(addresses))

    def run(self, prepared: Prepared | Iterable[Prepared]) -> None:
        """Launch one, or one after the other, and wait."""
        launch((prepared,) if isinstance(prepared, Prepared) else prepared, self.card.launchers, self.card.stream)
        self.wait()

    def wait(self) -> None:
        """Until the device has done everything. Raises what the device says."""
        if self.is_real:
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        """As the driver says, once torch's allocator has returned what nobody uses; on the host, of a made-up total."""
        if self.is_real:
            self.wait()
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info(self.device)[0]
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return (1 << 40) - resident

    @contextmanager
    def crowded(self) -> Iterator[None]:
        """Meanwhile somebody else has all that is free of the device."""
        if not self.is_real:
            with mock.patch("edgekv.engine.card_pool.SegmentMemory", side_effect=torch.OutOfMemoryError("none left")):
                yield
            return
        self.free_bytes()
        taken: list[Tensor] = []
        size = 1 << 30
        while size >= 2 << 20:
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device=self.device))
            except torch.OutOfMemoryError:
                size //= 2
        try:
            yield
        finally:
            taken.clear()
            self.free_bytes()


def why_no_card() -> str | None:
    """Why there is nothing to run on; None where there is."""
    if ON_HOST or torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} sees no card; EDGEKV_GPU_TESTS=host runs these tests on fibers of the host"


def open_bed() -> Bed:
    """Raises what the card's driver says where it cannot be used."""
    if ON_HOST:
        from tests.card.host_card import HostCard

        return Bed(HostCard(), is_real=False)
    return Bed(TorchCard(torch.device("cuda", torch.cuda.current_device())), is_real=True)
