"""Finite differences of gradients: their steps, half precision, and what they leave as it was."""

import contextlib
import copy
import math

import pytest
import torch
from attention_net import dense_of, differences, flat, like, loss_fn_of, losses_of
from tiny_decoder import batch, loss_of, weights, wrap
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moq._C import Error, FiniteDifferenceOperator
from moq.sensitivity import measure


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_step_follows_the_length_of_the_direction(net, data, scale):
    dense = dense_of("exact", net, data)
    parameters = list(net.parameters())
    operator = differences(net, data)
    for seed in range(3):
        torch.manual_seed(seed)
        v = torch.randn(dense.shape[0])
        found = flat(operator.product(list(range(len(parameters))), like(scale * v, parameters)))
        expected = scale * (dense @ v.double())
        assert (found - expected).norm() <= 2e-3 * expected.norm()


def test_the_step_is_short_along_sharp_directions():
    """One direction a thousand times sharper than the rest, and not quadratic."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4000))
    sharp = torch.nn.functional.normalize(torch.randn(4000), dim=0)

    def loss(w):
        return torch.sin(30 * (w @ sharp.to(w))) + 0.5 * (w * w).sin().sum()

    def gradient(block):
        with torch.enable_grad():
            return torch.autograd.grad(loss(w), [w])

    operator = FiniteDifferenceOperator(gradient, [w])
    exact = torch.autograd.functional.hvp
    for v in (torch.randn(4000), sharp, torch.randn(4000), 7 * sharp + 0.01 * torch.randn(4000)):
        expected = exact(loss, w.detach().double(), v.double())[1]
        found = operator.product([0], [v])[0]
        assert (found - expected).norm() <= 5e-3 * expected.norm()


def test_differences_at_a_minimum():
    w = nn.Parameter(torch.randn(300))
    scales = torch.linspace(0.1, 9.0, 300)
    target = w.detach().clone()

    def gradient(block):
        with torch.enable_grad():
            return torch.autograd.grad((scales * (w - target).square()).sum() / 2, [w])

    operator = FiniteDifferenceOperator(gradient, [w])
    for _ in range(3):
        v = torch.randn(300)
        found = operator.product([0], [v])[0]
        assert (found - scales * v).norm() <= 1e-3 * (scales * v).norm()


def test_the_product_of_a_zero_vector_is_zero(net, data):
    parameters = list(net.parameters())
    zeros = [torch.zeros_like(p) for p in parameters]
    found = differences(net, data).product(list(range(len(parameters))), zeros)
    assert not flat(found).any()


def test_a_loss_without_curvature_has_a_zero_product():
    w = nn.Parameter(torch.randn(50))
    x = torch.randn(7, 50)

    def gradient(block):
        with torch.enable_grad():
            return torch.autograd.grad((x @ w).sum(), [w])

    product = FiniteDifferenceOperator(gradient, [w]).product([0], [torch.randn(50)])[0]
    assert product.norm() <= 1e-2 * x.sum(0).norm() / w.detach().norm()


def test_a_gradient_that_fails_leaves_the_parameters_as_they_were(net, data):
    before = weights(net)
    calls = []

    def gradient(block):
        calls.append([not torch.equal(p, before[n]) for n, p in net.named_parameters()])
        raise ZeroDivisionError

    parameters = list(net.parameters())
    operator = FiniteDifferenceOperator(gradient, parameters)
    with pytest.raises(ZeroDivisionError):
        operator.product([0, 1], [torch.ones_like(p) for p in parameters[:2]])
    assert calls[0][:2] == [True, True] and not any(calls[0][2:])
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_a_graph_that_saved_the_weights_can_still_be_differentiated(net, data):
    loss = losses_of(net, data)
    expected = torch.autograd.grad(losses_of(net, data), list(net.parameters()))
    measure(net, None, loss_fn_of("", net), [data], form="finite_difference", progress=False)
    loss.backward()
    for p, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)


def test_differences_go_through_fused_attention(net, data):
    seen = []
    real = F.scaled_dot_product_attention

    def watched(q, *rest):
        y = real(q, *rest)
        seen.append(type(y.grad_fn).__name__)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        measure(net, None, loss_fn_of("", net), [data], form="finite_difference")
    assert seen and all("Flash" in name for name in seen)


def test_half_precision_inside_loss_fn_compares_step_sizes_in_every_product(net, data, monkeypatch):
    told, operators = [], []
    real = FiniteDifferenceOperator.check_all

    def check_all(operator):
        told.append(operator)
        real(operator)

    monkeypatch.setattr(FiniteDifferenceOperator, "check_all", check_all)

    def loss_fn(d, half=False):
        operators.append(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = net.head(net.layers[0](d[0]).detach())
        # Coarse where its gradient is small, exact in what curves.
        return net.head.weight.square().sum() + 1e-6 * outputs.float().sum()

    blocks = {"head": [net.head.weight]}
    options = {"form": "finite_difference", "tolerance": 1e-9, "max_products": 6}
    plain = measure(net, blocks, loss_fn, [data, data], **options)
    assert not told
    plain_gradients = len(operators)
    operators.clear()
    found = measure(net, blocks, lambda d: loss_fn(d, half=True), [data, data], **options)
    assert told
    assert found.values == pytest.approx(plain.values, rel=1e-2)
    assert plain_gradients < 20
    assert len(operators) >= 4 * found.products


@pytest.mark.parametrize("half", [False, True])
def test_half_precision_inside_a_reentrant_checkpoint_is_seen(net, data, half, monkeypatch):
    told = []
    monkeypatch.setattr(FiniteDifferenceOperator, "check_all", lambda self: told.append(self))

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return net.layers[0](x).float()  # so that no half-precision gradient leaves it

    def loss_fn(d):
        x = checkpoint(inside, d[0].detach().requires_grad_(), use_reentrant=True)
        return net.head(x).square().mean()

    blocks = {"head": [net.head.weight]}
    measure(net, blocks, loss_fn, [data], form="finite_difference", max_products=2)
    assert bool(told) == half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_differenced_in_float32(net, data, dtype):
    half = copy.deepcopy(net).to(dtype)
    half.register_buffer("offset", torch.ones(3, dtype=dtype))
    x = data[0].to(dtype)
    same = copy.deepcopy(half).float()
    expected = measure(
        same, None, loss_fn_of("", same), [(x.float(), data[1])], form="finite_difference"
    )
    before, parameters = weights(half), dict(half.named_parameters())
    for p in half.parameters():
        p.grad = torch.ones_like(p)
    found = measure(
        half,
        None,
        lambda d: losses_of(half, d) + 0 * half.offset.sum(),
        [(x, data[1])],
        form="finite_difference",
    )
    assert found.values == pytest.approx(expected.values, rel=1e-2)
    assert half.offset.dtype == dtype
    for name, p in half.named_parameters():
        assert p is parameters[name] and torch.equal(p, before[name])
        assert torch.equal(p.grad, torch.ones_like(p))


class Overflowing(torch.autograd.Function):
    """The identity, whose second derivative does not fit into half precision."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return _Second.apply(gradient)


class _Second(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (float("inf") if gradient.dtype == torch.float16 else 1.0)


@pytest.mark.parametrize("kind", ["trace", "eigenvalue"])
def test_products_that_overflow_in_half_precision_are_differenced_in_float32(
    net, data, capsys, kind
):
    half = copy.deepcopy(net).half()

    def loss_fn(d):
        return F.cross_entropy(Overflowing.apply(half(d[0])).flatten(0, 1).float(), d[1])

    batch = (data[0].half(), data[1])
    found = measure(half, None, loss_fn, [batch], measure=kind)
    assert found.form == "finite_difference"
    assert all(math.isfinite(value) for value in found.values)
    assert "form 'exact' is not possible" in capsys.readouterr().err
    with pytest.raises(Error, match="finite.*Form 'finite_difference' computes in float32"):
        measure(half, None, loss_fn, [batch], measure=kind, form="exact")


def test_a_reference_past_the_modules_is_refused_in_half_precision(net, data):
    half = copy.deepcopy(net).bfloat16()
    weight = half.head.weight
    with pytest.raises(ValueError, match="through their modules, got one of shape \\[3, 4\\]"):
        measure(
            half,
            None,
            lambda d: losses_of(half, d) + weight.float().square().sum(),
            [data],
            form="finite_difference",
        )
    assert weight.grad is None


def test_a_coarse_gradient_is_refused(net, data):
    before = weights(net)

    def loss_fn(d):
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of(net, d)

    with pytest.raises(Error, match="two step sizes must agree within 10 %, got"):
        measure(net, None, loss_fn, [data], form="finite_difference")
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_reduced_float32_products_are_off_meanwhile(net, data):
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    seen = []

    def loss_fn(d):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return losses_of(net, d)

    try:
        measure(net, None, loss_fn, [data], form="finite_difference")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(saved)
    assert set(seen) == {"ieee"}


def test_hooks_after_gradients_do_not_run_and_stay(net, data):
    calls = []
    net.head.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    measure(net, None, loss_fn_of("", net), [data], form="finite_difference")
    assert not calls
    losses_of(net, data).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("config", [{}, {"activations": "dynamic"}, {"simulate": "autograd"}])
def test_differences_see_the_simulated_weights(decoder, config):
    model = decoder()
    config = {"target_bits": 4, "schedule": {"table": {0: 5, 9: 4}}, "start_bits": 5} | config
    optimizer = wrap(model, config)
    before = weights(model)
    blocks = optimizer._masters.by_block()
    options = {"progress": False, "max_products": 6}
    found = measure(
        model, blocks, lambda b: loss_of(model, b), [batch(0)], form="finite_difference", **options
    )
    assert {n: p for n, p in model.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    activations = contextlib.nullcontext()
    if "activations" in config:
        activations = _without_activations(optimizer)
    with activations:
        exact = measure(
            model, blocks, lambda b: loss_of(model, b), [batch(0)], form="exact", **options
        )
    largest = max(map(abs, exact.values))
    assert found.values == pytest.approx(exact.values, rel=1e-2, abs=1e-2 * largest)
    model(batch(0))  # what simulates is back
    assert all(q.enabled for q in model.modules() if hasattr(q, "enabled"))


@contextlib.contextmanager
def _without_activations(optimizer):
    optimizer._activations.enable(False)
    yield
    optimizer._activations.enable(True)
