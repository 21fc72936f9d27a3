"""What a person sees while the models train: a bar for each on a terminal, a line now and then in a log.

Runs in: the process that was started by hand; owns: the bars.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from .steps import Progress

LOG_EVERY = 50


class Watch:
    """Shows the progress of one or more models; use as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Watch:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def after_step(self, name: str, progress: Progress) -> None:
        """Show one step of the model called ``name``."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=progress.steps, loss=progress.loss, rate=0.0)
        task = self._tasks[name]
        self._bars.update(task, completed=progress.step, loss=progress.loss, rate=progress.tokens_per_s)
        if not self._console.is_terminal and (progress.step % LOG_EVERY == 0 or progress.step == progress.steps):
            self._console.print(
                f"{name} {progress.step}/{progress.steps}  loss {progress.loss:.3f}  "
                f"{progress.tokens_per_s:,.0f} tokens/s  {progress.seconds_left / 60:.1f} min to go",
                highlight=False,
            )
