"""`moq schedule --run RUN --budget …`: target widths for the blocks of a saved run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moq.blocks import assign_blocks
from moq.budget import Budget, LatencyTable
from moq.config import SIGN_BITS, MoQConfig
from moq.directory_kind import RUN_NAME
from moq.manifest import FormatError
from moq.planning import ends_of
from moq.quantized_parameter import QuantizedParameter
from moq.rules import MatchedParameter, match_parameters
from moq.saved_run import SavedRun, load_run
from moq.target_bits import (
    WIDTHS,
    Ends,
    Objective,
    TargetBits,
    Trace,
    Weight,
    bytes_beside,
    choose,
    measure_candidates,
    offered,
    traces_for,
)


@dataclass(frozen=True)
class _Block:
    """One block: where its width begins and may end, its trace if measured, and its weights."""

    name: str
    ends: Ends
    trace: Trace | None
    weights: list[Weight]


def choose_for_run(
    directory: str | os.PathLike[str],
    budget: Budget,
    *,
    config: MoQConfig | None = None,
    table: LatencyTable | None = None,
    widths: tuple[int, ...] = WIDTHS,
    objective: Objective = "mean_eigenvalue",
) -> TargetBits:
    """Chooses target widths by the masters and the traces of a saved run.

    Args:
        directory: What MoQOptimizer.save wrote.
        budget: What may be used up.
        config: Grids, groups of blocks and start widths of the training that is to come; None takes
            those of the run. Its blocks must hold the same weights as the run's.
        table: Measured step times; needed for ``latency``.
        widths: Bits that are offered.
        objective: What is minimised.

    Raises:
        ValueError: if no trace was measured in the run, if the configuration has other blocks, or
            as moq.target_bits.choose.
        FormatError: if the directory holds no run, or one that does not say which weights fell
            together.
    """
    return choose_for_loaded(
        load_run(directory),
        budget,
        config=config,
        table=table,
        widths=widths,
        objective=objective,
    )


def choose_for_loaded(
    run: SavedRun,
    budget: Budget,
    *,
    config: MoQConfig | None = None,
    table: LatencyTable | None = None,
    widths: tuple[int, ...] = WIDTHS,
    objective: Objective = "mean_eigenvalue",
) -> TargetBits:
    """Does what `choose_for_run` does, for a run that is in memory already.

    Raises:
        ValueError: as choose_for_run.
        FormatError: as choose_for_run.
    """
    blocks = _blocks_of_run(run) if config is None else _blocks_of_config(run, config)
    found = measure_candidates(
        [block.name for block in blocks],
        [block.trace for block in blocks],
        [offered(b.name, b.ends, b.trace is not None, widths, table) for b in blocks],
        [(number, weight) for number, block in enumerate(blocks) for weight in block.weights],
        objective,
    )
    names = {weight.name for block in blocks for weight in block.weights}
    quantized = [p for name, p in run.model.named_parameters() if name in names]
    return choose(found, budget, other_bytes=bytes_beside(run.model, quantized), table=table)


def _traces(run: SavedRun) -> dict[frozenset[str], Trace]:
    """Names of the weights of each block that was measured -> its trace."""
    traces = traces_for(run.history.get("sensitivities", []), str(run.directory))
    members = _members(run)
    for name in traces:
        if name not in members:
            raise FormatError(
                f"{run.directory / RUN_NAME}: history.sensitivities: {name!r} must be one of "
                "history.blocks"
            )
    return {frozenset(members[name]): trace for name, trace in traces.items()}


def _members(run: SavedRun) -> dict[str, list[str]]:
    """Block -> names of its weights, as the run's history has them."""
    blocks: Any = run.history.get("blocks")
    names = {p.name for p in run.quantized}
    if not isinstance(blocks, dict) or not names <= blocks.keys():
        raise FormatError(
            f"{run.directory / RUN_NAME}: history.blocks must name the block of every quantized "
            "weight: save the run with this version of moq"
        )
    members: dict[str, list[str]] = {}
    for p in run.quantized:
        members.setdefault(blocks[p.name], []).append(p.name)
    return members


def _blocks_of_run(run: SavedRun) -> list[_Block]:
    """The blocks that fell together in the run, and the widths between which they fell."""
    traces, by_name = _traces(run), {p.name: p for p in run.quantized}
    blocks = []
    for name, members in _members(run).items():
        drops: Any = run.history.get("drops", {}).get(name)
        if not drops:
            raise FormatError(
                f"{run.directory / RUN_NAME}: history.drops must hold {name!r}, got none"
            )
        parameters = [by_name[member] for member in members]
        start, target = drops[0][1], drops[-1][1]
        if any(p.mode in SIGN_BITS for p in parameters):
            ends = Ends(target, target, target)
        else:
            ends = Ends(start, target)
        trace = traces.get(frozenset(members))
        blocks.append(_Block(name, ends, trace, [weight_of_run(p) for p in parameters]))
    return blocks


def _blocks_of_config(run: SavedRun, config: MoQConfig) -> list[_Block]:
    """The blocks that a configuration makes of the run's model.

    Raises:
        ValueError: naming a block that the run has not measured as it is.
    """
    matched, _ = match_parameters(run.model, config, run.model.parameters())
    blocks = assign_blocks(matched)
    members: list[list[MatchedParameter]] = [[] for _ in blocks.names]
    for m, number in zip(matched, blocks.numbers, strict=True):
        members[number].append(m)
    by_name = {p.name: p for p in run.quantized}
    traces, known = _traces(run), {frozenset(names) for names in _members(run).values()}
    result = []
    ends = ends_of(matched, blocks, config)
    for name, own, own_ends in zip(blocks.names, members, ends, strict=True):
        weights = frozenset(m.name for m in own)
        if weights not in known:
            raise ValueError(
                f"{run.directory}: the blocks of the configuration must hold the same weights as "
                f"those of the run, whose traces were measured, got {len(weights)} in {name!r}: "
                "leave the configuration out, or probe a training with it"
            )
        result.append(
            _Block(name, own_ends, traces.get(weights), [_weight_of(m, by_name) for m in own])
        )
    return result


def weight_of_run(p: QuantizedParameter) -> Weight:
    """Returns a weight of a saved run as target widths are chosen for it."""
    return Weight(
        name=p.name,
        master=p.master,
        dtype=p.scale_dtype or p.simulated.dtype,
        mode=p.mode,
        granularity=p.granularity,
        group_size=p.group_size,
        transposed=p.transposed,
        scale=p.scale,
        activations=p.activations,
        absmax=p.absmax,
    )


def _weight_of(m: MatchedParameter, quantized: dict[str, QuantizedParameter]) -> Weight:
    """A weight on the grid of the configuration; learned scales begin at the weights' own."""
    return Weight(
        name=m.name,
        master=quantized[m.name].master,
        dtype=m.parameter.dtype,
        mode=m.spec.mode,
        granularity=m.granularity,
        group_size=m.group_size,
        transposed=m.transposed,
        scale=m.spec.scale,
        activations=None if m.spec.activations == "none" else m.spec.activations,
    )


def parse_widths(text: str) -> Sequence[int]:
    """Reads ``4,8,16``.

    Raises:
        ValueError: if it is no list of integers.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--widths must be bits between commas, as 4,8,16, got {text!r}")
    return [int(part) for part in parts]
