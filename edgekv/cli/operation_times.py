"""Where the native kernels spent their time, by operation. Runs in: the main thread; owns: nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekv.engine.measure import EngineMeter
    from edgekv.model.lowering import Operation
    from edgekv.model.packed_weights import PackedMatrix


class Profile:
    """Where the native kernels spent the time of some steps; empty unless wanted."""

    def __init__(self, meter: "EngineMeter", wanted: bool) -> None:
        from edgekv.model.native_lm import NativeLM

        self._operations: tuple[Operation[PackedMatrix], ...] = ()
        if wanted and isinstance(meter.model, NativeLM):
            self._operations, self._spent = meter.model.lowered.operations, meter.model.profile()

    def start(self) -> None:
        """Forget what was before the steps that count."""
        if self._operations:
            self._spent[:] = 0

    def read(self, steps: int, cache_bytes: int, bandwidth: float) -> dict[str, Any]:
        """Milliseconds of a step by operation, and for those that read much, the share of bandwidth."""
        if not self._operations:
            return {}
        seconds, num_bytes = by_operation(self._operations, self._spent.tolist(), steps)
        num_bytes["attend"] = cache_bytes
        return {
            "profile": {
                name: {
                    "ms": round(spent * 1e3, 4),
                    "of_bandwidth": round(num_bytes[name] / spent / bandwidth, 3) if num_bytes.get(name) else None,
                }
                for name, spent in seconds.items()
            }
        }


def by_operation(
    operations: "Sequence[Operation[PackedMatrix]]", spent_ns: Sequence[int], steps: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of a step by operation, the longest first, and the bytes of weights that those with weights read."""
    from edgekv.kernels.cpu.formats import PanelFormat

    seconds: dict[str, float] = {}
    num_bytes: dict[str, int] = {}
    for operation, spent in zip(operations, spent_ns, strict=True):
        name, matrix = operation.kind.name.lower(), operation.matrix
        if matrix is not None and name == "linear":
            shapes = "+".join(f"{part.rows}x{part.cols} {PanelFormat(part.format).name}" for part in matrix.parts)
            name = f"linear {shapes}"
            num_bytes[name] = num_bytes.get(name, 0) + matrix.num_bytes
        seconds[name] = seconds.get(name, 0.0) + spent / 1e9 / steps
    return dict(sorted(seconds.items(), key=lambda item: -item[1])), num_bytes
