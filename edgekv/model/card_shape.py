"""Which models a card's kernels can run, and on which cards. Runs in: anywhere (no torch, no numpy); owns: nothing."""

from edgekv.model.spec import ModelSpec

_MOST_GROUP = 16
_MOST_HIDDEN = 16384  # kernels/fused/rmsnorm.py: MOST_VECTORS
_OLDEST_NVIDIA, _BFLOAT16_NVIDIA = 75, 80  # matrix units as kernels/common/mma_cuda.h has them
_AMD = ("gfx103", "gfx11", "gfx12")


def unsupported_on_card(spec: ModelSpec, block_size: int) -> str | None:
    """Why the kernels cannot run a model of this shape; None where they can."""
    group = spec.num_heads // spec.num_kv_heads
    if spec.head_dim % 32 or not 32 <= spec.head_dim <= 256:
        return f"its head dim of {spec.head_dim} is no multiple of 32 up to 256"
    if group > _MOST_GROUP:
        return f"its {group} query heads for each kv head are more than {_MOST_GROUP}"
    if spec.hidden_size % 8 or spec.hidden_size > _MOST_HIDDEN or spec.intermediate_size % 8:
        return f"its widths of {spec.hidden_size} and {spec.intermediate_size} are no multiples of 8 that they have"
    if block_size not in (16, 32):
        return f"the KV block size of {block_size} is neither 16 nor 32"
    return None


def has_kernels(target: str | None) -> bool:
    """Whether there are kernels for the card, as sm_89 or gfx1100; one that is not known is taken to be a new one."""
    if target is None:
        return True
    number = _nvidia_number(target)
    return target.startswith(_AMD) if number is None else number >= _OLDEST_NVIDIA


def has_bfloat16(target: str | None) -> bool:
    """Whether the card multiplies bfloat16; one that is not known is taken to be a new one."""
    number = None if target is None else _nvidia_number(target)
    return number is None or number >= _BFLOAT16_NVIDIA


def _nvidia_number(target: str) -> int | None:
    """89 of sm_89; None for other makers' cards."""
    return int(target.removeprefix("sm_")) if target.startswith("sm_") else None
