"""What of a model its memory depends on, and what a decode step reads of it. Runs in: anywhere; owns: nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgekv.core.dtype_choice import DTYPE_BYTES, DtypeName
from edgekv.core.kv_format import KV_FORMATS, KVFormatName, KVShape


class ModelShape(KVShape, Protocol):
    """What the weights and the workspace depend on as well."""

    @property
    def num_parameters(self) -> int:
        """Weights in all."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""

    @property
    def num_heads(self) -> int:
        """Query heads."""

    @property
    def max_position_embeddings(self) -> int:
        """The longest context that the model knows."""

    @property
    def windows(self) -> Sequence[int | None]:
        """How far back each layer looks; None for all of it."""

    @property
    def attention_softcap(self) -> float | None:
        """Whether attention scores are capped: those are computed in float32."""


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """What weights take: `total` in memory, of which a decode step reads `step`.

    Of an embedding that is not the output head too, a step reads one row. `kinds`: bytes in memory by what they are
    kept in, the most first.
    """

    total: int
    step: int
    kinds: dict[str, int]

    @classmethod
    def assumed(cls, shape: ModelShape, dtype: DtypeName) -> "WeightBytes":
        """Of every parameter in `dtype`, all of them read."""
        total = shape.num_parameters * DTYPE_BYTES[dtype]
        return cls(total, total, {dtype: total})


def decode_read_bytes(
    shape: ModelShape, *, weights: WeightBytes, kv_format: KVFormatName, block_size: int, context_tokens: int
) -> int:
    """The least that one decode step of one sequence reads: its weights once, and the keys and values it sees."""
    layer_token = KV_FORMATS[kv_format].block_bytes(shape, block_size) / block_size / shape.num_layers
    seen = sum(min(context_tokens, window or context_tokens) for window in shape.windows)
    return weights.step + int(layer_token * seen)


def beyond_window_bytes(shape: ModelShape, *, kv_format: KVFormatName, block_size: int, context_tokens: int) -> int:
    """What of a full context lies behind the windows of layers that have one: kept today, and never read again."""
    layer_block = KV_FORMATS[kv_format].block_bytes(shape, block_size) // shape.num_layers
    blocks = sum(max(0, context_tokens - window) // block_size for window in shape.windows if window is not None)
    return blocks * layer_block
