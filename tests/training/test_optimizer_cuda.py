"""The optimizer on a GPU: the same bits as on the CPU, no host synchronisation, CUDA graphs."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from on_gpu import capture, never_waiting, side_stream
from overflows import train_captured, train_float16
from tiny_decoder import (
    FALLING_STOCHASTIC,
    Recorder,
    assert_same,
    assert_simulated,
    batch,
    loss_of,
    masters,
    weights,
    wrap,
)
from torch import nn

from moq import MoQOptimizer
from moq.loggers import Logger

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def wrapped(
    model: nn.Module, total_steps: int, loggers: Sequence[Logger] | Logger = (), **options
) -> MoQOptimizer:
    """Around an AdamW with the options."""
    return MoQOptimizer(
        torch.optim.AdamW(model.parameters(), **options),
        model,
        FALLING_STOCHASTIC,
        total_steps=total_steps,
        verbose=False,
        loggers=loggers,
        log_every=1,
    )


def step_on_gpu(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    loss_of(model, batch(step).cuda()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_simulated_values_are_the_masters_on_the_grid_after_every_step(decoder, dtype):
    model = decoder(dtype).cuda()
    # The parameters that are not quantized stay in the dtype, and float16 rounds 1e-8 to zero.
    optimizer = wrap(model, FALLING_STOCHASTIC, total_steps=6, eps=1e-4)
    for step in range(6):
        assert_simulated(optimizer)
        step_on_gpu(model, optimizer, step)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert set(optimizer.num_bits.values()) == {4}


def test_a_model_moved_after_wrapping_takes_its_masters_along(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING_STOCHASTIC)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    on_cpu = weights(model)
    state = {name: m.detach().clone() for name, m in masters(optimizer).items()}
    model.cuda()
    optimizer.load_state_dict(optimizer.state_dict())
    assert {m.device.type for m in masters(optimizer).values()} == {"cuda"}
    assert_same({name: m.detach().cpu() for name, m in masters(optimizer).items()}, state)
    assert_same({name: w.cpu() for name, w in weights(model).items()}, on_cpu)
    step_on_gpu(model, optimizer, 1)
    assert optimizer.steps == 2
    assert_simulated(optimizer)


@pytest.mark.parametrize("scale", ["absmax", "learned"])
def test_a_model_that_simulates_in_its_forward_pass_moves_too(decoder, scale):
    config = FALLING_STOCHASTIC | {"rounding": "nearest", "simulate": "autograd", "scale": scale}
    model, expected = decoder(), decoder()
    optimizer, reference = wrap(model, config, eps=1e-4), wrap(expected, config, eps=1e-4)
    for step in range(2):
        for m, o in ((model, optimizer), (expected, reference)):
            loss_of(m, batch(step)).backward()
            o.step()
            o.zero_grad()
    model.cuda()
    for p, state in optimizer.inner.state.items():
        if optimizer._masters.get(p) is None:  # which nobody else moves
            state.update({k: v.cuda() for k, v in state.items() if v.dim()})
    for step in range(2, 6):
        step_on_gpu(model, optimizer, step)
        loss_of(expected, batch(step)).backward()
        reference.step()
        reference.zero_grad()
    assert optimizer.steps == reference.steps == 6
    assert optimizer.num_bits == reference.num_bits
    assert {m.device.type for m in masters(optimizer).values()} == {"cuda"}
    for name, value in weights(model).items():
        torch.testing.assert_close(value.cpu(), weights(expected)[name], atol=1e-2, rtol=0)


def test_a_state_that_accelerate_has_moved_before_the_model_is_the_optimizers_own(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING_STOCHASTIC)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry.update({key: value.cuda() for key, value in entry.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state)
    model.cuda()
    optimizer.load_state_dict(optimizer.state_dict())
    step_on_gpu(model, optimizer, 1)
    assert optimizer.steps == 2
    assert_simulated(optimizer)


def test_a_step_never_waits_for_the_device(decoder):
    model = decoder().cuda()
    optimizer = wrapped(model, 20, fused=True)
    step_on_gpu(model, optimizer, 0)
    loss_of(model, batch(1).cuda()).backward()
    with never_waiting():
        optimizer.step()
    assert optimizer.steps == 2


def test_logging_never_waits_for_the_device_and_tells_what_the_cpu_would(decoder):
    told, expected = Recorder(), Recorder()
    models = decoder().cuda(), decoder()
    optimizers = [
        MoQOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            FALLING_STOCHASTIC | {"rounding": "nearest"},
            total_steps=6,
            verbose=False,
            loggers=recorder,
            log_every=1,
        )
        for model, recorder in zip(models, (told, expected), strict=True)
    ]
    for step in range(6):
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step))
            p.grad = q.grad.cuda()
        torch.cuda._sleep(20_000_000)  # the host hears of the drops steps later
        with never_waiting() if step else nullcontext():
            optimizers[0].step()
        optimizers[1].step()
    optimizers[0].flush_logs()
    assert list(told.steps) == list(expected.steps) == list(range(1, 7))
    for step, scalars in expected.steps.items():
        assert told.steps[step].keys() == scalars.keys()
        for name, value in scalars.items():
            assert told.steps[step][name] == pytest.approx(value, rel=1e-3), (step, name)


def test_a_step_with_loggers_can_be_captured(decoder):
    model, recorder = decoder().cuda(), Recorder()
    optimizer = wrapped(model, 12, loggers=recorder, capturable=True)
    tokens = batch(0).cuda()

    def step() -> None:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    with side_stream():
        for _ in range(3):
            step()
    optimizer.flush_logs()
    replay = capture(step)
    replay()
    torch.cuda.synchronize()
    assert optimizer.steps == 4
    assert list(recorder.steps) == [1, 2, 3]  # a replay runs no Python


def test_an_overflow_that_only_the_device_knows_changes_nothing(decoder):
    model = decoder().cuda()
    optimizer = wrapped(model, 4, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
    for step, overflow in enumerate([False, True, False]):
        before = weights(model), {n: m.detach().clone() for n, m in masters(optimizer).items()}
        scaler.scale(loss_of(model, batch(step).cuda())).backward()
        if overflow:
            model.layers[0].q_proj.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflow:
            assert_same(weights(model), before[0])
            assert_same({n: m.detach() for n, m in masters(optimizer).items()}, before[1])
    assert optimizer.steps == 2
    assert_simulated(optimizer)


def test_a_captured_step_replays_across_bit_drops(decoder):
    def trained(captured: bool) -> tuple[dict, MoQOptimizer]:
        model = decoder().cuda()
        optimizer = wrapped(model, 12, lr=1e-2, capturable=True, foreach=True)
        tokens = batch(0).cuda()

        def step() -> None:
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        with side_stream():
            for _ in range(3):
                step()
        call = capture(step) if captured else step
        for _ in range(8):
            call()
        torch.cuda.synchronize()
        return weights(model), optimizer

    expected, eager = trained(captured=False)
    actual, replayed = trained(captured=True)
    assert replayed.steps == eager.steps == 11
    assert replayed.num_bits == eager.num_bits
    assert set(replayed.num_bits.values()) == {4}
    assert_same(actual, expected)
    assert_simulated(replayed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_captured_step_replays_across_bit_drops_and_overflows(decoder, dtype):
    def trained(captured: bool) -> tuple[dict, MoQOptimizer, float]:
        model = decoder(dtype).cuda()
        optimizer = wrapped(model, 12, lr=1e-2, fused=True, capturable=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=64.0, growth_interval=1000)
        values = train_captured(model, optimizer, scaler, (1, 5, 6), captured=captured)
        return values, optimizer, scaler.get_scale()

    expected, eager, scale = trained(captured=False)
    actual, replayed, replayed_scale = trained(captured=True)
    assert replayed.steps == eager.steps == 11
    assert scale == replayed_scale == 8.0
    assert set(replayed.num_bits.values()) == {4}
    assert_same(actual, expected)
    assert_simulated(replayed)


@pytest.mark.parametrize("fused", [False, True])
def test_a_float16_model_trains_with_gradscaler(decoder, fused):
    model = decoder(torch.float16).cuda()
    optimizer = wrapped(model, 8, lr=1e-2, eps=1e-4, fused=fused)
    train_float16(model, optimizer)
    assert optimizer.steps == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masters_and_a_cast_of_gradients_are_all_the_memory(decoder, dtype):
    """The rest is control data: a width, a row of drops and a ratio for each parameter."""
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))
    model = model.to("cuda", dtype)
    numel = 8 * 1024 * 1024
    free = torch.cuda.memory_allocated()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = MoQOptimizer(sgd, model, FALLING_STOCHASTIC, total_steps=12, verbose=False)
    assert 4 * numel <= torch.cuda.memory_allocated() - free < 4 * numel + 2**20
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    cast = 0 if dtype == torch.float32 else 4 * numel
    # The allocator rounds to 512 bytes; the inner optimizer works in lists of its own.
    assert torch.cuda.max_memory_allocated() - held <= cast + 2**20
    assert torch.cuda.memory_allocated() - held < 2**20
