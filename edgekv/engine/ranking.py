"""The k likeliest tokens in one strict order, without sorting the vocabulary. Runs in: engine thread; owns: nothing."""

import torch
from torch import Tensor


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row and their ids, both [rows, min(k, vocab)]: descending, ties by lower id.

    `torch.topk` promises no order among equals, neither inside nor at the edge (and logits computed in bfloat16 are
    full of equals); here the answer for k is always the beginning of the answer for k + 1, on any device. Only entries
    of -inf, which are impossible tokens, come in no particular order.
    """
    vocab_size = logits.shape[1]
    if k >= vocab_size:
        values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
        return values, ids
    values, ids = torch.topk(logits, k + 1, dim=-1)
    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > float("-inf"))  # [rows, k]
    tied_at_edge = tied[:, -1]
    any_tied, any_at_edge = torch.stack((tied.any(), tied_at_edge.any())).tolist()
    values, ids = values[:, :k], ids[:, :k]
    if any_at_edge:
        ids = ids.clone()
        for row in tied_at_edge.nonzero().flatten().tolist():
            edge = values[row, -1]
            num_above = int((values[row] > edge).sum())
            ids[row, num_above:] = (logits[row] == edge).nonzero().flatten()[: k - num_above]
    if any_tied:
        ids = ids.sort(dim=-1).values
        values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
    return values, ids
