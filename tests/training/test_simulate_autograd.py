"""simulate "autograd": weights simulated inside the forward pass, and scales that are learned."""

import copy
import warnings

import pytest
import torch
from reference import quantize as reference
from tiny_decoder import (
    Recorder,
    assert_same,
    batch,
    loss_of,
    name_hash,
    tiny_llama,
    train_step,
    weights,
    wrap,
)
from torch import nn

transformers = pytest.importorskip("transformers")

import moq  # noqa: E402
from moq import cli  # noqa: E402
from moq.rules import plain_name  # noqa: E402
from moq.saved_run import load_run  # noqa: E402
from moq.verify import verify_checkpoint  # noqa: E402

STEPS = 8
FALLING = {"start_bits": 9, "target_bits": 3, "schedule": {"finish_at": 0.75}}
LEARNED = FALLING | {"scale": "learned", "simulate": "autograd"}
GRIDS = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic", "seed": 4},
    "asymmetric groups": {"mode": "asymmetric", "granularity": "per_group", "group_size": 4},
    "blend": {"blend_steps": 2},
    "binary": {"mode": "binary", "target_bits": 1, "granularity": "per_group", "groups": 4},
    "mse": {"scale": "mse", "granularity": "per_tensor"},
}


def masters_of(optimizer: moq.MoQOptimizer) -> dict[str, torch.Tensor]:
    return {
        m.name: master.detach().clone()
        for m, (_, master) in zip(
            optimizer._masters.matched, optimizer._masters.pairs(), strict=True
        )
    }


def simulated_of(optimizer: moq.MoQOptimizer) -> dict[str, torch.Tensor]:
    return {m.name: optimizer._masters.simulated(m).clone() for m in optimizer._masters.matched}


@pytest.mark.parametrize("grid", GRIDS)
def test_both_forms_train_the_same_weights(decoder, device, grid):
    config = FALLING | GRIDS[grid]
    models = decoder().to(device), decoder().to(device)
    in_place = wrap(models[0], config, STEPS)
    autograd = wrap(models[1], config | {"simulate": "autograd"}, STEPS)
    for step in range(STEPS):
        losses = [
            train_step(model, optimizer, step)
            for model, optimizer in zip(models, (in_place, autograd), strict=True)
        ]
        assert losses[0] == losses[1]
        assert_same(masters_of(autograd), masters_of(in_place))
        assert_same(simulated_of(autograd), simulated_of(in_place))
    assert autograd.num_bits == in_place.num_bits


@pytest.mark.parametrize("name", ["", "layers.0.q_proj.weight", "gewöhnlich", "重み"])
def test_both_forms_key_their_random_streams_alike(name):
    assert moq._C.name_hash(name) == name_hash(name)


def test_there_is_one_copy_of_the_weights(decoder):
    model = decoder()
    before = {id(p) for p in model.parameters()}
    optimizer = wrap(model, FALLING | {"simulate": "autograd"}, STEPS)
    assert {id(p) for p in model.parameters()} == before
    for parameter, master in optimizer._masters.pairs():
        assert master is parameter


def test_full_precision_shows_the_parameters(decoder):
    model, plain = decoder(), decoder()
    optimizer = wrap(model, {"start_bits": 3, "target_bits": 3, "simulate": "autograd"}, STEPS)
    with optimizer.full_precision():
        assert torch.equal(model(batch(0)), plain(batch(0)))
    assert not torch.equal(model(batch(0)), plain(batch(0)))


@pytest.mark.parametrize("scale", ["absmax", "learned"])
def test_a_resumed_run_continues_bit_for_bit(decoder, scale):
    config = FALLING | {"simulate": "autograd", "scale": scale}
    straight, first = decoder(), decoder()
    optimizer, interrupted = wrap(straight, config, STEPS), wrap(first, config, STEPS)
    for step in range(3):
        train_step(straight, optimizer, step)
        train_step(first, interrupted, step)
    state = copy.deepcopy(interrupted.state_dict())
    resumed = decoder()
    second = wrap(resumed, config, STEPS)
    second.load_state_dict(state)
    for (name, p), q in zip(first.named_parameters(), resumed.parameters(), strict=True):
        if "parametrizations" not in name:
            q.data.copy_(p.data)  # those that are not quantized are the model's own affair
    for step in range(3, STEPS):
        assert train_step(straight, optimizer, step) == train_step(resumed, second, step)
    assert_same(weights(resumed), weights(straight))


def test_a_state_of_the_other_form_is_refused(decoder):
    one = wrap(decoder(), FALLING, STEPS)
    other = wrap(decoder(), FALLING | {"simulate": "autograd"}, STEPS)
    with pytest.raises(ValueError, match="simulate 'autograd' .saved: 'in_place'"):
        other.load_state_dict(one.state_dict())


def test_tied_weights_have_one_parametrization():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    optimizer = wrap(model, LEARNED, STEPS)
    simulators = [layer.parametrizations["weight"][0] for layer in model]
    assert simulators[0] is simulators[1]
    assert len(optimizer.param_groups[-1]["params"]) == 1
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, model[1].weight)


def test_a_drop_compiles_nothing_again(decoder, device):
    from torch._dynamo.testing import CompileCounter

    model = decoder().to(device)
    optimizer = wrap(model, LEARNED | {"activations": "dynamic"}, STEPS)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(STEPS):
        loss_of(compiled, batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(optimizer.num_bits.values()) == {3}
    assert counter.frame_count == 1
    torch._dynamo.reset()  # another decoder has the same code


def test_a_probe_measures_the_simulated_model(decoder):
    config = {"start_bits": 8, "target_bits": 4, "schedule": {"finish_at": 0.75}}
    found = []
    for simulate in ("in_place", "autograd"):
        model = decoder()
        optimizer = wrap(model, config | {"simulate": simulate}, STEPS)
        found.append(
            optimizer.probe(lambda b, model=model: loss_of(model, b), [batch(0)], max_cost=None)
        )
    assert found[0].blocks == found[1].blocks
    torch.testing.assert_close(torch.tensor(found[0].values), torch.tensor(found[1].values))


def test_a_group_added_later_is_simulated():
    first, later = nn.Linear(6, 6), nn.Linear(6, 4)
    model = nn.Sequential(first, later)
    sgd = torch.optim.SGD(first.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="in no param group"):
        optimizer = moq.MoQOptimizer(
            sgd, model, LEARNED | {"start_bits": 3}, total_steps=STEPS, verbose=False
        )
    optimizer.add_param_group({"params": list(later.parameters())})
    assert optimizer.num_bits == {"0.weight": 3, "1.weight": 3}
    rows = later.weight.detach()
    assert max(len(row.unique()) for row in rows) <= 7


@pytest.mark.parametrize(
    "config", [FALLING | {"blend_steps": 2}, LEARNED], ids=["blend", "learned"]
)
def test_the_forward_pass_follows_a_model_to_another_device(decoder, config):
    model = decoder()
    optimizer = wrap(model, config | {"simulate": "autograd"}, STEPS)
    train_step(model, optimizer, 0)
    model.to("meta")
    assert loss_of(model, batch(1)).device.type == "meta"


# ------------------------------------------------------------------------- learned step sizes


def test_learned_scales_begin_at_the_largest_weight_and_are_trained(decoder, device):
    model = decoder().to(device)
    optimizer = wrap(model, LEARNED, STEPS)
    ranges = [p for p in optimizer.param_groups[-1]["params"]]
    assert optimizer.param_groups[-1]["weight_decay"] == 0.0
    assert len(ranges) == len(optimizer.num_bits)
    for p, m in zip(ranges, optimizer._masters.matched, strict=True):
        assert torch.equal(p.detach(), m.parameter.detach().abs().amax(1))
    before = [p.detach().clone() for p in ranges]
    for step in range(STEPS):
        train_step(model, optimizer, step)
    assert all(not torch.equal(p.detach(), old) for p, old in zip(ranges, before, strict=True))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_gradient_step_moves_the_scale_by_a_known_part_of_what_lsq_moves_it_by(bits, granularity):
    torch.manual_seed(0)
    layer = nn.Linear(24, 6, bias=False)
    grid = {"start_bits": bits, "target_bits": bits, "granularity": granularity}
    wrap(layer, LEARNED | grid, STEPS)
    (chain,) = (
        m for m in layer.modules() if isinstance(m, nn.utils.parametrize.ParametrizationList)
    )
    magnitude, weight = chain[0].absmax, chain.original.detach().double()
    with torch.no_grad():
        magnitude.mul_(0.6)  # some weights are clipped, most are rounded
    towards = torch.randn(6, 24, dtype=torch.float64)
    (layer.weight.double() * towards).sum().backward()

    # LSQ (Esser et al., 2020), equations 2 to 4: the step size s, codes within [-largest, largest],
    # and the gradient that reaches s over the square root of the number of weights times largest.
    largest, groups = 2 ** (bits - 1) - 1, (len(magnitude), -1)
    step_size = magnitude.detach().double()[:, None] / largest
    code = weight.reshape(groups) / step_size
    inside = code.round().abs() <= largest  # theirs ends half a code earlier, at largest
    slope = torch.where(inside, code.round() - code, code.sign() * largest)
    of_lsq = (towards.reshape(groups) * slope).sum(1) / (code.shape[1] * largest) ** 0.5
    moved = magnitude.grad.double() / largest  # of the step size, by a step of the magnitude
    assert 0 < (~inside).sum() < inside.sum()
    torch.testing.assert_close(moved, of_lsq * largest**-1.5, rtol=1e-4, atol=1e-7)


def test_learning_finds_a_better_scale_than_the_largest_weight():
    torch.manual_seed(0)
    target = torch.randn(8, 64)
    x = torch.randn(256, 64)
    errors = {}
    for scale in ("absmax", "learned"):
        layer = nn.Linear(64, 8, bias=False)
        layer.weight.data.copy_(target)
        layer.weight.requires_grad_(True)
        config = {"start_bits": 3, "target_bits": 3, "simulate": "autograd", "scale": scale}
        optimizer = wrap(layer, config, 200, lr=1e-2)
        for _ in range(200):
            loss = (layer(x) - x @ target.t()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        errors[scale] = loss.item()
    assert errors["learned"] < 0.8 * errors["absmax"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integers_of_learned_scales_are_those_of_their_grid(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(256, 64, bias=False).to(dtype)
    layer.weight.data[3] = 0
    config = {"simulate": "autograd", "scale": "learned", "master_dtype": "parameter"}
    wrap(layer, config | {"start_bits": 8, "target_bits": 8}, STEPS)
    weight = layer.parametrizations.weight.original.detach()
    simulator = layer.parametrizations.weight[0]
    simulator.absmax.data.mul_(0.9)
    scale = reference.stored_scale(simulator.absmax.detach() / 127, dtype)[:, None]
    expected = (weight.float() * (1.0 / scale)).round().clamp(-127, 127).int()
    assert torch.equal(simulator.codes(weight, 8), expected)


def test_logged_scalars_are_those_of_the_simulated_weights(decoder):
    recorders = {}
    for simulate in ("in_place", "autograd"):
        model = decoder()
        recorder = recorders[simulate] = Recorder()
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = moq.MoQOptimizer(
            adamw,
            model,
            FALLING | {"simulate": simulate},
            total_steps=STEPS,
            verbose=False,
            loggers=recorder,
            log_every=1,
        )
        for step in range(3):
            train_step(model, optimizer, step)
        optimizer.flush_logs()
    assert list(recorders["autograd"].steps) == [1, 2, 3]
    assert recorders["in_place"].steps == recorders["autograd"].steps


# ------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "per_group", "groups"])
@pytest.mark.parametrize("scale", ["absmax", "learned"])
def test_the_checkpoint_holds_what_the_forward_saw(tmp_path, scale, granularity, dtype):
    sizes = {"per_group": {"group_size": 8}, "groups": {"groups": 4}}.get(granularity, {})
    config = {
        "start_bits": 6,
        "target_bits": 4,
        "simulate": "autograd",
        "scale": scale,
        "granularity": "per_group" if granularity == "groups" else granularity,
        "master_dtype": "parameter",
        "schedule": {"finish_at": 0.5},
    } | sizes
    model = tiny_llama(dtype)
    optimizer = wrap(model, config, STEPS)
    for step in range(STEPS):
        model(batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.export(tmp_path / "out")
    checks = verify_checkpoint(tmp_path / "out")
    # The engine multiplies codes and scales exactly, where BF16 weights are rounded products.
    known = 4 if dtype == torch.float32 else 3
    assert all(check.passed for check in checks[:known]), checks
    optimizer.save(tmp_path / "run")
    read = load_run(tmp_path / "run")
    for mine, theirs in zip(optimizer.quantized_parameters(), read.quantized, strict=True):
        assert mine.name == theirs.name
        assert torch.equal(mine.simulated, theirs.simulated)
        assert torch.equal(mine.master, theirs.master)
        assert (mine.absmax is None) == (scale == "absmax")
        assert mine.absmax is None or torch.equal(mine.absmax, theirs.absmax)
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "later")]) == 0
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "later" / path.name).read_bytes() == path.read_bytes(), path.name
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    model.eval()
    assert torch.equal(found.eval()(batch(0)).logits, model(batch(0)).logits)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_empty_and_single_weights_are_trained(granularity, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: initialising an empty matrix does nothing
        layer = nn.Linear(shape[1], shape[0], bias=False)
    other = nn.Linear(4, 2)
    model = nn.ModuleList([layer, other])
    optimizer = wrap(model, LEARNED | {"granularity": granularity}, STEPS)
    (layer(torch.ones(2, shape[1])).sum() + other(torch.ones(1, 4)).sum()).backward()
    optimizer.step()
    assert optimizer.quantized_parameters()[0].simulated.shape == shape


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scale": "learned"}, r"simulate must be 'autograd' for scales that are learned"),
        (
            {"rules": [{"match": "*", "scale": "learned"}]},
            r"simulate must be 'autograd' for scales that are learned",
        ),
        (LEARNED | {"mode": "asymmetric"}, r"scale must be 'absmax' or 'mse' unless mode is"),
        (LEARNED | {"rounding": "stochastic"}, r"scale must be 'absmax' or 'mse' unless mode is"),
        ({"simulate": "forward"}, r"simulate must be one of"),
    ],
)
def test_what_cannot_be_learned_is_refused(decoder, config, message):
    with pytest.raises(ValueError, match=message):
        wrap(decoder(), config, STEPS)


def test_half_precision_parameters_cannot_be_their_own_masters_unnoticed(decoder):
    with pytest.raises(ValueError, match="parameters are the masters: they must be float32"):
        wrap(decoder(torch.bfloat16), FALLING | {"simulate": "autograd"}, STEPS)


def test_distributed_data_parallel_comes_after_learned_scales(decoder, tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = decoder()
        with pytest.raises(ValueError, match="wrap that in DistributedDataParallel afterwards"):
            wrap(nn.parallel.DistributedDataParallel(model), LEARNED, STEPS)
        with pytest.raises(ValueError, match="wrap that in DistributedDataParallel afterwards"):
            wrap(torch.compile(nn.parallel.DistributedDataParallel(model)), LEARNED, STEPS)
        optimizer = wrap(model, LEARNED, STEPS)
        train_step(nn.parallel.DistributedDataParallel(model), optimizer, 0)
    finally:
        torch.distributed.destroy_process_group()


def test_a_scheduler_comes_after_learned_scales(decoder):
    model = decoder()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.LinearLR(adamw, total_iters=STEPS)
    with pytest.raises(ValueError, match=r"^layers\.0\.q_proj\.weight: .* scheduler after MoQ"):
        moq.MoQOptimizer(adamw, model, LEARNED, total_steps=STEPS, verbose=False)
    moq.MoQOptimizer(adamw, model, FALLING, total_steps=STEPS, verbose=False)  # has all its groups
    optimizer = wrap(decoder(), LEARNED, STEPS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
    train_step(optimizer.model, optimizer, 0)
    schedule.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


@pytest.mark.parametrize("simulate", ["in_place", "autograd"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_model_is_wrapped_again_as_if_for_the_first_time(decoder, simulate, copied):
    model = decoder()
    first = wrap(model, LEARNED)
    train_step(model, first, 0)
    original = model
    if copied:  # while the first training goes on
        model = copy.deepcopy(model)
    fresh = decoder()
    if not copied:
        del first
    config = FALLING | {"simulate": simulate, "blend_steps": 2}
    values = {plain_name(name): p for name, p in model.named_parameters()}
    fresh.load_state_dict({name: values[name] for name in fresh.state_dict()})
    optimizers = wrap(model, config, STEPS), wrap(fresh, config, STEPS)
    for step in range(STEPS):
        losses = map(train_step, (model, fresh), optimizers, (step, step))
        assert len(set(losses)) == 1
    assert sorted(model.state_dict()) == sorted(fresh.state_dict())
    if copied:
        train_step(original, first, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_learned_scales_that_are_not_finite_are_refused_when_a_model_is_loaded(decoder, value):
    model = decoder()
    optimizer = wrap(model, LEARNED, STEPS)
    train_step(model, optimizer, 0)
    scales = "layers.0.q_proj.parametrizations.weight.0.absmax"
    good = {name: v.clone() for name, v in model.state_dict().items()}
    bad = good | {scales: torch.full_like(good[scales], value)}
    model.load_state_dict(bad)
    loss_of(model, batch(1)).backward()
    with pytest.raises(ValueError, match=r"learned scales of layers\.0\.q_proj.*must be finite"):
        optimizer.step()
    assert optimizer.steps == 1
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is loaded now is what was there at the step
        model.load_state_dict(good)
        train_step(model, optimizer, 1)
    with pytest.warns(UserWarning, match="layers.0.q_proj"):
        model.load_state_dict(good | {scales: good[scales] * 2})
        train_step(model, optimizer, 2)
    assert optimizer.steps == 3
