"""`moq schedule`: when every layer reaches every bit width, and which widths a budget allows."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from moq._C import Schedule, stretch
from moq.blocks import Blocks, Pace, assign_blocks, layer_of, make_schedule, retarget
from moq.config import MoQConfig, OnUnfinished
from moq.deepspeed import convert
from moq.plotting import new_figure
from moq.reporting import compact_names
from moq.rules import DEFAULT_RULE, match_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Width:
    """When a block has a bit width: from the step that lies in [earliest, latest] on.

    The two differ where the schedule follows measured sensitivities. None: not within the training.
    """

    bits: int
    earliest: int | None
    latest: int | None

    def __str__(self) -> str:
        """The step, the range of steps, or a dash."""
        if self.earliest is None:
            return "-"
        if self.latest is None:
            return f"{self.earliest} or never"
        return (
            str(self.latest) if self.earliest == self.latest else f"{self.earliest}-{self.latest}"
        )


@dataclass(frozen=True)
class BlockOutlook:
    """Every width of one block, widest first.

    Attributes:
        name: Of the block.
        widths: When it has them.
        stretch: Factor of its residence times by the last measurement; None before one.
        unmeasured: Step at which it would reach its last width if nothing had been measured; None
            before a measurement, or if that is not within the training.
    """

    name: str
    widths: tuple[Width, ...]
    stretch: float | None = None
    unmeasured: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `moq schedule`."""
    parser.add_argument(
        "config",
        nargs="?",
        help="configuration file (.json, .yaml), as MoQOptimizer takes it; may be left out with "
        "--run: then that training's own counts",
    )
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of the training (with --run: as many as it has)"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        metavar="DIR",
        help="Hugging Face model directory (its config.json is enough): plan its own layers; "
        "without it each rule of the configuration is planned for a layer that it matches",
    )
    model.add_argument(
        "--run",
        metavar="RUN",
        help="a saved training (optimizer.save): its own plan, or with CONFIG the one of its "
        "model's layers with the sensitivities that it measured",
    )
    parser.add_argument(
        "--deepspeed",
        action="store_true",
        help="the file is DeepSpeed's (quantize_training or compression_training): read it in true "
        "steps, and list what moq does in another way",
    )
    parser.add_argument(
        "--on-unfinished",
        choices=typing.get_args(OnUnfinished),
        help="what to do about layers that would not reach their target: instead of what CONFIG "
        "says; with --deepspeed 'allow', which ends as DeepSpeed does",
    )
    budget = parser.add_argument_group("target widths under a budget, from a saved run")
    budget.add_argument(
        "--budget",
        metavar="KIND=N",
        help="mean_bits=6, bytes=90MB or latency=12ms: choose the last width of each layer of "
        "--run with the least expected loss (mean eigenvalue * squared rounding error), and print "
        "the Pareto front; with CONFIG the plan with these widths too",
    )
    budget.add_argument(
        "--widths", metavar="BITS", help="widths that are offered (4,8,16)", default="4,8,16"
    )
    budget.add_argument(
        "--latency-table",
        metavar="FILE",
        help="for latency: what moq bench DIR --json printed for one directory per width",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the plan, or with --budget the front, to a .png or .svg file",
    )
    parser.set_defaults(usage_error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Runs `moq schedule`; a schedule that cannot finish is an error with the remedy."""
    _require_usable(options)
    if options.config is None and options.budget is None:
        schedule = schedule_of_run(options.run, options.steps, options.on_unfinished)
        facts, outlook = _facts_of(schedule), outlook_of(schedule)
        _show(options, outlook, facts, _extent_of(schedule))
        return 0
    config = _configuration(options)
    if options.steps is None and options.run is not None:
        options.steps = _steps_of_run(options.run)
    if options.budget is not None:
        return _run_budget(options, None if options.config is None else config)
    if options.run is not None:
        outlook = run_outlook(config, options.steps, options.run)
    elif options.model is None:
        outlook = rules_outlook(config, options.steps)
    else:
        outlook = model_outlook(config, options.steps, _empty_model(options.model))
    _show(options, outlook, _facts(config, options.steps), _extent(config, options.steps))
    return 0


def _show(
    options: argparse.Namespace,
    outlook: Sequence[BlockOutlook],
    facts: Mapping[str, Any],
    extent: str,
) -> None:
    """Prints a plan, and draws it if that was asked for."""
    if options.json:
        print(json.dumps(_as_json(outlook, facts)))
    else:
        _print_table(_console(), outlook, extent)
    # Last: without matplotlib the plan is printed all the same.
    if options.plot is not None:
        plot(outlook, facts["total_steps"], options.plot)


def _configuration(options: argparse.Namespace) -> MoQConfig:
    """Reads the configuration, and says what becomes of DeepSpeed's."""
    if options.deepspeed:
        conversion = convert(options.config, on_unfinished=options.on_unfinished or "allow")
        print(conversion, file=sys.stderr)
        return conversion.config
    config = MoQConfig.load(options.config)
    if options.on_unfinished is None:
        return config
    section = replace(config.schedule, on_unfinished=options.on_unfinished)
    return replace(config, schedule=section)


def _require_usable(options: argparse.Namespace) -> None:
    """Ends the program over options that say too little or too much together."""
    if options.budget is None:
        if options.run is None and (options.config is None or options.steps is None):
            options.usage_error("CONFIG and --steps are needed to plan (without --run)")
        if options.latency_table is not None:
            options.usage_error("--latency-table needs --budget latency=N")
    elif options.run is None:
        options.usage_error("--budget needs --run RUN, whose layers were measured")
    if options.config is None and options.deepspeed:
        options.usage_error("--deepspeed needs a CONFIG")
    if options.config is None and options.budget is not None and options.steps is not None:
        options.usage_error("--steps with --budget needs a CONFIG")


def _run_budget(options: argparse.Namespace, config: MoQConfig | None) -> int:
    """Chooses target widths, and plans with them if there are a configuration and steps."""
    from moq.budget import Budget, require_table
    from moq.budget_command import choose_for_run, parse_widths
    from moq.target_bits import require_widths

    budget = Budget.parse(options.budget)
    choice = choose_for_run(
        options.run,
        budget,
        config=config,
        table=require_table(budget, options.latency_table),
        widths=require_widths(parse_widths(options.widths)),
    )
    plan: dict[str, Any] | None = None
    outlook: list[BlockOutlook] = []
    if config is not None and options.steps is not None:
        outlook = run_outlook(config, options.steps, options.run, choice.target_bits)
        plan = _as_json(outlook, _facts(config, options.steps))
    if options.json:
        print(json.dumps(choice.to_dict() | {"plan": plan}))
    else:
        print(choice)
        if plan is not None:
            _print_table(_console(), outlook, f"of {options.steps} steps")
    if options.plot is not None:
        choice.plot(options.plot)
    return 0


def outlook_of(schedule: Schedule) -> list[BlockOutlook]:
    """Returns when each block of a schedule can reach each of its widths.

    Before a measurement these are bounds, but of drops that have been made already; drops beyond
    the end of the training have no step.
    """
    total_steps, done = schedule.total_steps, schedule.completed_steps
    plan = schedule.plan()
    earliest, latest = (plan, plan) if schedule.measured else schedule.bounds()

    def within(step: int) -> int | None:
        return step if step <= total_steps else None

    def width(planned: tuple[int, int], low: int, high: int) -> Width:
        step, bits = planned
        if step <= done:
            low = high = step
        elif done:  # a measurement moves no drop to a step that was made
            low = max(low, done + 1)
            high = max(low, high)
        return Width(bits, within(low), within(high))

    stretches, unmeasured = _changed_by_measuring(schedule)
    return [
        BlockOutlook(
            name,
            tuple(
                width(drop, low, high)
                for drop, (low, _), (high, _) in zip(drops, first, last, strict=True)
            ),
            factor,
            None if arrival is None else within(arrival),
        )
        for name, drops, first, last, factor, arrival in zip(
            schedule.block_names, plan, earliest, latest, stretches, unmeasured, strict=True
        )
    ]


def _changed_by_measuring(
    schedule: Schedule,
) -> tuple[Sequence[float | None], Sequence[int | None]]:
    """Returns each block's factor by the last measurement, and its arrival without any."""
    state = schedule.state_dict()
    if not state["measurements"]:
        nothing = [None] * schedule.num_blocks
        return nothing, nothing
    last = state["measurements"][-1]["sensitivities"]
    plain = Schedule.from_state_dict(state | {"measurements": []})
    factors = [
        None if "table" in block else stretch(state["stretch_rule"], sensitivity)
        for block, sensitivity in zip(state["blocks"], last, strict=True)
    ]
    return factors, [plan[-1][0] for plan in plain.plan()]


def model_outlook(
    config: MoQConfig, total_steps: int, model: torch.nn.Module
) -> list[BlockOutlook]:
    """Plans the blocks of a model.

    Raises:
        ValueError: if a rule does not fit the model, or nothing is quantized.
        moq._C.Error: if the schedule cannot finish, with the smallest change that lets it.
    """
    return outlook_of(_schedule_of(config, total_steps, model))


def _schedule_of(config: MoQConfig, total_steps: int, model: torch.nn.Module) -> Schedule:
    matched, _ = match_parameters(model, config, model.parameters())
    if not matched:
        raise ValueError("at least one parameter must be quantized, got 0")
    return make_schedule(assign_blocks(matched), config, total_steps)


def run_outlook(
    config: MoQConfig,
    total_steps: int,
    directory: str | os.PathLike[str],
    target_bits: Mapping[str, int] | None = None,
) -> list[BlockOutlook]:
    """Plans the blocks of a saved run's model with the sensitivities that were measured in it.

    Args:
        config: The configuration.
        total_steps: Optimizer steps of the training.
        directory: The saved run.
        target_bits: Last widths of blocks, instead of the configured ones.

    Raises:
        ValueError: as model_outlook, or if nothing was measured, or nothing of these blocks.
        moq._C.Error: as model_outlook, or if the schedule follows no sensitivities.
        FormatError: if the directory holds no run.
    """
    from moq.saved_run import read_history

    measurements = read_history(directory).get("sensitivities", [])
    if not measurements:
        raise ValueError(f"{directory}: sensitivities must have been measured (probe), got none")
    schedule = _schedule_of(config, total_steps, _empty_model(os.fspath(directory)))
    schedule = retarget(schedule, target_bits or {})
    for found in measurements:
        values = dict(zip(found["blocks"], found["normalised"], strict=True))
        sensitivities = _carried_over(values, schedule.block_names)
        if sensitivities is None:
            raise ValueError(
                f"{directory}: blocks must be those of the configuration, "
                f"{schedule.block_names[0]} and so on, got {found['blocks'][0]}"
            )
        schedule.set_sensitivities(found["step"], sensitivities)
    return outlook_of(schedule)


def schedule_of_run(
    directory: str | os.PathLike[str],
    total_steps: int | None = None,
    on_unfinished: str | None = None,
) -> Schedule:
    """Returns the schedule of a saved run, measurements and chosen widths included.

    Args:
        directory: The saved run.
        total_steps: Of the same training made anew in other steps; None: as many as it has.
        on_unfinished: Instead of the run's.

    Raises:
        FormatError: if the directory holds no run.
        moq._C.Error: as model_outlook.
    """
    from moq.saved_run import read_history

    history = read_history(directory)
    state = dict(history["schedule"])
    anew = total_steps not in (None, state["total_steps"])
    state |= {"total_steps": total_steps} if anew else {}
    state |= {"on_unfinished": on_unfinished} if on_unfinished else {}
    schedule: Schedule = Schedule.from_state_dict(state)
    schedule.completed_steps = 0 if anew else history["step"]
    return schedule


def _steps_of_run(directory: str | os.PathLike[str]) -> int:
    from moq.saved_run import read_history

    return int(read_history(directory)["total_steps"])


def _carried_over(measured: Mapping[str, float], blocks: Sequence[str]) -> list[float] | None:
    """Returns the sensitivity of each block, or None if no layer of theirs was measured.

    A layer that rules split as in the measured training has the values of its blocks, where one
    that was frozen has 0: it does not move and need not wait. A layer that they split in another
    way is as sensitive throughout as the most sensitive of what was measured in it.
    """
    layers: dict[str, dict[str, float]] = {}
    for name, value in measured.items():
        layers.setdefault(layer_of(name), {})[name] = value
    if layers.keys().isdisjoint(map(layer_of, blocks)):
        return None
    carried = []
    for name in blocks:
        values = layers.get(layer_of(name), {})
        alike = values.keys() <= set(blocks)
        carried.append(values.get(name, 0.0) if alike else max(values.values()))
    return carried


def rules_outlook(config: MoQConfig, total_steps: int) -> list[BlockOutlook]:
    """Plans one layer for the configuration itself and for each rule that quantizes.

    How fast a layer can be depends on the others: each rule stands for two, the usual case of
    several layers alike. The configuration itself is left out where a rule for ``*`` leaves it no
    layer.

    Raises:
        ValueError: if every layer is excluded.
        moq._C.Error: as model_outlook.
    """
    spec = config.spec()
    paces = {}
    if not any(
        rule.match == "*" and {"linear", "conv1d"} <= {*rule.modules} for rule in config.rules
    ):
        paces[DEFAULT_RULE] = Pace(spec.start_bits, spec.target_bits)
    for rule in config.rules:
        if not rule.exclude:
            spec = config.spec(rule)
            paces[rule.match] = Pace(spec.start_bits, spec.target_bits, rule.schedule)
    if not paces:
        raise ValueError("rules: at least one must quantize what '*' excludes, got none")
    names = list(paces) * 2
    blocks = Blocks(names, layers=names, paces=list(paces.values()) * 2, numbers=[])
    return outlook_of(make_schedule(blocks, config, total_steps))[: len(paces)]


def table_of(schedule: Schedule) -> str:
    """Renders a schedule: for every block the step from which it has each width."""
    console = _wide_console()
    with console.capture() as capture:
        _print_table(console, outlook_of(schedule), _extent_of(schedule))
    return capture.get().rstrip()


def _extent_of(schedule: Schedule) -> str:
    made = f", {schedule.completed_steps} of them made" if schedule.completed_steps else ""
    return f"of {schedule.total_steps} steps{made}"


def plot_schedule(schedule: Schedule, path: str | Path) -> None:
    """Draws a schedule, as `plot` does."""
    plot(outlook_of(schedule), schedule.total_steps, path)


def _empty_model(directory: str) -> PreTrainedModel:
    """Builds a model from its config.json, with memory that is never touched instead of weights.

    Raises:
        OSError: if there is no readable config.json.
        ValueError: if it names no model class that transformers has.
    """
    import transformers

    if not os.path.isfile(os.path.join(directory, "config.json")):
        raise FileNotFoundError(
            f"{directory}: expected a directory with a Hugging Face model's config.json, got none"
        )
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    names = config.architectures or [None]
    model_class = getattr(transformers, str(names[0]), None)
    if model_class is None:
        raise ValueError(
            f"{directory}/config.json: architectures must name a class of transformers, "
            f"got {names[0]!r}"
        )
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


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


def _extent(config: MoQConfig, total_steps: int) -> str:
    finish_at = config.schedule.finish_at
    if finish_at is None or any(rule.schedule for rule in config.rules):
        return f"of {total_steps} steps"
    return f"of {total_steps} steps, all at their target by {100 * finish_at:g} %"


def _console() -> Console:
    """The terminal; the brackets and colons of patterns are not rich's markup."""
    return Console(markup=False, emoji=False)


def _wide_console() -> Console:
    """A console for text that is not for a terminal: no colours, and lines as long as they are."""
    return Console(width=10_000, no_color=True, force_terminal=False, markup=False, emoji=False)


def _print_table(console: Console, outlook: Sequence[BlockOutlook], extent: str) -> None:
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


def _facts(config: MoQConfig, total_steps: int) -> dict[str, Any]:
    """What holds for all blocks of a plan."""
    return {
        "total_steps": total_steps,
        "finish_at": config.schedule.finish_at,
        "on_unfinished": config.schedule.on_unfinished,
        "sensitivity_rule": config.sensitivity.rule,
    }


def _facts_of(schedule: Schedule) -> dict[str, Any]:
    """The same of a schedule whose configuration is gone; finish_at if all blocks have one."""
    state = schedule.state_dict()
    shares = {block.get("finish_at") for block in state["blocks"]}
    return {
        "total_steps": schedule.total_steps,
        "finish_at": shares.pop() if len(shares) == 1 else None,
        "on_unfinished": state["on_unfinished"],
        "sensitivity_rule": state["stretch_rule"],
    }


def _as_json(outlook: Sequence[BlockOutlook], facts: Mapping[str, Any]) -> dict[str, Any]:
    return dict(facts) | {"blocks": [asdict(block) for block in outlook]}


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
