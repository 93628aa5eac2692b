"""Every form of the curvature against the dense matrix: which is taken, and what it cannot use."""

import pytest
import torch
from attention_net import dense_of, differences, double, flat, like, loss_fn_of, losses_of
from reference.hessian import block_ranges
from tiny_decoder import OnceDifferentiable, OwnSquare, weights
from torch.nn.attention import SDPBackend, sdpa_kernel

from moq._C import FisherOperator, GaussNewtonOperator
from moq.sensitivity import find_blocks, measure

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
