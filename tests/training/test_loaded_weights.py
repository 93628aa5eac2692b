"""Values and parameters that load_state_dict, or somebody by hand, puts into a trained model."""

import copy
import warnings

import pytest
import torch
from tiny_decoder import (
    FALLING,
    FALLING_STOCHASTIC,
    assert_same,
    assert_simulated,
    batch,
    copies,
    loss_of,
    masters,
    snapped,
    train_step,
    train_steps,
    weights,
    wrap,
)
from torch import nn

STOCHASTIC = FALLING_STOCHASTIC | {"seed": 5}
STEPS = 12
FORMS = ["in_place", "autograd"]
NAME = "layers.0.q_proj.weight"


def trained(decoder, form: str = "in_place", steps: int = 3):
    model = decoder()
    optimizer = wrap(model, FALLING | {"simulate": form}, STEPS)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def spoiled(model, bad: float) -> dict[str, torch.Tensor]:
    state = copy.deepcopy(model.state_dict())
    state[NAME][1, 2] = bad
    return state


def open_full_precision(optimizer) -> None:
    with optimizer.full_precision():
        pass


USES = {
    "step": lambda optimizer: optimizer.step(),
    "full_precision": open_full_precision,
    "export": lambda optimizer: optimizer.quantized_parameters(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_do_not_become_masters(decoder, use, bad):
    model, optimizer = trained(decoder)
    before, simulated = copies(optimizer), weights(model)
    loss_of(model, batch(3)).backward()
    model.load_state_dict(spoiled(model, bad))
    with pytest.raises(ValueError, match=rf"{NAME}.*must be finite.*masters are as they were"):
        USES[use](optimizer)
    assert optimizer.steps == 3
    assert_same(copies(optimizer), before)
    optimizer.load_state_dict(optimizer.state_dict())  # the remedy that the message names
    assert_same(weights(model), simulated)
    USES[use](optimizer)


def test_finite_weights_after_bad_ones_are_taken_as_if_these_had_never_been(decoder):
    model, optimizer = trained(decoder)
    good = copy.deepcopy(model.state_dict())
    good[NAME] = good[NAME] + 1
    model.load_state_dict(spoiled(model, float("nan")))
    with pytest.raises(ValueError, match="must be finite"):
        optimizer.step()
    model.load_state_dict(good)
    with pytest.warns(UserWarning, match=rf"{NAME} were replaced from outside"):
        optimizer.step()
    assert torch.equal(masters(optimizer)[NAME], good[NAME])


def test_bad_weights_within_full_precision_are_refused_at_its_end_and_vanish(decoder):
    model, optimizer = trained(decoder)
    before, simulated = copies(optimizer), weights(model)
    with pytest.raises(ValueError, match=NAME), optimizer.full_precision():
        model.load_state_dict(spoiled(model, float("nan")))
    assert_same(copies(optimizer), before)
    assert_same(weights(model), simulated)
    train_step(model, optimizer, 3)
    assert_simulated(optimizer)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_with_a_master_that_is_not_finite_is_refused_whole(decoder, form):
    model, optimizer = trained(decoder, form)
    state = copy.deepcopy(optimizer.state_dict())
    entry = next(e for e in state["state"].values() if "moq_master" in e)
    entry["moq_master"].detach()[0, 0] = float("nan")
    train_step(model, optimizer, 3)
    before = weights(model)
    with pytest.raises(ValueError, match=r"the master of layers\.\S+: weights must be"):
        optimizer.load_state_dict(state)
    assert optimizer.steps == 4
    assert_same(weights(model), before)


# ---------------------------------------------------------------------- simulated in the forward


def test_weights_loaded_without_the_state_warn_where_the_forward_simulates_too(decoder):
    model, _ = trained(decoder, "autograd")
    other, fresh = trained(decoder, "autograd", steps=0)
    other.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match=r"q_proj\.weight and 11 more were replaced.*schedule"):
        train_step(other, fresh, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(other, fresh, 4)


def test_weights_loaded_with_the_state_do_not_warn_where_the_forward_simulates(decoder):
    model, optimizer = trained(decoder, "autograd")
    other, resumed = trained(decoder, "autograd", steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train_step(other, resumed, 3)
        train_step(model, optimizer, 3)
    assert_same(weights(other), weights(model))


def test_weights_exchanged_for_a_while_do_not_warn_where_the_forward_simulates(decoder):
    model, optimizer = trained(decoder, "autograd")
    own = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({name: value + 1 for name, value in own.items()})
        model.load_state_dict(own)
        train_step(model, optimizer, 3)


def test_an_own_state_loaded_after_other_weights_still_warns_of_them(decoder):
    """accelerate does so when it prepares an optimizer."""
    model, _ = trained(decoder, "autograd")
    other, fresh = trained(decoder, "autograd", steps=0)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(fresh.state_dict())
    with pytest.warns(UserWarning, match="were replaced"):
        train_step(other, fresh, 3)


def test_bad_weights_are_refused_where_the_forward_simulates(decoder):
    model, optimizer = trained(decoder, "autograd")
    state = copy.deepcopy(optimizer.state_dict())
    good = weights(model)
    model.load_state_dict(
        {name: torch.full_like(value, torch.nan) for name, value in model.state_dict().items()}
    )
    with pytest.raises(ValueError, match=f"{NAME}.*must be finite"):
        optimizer.step()
    optimizer.load_state_dict(state)
    restored = {m.name: m.parameter for m in optimizer._masters.matched}
    for name, value in good.items():
        plain = name.replace("parametrizations.weight.original", "weight")
        assert plain not in restored or torch.equal(restored[plain], value)


# ---------------------------------------------------------------------- other parameters


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["", "layers.0"], ids=["model", "part"])
def test_a_model_with_other_parameters_is_not_silently_left_untrained(decoder, form, part):
    model, optimizer = trained(decoder, form)
    module = model.get_submodule(part)
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    loss_of(model, batch(3)).backward()
    with pytest.raises(RuntimeError, match=rf"{NAME} and \d+ more.*assign=True.*without assign"):
        optimizer.step()
    assert optimizer.steps == 3


@pytest.mark.parametrize("form", FORMS)
def test_parameters_without_a_gradient_are_looked_for_once(decoder, form, monkeypatch):
    model, optimizer = trained(decoder, form, steps=0)
    model.layers[1].down_proj.requires_grad_(False)
    looked = []
    monkeypatch.setattr("moq.masters.require_in_model", lambda *_: looked.append(1))
    for step in range(3):
        train_step(model, optimizer, step)
    assert looked == [1]


def test_weights_replaced_without_the_optimizers_state_warn_and_name_what_is_lost(decoder):
    model = decoder()
    optimizer = wrap(model, STOCHASTIC)
    train_steps(model, optimizer, range(3))
    other = decoder()
    resumed = wrap(other, STOCHASTIC)
    other.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match=r"layers\.0\.q_proj\.weight and 11 more were replaced"):
        train_step(other, resumed, 3)
    assert_simulated(resumed)


def test_masters_start_from_replaced_weights(decoder):
    model = decoder()
    optimizer = wrap(model, STOCHASTIC)
    new = torch.randn_like(model.layers[0].up_proj.weight)
    with torch.no_grad():
        model.layers[0].up_proj.weight.copy_(new)
    with pytest.warns(UserWarning, match="full-precision masters"):
        optimizer.step()
    assert torch.equal(masters(optimizer)["layers.0.up_proj.weight"], new)


@pytest.mark.parametrize(
    "use",
    [
        lambda optimizer, probe: optimizer.quantized_parameters(),
        lambda optimizer, probe: probe(),
        lambda optimizer, probe: optimizer.full_precision().__enter__(),
    ],
    ids=["export", "probe", "full_precision"],
)
def test_replaced_weights_are_brought_back_to_the_grid_by_whatever_reads_them(decoder, use):
    model = decoder()
    optimizer = wrap(model, STOCHASTIC)
    train_steps(model, optimizer, range(3))
    best = copy.deepcopy(model.state_dict())
    train_steps(model, optimizer, range(3, 8))
    model.load_state_dict(best)
    seen = []

    def loss_fn(tokens):
        seen.append(weights(model))
        return loss_of(model, tokens)

    with pytest.warns(UserWarning, match="were replaced from outside"):
        use(optimizer, lambda: optimizer.probe(loss_fn, [batch(50)], max_cost=None))
    for name, master in masters(optimizer).items():
        assert torch.equal(master, best[name]), name
    if not optimizer._shows_masters:
        assert_simulated(optimizer)
    expected = snapped(optimizer)
    assert_same(*[{n: w[n] for n in expected} for w in (seen[0], expected)]) if seen else None


def test_adopted_weights_are_put_on_the_grid_by_a_skipped_step_too(decoder):
    model = decoder()
    optimizer = wrap(model, {"start_bits": 4, "target_bits": 4})
    trainer = optimizer._masters.trainer
    with torch.no_grad():
        model.layers[0].q_proj.weight.normal_()
    changed = trainer.overwritten()
    assert len(changed) == 1
    trainer.adopt(changed)
    trainer.begin_step()
    trainer.end_step(torch.ones(1))
    assert optimizer.steps == 0
    assert_simulated(optimizer)


def test_weights_that_were_written_back_unchanged_do_not_warn(decoder):
    model = decoder()
    optimizer = wrap(model, STOCHASTIC)
    train_step(model, optimizer, 0)
    before = masters(optimizer)["layers.0.up_proj.weight"].detach().clone()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
    assert torch.equal(masters(optimizer)["layers.0.up_proj.weight"], before)


def test_starting_from_simulated_weights_warns_that_they_look_like_a_resumed_run(decoder):
    model = decoder()
    optimizer = wrap(model, STOCHASTIC)
    train_steps(model, optimizer, range(3))
    other = decoder()
    other.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="lie on integer grids"):
        wrap(other, STOCHASTIC)


def test_starting_from_ordinary_weights_does_not_warn(decoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            wrap(decoder(dtype), STOCHASTIC)


# Weights of these lie on a grid by themselves: alone in their group, few, or all alike.
@pytest.mark.parametrize(
    ("sizes", "grid", "fill"),
    [
        ((12, 4), {"granularity": "per_group", "group_size": 1}, None),
        ((1, 12), {"granularity": "per_channel"}, None),
        ((3, 1), {"granularity": "per_tensor"}, None),
        ((12, 4), {"granularity": "per_channel"}, 0.25),
        ((12, 0), {"granularity": "per_tensor"}, None),
    ],
    ids=["groups of one", "rows of one", "three weights", "constant", "none"],
)
def test_weights_that_say_nothing_of_a_grid_do_not_warn(sizes, grid, fill):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Initializing zero-element")
        layer = nn.Linear(*sizes, bias=False)
        if fill is not None:
            nn.init.constant_(layer.weight, fill)
        wrap(layer, STOCHASTIC | grid)
