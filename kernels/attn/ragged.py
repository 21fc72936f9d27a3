"""One step's ragged batch as attention sees it: where each span of tokens begins and which blocks hold its context.

Runs in: engine thread; owns: nothing (frozen data).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Spans of consecutive tokens, one a sequence, whose rows lie end to end in q, k and v.

    Span i has `lengths[i]` tokens at positions `starts[i] ..`. Its block table is
    `blocks[table_starts[i] : table_starts[i + 1]]` and covers its context exactly: token position p lives in block
    `table[p // block_size]`, slot `p % block_size`. Block ids are `segment << shift | block of the segment`.
    """

    starts: Ints  # [spans]
    lengths: Ints  # [spans]
    blocks: Ints  # [sum of the tables' lengths]
    table_starts: Ints  # [spans + 1]

    @property
    def num_spans(self) -> int:
        """Sequences in the batch."""
        return len(self.starts)

    @property
    def ends(self) -> Ints:
        """Context length of each span once its tokens are appended, [spans]."""
        return self.starts + self.lengths

    @property
    def first_rows(self) -> Ints:
        """Row of each span's first token, [spans]."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def positions(self) -> Ints:
        """Position of every token in its sequence, [tokens]."""
        return np.repeat(self.starts - self.first_rows, self.lengths) + np.arange(int(self.lengths.sum()))

    def table(self, span: int) -> Ints:
        """The block table of one span."""
        return self.blocks[self.table_starts[span] : self.table_starts[span + 1]]
