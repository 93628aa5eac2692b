"""The spectral density of blocks: against dense Hessians, in a run, and over ranks."""

import copy
import json
import math
import os

import pytest
import torch
from reference.hessian import block_ranges, dense_hessian
from tiny_decoder import assert_same, batch, loss_of, tiny_llama, weights, wrap
from torch import nn
from torch.nn import functional as F

import moq
from moq import _C
from moq.manifest import FormatError
from moq.sensitivity import find_blocks
from moq.spectrum import SpectralDensity, read_spectra


class Net(nn.Module):
    """Two blocks of 40 and 18 weights, with a dropout that eval mode switches off."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Linear(4, 8)
        self.dropout = nn.Dropout(0.5)
        self.upper = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.upper(self.dropout(torch.tanh(self.lower(x))))


def make(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return Net().to(dtype)


def data(dtype: torch.dtype = torch.float64, count: int = 3):
    torch.manual_seed(2)
    return [(torch.randn(6, 4, dtype=dtype), torch.randint(0, 2, (6,))) for _ in range(count)]


def loss_fn_of(model):
    return lambda pair: F.cross_entropy(model(pair[0]), pair[1])


def spectra(model, batches):
    """Eigenvalues of each block of the mean Hessian."""
    twin = copy.deepcopy(model).double().eval()
    blocks = find_blocks(twin)
    loss = loss_fn_of(twin)
    pairs = [(x.double(), y) for x, y in batches]
    dense = dense_hessian(lambda: sum(map(loss, pairs)) / len(pairs), sum(blocks.values(), []))
    ranges = block_ranges(list(blocks.values()))
    return {n: torch.linalg.eigvalsh(dense[r, r]) for n, r in zip(blocks, ranges, strict=True)}


def measure(model, batches, **options):
    options = {"progress": False} | options
    return moq.spectral_density(loss_fn_of(model), batches, model, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lanczos_takes_any_symmetric_product(dtype):
    matrix = torch.randn(50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix + matrix.T
    exact = torch.linalg.eigvalsh(matrix)
    given = matrix.to(dtype)
    found = _C.lanczos(
        lambda x: given @ x, 50, dtype=dtype, max_iterations=50, tolerance=1e-4, seed=0
    )
    assert found["converged"] and found["iterations"] == len(found["history"])
    assert found["dominant"] == found["history"][-1]
    assert found["dominant"] == pytest.approx(exact[exact.abs().argmax()].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_block_with_fewer_weights_than_steps_gives_its_eigenvalues(dtype):
    model, batches = make(dtype), data(dtype)
    exact = spectra(model, batches)
    found = measure(model, batches, steps=40)
    assert list(found) == ["lower", "upper"]
    for name, density in found.items():
        assert density.exact and density.products == density.num_weights == len(exact[name])
        ((nodes, _),) = density.rules
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        assert nodes == pytest.approx(exact[name].tolist(), abs=tolerance)
        assert density.trace == pytest.approx(exact[name].sum().item(), abs=40 * tolerance)
        assert density.trace_error == 0.0


def test_moments_of_the_mean_hessian_lie_within_their_errors():
    model, batches = make(), data()
    exact = spectra(model, batches)
    found = measure(model, batches, steps=10, probes=20)
    for name, density in found.items():
        assert not density.exact and density.products <= 200
        assert abs(density.trace - exact[name].sum().item()) <= 4 * density.trace_error
        variance = 2 * exact[name].square().sum().item()  # of one probe, at most
        assert density.trace_error <= 2 * math.sqrt(variance / 20)
        assert exact[name][0] - 1e-9 <= density.smallest <= density.largest
        assert density.largest <= exact[name][-1] + 1e-9
        assert density.largest == pytest.approx(exact[name][-1].item(), rel=1e-3)


def test_the_density_integrates_to_one_over_its_values():
    found = measure(make(), data(), points=801)["lower"]
    spacing = found.values[1] - found.values[0]
    assert len(found.values) == len(found.density) == len(found.density_error) == 801
    assert sum(found.density) * spacing == pytest.approx(1.0, abs=1e-3)
    assert found.width == pytest.approx((found.largest - found.smallest) / 100)
    wide = measure(make(), data(), width=0.5)["lower"]
    assert wide.width == 0.5 and max(wide.density) < max(found.density)


def test_a_flat_block_is_one_peak_at_zero():
    model, batches = make(), data()
    found = moq.spectral_density(
        lambda pair: model.upper(pair[0].repeat(1, 2)).sum(),
        batches,
        model,
        blocks=["upper"],
        progress=False,
    )["upper"]
    assert found.trace == found.smallest == found.largest == 0.0
    assert found.values[len(found.values) // 2] == pytest.approx(0.0, abs=1e-12)
    assert max(found.density) == pytest.approx(1 / math.sqrt(2 * math.pi))


def test_the_same_measurement_twice_gives_the_same_bits():
    first, again = (measure(make(), data(), steps=6) for _ in range(2))
    assert first == again
    assert measure(make(), data(), steps=6, seed=1) != first


def test_nothing_is_left_changed():
    model, batches = make(), data()
    loss_fn_of(model)(batches[0]).backward()
    before, state = weights(model), torch.get_rng_state()
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    measure(model, batches, steps=5)
    assert_same(weights(model), before)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    for p, (gradient, value) in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient and torch.equal(gradient, value)


def test_blocks_are_chosen_by_name_or_given():
    model, batches = make(), data()
    assert list(measure(model, batches, blocks=["upper"])) == ["upper"]
    given = measure(model, batches, blocks={"mine": [model.upper.bias]})
    assert given["mine"].num_weights == 2
    with pytest.raises(ValueError, match=r"among the model's 2, .* got 'uper' \(did you mean"):
        measure(model, batches, blocks=["uper"])


def test_bad_input_is_refused():
    model, batches = make(), data()
    with pytest.raises(ValueError, match="at least one batch"):
        measure(model, [])
    with pytest.raises(TypeError, match="one batch alone, a dict with the keys"):
        measure(model, {"x": batches[0][0]})
    with pytest.raises(ValueError, match="width must be positive and finite, got 0"):
        measure(model, batches, width=0.0)
    with pytest.raises(ValueError, match="points must be >= 2, got 1"):
        measure(model, batches, points=1)
    with pytest.raises(_C.Error, match="steps must be >= 1, got 0"):
        measure(model, batches, steps=0)
    with pytest.raises(_C.Error, match="probes must be >= 2, got 1"):
        measure(model, batches, probes=1)
    with pytest.raises(TypeError, match="a torch module or a MoQOptimizer, got SGD"):
        moq.spectral_density(loss_fn_of(model), batches, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="must be finite, got nan"):
        measure(model, [(batches[0][0] * math.nan, batches[0][1])])
    with pytest.raises(ValueError, match="must have 3 floating-point elements, got shape"):
        _C.spectral_quadrature(lambda x: x[:2], 3, dtype=torch.float32, steps=9, probes=2, seed=0)
    with pytest.raises(ValueError, match="dtype must be float32 or float64"):
        _C.spectral_quadrature(lambda x: x, 3, dtype=torch.half, steps=9, probes=2, seed=0)


def test_the_cost_is_printed_first(capsys):
    measure(make(), data(), steps=9, progress=True)
    printed = capsys.readouterr().err
    assert printed.startswith("spectral density of 2 blocks: at most 72 products with the mean")
    assert "72 products, " in printed


def test_an_optimizer_measures_the_blocks_of_its_schedule(decoder):
    model = decoder()
    optimizer = wrap(model, {}, 5)
    found = moq.spectral_density(
        lambda tokens: loss_of(model, tokens), [batch(0)], optimizer, steps=4, progress=False
    )
    assert list(found) == ["layers.0", "layers.1"]
    assert found["layers.0"].step == 0
    assert found["layers.0"].num_weights == sum(
        p.numel() for n, p in model.named_parameters() if n.startswith("layers.0") and p.dim() == 2
    )


def test_a_layer_that_rules_split_is_measured_whole_or_in_parts(decoder):
    model = decoder()
    rules = [{"match": "*.down_proj", "target_bits": 4}]
    optimizer = wrap(model, {"rules": rules}, 20)
    sizes = {}
    for names in (["layers.0"], ["layers.0 (16 to 8 bits)", "layers.0 (16 to 4 bits)"]):
        found = moq.spectral_density(
            lambda tokens: loss_of(model, tokens), [batch(0)], optimizer, blocks=names, steps=4,
            progress=False,
        )  # fmt: skip
        assert list(found) == names
        sizes |= {name: density.num_weights for name, density in found.items()}
    part = model.layers[0].down_proj.weight.numel()
    assert sizes["layers.0 (16 to 4 bits)"] == part
    assert sizes["layers.0"] == sizes["layers.0 (16 to 8 bits)"] + part


# ---------------------------------------------------------------------------------- in a run


@pytest.fixture
def saved(tmp_path):
    """A saved run with its optimizer, and a function that measures into it."""
    model = tiny_llama()
    optimizer = wrap(model, {}, 9)
    row = torch.randint(16, (1, 8))
    optimizer.save(tmp_path / "run")

    def record(run=tmp_path / "run", **options):
        options = {"steps": 3, "probes": 2, "progress": False} | options
        return moq.spectral_density(
            lambda r: model(input_ids=r, labels=r).loss, [row], optimizer, run=run, **options
        )

    return tmp_path / "run", optimizer, record


def test_a_run_holds_what_was_measured_until_it_is_saved_again(saved):
    run, optimizer, record = saved
    assert read_spectra(run) == []
    before = json.loads((run / "run.json").read_text())
    found = record()
    assert read_spectra(run) == list(found.values())
    after = json.loads((run / "run.json").read_text())
    del after["history"]["spectra"]
    assert after == before
    assert sorted(p.name for p in run.parent.iterdir()) == ["run"]
    optimizer.save(run)
    assert read_spectra(run) == []


def test_a_block_measured_again_at_the_same_step_replaces_the_former(saved):
    run, _, record = saved
    record()
    second = record(blocks=["model.layers.0"], seed=3)
    spectra = read_spectra(run)
    assert [s.block for s in spectra] == ["model.layers.1", "model.layers.0"]
    assert spectra[1] == second["model.layers.0"]


def test_a_directory_without_a_run_is_refused_before_measuring(saved, tmp_path):
    _, _, record = saved
    with pytest.raises(FormatError, match=r"nothing: must be a run, .* got nothing there"):
        record(run=tmp_path / "nothing", blocks=["model.layers.0"])


def test_a_density_survives_json():
    found = measure(make(), data(), steps=5)["lower"]
    assert SpectralDensity.from_dict(json.loads(json.dumps(found.to_dict()))) == found


# ---------------------------------------------------------------------------------- over ranks


def _rank(rank: int, size: int, folder: str) -> None:
    """One of two processes: the first brings one batch, the second two."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    own = data()[:1] if rank == 0 else data()[1:]
    found = measure(make(), own, steps=6)
    try:
        measure(make(), own, steps=6, blocks=["lower"] if rank == 0 else ["upper"])
    except ValueError as error:
        torch.save((found, str(error)), f"{folder}/{rank}.pt")
    model, calls = make(), []

    def second_fails(gradient):
        """Raises in the product, when the gradient is already there."""
        calls.append(gradient)
        if rank == 1 and len(calls) > 1:
            raise ValueError("no product")

    def loss_fn(pair):
        logits = model(pair[0])
        logits.register_hook(second_fails)
        return F.cross_entropy(logits, pair[1])

    try:
        moq.spectral_density(loss_fn, own[:1], model, progress=False)
    except (ValueError, RuntimeError) as error:
        torch.save((type(error), str(error)), f"{folder}/failed-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Not through the interpreter's exit: under load torch's own threads may outlive what they use.
    os._exit(0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (2, str(folder)), nprocs=2)
    return folder


def test_ranks_with_different_data_agree_with_each_other_and_one_process(two_ranks):
    (first, error), (second, _) = (
        torch.load(two_ranks / f"{rank}.pt", weights_only=False) for rank in range(2)
    )
    alone = measure(make(), data(), steps=6)
    assert first == second
    for name, density in alone.items():
        assert first[name].trace == pytest.approx(density.trace, rel=1e-12)
        assert first[name].density == pytest.approx(density.density, rel=1e-6, abs=1e-9)
    assert "must be the same on all ranks" in error


def test_a_rank_that_fails_in_a_product_fails_all(two_ranks):
    found = [torch.load(two_ranks / f"failed-{rank}.pt", weights_only=False) for rank in range(2)]
    assert found == [
        (RuntimeError, "rank 1 failed: ValueError: no product"),
        (ValueError, "no product"),
    ]
