"""Graphs of decode programs: one call puts a whole step on the stream.

Runs in: engine thread; owns: the graphs.
"""

import logging
from collections.abc import Callable

from edgekv.engine.card_device import Card, Graph
from edgekv.engine.device_faults import told_as_torch
from edgekv.engine.memory_errors import is_out_of_memory

log = logging.getLogger(__name__)


class Graphs:
    """By the number of rows; a size that has none is run action by action."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._graphs: dict[int, Graph] = {}
        self.num_bytes = 0
        """What capturing took of the card, as its driver tells."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those that are captured."""
        return tuple(sorted(self._graphs))

    def capture(self, rows: int, run: Callable[[], None], room_bytes: int) -> bool:
        """Capture what `run` puts on the stream. False, and nothing is kept, where it does not fit into the room.

        The first one takes what libraries work in as well.
        """
        before = self._card.free_bytes()
        try:
            graph = told_as_torch(lambda: self._card.capture(run, self))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("no memory for a decode graph of %d sequences: they run without", rows)
            return False
        taken = max(0, before - self._card.free_bytes())
        if self.num_bytes + taken > room_bytes:
            log.info("decode graphs of %d sequences and fewer do not fit: they run without", rows)
            return False
        self.num_bytes += taken
        self._graphs[rows] = graph
        return True

    def replay(self, rows: int) -> bool:
        """Put a step of so many rows on the stream; False where there is no graph."""
        graph = self._graphs.get(rows)
        if graph is None:
            return False
        graph.replay()
        return True

    def clear(self) -> None:
        """Let go of all of them, and of their memory."""
        self._graphs.clear()
        self.num_bytes = 0
