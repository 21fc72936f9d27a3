"""Which prefixes are being computed at the moment, so that nobody computes the same beside it.

Runs in: engine thread; owns: the keys of the blocks that running sequences are still to publish.
"""

from collections.abc import Collection

from edgekv.core.sequence import Sequence
from edgekv.core.step import Chunk


class PrefillingKeys:
    """Prefix-cache keys by the running sequence that will publish them.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._owners: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def announce(self, sequence: Sequence) -> None:
        """It was admitted, and computes what it did not find; whoever announced a key first has it."""
        for key in sequence.block_keys[sequence.num_computed // self._block_size :]:
            self._owners.setdefault(key, sequence.id)

    def comes_soon(self, sequence: Sequence, matched_blocks: int) -> bool:
        """Whether the block after those that it found is being computed for another."""
        keys = sequence.block_keys
        return matched_blocks < len(keys) and keys[matched_blocks] in self._owners

    def forget(self, chunk: Chunk) -> None:
        """The chunk is computed; a decode, which is most often, costs nothing once there is no prompt to wait for."""
        if self._owners:
            size, sequence = self._block_size, chunk.sequence
            for key in sequence.block_keys[chunk.start // size : chunk.end // size]:
                if self._owners.get(key) == sequence.id:
                    del self._owners[key]

    def drop(self, sequence: Sequence) -> None:
        """It runs no more: nobody waits for it."""
        for key in [key for key, owner in self._owners.items() if owner == sequence.id]:
            del self._owners[key]

    def check_integrity(self, running: Collection[int]) -> None:
        """Raise AssertionError where a key is awaited from none of the sequences that run."""
        assert set(self._owners.values()) <= set(running), "a key is awaited from nobody"
