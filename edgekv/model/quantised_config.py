"""What config.json says of a checkpoint that was quantised before: accepted or refused by name.

Runs in: anywhere (no torch); owns: nothing. Accepted are AWQ (arXiv:2306.00978) and GPTQ (arXiv:2210.17323) with
4 bits, in the layouts that their tools write unless told otherwise; what these mean is in awq_gptq.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekv.kernels.quant.encodings import AFFINE4, Encoding
from edgekv.model.json_fields import Fields, read_object

_MAX_CONFIG_BYTES = 4 << 20
_FIELD = "quantization_config"
_INSTEAD = (
    "supported are awq and gptq with 4 bits, and GGUF files; the unquantised checkpoint can be served with "
    "weights: int8 or int4"
)


@dataclass(frozen=True, slots=True)
class GroupQuantisation:
    """How the linear layers of a checkpoint were quantised to 4 bits, w = scale (q - zero) for each group of inputs.

    `group`: inputs that share a scale; None for all of a row. `zero`: the one that all groups share (symmetric), None
    where each has its own, stored less `zero_offset` (modulo 16). `kept`: parts of the names of modules that were left
    as they were.
    """

    method: Literal["awq", "gptq"]
    group: int | None
    zero: int | None
    zero_offset: int
    kept: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For people."""
        groups = "a scale for each row" if self.group is None else f"groups of {self.group}"
        return f"{self.method.upper()}, 4 bits, {groups}"

    def encoding(self, cols: int) -> Encoding | None:
        """What a matrix of `cols` inputs becomes: the widest affine4 that a group holds; None where none fits."""
        group = cols if self.group is None else self.group
        if cols % group:
            return None
        return next((AFFINE4[size] for size in (128, 64, 32) if group % size == 0), None)


def read_quantisation(config: Fields) -> GroupQuantisation | None:
    """What the `quantization_config` of a config.json says; None where there is none.

    Raises ModelError, naming the field and what to do, for anything else than AWQ or GPTQ in a layout known here.
    """
    given = config.optional_object(_FIELD)
    if given is None:
        return None
    match given.optional_text("quant_method"):
        case "awq":
            return _awq(given)
        case "gptq":
            return _gptq(given)
        case method:
            what = "without a quant_method" if method is None else f"by {method!r:.80}"
            raise config.fault(_FIELD, f"checkpoints quantised {what} are not supported: {_INSTEAD}")


def folder_quantisation(folder: Path) -> GroupQuantisation | None:
    """What the folder's config.json says; raises ModelError."""
    path = folder / "config.json"
    return read_quantisation(Fields(str(path), read_object(path, _MAX_CONFIG_BYTES)))


def _awq(given: Fields) -> GroupQuantisation:
    _four_bits(given)
    version = (given.optional_text("version") or given.optional_text("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        raise given.fault("version", f"{version!r:.80} is not supported, only gemm: {_INSTEAD}")
    return GroupQuantisation(
        method="awq",
        group=_group(given),
        zero=None if given.flag("zero_point", True) else 8,
        zero_offset=0,
        kept=_names(given, "modules_to_not_convert"),
    )


def _gptq(given: Fields) -> GroupQuantisation:
    _four_bits(given)
    layout = given.optional_text("checkpoint_format") or given.optional_text("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or given.flag("is_marlin_format", False):
        found = "marlin" if given.flag("is_marlin_format", False) else layout
        raise given.fault("checkpoint_format", f"{found!r:.80} is not supported, only gptq and gptq_v2: {_INSTEAD}")
    dynamic = given.optional_object("dynamic")
    if dynamic is not None and dynamic.values:
        raise given.fault("dynamic", f"bits that differ from layer to layer are not supported: {_INSTEAD}")
    return GroupQuantisation(
        method="gptq",
        group=_group(given),
        zero=8 if given.flag("sym", False) else None,
        zero_offset=1 if layout == "gptq" else 0,
        kept=_names(given, "modules_to_not_convert") or (() if given.flag("lm_head", False) else ("lm_head",)),
    )


def _four_bits(given: Fields) -> None:
    bits = given.integer("bits", 1, 64)
    if bits != 4:
        raise given.fault("bits", f"{bits} bits are not supported, only 4: {_INSTEAD}")


def _group(given: Fields) -> int | None:
    group = given.integer("group_size", -1, 1 << 20)
    if group == -1:
        return None
    if group < 32 or group % 32:
        raise given.fault("group_size", f"groups of {group} are not supported, only multiples of 32, or -1: {_INSTEAD}")
    return group


def _names(given: Fields, field: str) -> tuple[str, ...]:
    return tuple(given.texts(field)) if field in given else ()
