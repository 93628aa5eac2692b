"""AdamW that takes 16-bit gradients beside float32 parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from moq.sharding import is_sharded, local_tensor

#: What other forms of AdamW do that this one does not, with the values that leave it out.
_REFUSED = {
    "amsgrad": (False,),
    "differentiable": (False,),
    "foreach": (None, False),
    "decoupled_weight_decay": (True,),
}

#: Dtypes of gradients by that of their parameter.
_DTYPES = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16,),
    torch.bfloat16: (torch.bfloat16,),
}
_OPTIONS = ("lr", "betas", "eps", "weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq")

#: A parameter, its gradient, and its state if it has some.
_Updated = tuple[torch.Tensor, torch.Tensor, dict[str, Any] | None]


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
            ValueError: as the constructor, or for a parameter that is given twice.
        """
        options = {**self.defaults, **param_group}
        _require_possible(options)
        if options["fused"] is False:
            raise ValueError("AdamW: fused must not be False: it is; use torch.optim.AdamW")
        super().add_param_group(param_group)
        added = self.param_groups[-1]["params"]
        if len(set(added)) < len(added):
            self.param_groups.pop()
            raise ValueError(
                f"AdamW: a param group must have each parameter once, got {len(added)} of which "
                f"{len(set(added))} are different: leave the others out (list(dict.fromkeys(…)))"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step with the parameters that have a gradient.

        Args:
            closure: Evaluates the loss once, before the step.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: for a sparse gradient, a parameter with gaps in its memory or on another
                device, or options out of their range; before anything has changed, as what follows.
            TypeError: for a dtype that is not among those above, or moments of another one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls: list[tuple[torch.device, list[_Updated], dict[str, Any]]] = []
        for group in self.param_groups:
            _require_possible(group)
            by_device: defaultdict[torch.device, list[_Updated]] = defaultdict(list)
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    state = self.state.get(parameter)
                    _require_updatable(parameter, gradient, state)
                    by_device[parameter.device].append((parameter, gradient, state))
            for device, updated in by_device.items():
                _require_kernel(device)
                calls.append((device, updated, group))
        for device, updated, group in calls:
            self._update(device, [self._tensors_of(device, *one) for one in updated], group)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of an AdamW, this one or torch's, and stays fused whatever it is of.

        load_state_dict ends here, after its hooks.

        Raises:
            ValueError: as the constructor, for a param group, or for the state of an optimizer of
                another kind; then nothing has changed.
        """
        _require_state_of_adamw(state)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        counted: set[int] = set()
        for group in self.param_groups:
            group.update(fused=True, foreach=None)
            for parameter in group["params"]:
                entry = self.state.get(parameter)
                if entry and id(entry["step"]) in counted:
                    entry["step"] = entry["step"].clone()  # some tools save one for all parameters
                if entry:
                    counted.add(id(entry["step"]))

    def _tensors_of(
        self,
        device: torch.device,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any] | None,
    ) -> tuple[torch.Tensor, ...]:
        """Returns parameter, gradient, both moments and the step, as this rank's memory."""
        if not state:
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        step = state["step"]
        # A model may have moved, and an optimizer that is not fused counts on the CPU.
        if not torch.is_tensor(step) or step.device != device or step.dtype != torch.float32:
            step = state["step"] = torch.as_tensor(step, dtype=torch.float32, device=device)
        # Its memory format may have changed too, or be another one than that of loaded moments.
        if state["exp_avg"].stride() != parameter.stride():
            for name in _MOMENTS:
                state[name] = torch.empty_like(parameter).copy_(state[name])
        values = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        if not is_sharded(parameter):
            return *values, step
        if is_sharded(gradient) and gradient.placements != parameter.placements:
            gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
            values = (parameter, gradient, *values[2:])
        torch.autograd.graph.increment_version(parameter)  # the shard counts its own
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
        blocking = device.type == "cpu"  # whose kernel reads them at once
        scaling = {
            name: None if value is None else value.to(device, torch.float32, not blocking)
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
    if not all(0.0 <= beta < 1.0 for beta in options["betas"]):
        raise ValueError(f"AdamW: betas must lie in [0, 1), got {options['betas']}")


def _require_kernel(device: torch.device) -> None:
    """Refuses a device that has no kernel.

    Raises:
        ValueError: naming it.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"AdamW: parameters must be on a CPU or a CUDA device, got {device}: move them there "
            "or use torch.optim.AdamW"
        )


def _require_updatable(
    parameter: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any] | None
) -> None:
    """Refuses a parameter that the kernel cannot update; in every step, so it looks at little.

    Raises:
        ValueError, TypeError: as AdamW.step.
    """
    dtype = parameter.dtype
    if gradient.layout != torch.strided:
        raise ValueError(
            f"AdamW: gradients must be dense, got {gradient.layout} for a parameter of shape "
            f"{list(parameter.shape)}: use sparse=False in its module, or SparseAdam"
        )
    if dtype not in _DTYPES:
        raise TypeError(
            f"AdamW: parameters must be float32, float16 or bfloat16, got {dtype} for one of shape "
            f"{list(parameter.shape)}: use torch.optim.AdamW"
        )
    if gradient.dtype not in _DTYPES[dtype]:
        raise TypeError(
            f"AdamW: gradients must be {' or '.join(map(str, _DTYPES[dtype]))}, got "
            f"{gradient.dtype} for a {dtype} parameter of shape {list(parameter.shape)}: cast them"
        )
    if not state:
        _require_no_gaps(local_tensor(parameter))
        return
    moment = state["exp_avg"]
    if moment.dtype != dtype or moment.device != parameter.device:
        raise TypeError(
            f"AdamW: moments must be {dtype} on {parameter.device} as their parameter is now, got "
            f"{moment.dtype} on {moment.device} for one of shape {list(parameter.shape)}: "
            "load_state_dict(state_dict()) makes them so"
        )


def _require_no_gaps(values: torch.Tensor) -> None:
    """Refuses memory that is not one piece, each element once.

    Raises:
        ValueError: naming the strides.
    """
    if values.is_contiguous() or not values.numel():
        return
    if torch.empty_like(values, device="meta").stride() != values.stride():
        raise ValueError(
            f"AdamW: parameters must fill their memory without gaps or overlaps, got strides "
            f"{values.stride()} of shape {list(values.shape)}: make it nn.Parameter("
            "weight.detach().contiguous())"
        )


def _require_state_of_adamw(state: Mapping[str, Any]) -> None:
    """Refuses state that `step` could not go on from.

    Raises:
        ValueError: naming what is missing or not possible.
    """
    where, remedy = "AdamW.load_state_dict", "load what an AdamW or Adam has saved"
    for group in state.get("param_groups", ()):
        missing = [name for name in _OPTIONS if name not in group]
        if missing:
            raise ValueError(
                f"{where}: param groups must have {', '.join(_OPTIONS)}, got one without "
                f"{', '.join(missing)}: {remedy}"
            )
        # The form of the optimizer that saved it is not this one's.
        _require_possible({**group, "foreach": None, "decoupled_weight_decay": True})
    for parameter, entry in state.get("state", {}).items():
        missing = [name for name in ("step", *_MOMENTS) if entry and name not in entry]
        if missing:
            raise ValueError(
                f"{where}: state must have step, exp_avg and exp_avg_sq, got one of "
                f"{', '.join(entry)}: {remedy}"
            )
        for name in _MOMENTS if entry and isinstance(parameter, torch.Tensor) else ():
            if entry[name].shape != parameter.shape:
                raise ValueError(
                    f"{where}: {name} must have its parameter's shape {list(parameter.shape)}, "
                    f"got {list(entry[name].shape)}: {remedy} of the same model"
                )
