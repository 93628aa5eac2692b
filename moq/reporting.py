"""What training prints: one table at the start, one line a drop."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch.distributed

from moq._C import Schedule, Trainer
from moq.caller_warning import warn_caller
from moq.input_grid import words_of
from moq.rules import MatchedParameter

if TYPE_CHECKING:
    from moq.estimators import Sensitivity
    from moq.probing import ProbeCost
    from moq.target_bits import TargetBits


def is_main_process() -> bool:
    """Says whether this process prints: rank 0, or a training without ranks."""
    distributed = torch.distributed
    return (
        not (distributed.is_available() and distributed.is_initialized())
        or distributed.get_rank() == 0
    )


def print_line(text: str) -> None:
    """Prints one line above a progress bar of tqdm or rich, if one is shown."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        tqdm.tqdm.write(text)
    else:
        print(text)


def compact_names(names: Sequence[str]) -> str:
    """Joins names that differ in one number: `layers.0.fc`, `layers.1.fc` -> `layers.{0-1}.fc`.

    Example:
        >>> compact_names(["h.0.fc", "h.1.fc", "h.2.fc", "h.5.fc"])
        'h.{0-2,5}.fc'
    """
    split = [name.split(".") for name in names]
    varying = [i for i, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]
    if not varying:
        return names[0]
    numbers = sorted(int(parts[varying[0]]) for parts in split)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    parts = list(split[0])
    parts[varying[0]] = f"{{{text}}}"
    return ".".join(parts)


def _row_key(matched: MatchedParameter) -> tuple[object, ...]:
    """What parameters share that appear in one row: everything but the first number in the name."""
    parts = matched.name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    pattern = tuple("#" if i == number else part for i, part in enumerate(parts))
    return (pattern, tuple(matched.parameter.shape), matched.rule, matched.spec)


def start_table(
    parameters: Sequence[MatchedParameter], blocks: Sequence[int], schedule: Schedule
) -> str:
    """Renders the table that opens a training.

    Args:
        parameters: The quantized parameters.
        blocks: Number of each parameter's block in `schedule`.
        schedule: The plan; before a probe the step of arrival may be a range.

    Returns:
        Text with one row for all layers that differ only in their number.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    earliest, latest = schedule.bounds()
    table = Table(box=SIMPLE_HEAD, title=f"moq: {len(parameters)} quantized parameters")
    for heading in ("layer", "shape", "rule", "granularity", "bits", "arrives at step"):
        table.add_column(heading, overflow="fold")
    rows: dict[tuple[object, ...], list[int]] = {}
    for index, matched in enumerate(parameters):
        rows.setdefault(_row_key(matched), []).append(index)
    for members in rows.values():
        first = parameters[members[0]]
        plans = [earliest[blocks[i]] for i in members] + [latest[blocks[i]] for i in members]
        arrivals = [plan[-1][0] for plan in plans]
        low, high = min(arrivals), max(arrivals)
        table.add_row(
            compact_names([parameters[i].name.removesuffix(".weight") for i in members]),
            " x ".join(str(size) for size in first.parameter.shape),
            first.rule,
            _grid_words(first),
            f"{plans[0][0][1]} -> {plans[0][-1][1]}",
            str(low) if low == high else f"{low} to {high}",
        )
    # Patterns hold brackets and colons, which are not rich's markup.
    width = max(60, shutil.get_terminal_size(fallback=(10_000, 24)).columns)
    console = Console(width=width, no_color=True, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _grid_words(matched: MatchedParameter) -> str:
    """Says a grid in words, leaving out what is usual."""
    spec = matched.spec
    words: list[str] = [matched.granularity]
    if matched.group_size:
        words[0] += f" of {matched.group_size}"
    if spec.mode != "symmetric":
        words.append(spec.mode)
    if spec.scale != "absmax":
        words.append(spec.scale)
    if spec.rounding != "nearest":
        words.append(spec.rounding)
    if spec.activations != "none":
        words.append(f"{words_of(spec.activations)} INT8 inputs")
    if spec.blend_steps:
        words.append(f"blend {spec.blend_steps} steps")
    return ", ".join(words)


def drop_lines(schedule: Schedule, after: int, until: int) -> list[str]:
    """Returns one line for each step in (after, until] at which a width fell.

    Blocks that fall together share a line.
    """
    drops: list[tuple[int, int, int, int]] = []  # the last: which block, in the model's order
    for block, plan in enumerate(schedule.plan()):
        before = plan[0][1]
        for step, widths in groupby(plan, key=lambda drop: drop[0]):
            bits = list(widths)[-1][1]
            if after < step <= until:
                drops.append((step, before, bits, block))
            before = bits
    lines = []
    for step, at_step in groupby(sorted(drops), key=lambda drop: drop[0]):
        changes = []
        for (before, bits), group in groupby(at_step, key=lambda drop: drop[1:3]):
            names = [schedule.block_names[drop[3]] for drop in group]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            changes.append(f"{before} -> {bits} bits: {shown}")
        lines.append(f"moq: step {step}: " + "; ".join(changes))
    return lines


def sensitivity_table(step: int, found: Sensitivity, width: int = 100) -> str:
    """Renders a measurement: every block with its sensitivity, several to a line.

    Args:
        step: Completed steps.
        found: The measurement.
        width: Characters of a line.
    """
    longest = max(len(name) for name in found.blocks)
    cells = [
        f"  {name:<{longest}} {value:.2f}"
        for name, value in zip(found.blocks, found.normalised, strict=True)
    ]
    columns = max(1, width // len(cells[0]))
    largest = max(found.values, key=abs)
    rows = ["".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    head = f"moq: step {step}: sensitivity ({found.measure}) over the largest, {largest:.3g}:"
    return "\n".join([head, *rows])


class Reporter:
    """Prints what happens to a training, on the main process.

    Args:
        enabled: False prints nothing.

    Attributes:
        reported: Step up to which drops have been printed.
    """

    def __init__(self, enabled: bool) -> None:
        """Begins at step 0."""
        self.enabled = enabled and is_main_process()
        self.reported = 0
        self._tells_of_the_end = is_main_process()

    def start(
        self, parameters: Sequence[MatchedParameter], blocks: Sequence[int], schedule: Schedule
    ) -> None:
        """Prints the start table."""
        if self.enabled and parameters:
            print_line(start_table(parameters, blocks, schedule))

    def drops(self, trainer: Trainer, *, wait: bool = False) -> None:
        """Prints the drops that the host has heard of since it printed last.

        Args:
            trainer: Whose plan and steps count.
            wait: Waits for the device, and prints those of all steps that have been made.
        """
        step = trainer.step if wait else trainer.step_seen
        if not self.enabled or step <= self.reported:
            return
        due = trainer.next_drop(self.reported)
        if due is not None and due <= step:  # a copy of the schedule takes long for each step
            for line in drop_lines(trainer.schedule, self.reported, step):
                print_line(line)
        self.reported = step

    def beyond(self, trainer: Trainer, total_steps: int) -> None:
        """Warns, once, of a training that goes on behind the steps that its schedule was made for.

        Args:
            trainer: Whose steps count, as far as the host has heard of them.
            total_steps: Steps that the schedule was made for.
        """
        if self._tells_of_the_end and trainer.step_seen > total_steps:
            self._tells_of_the_end = False
            warn_caller(
                f"MoQOptimizer: total_steps must be the steps of the whole training, got "
                f"{total_steps}, and step {trainer.step_seen} has been made: the schedule "
                "ended too early. Count the optimizer steps of all epochs, after accumulation"
            )

    def sensitivity(self, step: int, found: Sensitivity) -> None:
        """Prints a measurement."""
        if self.enabled:
            print_line(sensitivity_table(step, found))

    def probe_cost(self, step: int, found: Sensitivity, cost: ProbeCost) -> None:
        """Prints what a measurement took."""
        if self.enabled:
            form = found.form + (f", {found.gradients} gradients" if found.gradients else "")
            print_line(
                f"moq: step {step}: {found.products} products ({form}) over {found.batches} "
                f"batches in {cost}"
            )

    def probe_left_out(self, step: int, reason: str) -> None:
        """Prints why a regular measurement was not made."""
        if self.enabled:
            print_line(f"moq: step {step}: not measured again: {reason}")

    def target_bits(self, choice: TargetBits) -> None:
        """Prints a choice of target widths."""
        if self.enabled:
            print_line(f"moq: {choice}")
