"""moq.AdamW: torch's fused AdamW number for number but for rounding, and inside MoQOptimizer."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from on_gpu import never_waiting
from overflows import train_captured, train_float16
from tiny_decoder import (
    FALLING_STOCHASTIC,
    assert_same,
    assert_simulated,
    batch,
    copies,
    loss_of,
    masters,
    through_a_file,
    train_step,
    weights,
    with_gradients,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import moq

STEPS = 10
ULPS = 16  # of the largest values, after 20 steps

SHAPES = [(5, 7), (33,), (), (0, 3), (64, 32), (1,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters(device, dtypes=(torch.float32,), seed=0) -> list[nn.Parameter]:
    """One of each shape and dtype, one of them stored the other way round."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator).to(device, d) for d in dtypes for s in SHAPES]
    values[0] = values[0].t().contiguous().t()
    return [nn.Parameter(value) for value in values]


def set_gradients(*sides: list[nn.Parameter], step: int) -> None:
    """The same random ones on all sides, each in the dtype and layout of its parameter."""
    generator = torch.Generator().manual_seed(100 + step)
    for alike in zip(*sides, strict=True):
        gradient = torch.randn(alike[0].shape, generator=generator)
        for parameter in alike:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, ulps: float = ULPS) -> None:
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    eps = torch.finfo(expected.dtype).eps
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=ulps * eps * largest)


def assert_same_training(own, reference, optimizer, expected) -> None:
    """What torch's optimizer made of its parameters, and what it keeps."""
    for p, q in zip(own, reference, strict=True):
        # A moment in 16 bits may be rounded to the other neighbour; what follows differs by that.
        ulps = ULPS if p.dtype == torch.float32 else 4
        assert_close(p.detach(), q.detach(), ulps)
        assert optimizer.state[p].keys() == expected.state[q].keys()
        for key, value in expected.state[q].items():
            # Of torch's kernels that for CUDA rounds 1 - beta2 to float32.
            beside = 200 if key == "exp_avg_sq" and p.is_cuda else ulps
            assert_close(optimizer.state[p][key], value.to(optimizer.state[p][key].device), beside)


OPTIONS = {
    "defaults": {},
    "no decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "other factors": {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    "no averages": {"betas": (0.0, 0.0)},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [DTYPES], ids=str)
def test_twenty_steps_are_torchs(device, dtypes, options):
    if device == "cpu" and options.get("capturable"):
        pytest.skip("torch's takes it on accelerators only")
    own, reference = parameters(device, dtypes), parameters(device, dtypes)
    options = {"lr": 1e-2, "eps": 1e-4} | options
    optimizer = moq.AdamW(own, **options)
    expected = torch.optim.AdamW(reference, fused=True, **options)
    for step in range(20):
        set_gradients(own, reference, step=step)
        optimizer.step()
        expected.step()
    assert_same_training(own, reference, optimizer, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_of_float32_parameters_are_taken_as_their_casts(device, dtype):
    own, reference = parameters(device), parameters(device)
    optimizer = moq.AdamW(own, lr=1e-2)
    expected = moq.AdamW(reference, lr=1e-2)
    for p in own:
        p.grad_dtype = None
    for step in range(5):
        set_gradients(reference, step=step)
        for p, q in zip(own, reference, strict=True):
            p.grad = q.grad.to(dtype)
            q.grad = p.grad.float()
        optimizer.step()
        expected.step()
    assert_same(dict(enumerate(own)), dict(enumerate(reference)))


def test_param_groups_tensor_rates_and_schedulers(device):
    own, reference = parameters(device), parameters(device)

    def made(kind, side, **options):
        groups = [
            {"params": side[:2], "lr": torch.tensor(0.02, device=device), "weight_decay": 0.0},
            {"params": side[2:], "betas": (0.8, 0.95)},
        ]
        optimizer = kind(groups, lr=torch.tensor(0.01), **options)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)

    optimizer, schedule = made(moq.AdamW, own)
    expected, expected_schedule = made(torch.optim.AdamW, reference, fused=True)
    for step in range(6):
        set_gradients(own, reference, step=step)
        if step == 3:
            own[1].grad = reference[1].grad = None  # its step is not counted
        optimizer.step()
        expected.step()
        schedule.step()
        expected_schedule.step()
    assert_same_training(own, reference, optimizer, expected)
    assert optimizer.state[own[1]]["step"] == 5


def test_gradients_of_another_layout_are_read_by_their_indices(device):
    own, reference = parameters(device)[4:5], parameters(device)[4:5]
    optimizer, expected = moq.AdamW(own, lr=0.1), moq.AdamW(reference, lr=0.1)
    set_gradients(own, reference, step=0)
    own[0].grad = own[0].grad.t().contiguous().t()
    optimizer.step()
    expected.step()
    assert torch.equal(own[0], reference[0])


def test_a_closure_is_evaluated_with_gradients():
    weight = nn.Parameter(torch.ones(3))
    optimizer = moq.AdamW([weight], lr=0.5, weight_decay=0.0)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.5))


def test_infinite_parameters_stay_without_a_decay(device):
    (weight,) = with_gradients(torch.tensor([float("-inf"), 1.0], device=device))
    moq.AdamW([weight], lr=0.5, weight_decay=0.0).step()
    torch.testing.assert_close(weight.detach().cpu(), torch.tensor([float("-inf"), 0.5]))


@pytest.mark.parametrize("start", [0, 1], ids=["itself", "beside it"])
def test_a_gradient_in_the_memory_of_its_parameter_is_that_before_the_step(device, start):
    memory = torch.linspace(-1, 1, 10001, device=device)
    own, reference = nn.Parameter(memory[:10000]), nn.Parameter(memory[:10000].clone())
    reference.grad = memory[start:][:10000].clone()
    own.grad = memory[start:][:10000]
    for side in (own, reference):
        moq.AdamW([side], lr=0.1).step()
    assert torch.equal(own, reference)


def test_a_model_may_take_another_memory_format(device):
    whole, changed = (nn.Conv2d(3, 4, 3, device=device) for _ in range(2))
    changed.load_state_dict(whole.state_dict())
    optimizers = [moq.AdamW(module.parameters()) for module in (whole, changed)]
    for step in range(2):
        set_gradients(list(whole.parameters()), list(changed.parameters()), step=step)
        for optimizer in optimizers:
            optimizer.step()
        changed.to(memory_format=torch.channels_last)
    assert_same(dict(whole.named_parameters()), dict(changed.named_parameters()))


def test_a_compiled_step_is_the_same(device):
    own, reference = parameters(device), parameters(device)
    optimizer, expected = moq.AdamW(own, lr=0.1), moq.AdamW(reference, lr=0.1)
    step_compiled = torch.compile(optimizer.step)
    for step in range(3):
        set_gradients(own, reference, step=step)
        step_compiled()
        expected.step()
    assert_same(dict(enumerate(own)), dict(enumerate(reference)))


def test_without_a_gradient_nothing_happens():
    own = parameters("cpu")
    optimizer = moq.AdamW(own)
    optimizer.step()
    assert not optimizer.state
    assert_same(dict(enumerate(own)), dict(enumerate(parameters("cpu"))))


# ----------------------------------------------------------------------------------- the state


@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("to_torch", [False, True])
def test_state_dicts_load_in_both_directions(device, to_torch, form):
    def torchs(side):
        return torch.optim.AdamW(side, lr=1e-2, **form)

    def moqs(side):
        return moq.AdamW(side, lr=1e-2)

    first, second = (moqs, torchs) if to_torch else (torchs, moqs)
    whole, reference = parameters(device), moqs(parameters(device))
    begun = first(whole)
    for step in range(3):
        set_gradients(whole, reference.param_groups[0]["params"], step=step)
        begun.step()
        reference.step()
    resumed_parameters = [nn.Parameter(p.detach().clone()) for p in whole]
    resumed = second(resumed_parameters)
    resumed.load_state_dict(through_a_file(begun.state_dict()))
    for step in range(3, 6):
        set_gradients(resumed_parameters, reference.param_groups[0]["params"], step=step)
        resumed.step()
        reference.step()
    for p, q in zip(resumed_parameters, reference.param_groups[0]["params"], strict=True):
        assert_close(p.detach(), q.detach())
        assert resumed.state[p]["step"] == 6


@pytest.mark.parametrize("kind", ["a number", "one for all"])
def test_steps_of_other_forms_are_counted(device, kind):
    own = with_gradients(torch.ones(3, device=device), torch.ones(2, device=device))
    optimizer = moq.AdamW(own)
    optimizer.step()
    state = optimizer.state_dict()
    number = 5 if kind == "a number" else torch.tensor(5.0, device=device)
    for entry in state["state"].values():
        entry["step"] = number
    optimizer.load_state_dict(state)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in own] == [6, 6]


def test_a_hook_may_make_a_state_possible():
    own = with_gradients(torch.ones(3))
    state = torch.optim.AdamW(own, amsgrad=True).state_dict()
    optimizer = moq.AdamW(own)

    def without_amsgrad(_, state):
        groups = [group | {"amsgrad": False} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(without_amsgrad)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["amsgrad"] is False


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_as_the_original(device, copied):
    own = parameters(device)
    optimizer = moq.AdamW(own, lr=1e-2)
    set_gradients(own, step=0)
    optimizer.step()
    other = copied(optimizer)
    its = other.param_groups[0]["params"]
    set_gradients(own, its, step=1)
    optimizer.step()
    other.step()
    assert_same(dict(enumerate(its)), dict(enumerate(own)))
    assert other._step_supports_amp_scaling


# ------------------------------------------------------------------------------- inside the wrapper


def wrapped(model: nn.Module, total_steps: int = STEPS, **options) -> moq.MoQOptimizer:
    adamw = moq.AdamW(model.parameters(), **({"lr": 1e-2, "eps": 1e-4} | options))
    return moq.MoQOptimizer(
        adamw, model, FALLING_STOCHASTIC, total_steps=total_steps, verbose=False
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masters_follow_torchs_adamw_over_casts_of_the_gradients(decoder, dtype, device):
    model, other = decoder(dtype).to(device), decoder(dtype).to(device)
    optimizer = wrapped(model)
    fused = torch.optim.AdamW(other.parameters(), lr=1e-2, eps=1e-4, fused=True)
    reference = moq.MoQOptimizer(fused, other, FALLING_STOCHASTIC, total_steps=STEPS, verbose=False)
    for step in range(STEPS):
        set_gradients(list(model.parameters()), list(other.parameters()), step=step)
        optimizer.step()
        reference.step()
        assert_simulated(optimizer)
    expected = masters(reference)
    for name, master in masters(optimizer).items():
        assert master.dtype == torch.float32
        assert_close(master.detach(), expected[name].detach())
    assert set(optimizer.num_bits.values()) == {4}


class Watched(torch.optim.SGD):
    """Notes the dtypes of the gradients that its parameters have."""

    takes_low_precision_gradients = True

    def step(self, closure=None):
        self.seen = {p.grad.dtype for group in self.param_groups for p in group["params"]}


@pytest.mark.parametrize("takes", [False, True])
def test_an_optimizer_that_takes_them_gets_the_gradients_as_they_are(decoder, takes):
    model = decoder(torch.bfloat16)
    inner = Watched(model.parameters(), lr=0.1)
    inner.takes_low_precision_gradients = takes
    optimizer = moq.MoQOptimizer(inner, model, FALLING_STOCHASTIC, total_steps=STEPS, verbose=False)
    train_step(model, optimizer, 0)
    others = {torch.bfloat16}  # those without a master
    assert inner.seen == (others if takes else others | {torch.float32})
    assert all(master.grad is None for master in masters(optimizer).values())


def test_gradients_that_are_wider_than_masters_are_cast_all_the_same():
    layer = nn.Linear(4, 2, bias=False).bfloat16()
    layer.weight.grad_dtype = None
    inner = Watched(layer.parameters(), lr=0.1)
    config = FALLING_STOCHASTIC | {"master_dtype": "parameter"}
    optimizer = moq.MoQOptimizer(inner, layer, config, total_steps=STEPS, verbose=False)
    layer.weight.grad = torch.ones(2, 4)
    optimizer.step()
    assert inner.seen == {torch.bfloat16}


def test_gradients_that_the_wrapper_unscales_are_cast_before():
    """In float16 the smallest of them would vanish."""
    layer = nn.Linear(4, 2, bias=False).half()
    inner = Watched(layer.parameters(), lr=0.1)
    optimizer = moq.MoQOptimizer(inner, layer, FALLING_STOCHASTIC, total_steps=STEPS, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(layer(torch.ones(1, 4).half()).float().sum()).backward()
    scaler.step(optimizer)
    assert inner.seen == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved_at", [0, 4])
def test_a_resumed_run_is_the_uninterrupted_one(decoder, device, dtype, saved_at):
    whole = decoder(dtype).to(device)
    reference = wrapped(whole)
    for step in range(saved_at):
        train_step(whole, reference, step)
    states = through_a_file({"model": whole.state_dict(), "optimizer": reference.state_dict()})
    model = decoder(dtype).to(device)
    resumed = wrapped(model)
    model.load_state_dict(states["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(states["optimizer"])
    for step in range(saved_at, STEPS):
        assert train_step(whole, reference, step) == train_step(model, resumed, step)
    assert_same(weights(model), weights(whole))
    assert_same(copies(resumed), copies(reference))


def test_a_run_with_torchs_adamw_goes_on_with_it(decoder, device):
    model, other = decoder(torch.bfloat16).to(device), decoder(torch.bfloat16).to(device)
    fused = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, fused=True)
    begun = moq.MoQOptimizer(fused, model, FALLING_STOCHASTIC, total_steps=STEPS, verbose=False)
    for step in range(4):
        train_step(model, begun, step)
    resumed = wrapped(other)
    resumed.load_state_dict(through_a_file(begun.state_dict()))
    assert_same(copies(resumed), copies(begun))
    set_gradients(list(model.parameters()), list(other.parameters()), step=4)
    begun.step()
    resumed.step()
    expected = masters(begun)
    for name, master in masters(resumed).items():
        assert_close(master.detach(), expected[name].detach())


def test_an_overflow_of_float16_changes_nothing(decoder, device):
    model = decoder(torch.float16).to(device)
    train_float16(model, wrapped(model))


def test_gradscaler_without_the_wrapper_is_torchs(device):
    own, reference = parameters(device, [torch.float32]), parameters(device, [torch.float32])
    optimizers = [moq.AdamW(own, lr=1e-2), torch.optim.AdamW(reference, lr=1e-2, fused=True)]
    scalers = [torch.amp.GradScaler(device, init_scale=24.0) for _ in optimizers]
    for step in range(4):
        set_gradients(own, reference, step=step)
        for side, optimizer, scaler in zip((own, reference), optimizers, scalers, strict=True):
            scaler.scale(torch.zeros((), device=device))  # makes its scale
            if step == 1:
                side[0].grad[0, 0] = float("nan")
            scaler.step(optimizer)
            scaler.update()
    assert_same_training(own, reference, *optimizers)
    assert optimizers[0].state[own[0]]["step"] == 3


@pytest.fixture
def mesh(tmp_path):
    """A job of one rank."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_the_shard_of_a_dtensor_is_updated(mesh, decoder):
    from torch.distributed.fsdp import fully_shard

    model, whole = decoder(torch.bfloat16), decoder(torch.bfloat16)
    fully_shard(model, mesh=mesh)
    optimizer, reference = wrapped(model), wrapped(whole)
    for step in range(4):
        assert train_step(model, optimizer, step) == train_step(whole, reference, step)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)


def test_a_dtensor_counts_what_is_written_to_it(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    version = weight._version
    moq.AdamW([weight], lr=0.5, weight_decay=0.0).step()
    torch.testing.assert_close(weight.full_tensor().detach(), torch.full((4, 3), 0.5))
    assert weight._version > version


# ------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_captured_step_replays_across_bit_drops_and_overflows(decoder, gpu, dtype):
    scaled = dtype != torch.bfloat16  # torch has no scaler for its gradients
    overflows = (1, 5, 6) if scaled else ()

    def trained(captured: bool) -> tuple[dict, moq.MoQOptimizer, float]:
        model = decoder(dtype).to(gpu)
        optimizer = wrapped(model, 12, lr=torch.tensor(1e-2, device=gpu), capturable=True)
        scaler = torch.amp.GradScaler(gpu, init_scale=64.0, growth_interval=1000, enabled=scaled)
        rate = optimizer.param_groups[0]["lr"]
        values = train_captured(
            model,
            optimizer,
            scaler,
            overflows,
            captured=captured,
            before_step=lambda number: rate.fill_(1e-2 / (1 + number)),
        )
        return values, optimizer, scaler.get_scale()

    expected, eager, scale = trained(captured=False)
    actual, replayed, replayed_scale = trained(captured=True)
    assert replayed.steps == eager.steps == 14 - len(overflows)
    assert scale == replayed_scale == (8.0 if scaled else 1.0)
    assert set(replayed.num_bits.values()) == {4}
    assert_same(actual, expected)
    assert_simulated(replayed)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device(decoder, gpu):
    model = decoder(torch.bfloat16).to(gpu)
    optimizer = wrapped(model)
    for step in range(2):
        loss_of(model, batch(step)).backward()
        with never_waiting() if step else nullcontext():
            optimizer.step()
    assert optimizer.steps == 2


@pytest.mark.gpu
def test_no_float32_gradients_are_made(gpu):
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))
    model = model.to(gpu, torch.bfloat16)
    optimizer = wrapped(model)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
    assert torch.cuda.max_memory_allocated() - held < 2**20
