"""How a step's attention is shared out among the thread blocks of a card, counted on the host from all its contexts.

Runs in: engine thread; owns: nothing.
"""

from edgekv.engine.card_device import Card
from edgekv.engine.card_inputs import Staging
from edgekv.kernels.attn import prefill_paged
from edgekv.kernels.attn.gpu_layout import GpuCache
from edgekv.kernels.attn.splits import Splits
from edgekv.model.card_memory import MOST_DECODE_BLOCKS
from edgekv.model.spec import ModelSpec


def splits_of(card: Card, cache: GpuCache) -> Splits:
    """How contexts are cut; their parts have room in the buffers."""
    layout = cache.layout
    return Splits(min(card.decode_blocks, MOST_DECODE_BLOCKS), layout.num_kv_heads, layout.block_size)


def cut_number(window: int | None) -> int:
    """Which of the cuts is for layers with such a window."""
    return 0 if window is None else 1


class StepCuts:
    """Writes `cuts` and `tiles` of a step's inputs."""

    def __init__(self, card: Card, spec: ModelSpec, cache: GpuCache) -> None:
        self._splits = splits_of(card, cache)
        self._group = spec.num_heads // spec.num_kv_heads
        # Of several windows the largest: with a smaller one a context has no more parts, and some of them are empty.
        windows = [each for each in spec.windows if each is not None]
        self._windows: tuple[int | None, ...] = (None, max(windows)) if windows else (None,)

    def write(self, staging: Staging) -> None:
        """Of what is there already: contexts of queries that decode_split attends to, and chunks."""
        contexts = staging.contexts[: staging.cuts.shape[1] - 2]
        for window in self._windows:
            self._splits.cut(contexts, staging.cuts[cut_number(window)], window=window)
        prefill_paged.count_tiles(staging.lengths, self._group, staging.tiles)
