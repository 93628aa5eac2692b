"""Checks of DistributedDataParallel: copies train alike."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_decoder import (
    batch,
    loss_of,
    train_step,
    wrap,
)
from torch import nn
from workers.decoders import (
    FALLING,
    STEPS,
    require_equal_replicas,
    whole_decoder,
)


def check_replicas_stay_equal_under_ddp() -> None:
    for config in (FALLING, FALLING | {"simulate": "autograd"}):
        model = nn.parallel.DistributedDataParallel(whole_decoder(seed=dist.get_rank()))
        optimizer = wrap(model, config, STEPS)
        own = [batch(50 + dist.get_rank())]  # each rank measures something else
        optimizer.probe(
            lambda tokens, model=model: loss_of(model, tokens), own, max_products=4, max_cost=None
        )
        for step in range(STEPS):
            train_step(model, optimizer, step + 100 * dist.get_rank())
            require_equal_replicas(model, optimizer)
        assert set(optimizer.num_bits.values()) == {4}


def check_bfloat16_replicas_stay_equal_under_ddp() -> None:
    model = nn.parallel.DistributedDataParallel(whole_decoder(torch.bfloat16))
    optimizer = wrap(model, FALLING, STEPS)
    for step in range(STEPS):
        train_step(model, optimizer, step + 100 * dist.get_rank())
        require_equal_replicas(model, optimizer)


def check_compiled_replicas_compile_nothing_at_a_drop() -> None:
    torch._dynamo.reset()
    model = nn.parallel.DistributedDataParallel(whole_decoder())
    optimizer = wrap(model, FALLING, STEPS)
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(STEPS):
            train_step(compiled, optimizer, step + 100 * dist.get_rank())
    require_equal_replicas(model, optimizer)
    assert set(optimizer.num_bits.values()) == {4}
    torch._dynamo.reset()


def check_ddp_averages_the_gradients_of_weights_simulated_in_the_forward_pass() -> None:
    config = FALLING | {"simulate": "autograd"}
    batches = [batch(100 * rank) for rank in range(dist.get_world_size())]
    for before in (True, False):
        model, reference = whole_decoder(), whole_decoder()
        outer = nn.parallel.DistributedDataParallel(model) if before else model
        optimizer = wrap(outer, config, STEPS)
        if not before:
            outer = nn.parallel.DistributedDataParallel(model)
        wrap(reference, config, STEPS)
        loss_of(outer, batches[dist.get_rank()]).backward()
        for tokens in batches:
            (loss_of(reference, tokens) / len(batches)).backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
        optimizer.step()


def check_all_ranks_hear_of_an_error_of_the_one_that_writes() -> None:
    optimizer = wrap(whole_decoder(), FALLING, STEPS)
    directory = Path(os.environ["MOQ_TEST_DIRECTORY"])
    try:
        optimizer.save(directory / "run")
    except (ValueError, RuntimeError) as error:
        assert "a run needs a Hugging Face model" in str(error)
        assert isinstance(error, ValueError) == (dist.get_rank() == 0)
    else:
        raise AssertionError("a model without a config was saved")
    optimizer.export(directory / "out")
    assert (directory / "out" / "SHA256SUMS").exists()  # on every rank: the others have waited
