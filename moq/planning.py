"""Second-order sensitivity in a training: what is measured, and what is planned by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moq.blocks import Blocks, follows_sensitivities
from moq.budget import Budget, LatencyTable
from moq.collective import all_gather
from moq.config import SIGN_BITS, MoQConfig
from moq.masters import Masters
from moq.rules import MatchedParameter
from moq.sharding import whole_tensor
from moq.target_bits import (
    Ends,
    Objective,
    TargetBits,
    Trace,
    Weight,
    bytes_beside,
    choose,
    measure_candidates,
    offered,
)

if TYPE_CHECKING:
    from moq.estimators import Sensitivity


def require_plannable(config: MoQConfig, masters: Masters, where: str) -> None:
    """Refuses to measure where a measurement could change nothing.

    Raises:
        ValueError: naming the key of the configuration that must be another.
    """
    remedy = "; moq.sensitivity.measure measures without planning"
    if not masters.matched:
        raise ValueError(f"{where}: at least one parameter must be quantized, got 0")
    if not follows_sensitivities(masters.blocks, config):
        raise ValueError(
            f"{where}: the schedule must be finish_at or period, which sensitivities stretch, got "
            f"schedule.table, which fixes the steps of every layer{remedy}"
        )
    if config.sensitivity.rule == "none":
        raise ValueError(
            f"{where}: sensitivity.rule must be 'stepped' or 'linear', got 'none'{remedy}"
        )


def measure_blocks(
    model: nn.Module,
    masters: Masters,
    config: MoQConfig,
    loss_fn: Callable[[Any], torch.Tensor],
    batches: Iterable[Any],
    options: Mapping[str, Any],
) -> Sensitivity:
    """Measures the blocks of a training as its configuration says, but for `options`."""
    from moq.sensitivity import measure

    section = config.sensitivity
    settings = {
        "measure": section.measure,
        "form": section.form,
        "tolerance": section.tolerance,
        "max_products": section.max_products,
        "seed": config.seed,
    }
    return measure(model, masters.by_block(), loss_fn, batches, **(settings | dict(options)))


def plan_by(found: Sensitivity, masters: Masters, where: str) -> None:
    """Plans the rest of the schedule by a measurement.

    Raises:
        ValueError: if the blocks measured are not those of the training.
    """
    blocks = masters.by_block()
    _require_blocks(found.blocks, blocks, where)
    # Nothing in a block of frozen weights moves, so it need not wait.
    values = dict(zip(found.blocks, found.normalised, strict=True))
    masters.trainer.set_sensitivities([values.get(name, 0.0) for name in blocks])


def choose_for_masters(
    masters: Masters,
    model: nn.Module,
    budget: Budget,
    table: LatencyTable | None,
    widths: tuple[int, ...],
    traces: Mapping[str, Trace],
    objective: Objective,
    where: str,
) -> TargetBits:
    """Chooses the last width of each block of a training; all ranks must call.

    Masters are the same on all ranks, but sums over them may differ in the last bit, so the numbers
    of rank 0 count.

    Raises:
        ValueError: as MoQOptimizer.choose_target_bits; on all ranks.
    """
    request = (budget, table, widths, dict(traces), objective)
    if any(other != request for other in all_gather(request)):
        raise ValueError(
            f"{where}: budget, table, widths, traces and objective must be the same on all ranks, "
            f"got {budget} and {objective!r} here"
        )
    if not masters.matched:
        raise ValueError(f"{where}: at least one parameter must be quantized, got 0")
    names = masters.blocks.names
    _require_blocks(list(traces), masters.by_block(), where)
    allowed = [
        offered(name, ends, name in traces, widths, table)
        for name, ends in zip(
            names, ends_of(masters.matched, masters.blocks, masters.config), strict=True
        )
    ]
    own = measure_candidates(
        names, [traces.get(name) for name in names], allowed, _whole_weights(masters), objective
    )
    other_bytes = bytes_beside(model, [m.parameter for m in masters.matched])
    return choose(all_gather(own)[0], budget, other_bytes=other_bytes, table=table)


def ends_of(matched: Sequence[MatchedParameter], blocks: Blocks, config: MoQConfig) -> list[Ends]:
    """Returns where each block begins and may end.

    Modes of signs have one target, and a table no width below its last.
    """
    signs = {
        block for m, block in zip(matched, blocks.numbers, strict=True) if m.spec.mode in SIGN_BITS
    }
    ends = []
    for number, pace in enumerate(blocks.paces):
        lowest = number in signs or (pace.timing or config.schedule).table is not None
        start = pace.target_bits if number in signs else pace.start_bits
        ends.append(Ends(start, pace.target_bits, pace.target_bits if lowest else 2))
    return ends


def _whole_weights(masters: Masters) -> Iterator[tuple[int, Weight]]:
    """Yields (number of the block, weight) of every parameter, gathered from all ranks."""
    for m, block in masters.placed():
        master = masters.get(m.parameter)
        assert master is not None
        activations = m.spec.activations
        yield (
            block,
            Weight(
                name=m.name,
                master=whole_tensor(master.detach()),
                dtype=m.parameter.dtype,
                mode=m.spec.mode,
                granularity=m.granularity,
                group_size=m.group_size,
                transposed=m.transposed,
                scale=m.spec.scale,
                activations=None if activations == "none" else activations,
                absmax=masters.simulators.of(m).learned() if masters.simulators else None,
            ),
        )


def _require_blocks(
    measured: Sequence[str], blocks: Mapping[str, Sequence[torch.Tensor]], where: str
) -> None:
    """Refuses a measurement of other blocks than those of the training.

    Raises:
        ValueError: naming the first that differs.
    """
    moving = [name for name, members in blocks.items() if any(p.requires_grad for p in members)]
    differing = sorted(set(moving).symmetric_difference(measured) - (blocks.keys() - moving))
    if differing:
        raise ValueError(
            f"{where}: the measurement must have the {len(moving)} blocks that train, "
            f"{', '.join(moving[:3])}…, got {len(measured)} with or without {differing[0]}: "
            "measure moq.sensitivity.quantized_blocks(model, config)"
        )
