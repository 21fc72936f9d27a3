"""What a model computes in when nobody says. Runs in: anywhere; owns: nothing."""

from dataclasses import dataclass
from typing import Literal

EXACT_WEIGHT_BYTES = 1 << 30
# The native kernels give the same in any batch in any format: only for a model that is fast at any width does
# float32 bring something.
EXACT_NATIVE_BYTES = 64 << 20

DtypeName = Literal["float32", "bfloat16", "float16"]
DeviceKind = Literal["cpu", "card"]

DTYPE_BYTES: dict[DtypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """What to compute in, and why. `keeps_stored`: weights stay in what the checkpoint has, plain ones too."""

    name: DtypeName
    reason: str
    keeps_stored: bool = False


def choose_dtype(
    checkpoint: DtypeName, num_parameters: int, device: DeviceKind, *, quantised: bool = False, native: bool = False
) -> DtypeChoice:
    """What a model computes in when nothing is set.

    `quantised`: its weights are, in the file or by setting; `native`: the native CPU kernels run it, which take them as
    they are. Without those they become plain numbers.
    """
    if quantised and native:
        return DtypeChoice("bfloat16", "the weights stay quantised", keeps_stored=True)
    if quantised:
        name = _plain_dtype(checkpoint, num_parameters, device, native)[0]
        lacking = "no kernels for them on a card yet" if device == "card" else "the native CPU kernels are not in use"
        return DtypeChoice(name, f"the quantised weights are unpacked to {name}: {lacking}")
    return DtypeChoice(*_plain_dtype(checkpoint, num_parameters, device, native))


def _plain_dtype(
    checkpoint: DtypeName, num_parameters: int, device: DeviceKind, native: bool
) -> tuple[DtypeName, str]:
    if device == "card":
        return checkpoint, "as the checkpoint"
    if num_parameters * DTYPE_BYTES[checkpoint] <= (EXACT_NATIVE_BYTES if native else EXACT_WEIGHT_BYTES):
        return "float32", "a small model on the CPU: exact, and the same in any batch"
    if checkpoint == "float16":
        return "bfloat16", "float16 is slow on CPUs; the checkpoint's float16 is rounded to bfloat16"
    return checkpoint, "as the checkpoint"
