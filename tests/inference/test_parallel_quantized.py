"""Quantized checkpoints and INT8 activations: two and three ranks against one."""

import models
import pytest
import rounded_models
import torch
from launch import WORKERS, run_ranks
from models import relative_error, sequences
from workers.quantized_rank import run

from moq.input_grid import is_static

ROWS = sequences(13, 4, 29)
# Ranks sum partial products in another order than one process does; measured: up to 1e-6.
TOLERANCE = 5e-6

# Name -> (model, grid of the export or None, its activations, options of from_pretrained).
CASES = {
    "int8 activations": ("nine_heads", None, None, {"dtype": "int8", "activations": "dynamic"}),
    "groups cut by ranks": ("llama_even", "4 bits asymmetric per group", None, {}),
    "conv1d": ("gpt2", "8 bits per channel", None, {}),
    "trained activations": ("llama", "8 bits per channel", "dynamic", {}),
    "static activations": ("llama", "8 bits per channel", "static", {}),
    "asymmetric": (
        "nine_heads",
        None,
        None,
        {"dtype": "int8", "activations": "dynamic_asymmetric"},
    ),
    "trained asymmetric": ("llama", "8 bits per channel", "dynamic_asymmetric", {}),
    "static asymmetric": ("llama", "8 bits asymmetric", "static_asymmetric", {}),
}


@pytest.fixture(scope="module")
def jobs(model_directory, tmp_path_factory):
    made = {}
    for name, (model, grid, activations, options) in CASES.items():
        directory = model_directory(model)
        if grid is not None:
            directory = tmp_path_factory.mktemp("exported") / "out"
            built = models.build(model)
            grids = None
            if activations is not None and is_static(activations):
                grids = rounded_models.static_input_grids(built, ROWS[-1], activations)
            rounded_models.export(built, directory, grid, activations, grids)
        made[name] = {"directory": str(directory), "options": options, "rows": ROWS}
    return made


@pytest.fixture(scope="module")
def alone(jobs):
    return {name: run(job) for name, job in jobs.items()}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, jobs, tmp_path_factory):
    """Per rank the results by case, of so many processes of one thread."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(list(jobs.values()), folder / "jobs.pt")
    run_ranks(request.param, [WORKERS / "quantized_rank.py", folder / "jobs.pt"], timeout=300)
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]
    return [dict(zip(jobs, result, strict=True)) for result in results]


@pytest.mark.parametrize("case", ["groups cut by ranks", "conv1d"])
def test_logits_are_those_of_one_rank(case, ranks, alone):
    for rank in ranks:
        assert relative_error(rank[case]["logits"], alone[case]["logits"]) < TOLERANCE


@pytest.mark.parametrize("case", ["groups cut by ranks", "conv1d"])
def test_greedy_tokens_are_those_of_one_rank(case, ranks, alone):
    for rank in ranks:
        assert rank[case]["greedy"] == alone[case]["greedy"]


@pytest.mark.parametrize(
    "case",
    [
        "int8 activations",
        "trained activations",
        "static activations",
        "asymmetric",
        "trained asymmetric",
        "static asymmetric",
    ],
)
def test_int8_activations_err_as_on_one_rank(case, ranks, alone, jobs):
    # A sum in another order may move an activation over the edge between two codes, so the logits
    # differ; a grid of a rank's own part, instead of the whole row's, would err more.
    _, grid, _, _ = CASES[case]
    same_weights = {"dtype": "int8" if grid is None else "fp32"}
    exact = run(jobs[case] | {"options": same_weights})["logits"]
    error = relative_error(alone[case]["logits"], exact)
    for rank in ranks:
        assert relative_error(rank[case]["logits"], exact) <= 2 * error
