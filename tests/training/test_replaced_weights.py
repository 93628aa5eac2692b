"""Weights and modules replaced after the optimizer was made: refused, and nothing is lost."""

import re

import pytest
import torch
from tiny_decoder import FALLING, assert_same, assert_simulated, masters, train_step, weights, wrap
from torch.nn.utils import parametrize

FORMS = ["in_place", "autograd"]
NAME = "layers.0.up_proj.weight"

OTHER_LAYOUTS = {
    "fewer rows": lambda weight: torch.zeros(7, 12),
    "more rows": lambda weight: torch.zeros(200, 12),
    "a slice": lambda weight: weight[:5],
    "one row everywhere": lambda weight: torch.zeros(1, 12).expand(20, 12),
    "columns first": lambda weight: torch.zeros(12, 20).t(),
    "gaps": lambda weight: torch.zeros(20, 24)[:, ::2],
    "no dimension": lambda weight: torch.zeros(()),
}


def parameter_of(optimizer):
    return {m.name: m.parameter for m in optimizer._masters.matched}[NAME]


def copies(optimizer):
    parameters = {m.name: m.parameter for m in optimizer._masters.matched}
    state = optimizer.state
    return {name: state[p]["moq_master"].detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("replaced", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_memory_of_another_layout_is_refused_and_nothing_is_lost(decoder, replaced, form):
    model = decoder()
    optimizer = wrap(model, FALLING | {"simulate": form})
    train_step(model, optimizer, 0)
    parameter = parameter_of(optimizer)
    original, expected = parameter.data, copies(optimizer)
    parameter.data = replaced(original)
    found = re.escape(f"got shape {list(parameter.shape)} and strides {list(parameter.stride())}")
    words = f"^MoQOptimizer: {re.escape(NAME)} must keep .* shape \\[20, 12\\] and .*{found}"
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for refused in (
        optimizer.step,
        optimizer.quantized_parameters,
        lambda: optimizer.full_precision().__enter__(),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ):
        with pytest.raises(RuntimeError, match=words):
            refused()
    assert optimizer.steps == 1
    parameter.data = original
    if form == "in_place":  # else the parameter is its own master
        assert_same(copies(optimizer), expected)
    optimizer.zero_grad()
    train_step(model, optimizer, 1)
    assert optimizer.steps == 2
    if form == "in_place":
        assert_simulated(optimizer)


def test_memory_of_another_layout_is_refused_without_a_gradient_too(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    parameter_of(optimizer).data = torch.zeros(7, 12)
    with pytest.raises(RuntimeError, match="must keep the layout"):
        optimizer.step()


def test_a_storage_that_was_emptied_is_refused(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    before, expected = weights(model), copies(optimizer)
    storage = parameter_of(optimizer).untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=rf"memory of {NAME} must hold its {size} bytes, got 0"):
        train_step_of(model, optimizer)
    storage.resize_(size)
    with torch.no_grad():
        parameter_of(optimizer).copy_(before[NAME])
    assert_same(masters(optimizer), expected)


def train_step_of(model, optimizer):
    """A step with gradients of its own: the forward pass would read the memory that is gone."""
    for p in model.parameters():
        p.grad = torch.ones(p.shape)
    optimizer.step()


def test_other_values_in_other_memory_of_the_same_layout_become_the_masters(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_step(model, optimizer, 0)
    other = torch.randn(20, 12)
    parameter_of(optimizer).data = other.clone()
    with pytest.warns(UserWarning, match=f"weights of {NAME} were replaced from outside"):
        optimizer.step()
    assert torch.equal(masters(optimizer)[NAME], other)
    assert_simulated(optimizer)


# ------------------------------------------------------------------------------------- modules


def put_another_module(model):
    model.layers[0].up_proj = torch.nn.Linear(12, 20, bias=False)


def put_another_parameter(model):
    layer = model.layers[0].up_proj
    if parametrize.is_parametrized(layer):
        layer.parametrizations["weight"].original = torch.nn.Parameter(torch.zeros(20, 12))
    else:
        layer.weight = torch.nn.Parameter(torch.zeros(20, 12))


def assign(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def remove_the_module(model):
    model.layers[0].up_proj = None


def move_where_nothing_is(model):
    model.to("meta")  # moves between CPU and GPU: test_optimizer_cuda


REPLACED = [
    put_another_module,
    put_another_parameter,
    assign,
    remove_the_module,
    move_where_nothing_is,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("replace", REPLACED)
def test_weights_that_the_model_no_longer_has_are_not_written(decoder, tmp_path, replace, form):
    model = decoder()
    optimizer = wrap(model, FALLING | {"simulate": form})
    train_step(model, optimizer, 0)
    held = copies(optimizer)
    replace(model)
    every = replace in (assign, move_where_nothing_is)
    first = "layers.0.q_proj.weight and 11 more" if every else NAME
    words = f"^MoQOptimizer: the model must hold the parameters that were trained, and {first} is"
    for write in (optimizer.export, optimizer.save):
        with pytest.raises(RuntimeError, match=words):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_same(copies(optimizer), held)
    assert optimizer.steps == 1
