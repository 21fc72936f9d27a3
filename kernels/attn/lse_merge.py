"""lse_merge.h: results of a context's parts become one.

Runs in: engine thread; owns: nothing.
"""

import math
from collections.abc import Iterator, Sequence
from ctypes import Structure, c_int32, c_uint64
from itertools import pairwise, product

import torch
from torch import Tensor

from edgekv.kernels.attn.splits import Parts
from edgekv.kernels.common.prepared import Prepared, address_of, kind
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 128


class EkLseMerge(Structure):
    """The kernel's arguments."""

    _fields_ = (
        ("part_values", c_uint64),
        ("part_states", c_uint64),
        ("out", c_uint64),
        ("slots", c_uint64),
        ("sinks", c_uint64),
        ("heads", c_int32),
        ("always_parts", c_int32),
    )


def spec(head_dim: int, act: torch.dtype) -> KernelSpec:
    """For results of type `act`."""
    defines = {"EK_D": head_dim, "EK_ACT": kind(act)}
    return KernelSpec("attn/lse_merge.h", "ek_lse_merge", THREADS, EkLseMerge, defines)


def variants() -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix: each number of lanes that a head has."""
    for head_dim, act in product((64, 96, 128, 256), (torch.bfloat16, torch.float32)):
        yield spec(head_dim, act)


def prepare(
    parts: Parts,
    out: Tensor,
    *,
    slots: Tensor,
    sinks: Tensor | None = None,
    always_parts: bool = False,
) -> Prepared:
    """Writes what the slots of a query in `parts` come to, to `out` [queries, heads, head_dim], contiguous.

    Args:
        parts: what decode_split has written.
        out: where the results go.
        slots: [queries + 1] int32: a query has the slots from its number there to before the next one's. Of a cut
            these are all numbers but the first.
        sinks: as decode_split's.
        always_parts: as decode_split was told. Else a query of one slot is written already, and left alone.

    Raises ValueError for what does not fit together.
    """
    queries, heads, head_dim = out.shape
    if parts.values.shape != (parts.slots, heads, head_dim) or not out.is_contiguous():
        raise ValueError(f"parts of {list(parts.values.shape)} are none of results {list(out.shape)}")
    if slots.shape != (queries + 1,):
        raise ValueError(f"{len(slots)} first slots are none of {queries} queries")
    if parts.values.data_ptr() % 16:
        raise ValueError("the parts' values are not aligned to 16 bytes")
    args = EkLseMerge(
        parts.values.data_ptr(),
        parts.states.data_ptr(),
        out.data_ptr(),
        slots.data_ptr(),
        address_of(sinks),
        heads,
        always_parts,
    )
    return Prepared(spec(head_dim, out.dtype), (heads, queries, 1), args)


def reference(parts: Parts, slots: Sequence[int], sinks: Tensor | None = None) -> Tensor:
    """What the slots of each query come to, [queries, heads, head_dim] float32."""
    largest, sums = parts.states.double().unbind(-1)  # [slots, heads]
    scores = torch.where(sums == 0, -torch.inf, largest + sums.log2()) * math.log(2)
    values = torch.where((sums == 0)[..., None], 0, parts.values.double() / sums[..., None])
    results = []
    for begin, end in pairwise(slots):
        own = scores[begin:end]
        if sinks is not None:
            own = torch.cat((own, sinks.double().unsqueeze(0)))
        shares = own.softmax(0)[: end - begin].nan_to_num(0.0)
        results.append((shares[..., None] * values[begin:end]).sum(0))
    return torch.stack(results).float()
