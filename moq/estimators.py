"""Estimates of a block's curvature: traces by Hutchinson, ends of the spectrum by Lanczos."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moq import _C
from moq.collective import all_gather
from moq.progress import ProductBar

Measure = Literal["trace", "eigenvalue"]

DEFAULT_TOLERANCE: dict[Measure, float] = {"trace": 0.1, "eigenvalue": 0.01}
DEFAULT_PRODUCTS: dict[Measure, int] = {"trace": 12, "eigenvalue": 30}


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What measure() found; all sequences follow the order of `blocks`.

    Attributes:
        measure: ``trace`` or ``eigenvalue``.
        blocks: Names.
        values: The trace of each block of the Hessian, or its eigenvalue of largest magnitude, with
            its sign; means over the batches of all ranks.
        normalised: |value| / max |value|, in [0, 1]: what stretches a schedule.
        standard_error: Of the traces, from the random vectors; for eigenvalues the mean residual,
            which bounds the error. How much batches differ is not in it.
        smallest: Lower end of each block's spectrum (eigenvalue only, otherwise empty).
        largest: Upper end of each block's spectrum (eigenvalue only, otherwise empty).
        products: Hessian-vector products made, on all ranks.
        seconds: Wall time on this rank.
        converged: True if the tolerance is met.
    """

    measure: Measure
    blocks: tuple[str, ...]
    values: tuple[float, ...]
    normalised: tuple[float, ...]
    standard_error: tuple[float, ...]
    smallest: tuple[float, ...] = ()
    largest: tuple[float, ...] = ()
    products: int
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


def _indices(blocks: Mapping[str, Sequence[Tensor]]) -> list[list[int]]:
    """Numbers the parameters of all blocks in order."""
    indices: list[list[int]] = []
    begin = 0
    for parameters in blocks.values():
        indices.append(list(range(begin, begin + len(parameters))))
        begin += len(parameters)
    return indices


def _mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))


class Traces:
    """Traces of all blocks; one row of samples [products][blocks] per batch."""

    def __init__(
        self,
        blocks: Mapping[str, Sequence[Tensor]],
        tolerance: float,
        max_products: int,
        total_batches: int,
        seed: int,
        bar: ProductBar,
    ) -> None:
        """Shares `max_products` among the batches of all ranks, with at least two for each."""
        self.blocks, self.tolerance, self.seed, self.bar = blocks, tolerance, seed, bar
        self.products_per_batch = max(2, max_products // total_batches)
        # The mean over independent batches is more accurate than each of them.
        self.tolerance_per_batch = tolerance * math.sqrt(total_batches)
        self.rows: list[list[list[float]]] = []

    def measure(self, operator: _C.HvpOperator, batch: int) -> None:
        """Appends the row of one batch, whose number among all ranks' batches is `batch`."""
        samples, _ = operator.traces(
            _indices(self.blocks),
            tolerance=self.tolerance_per_batch,
            min_products=min(4, self.products_per_batch),
            max_products=self.products_per_batch,
            seed=self.seed,
            batch=batch,
            progress=self.bar.advance,
        )
        self.rows.append(samples)
        self.bar.skip_to(len(self.rows) * self.products_per_batch)

    def combine(self, group: ProcessGroup | None, seconds: float) -> Sensitivity:
        """Averages over all batches; errors of independent batches add up in quadrature."""
        rows = [row for rank in all_gather(self.rows, group) for row in rank]
        values = _mean([_mean(samples) for samples in rows])
        errors = [_C.standard_errors(samples) for samples in rows]
        error = tuple(math.hypot(*column) / len(rows) for column in zip(*errors, strict=True))
        return Sensitivity(
            measure="trace",
            blocks=tuple(self.blocks),
            values=values,
            normalised=normalise(values),
            standard_error=error,
            products=sum(len(samples) for samples in rows),
            seconds=seconds,
            converged=max(error) <= self.tolerance * max(abs(value) for value in values),
        )


class Eigenvalues:
    """Ends of the spectrum of each block; one row of pairs per batch, one pair per block."""

    def __init__(
        self,
        blocks: Mapping[str, Sequence[Tensor]],
        tolerance: float,
        max_products: int,
        total_batches: int,
        seed: int,
        bar: ProductBar,
    ) -> None:
        """Allows `max_products` for each block and batch."""
        self.blocks, self.tolerance, self.seed, self.bar = blocks, tolerance, seed, bar
        self.max_products = max_products
        self.total_batches = total_batches
        self.products_per_batch = max_products * len(blocks)
        self.rows: list[list[_C.BlockEigenvalues]] = []

    def measure(self, operator: _C.HvpOperator, batch: int) -> None:
        """Appends the row of one batch."""
        indices = _indices(self.blocks)
        if not self.rows:
            self._estimate_cost(operator, indices)
        row: list[_C.BlockEigenvalues] = []
        for block in indices:
            found = operator.eigenvalues(
                block,
                max_iterations=self.max_products,
                tolerance=self.tolerance,
                seed=self.seed,
                progress=self.bar.advance,
            )
            row.append(found)
            done = len(self.rows) * self.products_per_batch + len(row) * self.max_products
            self.bar.skip_to(done)
        self.rows.append(row)

    def _estimate_cost(self, operator: _C.HvpOperator, indices: list[list[int]]) -> None:
        # The first block lies deepest, so that its product is the most expensive one.
        started = time.perf_counter()
        operator.product(indices[0], [torch.ones_like(p) for p in next(iter(self.blocks.values()))])
        seconds = time.perf_counter() - started
        most = self.products_per_batch * self.total_batches
        self.bar.say(
            f"top eigenvalues of {len(indices)} blocks, {self.total_batches} batches: "
            f"at most {most} products of {seconds:.2f} s, {most * seconds:.0f} s together"
        )

    def combine(self, group: ProcessGroup | None, seconds: float) -> Sensitivity:
        """Averages each block's values over all batches."""
        rows = [row for rank in all_gather(self.rows, group) for row in rank]

        def mean(name: Literal["residual", "smallest", "largest"]) -> tuple[float, ...]:
            return _mean([[block[name] for block in row] for row in rows])

        smallest, largest = mean("smallest"), mean("largest")
        values = tuple(
            high if high >= -low else low for low, high in zip(smallest, largest, strict=True)
        )
        return Sensitivity(
            measure="eigenvalue",
            blocks=tuple(self.blocks),
            values=values,
            normalised=normalise(values),
            standard_error=mean("residual"),
            smallest=smallest,
            largest=largest,
            products=sum(block["iterations"] for row in rows for block in row),
            seconds=seconds,
            converged=all(block["converged"] for row in rows for block in row),
        )
