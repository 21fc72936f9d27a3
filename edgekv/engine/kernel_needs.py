"""Settings that only some kernels can serve, and why those do not run a model.

Runs in: anywhere (no torch); owns: nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekv.core.kv_format import KV_FORMATS, KVEngine
from edgekv.errors import EdgeKVError
from edgekv.model.card_shape import has_kernels, unsupported_on_card
from edgekv.model.native_shape import unsupported
from edgekv.model.spec import ModelSpec

if TYPE_CHECKING:
    from edgekv.engine.settings import EngineSettings

BLOCK_SIZE = 16  # which all kernels have
_CPU_KERNELS, CARD_KERNELS = "the native CPU kernels", "a card's kernels"


@dataclass(frozen=True, slots=True)
class Lacking:
    """Why the kernels that are `needed` do not run a model; `remedy` is what makes them, None where nothing does."""

    reason: str
    remedy: str | None = None
    needed: str = _CPU_KERNELS


NOT_IN_USE = Lacking("they are not in use in this run")


def kv_engine(settings: "EngineSettings", *, native: bool) -> KVEngine:
    """What keeps keys and values for these settings."""
    return settings.place.kind if native else "torch"


def not_served(settings: "EngineSettings", *, native: bool) -> Iterator[tuple[str, str]]:
    """The settings that what runs the model does not have, each with its value."""
    if settings.weight_format != "auto" and not native:
        yield "weights", settings.weight_format
    engine = kv_engine(settings, native=native)
    if settings.kv_dtype is not None and engine not in KV_FORMATS[settings.kv_dtype].engines:
        yield "kv.dtype", settings.kv_dtype


def why_not_served(settings: "EngineSettings", spec: ModelSpec, setting: str) -> Lacking | None:
    """Why what would run the model does not have one of the settings that not everything has; None where it does.

    `setting`: as a person knows it, so of a draft model `draft.kv.dtype`.
    """
    kv_dtype = settings.kv_dtype
    if setting.endswith("kv.dtype") and kv_dtype and settings.place.kind not in KV_FORMATS[kv_dtype].engines:
        return Lacking("this model runs on the CPU", f"set {setting} to int8", CARD_KERNELS)
    return why_not_native(settings, spec)


def why_not_native(settings: "EngineSettings", spec: ModelSpec) -> Lacking | None:
    """Why our own kernels cannot run the model; None where they can.

    Where `settings.native` leaves it open and they would be compiled first, that is taken to succeed.
    """
    if settings.place.kind == "card":
        lacking = why_not_on_card(settings, spec)
        return replace(NOT_IN_USE, needed=CARD_KERNELS) if lacking is None and settings.native is False else lacking
    if (lacking := _why_not_its_shape(spec, settings.block_size, unsupported, _CPU_KERNELS)) is not None:
        return lacking
    from edgekv.kernels.cpu.library import KernelsUnavailable, available, is_ready, load_library

    if settings.native is None and available() and not is_ready():
        return None
    try:
        load_library()
    except KernelsUnavailable as error:
        return Lacking(error.reason, error.remedy or None)
    return None


def why_not_on_card(settings: "EngineSettings", spec: ModelSpec) -> Lacking | None:
    """Why a card's kernels, if they can be had, cannot run the model on this card; None where they can."""
    place = settings.place
    if not place.is_real_card:
        return Lacking(f"main memory plays {place.title}", None, CARD_KERNELS)
    if not has_kernels(place.target):
        reason = f"they are for cards from sm_75 and gfx1030 on, and {place.title} is {place.target}"
        return Lacking(reason, None, CARD_KERNELS)
    return _why_not_its_shape(spec, settings.block_size, unsupported_on_card, CARD_KERNELS)


def _why_not_its_shape(
    spec: ModelSpec, block_size: int, reason_of: Callable[[ModelSpec, int], str | None], needed: str
) -> Lacking | None:
    reason = reason_of(spec, block_size)
    if reason is None:
        return None
    others = "32" if needed == CARD_KERNELS else "another multiple of it"
    is_its_block = reason_of(spec, BLOCK_SIZE) is None
    remedy = f"set kv.block_size to {BLOCK_SIZE} or {others}" if is_its_block else None
    return Lacking(f"they cannot run this model: {reason}", remedy, needed)


class NotServedHere(EdgeKVError):
    """A setting was asked for that only kernels can do that do not run this model.

    `advice` is the message for whoever names the setting otherwise.
    """

    def __init__(self, setting: str, value: str, lacking: Lacking) -> None:
        without = f"set {setting} to auto"
        remedy = without if lacking.remedy is None else f"{lacking.remedy}; or {without}"
        advice = f"{value} needs {lacking.needed}, but {lacking.reason}. {remedy[0].upper()}{remedy[1:]}"
        super().__init__(f"{setting}: {advice}")
        self.setting, self.value, self.lacking, self.advice = setting, value, lacking, advice
