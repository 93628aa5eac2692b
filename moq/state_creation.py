"""Optimizer state before the first step, which torch's tools ask for or make by a step of zeros."""

from __future__ import annotations

from typing import Any

import torch

from moq.sharding import whole_tensor


def is_state_creation(groups: list[dict[str, Any]]) -> bool:
    """Recognises the call of step() by which torch's tools create state.

    They set every learning rate to 0 and every gradient to zeros (torch.distributed.checkpoint does
    it before it reads or writes the state of an optimizer). Such a call is no step of the training.
    """
    for group in groups:
        rate = group.get("lr")
        if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
            return False  # the tools make CPU tensors, and asking a device would stall every step
        if rate is None or rate != 0:
            return False
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if not gradients or any(gradient.layout != torch.strided for gradient in gradients):
        return False
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
    return bool(whole_tensor(largest) == 0)


def make_blank_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer without state the entries it will have after its first step.

    Their values mean nothing. Parameters, gradients and hyperparameters come out unchanged.

    Args:
        optimizer: An optimizer that has made no step.
    """
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"] if p.requires_grad]
    values = [p.detach().clone() for p in parameters]
    gradients = [p.grad for p in parameters]
    options = [{key: value for key, value in group.items()} for group in groups]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in groups:
            if "lr" in group:
                rate = group["lr"]
                group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
        # The class's own step: a scheduler that counts calls of the instance's must not count this.
        type(optimizer).step(optimizer)
    finally:
        with torch.no_grad():
            for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
        for group, option in zip(groups, options, strict=True):
            group.update(option)
