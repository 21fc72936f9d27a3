"""Settings that only the native CPU kernels can serve, and why the kernels do not run a model.

Runs in: anywhere (no torch); owns: nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekv.core.kv_format import KV_FORMATS
from edgekv.errors import EdgeKVError
from edgekv.model.native_shape import unsupported
from edgekv.model.spec import ModelSpec

if TYPE_CHECKING:
    from edgekv.engine.settings import EngineSettings

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Lacking:
    """Why the native CPU kernels do not run a model; `remedy` is what makes them, None where nothing does."""

    reason: str
    remedy: str | None = None


NOT_IN_USE = Lacking("they are not in use in this run")


def only_native(settings: "EngineSettings") -> Iterator[tuple[str, str]]:
    """The settings that need the kernels, each with its value."""
    if settings.weight_format != "auto":
        yield "weights", settings.weight_format
    if settings.kv_dtype is not None and not KV_FORMATS[settings.kv_dtype].is_served(native=False):
        yield "kv.dtype", settings.kv_dtype


def why_not_native(settings: "EngineSettings", spec: ModelSpec) -> Lacking | None:
    """Why the kernels cannot run the model; None where they can.

    Where `settings.native` leaves it open and they would be compiled first, that is taken to succeed.
    """
    place, block_size = settings.place, settings.block_size
    if place.kind == "card":
        return Lacking(f"they run models on the CPU only, and this one goes to {place.title}", "set device to cpu")
    if (reason := unsupported(spec, block_size)) is not None:
        is_its_shape = unsupported(spec, _BLOCK_SIZE) is not None
        remedy = None if is_its_shape else f"set kv.block_size to {_BLOCK_SIZE} or another multiple of it"
        return Lacking(f"they cannot run this model: {reason}", remedy)
    from edgekv.kernels.cpu.library import KernelsUnavailable, available, is_ready, load_library

    if settings.native is None and available() and not is_ready():
        return None
    try:
        load_library()
    except KernelsUnavailable as error:
        return Lacking(error.reason, error.remedy or None)
    return None


class NotServedHere(EdgeKVError):
    """A setting was asked for that only the native CPU kernels can do, and they do not run this model.

    `advice` is the message for whoever names the setting otherwise.
    """

    def __init__(self, setting: str, value: str, lacking: Lacking) -> None:
        without = f"set {setting} to auto"
        remedy = without if lacking.remedy is None else f"{lacking.remedy}; or {without}"
        advice = f"{value} needs the native CPU kernels, but {lacking.reason}. {remedy[0].upper()}{remedy[1:]}"
        super().__init__(f"{setting}: {advice}")
        self.setting, self.value, self.lacking, self.advice = setting, value, lacking, advice
