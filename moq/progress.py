"""Progress of long work on standard error: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich.progress
from rich.console import Console

Item = TypeVar("Item")

#: Between two lines of a log, which has no use for a bar.
LINE_SECONDS = 30.0


class _Lines:
    """Lines that say how far work has come, for standard errors that are no terminal."""

    def __init__(self, title: str, unit: str, console: Console, enabled: bool) -> None:
        """Begins now; work that ends within LINE_SECONDS prints nothing."""
        self.title, self.unit, self.console = title, unit, console
        self.enabled = enabled and not console.is_terminal
        self.began = self.printed = time.monotonic()

    def at(self, done: int, total: float | None) -> None:
        """Prints what is done, unless it has done so lately."""
        now = time.monotonic()
        if not self.enabled or now - self.printed < LINE_SECONDS:
            return
        self.printed = now
        parts = f"{done}" if total is None else f"{done} of {total:.0f}"
        self.console.print(
            f"moq: {self.title}: {parts} {self.unit} in {now - self.began:.0f} s",
            highlight=False,
            soft_wrap=True,
        )


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yields the items, and shows how many are done."""
    console = Console(file=sys.stderr)
    lines = _Lines(description, "done", console, enabled=True)
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,  # what is printed meanwhile belongs to standard output
    )
    with bar:
        for done, item in enumerate(bar.track(items, description=description)):
            lines.at(done, len(items))
            yield item


class ProductBar:
    """Counts Hessian-vector products."""

    def __init__(self, title: str, enabled: bool) -> None:
        """Shows nothing until started; `enabled` also decides whether `say` prints."""
        self.console = Console(file=sys.stderr)
        self.enabled = enabled
        self._lines = _Lines(title, "products", self.console, enabled)
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
        self._total = total

    def advance(self, _products: int = 1) -> None:
        """Counts one product."""
        self._progress.advance(self._task)
        self._lines.at(self.done, self._total)

    def skip_to(self, products: int) -> None:
        """Moves on over products that early convergence made unnecessary."""
        self._progress.update(self._task, completed=products)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)
