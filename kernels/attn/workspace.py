"""Scratch memory that attention keeps from step to step, so that no layer allocates.

Runs in: engine thread; owns: the buffers.
"""

import torch
from torch import Tensor


class Workspace:
    """Flat buffers by purpose and type, each as large as the largest use so far. A buffer is valid until retaken."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(buffer.numel() * buffer.itemsize for buffer in self._buffers.values())

    def take(self, purpose: str, num_elements: int, dtype: torch.dtype) -> Tensor:
        """The first `num_elements` of a buffer, uninitialised."""
        buffer = self._buffers.get((purpose, dtype))
        if buffer is None or buffer.numel() < num_elements:
            # A normal tensor even inside inference mode, so that use outside of it stays possible.
            with torch.inference_mode(False):
                buffer = torch.empty(num_elements, dtype=dtype, device=self._device)
            self._buffers[purpose, dtype] = buffer
        return buffer[:num_elements]
