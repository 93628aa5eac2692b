"""Second-order sensitivity of blocks of a model: how curved the loss is in their weights."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moq.blocks import assign_blocks
from moq.collective import all_gather, raise_together
from moq.config import BLOCK_PATTERN, MoQConfig
from moq.curvature import FORMS, Curvature, Form
from moq.estimators import (
    DEFAULT_PRODUCTS,
    DEFAULT_TOLERANCE,
    Measure,
    Sensitivity,
    kinds_of,
    normalise,
)
from moq.measurement import Measurement
from moq.probe_cost import Kind
from moq.probe_inputs import are_sharded, count_batches, listed_batches, trainable_blocks
from moq.progress import ProductBar
from moq.rules import match_parameters, plain_name, unwrap
from moq.undisturbed import undisturbed

__all__ = ["Sensitivity", "find_blocks", "measure", "normalise", "quantized_blocks"]

Batch = TypeVar("Batch")
Number = TypeVar("Number", int, float)


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
    loss_fn: Callable[[Batch], Any],
    batches: Iterable[Batch],
    *,
    measure: Measure = "trace",
    form: Form = "auto",
    first: str | None = None,
    tolerance: float | None = None,
    max_products: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    group: ProcessGroup | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measures the curvature of the loss in each block, at the weights that the model holds now.

    Meanwhile the model is in eval mode and runs without torch.compile; afterwards weights, training
    flags, buffers, gradients, hooks and random states are what they were, bit for bit.

    With torch.distributed initialised, all ranks of `group` must call. Each brings its own batches,
    and all get the result that a single process with all the batches would get. Parameters that
    fully_shard has divided are measured by finite differences, and every rank must bring as many
    batches: each loss is then the mean over the ranks.

    Args:
        model: The model that `loss_fn` calls.
        blocks: {name: parameters}, disjoint; None takes find_blocks(model). Parameters that require
            no gradient are left out.
        loss_fn: Maps a batch to a scalar loss; for ``gauss_newton`` to (loss, outputs) or an object
            with loss and logits; for ``fisher`` to the losses of its examples, [n], or to that of
            its only example.
        batches: Data of this rank. Some hundred tokens in all rank the layers of a language model.
        measure: ``trace`` (Hutchinson's estimator: each product serves all blocks), ``eigenvalue``
            (of largest magnitude, by Lanczos: products for each block, whose cost is printed first)
            or ``both``.
        form: What stands for the curvature. ``exact``: the Hessian, by differentiating the gradient
            again, with attention in its math form. ``finite_difference``: the Hessian, by
            differences of gradients in float32, which any model has. ``gauss_newton``: without the
            model's own curvature. ``fisher``: the empirical Fisher matrix, from one gradient of
            each example; its traces are exact. ``auto``: exact, or finite_difference where an
            operation has no second derivative, memory is short or products overflow in half
            precision, which is printed.
        first: Of the two forms of ``auto`` the one to try first; None: exact.
        tolerance: At which to stop. Trace: standard error of every block over the largest |trace|
            (default 0.1). Eigenvalue: relative residual (default 0.01; the
            error is of the order of its square).
        max_products: Trace: over all batches, at least two each (default 12). Eigenvalue: for each
            block and batch (default 30).
        max_seconds: Of wall time that the measurement may take, by the time of its first product:
            batches and products are fewer if they must be. None takes them all.
        seed: Of the random vectors; they are the same on every machine.
        group: Ranks to average over; None means all.
        progress: Show a progress bar and the cost estimate on standard error (first rank only).

    Returns:
        The same on every rank, but for `seconds`.

    Raises:
        ValueError: if there is no block or batch, if blocks overlap or differ between ranks, if
            batches have other keys on other ranks, if the loss is not a finite scalar with a graph,
            if nothing curves it, or if no measurement fits into `max_seconds`.
        TypeError: if `batches` is one mapping, if loss_fn returns something else than `form` needs,
            or parameters are sharded and `form` needs whole ones.
        NotImplementedError: naming an operation that cannot be differentiated twice.
        moq.Error: if a product is not finite, an option is out of range or finite differences
            of two step sizes differ by more than 10 %.
        RuntimeError: if another rank failed.

    Example:
        >>> found = measure(model, None, lambda batch: model(**batch).loss, batches)
        >>> dict(zip(found.blocks, found.normalised))
        {'model.layers.0': 1.0, 'model.layers.1': 0.31}
    """
    if measure not in ("trace", "eigenvalue", "both"):
        raise ValueError(f"measure must be 'trace', 'eigenvalue' or 'both', got {measure!r}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    trainable = trainable_blocks(find_blocks(model) if blocks is None else blocks)
    sharded = are_sharded(trainable, form)
    own = listed_batches(batches)
    measurement = Measurement(
        model=model,
        blocks=trainable,
        batches=own,
        counts=count_batches(tuple(trainable), own, group, sharded=sharded),
        measure=measure,
        tolerance=_settings(measure, tolerance, DEFAULT_TOLERANCE),
        max_products=_settings(measure, max_products, DEFAULT_PRODUCTS),
        max_seconds=max_seconds,
        seed=seed,
        group=group,
        sharded=sharded,
        started=time.perf_counter(),
    )
    with ProductBar(f"sensitivity ({measure})", progress and measurement.rank == 0) as bar:
        forms: list[Form] = [form] if form != "auto" else ["exact", "finite_difference"]
        forms.sort(key=lambda name: name != first)
        if sharded:
            forms = ["finite_difference"]
        for number, name in enumerate(forms):
            curvature = Curvature(
                name, model, [p for block in trainable.values() for p in block], loss_fn, group
            )
            found = measurement.run(curvature, bar, optional=number + 1 < len(forms))
            if isinstance(found, Sensitivity):
                break
            bar.say(
                f"sensitivity: form {name!r} is not possible, so {forms[number + 1]!r} is taken "
                f"instead: {found}"
            )
        assert isinstance(found, Sensitivity)
        measurement.report(found, bar)
    return found


def gradient_seconds(
    model: nn.Module,
    loss_fn: Callable[[Any], Any],
    batches: Sequence[Any],
    form: str,
    group: ProcessGroup | None = None,
) -> float:
    """Returns the seconds that one gradient takes, of the first batch on the slowest rank.

    Args:
        model: What `loss_fn` calls.
        loss_fn: As for `measure` with `form`.
        batches: Of this rank.
        form: What `loss_fn` is made for.
        group: Ranks that measure together, all of which must call.

    Raises:
        ValueError, TypeError, RuntimeError: as `measure` of the batches and of the loss.
    """
    seconds = None
    curvature = Curvature("fisher", model, [], loss_fn, group)
    # Of a sharded model, a rank without a batch would leave the others waiting for its gradient.
    count_batches((), batches, group, sharded=curvature.sharded)
    with raise_together(group), undisturbed(model), curvature.frame():
        for _ in range(2 if batches else 0):  # the first one also makes what is made once
            started = time.perf_counter()
            curvature.backward(batches[0], 0, form)
            for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            for parameter in model.parameters():
                parameter.grad = None
    return max(other for other in all_gather(seconds, group) if other is not None)


def _settings(
    measure: Measure, given: Number | None, default: dict[Kind, Number]
) -> dict[Kind, Number]:
    """Returns the setting of everything that is measured."""
    return {kind: default[kind] if given is None else given for kind in kinds_of(measure)}
