"""How the compiled library keeps a matrix: panels of 16 rows, in one of a few formats that stored encodings go into.

Runs in: anywhere (no torch, no library); owns: nothing. The layouts are drawn in src/ek.h, beside `enum ek_format`;
what is stored becomes panels by `ek_pack` (src/pack.cpp), and no value changes on the way.
"""

from collections.abc import Mapping
from types import MappingProxyType

from edgekv.kernels.cpu.abi import PANEL, Form
from edgekv.kernels.cpu.abi import Format as PanelFormat
from edgekv.kernels.quant.encodings import Encoding

__all__ = ["ALIGNMENT", "PanelFormat", "activation_form", "activation_stride", "panel_bytes", "panel_format"]

ALIGNMENT = 64
"""Of a matrix's first byte, and of prepared activations' rows."""

_FORMATS: Mapping[str, PanelFormat] = MappingProxyType(
    {
        "f32": PanelFormat.F32,
        "f16": PanelFormat.F16,
        "bf16": PanelFormat.BF16,
        "q4_0": PanelFormat.Q4,
        "q4_1": PanelFormat.Q8M,
        "q5_0": PanelFormat.Q8,
        "q5_1": PanelFormat.Q8M,
        "q8_0": PanelFormat.Q8,
        "q4_K": PanelFormat.Q4K,
        "q5_K": PanelFormat.Q5K,
        "q6_K": PanelFormat.Q6K,
        "iq4_nl": PanelFormat.Q8,
        "iq4_xs": PanelFormat.Q8F,
        "mxfp4": PanelFormat.Q8F,
        "affine4_32": PanelFormat.Q4Z,
        "affine4_64": PanelFormat.Q4Z,
        "affine4_128": PanelFormat.Q4Z,
    }
)

# Columns of a unit, and the bytes of it in a panel; those of Q4Z depend on its group.
_UNITS: Mapping[PanelFormat, tuple[int, int]] = MappingProxyType(
    {
        PanelFormat.F32: (1, 64),
        PanelFormat.F16: (1, 32),
        PanelFormat.BF16: (2, 64),
        PanelFormat.Q8: (32, 512 + 32),
        PanelFormat.Q8F: (32, 512 + 64),
        PanelFormat.Q8M: (32, 512 + 64),
        PanelFormat.Q4: (32, 256 + 32),
        PanelFormat.Q4K: (256, 64 + 256 + 8 * 256),
        PanelFormat.Q5K: (256, 64 + 256 + 8 * (256 + 64)),
        PanelFormat.Q6K: (256, 32 + 256 + 8 * (256 + 128)),
    }
)


def panel_format(encoding: Encoding) -> PanelFormat:
    """The format that rows of this encoding are packed into."""
    return _FORMATS[encoding.name]


def panel_bytes(panels: PanelFormat, rows: int, cols: int, group: int = 0) -> int:
    """Bytes of a matrix; `group` as in `Encoding.group`. Raises ValueError where the columns are no whole units."""
    if panels is PanelFormat.Q4Z:
        if group not in (32, 64, 128):
            raise ValueError(f"groups of {group} columns: Q4Z has 32, 64 or 128")
        unit_cols, unit_bytes = group, 8 * group + 48
    else:
        unit_cols, unit_bytes = _UNITS[panels]
    if cols % unit_cols and panels is not PanelFormat.BF16:
        raise ValueError(f"{cols:,} columns are no multiple of the {unit_cols} that {panels.name} has in a unit")
    return -(-rows // PANEL) * -(-cols // unit_cols) * unit_bytes


def activation_form(panels: PanelFormat) -> Form:
    """The form of activations that a matrix of this format is multiplied with."""
    if panels in (PanelFormat.F32, PanelFormat.F16):
        return Form.F32
    return Form.BF16 if panels is PanelFormat.BF16 else Form.Q8


def activation_stride(cols: int, itemsize: int) -> int:
    """Elements from one row of prepared activations to the next.

    Whole cache lines, and an odd number of them: a tile reads the same columns of many rows at a time, and rows a power
    of two apart would all want the same few lines of the first cache (4 KiB a way).
    """
    lines = -(-cols * itemsize // ALIGNMENT) | 1
    return lines * ALIGNMENT // itemsize
