"""What a step on a card works in: its buffers and their sizes, the same for the plan and for whoever allocates them.

Runs in: anywhere (no torch, no numpy); owns: nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from edgekv.core.dtype_choice import DTYPE_BYTES, DtypeName
from edgekv.model.card_layout import CardPart, aligned, allocation_bytes, card_encoding, lay_out_on_card
from edgekv.model.matrix_layout import EMBEDDING, WeightForm
from edgekv.model.spec import ModelSpec
from edgekv.model.stored import StoredTensors
from edgekv.model.weight_names import weight_names

MOST_LOGPROBS = 20
MOST_EDITS = 1280  # biased and banned tokens of one request: more than the endpoint lets in
SETTINGS_BYTES = 72  # kernels/fused/sample_rows.py: EkSampleRow
MOST_SEGMENTS = 16384  # each has more than 32 MiB, see core/kv_format.py: segment_blocks
MOST_DECODE_BLOCKS = 768  # thread blocks of decode that contexts are cut for: three on each of 256 multiprocessors
CUTS = 2  # of a step's contexts: of layers that see all of them, and of those with a window
GEMV_TOKENS, GEMM_TOKENS = 8, 32
"""Steps of up to so many rows multiply by our own kernels: from memory's side, and by matrix units (16 bits only)."""

_SAMPLE_CHUNK = 2048  # kernels/fused/sample.py: CHUNK
_SCRATCH_BYTES = 64 << 20  # of plain numbers that quantised rows become for torch, a piece of a matrix at a time
_GEMM_PARTS_BYTES = 8 << 20  # four blocks of 64 rows and 32 tokens for each of 256 multiprocessors
_GRAPH_NODE_BYTES = 32 << 10  # a captured launch keeps its parameters (an estimate)
_NODES_PER_LAYER = 12
_LIBRARY_BYTES = 40 << 20  # what cuBLAS or hipBLASLt keeps beside (an estimate: 8 to 32 MiB and a little)


@dataclass(frozen=True, slots=True)
class MatrixFacts:
    """What the buffers depend on of the matrices that linear layers multiply with.

    `int8_cols`: the most columns of a quantised one, 0 where there is none; `scratch_bytes`: the largest quantised one
    as plain numbers.
    """

    int8_cols: int
    scratch_bytes: int

    @classmethod
    def of(cls, quantised: Iterable[tuple[int, int]], dtype: DtypeName) -> "MatrixFacts":
        """Of quantised parts, (rows, cols) each."""
        shapes = list(quantised)
        return cls(
            max((cols for _, cols in shapes), default=0),
            max((rows * cols * DTYPE_BYTES[dtype] for rows, cols in shapes), default=0),
        )


@dataclass(frozen=True, slots=True)
class CardLimits:
    """The most that a step may have. `context_blocks`: of one sequence's block table.

    `proposed`: tokens that it verifies, all sequences together.
    """

    step_tokens: int
    sequences: int
    context_blocks: int
    proposed: int = 0

    @property
    def sampled(self) -> int:
        """Rows of which tokens are chosen: one for each sequence, and one behind each proposal."""
        return self.sequences + self.proposed

    @property
    def sampled_sizes(self) -> tuple[int, ...]:
        """Numbers of sampled rows that programs for chunks of prompts are made for: without proposals and with them.

        The head multiplies all of them, whoever's they are, and it is the largest matrix of all.
        """
        return (self.sequences, self.sampled) if self.proposed else (self.sequences,)

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Numbers of rows that decode programs are made for: powers of two, all sequences, and these with proposals.

        Rows that are only padding cost little: kernels are made for 1, 2, 4, 8, 16 and 32 rows, and above that products
        read the weights once for whatever there is. A captured graph costs memory, so there are no more sizes.
        """
        powers = (1 << power for power in range(self.sampled.bit_length()))
        return tuple(sorted({*(size for size in powers if size < self.sampled), self.sequences, self.sampled}))

    @property
    def ragged_sizes(self) -> tuple[int, ...]:
        """Numbers of tokens that programs for chunks of prompts are made for."""
        steps = (16, 32, *range(64, 1024, 64), *range(1024, 8192, 512), *range(8192, self.step_tokens, 4096))
        return (*(size for size in steps if size < self.step_tokens), self.step_tokens)


def matrix_facts(stored: StoredTensors, spec: ModelSpec, form: WeightForm, dtype: DtypeName) -> MatrixFacts:
    """Of a model whose headers are known."""
    parts: list[CardPart] = []
    for asked in weight_names(spec):
        if asked.kind in ("norm", "bias") or (asked.names == (EMBEDDING,) and not spec.tie_word_embeddings):
            continue
        encodings = [card_encoding(form, name, stored.tensors[name], dtype) for name in asked.names]
        parts += lay_out_on_card(asked.names, encodings, asked.shapes, dtype, gated=asked.kind == "gated")
    return MatrixFacts.of(((part.rows, part.cols) for part in parts if not part.encoding.is_float), dtype)


def buffer_bytes(spec: ModelSpec, limits: CardLimits, facts: MatrixFacts, dtype: DtypeName) -> dict[str, int]:
    """Bytes of each buffer of a step, by name; one that a model does not need has none."""
    item, tokens, sampled = DTYPE_BYTES[dtype], limits.step_tokens, limits.sampled
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    heads, kv_heads = spec.num_heads * dim, spec.num_kv_heads * dim
    chunks = -(-spec.vocab_size // _SAMPLE_CHUNK)
    part_rows = (max(1, MOST_DECODE_BLOCKS // spec.num_kv_heads) + sampled) * spec.num_heads
    table = limits.sequences * limits.context_blocks
    return {
        "residual": tokens * hidden * item,
        "normed": tokens * hidden * item,
        "branch": tokens * hidden * item if spec.post_norms else 0,
        "qkv": tokens * (heads + 2 * kv_heads) * item,
        "queries": tokens * heads * item,
        "wide": tokens * max(heads, inner) * item,
        "pair": tokens * 2 * inner * item,
        "last": sampled * hidden * item,
        "gathered": sampled * heads * item,
        "logits": sampled * spec.vocab_size * 4,
        "short_logits": sampled * spec.vocab_size * item if item < 4 else 0,
        "codes": GEMV_TOKENS * facts.int8_cols,
        "code_sums": GEMV_TOKENS * facts.int8_cols // 32 * 8,
        "gemm_parts": _GEMM_PARTS_BYTES if facts.int8_cols else 0,
        "scratch": min(facts.scratch_bytes, _SCRATCH_BYTES),
        "part_values": part_rows * dim * 4,
        "part_states": part_rows * 2 * 4,
        "angles": len(set(spec.ropes)) * tokens * dim * 4,
        "turns": tokens * dim // 2 * 4,
        "wide_positions": tokens * 4,
        "ids": tokens * 4,
        "scores": sampled * spec.vocab_size * 4,
        "bests": 2 * sampled * chunks * 8,
        "counts": sampled * spec.vocab_size * 2,
        "settings": sampled * SETTINGS_BYTES,
        "edit_ids": sampled * MOST_EDITS * 4,
        "edit_values": sampled * MOST_EDITS * 4,
        "segment_table": MOST_SEGMENTS * 8,
        "block_table": table * 4,
        "results": sampled * (3 + 2 * MOST_LOGPROBS) * 4,
        "inputs": input_words(limits) * 4,
    }


def input_words(limits: CardLimits) -> int:
    """Numbers of four bytes that a step is told, the block tables of all sequences with them: see `card_inputs`."""
    sequences, sampled = limits.sequences, limits.sampled
    fixed = 5 * limits.step_tokens + 3 * sequences + sampled + CUTS * (sampled + 2) + sequences + 1
    return fixed + sequences * limits.context_blocks


def workspace_bytes(
    spec: ModelSpec, limits: CardLimits, facts: MatrixFacts, dtype: DtypeName, *, libraries: bool = True
) -> int:
    """All buffers in one allocation, and what torch's libraries keep beside it, once for all models of a process."""
    kept = _LIBRARY_BYTES if libraries else 0
    return allocation_bytes(total_bytes(buffer_bytes(spec, limits, facts, dtype).values())) + kept


def graphs_bytes(spec: ModelSpec, limits: CardLimits) -> int:
    """What the decode graphs may take: their nodes, and what libraries keep for the stream of their capture."""
    return len(limits.decode_sizes) * spec.num_layers * _NODES_PER_LAYER * _GRAPH_NODE_BYTES + _LIBRARY_BYTES


def total_bytes(sizes: Iterable[int]) -> int:
    """Of buffers that lie one behind the other, each aligned."""
    return sum(aligned(size) for size in sizes)
