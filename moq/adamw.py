"""AdamW that takes 16-bit gradients beside float32 parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from moq.sharding import is_sharded, local_tensor

#: What other forms of AdamW do that this one does not, with the values that leave it out.
_REFUSED = {"amsgrad": (False,), "differentiable": (False,), "foreach": (None, False)}


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, updating by one kernel of moq's that reads gradients as they are.

    A float32 parameter may have a gradient in float16 or bfloat16. Inside a MoQOptimizer the
    float32 masters of a half-precision model so need no float32 copy of their gradients, which
    torch's optimizers do (8 bytes a weight to write and read in every step). Whatever the
    dtypes, arithmetic is in float32, rounded once to the parameter's dtype, in which the moments
    are kept too. Parameters are float32, float16 or bfloat16, on a CPU or a CUDA device; of a
    DTensor the rank's own shard is updated.

    The state is that of torch.optim.AdamW: state dicts load in either direction. With GradScaler
    the kernel divides by the scale, and an overflow changes nothing; the gradients themselves are
    left as they were.

    Args:
        params: As torch.optim.AdamW's, and so are all that follow.
        lr: A tensor is read on its device: captured CUDA graphs follow it.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled from the gradient.
        amsgrad: Must be False.
        maximize: Ascend.
        foreach: Must not be True.
        capturable: Changes nothing: steps are counted on the device, as a CUDA graph needs it.
        differentiable: Must be False.
        fused: Must not be False.

    Raises:
        ValueError: for an argument out of its range, or one that asks for what this optimizer
            does not do.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> weight.grad_dtype = torch.bfloat16
        >>> weight.grad = torch.ones(4, dtype=torch.bfloat16)
        >>> AdamW([weight], lr=0.5, weight_decay=0.0).step()
        >>> weight.detach()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    #: What MoQOptimizer asks its inner optimizer: True promises that `step` takes float16 and
    #: bfloat16 gradients of float32 parameters.
    takes_low_precision_gradients = True

    #: What GradScaler asks: `step` unscales, and skips an overflow.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        """Keeps the hyperparameters; state is made at the first step."""
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=True if fused is None else fused,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group.

        Raises:
            ValueError: as the constructor.
        """
        options = {**self.defaults, **param_group}
        _require_possible(options)
        if options["fused"] is False:
            raise ValueError("AdamW: fused must not be False: it is; use torch.optim.AdamW")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step with the parameters that have a gradient.

        Args:
            closure: Evaluates the loss once, before the step.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: for a sparse gradient, or a parameter with gaps in its memory.
            TypeError: for a dtype that is not among those above.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_device: defaultdict[torch.device, list[tuple[torch.Tensor, ...]]]
            by_device = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_device[parameter.device].append(self._tensors_of(parameter))
            for device, tensors in by_device.items():
                self._update(device, tensors, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of an AdamW, this one or torch's.

        Raises:
            ValueError: as the constructor, for a param group; then nothing has changed.
        """
        for group in state_dict["param_groups"]:
            _require_possible(group | {"foreach": None})
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Stays fused whatever the optimizer was that the state is of."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            group.update(fused=True, foreach=None)

    def _tensors_of(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns parameter, gradient, both moments and the step, as this rank's memory."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise ValueError(
                f"AdamW: gradients must be dense, got {gradient.layout} for a parameter of shape "
                f"{list(parameter.shape)}: use sparse=False in its module, or SparseAdam"
            )
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        # A model may have moved, and an optimizer that is not fused counts on the CPU.
        step = state["step"]
        if step.device != parameter.device or step.dtype != torch.float32:
            step = state["step"] = step.to(parameter.device, torch.float32)
        if is_sharded(parameter):
            if is_sharded(gradient) and gradient.placements != parameter.placements:
                gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
            torch.autograd.graph.increment_version(parameter)  # the shard counts its own
        values = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        return *map(local_tensor, values), step

    def _update(
        self,
        device: torch.device,
        tensors: list[tuple[torch.Tensor, ...]],
        group: Mapping[str, Any],
    ) -> None:
        """Updates the parameters of a group that are on one device."""
        rate = group["lr"]
        on_device = isinstance(rate, torch.Tensor) and rate.device.type != "cpu"
        scaling = {
            name: None if value is None else value.to(device, torch.float32, non_blocking=True)
            for name in ("grad_scale", "found_inf")
            for value in [getattr(self, name, None)]
        }
        torch.ops.moq.foreach_adamw(
            *map(list, zip(*tensors, strict=True)),
            lr=0.0 if on_device else float(rate),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            maximize=group["maximize"],
            lr_tensor=rate.to(device, torch.float32) if on_device else None,
            **scaling,
        )


def _require_possible(options: Mapping[str, Any]) -> None:
    """Refuses what this optimizer does not do.

    Raises:
        ValueError: naming the option.
    """
    for name, possible in _REFUSED.items():
        value = options.get(name, possible[0])
        if value not in possible:
            raise ValueError(
                f"AdamW: {name} must be {possible[0]}, got {value}: torch.optim.AdamW does that"
            )
