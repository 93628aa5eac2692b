"""Checks of fully_shard: shards train as the whole does."""

import functools
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_decoder import (
    Decoder,
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
from workers.decoders import (
    FALLING,
    STEPS,
    device,
    full,
    require_same_weights,
    sharded_decoder,
    whole_decoder,
)
from workers.job import everywhere, require_several_ranks

import moq
from moq import scalars


def train_both(
    config: dict,
    dtype: torch.dtype = torch.float32,
    inner: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **options,
) -> None:
    """Every rank sees the same batch, so averaged gradients are those of one process."""
    model, reference = sharded_decoder(dtype, **options), whole_decoder(dtype)
    optimizer, expected = (wrap(m, config, STEPS, inner=inner) for m in (model, reference))
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


def check_moqs_adamw_updates_the_shards() -> None:
    train_both(FALLING, torch.float32, moq.AdamW)
    train_both(FALLING, torch.bfloat16, moq.AdamW)


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
    for kind in ("static", "static_asymmetric"):
        _check_ranks_agree_on_inputs(kind)


def _check_ranks_agree_on_inputs(kind: str) -> None:
    config = FALLING | {"activations": kind, "observer": {"momentum": 0.5}}
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
    quantizers = single._activations.by_name
    first = {name: q.seen.tolist() for name, q in quantizers.items()}
    fresh = nn.parallel.DistributedDataParallel(whole_decoder())
    again = wrap(fresh, config, STEPS)
    train_step(fresh, again, 100 * dist.get_rank())
    for name, q in again._activations.by_name.items():
        if name.startswith("layers.0.") and "down" not in name:
            assert q.extent.tolist() == first[name], name


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
