"""The spectral density of blocks of the Hessian: how its eigenvalues are distributed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moq import _C
from moq.blocks import layer_of
from moq.collective import raise_together
from moq.curvature import Curvature
from moq.probe_inputs import count_batches, listed_batches, require_whole, trainable_blocks
from moq.progress import ProductBar
from moq.sensitivity import find_blocks, quantized_blocks
from moq.strict import suggestion
from moq.undisturbed import undisturbed

if TYPE_CHECKING:
    from moq.optimizer import MoQOptimizer

Batch = TypeVar("Batch")

#: Where a saved run keeps densities, in the history of its run.json.
SPECTRA_KEY = "spectra"


@dataclass(frozen=True, kw_only=True)
class SpectralDensity:
    """The distribution of the eigenvalues of one block's Hessian.

    Attributes:
        block: Name.
        step: Completed optimizer steps; None if it was measured without a MoQOptimizer.
        num_weights: Rows of the block's Hessian, and so the number of its eigenvalues.
        values: Eigenvalues at which the density is given, evenly spaced, rising.
        density: Share of all eigenvalues per unit of `values`, blurred; its integral is 1.
        density_error: Standard error of `density`, from the random vectors.
        width: Standard deviation of the Gaussian that blurs.
        rules: (nodes, weights) of each random vector: eigenvalues of the tridiagonal matrix and the
            share of the whole that each stands for. Their mean is the density before it is blurred.
        trace: Sum of the eigenvalues.
        trace_error: Its standard error.
        products: Products with the mean Hessian, each one for every batch.
        exact: True for a block so small that `rules` is its whole spectrum.
    """

    block: str
    step: int | None
    num_weights: int
    values: tuple[float, ...]
    density: tuple[float, ...]
    density_error: tuple[float, ...]
    width: float
    rules: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    trace: float
    trace_error: float
    products: int
    exact: bool

    @property
    def smallest(self) -> float:
        """The lowest node: not below the lowest eigenvalue, and usually close to it."""
        return min(nodes[0] for nodes, _ in self.rules)

    @property
    def largest(self) -> float:
        """The highest node: not above the highest eigenvalue, and usually close to it."""
        return max(nodes[-1] for nodes, _ in self.rules)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SpectralDensity:
        """Makes it of what `to_dict` returned, lists in the place of tuples."""
        rules = tuple((tuple(nodes), tuple(weights)) for nodes, weights in fields["rules"])
        lists = {name: tuple(fields[name]) for name in ("values", "density", "density_error")}
        return cls(**(dict(fields) | lists | {"rules": rules}))


def spectral_density(
    loss_fn: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    model: nn.Module | MoQOptimizer,
    *,
    blocks: Sequence[str] | Mapping[str, Sequence[Tensor]] | None = None,
    steps: int = 40,
    probes: int = 4,
    width: float | None = None,
    points: int = 401,
    seed: int = 0,
    group: ProcessGroup | None = None,
    run: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, SpectralDensity]:
    """Estimates how the eigenvalues of each block's Hessian are distributed.

    Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017; Ghorbani, Krishnan, Xiao 2019) of the
    mean Hessian of all batches, at the weights that the model holds now, in the frame of
    moq.sensitivity.measure: eval mode, exact second derivatives, everything restored afterwards. It
    is for looking at, and drives nothing.

    A block costs steps * probes products with the mean Hessian. The graphs of all batches of this
    rank are held meanwhile, and steps + 1 vectors of a block's size in host memory.

    With torch.distributed initialised, all ranks of `group` must call. Each brings its own batches;
    all get what a single process with all the batches would get.

    Args:
        loss_fn: Maps a batch to a scalar loss.
        batches: Data of this rank.
        model: The model that `loss_fn` calls, or the MoQOptimizer that trains it: then the blocks
            are those of its schedule.
        blocks: Names among the model's blocks, or {name: parameters}; None takes all. A layer that
            rules split into several blocks may be named as a whole, without their suffix.
        steps: Lanczos steps for each random vector: nodes that stand for the spectrum.
        probes: Random vectors, at least 2; the standard error falls with their root.
        width: Standard deviation of the Gaussian that blurs the nodes into a density; None takes
            a hundredth of the distance between the outermost nodes of the block.
        points: Of the density, at least 2, from 4 widths below the lowest node to 4 above the
            highest.
        seed: Of the random vectors; they are the same on every machine.
        group: Ranks to average over; None means all.
        run: A directory that MoQOptimizer.save wrote: what was found is added to its run.json,
            where `moq report` looks for it, until the run is saved again. Rank 0 writes.
        progress: Show the number of products and a progress bar on standard error.

    Returns:
        {name of the block: what was found}, the same on every rank.

    Raises:
        ValueError: if a block is unknown, there is no batch, a loss is not finite, or width or
            points is out of range.
        FormatError: if `run` holds no run; before anything is measured.
        TypeError, NotImplementedError, RuntimeError: as moq.sensitivity.measure.
        moq.Error: if steps or probes is out of range or a product is not finite.

    Example:
        >>> found = moq.spectral_density(loss_fn, batches, model, blocks=["model.layers.0"])
        >>> found["model.layers.0"].largest
        12.7
    """
    module, known, step = _of(model)
    chosen = trainable_blocks(_choose(known, blocks))
    require_whole(chosen, "spectral_density")
    if width is not None and not 0.0 < width < float("inf"):
        raise ValueError(f"spectral_density: width must be positive and finite, got {width!r}")
    if points < 2:
        raise ValueError(f"spectral_density: points must be >= 2, got {points}")
    own = listed_batches(batches)
    counts = count_batches(tuple(chosen), own, group)
    total = sum(counts)
    rank = torch.distributed.get_rank(group) if len(counts) > 1 else 0
    with raise_together(group):
        if run is not None:
            _history(run)

    found = {}
    with ProductBar("spectral density", progress and rank == 0) as bar:
        sizes = {name: sum(p.numel() for p in parameters) for name, parameters in chosen.items()}
        most = sum(size if size <= steps else steps * probes for size in sizes.values())
        bar.say(
            f"spectral density of {len(chosen)} blocks: at most {most} products with the mean "
            f"Hessian of {total} batches"
        )
        bar.start(most)
        started = time.perf_counter()
        parameters = [p for block in chosen.values() for p in block]
        curvature = Curvature("exact", module, parameters, loss_fn, group)
        with undisturbed(module), curvature.frame():
            with raise_together(group):
                before = sum(counts[:rank])
                operators = [curvature.operator(b, i) for i, b in enumerate(own, start=before)]
            begin = 0
            for name, members in chosen.items():
                indices = list(range(begin, begin + len(members)))
                begin += len(members)
                quadrature = _C.spectral_quadrature(
                    _mean_product(operators, indices, members, total, group, bar),
                    sizes[name],
                    dtype=members[0].dtype if members[0].dtype == torch.float64 else torch.float32,
                    steps=steps,
                    probes=probes,
                    seed=seed,
                )
                found[name] = _describe(name, step, quadrature, width, points)
        seconds = time.perf_counter() - started
        bar.say(
            f"spectral density: {sum(f.products for f in found.values())} products, {seconds:.1f} s"
        )
    with raise_together(group):
        if run is not None and rank == 0:
            _record(run, found)
    return found


def read_spectra(run: str | os.PathLike[str]) -> list[SpectralDensity]:
    """Reads the densities that were recorded in a saved run, in order.

    Raises:
        FormatError: if the directory holds no run of a known version.
    """
    return [SpectralDensity.from_dict(entry) for entry in _history(run).get(SPECTRA_KEY, [])]


def _history(run: str | os.PathLike[str]) -> dict[str, Any]:
    from moq.saved_run import read_history  # imports transformers

    return read_history(run)


def _of(
    model: nn.Module | MoQOptimizer,
) -> tuple[nn.Module, Mapping[str, Sequence[Tensor]], int | None]:
    """Returns the model, its blocks and the number of completed steps."""
    if isinstance(model, nn.Module):
        return model, find_blocks(model), None
    from moq.optimizer import MoQOptimizer

    if not isinstance(model, MoQOptimizer):
        raise TypeError(
            "spectral_density: model must be a torch module or a MoQOptimizer, got "
            f"{type(model).__name__}"
        )
    return model.model, quantized_blocks(model.model, model.config), model.steps


def _choose(
    known: Mapping[str, Sequence[Tensor]],
    blocks: Sequence[str] | Mapping[str, Sequence[Tensor]] | None,
) -> Mapping[str, Sequence[Tensor]]:
    """Returns the blocks that were asked for, by their names or those of their layers."""
    if blocks is None or isinstance(blocks, Mapping):
        return known if blocks is None else blocks
    if isinstance(blocks, str):
        blocks = [blocks]
    layers: dict[str, list[Tensor]] = {}
    for name, members in known.items():
        layers.setdefault(layer_of(name), []).extend(members)
    for name in blocks:
        if name not in known and name not in layers:
            raise ValueError(
                f"spectral_density: blocks must be among the model's {len(known)}, "
                f"{', '.join(list(known)[:3])}…, got {name!r}{suggestion(name, known)}"
            )
    return {name: known.get(name) or layers[name] for name in blocks}


def _mean_product(
    operators: Sequence[_C.CurvatureOperator],
    indices: list[int],
    members: Sequence[Tensor],
    total: int,
    group: ProcessGroup | None,
    bar: ProductBar,
) -> Callable[[Tensor], Tensor]:
    """Returns the product of one block of the mean Hessian of all ranks' batches."""
    sizes = [p.numel() for p in members]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()

    def add_products(x: Tensor, result: Tensor) -> None:
        vectors = [v.view_as(p).to(p) for v, p in zip(torch.split(x, sizes), members, strict=True)]
        for operator in operators:
            pieces = operator.product(indices, vectors)
            result += torch.cat([piece.reshape(-1).to(result) for piece in pieces])

    def product(x: Tensor) -> Tensor:
        # The last element counts the ranks that failed, which the others must not wait for.
        result = torch.zeros(x.numel() + 1, dtype=x.dtype, device=members[0].device)
        failure: Exception | None = None
        try:
            add_products(x, result[:-1])
        except Exception as error:
            failure = error
            result[-1] = 1
        if distributed:
            torch.distributed.all_reduce(result, group=group)
        if result[-1] > 0:
            with raise_together(group):
                if failure is not None:
                    raise failure
        bar.advance()
        return result[:-1] / total

    return product


def _describe(
    name: str,
    step: int | None,
    quadrature: _C.SpectralQuadrature,
    width: float | None,
    points: int,
) -> SpectralDensity:
    """Blurs what was found into a density over its own range."""
    rules = tuple((tuple(nodes), tuple(weights)) for nodes, weights in quadrature.rules)
    low = min(nodes[0] for nodes, _ in rules)
    high = max(nodes[-1] for nodes, _ in rules)
    if width is None:
        # All nodes may be one number, and that number 0.
        width = max((high - low) / 100, max(-low, high) / 1000) or 1.0
    begin, end = low - 4 * width, high + 4 * width
    values = [begin + (end - begin) * i / (points - 1) for i in range(points)]
    density = quadrature.density(values, width)
    trace, trace_error = quadrature.trace()
    return SpectralDensity(
        block=name,
        step=step,
        num_weights=quadrature.n,
        values=tuple(values),
        density=tuple(value for value, _ in density),
        density_error=tuple(error for _, error in density),
        width=width,
        rules=rules,
        trace=trace,
        trace_error=trace_error,
        products=quadrature.products,
        exact=quadrature.exact,
    )


def _record(run: str | os.PathLike[str], found: Mapping[str, SpectralDensity]) -> None:
    """Adds densities to a run, in the place of those of the same blocks and steps."""
    from moq.saved_run import record

    new = {(f.block, f.step): f.to_dict() for f in found.values()}
    old = _history(run).get(SPECTRA_KEY, [])
    kept = [entry for entry in old if (entry["block"], entry["step"]) not in new]
    record(run, SPECTRA_KEY, [*kept, *new.values()])
