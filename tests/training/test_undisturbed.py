"""What a measurement must not reach, beside what test_sensitivity.py says of the model itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import moq
from moq.sensitivity import measure
from moq.undisturbed import undisturbed

FORMS = ["exact", "finite_difference", "gauss_newton", "fisher"]


@pytest.fixture
def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.fixture
def head():
    """A module that is trained too and that the model does not hold."""
    torch.manual_seed(4)
    return nn.Linear(4, 3)


@pytest.fixture
def data():
    torch.manual_seed(5)
    return torch.randn(5, 6), torch.randint(0, 3, (5,))


def loss_fn_of(form, model, head):
    def loss_fn(batch):
        outputs = head(model(batch[0]))
        loss = F.cross_entropy(outputs, batch[1], reduction="none" if form == "fisher" else "mean")
        return (loss, outputs) if form == "gauss_newton" else loss

    return loss_fn


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_cost", [None, 0.9])
def test_what_is_trained_beside_the_model_keeps_its_gradients(model, head, data, form, max_cost):
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = moq.MoQOptimizer(
        torch.optim.AdamW(parameters),
        model,
        {"start_bits": 8, "target_bits": 4, "schedule": {"finish_at": 0.5}},
        total_steps=100_000,
        verbose=False,
    )
    calls = []
    head.weight.register_hook(calls.append)
    head.weight.register_post_accumulate_grad_hook(calls.append)
    head.bias.grad = bias = torch.full((3,), 7.0)
    optimizer.probe(loss_fn_of(form, model, head), [data], form=form, max_cost=max_cost)
    assert head.weight.grad is None
    assert head.bias.grad is bias
    assert bias.tolist() == [7.0, 7.0, 7.0]
    assert not calls


def test_gradients_that_a_checkpoint_hides_are_kept_too(model, head, data):
    optimizer = moq.MoQOptimizer(
        torch.optim.AdamW([*model.parameters(), *head.parameters()]),
        model,
        {"start_bits": 8, "target_bits": 4, "sensitivity": {"max_cost": None}},
        total_steps=100,
        verbose=False,
    )

    def loss_fn(batch):
        x = batch[0].clone().requires_grad_()
        outputs = checkpoint(lambda x: head(model(x)), x, use_reentrant=True)
        return F.cross_entropy(outputs, batch[1])

    assert optimizer.probe(loss_fn, [data]).form == "finite_difference"
    assert head.weight.grad is None and head.bias.grad is None


def test_blocks_outside_the_model_are_measured_alike_and_keep_their_gradients(model, head, data):
    found = {
        form: measure(
            model, {"head": list(head.parameters())}, loss_fn_of(form, model, head), [data],
            form=form,
        )
        for form in ("exact", "finite_difference")
    }  # fmt: skip
    assert head.weight.grad is None
    exact, differences = (found[form].values for form in ("exact", "finite_difference"))
    assert differences == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_hooks_on_gradients_neither_bend_a_measurement_nor_are_lost(model, head, data, form):
    whole = nn.Sequential(model, head)
    loss_fn = loss_fn_of(form, model, head)
    plain = measure(whole, None, loss_fn, [data], form=form)
    calls = []

    def halve(gradient):
        calls.append(1)
        return gradient * 0.5

    handles = [p.register_hook(halve) for p in whole.parameters()]
    assert measure(whole, None, loss_fn, [data], form=form).values == plain.values
    assert not calls
    loss_fn_of("", model, head)(data).backward()
    assert len(calls) == len(handles)
    for handle in handles:
        handle.remove()
    loss_fn_of("", model, head)(data).backward()
    assert len(calls) == len(handles)


def test_buffers_come_back_bit_for_bit_under_a_graph_that_saved_them():
    module = nn.Module()
    values = torch.tensor([0.0, -0.0, 0.0, 0.0])
    module.register_buffer("signs", values.clone())
    module.register_buffer("nan", torch.tensor(float("nan")))
    module.register_buffer("expanded", torch.zeros(1).expand(3))
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * module.signs).sum()
    with undisturbed(module):
        module.signs.data.neg_()
        module.expanded[:1].data.fill_(2.0)
    assert torch.equal(module.signs.view(torch.int32), values.view(torch.int32))
    assert module.expanded.tolist() == [0.0, 0.0, 0.0]
    assert module.nan.isnan()
    loss.backward()
    assert torch.equal(weight.grad.view(torch.int32), values.view(torch.int32))
