"""When every layer of a model, a configuration or a saved run has every bit width."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moq._C import Schedule, stretch
from moq.blocks import Blocks, Pace, assign_blocks, layer_of, make_schedule, retarget
from moq.config import MoQConfig
from moq.rules import DEFAULT_RULE, match_parameters, warn_of_overruled

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


def rules_outlook(config: MoQConfig, total_steps: int) -> list[BlockOutlook]:
    """Plans one layer for the configuration itself and for each rule that quantizes.

    How fast a layer can be depends on the others: each rule stands for two, the usual case of
    several layers alike. The configuration itself is left out where a rule for ``*`` leaves it no
    layer.

    Raises:
        ValueError: if every layer is excluded.
        moq.Error: as model_outlook.
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


def model_outlook(
    config: MoQConfig, total_steps: int, model: torch.nn.Module
) -> list[BlockOutlook]:
    """Plans the blocks of a model.

    Raises:
        ValueError: if a rule does not fit the model, or nothing is quantized.
        moq.Error: if the schedule cannot finish, with the smallest change that lets it.
    """
    return outlook_of(_schedule_of(config, total_steps, model))


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
        moq.Error: as model_outlook, or if the schedule follows no sensitivities.
        FormatError: if the directory holds no run.
    """
    from moq.saved_run import read_history

    measurements = read_history(directory).get("sensitivities", [])
    if not measurements:
        raise ValueError(f"{directory}: sensitivities must have been measured (probe), got none")
    schedule = _schedule_of(config, total_steps, empty_model(os.fspath(directory)))
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


def _schedule_of(config: MoQConfig, total_steps: int, model: torch.nn.Module) -> Schedule:
    matched, _ = match_parameters(model, config, model.parameters())
    warn_of_overruled(model, config)
    if not matched:
        raise ValueError("at least one parameter must be quantized, got 0")
    return make_schedule(assign_blocks(matched), config, total_steps)


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
        moq.Error: as model_outlook.
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


def steps_of_run(directory: str | os.PathLike[str]) -> int:
    """Returns how many optimizer steps the training of a saved run has.

    Raises:
        FormatError: if the directory holds no run.
    """
    from moq.saved_run import read_history

    return int(read_history(directory)["total_steps"])


def empty_model(directory: str) -> PreTrainedModel:
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
