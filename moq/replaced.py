"""Values and parameters that somebody else has put into a model while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moq.caller_warning import warn_caller
from moq.rules import MatchedParameter, plain_name
from moq.sharding import is_sharded, local_tensor


def require_finite(name: str, value: torch.Tensor, remedy: str = "") -> None:
    """Refuses weights that have no grid.

    Args:
        name: What is finite, as the message begins.
        value: This rank's part counts.
        remedy: Ends the message.

    Raises:
        ValueError: with the number of values that are not finite.
    """
    local = local_tensor(value.detach())
    if not bool(torch.isfinite(local).all()):
        raise ValueError(
            f"{name}: weights must be finite, got {int(local.isnan().sum())} NaN and "
            f"{int(local.isinf().sum())} infinite of {local.numel()}{remedy}"
        )


def require_finite_replacement(name: str, value: torch.Tensor, *, masters_kept: bool) -> None:
    """Refuses to train on from weights that somebody has put into the model.

    Args:
        name: Of the parameter, or of what belongs to it.
        value: What it holds now.
        masters_kept: The masters are elsewhere, and as they were.

    Raises:
        ValueError: naming the parameter.
    """
    remedy = "load finite weights into the model"
    if masters_kept:
        remedy = (
            f"the masters are as they were. {remedy}, or put the masters' simulated values back: "
            "optimizer.load_state_dict(optimizer.state_dict())"
        )
    require_finite(
        f"MoQOptimizer: {name}, replaced from outside, as model.load_state_dict does",
        value,
        f"; {remedy}",
    )


def warn_of_replacement(names: Sequence[str], *, masters_lost: bool) -> None:
    """Says that training goes on from other weights, and what may be lost by that."""
    lost = "the step of the schedule and the sensitivities are lost"
    if masters_lost:
        lost = f"they lie on the integer grid, and the full-precision masters, {lost}"
    warn_caller(
        f"MoQOptimizer: the weights of {some(names)} were replaced from outside, as "
        "model.load_state_dict does, or the step() of the optimizer inside, called in place of "
        "MoQOptimizer's: training goes on from the new values. If they come from a "
        f"checkpoint of a MoQ training {lost}: load the optimizer's state as well"
        + (
            ". If DistributedDataParallel broadcast them, wrap the model in it before making "
            "MoQOptimizer"
            if masters_lost
            else ""
        )
    )


def require_in_model(matched: Sequence[MatchedParameter], model: nn.Module) -> None:
    """Refuses parameters that the model does not compute with any more: others are in their place.

    Raises:
        RuntimeError: naming them and the remedy.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    present = {id(parameter) for _, parameter in named}
    by_name = {plain_name(name): parameter for name, parameter in named}

    def is_lost(m: MatchedParameter) -> bool:
        if id(m.parameter) in present:
            return False
        # Between forward and backward fully_shard shows whole parameters in place of the shards.
        now = by_name.get(m.name)
        return not is_sharded(m.parameter) or (now is not None and is_sharded(now))

    lost = [m.name for m in matched if is_lost(m)]
    if lost:
        raise RuntimeError(
            "MoQOptimizer: the model must hold the parameters that were trained, and "
            f"{some(lost)} is another Parameter now, or gone, as after a module was replaced, "
            "load_state_dict(assign=True) or fully_shard: copy values into the parameters "
            "(parameter.data.copy_(values), load_state_dict without assign), apply what replaces "
            "parameters before MoQOptimizer is made, or make a new one of the model as it is"
        )


def some(names: Sequence[str]) -> str:
    """Names one and counts the rest."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
