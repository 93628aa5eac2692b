"""A choice of target widths as text and as a picture, with the front that it lies on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moq.plotting import new_figure

if TYPE_CHECKING:
    from moq.target_bits import Candidates, TargetBits

#: Points of the front that a table shows.
SHOWN = 12

_LOSSES = {
    "mean_eigenvalue": "expected increase, 1/2 |trace| / weights",
    "trace": "|trace|",
}


def text_of(choice: TargetBits) -> str:
    """Renders the choice: each block's widths and what they lose, then the front around it."""
    console = Console(
        width=10_000,
        no_color=True,
        force_terminal=False,
        highlight=False,
        markup=False,  # names of blocks hold patterns
        emoji=False,
    )
    points = _shown(choice)
    with console.capture() as capture:
        console.print(
            f"Target bits under {choice.budget}: {_cost(choice, choice.cost)} used, "
            f"mean width {choice.mean_bits:.4g}, loss {choice.loss:.4g}"
        )
        console.print(_blocks(choice))
        if choice.warning is not None:
            console.print(f"Warning: {choice.warning}")
        console.print(
            f"Front: {len(choice.front)} choices that no other beats in {choice.budget.unit} and "
            "loss" + ("" if len(points) == len(choice.front) else f"; {len(points)} of them:")
        )
        console.print(_front(choice, points))
        console.print(
            f"loss: {_LOSSES[choice.objective]} * squared rounding error, summed over blocks; "
            "*: chosen"
        )
    return capture.get().rstrip()


def plot(choice: TargetBits, path: str | Path) -> None:
    """Draws loss over cost with the choice marked, and the width of every block below.

    Raises:
        ValueError: if the file ends in neither .png nor .svg.
        RuntimeError: if matplotlib is not installed.
    """
    figure = new_figure(path, height=7)
    above, below = figure.subplots(2, 1)
    costs, losses = zip(*choice.front, strict=True)
    above.step(costs, losses, where="post", color="C0", label="front")
    above.plot(choice.cost, choice.loss, "o", color="C1", label="chosen")
    above.axvline(float(choice.budget.limit), color="C1", linestyle=":", label="budget")
    if min(losses) > 0:
        above.set_yscale("log")
    else:
        above.set_yscale("symlog", linthresh=min((x for x in losses if x > 0), default=1.0))
    above.set_xlabel(choice.budget.unit)
    by_mean = choice.objective == "mean_eigenvalue"
    above.set_ylabel("expected increase of the loss" if by_mean else "|trace| * squared error")
    above.grid(alpha=0.3)
    above.legend(loc="upper right", fontsize="small")
    names = list(choice.target_bits)
    below.bar(range(len(names)), choice.bits, color="C0")
    step = max(1, len(names) // 30)
    below.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize="x-small")
    below.set_ylabel("target bits")
    figure.savefig(path)


def _cost(choice: TargetBits, cost: float) -> str:
    return f"{cost:.0f}" if choice.budget.kind == "bytes" else f"{cost:.5g}"


def _blocks(choice: TargetBits) -> Table:
    widths = sorted({bits for block in choice.blocks for bits in block.widths})
    table = Table(box=SIMPLE_HEAD)
    table.add_column("block", no_wrap=True)
    for heading in ("weights", "trace", *(f"loss at {bits}" for bits in widths), "bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for block, chosen in zip(choice.blocks, choice.bits, strict=True):
        losses = dict(zip(block.widths, block.losses, strict=True))
        table.add_row(
            block.name,
            str(block.num_weights),
            _trace(block),
            *(f"{losses[bits]:.3g}" if bits in losses else "-" for bits in widths),
            str(chosen),
        )
    return table


def _trace(block: Candidates) -> str:
    if block.trace is None:
        return "not measured"
    return f"{block.trace:.4g}" + (f" ± {block.trace_error:.2g}" if block.trace_error else "")


def _shown(choice: TargetBits) -> list[int]:
    """Points of the front that are shown: the ends, the chosen one, and some between."""
    last = len(choice.front) - 1
    chosen = choice.front.index((choice.cost, choice.loss))
    return sorted({round(last * i / (SHOWN - 1)) for i in range(SHOWN)} | {chosen})


def _front(choice: TargetBits, points: Sequence[int]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in (choice.budget.unit, "loss", "blocks at each width", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    chosen = choice.front.index((choice.cost, choice.loss))
    for point in points:
        cost, loss = choice.front[point]
        counts = sorted(Counter(choice.front_bits(point)).items())
        table.add_row(
            _cost(choice, cost),
            f"{loss:.4g}",
            ", ".join(f"{count} at {bits}" for bits, count in counts),
            "*" if point == chosen else "",
        )
    return table
