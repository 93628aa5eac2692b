"""One measurement of sensitivity: how much of it there is time for, on all ranks alike, and it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moq import _C
from moq.collective import all_gather, raise_together
from moq.curvature import Curvature
from moq.estimators import (
    Eigenvalues,
    Measure,
    Sensitivity,
    Traces,
    combine,
    indices_of,
    kinds_of,
)
from moq.float32 import HALF
from moq.probe_cost import BudgetTooSmallError, Cost, Deadline, Kind, Size, fit
from moq.progress import ProductBar
from moq.undisturbed import undisturbed

#: What another form may do without: second derivatives, their memory, and the range of float16.
_IMPOSSIBLE = (NotImplementedError, torch.OutOfMemoryError, _C.Error)


class Measurement:
    """One measurement, whatever its form; the arguments of moq.sensitivity.measure, and these.

    Args:
        counts: Batches of each rank; of sharded models one number, since they share them.
        sharded: Whether the parameters are.
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
        """Computes nothing yet."""
        self.model, self.blocks, self.batches, self.counts = model, blocks, batches, counts
        self.measure, self.tolerance, self.max_products = measure, tolerance, max_products
        self.max_seconds, self.seed, self.group, self.sharded = max_seconds, seed, group, sharded
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank(group) if ranks else 0
        self.started = started
        self.products: dict[Kind, int] = {}  # that were made, on all ranks

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
        with undisturbed(self.model, sum(self.blocks.values(), [])), curvature.frame():
            timed = self.max_seconds is not None or "eigenvalue" in kinds_of(self.measure)
            with raise_together(self.group):
                try:
                    if self.batches and (timed or curvature.form == "fisher"):
                        trial, own, examples = self._try(curvature, timed=timed)
                except _IMPOSSIBLE as error:
                    reason = self._why(error, curvature.form, optional)
            reason = self._first(reason)
            if reason is not None:
                return reason

            spent = time.perf_counter() - self.started
            size = self._size(own, examples, curvature.form, spent, bar)
            # Products may turn out slower than the one that was timed.
            deadline = None
            if self.max_seconds is not None:
                share = self._gather if self.sharded else lambda own: [own]
                deadline = Deadline(self.started + self.max_seconds, share)
            meters = self._meters(size, bar, deadline)
            most = size.batches
            before = self.counts[: 0 if self.sharded else self.rank]
            first = sum(min(count, most) for count in before)
            with raise_together(self.group):
                try:
                    for index, batch in enumerate(self.batches[:most], start=first):
                        if index > first and deadline is not None and deadline.passed():
                            break
                        operator = trial or curvature.operator(batch, index)
                        trial = None
                        for meter in meters.values():
                            meter.measure(operator, index)
                        curvature.keep_step(operator)
                        del operator
                except _IMPOSSIBLE as error:
                    reason = self._why(error, curvature.form, optional)
            reason = self._first(reason)
        if reason is not None:
            return reason
        gather: Callable[[Any], list[Any]] = (lambda own: [own]) if self.sharded else self._gather
        elapsed = time.perf_counter() - self.started
        gradients = curvature.gradients if curvature.form == "finite_difference" else 0
        found = {kind: meter.combine(gather) for kind, meter in meters.items()}
        self.products = {kind: part.products for kind, part in found.items()}
        return combine(
            self.measure, curvature.form, self.blocks, found, elapsed, sum(gather(gradients))
        )

    def _gather(self, value: Any) -> list[Any]:
        return all_gather(value, self.group)

    def _why(self, error: Exception, form: str, optional: bool) -> str:
        """Says why a form is not possible, or raises the error if no other one could help."""
        if isinstance(error, _C.Error):
            half = any(p.dtype in HALF for block in self.blocks.values() for p in block)
            if not half or form == "finite_difference" or "finite" not in str(error):
                raise error
            if not optional:
                raise _C.Error(f"{error} Form 'finite_difference' computes in float32") from error
        elif not optional:
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
            # The first product also finds the step; in half precision others look at two, too.
            seconds *= (4 if curvature.half else 2) / (curvature.gradients - taken)
        return operator, Cost(ready - started, seconds), examples

    def _wait(self) -> None:
        for device in {p.device for block in self.blocks.values() for p in block}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _size(self, own: Cost, examples: int, form: str, spent: float, bar: ProductBar) -> Size:
        """Decides together how much is measured; prints what eigenvalues will cost.

        Args:
            own: Cost on this rank.
            examples: Of its first batch.
            form: Of the matrix.
            spent: Seconds so far.
            bar: Prints.
        """
        ranks = self._gather((own, examples, spent))
        cost = Cost(max(c.graph for c, _, _ in ranks), max(c.product for c, _, _ in ranks))
        wanted: dict[Kind, int] = dict(self.max_products)
        fixed = form == "fisher"  # a product for each example
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
            raise BudgetTooSmallError(error.least + gone, self.max_seconds) from None
        total = sum(min(count, size.batches) for count in self.counts)
        if "eigenvalue" in wanted:
            most = total * len(self.blocks) * size.products["eigenvalue"]
            bar.say(
                f"top eigenvalues of {len(self.blocks)} blocks, {total} batches: at most {most} "
                f"products of {cost.product:.2f} s, "
                f"{size.seconds(cost, len(self.blocks)):.0f} s together"
                + (", and the search of steps" if form == "finite_difference" else "")
            )
        return size

    def _meters(
        self, size: Size, bar: ProductBar, deadline: Deadline | None
    ) -> dict[Kind, Traces | Eigenvalues]:
        total = sum(min(count, size.batches) for count in self.counts)
        meters: dict[Kind, Traces | Eigenvalues] = {}
        for kind, products in size.products.items():
            tolerance = self.tolerance[kind]
            if kind == "trace":
                # Of both measures each has the time that it was thought to take.
                parts = 1 + len(self.blocks) * size.products.get("eigenvalue", 0) / products
                meters[kind] = Traces(
                    self.blocks, tolerance, products, total, self.seed, bar, deadline, parts
                )
            else:
                meters[kind] = Eigenvalues(
                    self.blocks, tolerance, products, self.seed, bar, deadline
                )
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
            limited = self.max_seconds is not None
            bounded = "; the time that max_cost leaves bounds all" if limited else ""
            for line in _missed(found, self.products, self.tolerance, self.max_products):
                bar.say(line + bounded)


def _missed(
    found: Sensitivity,
    products: Mapping[Kind, int],
    tolerance: Mapping[Kind, float],
    max_products: Mapping[Kind, int],
) -> list[str]:
    """Says of each measure that missed its tolerance by how much, and what helps."""
    lines = []
    if "trace" in tolerance:
        error, largest = max(found.standard_error), max(map(abs, found.values))
        allowed = tolerance["trace"] * largest
        if error > allowed:
            pairs = zip(found.values, found.standard_error, strict=True)
            chance = sum(0.0 < own >= abs(value) for value, own in pairs)
            made = products["trace"]
            enough = float(f"{made * (error / allowed) ** 2:.1e}")  # it falls as the root
            order = (
                f"; {chance} of {len(found.values)} values are no larger than their errors, and "
                "their order is chance"
            )
            lines.append(
                f"sensitivity (trace): after {made} products errors are up to "
                f"{error:.3g}, and the tolerance is {allowed:.3g} ({tolerance['trace']:g} of the "
                f"largest value){order if chance else ''}. That is usual before the first steps of "
                "a model that begins at random weights: measure after some steps. Otherwise about "
                f"{enough:,.0f} products would do: raise sensitivity.max_products (now "
                f"{max_products['trace']}) or sensitivity.tolerance"
            )
    if "eigenvalue" in tolerance:
        ends = zip(found.residuals, map(abs, found.eigenvalues), strict=True)
        error, value = max(ends, key=lambda end: end[0] / end[1] if end[1] else 0.0)
        if not lines or error > tolerance["eigenvalue"] * value:
            lines.append(
                f"sensitivity (eigenvalue): after {products['eigenvalue']} products not all values "
                f"are within {tolerance['eigenvalue']:g} of themselves; the worst is {value:.3g} "
                f"with an error of {error:.3g}: raise sensitivity.max_products (now "
                f"{max_products['eigenvalue']} a block and batch) or sensitivity.tolerance"
            )
    return lines
