"""How far the server has come in stopping. Runs in: trio; owns: two events."""

import trio


class Drain:
    """Set in this order: `begun` (no new work), then `ending` (running responses end themselves now)."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.ending = trio.Event()

    @property
    def has_begun(self) -> bool:
        """Whether new work is refused."""
        return self.begun.is_set()
