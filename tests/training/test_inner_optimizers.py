"""Inner optimizers: those of torch and transformers, and third-party ones by their interface."""

import copy
import warnings
from collections import defaultdict

import pytest
import torch
from overflows import train_float16
from tiny_decoder import (
    FALLING_STOCHASTIC,
    assert_same,
    assert_simulated,
    batch,
    loss_of,
    masters,
    through_a_file,
    train_step,
    weights,
    wrap,
)
from torch import nn

from moq import AdamW, MoQOptimizer

NOTHING = {"rules": [{"match": "*", "exclude": True}]}
STEPS = 10


class EightBitAdam:
    """Adam whose moments are bytes with a scale for each block, as bitsandbytes keeps them.

    It is no torch.optim.Optimizer; it has what one has.
    """

    BLOCK = 32

    def __init__(self, params, lr: float) -> None:
        self.param_groups = [{"params": list(params), "lr": lr, "betas": (0.9, 0.99)}]
        self.state = defaultdict(dict)

    def add_param_group(self, group: dict) -> None:
        self.param_groups.append({"lr": 1e-2, "betas": (0.9, 0.99)} | group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def quantize(self, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = nn.functional.pad(moment.flatten(), (0, -moment.numel() % self.BLOCK))
        blocks = blocks.view(-1, self.BLOCK)
        absmax = blocks.abs().amax(1)
        codes = (blocks / absmax.clamp_min(1e-20)[:, None] * 127).round() + 128
        return codes.to(torch.uint8), absmax

    def dequantize(self, codes: torch.Tensor, absmax: torch.Tensor, like: torch.Tensor):
        moment = (codes.float() - 128) / 127 * absmax[:, None]
        return moment.flatten()[: like.numel()].view_as(like)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    for name in ("1", "2"):
                        zero = self.quantize(torch.zeros_like(p, dtype=torch.float32))
                        state[f"state{name}"], state[f"absmax{name}"] = zero
                    state["step"] = 0
                state["step"] += 1
                moments = []
                for name, beta, power in zip(("1", "2"), group["betas"], (1, 2), strict=True):
                    old = self.dequantize(state[f"state{name}"], state[f"absmax{name}"], p)
                    new = beta * old + (1 - beta) * p.grad.float() ** power
                    state[f"state{name}"], state[f"absmax{name}"] = self.quantize(new)
                    moments.append(new / (1 - beta ** state["step"]))
                p.sub_(group["lr"] * moments[0] / (moments[1].clamp_min(0).sqrt() + 1e-6))

    def state_dict(self) -> dict:
        raise AssertionError("the wrapper's own is complete")

    def load_state_dict(self, state_dict: dict) -> None:
        """Keeps bytes: torch's would make them as wide as the parameter."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        state = copy.deepcopy(state_dict["state"])
        self.state = defaultdict(dict, {parameters[key]: entry for key, entry in state.items()})
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})


def transformers_adafactor(parameters):
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor(parameters, lr=None)  # with a learning rate of its own


MAKERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "AdamW, lr a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True),
    "moq.AdamW": lambda p: AdamW(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adafactor foreach": lambda p: torch.optim.Adafactor(p, lr=1e-2, foreach=True),
    "transformers' Adafactor": transformers_adafactor,
    "8 bits, no subclass": lambda p: EightBitAdam(p, lr=1e-2),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request):
    return request.param


def wrapped(model, make, config=FALLING_STOCHASTIC, total_steps=STEPS) -> MoQOptimizer:
    inner = make(model.parameters())
    return MoQOptimizer(inner, model, config, total_steps=total_steps, verbose=False)


@pytest.mark.filterwarnings("ignore:MoQOptimizer. no weight is quantized")
def test_without_quantized_parameters_the_trajectory_is_the_plain_optimizers(decoder, make):
    plain, model = decoder(), decoder()
    reference, optimizer = make(plain.parameters()), wrapped(model, make, NOTHING)
    optimizer.state_dict()  # asking for state before the first step must leave no trace
    for step in range(5):
        assert train_step(plain, reference, step) == train_step(model, optimizer, step)
    assert_same(weights(model), weights(plain))


def test_masters_follow_the_plain_optimizer_when_gradients_are_the_same(decoder, make):
    plain, model = decoder(), decoder()
    reference, optimizer = make(plain.parameters()), wrapped(model, make)
    optimizer.state_dict()
    for step in range(STEPS):
        torch.manual_seed(step)
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        reference.step()
        optimizer.step()
        assert_simulated(optimizer)
    expected = weights(plain)
    assert_same(
        {name: value.detach() for name, value in masters(optimizer).items()},
        {name: expected[name] for name in masters(optimizer)},
    )
    assert set(optimizer.num_bits.values()) == {4}


@pytest.mark.parametrize("saved_at", [0, 4])
def test_a_resumed_run_is_the_uninterrupted_one(decoder, make, saved_at):
    whole = decoder()
    reference = wrapped(whole, make)
    for step in range(saved_at):
        train_step(whole, reference, step)
    states = through_a_file([whole.state_dict(), reference.state_dict()])
    model = decoder()
    resumed = wrapped(model, make)
    model.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for step in range(saved_at, STEPS):
        assert train_step(whole, reference, step) == train_step(model, resumed, step)
    assert_same(weights(model), weights(whole))
    assert resumed.num_bits == reference.num_bits


def test_moments_of_8_bits_stay_bytes_of_the_masters(decoder):
    model = decoder()
    optimizer = wrapped(model, MAKERS["8 bits, no subclass"])
    train_step(model, optimizer, 0)
    optimizer.load_state_dict(optimizer.state_dict())
    entry = optimizer.state[model.layers[0].q_proj.weight]
    assert entry["state1"].dtype == torch.uint8
    assert entry["absmax1"].shape == (5,)  # 144 weights in blocks of 32
    assert entry.keys() == {"state1", "absmax1", "state2", "absmax2", "step", "moq_master"}


def test_an_object_without_the_interface_is_refused(decoder):
    model = decoder()

    class Half:
        param_groups = [{"params": list(model.parameters())}]  # noqa: RUF012
        state = {}  # noqa: RUF012

        def step(self):
            pass

    with pytest.raises(TypeError, match="got Half without state_dict, load_state_dict"):
        MoQOptimizer(Half(), model, total_steps=5)


SCHEDULERS = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=STEPS),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "warm-up, decay": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
        ],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_set_what_they_set_without_the_wrapper(decoder, schedule):
    plain, model = decoder(), decoder()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizers = [adamw, wrap(model, FALLING_STOCHASTIC, STEPS)]
    schedulers = [schedule(optimizer) for optimizer in optimizers]
    metric = [1.0] if hasattr(schedulers[0], "patience") else []  # a loss that does not fall
    seen = [[], []]
    for step in range(STEPS):
        for side, m in enumerate((plain, model)):
            train_step(m, optimizers[side], step)
            schedulers[side].step(*metric)
            group = optimizers[side].param_groups[0]
            seen[side].append((group["lr"], group["betas"]))
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 1
    assert optimizers[1].inner.param_groups[0]["lr"] == seen[1][-1][0]
    assert optimizers[1].steps == STEPS


# ------------------------------------------------------------------------------ float16, scaled


HALF = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4, fused=True),
    "moq.AdamW": lambda p: AdamW(p, lr=1e-2, eps=1e-4),
}


@pytest.mark.parametrize("make", HALF.values(), ids=HALF)
def test_a_float16_model_trains_with_gradscaler(decoder, make):
    """torch refuses to unscale float16 gradients outside a fused optimizer; masters need not."""
    model = decoder(torch.float16)
    optimizer = wrapped(model, make)
    assert {master.dtype for master in masters(optimizer).values()} == {torch.float32}
    train_float16(model, optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_below_float16_reaches_the_master_scaled(fused):
    layer = nn.Linear(4, 2, bias=False).half()
    nn.init.constant_(layer.weight, 2.0**-12)
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0, fused=fused)
    optimizer = MoQOptimizer(sgd, layer, FALLING_STOCHASTIC, total_steps=STEPS, verbose=False)
    before = masters(optimizer)["weight"].detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    x = torch.full((1, 4), 2.0**-13, dtype=torch.float16)
    scaler.scale(layer(x).float().sum() * 2.0**-13).backward()  # 2^-26 is no number of float16
    scaler.step(optimizer)
    scaler.update()
    moved = before - masters(optimizer)["weight"].detach()
    torch.testing.assert_close(moved, torch.full((2, 4), 2.0**-26))


def eps_warnings(model, make, config=FALLING_STOCHASTIC) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MoQOptimizer(make(model.parameters()), model, config, total_steps=10, verbose=False)
    return [str(w.message) for w in caught if " eps " in str(w.message)]


def test_an_eps_that_is_0_in_float16_is_warned_of(decoder):
    adamw = torch.optim.AdamW
    (warning,) = eps_warnings(decoder(torch.float16), adamw)
    # biases, norms, embedding and head
    assert "eps must be at least 6e-08 for the 12 float16 parameters that have no" in warning
    assert "got 1e-08" in warning


@pytest.mark.parametrize(
    ("dtype", "make", "frozen"),
    [
        (torch.float16, lambda p: torch.optim.AdamW(p, eps=1e-4), False),
        (torch.float16, lambda p: torch.optim.SGD(p, lr=0.1), False),
        (torch.float16, torch.optim.AdamW, True),
        (torch.bfloat16, torch.optim.AdamW, False),
        (torch.float32, torch.optim.AdamW, False),
    ],
)
def test_an_eps_that_harms_no_parameter_is_not_warned_of(decoder, dtype, make, frozen):
    model = decoder(dtype)
    if frozen:  # all that has no master
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("_proj.weight"))
    assert eps_warnings(model, make) == []


def test_float32_weights_train_under_float16_autocast_with_gradscaler(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING_STOCHASTIC, STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=100)
    skipped = 0
    for step in range(30):
        before = optimizer.steps
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch(step))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped += optimizer.steps == before
        assert_simulated(optimizer)
    assert 0 < skipped < 20  # a scale of 2^30 overflows, and comes down
    assert optimizer.steps == 30 - skipped
    assert set(optimizer.num_bits.values()) == {4}
