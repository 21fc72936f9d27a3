"""Which segments are slow to read, and so are not where they should be.

Runs in: engine thread, between steps; owns: nothing.

When a card's driver moves an allocation of ours to system memory it does not say which. What is read over PCIe is an
order of magnitude slower than what is on the card (about 20 GB/s against several hundred), so a short timed read tells.
"""

from collections.abc import Mapping

import torch

from edgekv.engine.kv_pool import Segment

READ_BYTES = 8 << 20  # 20 µs on a card, 0.4 ms over PCIe: an allocation moves as a whole, so a part of it will do
SLOW_FACTOR = 4.0


def slow_segments(read_s: Mapping[int, float]) -> tuple[int, ...]:
    """The segments that took SLOW_FACTOR times as long as the quickest or longer, the slowest first.

    `read_s`: seconds for the same number of bytes of each. None can be told where all are alike.
    """
    quickest = min(read_s.values(), default=0.0)
    slow = [index for index, seconds in read_s.items() if seconds >= SLOW_FACTOR * quickest > 0]
    return tuple(sorted(slow, key=lambda index: (-read_s[index], index)))


def time_reads(segments: Mapping[int, Segment], device: torch.device) -> dict[int, float]:
    """Seconds to read the beginning of each segment; nothing where the device is no card. Waits for the device."""
    if device.type != "cuda":
        return {}
    parts = {index: segment.data.view(-1).view(torch.uint8)[:READ_BYTES] for index, segment in segments.items()}
    size = min((part.numel() for part in parts.values()), default=0)
    seconds: dict[int, float] = {}
    with torch.cuda.device(device):
        try:
            scratch = torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            return {}
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for part in list(parts.values())[:1]:
            scratch.copy_(part[:size])  # the first of all waits for more than its own bytes
        for index, part in parts.items():
            started.record()
            scratch.copy_(part[:size])
            ended.record()
            ended.synchronize()
            seconds[index] = started.elapsed_time(ended) / 1e3
    return seconds
