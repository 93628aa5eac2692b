"""What every plot begins with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(path: str | Path, height: float = 4.5) -> Figure:
    """Makes an empty figure that is to be saved at `path`.

    Raises:
        ValueError: if the file ends in neither .png nor .svg.
        RuntimeError: if matplotlib is not installed.
    """
    if Path(path).suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: a plot must end in .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("a plot needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(9, height), layout="constrained")
