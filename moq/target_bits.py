"""Target widths under a budget: the choice of least expected loss, by traces and rounding errors.

The objective is the increase of the loss that rounding is expected to make, to second order:

    loss = sum over blocks b of 1/2 |trace_b| / n_b * sum over the n_b weights w of (w - Q(w))^2,

minimised over one width per block, exactly (`moq._C.ParetoFront`). For an error d of the weights of
a block with Hessian H, at a point without gradient, the loss increases by d' H d / 2. If the
elements of d have mean 0 and variance s^2 and are uncorrelated, the expectation of d' H d is
s^2 trace(H), and that of the squared error d' d is n s^2: what weighs a squared error is the mean
eigenvalue trace / n, not the trace. HAWQ-V2 (Dong et al., NeurIPS 2020) and HAWQ-V3 (Yao et al.,
ICML 2021) minimise the same, but for the half. Both weights were compared
(tests/benchmarks/rounding_loss.py; docs/benchmarks.md has what came out). An objective of "trace"
weighs by the trace all the same: sum over b of |trace_b| * sum of (w - Q(w))^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from moq._C import ParetoFront
from moq.budget import PER_SECOND, Budget, LatencyTable, served_bits
from moq.config import MAX_BITS
from moq.layout import DENSE, INTEGER, PACKED, StoredWeight, storage_bits
from moq.rules import plain_name

#: What is offered unless somebody asks for others: what `moq.inference` keeps weights in.
WIDTHS = (4, 8, 16)
#: What a squared rounding error is weighed by.
Objective = Literal["mean_eigenvalue", "trace"]
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I32": 4, "I64": 8}


class Trace(NamedTuple):
    """A measured trace and its standard error, from the random vectors."""

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One quantized weight matrix, whole, and its grid but for the width.

    Attributes:
        name: Of the parameter.
        master: Full-precision value, [out, in] or transposed.
        dtype: Of the model's parameter, which holds scales and simulated values.
        mode, granularity, group_size, transposed, scale, activations: As in
            `moq.quantized_parameter.QuantizedParameter`.
        absmax: Of learned scales: the magnitude of the largest code of each group, float32.
    """

    name: str
    master: torch.Tensor
    dtype: torch.dtype
    mode: str
    granularity: str
    group_size: int
    transposed: bool
    scale: str
    activations: str | None
    absmax: torch.Tensor | None = None

    @torch.no_grad()
    def simulated(self, num_bits: int) -> torch.Tensor:
        """Returns what the model would compute with at `num_bits`: rounded to nearest.

        Scales are those of the present master, or the learned ones.
        """
        rounded: torch.Tensor = torch.ops.moq.simulate(
            self.master,
            torch.tensor([num_bits], dtype=torch.int32, device=self.master.device),
            absmax=self.absmax,
            granularity=self.granularity,
            group_size=self.group_size,
            mode=self.mode,
            transposed=self.transposed,
            scale_dtype=self.dtype,
            scale_rule="absmax" if self.scale == "learned" else self.scale,
        )
        return rounded.to(self.dtype)

    @torch.no_grad()
    def squared_error(self, num_bits: int) -> float:
        """Sums (master - simulated)^2 over all elements, in float64."""
        difference = self.simulated(num_bits).float() - self.master.float()
        return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2

    def bytes(self, num_bits: int) -> int:
        """Returns the size of its tensors in a checkpoint: codes, scales and zero points."""
        dense = num_bits > 8
        out_dim, in_dim = (1, 0) if self.transposed else (0, 1)
        stored_format = DENSE if dense else INTEGER if self.activations else PACKED
        stored_bits = 8 if stored_format == INTEGER else storage_bits(min(num_bits, 8))
        stored = StoredWeight(
            module=self.name.rpartition(".")[0],
            module_class="Linear",
            format=stored_format,  # type: ignore[arg-type]
            trained_bits=num_bits,
            stored_bits=None if dense else stored_bits,
            mode=self.mode,  # type: ignore[arg-type]
            granularity=self.granularity,  # type: ignore[arg-type]
            group_size=self.group_size,
            shape=[self.master.shape[out_dim], self.master.shape[in_dim]],
            transposed=self.transposed,
            scale_dtype=str(self.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            activations=None if dense else self.activations,  # type: ignore[arg-type]
            quantization_error=0.0,
        )
        tensors = stored.tensors().values()
        return sum(_DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in tensors)


@dataclass(frozen=True)
class Ends:
    """Where the width of a block begins, and where it may end.

    Attributes:
        start_bits: First width, and the largest target.
        target_bits: The configured target, kept where nothing else can be chosen.
        least_bits: The smallest target.
    """

    start_bits: int
    target_bits: int
    least_bits: int = 2


@dataclass(frozen=True)
class Candidates:
    """The widths that one block may end at, and what each of them does.

    Attributes:
        name: Of the block.
        trace: Of its part of the Hessian; None: not measured, it keeps its configured target.
        num_weights: Elements of its quantized matrices.
        widths: Bits, rising.
        squared_errors: Sum of (w - Q(w))^2 over the block, at each width.
        bytes: Size in a checkpoint, at each width.
        trace_error: Standard error of the trace.
        objective: What its losses are.
    """

    name: str
    trace: float | None
    num_weights: int
    widths: tuple[int, ...]
    squared_errors: tuple[float, ...]
    bytes: tuple[int, ...]
    trace_error: float = 0.0
    objective: Objective = "mean_eigenvalue"

    @property
    def is_noise(self) -> bool:
        """Whether the trace says nothing: it is no larger than its error."""
        return bool(self.trace_error) and abs(self.trace or 0.0) <= self.trace_error

    @property
    def losses(self) -> tuple[float, ...]:
        """By width; 0 where no trace was measured.

        1/2 |trace| / num_weights * squared error is what the loss is expected to increase by if
        this block alone is rounded; |trace| * squared error where that is the objective.
        Curvature of either sign means that the loss moves when weights are rounded, so the
        magnitude counts, as it does in the schedule.
        """
        if not self.num_weights:
            return (0.0,) * len(self.widths)
        weight = abs(self.trace or 0.0)
        if self.objective == "mean_eigenvalue":
            weight = 0.5 * (weight / self.num_weights)
        return tuple(weight * error for error in self.squared_errors)


@dataclass(frozen=True)
class TargetBits:
    """A choice of one width per block, and all the others that are worth making.

    Attributes:
        budget: What it had to keep to.
        blocks: What was offered.
        bits: The width chosen for each block.
        cost: What the choice costs, in the budget's unit.
        loss: Sum over blocks of what the objective is: by mean eigenvalues, how much the loss is
            expected to increase by rounding.
        front: Every choice that no other equals or beats in both cost and loss, as (cost, loss):
            costs rise strictly, losses fall strictly. In the budget's unit too.
        front_bits: The width of each block behind each point of `front`, by its number.
    """

    budget: Budget
    blocks: tuple[Candidates, ...]
    bits: tuple[int, ...]
    cost: float
    loss: float
    front: tuple[tuple[float, float], ...]
    front_bits: Callable[[int], tuple[int, ...]]

    @property
    def objective(self) -> Objective:
        """What was minimised."""
        return self.blocks[0].objective

    @property
    def target_bits(self) -> dict[str, int]:
        """The chosen width of each block, by name."""
        return {block.name: bits for block, bits in zip(self.blocks, self.bits, strict=True)}

    @property
    def mean_bits(self) -> float:
        """Mean width over all quantized weights."""
        total = sum(block.num_weights for block in self.blocks)
        used = sum(
            bits * block.num_weights for bits, block in zip(self.bits, self.blocks, strict=True)
        )
        return used / total

    @property
    def warning(self) -> str | None:
        """What to think of traces that are noise; None if there are none among them."""
        noise = [block.name for block in self.blocks if block.is_noise]
        if not noise:
            return None
        return (
            f"{len(noise)} of {sum(block.trace is not None for block in self.blocks)} traces are "
            f"no larger than their standard errors ({', '.join(noise)}), and these blocks' widths "
            "follow noise: probe with more max_products or batches"
        )

    def __str__(self) -> str:
        """A table of the choice, and the front around it."""
        from moq.front import text_of

        return text_of(self)

    def plot(self, path: str | Path) -> None:
        """Draws the front and the choice to a .png or .svg file; needs matplotlib."""
        from moq.front import plot

        plot(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and lists, for JSON."""
        return {
            "objective": self.objective,
            "budget": {"kind": self.budget.kind, "limit": float(self.budget.limit)},
            "target_bits": self.target_bits,
            "mean_bits": self.mean_bits,
            "cost": self.cost,
            "loss": self.loss,
            "blocks": [
                {
                    "name": block.name,
                    "trace": block.trace,
                    "trace_error": block.trace_error,
                    "num_weights": block.num_weights,
                    "widths": list(block.widths),
                    "squared_errors": list(block.squared_errors),
                    "bytes": list(block.bytes),
                }
                for block in self.blocks
            ],
            "front": [list(point) for point in self.front],
            "warning": self.warning,
        }


def require_widths(widths: Iterable[int]) -> tuple[int, ...]:
    """Returns widths in order, each once.

    Raises:
        ValueError: unless they are integers from 2 to 16, at least one.
    """
    given = list(widths)
    for bits in given:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= MAX_BITS:
            raise ValueError(
                f"target bits: widths must be integers in [2, {MAX_BITS}], got {bits!r}"
            )
    if not given:
        raise ValueError("target bits: widths must hold at least one width, got none")
    return tuple(sorted(set(given)))


def require_objective(objective: str) -> Objective:
    """Returns the objective.

    Raises:
        ValueError: if there is no such one.
    """
    if objective not in get_args(Objective):
        known = " or ".join(map(repr, get_args(Objective)))
        raise ValueError(f"target bits: objective must be {known}, got {objective!r}")
    return objective  # type: ignore[return-value]


def offered(
    name: str,
    ends: Ends,
    measured: bool,
    widths: Sequence[int],
    table: LatencyTable | None,
) -> tuple[int, ...]:
    """Returns the widths that a block may end at.

    Raises:
        ValueError: naming the block, if none of `widths` is possible, or none was timed.
    """
    if not measured or ends.least_bits == ends.start_bits:
        possible: tuple[int, ...] = (ends.target_bits,)
    else:
        possible = tuple(b for b in widths if ends.least_bits <= b <= ends.start_bits)
    if not possible:
        raise ValueError(
            f"target bits: widths must hold one that {name!r} can end at, in "
            f"[{ends.least_bits}, {ends.start_bits}], got {list(widths)}"
        )
    timed = tuple(b for b in possible if table is None or table.has(b))
    if not timed:
        assert table is not None
        raise ValueError(
            f"target bits: {name!r} can end at {list(possible)} bits, and the latency table has "
            f"only {list(table.seconds)}: add what moq bench measures of a directory at "
            f"{served_bits(possible[0])} bits"
        )
    return timed


def measure_candidates(
    names: Sequence[str],
    traces: Sequence[Trace | None],
    widths: Sequence[tuple[int, ...]],
    weights: Iterable[tuple[int, Weight]],
    objective: Objective = "mean_eigenvalue",
) -> list[Candidates]:
    """Rounds every weight at every width of its block, one weight at a time.

    Args:
        names: Of the blocks.
        traces: Of the blocks; None: not measured.
        widths: Of the blocks, from `offered`.
        weights: (number of the block, weight).
        objective: What their losses are.
    """
    sizes = [0] * len(names)
    errors: list[list[list[float]]] = [[[] for _ in block] for block in widths]
    sums = [[0] * len(block) for block in widths]
    for block, weight in weights:
        sizes[block] += weight.master.numel()
        for index, bits in enumerate(widths[block]):
            errors[block][index].append(weight.squared_error(bits))
            sums[block][index] += weight.bytes(bits)
    return [
        Candidates(
            name,
            None if trace is None else trace.value,
            size,
            own,
            tuple(math.fsum(parts) for parts in squared),
            tuple(stored),
            trace.error if trace else 0.0,
            objective,
        )
        for name, trace, size, own, squared, stored in zip(
            names, traces, sizes, widths, errors, sums, strict=True
        )
    ]


def choose(
    blocks: Sequence[Candidates],
    budget: Budget,
    *,
    other_bytes: int = 0,
    table: LatencyTable | None = None,
) -> TargetBits:
    """Chooses one width per block: least loss under the budget, exactly.

    A block whose trace is 0 loses nothing by any width, and gets the cheapest one. Of choices that
    cost and lose the same, the one with fewer bits in the last block that differs is taken.

    Args:
        blocks: What is offered.
        budget: What may be used up.
        other_bytes: Size of the model's tensors that are not quantized; counts in ``bytes``.
        table: Measured step times; needed for ``latency``.

    Raises:
        ValueError: if a trace or an error is not finite, naming the block; or if the budget is
            infeasible, naming the smallest feasible one.
        moq.Error: as moq._C.ParetoFront, if there are too many choices to compare.
    """
    for block in blocks:
        for what, value in [("trace", block.trace or 0.0)] + [
            ("squared rounding error", error) for error in block.squared_errors
        ]:
            if not math.isfinite(value):
                raise ValueError(
                    f"target bits: the {what} of {block.name!r} must be finite, got {value}: "
                    "weights or the measured loss hold a NaN or an infinity"
                )
    total = sum(block.num_weights for block in blocks)
    if total == 0:
        raise ValueError("target bits: at least one weight must be quantized, got none")

    def costs_of(block: Candidates) -> list[int]:
        if budget.kind == "mean_bits":
            return [bits * block.num_weights for bits in block.widths]
        if budget.kind == "bytes":
            return list(block.bytes)
        if table is None:
            raise ValueError("target bits: a latency budget needs a table of measured latencies")
        return [table.cost(bits, Fraction(block.num_weights, total)) for bits in block.widths]

    # From the budget's unit to whole costs of the quantized weights, and back.
    scale, offset = {
        "mean_bits": (Fraction(total), 0),
        "bytes": (Fraction(1), other_bytes),
        "latency": (Fraction(PER_SECOND), 0),
    }[budget.kind]

    def in_unit(cost: int) -> float:
        return float((cost + offset) / scale)

    front = ParetoFront(
        [block.name for block in blocks],
        [list(zip(costs_of(block), block.losses, strict=True)) for block in blocks],
    )
    points = front.points
    limit = math.floor(budget.limit * scale) - offset
    if limit < points[0][0]:
        raise ValueError(
            f"target bits: {budget.kind} must be at least "
            f"{_rounded_up((points[0][0] + offset) / scale)}, the smallest feasible budget (the "
            f"cheapest width for every block), got {_decimal(budget.limit)}: raise it, or offer "
            "narrower widths"
        )
    chosen = front.within(limit)

    def bits_behind(point: int) -> tuple[int, ...]:
        return tuple(
            block.widths[option] for block, option in zip(blocks, front.choice(point), strict=True)
        )

    return TargetBits(
        budget,
        tuple(blocks),
        bits_behind(chosen),
        in_unit(points[chosen][0]),
        points[chosen][1],
        tuple((in_unit(cost), loss) for cost, loss in points),
        bits_behind,
    )


def _rounded_up(value: Fraction) -> str:
    """A short decimal that is not below `value`."""
    if value.denominator == 1:
        return str(value)
    digits = 10**9 if value < 1 else 10**6
    return _decimal(Fraction(math.ceil(value * digits), digits))


def _decimal(value: Fraction) -> str:
    return f"{float(value):.9f}".rstrip("0").rstrip(".")


def bytes_beside(model: nn.Module, quantized: Iterable[nn.Parameter]) -> int:
    """Returns the size of what a checkpoint of `model` stores beside its quantized weights.

    Tied parameters count once, and sharded ones as a whole.
    """
    counted = {id(parameter) for parameter in quantized}
    total = 0
    for name, value in model.state_dict(keep_vars=True).items():
        learned_scale = ".parametrizations." in f".{plain_name(name)}"
        if isinstance(value, torch.Tensor) and not learned_scale and id(value) not in counted:
            counted.add(id(value))
            total += value.numel() * value.element_size()
    return total


def traces_for(history: Sequence[Mapping[str, Any]], where: str) -> dict[str, Trace]:
    """Returns the traces that were measured last: {block: trace}.

    Args:
        history: Measurements in order, as dicts of moq.sensitivity.Sensitivity.
        where: Begins the message.

    Raises:
        ValueError: if there is none.
    """
    for found in reversed(history):
        if found["measure"] in ("trace", "both"):
            errors = found.get("standard_error") or [0.0] * len(found["values"])
            traces = map(Trace, found["values"], errors)
            return dict(zip(found["blocks"], traces, strict=True))
    raise ValueError(
        f"{where}: traces of the blocks must have been measured, got "
        + ("eigenvalues" if history else "no measurement")
        + ": call optimizer.probe(loss_fn, batches, measure='trace') first"
    )
