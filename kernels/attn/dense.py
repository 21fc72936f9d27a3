"""Attention as the formula says it, for one sequence: the oracle that every kernel is compared with.

Runs in: tests and references; owns: the keys and values of one sequence, contiguous, one pair a layer.
"""

import torch
from torch import Tensor


class DenseAttention:
    """Implements `Attention` for one sequence, whose chunks come one call a layer at a time, in order.

    Invariant: `keys[layer]` and `values[layer]` [context, kv_heads, head_dim] hold every token that the layer has seen.
    """

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

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
        """Append and attend, all arithmetic in float32."""
        keys = self.keys[layer] = torch.cat((self.keys[layer], k)) if layer in self.keys else k.clone()
        values = self.values[layer] = torch.cat((self.values[layer], v)) if layer in self.values else v.clone()
        group = q.shape[1] // k.shape[1]
        wide_keys = keys.float().repeat_interleave(group, 1)  # [context, heads, head_dim]
        wide_values = values.float().repeat_interleave(group, 1)
        scores = torch.einsum("thd,chd->htc", q.float(), wide_keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~self._visible(len(q), len(keys), window, q.device), float("-inf"))
        return torch.einsum("htc,chd->thd", scores.softmax(-1), wide_values).to(q.dtype)

    @staticmethod
    def _visible(tokens: int, context: int, window: int | None, device: torch.device) -> Tensor:
        """Whether the token of a row sees the token of a column, [tokens, context]."""
        rows = torch.arange(context - tokens, context, device=device).unsqueeze(1)
        columns = torch.arange(context, device=device)
        causal = columns <= rows
        return causal if window is None else causal & (columns > rows - window)
