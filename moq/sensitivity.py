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
from torch.utils._pytree import tree_leaves

from moq import _C
from moq.blocks import assign_blocks
from moq.collective import all_gather, raise_together
from moq.config import BLOCK_PATTERN, MoQConfig
from moq.curvature import FORMS, Curvature, Form
from moq.estimators import (
    DEFAULT_PRODUCTS,
    DEFAULT_TOLERANCE,
    Eigenvalues,
    Measure,
    Sensitivity,
    Traces,
    combine,
    indices_of,
    kinds_of,
    normalise,
)
from moq.probe_cost import BudgetTooSmallError, Cost, Kind, Size, fit
from moq.progress import ProductBar
from moq.rules import match_parameters, plain_name, unwrap
from moq.sharding import is_sharded
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
            operation has no second derivative or memory is short, which is printed.
        tolerance: At which to stop. Trace: standard error of every block over the largest |trace|
            (default 0.1). Eigenvalue: relative residual (default 0.01).
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
        TypeError: if loss_fn returns something else than `form` needs, or parameters are sharded
            and `form` needs whole ones.
        NotImplementedError: naming an operation that cannot be differentiated twice.
        moq._C.Error: if a product is not finite, an option is out of range or finite differences
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
    sharded = _sharded(trainable, form)
    own = list(batches)
    probe = _Probe(
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
    with ProductBar(f"sensitivity ({measure})", progress and probe.rank == 0) as bar:
        forms: list[Form] = [form] if form != "auto" else ["exact", "finite_difference"]
        if sharded:
            forms = ["finite_difference"]
        for number, name in enumerate(forms):
            curvature = Curvature(
                name, model, [p for block in trainable.values() for p in block], loss_fn, group
            )
            found = probe.run(curvature, bar, optional=number + 1 < len(forms))
            if isinstance(found, Sensitivity):
                break
            bar.say(
                f"sensitivity: form {name!r} is not possible, so {forms[number + 1]!r} is taken "
                f"instead: {found}"
            )
        assert isinstance(found, Sensitivity)
        probe.report(found, bar)
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


class _Probe:
    """One measurement, whatever its form.

    Args:
        counts: Batches of each rank; of sharded models one number, since they share them.
        started: When the time began, of which a form that was not possible has taken some.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        blocks: dict[str, list[Tensor]],
        batches: list[Any],
        counts: list[int],
        measure: Measure,
        tolerance: dict[Kind, float],
        max_products: dict[Kind, int],
        max_seconds: float | None,
        seed: int,
        group: ProcessGroup | None,
        sharded: bool,
        started: float,
    ) -> None:
        self.model, self.blocks, self.batches, self.counts = model, blocks, batches, counts
        self.measure, self.tolerance, self.max_products = measure, tolerance, max_products
        self.max_seconds, self.seed, self.group, self.sharded = max_seconds, seed, group, sharded
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank(group) if ranks else 0
        self.started = started

    def run(self, curvature: Curvature, bar: ProductBar, *, optional: bool) -> Sensitivity | str:
        """Measures in one form.

        Args:
            curvature: The form.
            bar: Is told each product.
            optional: Whether another form follows where this one is not possible.

        Returns:
            The measurement, or why this form is not possible on some rank.
        """
        trial: _C.CurvatureOperator | None = None
        own = Cost(0.0, 0.0)
        examples = 1
        reason: str | None = None
        with undisturbed(self.model), curvature.frame():
            timed = self.max_seconds is not None or "eigenvalue" in kinds_of(self.measure)
            with raise_together(self.group):
                try:
                    if self.batches and (timed or curvature.form == "fisher"):
                        trial, own, examples = self._try(curvature, timed=timed)
                except _IMPOSSIBLE as error:
                    reason = self._why(error, optional)
            reason = self._first(reason)
            if reason is not None:
                return reason

            spent = time.perf_counter() - self.started
            size = self._size(own, examples, curvature.form == "fisher", spent, bar)
            # Products may turn out slower than the one that was timed.
            over = None if self.max_seconds is None else self._over
            meters = self._meters(size, bar, over)
            most = size.batches
            before = self.counts[: 0 if self.sharded else self.rank]
            first = sum(min(count, most) for count in before)
            with raise_together(self.group):
                try:
                    for index, batch in enumerate(self.batches[:most], start=first):
                        if index > first and over is not None and over():
                            break
                        operator = trial or curvature.operator(batch, index)
                        trial = None
                        for meter in meters.values():
                            meter.measure(operator, index)
                        curvature.keep_step(operator)
                        del operator
                except _IMPOSSIBLE as error:
                    reason = self._why(error, optional)
            reason = self._first(reason)
        if reason is not None:
            return reason
        gather = (lambda own: [own]) if self.sharded else self._gather
        elapsed = time.perf_counter() - self.started
        return combine(self.measure, curvature.form, meters, gather, elapsed)

    def _gather(self, value: Any) -> list[Any]:
        return all_gather(value, self.group)

    def _why(self, error: Exception, optional: bool) -> str:
        if not optional:
            raise error
        return str(error).splitlines()[0]

    def _first(self, reason: str | None) -> str | None:
        """Returns what the first rank says for which the form is not possible."""
        return next((other for other in self._gather(reason) if other is not None), None)

    def _try(self, curvature: Curvature, *, timed: bool) -> tuple[_C.CurvatureOperator, Cost, int]:
        """Makes the first batch's operator and one product, and says what both took.

        Returns:
            The operator, the cost of its parts (zeros unless timed), the examples of the batch.
        """
        indices = indices_of(self.blocks)
        # The first block lies deepest, so that its product is the most expensive one.
        block = indices[0] if self.measure == "eigenvalue" else sum(indices, [])
        started = time.perf_counter()
        operator = curvature.operator(self.batches[0], 0)
        examples = operator.examples if isinstance(operator, _C.FisherOperator) else 1
        if not timed:
            return operator, Cost(0.0, 0.0), examples
        self._wait()
        ready = time.perf_counter()
        taken = curvature.gradients
        operator.product(block, [torch.ones_like(operator.parameters[i]) for i in block])
        self._wait()
        seconds = time.perf_counter() - ready
        seconds /= examples
        if curvature.form == "finite_difference":
            # The first product also finds the step.
            seconds *= 2 / (curvature.gradients - taken)
        return operator, Cost(ready - started, seconds), examples

    def _wait(self) -> None:
        for device in {p.device for block in self.blocks.values() for p in block}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _size(self, own: Cost, examples: int, fixed: bool, spent: float, bar: ProductBar) -> Size:
        """Decides together how much is measured; prints what eigenvalues will cost.

        Args:
            own: Cost on this rank.
            examples: Of its first batch.
            fixed: Whether there is a product for each example.
            spent: Seconds so far.
            bar: Prints.
        """
        ranks = self._gather((own, examples, spent))
        cost = Cost(max(c.graph for c, _, _ in ranks), max(c.product for c, _, _ in ranks))
        wanted: dict[Kind, int] = dict(self.max_products)
        if fixed:
            # As many as there are examples, of all batches for the trace and of each for the rest.
            most = max(n for _, n, _ in ranks)
            wanted = {k: most * (sum(self.counts) if k == "trace" else 1) for k in wanted}
        # The first graph is there already.
        gone = max(seconds for _, _, seconds in ranks) - cost.graph
        try:
            size = fit(
                self.counts,
                wanted,
                cost,
                len(self.blocks),
                None if self.max_seconds is None else self.max_seconds - gone,
                divisible=not fixed,
            )
        except BudgetTooSmallError as error:
            assert self.max_seconds is not None
            raise BudgetTooSmallError(error.least + gone, self.max_seconds) from error
        total = sum(min(count, size.batches) for count in self.counts)
        if "eigenvalue" in wanted:
            most = total * len(self.blocks) * size.products["eigenvalue"]
            bar.say(
                f"top eigenvalues of {len(self.blocks)} blocks, {total} batches: at most {most} "
                f"products of {cost.product:.2f} s, "
                f"{size.seconds(cost, len(self.blocks)):.0f} s together"
            )
        return size

    def _over(self) -> bool:
        """Says whether the time is up; ranks that share parameters hear the same."""
        assert self.max_seconds is not None
        own = time.perf_counter() - self.started > self.max_seconds
        return any(self._gather(own)) if self.sharded else own

    def _meters(
        self, size: Size, bar: ProductBar, over: Callable[[], bool] | None
    ) -> dict[Kind, Traces | Eigenvalues]:
        total = sum(min(count, size.batches) for count in self.counts)
        meters: dict[Kind, Traces | Eigenvalues] = {}
        for kind, products in size.products.items():
            tolerance = self.tolerance[kind]
            if kind == "trace":
                meters[kind] = Traces(self.blocks, tolerance, products, total, self.seed, bar, over)
            else:
                meters[kind] = Eigenvalues(self.blocks, tolerance, products, self.seed, bar)
        each = sum(meter.products_per_batch for meter in meters.values())
        bar.start(min(len(self.batches), size.batches) * each)
        return meters

    def report(self, found: Sensitivity, bar: ProductBar) -> None:
        """Says what a reader of the numbers should know; refuses those that say nothing.

        Raises:
            ValueError: if no block curves the loss.
        """
        flat = [
            name for name, value in zip(found.blocks, found.values, strict=True) if value == 0.0
        ]
        if len(flat) == len(found.blocks):
            raise ValueError(
                f"sensitivity: the loss must curve in some block, got 0 in all {len(flat)} "
                f"({', '.join(flat[:3])}): does loss_fn call the model that is measured, and not a "
                "copy of it?"
            )
        if flat:
            bar.say(
                f"sensitivity: the loss does not curve at all in {', '.join(flat)}: on these "
                "batches it may not depend on them"
            )
        if not found.converged:
            bar.say(
                f"sensitivity ({found.measure}): tolerance "
                f"{' and '.join(map(str, self.tolerance.values()))} not met in {found.products} "
                f"products; largest error {max(found.standard_error):.3g}, largest value "
                f"{max(map(abs, found.values)):.3g}: raise sensitivity.max_products (now "
                f"{' and '.join(map(str, self.max_products.values()))}) or "
                "sensitivity.tolerance, or give more batches"
            )


def _settings(
    measure: Measure, given: Number | None, default: dict[Kind, Number]
) -> dict[Kind, Number]:
    """Returns the setting of everything that is measured."""
    return {kind: default[kind] if given is None else given for kind in kinds_of(measure)}


#: What another form may do without: second derivatives, and their memory.
_IMPOSSIBLE = (NotImplementedError, torch.OutOfMemoryError)


def trainable_blocks(blocks: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """Drops frozen parameters and empty blocks, and refuses blocks that overlap.

    Raises:
        ValueError: naming two blocks that overlap, or if nothing is left.
    """
    seen: dict[Tensor, str] = {}
    result: dict[str, list[Tensor]] = {}
    for name, parameters in blocks.items():
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
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


def require_whole(blocks: Mapping[str, Sequence[Tensor]], where: str) -> None:
    """Refuses parameters that fully_shard has divided.

    Raises:
        TypeError: naming a block with one.
    """
    for name, parameters in blocks.items():
        if any(is_sharded(p) for p in parameters):
            raise TypeError(
                f"{where}: parameters must be whole tensors, got a DTensor in block {name!r}: "
                "measure before fully_shard"
            )


def _sharded(blocks: Mapping[str, Sequence[Tensor]], form: Form) -> bool:
    """Says whether parameters are sharded, and refuses a form or a mixture that cannot be."""
    kinds = {is_sharded(p): name for name, block in blocks.items() for p in block}
    if True not in kinds:
        return False
    if False in kinds:
        raise TypeError(
            "measure: parameters must be all sharded or all whole, got whole ones in block "
            f"{kinds[False]!r} and sharded ones in {kinds[True]!r}"
        )
    if form not in ("auto", "finite_difference"):
        raise TypeError(
            f"measure: form must be 'finite_difference' (or 'auto') for sharded parameters, got "
            f"{form!r} and a DTensor in block {kinds[True]!r}: before fully_shard, measure "
            "moq.sensitivity.quantized_blocks(model, config), and give the result to "
            "MoQOptimizer.apply_sensitivity"
        )
    return True


def _keys(batch: Any) -> tuple[str, ...] | None:
    """Returns the keys of a batch that has some."""
    return tuple(sorted(map(str, batch.keys()))) if hasattr(batch, "keys") else None


def count_batches(
    names: tuple[str, ...],
    own: Sequence[Any],
    group: ProcessGroup | None,
    *,
    sharded: bool = False,
) -> list[int]:
    """Makes sure that all ranks mean the same, and returns how many batches each has.

    Args:
        names: Of the blocks.
        own: Batches of this rank.
        group: Ranks that measure together, all of which must call.
        sharded: Whether they share parameters, and so the batches, which then count once.

    Raises:
        ValueError: naming what differs, or what is empty.
    """
    with raise_together(group):
        for index, batch in enumerate(own):
            tensors = [leaf for leaf in tree_leaves(_plain(batch)) if isinstance(leaf, Tensor)]
            if tensors and all(tensor.numel() == 0 for tensor in tensors):
                raise ValueError(
                    f"measure: every batch must hold data, got only empty tensors in batch {index}"
                )
    ranks = all_gather((names, [_keys(batch) for batch in own]), group)
    if any(other != names for other, _ in ranks):
        raise ValueError(f"measure: blocks must be the same on all ranks, got {list(names)} here")
    keys = [(rank, batch) for rank, (_, batches) in enumerate(ranks) for batch in batches]
    for rank, found in keys:
        if found != keys[0][1]:
            raise ValueError(
                f"measure: batches must have the same keys on all ranks, got "
                f"{_listed(keys[0][1])} on rank {keys[0][0]} and {_listed(found)} on rank {rank}"
            )
    counts = [len(batches) for _, batches in ranks]
    if sum(counts) == 0:
        raise ValueError("measure: batches must hold at least one batch, got none")
    if sharded and len(set(counts)) > 1:
        raise ValueError(
            "measure: every rank must have as many batches of a sharded model, which its ranks "
            f"evaluate together, got {counts}"
        )
    return counts[:1] if sharded else counts


def _plain(batch: Any) -> Any:
    """Shows the tensors of mappings that torch does not know, such as BatchEncoding."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _listed(keys: tuple[str, ...] | None) -> str:
    return "none" if keys is None else str(list(keys))
