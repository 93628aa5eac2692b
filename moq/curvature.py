"""The matrices that stand for the curvature of a loss, as products, one for each batch of data."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.attention import SDPBackend, sdpa_kernel

from moq import _C
from moq.collective import all_gather, raise_together
from moq.float32 import HALF, computes_in_half, full_float32, widened
from moq.graph import reached_by, recomputed_dtypes
from moq.sharding import is_sharded, local_tensor
from moq.undisturbed import without_gradients

Form = Literal["auto", "exact", "finite_difference", "gauss_newton", "fisher"]
FORMS: tuple[Form, ...] = get_args(Form)


class Curvature:
    """Makes an operator for each batch, in one form.

    Args:
        form: Any but ``auto``.
        model: What `loss_fn` calls.
        parameters: Leaves, all of them whole or all sharded.
        loss_fn: Maps a batch to what the form needs, see moq.sensitivity.measure.
        group: Ranks that share sharded parameters.
    """

    def __init__(
        self,
        form: Form,
        model: nn.Module,
        parameters: Sequence[Tensor],
        loss_fn: Callable[[Any], Any],
        group: ProcessGroup | None,
    ) -> None:
        """Computes nothing yet."""
        self.form = form
        self.model = model
        self.parameters = list(parameters)
        self.loss_fn = loss_fn
        self.group = group
        self.sharded = _shares_parameters(model)
        self.gradients = 0  # that finite differences took so far
        self._step = (1.0, 0.0)  # scale and rate of their steps, as the last batch found them
        self._stand_ins: Mapping[Tensor, Tensor] = {}
        self.half = False  # whether differences have seen the loss computed in half precision
        self._beside: tuple[int, list[Tensor]] = (-1, [])  # a batch, see `_look_at`

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        """In which `operator` may be called and its products may be made."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.form in ("exact", "gauss_newton"):
                # The one form of attention that is twice differentiable.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            elif self.form == "finite_difference":
                self.half = computes_in_half(self.model)
                self._stand_ins = stack.enter_context(full_float32(self.model))
            yield

    def operator(self, batch: Any, index: int) -> _C.CurvatureOperator:
        """Evaluates the loss of a batch, whose number is `index`, or promises to.

        Raises:
            TypeError: if loss_fn returns something else than the form needs.
            ValueError: if the loss is not finite, or as the operator of the form.
            NotImplementedError: naming an operation that cannot be differentiated twice.
        """
        if self.form == "finite_difference":
            return self._finite_difference(widened(batch), index)
        found = self.loss_fn(batch)
        if self.form == "gauss_newton":
            loss, outputs = _loss_and_outputs(found)
            return _C.GaussNewtonOperator(_finite(loss, index), outputs, self.parameters)
        losses = _finite(_tensor(found), index)
        if self.form == "fisher":
            return _C.FisherOperator(losses, self.parameters)
        return _C.HvpOperator(losses, self.parameters)

    def _finite_difference(self, batch: Any, index: int) -> _C.CurvatureOperator:
        leaves = self._leaves()

        def gradient(block: list[int]) -> list[Tensor]:
            gradients = self._gradient(batch, index, [leaves[i] for i in block])
            if self.half and (made := known()) is not None:
                made.check_all()
            return gradients

        operator = _C.FiniteDifferenceOperator(
            gradient,
            [local_tensor(leaf.detach()).requires_grad_() for leaf in leaves],
            check_all=self.half,
            scale=self._step[0],
            rate=self._step[1],
            sharding=_sharding(self.parameters, self.group),
        )
        known = weakref.ref(operator)  # which holds `gradient`
        return operator

    def _leaves(self) -> list[Tensor]:
        """The parameters, or what stands in their place."""
        return [self._stand_ins.get(p, p) for p in self.parameters]

    def keep_step(self, operator: _C.CurvatureOperator) -> None:
        """Takes over the step that a batch has found."""
        if isinstance(operator, _C.FiniteDifferenceOperator) and not self.half:
            self._step = (operator.scale, operator.rate)

    def backward(self, batch: Any, index: int, form: str) -> None:
        """Adds the gradients of a batch's loss to the parameters; of a sharded model on all ranks.

        What else the loss depends on has the gradients afterwards that it had before.

        Args:
            batch: What `loss_fn` takes.
            index: Its number.
            form: What `loss_fn` is made for, whatever the operators are.

        Raises:
            TypeError, ValueError: as `operator`.
            RuntimeError: if the loss of a sharded model failed on another rank.
        """
        with torch.enable_grad():
            # A rank that fails before its backward pass would leave the others waiting in theirs.
            with raise_together(self.group) if self.sharded else contextlib.nullcontext():
                loss = _scalar_loss(self.loss_fn(batch), index, form)
            first = index != self._beside[0]
            with without_gradients(self._look_at(loss, index)), recomputed_dtypes() as dtypes:
                loss.backward()  # type: ignore[no-untyped-call]
            if first:
                self._notice(dtypes)

    def _look_at(self, loss: Tensor, index: int) -> list[Tensor]:
        """Returns what else gets a gradient of the loss of a batch, such as a head of its own.

        Finds out too whether `loss_fn` computes in half precision. Once for each batch.
        """
        if self._beside[0] != index:
            leaves, dtypes = reached_by(loss)
            known = {*self.model.parameters(), *self.parameters, *self._stand_ins}
            self._beside = (index, [leaf for leaf in leaves if leaf not in known])
            self._notice(dtypes)
        return self._beside[1]

    def _notice(self, dtypes: set[torch.dtype]) -> None:
        """Takes note of what a loss was computed in."""
        half = not dtypes.isdisjoint(HALF)
        # Ranks that share parameters compare step sizes together.
        self.half |= any(all_gather(half, self.group)) if self.sharded else half

    def _gradient(self, batch: Any, index: int, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Returns the gradients of the loss at the present values, and leaves none behind."""
        self.gradients += 1
        torch.clear_autocast_cache()  # of weights before they were perturbed
        self.backward(batch, index, self.form)
        gradients = [
            torch.zeros_like(local_tensor(leaf.detach()))
            if leaf.grad is None
            else local_tensor(leaf.grad)
            for leaf in leaves
        ]
        for parameter in (*self.model.parameters(), *self._leaves()):
            parameter.grad = None
        if missed := [p for p in self._stand_ins if p.requires_grad and p.grad is not None]:
            for tensor in missed:
                tensor.grad = None
            raise ValueError(
                "finite_difference: loss_fn must reach half-precision parameters through their "
                f"modules, got one of shape {list(missed[0].shape)} by a reference of its own: use "
                "form 'exact', or a float32 model"
            )
        return gradients


def _shares_parameters(model: nn.Module) -> bool:
    """Says whether ranks can only evaluate the model together.

    A forward pass may have left the parameters of fully_shard whole, so its modules count too.
    """
    return any(hasattr(module, "_get_fsdp_state") for module in model.modules()) or any(
        is_sharded(p) for p in model.parameters()
    )


def _scalar_loss(found: Any, index: int, form: str) -> Tensor:
    """Returns the loss to be differentiated once, of what loss_fn returns for a form."""
    loss = _loss_and_outputs(found)[0] if form == "gauss_newton" else _tensor(found)
    loss = _finite(loss.mean() if form == "fisher" else loss, index)
    _C.require_loss(loss)
    return loss


def _tensor(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"sensitivity: loss_fn must return a tensor, got {type(loss).__name__}: return the "
            "loss that backward() is called on, not its value"
        )
    return loss


def _finite(loss: Tensor, index: int) -> Tensor:
    if not bool(loss.detach().isfinite().all()):
        values = loss.detach().flatten()
        wrong = values[~values.isfinite()][0].item()
        raise ValueError(
            f"sensitivity: the loss of every batch must be finite, got {wrong} for batch {index}: "
            "look for labels that are all ignored, an empty batch, or activations that overflow"
        )
    return loss


def _loss_and_outputs(found: Any) -> tuple[Tensor, Tensor]:
    """Reads (loss, outputs), or an output of transformers with loss and logits."""
    pair = (
        (found.loss, found.logits) if hasattr(found, "loss") and hasattr(found, "logits") else found
    )
    if not (
        isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)
    ):
        raise TypeError(
            "gauss_newton: loss_fn must return (loss, outputs), the loss and the tensor of the "
            "model's outputs that it is computed from, or an object with loss and logits, got "
            f"{type(found).__name__}"
        )
    return pair


def _sharding(parameters: Sequence[Tensor], group: ProcessGroup | None) -> _C.Sharding | None:
    """Describes parameters that fully_shard has divided; None if they are whole."""
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded:
        return None
    pieces, counts = [], []
    for p in sharded:
        _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        pieces.append((list(p.shape), list(offset)))
        # Of the ranks that hold the same piece, one counts.
        coordinate: list[int] = list(p.device_mesh.get_coordinate() or [])
        replicated = [
            c
            for c, placement in zip(coordinate, p.placements, strict=True)
            if isinstance(placement, Replicate)
        ]
        counts.append(not any(replicated))

    def add_up(block: list[int], values: list[float]) -> list[float]:
        own = [v if counts[i] else 0.0 for i, v in zip(block, values, strict=True)]
        # In the order of the ranks, so that all of them get the same bits.
        return [sum(column) for column in zip(*all_gather(own, group), strict=True)]

    def join(index: int, piece: Tensor) -> Tensor:
        p = sharded[index]
        joined = DTensor.from_local(
            piece, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        return joined.full_tensor()

    return _C.Sharding(pieces, add_up, join)
