"""Estimates of a block's curvature: traces by Hutchinson, ends of the spectrum by Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from moq import _C
from moq.probe_cost import Deadline, Kind
from moq.progress import ProductBar

Measure = Literal["trace", "eigenvalue", "both"]

DEFAULT_TOLERANCE: dict[Kind, float] = {"trace": 0.1, "eigenvalue": 0.01}
DEFAULT_PRODUCTS: dict[Kind, int] = {"trace": 12, "eigenvalue": 30}


def kinds_of(measure: Measure) -> tuple[Kind, ...]:
    """Returns what is measured, that which stretches the schedule first."""
    return ("trace", "eigenvalue") if measure == "both" else (measure,)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What measure() found; all sequences follow the order of `blocks`.

    Attributes:
        measure: ``trace``, ``eigenvalue`` or ``both``.
        blocks: Names.
        values: The trace of each block of the matrix, or its eigenvalue of largest magnitude, with
            its sign; means over the batches of all ranks. The traces for ``both``.
        normalised: |value| / max |value|, in [0, 1]: what stretches a schedule.
        standard_error: Of the traces, from the random vectors; for eigenvalues their `residuals`.
            How much batches differ is not in it.
        form: Of the matrix: ``exact`` or ``finite_difference`` (the Hessian), ``gauss_newton`` or
            ``fisher``.
        eigenvalues: Of largest magnitude, with their signs (not for ``trace``, then empty): of
            `smallest` and `largest` the one that is. A mean of the batches' own eigenvalues is not
            that of their mean matrix, whose ends lie no further out.
        residuals: Means over the batches of the residuals of that end: as far from each batch's
            value lies an eigenvalue at most (likewise).
        smallest: Lower end of each block's spectrum, in the mean over batches (likewise). Only the
            end of larger magnitude is sought until it is accurate; the other one may lie further
            out than is said here, but not beyond that magnitude.
        largest: Upper end, likewise.
        products: Products made, on all ranks; for ``fisher`` the gradients of single examples.
        gradients: Of whole losses that finite differences took for that, on all ranks, those from
            which they found their steps too; 0 for other forms.
        batches: Batches used, on all ranks.
        seconds: Wall time on this rank.
        converged: True if the tolerance is met.
    """

    measure: Measure
    blocks: tuple[str, ...]
    values: tuple[float, ...]
    normalised: tuple[float, ...]
    standard_error: tuple[float, ...]
    form: str = "exact"
    eigenvalues: tuple[float, ...] = ()
    residuals: tuple[float, ...] = ()
    smallest: tuple[float, ...] = ()
    largest: tuple[float, ...] = ()
    products: int
    gradients: int = 0
    batches: int = 0
    seconds: float
    converged: bool


def normalise(values: Sequence[float]) -> tuple[float, ...]:
    """Returns |value| / max |value|: sensitivities in [0, 1]; all zeros stay zeros.

    Curvature of either sign means that the loss moves when the weights move by a rounding error, so
    the magnitude counts. A trace is not divided by the number of weights: rounding moves every
    weight, and the expected change of the loss is the trace times half the variance of the error.
    """
    largest = max((abs(value) for value in values), default=0.0)
    return tuple(abs(value) / largest if largest > 0.0 else 0.0 for value in values)


def indices_of(blocks: Mapping[str, Sequence[Tensor]]) -> list[list[int]]:
    """Numbers the parameters of all blocks in order."""
    indices: list[list[int]] = []
    begin = 0
    for parameters in blocks.values():
        indices.append(list(range(begin, begin + len(parameters))))
        begin += len(parameters)
    return indices


def _mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one meter found; sequences follow the order of the blocks."""

    values: tuple[float, ...]
    errors: tuple[float, ...]
    smallest: tuple[float, ...] = ()
    largest: tuple[float, ...] = ()
    products: int
    batches: int
    converged: bool


class Traces:
    """Traces of all blocks; one row per batch: samples [products][blocks], and what they took.

    Args:
        blocks: {name: parameters}.
        tolerance: As in `moq.sensitivity.measure`.
        products: Of each batch, at most.
        total_batches: Of all ranks.
        seed: Of the random vectors.
        bar: Is told each product.
        deadline: After which no more products are made than two a batch; None: none.
        parts: Of the time until then it takes one in so many, at each batch.
    """

    def __init__(
        self,
        blocks: Mapping[str, Sequence[Tensor]],
        tolerance: float,
        products: int,
        total_batches: int,
        seed: int,
        bar: ProductBar,
        deadline: Deadline | None = None,
        parts: float = 1.0,
    ) -> None:
        """Has measured nothing yet."""
        self.blocks, self.tolerance, self.seed, self.bar = blocks, tolerance, seed, bar
        self.deadline, self.parts = deadline, parts
        self.products = self.products_per_batch = products
        # The mean over independent batches is more accurate than each of them.
        self.tolerance_per_batch = tolerance * math.sqrt(total_batches)
        self.rows: list[tuple[list[list[float]], int]] = []

    def measure(self, operator: _C.CurvatureOperator, batch: int) -> None:
        """Appends the row of one batch, whose number among all ranks' batches is `batch`."""
        if isinstance(operator, _C.FisherOperator):
            indices = indices_of(self.blocks)
            samples = [operator.exact_traces(indices, progress=self.bar.advance)]
            products = operator.examples
        else:
            end = None if self.deadline is None else self.deadline.share(self.parts)
            samples, _ = operator.traces(
                indices_of(self.blocks),
                tolerance=self.tolerance_per_batch,
                min_products=min(4, self.products),
                max_products=self.products,
                seed=self.seed,
                batch=batch,
                names=list(self.blocks),
                progress=self.bar.advance,
                enough=None if end is None else end.passed,
            )
            products = len(samples)
        self.rows.append((samples, products))

    def combine(self, gather: Callable[[Any], list[Any]]) -> Found:
        """Averages over all batches; errors of independent batches add up in quadrature."""
        gathered: list[tuple[list[list[float]], int]] = [
            r for rank in gather(self.rows) for r in rank
        ]
        rows = [samples for samples, _ in gathered]
        values = _mean([_mean(samples) for samples in rows])
        # What comes from one sample is exact.
        errors = [
            _C.standard_errors(samples) if samples[1:] else [0.0] * len(values) for samples in rows
        ]
        error = tuple(math.hypot(*column) / len(rows) for column in zip(*errors, strict=True))
        return Found(
            values=values,
            errors=error,
            products=sum(products for _, products in gathered),
            batches=len(rows),
            converged=max(error) <= self.tolerance * max(abs(value) for value in values),
        )


class Eigenvalues:
    """Ends of the spectrum of each block; one row of pairs per batch, one pair per block.

    Args:
        blocks: {name: parameters}.
        tolerance: As in `moq.sensitivity.measure`.
        products: Of each block and batch, at most.
        seed: Of the start vectors.
        bar: Is told each product.
        deadline: After which no more products are made than two a block; None: none. Blocks have
            equal shares of the time until then.
    """

    def __init__(
        self,
        blocks: Mapping[str, Sequence[Tensor]],
        tolerance: float,
        products: int,
        seed: int,
        bar: ProductBar,
        deadline: Deadline | None = None,
    ) -> None:
        """Has measured nothing yet."""
        self.blocks, self.tolerance, self.seed, self.bar = blocks, tolerance, seed, bar
        self.products, self.deadline = products, deadline
        self.products_per_batch = products * len(blocks)
        self.rows: list[list[_C.BlockEigenvalues]] = []

    def measure(self, operator: _C.CurvatureOperator, _batch: int) -> None:
        """Appends the row of one batch."""
        row: list[_C.BlockEigenvalues] = []
        for name, block in zip(self.blocks, indices_of(self.blocks), strict=True):
            done = self.bar.done
            # The first ones must not take the time of all others: they would be compared unequally.
            end = self.deadline and self.deadline.share(len(self.blocks) - len(row))
            try:
                row.append(self._of_block(operator, block, end))
            except _C.Error as error:
                raise _C.Error(f"block {name!r}: {error}") from error
            self.bar.skip_to(done + self.products)
        self.rows.append(row)

    def _of_block(
        self, operator: _C.CurvatureOperator, block: list[int], end: Deadline | None
    ) -> _C.BlockEigenvalues:
        if isinstance(operator, _C.FisherOperator):
            top = operator.largest_eigenvalue(block, progress=self.bar.advance)
            return {
                "largest": top,
                "smallest": 0.0,  # a sum of outer products, fewer than rows
                "dominant": top,
                "residual": 0.0,
                "largest_residual": 0.0,
                "smallest_residual": 0.0,
                "iterations": operator.examples,
                "converged": True,
            }
        return operator.eigenvalues(
            block,
            max_iterations=self.products,
            tolerance=self.tolerance,
            seed=self.seed,
            progress=self.bar.advance,
            enough=None if end is None else end.passed,
        )

    def combine(self, gather: Callable[[Any], list[Any]]) -> Found:
        """Averages each block's values over all batches."""
        rows: list[list[_C.BlockEigenvalues]] = [r for rank in gather(self.rows) for r in rank]

        def mean(
            name: Literal["smallest", "largest", "smallest_residual", "largest_residual"],
        ) -> tuple[float, ...]:
            return _mean([[block[name] for block in row] for row in rows])

        smallest, largest = mean("smallest"), mean("largest")
        upper = [high >= -low for low, high in zip(smallest, largest, strict=True)]
        ends = zip(mean("smallest_residual"), mean("largest_residual"), strict=True)
        values = tuple(
            high if up else low for up, low, high in zip(upper, smallest, largest, strict=True)
        )
        errors = tuple(high if up else low for up, (low, high) in zip(upper, ends, strict=True))
        # Where another end is the larger one in some batch, this one was not sought there.
        accurate = all(
            error <= self.tolerance * abs(value)
            or all((block["dominant"] == block["largest"]) == up for block in column)
            for error, value, up, column in zip(
                errors, values, upper, zip(*rows, strict=True), strict=True
            )
        )
        return Found(
            values=values,
            errors=errors,
            smallest=smallest,
            largest=largest,
            products=sum(block["iterations"] for row in rows for block in row),
            batches=len(rows),
            converged=accurate and all(block["converged"] for row in rows for block in row),
        )


def combine(
    measure: Measure,
    form: str,
    blocks: Iterable[str],
    found: Mapping[Kind, Found],
    seconds: float,
    gradients: int = 0,
) -> Sensitivity:
    """Brings together what all meters found.

    Args:
        measure: What was asked for.
        form: Of the matrix.
        blocks: Names.
        found: By the meters of the measure.
        seconds: Wall time on this rank.
        gradients: That finite differences took on all ranks.
    """
    main = found[kinds_of(measure)[0]]
    spectrum = found.get("eigenvalue")
    return Sensitivity(
        measure=measure,
        blocks=tuple(blocks),
        values=main.values,
        normalised=normalise(main.values),
        standard_error=main.errors,
        form=form,
        eigenvalues=spectrum.values if spectrum else (),
        residuals=spectrum.errors if spectrum else (),
        smallest=spectrum.smallest if spectrum else (),
        largest=spectrum.largest if spectrum else (),
        products=sum(part.products for part in found.values()),
        gradients=gradients,
        batches=main.batches,
        seconds=seconds,
        converged=all(part.converged for part in found.values()),
    )
