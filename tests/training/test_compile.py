"""torch.compile and activation checkpointing while bits fall: nothing is compiled anew."""

import functools

import pytest
import torch
from tiny_decoder import assert_same, batch, loss_of, weights, wrap
from torch.utils.checkpoint import checkpoint

from moq import AdamW, MoQOptimizer

DROPS = 4
FALLING = {
    "start_bits": 8,
    "target_bits": 8 - DROPS,
    "rounding": "stochastic",
    "schedule": {"finish_at": 0.8},
}
STEPS = 10
FORMS = {
    "in place": {},
    "in place, blended": {"blend_steps": 2},
    "autograd": {"simulate": "autograd"},
    "autograd, learned": {"simulate": "autograd", "scale": "learned", "rounding": "nearest"},
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def config(request):
    return FALLING | request.param


@pytest.fixture
def compiled_anew():
    """Starts without compiled code, and turns any recompilation into an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def train(
    model: torch.nn.Module, optimizer: MoQOptimizer, called: torch.nn.Module
) -> tuple[list[float], set[int]]:
    """Trains over the whole schedule; returns losses and the widths that there were."""
    device = next(model.parameters()).device
    losses, widths = [], set()
    for step in range(STEPS):
        widths |= set(optimizer.num_bits.values())
        loss = loss_of(called, batch(step).to(device))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, widths | set(optimizer.num_bits.values())


# -------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_run_with_four_drops_compiles_once(decoder, compiled_anew, config, backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    plain, model = decoder(), decoder()
    expected, widths = train(plain, wrap(plain, config, STEPS), plain)
    optimizer = wrap(model, config, STEPS)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    losses, compiled_widths = train(model, optimizer, compiled)
    assert widths == compiled_widths == {8, 7, 6, 5, 4}
    assert counter.frame_count == 1
    assert losses == expected
    assert_same(weights(model), weights(plain))


@pytest.mark.parametrize("form", ["in place", "autograd"])
def test_inductor_reads_the_weights_of_each_step(decoder, device, compiled_anew, form):
    """Its code keeps no weight, packed or folded, of the step at which it was compiled."""
    if device == "cpu" and form == "autograd":
        pytest.skip("inductor takes half a minute on a CPU; the other form is tested there")
    config = FALLING | {"rounding": "nearest"} | FORMS[form]
    model = decoder(layers=1).to(device)
    optimizer = wrap(model, config, STEPS, lr=3e-2)
    compiled = torch.compile(model, fullgraph=True)
    for step in range(STEPS):
        tokens = batch(step).to(device)
        loss = loss_of(compiled, tokens)
        torch.testing.assert_close(loss, loss_of(model, tokens), rtol=1e-4, atol=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(optimizer.num_bits.values()) == {4}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
def test_graphs_of_reduce_overhead_replay_across_drops(decoder, gpu, compiled_anew):
    """inductor's own CUDA graphs: parameters are where they were, so nothing is recorded anew."""
    model = decoder().to(gpu)
    optimizer = wrap(model, FALLING | {"rounding": "nearest"}, 2 * STEPS)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for step in range(2 * STEPS):
        tokens = batch(step).to(gpu)
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(compiled, tokens)
        torch.testing.assert_close(loss, loss_of(model, tokens), rtol=1e-4, atol=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(optimizer.num_bits.values()) == {4}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_a_compiled_step_of_the_loop_is_compiled_once(decoder, compiled_anew, config):
    """Forward and loss as one compiled function, the optimizer beside it."""
    from torch._dynamo.testing import CompileCounter

    plain, model = decoder(), decoder()
    expected, _ = train(plain, wrap(plain, config, STEPS), plain)
    optimizer = wrap(model, config, STEPS)
    counter = CompileCounter()
    compiled = torch.compile(functools.partial(loss_of, model), backend=counter, fullgraph=True)
    losses = []
    for step in range(STEPS):
        loss = compiled(batch(step))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == expected
    assert counter.frame_count == 1


@pytest.mark.parametrize("inner", [torch.optim.AdamW, AdamW], ids=["torch's", "moq's"])
@pytest.mark.parametrize("compiled", ["step", "whole loop body"])
def test_a_compiled_step_is_the_same(decoder, inner, compiled):
    torch._dynamo.reset()
    plain, model = decoder(torch.bfloat16), decoder(torch.bfloat16)
    train(plain, wrap(plain, FALLING, STEPS, inner=inner), plain)
    optimizer = wrap(model, FALLING, STEPS, inner=inner)
    step_compiled = torch.compile(optimizer.step, backend="eager")

    def body(tokens):
        loss_of(model, tokens).backward()
        (step_compiled if compiled == "step" else optimizer.step)()
        optimizer.zero_grad()

    call = body if compiled == "step" else torch.compile(body, backend="eager")
    for step in range(STEPS):
        call(batch(step))
    assert_same(weights(model), weights(plain))
    assert optimizer.steps == STEPS
    torch._dynamo.reset()


def test_evaluating_the_masters_compiles_at_most_what_reads_them(decoder):
    """In place, full_precision() only writes values: the compiled code serves them too."""
    torch._dynamo.reset()
    model = decoder()
    optimizer = wrap(model, FALLING, STEPS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    train(model, optimizer, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True), optimizer.full_precision():
        assert loss_of(compiled, batch(0)).item() == loss_of(model, batch(0)).item()
    torch._dynamo.reset()


# ---------------------------------------------------------------------- activation checkpointing


def by_function(model: torch.nn.Module, use_reentrant: bool) -> None:
    for layer in model.layers:
        inner = layer.forward
        layer.forward = functools.partial(checkpoint, inner, use_reentrant=use_reentrant)


def by_wrapper(model: torch.nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    kind = type(model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))


CHECKPOINTED = {
    "not reentrant": functools.partial(by_function, use_reentrant=False),
    "reentrant": functools.partial(by_function, use_reentrant=True),
    "wrapped modules": by_wrapper,
}


@pytest.mark.parametrize("apply", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_recomputed_activations_are_those_of_the_forward(decoder, device, config, apply):
    """Stochastic rounding included: its random numbers are those of the step, not of the call."""
    plain, model = decoder().to(device), decoder().to(device)
    expected, _ = train(plain, wrap(plain, config, STEPS), plain)
    apply(model)
    optimizer = wrap(model, config, STEPS)
    losses, widths = train(model, optimizer, model)
    assert widths == {8, 7, 6, 5, 4}
    assert losses == expected
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all("_checkpoint_wrapped_module" not in name for name in optimizer.num_bits)


def test_checkpointed_layers_compile_once(decoder, compiled_anew, config):
    from torch._dynamo.testing import CompileCounterWithBackend

    plain, model = decoder(), decoder()
    expected, _ = train(plain, wrap(plain, config, STEPS), plain)
    by_function(model, use_reentrant=False)
    optimizer = wrap(model, config, STEPS)
    counter = CompileCounterWithBackend("aot_eager")
    losses, _ = train(model, optimizer, torch.compile(model, backend=counter, fullgraph=True))
    assert losses == expected
    assert counter.frame_count == 1
