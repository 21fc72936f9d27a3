"""What a step on a card consists of: launches of our kernels and calls of torch, in order, all on addresses that stay.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Callable
from typing import TypeAlias

from edgekv.engine.card_device import Card
from edgekv.kernels.common.prepared import Prepared

Action: TypeAlias = Callable[[], object] | Prepared


class Actions:
    """A list that grows while a program is made, and runs as often as wanted."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._list: list[Action] = []
        self._bound: list[Callable[[int], object]] | None = None

    def launch(self, prepared: Prepared) -> None:
        """One of our kernels."""
        self._list.append(prepared)

    def call(self, function: Callable[[], object]) -> None:
        """Something of torch; it may depend on nothing but what lies on the card."""
        self._list.append(function)

    @property
    def prepared(self) -> list[Prepared]:
        """The launches among them."""
        return [action for action in self._list if isinstance(action, Prepared)]

    def load(self) -> None:
        """Compile and load every kernel, which must not happen while a graph is captured.

        Raises KernelUnavailable, CompileFailed, DriverError.
        """
        self._bound = [self._bind(action) for action in self._list]

    def run(self) -> None:
        """Put everything on the stream. Raises DriverError, and what torch raises."""
        if self._bound is None:
            self.load()
        assert self._bound is not None
        stream = self._card.stream
        for action in self._bound:
            action(stream)

    def _bind(self, action: Action) -> Callable[[int], object]:
        if not isinstance(action, Prepared):
            return lambda stream: self._card.call(action)
        launcher, grid, args = self._card.launchers.launcher(action.spec), action.grid, action.args
        return lambda stream: launcher(grid, args, stream)
