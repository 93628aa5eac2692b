"""What is odd or wrong in a training: a clear error, or the documented result; no state is lost.

Elsewhere: weights that are not finite (test_optimizer_values), a group_size that does not divide
(test_rules), a model moved to a GPU after wrapping (test_optimizer_cuda).
"""

import copy
import gc
import warnings

import pytest
import torch
from tiny_decoder import (
    FALLING,
    assert_same,
    assert_simulated,
    batch,
    copies,
    loss_of,
    masters,
    snapped,
    train_step,
    weights,
    wrap,
)
from torch import nn

from moq import MoQOptimizer

STEPS = 12
FORMS = ["in_place", "autograd"]


# ---------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_reaches_one_weight_and_no_other_group(decoder, bad):
    """As in the inner optimizer alone, but that a group with a NaN has no scale."""
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_step(model, optimizer, 0)
    loss_of(model, batch(1)).backward()
    model.layers[0].q_proj.weight.grad[1, 2] = bad
    optimizer.step()
    assert optimizer.steps == 2
    for name, master in masters(optimizer).items():
        wrong = torch.zeros_like(master, dtype=torch.bool)
        if name == "layers.0.q_proj.weight":
            wrong[1, 2] = True
        assert torch.equal(master.isnan(), wrong), name
        rows = wrong.any(1, keepdim=True).expand_as(wrong)
        assert torch.equal(model.get_parameter(name).isnan(), rows), name


def test_after_a_bad_gradient_the_last_state_takes_up_the_training_bit_for_bit(decoder):
    undisturbed, model = decoder(), decoder()
    expected, optimizer = wrap(undisturbed, FALLING), wrap(model, FALLING)
    for step in range(3):
        train_step(undisturbed, expected, step)
        train_step(model, optimizer, step)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, STEPS):
        assert train_step(undisturbed, expected, step) == train_step(model, optimizer, step)
    assert_same(copies(optimizer), copies(expected))


@pytest.mark.parametrize("form", FORMS)
def test_after_the_guard_that_the_page_names_the_training_goes_on_as_without_the_batch(
    decoder, form
):
    def guarded_step(step: int, spoilt: bool = False) -> None:
        loss_of(model, batch(step)).backward()
        if spoilt:
            next(p for n, p in model.named_parameters() if "q_proj" in n).grad[1] = float("nan")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

    config = FALLING | {"simulate": form, "rounding": "stochastic"}
    ends = []
    for with_bad_batch in (True, False):
        model = decoder()
        optimizer = wrap(model, config)
        for step in range(6):
            if with_bad_batch and step in (0, 3):
                with pytest.raises(RuntimeError, match="non-finite"):
                    guarded_step(20, spoilt=True)
                optimizer.zero_grad()
                assert optimizer.steps == step
            guarded_step(step)
        ends.append(weights(model) | copies(optimizer))
    assert_same(*ends)


def test_weights_that_are_not_finite_are_not_exported(decoder, tmp_path):
    model = decoder()
    optimizer = wrap(model, FALLING)
    for p in model.layers.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"layers\.0\.q_proj\.weight: expected finite master"):
        optimizer.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_before_any_backward_is_none(decoder, form):
    model, straight = decoder(), decoder()
    optimizer = wrap(model, FALLING | {"simulate": form, "rounding": "stochastic"})
    expected = wrap(straight, FALLING | {"simulate": form, "rounding": "stochastic"})
    before, full = weights(model), copies(optimizer)
    optimizer.step()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert optimizer.steps == 0
    assert_same(weights(model), before)
    assert_same(copies(optimizer), full)
    for step in range(STEPS):
        assert train_step(model, optimizer, step) == train_step(straight, expected, step)
        optimizer.step()  # the gradients are gone
    assert optimizer.steps == STEPS


def test_one_gradient_is_enough_for_a_step(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    full = copies(optimizer)
    model.layers[1].down_proj.weight.grad = torch.ones(12, 20)
    optimizer.step()
    assert optimizer.steps == 1
    moved = [name for name, master in masters(optimizer).items() if (master != full[name]).any()]
    assert moved == ["layers.1.down_proj.weight"]


def test_freezing_and_unfreezing_during_training(decoder):
    model = decoder()
    model.layers[0].requires_grad_(False)
    optimizer = wrap(model, FALLING)
    start = copies(optimizer)
    train_step(model, optimizer, 0)
    assert torch.equal(copies(optimizer)["layers.0.v_proj.weight"], start["layers.0.v_proj.weight"])
    model.layers[0].requires_grad_(True)
    model.layers[1].requires_grad_(False)
    middle = copies(optimizer)
    train_step(model, optimizer, 1)
    for name, master in masters(optimizer).items():
        assert bool((master != middle[name]).any()) == name.startswith("layers.0"), name
    assert_simulated(optimizer)


# ------------------------------------------------------------------------------------- shapes


GRIDS = {
    "tensor": {"granularity": "per_tensor"},
    "channel": {"granularity": "per_channel"},
    "group of 1": {"granularity": "per_group", "group_size": 1},
    "binary": {"granularity": "per_channel", "mode": "binary", "target_bits": 1},
    "asymmetric": {"granularity": "per_channel", "mode": "asymmetric"},
    "asymmetric groups of 1": {"granularity": "per_group", "group_size": 1, "mode": "asymmetric"},
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("form", FORMS)
def test_empty_single_and_zero_weights_are_trained(grid, form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: initialising an empty matrix does nothing
        model = nn.ModuleList(nn.Linear(*sizes, bias=False) for sizes in [(6, 4), (0, 4), (4, 0)])
    model.append(nn.Linear(1, 1, bias=False))
    nn.init.zeros_(model[0].weight[2:])
    optimizer = wrap(model, FALLING | grid | {"simulate": form}, STEPS)
    for step in range(STEPS):
        for layer in model:
            x = torch.ones(2, layer.in_features)
            (layer(x)[:, :2].square().sum() / (step + 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model[0].weight.isfinite().all()
        assert not model[0].weight[2:].any()  # no gradient has reached the channels of zeros
        assert model[3].weight.item() != 0
    assert [tuple(layer.weight.shape) for layer in model] == [(4, 6), (4, 0), (0, 4), (1, 1)]
    assert set(optimizer.num_bits.values()) == {grid.get("target_bits", 4)}
    assert len(optimizer.quantized_parameters()) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_lies_transposed_in_memory_is_trained_as_any_other(dtype, form):
    models = [nn.Linear(6, 4, bias=False).to(dtype) for _ in range(2)]
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    models[0].weight = nn.Parameter(values.clone())
    models[1].weight = nn.Parameter(values.t().contiguous().t())
    assert not models[1].weight.is_contiguous()
    config = FALLING | {"rounding": "stochastic", "simulate": form, "master_dtype": "parameter"}
    optimizers = [wrap(model, config, STEPS) for model in models]
    address = models[1].weight.data_ptr() if form == "in_place" else None
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            train_on = torch.randn(3, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
            model(train_on).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(models[0].weight, models[1].weight)
    assert address in (None, models[1].weight.data_ptr())


@pytest.mark.parametrize(
    "view", [lambda: torch.randn(4, 12)[:, ::2], lambda: torch.randn(1, 6).expand(4, 6)]
)
def test_a_weight_with_gaps_or_overlaps_is_refused_with_the_remedy(view):
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(view())
    with pytest.raises(ValueError, match=r"weight: .* without gaps or overlaps.*contiguous\(\)"):
        wrap(model, FALLING)
    model.weight = nn.Parameter(model.weight.detach().contiguous())
    assert_simulated(wrap(model, FALLING))


# ----------------------------------------------------------------------- what happens to models


def test_a_model_converted_after_wrapping_is_refused_and_loses_nothing(decoder):
    model, straight = decoder(), decoder()
    optimizer, expected = wrap(model, FALLING), wrap(straight, FALLING)
    for step in range(3):
        train_step(model, optimizer, step)
        train_step(straight, expected, step)
    full = copies(optimizer)
    loss_of(model, batch(3)).backward()
    model.bfloat16()
    for use in (
        optimizer.step,
        optimizer.quantized_parameters,
        optimizer.full_precision().__enter__,
    ):
        with pytest.raises(
            RuntimeError, match=r"q_proj\.weight must stay torch\.float32.*bfloat16"
        ):
            use()
    assert optimizer.steps == 3
    assert_same(copies(optimizer), full)

    fresh = decoder()
    resumed = wrap(fresh, FALLING)
    resumed.load_state_dict(optimizer.state_dict())
    quantized = set(optimizer.num_bits)
    with torch.no_grad():  # what is not quantized was rounded by the conversion
        for name, p in straight.named_parameters():
            if name not in quantized:
                fresh.get_parameter(name).copy_(p)
    for step in range(3, STEPS):
        assert train_step(fresh, resumed, step) == train_step(straight, expected, step)


def test_two_wrappers_on_one_parameter_are_refused(decoder):
    model = decoder()
    first = wrap(model, FALLING)
    train_step(model, first, 0)
    before = weights(model)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj\.weight: must have one MoQOptimizer"):
        wrap(model, FALLING)
    assert_same(weights(model), before)
    train_step(model, first, 1)
    assert_simulated(first)


def test_an_optimizer_of_another_model_is_refused_with_the_remedy(decoder):
    model = decoder()
    adamw = torch.optim.AdamW(copy.deepcopy(model).parameters())
    with pytest.raises(ValueError, match=r"none is among the 24 of the Decoder: .* AdamW\(model"):
        MoQOptimizer(adamw, model, FALLING, total_steps=STEPS, verbose=False)
    assert "moq" not in str(adamw.param_groups)


def test_what_the_optimizer_holds_besides_the_model_trains_as_it_would_alone(decoder):
    """A loss's own parameter; of the model, weights that nobody gave it stay as they are, plain."""
    models = [decoder(), decoder()]
    temperatures = [nn.Parameter(torch.tensor(1.5)) for _ in models]
    plain, inner = (
        torch.optim.AdamW([model.lm_head.weight, temperature], lr=1e-2)
        for model, temperature in zip(models, temperatures, strict=True)
    )
    inner.add_param_group({"params": [models[1].layers[0].down_proj.weight], "lr": 0.0})
    config = {"start_bits": 16, "target_bits": 16, "schedule": {"period": 1}}
    with pytest.warns(UserWarning, match="^MoQOptimizer: 11 weights match the rules"):
        optimizer = MoQOptimizer(inner, models[1], config, total_steps=STEPS, verbose=False)
    assert list(optimizer.num_bits) == ["layers.0.down_proj.weight"]
    models[0].layers[0].down_proj.weight.data.copy_(models[1].layers[0].down_proj.weight)
    for step in range(3):
        for model, temperature, each in zip(models, temperatures, (plain, optimizer), strict=True):
            each.zero_grad()
            (loss_of(model, batch(step)) * temperature).backward()
            each.step()
    assert torch.equal(*temperatures)
    assert_same(weights(models[1]), weights(models[0]))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert torch.equal(*temperatures)


def test_a_group_that_another_wrapper_has_is_refused_and_leaves_both_as_they_were(decoder):
    model = decoder()
    parts = [list(layer.parameters()) for layer in model.layers]
    with pytest.warns(UserWarning, match="no param group"):
        optimizers = [
            wrap_parts(model, parts[0]),
            wrap_parts(model, parts[1]),
        ]
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj\.weight: must have one MoQOptimizer"):
        optimizers[0].add_param_group({"params": parts[1]})
    loss_of(model, batch(0)).backward()
    for optimizer in optimizers:
        optimizer.step()
        assert len(optimizer.num_bits) == 6
        assert_simulated(optimizer)


def wrap_parts(model, parameters):
    adamw = torch.optim.AdamW(parameters, lr=1e-2)
    return MoQOptimizer(adamw, model, FALLING, total_steps=STEPS, verbose=False)


def test_a_wrapper_that_is_gone_holds_no_parameter(decoder):
    model = decoder()
    first = wrap(model, FALLING)
    train_step(model, first, 0)
    cycle = [first]
    cycle.append(cycle)  # as an exception's frames or a framework's hooks make one
    gc.disable()
    try:
        del first, cycle
        with pytest.warns(UserWarning, match="lie on integer grids"):
            second = wrap(model, FALLING)
    finally:
        gc.enable()
    train_step(model, second, 0)
    assert_same(
        {name: model.get_parameter(name).detach() for name in second.num_bits}, snapped(second)
    )


# ------------------------------------------------------------------------ what is refused at start


def put_nan(model):
    with torch.no_grad():
        model.layers[1].down_proj.weight[0, 0] = float("nan")


def put_gaps(model):
    weight = model.layers[1].down_proj.weight
    weight.data = torch.zeros(12, 40)[:, ::2].copy_(weight.detach())


def put_half(model):
    model.layers[1].down_proj.bfloat16()


def nothing(model):
    pass


REFUSED = {
    "NaN": (put_nan, {}),
    "NaN, autograd": (put_nan, {"simulate": "autograd"}),
    "gaps": (put_gaps, {}),
    "half, autograd": (put_half, {"simulate": "autograd"}),
    "group_size": (nothing, {"granularity": "per_group", "group_size": 5}),
    "unfinished": (nothing, {"schedule": {"period": 50}, "sensitivity": {"rule": "none"}}),
    "no such layer": (nothing, {"rules": [{"match": "layers.7.*"}]}),
    "no such key": (nothing, {"target_bit": 4}),
}


@pytest.mark.parametrize(("change", "config"), REFUSED.values(), ids=REFUSED)
def test_a_refused_wrapper_leaves_model_and_optimizer_as_they_were(decoder, change, config):
    model = decoder()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step(model, adamw, 0)
    change(model)
    names = [name for name, _ in model.named_modules()]
    before, state = weights(model), copy.deepcopy(adamw.state_dict())
    with pytest.raises((ValueError, RuntimeError)):
        MoQOptimizer(adamw, model, FALLING | config, total_steps=STEPS, verbose=False)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in weights(model).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    after = adamw.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for key, entry in state["state"].items():
        assert all(torch.equal(after["state"][key][k], value) for k, value in entry.items())
    if change is nothing:
        train_step(model, adamw, 1)
        remedied = MoQOptimizer(adamw, model, FALLING, total_steps=STEPS, verbose=False)
        train_step(model, remedied, 2)
        assert_simulated(remedied)
