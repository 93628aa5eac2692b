"""A schedule as people read it: a table or a drawing of when every layer has every bit width."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from moq._C import Schedule
from moq.outlook import BlockOutlook, outlook_of
from moq.plotting import new_figure
from moq.reporting import compact_names


def table_of(schedule: Schedule) -> str:
    """Renders a schedule: for every block the step from which it has each width."""
    console = _wide_console()
    with console.capture() as capture:
        print_table(outlook_of(schedule), extent_of(schedule), console)
    return capture.get().rstrip()


def plot_schedule(schedule: Schedule, path: str | Path) -> None:
    """Draws a schedule, as `plot` does."""
    plot(outlook_of(schedule), schedule.total_steps, path)


def extent_of(schedule: Schedule) -> str:
    """Returns what the title of a schedule's table ends with."""
    made = f", {schedule.completed_steps} of them made" if schedule.completed_steps else ""
    return f"of {schedule.total_steps} steps{made}"


def _wide_console() -> Console:
    """A console for text that is not for a terminal: no colours, and lines as long as they are."""
    return Console(width=10_000, no_color=True, force_terminal=False, markup=False, emoji=False)


def print_table(
    outlook: Sequence[BlockOutlook], extent: str, console: Console | None = None
) -> None:
    """Prints when each block has each width.

    Args:
        outlook: The blocks.
        extent: What the title ends with.
        console: Where to; None: the terminal.
    """
    if console is None:  # the brackets and colons of patterns are not rich's markup
        console = Console(markup=False, emoji=False)
    all_bits = sorted({width.bits for block in outlook for width in block.widths}, reverse=True)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("bits", no_wrap=True)
    for bits in all_bits:
        table.add_column(str(bits), justify="right", no_wrap=True)
    measured = any(block.stretch is not None for block in outlook)
    if measured:
        table.add_column("stretch", justify="right", no_wrap=True)
        table.add_column("unmeasured", justify="right", no_wrap=True)
    for block in _grouped(outlook):
        steps = {width.bits: str(width) for width in block.widths}
        row = [steps.get(bits, "") for bits in all_bits]
        if measured:
            row.append("" if block.stretch is None else f"x{block.stretch:.3g}")
            row.append("-" if block.unmeasured is None else str(block.unmeasured))
        table.add_row(block.name, *row)
    # A terminal wraps a line that is too long; a table whose cells are cut is of no use.
    unbounded = console.options.update(width=10_000)
    console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    console.print(f"First step at each bit width, {extent}", highlight=False, soft_wrap=True)
    console.print(table)
    if any(width.earliest != width.latest for block in outlook for width in block.widths):
        console.print(
            "Ranges: the step follows the measured sensitivities. Without a probe it is the later "
            "one with finish_at where all layers have equal periods, the earlier one with period; "
            "optimizer.schedule().plan() has it.",
            highlight=False,
            soft_wrap=True,
        )
    if any(width.latest is None for block in outlook for width in block.widths):
        console.print("- and never: not within the training.", highlight=False, soft_wrap=True)
    if measured:
        console.print(
            "stretch: of the times ahead, by the last measurement; unmeasured: the step at the "
            "last width if nothing had been measured.",
            highlight=False,
            soft_wrap=True,
        )


def plot(outlook: Sequence[BlockOutlook], total_steps: int, path: str | Path) -> None:
    """Draws bits over steps: a line where the plan is fixed, a band where it follows measurements.

    Raises:
        ValueError: if the file ends in neither .png nor .svg.
        RuntimeError: if matplotlib is not installed.
    """
    figure = new_figure(path)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="bits")
    for index, block in enumerate(_grouped(outlook)):
        name, widths = block.name, block.widths
        color = f"C{index}"
        ends = []
        for side in ("earliest", "latest"):
            drops = [(getattr(w, side), w.bits) for w in widths if getattr(w, side) is not None]
            steps = [step for step, _ in drops] + [total_steps]
            bits = [width for _, width in drops] + [drops[-1][1]]
            ends.append((steps, bits))
            axes.step(steps, bits, where="post", color=color, label=name if not ends[1:] else None)
        grid = sorted({step for steps, _ in ends for step in steps})
        low, high = ([_value_at(step, *end) for step in grid] for end in ends)
        axes.fill_between(grid, low, high, step="post", color=color, alpha=0.2, linewidth=0)
    axes.set_xlim(0, total_steps)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize="small")
    figure.savefig(path)


def _value_at(step: int, steps: Sequence[int], bits: Sequence[int]) -> int:
    return min(width for at, width in zip(steps, bits, strict=True) if at <= step)


def _grouped(outlook: Sequence[BlockOutlook]) -> list[BlockOutlook]:
    """Joins blocks whose names differ in one number and whose widths come at the same steps."""
    groups: dict[tuple[str, str, BlockOutlook], list[str]] = {}
    for block in outlook:
        name, _, widths = block.name.partition(" ")  # "model.layers.3 (16 to 8 bits)"
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "#", name, count=1)
        groups.setdefault((pattern, widths, replace(block, name="")), []).append(name)
    return [
        replace(block, name=f"{compact_names(names)} {suffix}".rstrip())
        for (_, suffix, block), names in groups.items()
    ]
