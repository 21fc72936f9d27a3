"""What the process holds on its device before a model is loaded: its lease comes first.

Runs in: engine thread; owns: nothing.

On a card that is the driver's context and the libraries' code, in main memory the interpreter with torch. It is there
whatever is decided, so it is leased as measured and never refused. The plan cannot know it: `edgekv plan` measures free
memory in another process, before torch is imported, and sets an estimate aside (`RUNTIME_BYTES`). What is measured
above the estimate is added to the first budget, or the pool would be smaller than planned; it comes out of the
headroom until the memory guard's first order sets the budget from a reading that shows it.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgekv.smi.device import Place
from edgekv.smi.main_memory import read_own
from edgekv.smi.reader import ReadingFailed, Source

DEADLINE_S = 2.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """Bytes, and how they are known."""

    num_bytes: int
    reason: str


def measure_runtime(place: Place, planned_bytes: int, sources: Sequence[Source]) -> Runtime:
    """What this process holds at `place` now; `planned_bytes` where nobody tells."""
    if place.kind == "cpu":
        return Runtime(read_own().resident_bytes, "the process's own resident memory")
    if place.torch_name.startswith("cuda"):
        torch.zeros(1, device=place.torch_name)  # makes the context, which is what there is to measure
    found: list[Runtime] = []
    # A driver that hangs costs the loading its deadline and no more.
    asking = threading.Thread(target=lambda: found.extend(_ask(sources)), name="edgekv-runtime", daemon=True)
    asking.start()
    asking.join(DEADLINE_S)
    return found[0] if found else Runtime(planned_bytes, "an estimate: the driver does not tell")


def _ask(sources: Sequence[Source]) -> list[Runtime]:
    for source in sources:
        try:
            reader = source.open()
        except ReadingFailed:
            continue
        try:
            own = reader.read(0.0).own_bytes
        except ReadingFailed:
            continue
        finally:
            reader.close()
        if own is not None:
            return [Runtime(own, f"as {source.name} tells")]
    return []
