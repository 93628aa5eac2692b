"""Which quantized parameters fall together, and the schedule of these blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moq._C import Schedule, ScheduledBlock
from moq.config import MoQConfig, ScheduleConfig, Timing
from moq.rules import MatchedParameter


@dataclass(frozen=True)
class Pace:
    """What the parameters of one block have in common.

    Attributes:
        start_bits: First width.
        target_bits: Last width.
        timing: When the width falls, if a rule says so; None follows the configuration.
    """

    start_bits: int
    target_bits: int
    timing: Timing | None = None


@dataclass(frozen=True)
class Blocks:
    """Parameters grouped by layer, by the widths they pass through, and when.

    Attributes:
        names: Name of each block, unique.
        layers: Layer of each block; one layer is several blocks if its paces differ.
        paces: Widths and timing of each block.
        numbers: Block of each parameter, in the order of the parameters.
    """

    names: list[str]
    layers: list[str]
    paces: list[Pace]
    numbers: list[int]

    def parameters(self, matched: Sequence[MatchedParameter]) -> dict[str, list[torch.Tensor]]:
        """Returns the parameters of each block, in the order of the names."""
        blocks: dict[str, list[torch.Tensor]] = {name: [] for name in self.names}
        for m, block in zip(matched, self.numbers, strict=True):
            blocks[self.names[block]].append(m.parameter)
        return blocks

    def names_in(self, other: Blocks) -> dict[str, str]:
        """Returns the name that each block has among others that hold it too.

        A block of one layer's only pace has the layer's name, and another one once there are two.
        """
        others = list(zip(other.layers, other.paces, strict=True))
        places = map(others.index, zip(self.layers, self.paces, strict=True))
        return dict(zip(self.names, (other.names[place] for place in places), strict=True))


def assign_blocks(matched: Sequence[MatchedParameter]) -> Blocks:
    """Groups parameters; a layer whose rules give several paces becomes several blocks."""
    keys = [(m.block, Pace(m.spec.start_bits, m.spec.target_bits, m.timing)) for m in matched]
    unique: list[tuple[str, Pace]] = []
    rules: list[str] = []
    for key, m in zip(keys, matched, strict=True):
        if key not in unique:
            unique.append(key)
            rules.append(m.rule)
    names = [
        layer + _suffix([pace for other, pace in unique if other == layer], pace, rule)
        for (layer, pace), rule in zip(unique, rules, strict=True)
    ]
    for index, name in enumerate(names):
        if same := names[:index].count(name):
            names[index] = f"{name} #{same + 1}"
    return Blocks(
        names,
        [layer for layer, _ in unique],
        [pace for _, pace in unique],
        [unique.index(key) for key in keys],
    )


def layer_of(block: str) -> str:
    """Returns the layer that a block is, or is a part of, by the block's name.

    Example:
        >>> layer_of("model.layers.3 (16 to 4 bits)")
        'model.layers.3'
    """
    return block.partition(" ")[0]


def _suffix(paces: Sequence[Pace], pace: Pace, rule: str) -> str:
    """Tells one of several blocks of a layer from the others."""
    if len(paces) == 1:
        return ""
    widths = f"{pace.start_bits} to {pace.target_bits} bits"
    alike = [
        p for p in paces if (p.start_bits, p.target_bits) == (pace.start_bits, pace.target_bits)
    ]
    return f" ({widths})" if len(alike) == 1 else f" ({widths}, rule {rule!r})"


def make_schedule(blocks: Blocks, config: MoQConfig, total_steps: int) -> Schedule:
    """Makes the schedule of a training.

    Raises:
        moq.Error: if it cannot finish, with the smallest change that lets it.
    """
    section = config.schedule
    return Schedule(
        [
            _scheduled(name, pace, section)
            for name, pace in zip(blocks.names, blocks.paces, strict=True)
        ],
        total_steps,
        on_unfinished=section.on_unfinished,
        stretch_rule=config.sensitivity.rule if follows_sensitivities(blocks, config) else "none",
    )


def follows_sensitivities(blocks: Blocks, config: MoQConfig) -> bool:
    """Says whether a measurement could move any drop: tables stand as they are."""
    return any((pace.timing or config.schedule).table is None for pace in blocks.paces)


def retarget(schedule: Schedule, target_bits: Mapping[str, int]) -> Schedule:
    """Returns the schedule with other last widths for some of its blocks, by name.

    A table ends where it reaches the new width.

    Raises:
        moq.Error: as make_schedule.
    """
    state = schedule.state_dict()
    for block in state["blocks"]:
        target = target_bits.get(block["name"])
        if target is not None and "table" in block:
            block["table"] = _clipped_table(dict(block["table"]), block["table"][0][1], target)
        elif target is not None:
            block["target_bits"] = target
    return Schedule.from_state_dict(state)


def extend_schedule(
    schedule: Schedule, previous: Schedule, steps: int, renamed: Mapping[str, str]
) -> Schedule:
    """Carries the measurements of `previous` over to a schedule with more blocks.

    Args:
        schedule: The new one, without measurements; holds every block of `previous`.
        previous: The one that has been followed so far.
        steps: Completed steps.
        renamed: Name in `schedule` of every block of `previous`.

    Raises:
        ValueError: if the new one says that something else has happened by now.
    """
    state, before = schedule.state_dict(), previous.state_dict()
    names = [renamed[name] for name in previous.block_names]
    for measurement in before["measurements"]:
        known = dict(zip(names, measurement["sensitivities"], strict=True))
        state["measurements"].append(
            measurement | {"sensitivities": [known.get(name, 0.0) for name in schedule.block_names]}
        )
    extended = Schedule.from_state_dict(state)
    require_same_past(previous, extended, steps, "MoQOptimizer.add_param_group", renamed)
    return extended


def require_same_past(
    saved: Schedule,
    present: Schedule,
    steps: int,
    where: str,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Refuses a schedule that contradicts what another one did during the first `steps` steps.

    Args:
        saved: What happened.
        present: What is to go on.
        steps: Completed steps.
        where: Begins the message.
        renamed: Name in `present` of every block of `saved`; None: the same.

    Raises:
        ValueError: naming the block and both sequences of (step, bits).
    """
    plans = dict(zip(present.block_names, present.plan(), strict=True))
    for name, plan in zip(saved.block_names, saved.plan(), strict=True):
        past = [drop for drop in plan if drop[0] <= steps]
        now = plans.get(name if renamed is None else renamed[name], [])
        now = [drop for drop in now if drop[0] <= steps]
        if past != now:
            remedy = ""
            if saved.total_steps != present.total_steps:
                remedy = (
                    f". total_steps was {saved.total_steps} and is {present.total_steps} now: give "
                    f"the {saved.total_steps} of before, or train with schedule.period and "
                    "sensitivity: {rule: none} from the beginning, which may be trained longer"
                )
            raise ValueError(
                f"{where}: the schedule must agree with what happened during the first {steps} "
                f"steps: (step, bits) of {name} were {past}, got {now}{remedy}"
            )


def blend_end(drops: Sequence[tuple[int, int]], blend_steps: int, step: int) -> int:
    """Returns the step from which a weight lies on its grid, 0 before the first drop.

    Args:
        drops: (step, bits) of its block; the first is no drop.
        blend_steps: Steps over which the weight fades into its grid after each.
        step: Completed steps; later drops do not count.
    """
    last = max(at for at, _ in drops if at <= step)
    return last + blend_steps if last else 0


def require_blends_end(
    matched: Sequence[MatchedParameter], blocks: Blocks, schedule: Schedule
) -> None:
    """Refuses a blend that would leave weights off the grid at the end of the training.

    Raises:
        ValueError: naming the parameter and the steps.
    """
    latest, total_steps = schedule.bounds()[1], schedule.total_steps
    for m, block in zip(matched, blocks.numbers, strict=True):
        drops = [step for step, _ in latest[block][1:] if step <= total_steps]
        if drops and drops[-1] + m.spec.blend_steps > total_steps:
            raise ValueError(
                f"{m.name} (rule {m.rule!r}): blend_steps must be at most "
                f"{total_steps - drops[-1]}, to end within the {total_steps} steps after a last "
                f"drop at step {drops[-1]}, got {m.spec.blend_steps}"
            )


def _scheduled(name: str, pace: Pace, section: ScheduleConfig) -> ScheduledBlock:
    start, target = pace.start_bits, pace.target_bits
    timing = pace.timing or section
    if timing.table is not None:
        return ScheduledBlock.from_table(name, dict(_clipped_table(timing.table, start, target)))
    return ScheduledBlock(
        name,
        start_bits=start,
        target_bits=target,
        period=timing.period or 1,
        offset=timing.offset,
        growth=timing.growth,
        finish_at=timing.finish_at,
        counts_per_step=timing.counts_per_step or 0,
    )


def _clipped_table(table: Mapping[int, int], start: int, target: int) -> list[tuple[int, int]]:
    """Keeps the (step, bits) of a table between two widths."""
    clipped: dict[int, int] = {}
    for step, bits in sorted(table.items()):
        bits = max(target, min(start, bits))
        if bits not in clipped.values():
            clipped[step] = bits
    return list(clipped.items())
