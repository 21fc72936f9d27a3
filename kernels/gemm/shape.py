"""team.h: how many tokens, rows and warps there are to a piece of work in gemv.h and wide_gemv.h.

Runs in: anywhere; owns: nothing.
"""

from dataclasses import dataclass

from edgekv.kernels.common.prepared import blocks_of

MOST_TOKENS = 8
THREADS = 128
_WARPS = THREADS // 32
WARPS_WANTED = 16
"""On a multiprocessor of NVIDIA's, so that enough loads are under way.

A multiprocessor of AMD's (RDNA's WGP) is two of those: twice as many warps are wanted there.
"""


@dataclass(frozen=True, slots=True)
class GemvShape:
    """EK_M, EK_R and EK_SPLIT: tokens, rows of a warp, and warps that share the columns of a row."""

    tokens: int
    rows: int
    split: int

    @property
    def defines(self) -> dict[str, int]:
        """What the kernel is compiled with."""
        return {"EK_M": self.tokens, "EK_R": self.rows, "EK_SPLIT": self.split}

    def blocks(self, num_columns: int, *, gated: bool) -> int:
        """Of the grid, for an output of so many columns."""
        return blocks_of(num_columns, _WARPS // self.split * (self.rows // 2 if gated else self.rows))

    def has_room_for(self, tokens: int, *, gated: bool) -> bool:
        """Whether the kernel computes so many tokens, and pairs of rows where one gates the other."""
        return 1 <= tokens <= self.tokens and (not gated or self.rows >= 2)


def choose_shape(
    num_columns: int,
    steps: int,
    tokens: int,
    *,
    gated: bool,
    multiprocessors: int,
    most_sums: int = 32,
    warps_wanted: int = WARPS_WANTED,
) -> GemvShape:
    """What suits an output of so many columns, where a row is so many times what a lane takes of it in one go.

    `most_sums`: tokens times rows of a warp, which are registers; `warps_wanted` on a multiprocessor, at the least.

    The order in which a row is summed up depends on `split` alone, and that on the matrix and the card: what comes out
    for a token is the same to the bit, however many others there are.
    """
    wanted = warps_wanted * multiprocessors
    warps = blocks_of(num_columns, 1 if gated else 2)  # at two rows each
    split = 1
    while split < _WARPS and warps * split < wanted and steps >= 64 * split:
        split *= 2
    room = next(m for m in (1, 2, 4, MOST_TOKENS) if m >= tokens)
    # Activations are loaded for each warp again, so many tokens want many rows.
    rows = min(4 if room >= 4 else 2, most_sums // room)
    while rows > (2 if gated else 1) and blocks_of(num_columns * (2 if gated else 1), rows) * split < wanted // 2:
        rows //= 2
    return GemvShape(room, rows, split)
