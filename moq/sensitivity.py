"""Second-order sensitivity of blocks of a model: how curved the loss is in their weights."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moq import _C
from moq.collective import all_gather, raise_together
from moq.undisturbed import undisturbed

Batch = TypeVar("Batch")
Measure = Literal["trace", "eigenvalue"]

#: Finds the transformer layer in a parameter's name, as ``model.layers.3`` or
#: ``bert.encoder.layer.0``: the shortest prefix that ends with an entry of a list of layers.
BLOCK_PATTERN = r"^(?:.*?\.)??(?:layers|layer|h|blocks|block)\.\d+(?=\.)"

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


def find_blocks(model: nn.Module, pattern: str = BLOCK_PATTERN) -> dict[str, list[nn.Parameter]]:
    """Groups the trainable parameters of a model by transformer layer.

    Args:
        model: Any module; a parameter with several names counts under its first.
        pattern: Regular expression; what it finds in a parameter's name is the name of its block. A
            parameter in whose name it finds nothing belongs to a block named as its module.

    Returns:
        The blocks in the order of their first parameters; none is empty.
    """
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = re.search(pattern, name)
            block = found.group() if found else name.rpartition(".")[0] or name
            blocks.setdefault(block, []).append(parameter)
    return blocks


def normalise(values: Sequence[float]) -> tuple[float, ...]:
    """Returns |value| / max |value|: sensitivities in [0, 1]; all zeros stay zeros.

    Curvature of either sign means that the loss moves when the weights move by a rounding error, so
    the magnitude counts. A trace is not divided by the number of weights: rounding moves every
    weight, and the expected change of the loss is the trace times half the variance of the error.
    """
    largest = max((abs(value) for value in values), default=0.0)
    return tuple(abs(value) / largest if largest > 0.0 else 0.0 for value in values)


def measure(
    model: nn.Module,
    blocks: Mapping[str, Sequence[Tensor]] | None,
    loss_fn: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    measure: Measure = "trace",
    tolerance: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
    group: ProcessGroup | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measures the curvature of the loss in each block, at the weights that the model holds now.

    Second derivatives are exact: the gradient is differentiated again for each product. Meanwhile
    the model is in eval mode and scaled dot product attention takes its math form, which is twice
    differentiable; afterwards training flags, buffers, gradients and random states are what they
    were, bit for bit.

    With torch.distributed initialised, all ranks of `group` must call. Each brings its own batches,
    and all get the result that a single process with all the batches would get.

    Args:
        model: The model that `loss_fn` calls.
        blocks: {name: parameters}, disjoint; None takes find_blocks(model). Parameters that require
            no gradient are left out.
        loss_fn: Maps a batch to a scalar loss.
        batches: Data of this rank. Some hundred tokens in all rank the layers of a language model.
        measure: ``trace`` (Hutchinson's estimator: each product serves all blocks) or
            ``eigenvalue`` (of largest magnitude, by Lanczos: products for each block, whose cost is
            printed first).
        tolerance: At which to stop. Trace: standard error of every block over the largest |trace|
            (default 0.1). Eigenvalue: relative residual (default 0.01).
        max_products: Trace: over all batches, at least two each (default 12). Eigenvalue: for each
            block and batch (default 30).
        seed: Of the random vectors; they are the same on every machine.
        group: Ranks to average over; None means all.
        progress: Show a progress bar and the cost estimate on standard error (first rank only).

    Returns:
        The same on every rank, but for `seconds`.

    Raises:
        ValueError: if there is no block or batch, if blocks overlap or differ between ranks, or if
            the loss is not a scalar with a graph.
        TypeError: for sharded parameters (DTensor).
        NotImplementedError: naming an operation that cannot be differentiated twice.
        moq._C.Error: if a product is not finite or an option is out of range.
        RuntimeError: if another rank failed.

    Example:
        >>> found = measure(model, None, lambda batch: model(**batch).loss, batches)
        >>> dict(zip(found.blocks, found.normalised))
        {'model.layers.0': 1.0, 'model.layers.1': 0.31}
    """
    started = time.perf_counter()
    if measure not in DEFAULT_TOLERANCE:
        raise ValueError(f"measure must be 'trace' or 'eigenvalue', got {measure!r}")
    tolerance = DEFAULT_TOLERANCE[measure] if tolerance is None else tolerance
    max_products = DEFAULT_PRODUCTS[measure] if max_products is None else max_products
    trainable = _trainable(find_blocks(model) if blocks is None else blocks)
    own = list(batches)
    first, total = _place_among_ranks(tuple(trainable), len(own), group)

    parameters = [parameter for block in trainable.values() for parameter in block]
    meter: _Traces | _Eigenvalues
    with _Bar(f"sensitivity ({measure})", progress and first == 0) as bar:
        if measure == "trace":
            meter = _Traces(trainable, tolerance, max_products, total, seed, bar)
        else:
            meter = _Eigenvalues(trainable, tolerance, max_products, total, seed, bar)
        bar.start(len(own) * meter.products_per_batch)
        with raise_together(group), undisturbed(model), _twice_differentiable():
            for index, batch in enumerate(own, start=first):
                meter.measure(_C.HvpOperator(loss_fn(batch), parameters), index)
    found = meter.combine(group, time.perf_counter() - started)
    if not found.converged:
        bar.say(
            f"sensitivity ({measure}): tolerance {tolerance} not met in {found.products} products; "
            f"largest error {max(found.standard_error):.3g}, largest value "
            f"{max(map(abs, found.values)):.3g}"
        )
    return found


def _trainable(blocks: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """Drops frozen parameters and empty blocks, and refuses what cannot be measured."""
    seen: dict[Tensor, str] = {}
    result: dict[str, list[Tensor]] = {}
    for name, parameters in blocks.items():
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if isinstance(parameter, DTensor):
                raise TypeError(
                    f"measure: parameters must be whole tensors, got a DTensor in block {name!r}: "
                    "measure before sharding"
                )
            if parameter in seen:
                raise ValueError(
                    f"measure: blocks must not overlap, got one parameter in {seen[parameter]!r} "
                    f"and {name!r}"
                )
            seen[parameter] = name
            result.setdefault(name, []).append(parameter)
    if not result:
        raise ValueError("measure: there must be a block with a trainable parameter, got none")
    return result


def _place_among_ranks(
    names: tuple[str, ...], own: int, group: ProcessGroup | None
) -> tuple[int, int]:
    """Returns the number of this rank's first batch among those of all ranks, and their count."""
    ranks = all_gather((names, own), group)
    if any(other != names for other, _ in ranks):
        raise ValueError(f"measure: blocks must be the same on all ranks, got {list(names)} here")
    counts = [count for _, count in ranks]
    if sum(counts) == 0:
        raise ValueError("measure: batches must hold at least one batch, got none")
    rank = torch.distributed.get_rank(group) if len(ranks) > 1 else 0
    return sum(counts[:rank]), sum(counts)


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Replaces fused forms, which have no second derivative, by their plain ones."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


class _Bar:
    """Counts products on standard error."""

    def __init__(self, title: str, enabled: bool) -> None:
        self.console = Console(file=sys.stderr)
        self.enabled = enabled
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("products"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
            transient=True,
        )

    def __enter__(self) -> _Bar:
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def start(self, total: int) -> None:
        """Sets the largest number of products."""
        self._task = self._progress.add_task("", total=total)

    def advance(self, _products: int = 1) -> None:
        """Counts one product."""
        self._progress.advance(self._task)

    def skip_to(self, products: int) -> None:
        """Moves on over products that early convergence made unnecessary."""
        self._progress.update(self._task, completed=products)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)


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


class _Traces:
    """Traces of all blocks; one row of samples [products][blocks] per batch."""

    def __init__(
        self,
        blocks: Mapping[str, Sequence[Tensor]],
        tolerance: float,
        max_products: int,
        total_batches: int,
        seed: int,
        bar: _Bar,
    ) -> None:
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


class _Eigenvalues:
    """Ends of the spectrum of each block; one row of pairs per batch, one pair per block."""

    def __init__(
        self,
        blocks: Mapping[str, Sequence[Tensor]],
        tolerance: float,
        max_products: int,
        total_batches: int,
        seed: int,
        bar: _Bar,
    ) -> None:
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
