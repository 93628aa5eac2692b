"""Checks of sensitivity and target bits over ranks: all decide alike."""

import time

import torch
import torch.distributed as dist
from tiny_decoder import (
    Decoder,
    OnceDifferentiable,
    batch,
    loss_of,
    train_step,
    wrap,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from workers.decoders import (
    FALLING,
    STEPS,
    UNEVEN,
    device,
    full,
    require_equal_replicas,
    require_same_weights,
    sharded_decoder,
    whole_decoder,
)
from workers.job import everywhere, require_several_ranks

import moq
from moq.sensitivity import measure, quantized_blocks


class Counting(Decoder):
    """A decoder with a buffer, which DistributedDataParallel broadcasts before each forward."""

    def __init__(self) -> None:
        super().__init__(**UNEVEN)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(tokens)


def check_a_probe_under_ddp_takes_any_number_of_batches_on_each_rank() -> None:
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Counting().to(device()))
    reference = Counting().to(device())
    reference.load_state_dict(model.module.state_dict())
    optimizer, expected = wrap(model, FALLING, STEPS), wrap(reference, FALLING, STEPS)
    train_step(model, optimizer, 0)  # after it DistributedDataParallel has buckets to rebuild
    train_step(reference, expected, 0)
    own = [] if dist.get_rank() < ranks - 1 else [batch(50), batch(51)]
    found = optimizer.probe(
        lambda tokens: loss_of(model, tokens), own, max_products=8, max_cost=None
    )
    blocks = quantized_blocks(reference, FALLING)
    options = {"max_products": 8, "seed": FALLING["seed"], "progress": False}
    alone = measure(reference, blocks, lambda tokens: loss_of(reference, tokens), own, **options)
    assert found.values == alone.values
    train_step(model, optimizer, 1)
    train_step(reference, expected, 1)
    require_same_weights(model.module, reference)
    assert model.require_backward_grad_sync and model.require_forward_param_sync
    assert model.module.calls == 2


def check_a_model_is_measured_before_it_is_sharded() -> None:
    model = whole_decoder()
    blocks = quantized_blocks(model, FALLING)
    options = {"max_products": 8, "progress": False}
    found = measure(model, blocks, lambda tokens: loss_of(model, tokens), [batch(50)], **options)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = wrap(model, FALLING, STEPS)
    try:
        optimizer.probe(
            lambda tokens: loss_of(model, tokens), [batch(50)], form="exact", max_cost=None
        )
    except TypeError as error:
        assert "before fully_shard, measure moq.sensitivity.quantized_blocks" in str(error)
    else:
        raise AssertionError("sharded parameters were measured")
    optimizer.apply_sensitivity(found)
    assert optimizer.history[0]["values"] == found.values
    for step in range(STEPS):
        train_step(model, optimizer, step)
    assert set(optimizer.num_bits.values()) == {4}


def check_a_sharded_model_is_measured_by_differences() -> None:
    ranks, own = dist.get_world_size(), [batch(50 + dist.get_rank()), batch(70)]
    options = {"max_products": 8, "progress": False}
    for kind in ("trace", "eigenvalue"):
        reference = whole_decoder()
        alone = wrap(reference, FALLING, STEPS)
        rounds = [[batch(50 + rank) for rank in range(ranks)], [batch(70)] * ranks]
        expected = alone.probe(
            lambda each, model=reference: sum(loss_of(model, b) for b in each) / ranks,
            rounds if dist.get_rank() == 0 else [],
            form="finite_difference",
            measure=kind,
            **options,
            max_cost=None,
        )
        model = sharded_decoder()
        optimizer = wrap(model, FALLING, STEPS)
        loss_of(model, batch(0)).backward()
        with torch.no_grad():
            model(batch(0).to(device()))  # leaves the root's parameters whole
        found = optimizer.probe(
            lambda tokens, model=model: loss_of(model, tokens),
            own,
            measure=kind,
            **options,
            max_cost=None,
        )
        assert found.form == "finite_difference" and found.products == expected.products
        largest = max(map(abs, expected.values))
        for a, b in zip(found.values, expected.values, strict=True):
            assert abs(a - b) <= 1e-2 * largest, (kind, found.values, expected.values)
        for name, shard, whole in zip(
            [n for n, _ in model.named_parameters()],
            model.parameters(),
            reference.parameters(),
            strict=True,
        ):
            assert torch.equal(full(shard.detach()), whole), name
            assert shard.grad is not None
        assert all(other == found.values for other in everywhere(found.values))
        train_step(model, optimizer, 0)


def check_a_sharded_model_in_half_precision_is_refused() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fully_shard(whole_decoder(), mp_policy=policy)
    optimizer = wrap(model, FALLING, STEPS)
    before = [full(p.detach()).clone() for p in model.parameters()]
    try:
        optimizer.probe(
            lambda tokens: loss_of(model, tokens), [batch(50)], progress=False, max_cost=None
        )
    except moq.Error as error:
        assert "two step sizes must agree within 10 %" in str(error)
        assert "without a half-precision param_dtype" in str(error)
    else:
        raise AssertionError("differences of bfloat16 gradients were taken for curvature")
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(full(p.detach()), value)


def check_ranks_that_share_a_model_need_as_many_batches() -> None:
    require_several_ranks()
    optimizer = wrap(sharded_decoder(), FALLING, STEPS)
    own = [batch(50)] * (1 + dist.get_rank())
    try:
        optimizer.probe(lambda tokens: loss_of(optimizer.model, tokens), own, max_cost=None)
    except ValueError as error:
        assert "every rank must have as many batches" in str(error)
    else:
        raise AssertionError("ranks would have waited for each other")


def check_a_loss_that_fails_on_one_rank_of_a_sharded_model_fails_all() -> None:
    model = sharded_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    last = dist.get_rank() == dist.get_world_size() - 1
    for max_cost in (None, 1.0):
        try:
            optimizer.probe(
                lambda tokens: loss_of(model, tokens) * (float("nan") if last else 1.0),
                [batch(50)],
                progress=False,
                max_cost=max_cost,
            )
        except (ValueError, RuntimeError) as error:
            assert "the loss of every batch must be finite, got nan for batch 0" in str(error)
            assert isinstance(error, ValueError) == last
        else:
            raise AssertionError("a loss that is not a number was measured")
    train_step(model, optimizer, 0)  # the ranks are still together


def check_a_rank_without_a_batch_of_a_sharded_model_fails_all() -> None:
    require_several_ranks()
    model = sharded_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    own = [batch(50)] if dist.get_rank() == 0 else []
    try:
        optimizer.probe(lambda tokens: loss_of(model, tokens), own, progress=False, max_cost=None)
    except ValueError as error:
        assert "every rank must have as many batches" in str(error)
        assert "got [1, 0]" in str(error)
    else:
        raise AssertionError("a rank without a batch took part")
    train_step(model, optimizer, 0)


def check_batches_with_other_keys_are_refused_on_all_ranks() -> None:
    require_several_ranks()
    model = whole_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    own = [{"tokens": batch(50)} | ({"mask": batch(51)} if dist.get_rank() else {})]
    try:
        optimizer.probe(lambda b: loss_of(model, b["tokens"]), own, max_cost=None)
    except ValueError as error:
        assert "['tokens'] on rank 0 and ['mask', 'tokens'] on rank 1" in str(error)
    else:
        raise AssertionError("ranks measured other losses")


def check_ranks_decide_alike_how_much_and_how_often_is_measured() -> None:
    model = nn.parallel.DistributedDataParallel(whole_decoder())
    config = FALLING | {"sensitivity": {"max_cost": 1.0}}
    optimizer = wrap(model, config, total_steps=400)
    slow = 0.002 * dist.get_rank()  # seconds more, and other data

    def loss_fn(tokens: torch.Tensor) -> torch.Tensor:
        time.sleep(slow)
        return loss_of(model, tokens)

    optimizer.probe_regularly(loss_fn, [batch(50 + dist.get_rank())], max_products=4)
    for step in range(60):
        train_step(model, optimizer, step + 100 * dist.get_rank())
    kept = (
        [(e["step"], e["values"], e["products"], e["cost"]) for e in optimizer.history],
        optimizer._probes.saved(),
        optimizer.schedule().plan(),
    )
    assert len(optimizer.history) > 1
    assert all(other == kept for other in everywhere(kept))
    require_equal_replicas(model, optimizer)


def check_one_rank_that_cannot_differentiate_twice_takes_all_to_differences() -> None:
    model = whole_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    last = dist.get_rank() == dist.get_world_size() - 1

    def loss_fn(tokens: torch.Tensor) -> torch.Tensor:
        extra = OnceDifferentiable.apply(model.layers[0].q_proj.weight).sum()
        return loss_of(model, tokens) + (extra if last else 0.0)

    found = optimizer.probe(loss_fn, [batch(50)], progress=False, max_cost=None)
    assert found.form == "finite_difference"
    assert all(other == found.values for other in everywhere(found.values))


def check_target_bits_are_those_of_one_process() -> None:
    reference = whole_decoder()
    blocks = quantized_blocks(reference, FALLING)
    options = {"max_products": 8, "progress": False}
    found = measure(
        reference, blocks, lambda tokens: loss_of(reference, tokens), [batch(50)], **options
    )
    alone = wrap(reference, FALLING, STEPS)
    alone.apply_sensitivity(found)
    optimizer = wrap(sharded_decoder(), FALLING, STEPS)
    optimizer.apply_sensitivity(found)
    widths = range(2, 10)
    choice = optimizer.choose_target_bits(mean_bits=5, widths=widths)
    expected = alone.choose_target_bits(mean_bits=5, widths=widths)
    assert choice.to_dict() == expected.to_dict()
    assert optimizer.schedule().plan() == alone.schedule().plan()
    assert all(other == choice.to_dict() for other in everywhere(choice.to_dict()))
    # The size of the whole model, not of a shard of it.
    by_size = [o.choose_target_bits(bytes=10_000) for o in (optimizer, alone)]
    assert by_size[0].cost == by_size[1].cost


def check_ranks_that_ask_for_different_target_bits_are_refused() -> None:
    require_several_ranks()
    model = whole_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    optimizer.probe(
        lambda tokens: loss_of(model, tokens), [batch(50)], progress=False, max_cost=None
    )
    plan = optimizer.schedule().plan()
    try:
        optimizer.choose_target_bits(mean_bits=5 + dist.get_rank())
    except ValueError as error:
        assert "must be the same on all ranks" in str(error)
    else:
        raise AssertionError("ranks chose different target bits")
    try:
        optimizer.choose_target_bits(mean_bits=5 if dist.get_rank() == 0 else 99)
    except (ValueError, RuntimeError) as error:
        assert "mean_bits must lie in [1, 16], got 99" in str(error)
    else:
        raise AssertionError("a rank with an invalid budget was left behind")
    assert optimizer.schedule().plan() == plan
