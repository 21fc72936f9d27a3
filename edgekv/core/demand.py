"""What one model is to serve on a device, and what memory that takes beside its weights.

Runs in: anywhere; owns: nothing. A target and its draft are reckoned alike.
"""

from dataclasses import dataclass

from edgekv.config.units import MIB
from edgekv.core.dtype_choice import DTYPE_BYTES, DeviceKind, DtypeName
from edgekv.core.kv_format import CARD_PAGE_BYTES, KV_FORMATS, KVDtypeName, KVPlan, context_need_bytes, plan_kv
from edgekv.core.model_shape import ModelShape

GATHER_BYTES = 8 * MIB
CAPPED_SCORES = 4 << 20  # scores that soft-capped attention writes out at a time
# A captured graph keeps its kernels' launch parameters on the card; activations are the workspace's (an estimate).
GRAPH_NODE_BYTES = 32 << 10
GRAPH_NODES_PER_LAYER = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The numbers that a model computes in and keeps keys and values in, and the most that it is to serve.

    `context_tokens`: the longest request, prompt and output. `max_sequences`, `max_step_tokens`, `max_proposed`:
    sequences, tokens and proposed tokens in one step; each proposed token has logits of its own. `block_size`: tokens
    in a block. `kv_alignment`: of the parts of a block, see `KVFormat.block_bytes`.
    """

    shape: ModelShape
    device: DeviceKind
    dtype: DtypeName
    kv_dtype: KVDtypeName
    block_size: int
    context_tokens: int
    max_sequences: int
    max_step_tokens: int
    max_proposed: int = 0
    kv_alignment: int = 1

    @property
    def workspace_bytes(self) -> int:
        """An upper estimate of what one step allocates: activations, attention and logits, with the sorting of these.

        The widest moment of a layer holds the residual twice, q, k, v and the attention's output, or gate, up and
        their product; twice that, because an allocator keeps the one while the next is being made.
        """
        shape = self.shape
        heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        widest = 2 * shape.hidden_size + max(heads, 3 * shape.intermediate_size)
        activations = 2 * self.max_step_tokens * widest * DTYPE_BYTES[self.dtype]
        max_sampled = self.max_sequences + self.max_proposed
        logits = max_sampled * shape.vocab_size * (4 + 4 + 8)  # float32, its softmax, and int64 sorting indices
        return activations + self._attention_bytes + logits

    @property
    def graphs_bytes(self) -> int:
        """What captured decode graphs would keep on a card, one for each power of two of sequences: an estimate."""
        if self.device == "cpu":
            return 0
        return self.shape.num_layers * GRAPH_NODES_PER_LAYER * GRAPH_NODE_BYTES * self.max_sequences.bit_length()

    @property
    def one_context_bytes(self) -> int:
        """Bytes of the blocks of one sequence that fills the context."""
        return context_need_bytes(
            self.shape,
            kv_format=self.kv_dtype,
            block_size=self.block_size,
            context_tokens=self.context_tokens,
            alignment=self.kv_alignment,
        )

    def pool(self, budget_bytes: int) -> KVPlan:
        """The KV pool that `budget_bytes` hold."""
        return plan_kv(
            self.shape,
            kv_format=self.kv_dtype,
            block_size=self.block_size,
            budget_bytes=budget_bytes,
            alignment=self.kv_alignment,
            page_bytes=CARD_PAGE_BYTES if self.device == "card" else 1,
        )

    @property
    def _attention_bytes(self) -> int:
        """Its scratch: one layer's K and V of the longest context, gathered through a second buffer of that size; of
        shorter ones a few MiB at a time. Converted to float32 they are kept a third time, with queries and results:
        float16 on a CPU, and where scores are soft-capped, which also writes a tile of scores and its softmax. A
        card's attention wants its mask written out.
        """
        shape, device, step_tokens = self.shape, self.device, self.max_step_tokens
        kv_bits = KV_FORMATS[self.kv_dtype].bits
        gathered = max(GATHER_BYTES, 2 * shape.num_kv_heads * shape.head_dim * kv_bits * self.context_tokens // 8)
        attention = 2 * gathered
        capped = shape.attention_softcap is not None
        if kv_bits < 32 and (capped or (device == "cpu" and self.kv_dtype == "float16")):
            attention += gathered * 32 // kv_bits + 3 * 4 * step_tokens * shape.num_heads * shape.head_dim
        if capped:
            attention += 2 * 4 * min(CAPPED_SCORES, shape.num_heads * step_tokens * self.context_tokens)
        if device == "card":
            attention += step_tokens * self.context_tokens * kv_bits // 8
        return attention
