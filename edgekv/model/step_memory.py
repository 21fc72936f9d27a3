"""What a step of a natively run model works in: its buffers and their sizes.

Runs in: anywhere (no torch, no numpy); owns: nothing.
"""

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from edgekv.kernels.cpu.abi import GROUP, PANEL, SCRATCH_BYTES, Form
from edgekv.kernels.cpu.formats import ALIGNMENT, activation_stride
from edgekv.model.spec import ModelSpec


class Slot(IntEnum):
    """The buffers that operations read and write, [rows, width] float32."""

    RESIDUAL = 0
    QKV = 1
    WIDE = 2  # attention's output, then the MLP's inner activations
    BRANCH = 3  # what a second norm reads before it is added (Gemma)
    LAST = 4  # the residual of the rows that are sampled
    LOGITS = 5


SAMPLED_SLOTS = (Slot.LAST, Slot.LOGITS)
ITEM_BYTES: Mapping[Form, int] = MappingProxyType({Form.F32: 4, Form.BF16: 2, Form.Q8: 1})

# Of src/attend_plan.h: PART, MOST_ROWS, MOST_PARTS, MORE_FLOATS, and the size of an attend_job and an attend_plan.
_PART, _ROWS, _MOST_PARTS, _MORE_FLOATS, _JOB_BYTES, _PLAN_BYTES = 512, 64, 2048, 1 << 20, 72, 24
_SAMPLER_BYTES = 12  # beside each logit: its weight in float64 and a column of sorting


def slot_widths(spec: ModelSpec) -> tuple[int, ...]:
    """Columns of the buffers, by Slot."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    wide = max(spec.num_heads * spec.head_dim, spec.intermediate_size)
    hidden = spec.hidden_size
    return hidden, heads, wide, hidden if spec.post_norms else 0, hidden, spec.vocab_size


def step_bytes(spec: ModelSpec, inputs: Mapping[Form, int], tokens: int, samples: int) -> int:
    """What the buffers of a step of so many rows take, attention's scratch aside.

    `inputs`: the most columns that prepared activations have, by the form that matrices take them in.
    """
    total = 0
    for slot in Slot:
        total += aligned(4 * slot_stride(spec, slot) * (samples if slot in SAMPLED_SLOTS else tokens))
    for form, columns in inputs.items():
        total += aligned(activation_stride(columns, ITEM_BYTES[form]) * ITEM_BYTES[form] * tokens)
        if form is Form.Q8:
            total += 2 * aligned(4 * groups_of(columns) * tokens)
    return total + aligned(4 * len(set(spec.ropes)) * tokens * spec.head_dim)


def workspace_bytes(
    spec: ModelSpec,
    inputs: Mapping[Form, int],
    *,
    max_step_tokens: int,
    max_sequences: int,
    max_sampled: int,
    context_tokens: int,
    threads: int,
) -> int:
    """The most that one step takes: its buffers, attention's scratch, that of threads, and the sampler's.

    `max_sampled`: rows that have logits, at least one for each of `max_sequences`.
    """
    attention = attention_bytes(
        spec, max_step_tokens=max_step_tokens, max_sequences=max_sequences, context_tokens=context_tokens
    )
    sampler = _SAMPLER_BYTES * max_sampled * spec.vocab_size
    return step_bytes(spec, inputs, max_step_tokens, max_sampled) + attention + threads * SCRATCH_BYTES + sampler


def attention_bytes(spec: ModelSpec, *, max_step_tokens: int, max_sequences: int, context_tokens: int) -> int:
    """The most that ek_attend_shared_bytes answers: the plan of a step, and partial results of short spans."""
    group = spec.num_heads // spec.num_kv_heads
    pieces = -(-group // _ROWS)
    rows, tiles = -(-group // pieces), spec.num_kv_heads * pieces
    parts = min(max_sequences * -(-context_tokens // _PART), _MOST_PARTS)
    floats = parts * tiles * (-(-2 * rows // 16) * 16 + rows * spec.head_dim) + _MORE_FLOATS
    jobs = aligned(_PLAN_BYTES + _JOB_BYTES * max_step_tokens)
    return jobs + aligned(4 * tiles * min(max_sequences, max_step_tokens)) + 4 * floats


def slot_stride(spec: ModelSpec, slot: Slot) -> int:
    """Columns from one row of a buffer to the next.

    Logits are dense, as the sampler wants them; the others lie on odd numbers of cache lines, in whole panels.
    """
    width = slot_widths(spec)[slot]
    return width if slot is Slot.LOGITS or width == 0 else activation_stride(-(-width // PANEL) * PANEL, 4)


def groups_of(columns: int) -> int:
    """Groups of int8 activations that have a scale each."""
    return -(-columns // GROUP)


def aligned(num_bytes: int) -> int:
    """Rounded up to whole cache lines."""
    return num_bytes + ALIGNMENT - 1 & -ALIGNMENT
