"""`edgekv` with an engine whose card reads from nowhere at some step: `python -m tests.gpu.lost_server serve`."""

from typing import Any

from edgekv.cli.app import main
from edgekv.engine.card_runner import CardRunner

LAST_STEP = 20


def break_at_last_step() -> None:
    """From then on the segments lie where there is no memory."""
    begin, steps = CardRunner.begin, iter(range(10**9))

    def begin_and_break(self: CardRunner, *args: Any) -> Any:
        if next(steps) == LAST_STEP:
            self._pool.cache.table.fill_(1 << 40)
        return begin(self, *args)

    CardRunner.begin = begin_and_break  # type: ignore[method-assign]


if __name__ == "__main__":
    break_at_last_step()
    main()
