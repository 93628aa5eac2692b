"""The checks of test_optimizer_sharded.py, as one rank of a job makes them.

As a program: DIRECTORY RANK WORLD_SIZE BACKEND; writes {check: error or ""} into the directory.
"""

import functools
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed.checkpoint as dcp
from conftest import (
    Decoder,
    OnceDifferentiable,
    Recorder,
    assert_simulated,
    batch,
    loss_of,
    masters,
    train_step,
    wrap,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from workers.job import require_several_ranks, run_checks

import moq
from moq import scalars
from moq.sensitivity import measure, quantized_blocks

FALLING = {
    "start_bits": 9,
    "target_bits": 4,
    "rounding": "stochastic",
    "seed": 5,
    "schedule": {"finish_at": 0.8},
}
STEPS = 6
UNEVEN = {"hidden": 11, "intermediate": 5}  # no dimension divides by two


def device() -> torch.device:
    """Where this rank's parameters are: NCCL knows only GPUs."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def whole_decoder(dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(**UNEVEN).to(device(), dtype)


def sharded_decoder(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> Decoder:
    model = whole_decoder(dtype, seed)
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def require_same_weights(model: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(full(p), full(q)), name


def train_both(config: dict, dtype: torch.dtype = torch.float32, **options) -> None:
    """Every rank sees the same batch, so averaged gradients are those of one process."""
    model, reference = sharded_decoder(dtype, **options), whole_decoder(dtype)
    optimizer, expected = wrap(model, config, STEPS), wrap(reference, config, STEPS)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    for step in range(STEPS):
        train_step(model, optimizer, step)
        train_step(reference, expected, step)
        require_same_weights(model, reference)
    for name, master in masters(optimizer).items():
        assert torch.equal(full(master), masters(expected)[name]), name
    assert optimizer.num_bits == expected.num_bits


def check_sharded_training_is_the_unsharded_one() -> None:
    train_both(FALLING)


def check_bfloat16_weights_with_float32_masters() -> None:
    train_both(FALLING, torch.bfloat16)


def check_asymmetric_groups_within_rows() -> None:
    train_both(FALLING | {"mode": "asymmetric", "granularity": "per_group", "group_size": 1})


def check_mixed_precision_policy_trains() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = Decoder(hidden=40, intermediate=5).to(device())
    fully_shard(model, mp_policy=policy)
    optimizer = wrap(model, FALLING, STEPS)
    for step in range(STEPS):
        train_step(model, optimizer, step)
    assert set(optimizer.num_bits.values()) == {4}
    rows = full(model.layers[0].v_proj.weight)  # 40 input features, 15 levels
    assert max(len(row.unique()) for row in rows) <= 15
    assert len(rows.unique()) > 15


def check_gradient_clipping() -> None:
    model = sharded_decoder()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = moq.MoQOptimizer(sgd, model, FALLING, total_steps=STEPS, verbose=False)
    before = {name: full(master).clone() for name, master in masters(optimizer).items()}
    loss_of(model, batch(0)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert full(norm) > 1e-2
    optimizer.step()
    moved = [full(master) - before[name] for name, master in masters(optimizer).items()]
    assert 0 < torch.stack([change.norm() for change in moved]).norm() <= 1.01e-3


def check_one_scale_over_all_shards_is_that_of_the_whole() -> None:
    one = FALLING | {"granularity": "per_tensor"}
    nearest = {key: value for key, value in one.items() if key != "rounding"}
    train_both(one)
    train_both(one | {"mode": "asymmetric"}, torch.bfloat16)
    train_both(nearest | {"mode": "binary", "target_bits": 1})
    train_both(one | {"mode": "asymmetric", "scale": "mse"})


def check_one_scale_over_replicated_shards() -> None:
    ranks = dist.get_world_size()
    mesh = dist.init_device_mesh(device().type, (1, ranks), mesh_dim_names=("replicas", "shards"))
    train_both(FALLING | {"granularity": "per_tensor"}, mesh=mesh)


def check_one_scale_when_only_some_ranks_see_other_weights() -> None:
    model = sharded_decoder()
    optimizer = wrap(model, FALLING | {"granularity": "per_tensor"}, STEPS)
    weight = model.layers[0].q_proj.weight

    def look_into_full_precision() -> None:
        with optimizer.full_precision():
            pass

    looks = {
        "step": lambda: train_step(model, optimizer, 0),
        "export": optimizer.quantized_parameters,
        "full_precision": look_into_full_precision,
        "load": lambda: optimizer.load_state_dict(optimizer.state_dict()),
    }
    for name, look in looks.items():
        largest = full(weight.detach())[-1].abs().max()
        last = dist.get_rank() == dist.get_world_size() - 1
        with torch.no_grad():
            weight.to_local().mul_(2 if last else 1)  # all write, as load_state_dict does
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*were replaced from outside")
            look()
            optimizer.quantized_parameters()  # what load_state_dict leaves to the next use
        assert_simulated(optimizer)
        assert full(weight.detach())[-1].abs().max() > 1.5 * largest, name


def check_what_is_written_to_sharded_weights_becomes_the_masters() -> None:
    model = sharded_decoder()
    optimizer = wrap(model, FALLING | {"start_bits": 16, "target_bits": 16}, STEPS, lr=1e-6)
    train_step(model, optimizer, 0)
    weight = model.layers[0].q_proj.weight
    ways = {
        "load_state_dict": lambda: model.load_state_dict(
            {name: 3 * value.detach() for name, value in model.state_dict().items()}
        ),
        "copy_": lambda: weight.copy_(3 * weight),
    }
    for name, write in ways.items():
        before = full(weight.detach()).abs().max()
        with torch.no_grad():
            write()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(model, optimizer, 1)
        assert any("were replaced from outside" in str(w.message) for w in caught), name
        assert full(weight.detach()).abs().max() > 2.5 * before, name


def check_bad_weights_in_one_shard_are_refused_on_all_ranks() -> None:
    model = sharded_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    train_step(model, optimizer, 0)
    before = {name: full(master).clone() for name, master in masters(optimizer).items()}
    weight = model.layers[0].q_proj.weight
    last = dist.get_rank() == dist.get_world_size() - 1
    loss_of(model, batch(1)).backward()
    with torch.no_grad():
        weight.to_local().mul_(float("nan") if last else 1)
    for use in (optimizer.step, optimizer.quantized_parameters):
        try:
            use()
        except (ValueError, RuntimeError) as error:
            assert isinstance(error, ValueError) is last
            assert "layers.0.q_proj.weight" in str(error) and "must be finite" in str(error)
        else:
            raise AssertionError("a NaN became a master")
    assert optimizer.steps == 1
    for name, master in masters(optimizer).items():
        assert torch.equal(full(master), before[name]), name
    optimizer.load_state_dict(optimizer.state_dict())
    assert_simulated(optimizer)
    state = optimizer.state_dict()
    entry = next(e for e in state["state"].values() if "moq_master" in e)
    if last:
        entry["moq_master"] = entry["moq_master"].detach() * float("nan")
    else:
        entry["moq_master"] = entry["moq_master"].detach().clone()
    try:
        optimizer.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        assert isinstance(error, ValueError) is last
        assert "must be finite" in str(error)
    else:
        raise AssertionError("a NaN was loaded")
    assert_simulated(optimizer)
    assert not optimizer._masters.trainer.touched()


def check_binary_and_searched_grids() -> None:
    falling = {key: value for key, value in FALLING.items() if key != "rounding"}
    train_both(falling | {"mode": "binary", "target_bits": 1})
    train_both(FALLING | {"scale": "mse"})


def check_groups_of_whole_output_features() -> None:
    def build() -> Decoder:
        torch.manual_seed(0)
        return Decoder(hidden=12, intermediate=20).to(device())

    config = FALLING | {"granularity": "per_group", "groups": 4}
    model, reference = build(), build()
    fully_shard(model)
    optimizer, expected = wrap(model, config, STEPS), wrap(reference, config, STEPS)
    assert optimizer._masters.matched[0].granularity == "per_rows"
    for step in range(STEPS):
        train_step(model, optimizer, step)
        train_step(reference, expected, step)
        require_same_weights(model, reference)
    model = build()
    fully_shard(model)
    try:
        wrap(model, config | {"groups": 3, "rules": [{"match": "*_proj", "groups": 2}]}, STEPS)
    except ValueError as error:
        raise AssertionError("two groups of halves were refused") from error


def check_groups_over_two_shards_are_refused() -> None:
    require_several_ranks()
    torch.manual_seed(0)
    model = fully_shard(Decoder(hidden=12, intermediate=20).to(device()))
    config = FALLING | {"granularity": "per_group", "groups": 3}
    up = {"match": "re:.*(gate|up)_proj", "granularity": "per_channel"}
    try:
        wrap(model, config | {"rules": [up]}, STEPS)
    except ValueError as error:
        assert "must split into equal shards of whole groups of the 4" in str(error), error
    else:
        raise AssertionError("a group over two ranks was accepted")


def check_static_scales_see_the_batches_of_all_ranks() -> None:
    config = FALLING | {"activations": "static", "observer": {"momentum": 0.5}}
    model = nn.parallel.DistributedDataParallel(whole_decoder())
    optimizer = wrap(model, config, STEPS)
    for step in range(2):
        train_step(model, optimizer, step + 100 * dist.get_rank())
    averages = optimizer._activations.state()
    assert all(value > 0 for value in averages.values())
    assert all(other == averages for other in everywhere(averages))
    torch.manual_seed(0)
    alone = whole_decoder()
    single = wrap(alone, config, STEPS)
    for rank in range(dist.get_world_size()):  # all batches of the first step as micro-batches
        loss_of(alone, batch(100 * rank)).backward()
    first = {name: float(q.seen) for name, q in single._activations.by_name.items()}
    fresh = nn.parallel.DistributedDataParallel(whole_decoder())
    again = wrap(fresh, config, STEPS)
    train_step(fresh, again, 100 * dist.get_rank())
    found = again._activations.state()
    for name in first:
        if name.startswith("layers.0.") and "down" not in name:
            assert found[name] == first[name], name


def check_what_a_rank_has_seen_stays_its_own_until_the_step() -> None:
    config = FALLING | {"activations": "static"}
    for compiled in (False, True):
        model, reference = whole_decoder(), whole_decoder()
        optimizer, expected = wrap(model, config, STEPS), wrap(reference, config, STEPS)
        outer = torch.compile(model, backend="eager") if compiled else model
        outer = nn.parallel.DistributedDataParallel(outer)
        for micro_batch in range(3):
            for each in (outer, reference):
                loss_of(each, batch(micro_batch + 100 * dist.get_rank())).backward()
        for name, quantizer in expected._activations.by_name.items():
            assert torch.equal(optimizer._activations.by_name[name].seen, quantizer.seen), name


def conv1d_model() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(Conv1D(7, 6), Conv1D(3, 7)).to(device())


def check_scales_over_split_input_features_are_refused() -> None:
    require_several_ranks()
    model = fully_shard(conv1d_model())
    try:
        wrap(model, FALLING, STEPS)
    except ValueError as error:
        assert "its input features are split" in str(error)
        assert "shard_placement_fn=lambda parameter: Shard(1)" in str(error)
    else:
        raise AssertionError("a scale over several ranks was accepted")


def check_the_remedy_for_split_input_features_works() -> None:
    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.dim() == 2 else 0)

    # Padding is not supported along dimension 1: both sizes divide by two.
    from transformers.pytorch_utils import Conv1D

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(8, 6), Conv1D(4, 8)).to(device())

    model, reference = fully_shard(build(), shard_placement_fn=placement), build()
    optimizer, expected = wrap(model, FALLING, STEPS), wrap(reference, FALLING, STEPS)
    for step in range(STEPS):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(device())
        for m, o in ((model, optimizer), (reference, expected)):
            m(x).square().mean().backward()
            o.step()
            o.zero_grad()
        require_same_weights(model, reference)


def check_groups_of_split_input_features() -> None:
    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.dim() == 2 else 0)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).to(device())

    model, reference = build(), build()
    fully_shard(model, shard_placement_fn=placement)
    config = FALLING | {"granularity": "per_group", "group_size": 1}
    optimizer, expected = wrap(model, config, STEPS), wrap(reference, config, STEPS)
    for step in range(STEPS):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).to(device())
        for m, o in ((model, optimizer), (reference, expected)):
            m(x).square().mean().backward()
            o.step()
            o.zero_grad()
        require_same_weights(model, reference)


def check_distributed_checkpoint_resumes() -> None:
    directory = Path(os.environ["MOQ_TEST_DIRECTORY"]) / f"dcp-{dist.get_world_size()}"
    model = sharded_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    for step in range(STEPS):
        if step == 3:
            states = get_state_dict(model, optimizer)
            dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=directory)
        train_step(model, optimizer, step)
    other = sharded_decoder(seed=1)
    resumed = wrap(other, FALLING, STEPS)
    states = get_state_dict(other, resumed)
    dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=directory)
    set_state_dict(other, resumed, model_state_dict=states[0], optim_state_dict=states[1])
    assert resumed.steps == 3
    for step in range(3, STEPS):
        train_step(other, resumed, step)
    require_same_weights(other, model)


def check_full_state_moves_between_sharded_and_whole() -> None:
    model = sharded_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    for step in range(3):
        train_step(model, optimizer, step)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_optimizer_state_dict(model, optimizer, options=options)
    other = sharded_decoder(seed=1)
    resumed = wrap(other, FALLING, STEPS)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = gathered if dist.get_rank() == 0 else {}
    set_optimizer_state_dict(other, resumed, state, options=broadcast)
    for name, master in masters(optimizer).items():
        assert torch.equal(full(masters(resumed)[name]), full(master)), name


def check_both_values_are_gathered_for_export() -> None:
    model = sharded_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    train_step(model, optimizer, 0)
    listed = {q.name: q for q in optimizer.quantized_parameters()}
    assert listed["layers.0.q_proj.weight"].simulated.shape == (11, 11)
    try:
        optimizer.export("nowhere")
    except RuntimeError as error:
        assert "the model must be whole" in str(error)
    else:
        raise AssertionError("a sharded model was exported")


def check_rank_0_tells_the_numbers_of_all_shards() -> None:
    for granularity in ("per_channel", "per_tensor"):
        tell_the_numbers_of_all_shards(FALLING | {"granularity": granularity})


def tell_the_numbers_of_all_shards(config: dict) -> None:
    told, expected = Recorder(), Recorder()
    model, reference = sharded_decoder(), whole_decoder()
    optimizer = wrap(model, config, STEPS, loggers=told, log_every=2)
    whole = wrap(reference, config, STEPS, loggers=expected, log_every=2)
    for step in range(STEPS):
        train_step(model, optimizer, step)
        train_step(reference, whole, step)
    optimizer.flush_logs()
    whole.flush_logs()
    if dist.get_rank():
        assert told.steps == expected.steps == {}
        return
    assert list(told.steps) == list(expected.steps) == [1, 3, 5]
    for step, numbers in expected.steps.items():
        assert told.steps[step].keys() == numbers.keys()
        for name, value in numbers.items():
            assert abs(told.steps[step][name] - value) <= 1e-9, (step, name)


def check_ranks_that_hear_of_drops_at_other_times_measure_the_same() -> None:
    heard = scalars._widths
    if dist.get_rank():  # this rank's host has fallen behind: it looks at one width more

        def widths(schedule: object, block: int, earliest: int, latest: int) -> list[int]:
            return [10, *heard(schedule, block, earliest, latest)]

        scalars._widths = widths
    try:
        tell_the_numbers_of_all_shards(FALLING | {"granularity": "per_tensor"})
    finally:
        scalars._widths = heard


def check_full_precision() -> None:
    model = sharded_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    train_step(model, optimizer, 0)
    before = [full(p).clone() for p in model.parameters()]
    with optimizer.full_precision():
        for name, master in masters(optimizer).items():
            assert torch.equal(full(model.get_parameter(name)), full(master))
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(full(p), value)


def check_sharding_after_wrapping_is_refused() -> None:
    model = whole_decoder()
    optimizer = wrap(model, FALLING, STEPS)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    loss_of(model, batch(0)).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "before MoQOptimizer is made" in str(error)
    else:
        raise AssertionError("replaced parameters were not noticed")


def everywhere(value: object) -> list:
    """The values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def require_equal_replicas(model: nn.Module, optimizer: moq.MoQOptimizer) -> None:
    """Weights, masters, widths and plans are the same on all ranks, bit for bit."""
    kept = [*model.parameters(), *masters(optimizer).values()]
    for p in kept:
        copies = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, p.detach())
        assert all(torch.equal(copy, p) for copy in copies)
    for other in everywhere((optimizer.num_bits, optimizer.schedule().plan(), optimizer.steps)):
        assert other == (optimizer.num_bits, optimizer.schedule().plan(), optimizer.steps)


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


def scaled_step(model: nn.Module, optimizer, scaler, step: int, overflow: bool) -> None:
    """A step whose gradients overflow, if at all, in memory of the last rank only."""
    scaler.scale(loss_of(model, batch(step))).backward()
    if overflow and dist.get_rank() == dist.get_world_size() - 1:
        gradient = next(layer.v_proj.weight for layer in model.layers).grad
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local[-1, -1] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def check_all_shards_skip_what_overflows_in_one() -> None:
    for dtype, fused in ((torch.float32, False), (torch.float32, True), (torch.float16, False)):
        model = sharded_decoder(dtype)
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, fused=fused)
        optimizer = moq.MoQOptimizer(adamw, model, FALLING, total_steps=STEPS, verbose=False)
        scaler = torch.amp.GradScaler(device().type, init_scale=64.0, growth_interval=100)
        for step, overflow in enumerate([False, True, False]):
            before = [full(p).clone() for p in model.parameters()]
            steps = optimizer.steps
            scaled_step(model, optimizer, scaler, step, overflow)
            same = all(
                torch.equal(full(p), q) for p, q in zip(model.parameters(), before, strict=True)
            )
            case = dtype, fused, step
            assert (
                everywhere((optimizer.steps, same))
                == [(steps + (not overflow), overflow)] * dist.get_world_size()
            ), case
            assert scaler.get_scale() == (64.0 if step == 0 else 32.0), case


def check_checkpointed_layers_train_sharded_as_whole() -> None:
    from torch.utils.checkpoint import checkpoint

    model, reference = whole_decoder(), whole_decoder()
    for layer in model.layers:
        inner = layer.forward
        layer.forward = functools.partial(checkpoint, inner, use_reentrant=False)
        fully_shard(layer)
    fully_shard(model)
    optimizer, expected = wrap(model, FALLING, STEPS), wrap(reference, FALLING, STEPS)
    for step in range(STEPS):
        train_step(model, optimizer, step)
        train_step(reference, expected, step)
        require_same_weights(model, reference)


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
    except moq._C.Error as error:
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
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, choice.to_dict())
    assert all(other == choice.to_dict() for other in everywhere)
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


if __name__ == "__main__":
    where, own_rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    found = run_checks(globals(), where, own_rank, ranks, sys.argv[4])
    (where / f"results-{own_rank}.json").write_text(json.dumps(found))
    # Not through the interpreter's exit: under load torch's own threads may outlive what they use.
    os._exit(0)
