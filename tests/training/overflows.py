"""Trainings with a GradScaler in which the gradients of some steps overflow."""

from collections.abc import Callable, Collection

import torch
from on_gpu import capture, side_stream
from tiny_decoder import assert_same, assert_simulated, batch, copies, loss_of, weights
from torch import nn

from moq import MoQOptimizer


def train_float16(model: nn.Module, optimizer: MoQOptimizer) -> None:
    """Ten steps, of which two overflow and change nothing."""
    device = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(device, init_scale=256.0, growth_interval=100)
    for step in range(10):
        before, full = weights(model), copies(optimizer)
        steps, bits = optimizer.steps, optimizer.num_bits
        scaler.scale(loss_of(model, batch(step))).backward()
        overflow = step in (2, 6)
        if overflow:
            model.layers[1].up_proj.weight.grad[0, 1] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.steps == steps + (not overflow)
        assert_simulated(optimizer)
        if overflow:
            assert optimizer.num_bits == bits
            assert_same(weights(model), before)
            assert_same(copies(optimizer), full)
    assert scaler.get_scale() == 64.0
    assert all(p.isfinite().all() for p in model.parameters())


def scaled_step(
    model: nn.Module,
    optimizer: MoQOptimizer,
    scaler: torch.amp.GradScaler,
    tokens: torch.Tensor,
    factor: torch.Tensor,
) -> Callable[[], None]:
    """A step that a CUDA graph can hold: whether the loss, times `factor`, overflows is data."""

    def step() -> None:
        scaler.scale(factor * loss_of(model, tokens)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)

    return step


def train_captured(
    model: nn.Module,
    optimizer: MoQOptimizer,
    scaler: torch.amp.GradScaler,
    overflows: Collection[int],
    *,
    captured: bool,
    before_step: Callable[[int], object] = lambda number: None,
) -> dict[str, torch.Tensor]:
    """Three steps, then eleven, replays of one graph if `captured`; returns the weights.

    Of the eleven those in `overflows` change nothing. Forward, backward, scaler and step are in the
    graph: only the device knows what overflows.
    """
    device = next(model.parameters()).device
    tokens, factor = batch(0).to(device), torch.ones((), device=device)

    step = scaled_step(model, optimizer, scaler, tokens, factor)
    with side_stream():
        for _ in range(3):
            step()
    call = capture(step) if captured else step
    for number in range(11):
        factor.fill_(float("inf") if number in overflows else 1.0)
        before_step(number)
        before, full = weights(model), copies(optimizer)
        call()
        if number in overflows:
            assert_same(weights(model), before)
            assert_same(copies(optimizer), full)
    torch.cuda.synchronize()
    return weights(model)
