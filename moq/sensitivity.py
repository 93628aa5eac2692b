"""Second-order sensitivity of blocks of a model: how curved the loss is in their weights."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moq import _C
from moq.blocks import assign_blocks
from moq.collective import all_gather, raise_together
from moq.config import BLOCK_PATTERN, MoQConfig
from moq.estimators import (
    DEFAULT_PRODUCTS,
    DEFAULT_TOLERANCE,
    Eigenvalues,
    Measure,
    Sensitivity,
    Traces,
    normalise,
)
from moq.progress import ProductBar
from moq.rules import match_parameters, plain_name, unwrap
from moq.undisturbed import undisturbed

__all__ = ["Sensitivity", "find_blocks", "measure", "normalise", "quantized_blocks"]

Batch = TypeVar("Batch")


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
    for full_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = plain_name(full_name)
            found = re.search(pattern, name)
            block = found.group() if found else name.rpartition(".")[0] or name
            blocks.setdefault(block, []).append(parameter)
    return blocks


def quantized_blocks(
    model: nn.Module, config: MoQConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None
) -> dict[str, list[Tensor]]:
    """Groups the parameters that MoQOptimizer would quantize as its schedule does.

    Args:
        model: The model; its parameters must be whole.
        config: As for MoQOptimizer.

    Returns:
        What to measure for MoQOptimizer.apply_sensitivity.

    Raises:
        ValueError: as MoQOptimizer.
    """
    model = unwrap(model)
    matched, _ = match_parameters(model, MoQConfig.load(config), model.parameters())
    return assign_blocks(matched).parameters(matched)


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
    meter: Traces | Eigenvalues
    with ProductBar(f"sensitivity ({measure})", progress and first == 0) as bar:
        if measure == "trace":
            meter = Traces(trainable, tolerance, max_products, total, seed, bar)
        else:
            meter = Eigenvalues(trainable, tolerance, max_products, total, seed, bar)
        bar.start(len(own) * meter.products_per_batch)
        with raise_together(group), undisturbed(model), _twice_differentiable():
            for index, batch in enumerate(own, start=first):
                loss = loss_fn(batch)
                if not isinstance(loss, torch.Tensor):
                    raise TypeError(
                        f"sensitivity: loss_fn must return a tensor, got {type(loss).__name__}: "
                        "return the loss that backward() is called on, not its value"
                    )
                meter.measure(_C.HvpOperator(loss, parameters), index)
    found = meter.combine(group, time.perf_counter() - started)
    if not found.converged:
        bar.say(
            f"sensitivity ({measure}): tolerance {tolerance} not met in {found.products} products; "
            f"largest error {max(found.standard_error):.3g}, largest value "
            f"{max(map(abs, found.values)):.3g}: raise sensitivity.max_products (now "
            f"{max_products}) or sensitivity.tolerance, or give more batches"
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
                    "before fully_shard, measure moq.sensitivity.quantized_blocks(model, config), "
                    "and give the result to MoQOptimizer.apply_sensitivity"
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
