import copy
import math
import os
import random
import re

import numpy as np
import pytest
import torch
from reference.hessian import block_ranges, dense_hessian
from torch import nn
from torch.nn import functional as F
from transformers import BatchEncoding

from moq.sensitivity import find_blocks, measure, normalise
from moq.undisturbed import undisturbed


class Noisy(nn.Module):
    """Everything a measurement could disturb: dropout, running statistics, a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + torch.rand(2) + random.random() + np.random.rand()
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.dropout(self.norm(x)))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Noisy()


@pytest.fixture
def batches():
    torch.manual_seed(2)
    return [(torch.randn(6, 4), torch.randint(0, 2, (6,))) for _ in range(3)]


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def exact_blocks(model, batches):
    """Diagonal blocks of the mean Hessian in eval mode, float64."""
    twin = copy.deepcopy(model).double().eval()
    blocks = find_blocks(twin)
    data = [(x.double(), y) for x, y in batches]
    dense = torch.stack(
        [
            dense_hessian(lambda batch=batch: loss_of(twin)(batch), sum(blocks.values(), []))
            for batch in data
        ]
    )
    return {
        name: dense[:, rows, rows]
        for name, rows in zip(blocks, block_ranges(list(blocks.values())), strict=True)
    }


def test_traces_are_those_of_the_mean_hessian_within_their_errors(model, batches):
    exact = exact_blocks(model, batches)
    found = measure(model, None, loss_of(model), batches, max_products=600, tolerance=0.02)
    assert found.blocks == tuple(exact)
    for name, value, error in zip(exact, found.values, found.standard_error, strict=True):
        trace = exact[name].mean(0).trace().item()
        assert abs(value - trace) <= 4 * error + 1e-5 * max(map(abs, found.values))


def test_eigenvalues_are_the_means_of_both_ends(model, batches):
    exact = exact_blocks(model, batches)
    found = measure(
        model, None, loss_of(model), batches, measure="eigenvalue", tolerance=1e-4, max_products=60
    )
    scale = max(map(abs, found.values))
    for i, hessians in enumerate(exact.values()):
        ends = torch.stack([torch.linalg.eigvalsh(h)[[0, -1]] for h in hessians]).mean(0).tolist()
        assert found.smallest[i] == pytest.approx(ends[0], abs=1e-3 * scale)
        assert found.largest[i] == pytest.approx(ends[1], abs=1e-3 * scale)
        assert found.values[i] == max(found.smallest[i], found.largest[i], key=abs)


class Diagonal(nn.Module):
    """A loss whose Hessian is the batch on the diagonal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(60))

    def forward(self, diagonal: torch.Tensor) -> torch.Tensor:
        return 0.5 * (diagonal * self.weight.square()).sum()


def test_a_residual_is_that_of_the_end_that_is_reported():
    model = Diagonal()
    # The upper end dominates the first batch, the lower one the second and the mean.
    up = torch.cat([torch.tensor([20.0]), torch.linspace(-17, 5, 59)])
    down = torch.cat([torch.tensor([0.0]), torch.linspace(-25, 17, 59)])
    options = {"measure": "eigenvalue", "tolerance": 0.01, "progress": False}
    single = [measure(model, None, model, [batch], **options) for batch in (up, down)]
    assert single[0].eigenvalues[0] > 0.0 > single[1].eigenvalues[0]
    found = measure(model, None, model, [up, down], **options)
    assert found.eigenvalues == found.smallest == pytest.approx([-21.0], abs=0.3)
    assert found.residuals[0] > single[0].residuals[0]
    # Each eigenvalue lies within its residual of one, and so do the means.
    assert abs(found.eigenvalues[0] + 21.0) <= found.residuals[0]
    assert found.converged == (found.residuals[0] <= 0.01 * abs(found.eigenvalues[0]))


def test_normalised_values_divide_by_the_largest_magnitude():
    assert normalise([2.0, -8.0, 0.0]) == (0.25, 1.0, 0.0)
    assert normalise([0.0, 0.0]) == (0.0, 0.0)
    assert normalise([]) == ()


def test_the_error_falls_to_the_tolerance_or_the_result_says_not(model, batches):
    good = measure(model, None, loss_of(model), batches[:1], tolerance=0.1, max_products=3000)
    assert good.converged
    assert max(good.standard_error) <= 0.1 * max(map(abs, good.values))
    assert good.products < 3000
    poor = measure(model, None, loss_of(model), batches, tolerance=1e-6, max_products=12)
    assert not poor.converged
    assert poor.products == 12


def test_each_of_many_batches_needs_less_accuracy_than_one_alone(model, batches):
    one = measure(model, None, loss_of(model), batches[:1], tolerance=0.1, max_products=2000)
    many = measure(
        model, None, loss_of(model), batches[:1] * 16, tolerance=0.1, max_products=16 * 2000
    )
    assert one.converged and many.converged
    assert many.products < 16 * one.products / 4


@pytest.mark.parametrize("kind", ["trace", "eigenvalue"])
def test_the_same_measurement_twice_gives_the_same_bits(model, batches, kind):
    first = measure(model, None, loss_of(model), batches, measure=kind)
    torch.rand(7)
    again = measure(model, None, loss_of(model), batches, measure=kind)
    assert first.values == again.values
    assert (
        measure(model, None, loss_of(model), batches, measure=kind, seed=9).values != first.values
    )


@pytest.mark.parametrize("kind", ["trace", "both"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["exact", "finite_difference", "gauss_newton", "fisher"])
def test_nothing_is_left_changed(model, batches, kind, training, form):
    model.train(training)
    model.layers[1].train(not training)
    loss_of(model)(batches[0]).backward()
    model.layers[2].weight.grad = None
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    gradients = {
        n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None
    }
    flags = [module.training for module in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    generators = (torch.get_rng_state(), random.getstate(), np.random.get_state())

    def loss_fn(batch):
        outputs = model(batch[0])
        reduction = "none" if form == "fisher" else "mean"
        loss = F.cross_entropy(outputs, batch[1], reduction=reduction)
        return (loss, outputs) if form == "gauss_newton" else loss

    measure(model, None, loss_fn, batches, measure=kind, form=form, max_products=4)

    assert calls
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(gradients)
    for name, (gradient, value) in gradients.items():
        assert model.get_parameter(name).grad is gradient
        assert torch.equal(gradient, value)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == needs
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert all(
        np.array_equal(a, b) for a, b in zip(np.random.get_state(), generators[2], strict=True)
    )


def test_an_error_in_the_body_restores_too(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        model(torch.randn(6, 4))
        raise ZeroDivisionError
    assert model.training and model.dropout.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_training_step_is_the_same_with_and_without_a_measurement(model, batches):
    def losses(measured):
        twin = copy.deepcopy(model)
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        optimizer = torch.optim.AdamW(twin.parameters())
        values = []
        for _ in range(3):
            loss = loss_of(twin)(batches[0])
            optimizer.zero_grad()
            loss.backward()
            if measured:
                measure(twin, None, loss_of(twin), batches, max_products=4)
            optimizer.step()
            values.append(loss.item())
        return values

    assert losses(True) == losses(False)


def test_measuring_under_no_grad_works(model, batches):
    expected = measure(model, None, loss_of(model), batches).values
    with torch.no_grad():
        assert measure(model, None, loss_of(model), batches).values == expected


def test_measuring_a_compiled_model_uses_its_plain_form(batches):
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    compiled = torch.compile(plain, backend="aot_eager")
    compiled(batches[0][0])
    expected = measure(plain, None, loss_of(plain), batches).values
    assert measure(compiled, None, loss_of(compiled), batches).values == expected


@pytest.mark.parametrize("form", ["auto", "exact"])
def test_attention_takes_its_math_form_only_while_measuring(form):
    q = nn.Parameter(torch.randn(2, 4, 8, 16))
    holder = nn.Module()
    holder.q = q
    seen = []

    def loss_fn(_):
        y = F.scaled_dot_product_attention(q, q, q)
        seen.append(type(y.grad_fn).__name__)
        return y.square().sum()

    found = measure(holder, None, loss_fn, [0], max_products=2, form=form)
    assert found.form == "exact" and found.values[0] != 0.0
    assert seen and not any("Flash" in name or "Efficient" in name for name in seen)
    assert "Flash" in type(F.scaled_dot_product_attention(q, q, q).grad_fn).__name__


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.0.mlp.weight", "model.layers.0.norm.weight"], ["model.layers.0"]),
        (["h.0.attn.c_attn.weight", "h.11.mlp.c_fc.bias"], ["h.0", "h.11"]),
        (["bert.encoder.layer.3.output.dense.weight"], ["bert.encoder.layer.3"]),
        (["blocks.2.experts.layers.1.weight"], ["blocks.2"]),
        (["lm_head.weight", "scale"], ["lm_head", "scale"]),
    ],
)
def test_blocks_are_the_transformer_layers(monkeypatch, names, expected):
    model = nn.Module()
    parameters = [(name, nn.Parameter(torch.zeros(1))) for name in names]
    monkeypatch.setattr(model, "named_parameters", lambda: iter(parameters), raising=False)
    assert list(find_blocks(model)) == expected


def test_blocks_can_be_named_by_a_pattern_and_leave_out_frozen_parameters(model):
    model.layers[1].weight.requires_grad_(False)
    blocks = find_blocks(model, r"^layers")
    assert list(blocks) == ["layers", "norm", "head"]
    assert len(blocks["layers"]) == 5


def test_bad_arguments_are_refused(model, batches):
    weight = model.head.weight
    with pytest.raises(ValueError, match="'trace', 'eigenvalue' or 'both', got 'fisher'"):
        measure(model, None, loss_of(model), batches, measure="fisher")
    with pytest.raises(ValueError, match="at least one batch"):
        measure(model, None, loss_of(model), [])
    with pytest.raises(
        TypeError, match=r"one batch alone, a BatchEncoding with the keys \['ids'\]"
    ):
        measure(model, None, loss_of(model), BatchEncoding({"ids": batches[0][0]}))
    with pytest.raises(ValueError, match="trainable parameter, got none"):
        measure(model, {"a": []}, loss_of(model), batches)
    with pytest.raises(ValueError, match="one parameter in 'a' and 'b'"):
        measure(model, {"a": [weight], "b": [weight]}, loss_of(model), batches)
    with pytest.raises(ValueError, match=r"got shape \[6\]"):
        measure(model, None, lambda b: model(b[0])[:, 0], batches)


def test_a_tolerance_that_is_not_met_is_printed_with_the_remedy(model, batches, capsys):
    found = measure(model, None, loss_of(model), batches, tolerance=0.01, max_products=12)
    printed = capsys.readouterr().err
    error, largest = max(found.standard_error), max(map(abs, found.values))
    assert f"errors are up to {error:.3g}, and the tolerance is {largest / 100:.3g}" in printed
    assert "measure after some steps" in printed
    assert "raise sensitivity.max_products (now 12) or sensitivity.tolerance" in printed
    (enough,) = re.findall(r"about ([\d,]+) products would do", printed)
    assert int(enough.replace(",", "")) == pytest.approx(
        12 * (100 * error / largest) ** 2, rel=0.05
    )


def test_products_for_eigenvalues_tell_nothing_of_how_many_a_trace_needs(model, batches, capsys):
    options = {"tolerance": 0.01, "max_products": 12}
    told = []
    for kind in ("trace", "both"):
        found = measure(model, None, loss_of(model), batches, measure=kind, **options)
        (line,) = re.findall(r"sensitivity \(trace\): after 12 .*", capsys.readouterr().err)
        told.append(line)
    assert found.products > 12 and told[0] == told[1]


def test_values_that_are_noise_are_counted(capsys):
    """The curvature of a saddle has no trace, so that all that is found of it is error."""
    saddle, bowl = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    model = nn.ParameterList([saddle, bowl])
    blocks = {"saddle": [saddle], "bowl": [bowl]}
    found = measure(model, blocks, lambda _: saddle.prod() + bowl.square().sum(), [0], seed=1)
    assert abs(found.values[0]) <= found.standard_error[0]
    assert found.values[1] == 6.0 and found.standard_error[1] == 0.0
    assert "; 1 of 2 values are no larger than their errors" in capsys.readouterr().err


def test_eigenvalues_that_miss_their_tolerance_are_told_apart_from_traces(model, batches, capsys):
    options = {"measure": "both", "max_products": 600}
    measure(model, None, loss_of(model), batches, tolerance=0.3, **options)
    assert "sensitivity (" not in capsys.readouterr().err
    measure(model, None, loss_of(model), batches, measure="eigenvalue", max_products=2)
    printed = capsys.readouterr().err
    assert "sensitivity (eigenvalue): after " in printed and "sensitivity (trace)" not in printed
    assert "raise sensitivity.max_products (now 2 a block and batch)" in printed


def test_the_cost_of_eigenvalues_is_printed_first(model, batches, capsys):
    measure(model, None, loss_of(model), batches, measure="eigenvalue", max_products=5)
    printed = capsys.readouterr().err
    assert printed.startswith("top eigenvalues of 5 blocks, 3 batches: at most 75 products of")
    assert "search of steps" not in printed
    measure(
        model,
        None,
        loss_of(model),
        batches,
        measure="eigenvalue",
        max_products=5,
        form="finite_difference",
    )
    assert "s together, and the search of steps\n" in capsys.readouterr().err
    measure(model, None, loss_of(model), batches, progress=False)
    assert capsys.readouterr().err == ""


def _all_batches():
    torch.manual_seed(2)
    return [(torch.randn(6, 4), torch.randint(0, 2, (6,))) for _ in range(3)]


def _rank(rank: int, size: int, folder: str) -> None:
    """One of two processes: the first brings one batch, the second two; then the second fails."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    torch.manual_seed(1)
    model = Noisy()
    own = _all_batches()[:1] if rank == 0 else _all_batches()[1:]
    results = {}
    for kind in ("trace", "eigenvalue"):
        results[kind] = measure(
            model, None, loss_of(model), own, measure=kind, max_products=12, progress=False
        )
    x, y = own[0]
    try:
        measure(model, None, loss_of(model), [(x, y + 99 * rank)], progress=False)
    except Exception as error:
        results["error"] = f"{type(error).__name__}: {error}"
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Not through the interpreter's exit: under load torch's own threads may outlive what they use.
    os._exit(0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("kind", ["trace", "eigenvalue"])
def test_ranks_with_different_data_agree_with_each_other_and_one_process(two_ranks, kind):
    first, second = (rank[kind] for rank in two_ranks)
    torch.manual_seed(1)
    model = Noisy()
    alone = measure(model, None, loss_of(model), _all_batches(), measure=kind, max_products=12)
    assert first.values == second.values
    assert first.normalised == second.normalised
    assert first.standard_error == second.standard_error
    assert first.products == alone.products
    assert all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)
        for a, b in zip(first.values, alone.values, strict=True)
    )


def test_a_rank_that_fails_fails_all(two_ranks):
    first, second = (rank["error"] for rank in two_ranks)
    assert second.startswith("IndexError")
    assert first == f"RuntimeError: rank 1 failed: {second}"


def test_a_loss_that_is_a_number_is_refused(model, batches):
    with pytest.raises(TypeError, match="loss_fn must return a tensor, got float"):
        measure(model, None, lambda batch: 1.0, batches)
