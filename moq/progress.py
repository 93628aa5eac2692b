"""Progress bars for long work: on a terminal only, and never in the way of what is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich.progress
from rich.console import Console

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yields the items, with a bar on standard error if that is a terminal."""
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
        redirect_stdout=False,  # what is printed meanwhile belongs to standard output
    )
    with bar:
        yield from bar.track(items, description=description)


class ProductBar:
    """Counts Hessian-vector products on standard error."""

    def __init__(self, title: str, enabled: bool) -> None:
        """Shows nothing until started; `enabled` also decides whether `say` prints."""
        self.console = Console(file=sys.stderr)
        self.enabled = enabled
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn(title),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("products"),
            rich.progress.TimeElapsedColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
            transient=True,
            redirect_stdout=False,
        )

    def __enter__(self) -> ProductBar:
        """Lets the bar appear."""
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """Takes the bar away."""
        self._progress.stop()

    @property
    def done(self) -> int:
        """Products made or skipped so far."""
        return int(self._progress.tasks[-1].completed)

    def start(self, total: int | None) -> None:
        """Sets the largest number of products; None: not known."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._task = self._progress.add_task("", total=total)

    def advance(self, _products: int = 1) -> None:
        """Counts one product."""
        self._progress.advance(self._task)

    def skip_to(self, products: int) -> None:
        """Moves on over products that early convergence made unnecessary."""
        self._progress.update(self._task, completed=products)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)
