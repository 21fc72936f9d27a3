"""What a model computes in when nobody says. Runs in: anywhere; owns: nothing."""

from collections.abc import Collection
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
    checkpoint: DtypeName,
    num_parameters: int,
    device: DeviceKind,
    *,
    quantised: bool = False,
    native: bool = False,
    stored: Collection[DtypeName] = (),
) -> DtypeChoice:
    """What a model computes in when nothing is set.

    `quantised`: its weights are, in the file; `native`: our own kernels run it, which take them as they are. Without
    those they become plain numbers. `stored`: what the matrices are in that are plain numbers already; empty
    for what the checkpoint is said to be in.
    """
    if quantised and native:
        return DtypeChoice("bfloat16", "the weights stay quantised", keeps_stored=True)
    name = _plain_dtype(checkpoint, num_parameters, device, native)
    if quantised:
        kernels = "the card's kernels" if device == "card" else "the native CPU kernels"
        return DtypeChoice(name, f"the quantised weights are unpacked to {name}: {kernels} are not in use")
    if _is_small(checkpoint, num_parameters, device, native):
        return DtypeChoice(name, "a small model on the CPU: exact, and the same in any batch")
    return DtypeChoice(name, _reason(name, stored or (checkpoint,), device, native))


def without_bfloat16(choice: DtypeChoice, *, is_gemma: bool) -> DtypeChoice:
    """The same for a card that has none (NVIDIA's before Ampere): float16 instead.

    Gemma's activations grow beyond what float16 can hold, so that it gets float32.
    """
    if choice.name != "bfloat16":
        return choice
    reason = f"{choice.reason}, but this card has no bfloat16" + (", whose range Gemma needs" if is_gemma else "")
    return DtypeChoice("float32" if is_gemma else "float16", reason, choice.keeps_stored)


def _is_small(checkpoint: DtypeName, num_parameters: int, device: DeviceKind, native: bool) -> bool:
    limit = EXACT_NATIVE_BYTES if native else EXACT_WEIGHT_BYTES
    return device == "cpu" and num_parameters * DTYPE_BYTES[checkpoint] <= limit


def _plain_dtype(checkpoint: DtypeName, num_parameters: int, device: DeviceKind, native: bool) -> DtypeName:
    if _is_small(checkpoint, num_parameters, device, native):
        return "float32"
    return "bfloat16" if device == "cpu" and checkpoint == "float16" else checkpoint


def _reason(name: DtypeName, stored: Collection[DtypeName], device: DeviceKind, native: bool) -> str:
    others = [each for each in stored if each != name]
    if not others:
        return "as the checkpoint"
    verb = ("is" if len(others) == 1 else "are") + (" kept in" if name == "float32" else " rounded to")
    told = f"the checkpoint's {' and '.join(others)} {verb} {name}"
    if list(stored) == ["float16"] and device == "cpu":
        return f"{told}; dtype float16 keeps it" if native else f"float16 is slow on CPUs; {told}"
    return told
