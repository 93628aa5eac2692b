import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from reference.hessian import block_ranges, dense_hessian
from tiny_decoder import OnceDifferentiable, OwnSquare
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moq._C import Error, FisherOperator, HvpOperator, standard_errors


class Attention(nn.Module):
    """One transformer block small enough for a dense Hessian: 5 tokens of width 6, 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(-1, 5, 3, 2, 3).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(-1, 5, 6))


@pytest.fixture
def problem():
    """A network with attention, GELU and cross entropy in float64: (loss_fn, blocks)."""
    torch.manual_seed(3)
    net = nn.Sequential(Attention(), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 4)).double()
    x, y = torch.randn(3, 5, 6, dtype=torch.float64), torch.randint(0, 4, (15,))

    def loss_fn(scale: float = 1.0) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scale * F.cross_entropy(net(x).reshape(-1, 4), y)

    blocks = [list(net[0].parameters()), [*net[1].parameters(), *net[3].parameters()]]
    return loss_fn, blocks


def indices(blocks):
    numbers = iter(range(1000))
    return [[next(numbers) for _ in block] for block in blocks]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def like(vector, parameters):
    return [
        piece.view_as(p)
        for piece, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)
    ]


def test_product_equals_the_dense_hessian_times_the_vector(problem):
    loss_fn, blocks = problem
    parameters = sum(blocks, [])
    dense = dense_hessian(loss_fn, parameters)
    v = torch.randn(dense.shape[0], dtype=torch.float64)
    product = HvpOperator(loss_fn(), parameters).product(
        list(range(len(parameters))), like(v, parameters)
    )
    torch.testing.assert_close(flat(product), dense @ v, rtol=1e-10, atol=1e-12)


def test_product_of_a_block_is_that_of_its_rows_and_columns(problem):
    loss_fn, blocks = problem
    dense = dense_hessian(loss_fn, sum(blocks, []))
    rows = block_ranges(blocks)[1]
    v = torch.randn(rows.stop - rows.start, dtype=torch.float64)
    operator = HvpOperator(loss_fn(), sum(blocks, []))
    product = operator.product(indices(blocks)[1], like(v, blocks[1]))
    torch.testing.assert_close(flat(product), dense[rows, rows] @ v, rtol=1e-10, atol=1e-12)


def test_products_repeat_bit_for_bit_on_one_graph(problem):
    loss_fn, blocks = problem
    operator = HvpOperator(loss_fn(), blocks[0])
    v = [torch.randn_like(p) for p in blocks[0]]
    first = operator.product(indices(blocks)[0], v)
    operator.product(indices(blocks)[0], [torch.randn_like(p) for p in blocks[0]])
    again = operator.product(indices(blocks)[0], v)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("block", [0, 1])
def test_lanczos_finds_both_ends_of_a_block_in_30_products(problem, block):
    loss_fn, blocks = problem
    rows = block_ranges(blocks)[block]
    exact = torch.linalg.eigvalsh(dense_hessian(loss_fn, sum(blocks, []))[rows, rows])
    found = HvpOperator(loss_fn(), sum(blocks, [])).eigenvalues(
        indices(blocks)[block], max_iterations=30, tolerance=1e-2, seed=0
    )
    top = exact[exact.abs().argmax()].item()
    assert found["converged"] and found["iterations"] <= 30
    assert found["dominant"] == pytest.approx(top, rel=1e-3)
    assert exact[0].item() - 1e-9 <= found["smallest"] <= found["largest"] <= exact[-1] + 1e-9


@pytest.mark.parametrize("products", [2, 5, 10, 30])
@pytest.mark.parametrize("block", [0, 1])
def test_an_eigenvalue_of_a_network_lies_within_each_residual(problem, block, products):
    loss_fn, blocks = problem
    rows = block_ranges(blocks)[block]
    exact = torch.linalg.eigvalsh(dense_hessian(loss_fn, sum(blocks, []))[rows, rows])
    found = HvpOperator(loss_fn(), sum(blocks, [])).eigenvalues(
        indices(blocks)[block], max_iterations=products, tolerance=1e-9, seed=0
    )
    for end in ("smallest", "largest"):
        assert (exact - found[end]).abs().min() <= found[f"{end}_residual"] + 1e-12
    if products == 2:  # the bound says something, and is no excuse
        assert not found["converged"] and found["residual"] < 2 * exact.abs().max()


def test_lanczos_sees_a_negative_dominant_eigenvalue(problem):
    loss_fn, blocks = problem
    operator = HvpOperator(loss_fn(-1.0), blocks[1])
    found = operator.eigenvalues([0, 1, 2, 3], max_iterations=30, tolerance=1e-3, seed=0)
    exact = torch.linalg.eigvalsh(dense_hessian(lambda: loss_fn(-1.0), blocks[1]))
    assert found["dominant"] < 0
    assert found["dominant"] == pytest.approx(exact[0].item(), rel=1e-3)


def test_lanczos_in_float32_agrees_with_float64():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(11, 8), torch.randint(0, 3, (11,))
    parameters = list(net.parameters())
    found = HvpOperator(F.cross_entropy(net(x), y), parameters).eigenvalues(
        [0, 1, 2, 3], max_iterations=30, tolerance=1e-3, seed=0
    )
    double = net.double()
    exact = torch.linalg.eigvalsh(
        dense_hessian(lambda: F.cross_entropy(double(x.double()), y), list(double.parameters()))
    )
    assert found["dominant"] == pytest.approx(exact[-1].item(), rel=1e-3)


def test_traces_lie_within_their_standard_errors(problem):
    loss_fn, blocks = problem
    dense = dense_hessian(loss_fn, sum(blocks, []))
    samples, converged = HvpOperator(loss_fn(), sum(blocks, [])).traces(
        indices(blocks), tolerance=0.05, min_products=16, max_products=2000, seed=1
    )
    assert converged and len(samples) < 2000
    means = torch.tensor(samples, dtype=torch.float64).mean(0)
    largest = means.abs().max().item()
    for rows, mean, error in zip(
        block_ranges(blocks), means, standard_errors(samples), strict=True
    ):
        assert error <= 0.05 * largest
        assert abs(mean - dense[rows, rows].trace()) <= 4 * error


def test_traces_stop_at_max_products_and_say_so(problem):
    loss_fn, blocks = problem
    seen = []
    samples, converged = HvpOperator(loss_fn(), sum(blocks, [])).traces(
        indices(blocks),
        tolerance=1e-9,
        min_products=2,
        max_products=5,
        seed=1,
        progress=seen.append,
    )
    assert not converged
    assert len(samples) == 5 and seen == [1, 2, 3, 4, 5]


def test_random_vectors_depend_on_seed_and_batch_alone(problem):
    loss_fn, blocks = problem

    def traces(seed, batch):
        return HvpOperator(loss_fn(), sum(blocks, [])).traces(
            indices(blocks),
            tolerance=1e-9,
            min_products=2,
            max_products=2,
            seed=seed,
            batch=batch,
        )[0]

    first = traces(1, 0)
    torch.rand(100)
    assert traces(1, 0) == first
    assert traces(2, 0) != first
    assert traces(1, 1) != first


def test_standard_errors_are_those_of_the_mean():
    samples = torch.randn(9, 3, dtype=torch.float64)
    expected = samples.std(0) / 3
    assert standard_errors(samples.tolist()) == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_parameter_without_influence_has_zero_curvature():
    linear, unused = nn.Linear(3, 2), nn.Linear(4, 4)
    operator = HvpOperator(linear(torch.ones(5, 3)).sum(), [linear.weight, unused.weight])
    product = operator.product([0, 1], [torch.ones(2, 3), torch.ones(4, 4)])
    assert [p.abs().sum().item() for p in product] == [0.0, 0.0]


@pytest.mark.parametrize("step", [torch.floor, torch.ceil, torch.round, torch.sign])
def test_piecewise_constant_operations_have_zero_curvature(step):
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    beside = torch.randn(5, dtype=torch.float64, requires_grad=True)
    operator = HvpOperator((step(beside) * w**3 + step(w)).sum(), [w, beside])
    along_w, along_beside = operator.product([0, 1], [torch.ones_like(w)] * 2)
    torch.testing.assert_close(along_w, (6 * step(beside) * w).detach())
    assert along_beside.tolist() == [0.0] * 5
    assert operator.product([1], [torch.ones_like(w)])[0].tolist() == [0.0] * 5


class Square(OwnSquare):
    """x², whose backward pass is differentiable."""

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * gradient * x


class RefusingSquare(Square):
    """x², declared to be differentiable once."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * gradient * x


def test_python_functions_and_hooks_run_in_the_graph():
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    calls = []
    y = Square.apply(w)
    y.register_hook(lambda g: calls.append("hook") or g)
    product = HvpOperator(Square.apply(y).sum(), [w]).product([0], [torch.ones_like(w)])[0]
    torch.testing.assert_close(product, 12 * w.detach() ** 2)
    assert calls


def test_products_run_while_another_thread_holds_the_global_lock_in_turns(problem):
    loss_fn, blocks = problem
    stop = threading.Event()
    counted = []

    def spin():
        while not stop.is_set():
            counted.append(1)

    thread = threading.Thread(target=spin)
    thread.start()
    operator = HvpOperator(loss_fn(), blocks[0])
    operator.traces(
        [list(range(len(blocks[0])))], tolerance=1e-9, min_products=2, max_products=20, seed=0
    )
    stop.set()
    thread.join()
    assert counted


WORKERS = """
import os

import torch

from moq import _C

torch.set_num_threads(3)
weight = torch.linspace(-1, 1, 1 << 17).requires_grad_()
operator = _C.HvpOperator((weight**4).sum(), [weight])
flat = lambda x: operator.product([0], [x])[0]
flat(torch.ones(1 << 17))  # starts PyTorch's own threads
before = len(os.listdir("/proc/self/task"))
{call}
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize(
    "call",
    [
        "operator.eigenvalues([0], max_iterations=3, tolerance=1e-9, seed=0)",
        "_C.lanczos(flat, 1 << 17, dtype=torch.float32, max_iterations=3, tolerance=1e-9, seed=0)",
    ],
    ids=["eigenvalues", "lanczos"],
)
def test_lanczos_has_as_many_threads_as_pytorch(call):
    # Workers start when they are first needed, so only a process of its own can count them.
    command = [sys.executable, "-c", WORKERS.format(call=call)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2  # and the calling thread


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            OnceDifferentiable,
            "OnceDifferentiableBackward, whose backward pass leaves the autograd graph",
        ),
        (RefusingSquare, "RefusingSquareBackward: .*once_differentiable"),
    ],
)
@pytest.mark.parametrize("position", ["inside", "at the loss"])
def test_a_function_without_second_derivative_is_named(function, words, position):
    w = torch.randn(5, requires_grad=True)
    loss = (
        function.apply(w.tanh()).exp().sum()
        if position == "inside"
        else function.apply(w.tanh().sum())
    )
    with pytest.raises(NotImplementedError, match=words):
        HvpOperator(loss, [w])


def test_a_function_without_second_derivative_is_named_where_the_gradient_is_zero():
    w = torch.randn(5, requires_grad=True)
    scale = torch.zeros(5, requires_grad=True)  # d²loss / dw dscale is 2 w all the same
    with pytest.raises(NotImplementedError, match="OnceDifferentiableBackward"):
        HvpOperator((OnceDifferentiable.apply(w) * scale).sum(), [w, scale])


def test_fused_attention_is_named():
    q = torch.randn(2, 4, 8, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="ScaledDotProductFlashAttention"):
        HvpOperator(F.scaled_dot_product_attention(q, q, q).square().sum(), [q])


def test_the_graph_of_the_caller_is_left_as_it_was():
    w = torch.randn(5, requires_grad=True)
    loss = w.tanh().square().sum()
    HvpOperator(loss, [w])
    loss.backward()
    torch.testing.assert_close(w.grad, 2 * w.tanh() * (1 - w.tanh() ** 2))


def test_deleting_the_operator_frees_the_graph():
    class Keep(Square):
        alive = []

        @staticmethod
        def forward(ctx, x):
            Keep.alive.append(weakref.ref(ctx))
            return Square.forward(ctx, x)

    w = torch.randn(5, requires_grad=True)
    gc.disable()
    try:
        operator = HvpOperator(Keep.apply(w).square().sum(), [w])
        operator.product([0], [torch.ones(5)])
        assert Keep.alive[0]() is not None
        del operator
        assert Keep.alive[0]() is None
    finally:
        gc.enable()


def test_interrupting_the_progress_stops_the_products(problem):
    loss_fn, blocks = problem

    def interrupt(products):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        HvpOperator(loss_fn(), blocks[0]).eigenvalues(
            [0, 1], max_iterations=30, tolerance=1e-9, seed=0, progress=interrupt
        )


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda w: w * 2, r"one floating-point number, got shape \[3\]"),
        (lambda w: w.detach().sum(), "without a graph"),
    ],
)
def test_a_loss_of_another_kind_is_refused(loss, words):
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=words):
        HvpOperator(loss(w), [w])


def test_parameters_that_are_not_leaves_are_refused():
    w = torch.ones(3, requires_grad=True)
    v = w * 2
    with pytest.raises(ValueError, match="leaves"):
        HvpOperator(v.square().sum(), [v])


@pytest.mark.parametrize("block", [[7], [-1]])
@pytest.mark.parametrize("kind", ["product", "eigenvalues", "traces", "fisher", "top"])
def test_a_block_that_is_not_there_is_named(kind, block):
    x = torch.randn(3, requires_grad=True)
    hessian, fisher = HvpOperator((x**3).sum(), [x]), FisherOperator(x**3, [x])
    calls = {
        "product": lambda: hessian.product(block, [torch.ones(3)]),
        "eigenvalues": lambda: hessian.eigenvalues(block, max_iterations=3, tolerance=0.1, seed=0),
        "traces": lambda: hessian.traces(
            [block], tolerance=0.1, min_products=2, max_products=2, seed=0
        ),
        "fisher": lambda: fisher.exact_traces([block]),
        "top": lambda: fisher.largest_eigenvalue(block),
    }
    with pytest.raises(IndexError, match=f"indices from 0 to 0, got {block[0]}"):
        calls[kind]()


def test_lanczos_ends_when_there_was_enough_and_says_so():
    x = torch.randn(40, requires_grad=True)
    hessian = HvpOperator((torch.linspace(-1, 3, 40) * x * x).sum() / 2, [x])
    asked = []
    found = hessian.eigenvalues(
        [0], max_iterations=30, tolerance=1e-9, seed=0,
        enough=lambda: asked.append(1) or len(asked) == 3,
    )  # fmt: skip
    assert found["iterations"] == 4 and not found["converged"]
    found = hessian.eigenvalues([0], max_iterations=40, tolerance=1e-9, seed=0)
    assert found["residual"] == found["largest_residual"] < 1e-6
    assert found["smallest_residual"] >= 0.0


def test_a_vector_of_another_shape_is_refused():
    w = torch.ones(3, requires_grad=True)
    operator = HvpOperator(w.square().sum(), [w])
    with pytest.raises(ValueError, match=r"shape \[3\], got \[4\]"):
        operator.product([0], [torch.ones(4)])
    with pytest.raises(IndexError, match="got 1"):
        operator.product([1], [torch.ones(3)])


def test_products_that_overflow_are_refused():
    w = torch.full((3,), 1e30, requires_grad=True)
    with pytest.raises(Error, match="finite"):
        HvpOperator((w**4).sum(), [w]).traces(
            [[0]], tolerance=0.1, min_products=2, max_products=4, seed=0
        )
