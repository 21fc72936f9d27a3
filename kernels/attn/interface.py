"""The one interface between a model's layers and the KV cache; every kernel family implements it.

Runs in: engine thread; owns: nothing.
"""

from typing import Protocol

from torch import Tensor


class Attention(Protocol):
    """Attention of one step's ragged batch, bound to that step's block tables.

    The runner makes one for each step and hands it to the model's `forward`; a layer calls it once. The rows of `q`,
    `k` and `v` are the tokens of all chunks of the step laid end to end. Calling it appends `k` and `v` (K after
    RoPE) to the cache of `layer`, then attends causally over each sequence's whole context.
    """

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [tokens, heads, head_dim]
        k: Tensor,  # [tokens, kv_heads, head_dim]
        v: Tensor,  # [tokens, kv_heads, head_dim]
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:  # [tokens, heads, head_dim]
        """Append and attend.

        `scale` multiplies q·k. `window` W lets a token see itself and the W − 1 before it. `softcap` c replaces each
        score s by c · tanh(s / c) before the mask (Gemma 2).
        """
        ...
