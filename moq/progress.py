"""A progress bar for long work: on a terminal only, and never in the way of what is printed."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

import rich.progress
from rich.console import Console

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Yields the items, with a bar on standard error if that is a terminal."""
    return rich.progress.track(
        items,
        description=description,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
