"""An optimizer around another one: what torch's tools need to take it for the inner one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from moq.caller_warning import warn_caller

#: The smallest positive float16.
_SMALLEST_FLOAT16 = 2.0**-24

#: What an inner optimizer must have.
_INTERFACE = ("param_groups", "state", "step", "state_dict", "load_state_dict")


class OptimizerWrapper(torch.optim.Optimizer):
    """Shows the param groups, the very same dicts, and the defaults of `inner`.

    Args:
        inner: The optimizer that does the work.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        """Sets up hooks and profiling as torch does for an unpickled optimizer.

        torch's own __init__ would make param groups of its own.
        """
        self.inner = inner
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's param groups, with the model's parameters in them."""
        return self.inner.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Default hyperparameters of the inner optimizer."""
        defaults: dict[str, Any] = getattr(self.inner, "defaults", {})
        return defaults

    def parameters(self) -> Iterator[torch.Tensor]:
        """Yields the parameters of all param groups."""
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave unscaling and the skipping of an overflow to `step`.

        That is for fused inner optimizers, and for float16 parameters: GradScaler refuses those.
        """
        return self._inner_scales or any(p.dtype == torch.float16 for p in self.parameters())

    @property
    def _inner_scales(self) -> bool:
        """True for the fused optimizers of torch."""
        return bool(getattr(self.inner, "_step_supports_amp_scaling", False))

    def skips(self) -> bool:
        """Says whether GradScaler has found an overflow that the inner optimizer would not skip.

        Waits for the device, as GradScaler does.
        """
        found_inf = None if self._inner_scales else getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf != 0)

    @property
    def scale_to_undo(self) -> torch.Tensor | None:
        """GradScaler's scale in a step in which the inner optimizer does not divide by it."""
        scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        return None if self._inner_scales else scale

    def unscale(self) -> None:
        """Divides the gradients in the param groups by GradScaler's scale, if nobody else does."""
        scale = self.scale_to_undo
        if scale is None:
            return
        alike: defaultdict[tuple[torch.device, torch.dtype], list[torch.Tensor]]
        alike = defaultdict(list)
        for parameter in self.parameters():
            if parameter.grad is not None:
                alike[parameter.grad.device, parameter.grad.dtype].append(parameter.grad)
        for (device, _), gradients in alike.items():
            inverse = scale.to(device).double().reciprocal().float()
            torch._amp_foreach_non_finite_check_and_unscale_(
                gradients, torch.zeros_like(inverse), inverse
            )

    @contextmanager
    def grad_scaling(self) -> Iterator[torch.Tensor | None]:
        """Hands what GradScaler has set on this optimizer to the inner one.

        Yields:
            The tensor that is non-zero if the inner optimizer skips this step; None if it cannot.
        """
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not self._inner_scales:
            yield None
            return
        given = {"found_inf": found_inf, "grad_scale": getattr(self, "grad_scale", None)}
        self.inner.__dict__.update(given)
        try:
            yield found_inf
        finally:
            for name in given:
                del self.inner.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        """Refuses to be pickled or copied: masters belong to one model.

        Raises:
            TypeError: always.
        """
        name = type(self).__name__
        raise TypeError(f"{name} cannot be pickled or copied: use state_dict() or save()")


def require_wrappable(optimizer: torch.optim.Optimizer, model: nn.Module, total_steps: int) -> None:
    """Refuses what cannot be wrapped.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for an optimizer or a number of steps that cannot work, with the reason.
    """
    where = "MoQOptimizer"
    missing = [name for name in _INTERFACE if not hasattr(optimizer, name)]
    if missing:
        raise TypeError(
            f"{where}: optimizer must be a torch.optim.Optimizer, or have what one has, got "
            f"{type(optimizer).__name__} without {', '.join(missing)}: the order is "
            "MoQOptimizer(optimizer, model, config)"
        )
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError(
            f"{where}: optimizer must not be a MoQOptimizer already: give it further parameters by "
            "its add_param_group, or use it as it is"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(total_steps, bool) or not isinstance(total_steps, int):
        raise TypeError(f"{where}: total_steps must be an integer, got {total_steps!r}")
    if total_steps < 1:
        raise ValueError(f"{where}: total_steps must be at least 1, got {total_steps}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{where}: optimizer must take one gradient a step, got LBFGS: its line search "
            "evaluates the loss at weights that are on no grid, so the curvature it collects is "
            "not that of the simulated model; use AdamW, SGD or another first-order optimizer"
        )
    _require_common_parameter(optimizer, model)


def warn_of_lost_eps(
    groups: Iterable[Mapping[str, Any]], masters: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    """Warns of an eps that is 0 in float16, in which parameters without a master are updated.

    Small gradients square to 0 there, and 0 / (0 + eps) is a NaN or a huge step.

    Args:
        groups: Param groups, with the model's parameters in them.
        masters: Gives the master of a parameter, or None.
    """
    for group in groups:
        eps = group.get("eps")
        if not isinstance(eps, float) or not 0 <= eps < _SMALLEST_FLOAT16:
            continue
        lost = [
            p
            for p in group["params"]
            if p.requires_grad and p.dtype == torch.float16 and not _in_float32(masters(p))
        ]
        if lost:
            warn_caller(
                f"MoQOptimizer: eps must be at least {_SMALLEST_FLOAT16:.0e} for the {len(lost)} "
                f"float16 parameters that have no float32 master (those outside the rules have "
                f"none), got {eps:g}, which is 0 in float16: they become NaN or jump as soon as a "
                "gradient squares to 0. Use eps=1e-4, or a float32 or bfloat16 model (float32 with "
                "autocast trains in float16 too)"
            )
            return


def _in_float32(master: torch.Tensor | None) -> bool:
    return master is not None and master.dtype == torch.float32


def _require_common_parameter(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuses an optimizer that trains nothing of the model: each was made for another one.

    Raises:
        ValueError: with the remedy.
    """
    held = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    own = {id(parameter) for parameter in model.parameters()}
    if held and own.isdisjoint(map(id, held)):
        name = type(optimizer).__name__
        raise ValueError(
            f"MoQOptimizer: optimizer must hold parameters of model, got {len(held)} parameters of "
            f"which none is among the {len(own)} of the {type(model).__name__}: make it of the "
            f"model that is trained, {name}(model.parameters()), after whatever makes new "
            "parameters (a copy of the model, fully_shard, adapters)"
        )
