"""Every form of the curvature against the dense matrix, and what finite differences leave alone."""

import contextlib
import copy
import math

import pytest
import torch
from reference.hessian import block_ranges, dense_hessian, empirical_fisher, gauss_newton
from tiny_decoder import OnceDifferentiable, OwnSquare, batch, loss_of, weights, wrap
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from moq._C import (
    Error,
    FiniteDifferenceOperator,
    FisherOperator,
    GaussNewtonOperator,
)
from moq.sensitivity import find_blocks, measure


class Net(nn.Module):
    """Attention over 3 tokens of width 4, GELU and a head: small enough for a dense Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.checkpointing: bool | None = None  # use_reentrant

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointing is None:
            x = self.mixed(x)
        else:
            x = checkpoint(self.mixed, x, use_reentrant=self.checkpointing)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(4)
    return Net()


@pytest.fixture
def data():
    torch.manual_seed(5)
    return torch.randn(2, 3, 4, requires_grad=True).detach(), torch.randint(0, 3, (6,))


def losses_of(net, data, reduction="mean"):
    x, y = data
    return F.cross_entropy(net(x).flatten(0, 1), y, reduction=reduction)


def double(net, data):
    return copy.deepcopy(net).double(), (data[0].double(), data[1])


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def like(vector, parameters):
    sizes = [p.numel() for p in parameters]
    return [v.view_as(p) for v, p in zip(vector.split(sizes), parameters, strict=True)]


def differences(net, data, **options):
    """Finite differences over all parameters, with plain backward passes."""
    parameters = list(net.parameters())

    def gradient(block):
        with torch.enable_grad():
            return torch.autograd.grad(losses_of(net, data), [parameters[i] for i in block])

    return FiniteDifferenceOperator(gradient, parameters, **options)


def dense_of(form, net, data):
    """The whole matrix of a form, float64."""
    net, data = double(net, data)
    parameters = list(net.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        if form == "gauss_newton":
            return gauss_newton(
                lambda z: F.cross_entropy(z.flatten(0, 1), data[1]), net(data[0]), parameters
            )
        if form == "fisher":
            return empirical_fisher(losses_of(net, data, "none"), parameters)
        return dense_hessian(lambda: losses_of(net, data), parameters)


def loss_fn_of(form, net):
    """What `measure` asks for, of each form."""

    def loss_fn(data):
        if form == "fisher":
            return losses_of(net, data, "none")
        outputs = net(data[0])
        loss = F.cross_entropy(outputs.flatten(0, 1), data[1])
        return (loss, outputs) if form == "gauss_newton" else loss

    return loss_fn


FORMS = ["exact", "finite_difference", "gauss_newton", "fisher"]


@pytest.mark.parametrize(
    ("form", "rtol"), [("gauss_newton", 1e-10), ("fisher", 1e-10), ("finite_difference", 1e-7)]
)
def test_products_are_those_of_the_dense_matrix(net, data, form, rtol):
    dense = dense_of(form, net, data)
    net, data = double(net, data)
    parameters = list(net.parameters())
    if form == "gauss_newton":
        with sdpa_kernel(SDPBackend.MATH):
            operator = GaussNewtonOperator(*loss_fn_of(form, net)(data), parameters)
    elif form == "fisher":
        operator = FisherOperator(losses_of(net, data, "none"), parameters)
    else:
        operator = differences(net, data)
    rows = block_ranges([parameters[:2], parameters[2:]])[1]
    for block, part in ((list(range(len(parameters))), slice(None)), ([*range(2, 8)], rows)):
        v = torch.randn(dense[part, part].shape[0], dtype=torch.float64)
        expected = dense[part, part] @ v
        members = [parameters[i] for i in block]
        product = flat(operator.product(block, like(v, members)))
        assert (product - expected).norm() <= rtol * expected.norm()


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


@pytest.mark.parametrize("form", FORMS)
def test_traces_and_eigenvalues_are_those_of_the_form(net, data, form):
    dense = dense_of(form, net, data)
    blocks = find_blocks(net)
    options = {"form": form, "progress": False, "tolerance": 1e-3}
    found = measure(
        net, None, loss_fn_of(form, net), [data], measure="both", max_products=80, **options
    )
    assert found.form == form and found.measure == "both"
    largest = max(map(abs, found.values))
    for i, rows in enumerate(block_ranges(list(blocks.values()))):
        part = dense[rows, rows]
        assert abs(found.values[i] - part.trace()) <= 4 * found.standard_error[i] + 2e-3 * largest
        exact = torch.linalg.eigvalsh(part)
        top = exact[exact.abs().argmax()].item()
        assert found.eigenvalues[i] == pytest.approx(top, rel=2e-3)
        assert max(found.largest[i], -found.smallest[i]) == abs(found.eigenvalues[i])
    alone = measure(net, None, loss_fn_of(form, net), [data], max_products=80, **options)
    assert alone.values == pytest.approx(found.values, rel=1e-4)


def test_the_trace_of_the_fisher_matrix_is_exact_after_one_gradient_each(net, data):
    dense = dense_of("fisher", net, data)
    found = measure(net, None, loss_fn_of("fisher", net), [data, data], form="fisher")
    assert found.products == 12 and found.batches == 2
    assert found.standard_error == (0.0,) * 4 and found.converged
    for value, rows in zip(
        found.values, block_ranges(list(find_blocks(net).values())), strict=True
    ):
        assert value == pytest.approx(dense[rows, rows].trace().item(), rel=1e-5)


def test_gauss_newton_reads_the_outputs_of_transformers(net, data):
    class Output:
        def __init__(self, loss, logits):
            self.loss, self.logits = loss, logits

    plain = measure(net, None, loss_fn_of("gauss_newton", net), [data], form="gauss_newton")
    found = measure(
        net,
        None,
        lambda d: Output(*loss_fn_of("gauss_newton", net)(d)),
        [data],
        form="gauss_newton",
    )
    assert found.values == plain.values


@pytest.mark.parametrize("form", ["auto", "exact", "finite_difference"])
def test_a_compiled_model_is_measured_and_stays_compiled(net, data, form):
    compiled = torch.compile(net, backend="aot_eager")
    losses_of(compiled, data).backward()
    expected = measure(net, None, loss_fn_of(form, net), [data], form=form)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = measure(compiled, None, loss_fn_of(form, compiled), [data], form=form)
        losses_of(compiled, data).backward()
    assert found.values == expected.values


@pytest.mark.parametrize(
    ("reentrant", "form"), [(False, "exact"), (False, "finite_difference"), (True, "auto")]
)
def test_activation_checkpointing(net, data, reentrant, form, capsys):
    plain = measure(net, None, loss_fn_of("", net), [data], form="exact")
    net.checkpointing = reentrant
    data[0].requires_grad_()  # what is checkpointed in this way must have such an input
    found = measure(net, None, loss_fn_of("", net), [data], form=form)
    assert found.form == ("exact" if form == "exact" else "finite_difference")
    assert found.values == pytest.approx(plain.values, rel=1e-2)
    assert ("use_reentrant=True" in capsys.readouterr().err) == reentrant


def test_exact_names_a_reentrant_checkpoint(net, data):
    net.checkpointing = True
    data[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="use_reentrant=True.*'finite_difference'"):
        measure(net, None, loss_fn_of("", net), [data], form="exact")


def test_auto_takes_differences_where_there_is_no_second_derivative_and_says_so(net, data, capsys):
    def fused(d):
        return losses_of(net, d) + OnceDifferentiable.apply(net.head.weight).sum()

    def plain(d):
        return losses_of(net, d) + net.head.weight.square().sum()

    expected = measure(net, None, plain, [data], form="exact", tolerance=0.2)
    capsys.readouterr()
    found = measure(net, None, fused, [data], tolerance=0.2)
    assert found.form == "finite_difference"
    assert found.values == pytest.approx(expected.values, rel=1e-2)
    said = capsys.readouterr().err
    assert said.count("so 'finite_difference' is taken instead") == 1
    assert "OnceDifferentiableBackward" in said
    with pytest.raises(NotImplementedError, match="OnceDifferentiableBackward"):
        measure(net, None, fused, [data], form="exact")


class TooLarge(OwnSquare):
    """x², whose second derivative finds no memory."""

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return OutOfMemory.apply(2 * gradient * x)


class OutOfMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("max_seconds", [None, 60.0])
def test_auto_takes_differences_where_a_second_graph_does_not_fit(net, data, capsys, max_seconds):
    before = weights(net)

    def loss_fn(d):
        return losses_of(net, d) + TooLarge.apply(net.head.weight).sum()

    expected = measure(
        net, None, lambda d: losses_of(net, d) + net.head.weight.square().sum(), [data]
    )
    capsys.readouterr()
    found = measure(net, None, loss_fn, [data], max_seconds=max_seconds)
    assert (expected.form, found.form) == ("exact", "finite_difference")
    assert found.values == pytest.approx(expected.values, rel=1e-2, abs=1e-3)
    said = capsys.readouterr().err
    assert said.count("so 'finite_difference' is taken instead") == 1
    assert "out of memory" in said
    with pytest.raises(torch.OutOfMemoryError):
        measure(net, None, loss_fn, [data], form="exact")
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


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


@pytest.mark.parametrize(
    ("form", "loss_fn", "error", "words"),
    [
        ("gauss_newton", lambda n, d: losses_of(n, d), TypeError, "return .loss, outputs."),
        (
            "gauss_newton",
            lambda n, d: (losses_of(n, d), n(d[0])),
            ValueError,
            "computed from the outputs that loss_fn returns",
        ),
        ("fisher", lambda n, d: n(d[0]), ValueError, r"per example, got shape \[2, 3, 3\]"),
        ("finite_difference", lambda n, d: n(d[0]), ValueError, "one floating-point number"),
        (
            "finite_difference",
            lambda n, d: losses_of(n, d).detach(),
            ValueError,
            "without a graph",
        ),
        ("newton", lambda n, d: None, ValueError, "form must be one of 'auto', 'exact'"),
    ],
)
def test_what_a_form_cannot_use_is_refused(net, data, form, loss_fn, error, words):
    with pytest.raises(error, match=words):
        measure(net, None, lambda d: loss_fn(net, d), [data], form=form)


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_that_is_not_a_number_is_named(net, data, form):
    def loss_fn(d):
        found = loss_fn_of(form, net)(d)
        if d is not bad:
            return found
        nan = torch.tensor(float("nan"))
        return (found[0] * nan, found[1]) if form == "gauss_newton" else found * nan

    bad = (data[0] + 1, data[1])
    before = weights(net)
    with pytest.raises(ValueError, match="must be finite, got nan for batch 1"):
        measure(net, None, loss_fn, [data, bad], form=form)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())
