"""FP16 and BF16 on a GPU: the errors of logits against those of transformers in the same dtype."""

import copy
from pathlib import Path

import models
import pytest
import torch
from models import DECODERS, sequences

from moq.inference import Engine

pytestmark = pytest.mark.gpu

LICENSE = Path(__file__).parents[2] / "LICENSE"  # a long English text
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


ROWS = sequences(1, 8, 9, 40, 95)


@torch.no_grad()
def logits_of(model, rows, device):
    """transformers' logits of all rows, one below the other, float64."""
    model = copy.deepcopy(model).to(device)
    logits = [model(torch.tensor([row], device=device)).logits.flatten(0, -2) for row in rows]
    return torch.cat(logits).double().cpu()


def check_against_naive(actual, naive, exact):
    """Errors at most twice those of the naive computation, and equal decisions where it has one.

    Returns:
        The share of positions whose decision the bound guarantees.
    """
    actual = actual.double().cpu()
    rms, naive_rms = ((values - exact).square().mean().sqrt() for values in (actual, naive))
    print(
        f"rms error {rms:.2e}, naive {naive_rms:.2e}; largest {(actual - exact).abs().max():.2e}, "
        f"naive {(naive - exact).abs().max():.2e}"
    )
    bound = 2 * (naive - exact).abs().max()
    assert (actual - exact).abs().max() <= bound
    assert (actual - exact).square().mean() <= 1.5 * (naive - exact).square().mean()
    top = exact.topk(2, dim=-1).values
    decided = (top[..., 0] - top[..., 1]) > 2 * bound
    assert torch.equal(actual.argmax(-1)[decided], exact.argmax(-1)[decided])
    return decided.double().mean().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_errors_are_those_of_its_dtype(name, dtype, model_directory, gpu):
    directory = model_directory(name)
    engine = Engine.from_pretrained(
        directory, device=gpu, dtype=dtype, policy=models.policy_in(directory)
    )
    assert engine.core.compute_dtype == str(DTYPES[dtype]).removeprefix("torch.")
    half = models.build(name).to(DTYPES[dtype])
    naive = logits_of(half, ROWS, gpu)
    check_against_naive(
        torch.cat(engine.forward(ROWS)), naive, logits_of(half.double(), ROWS, "cpu")
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "bert_masked_lm"])
def test_encoder_errors_are_those_of_its_dtype(name, dtype, model_directory, gpu):
    engine = Engine.from_pretrained(model_directory(name), device=gpu, dtype=dtype)
    half = models.build(name).to(DTYPES[dtype])
    rows = sequences(*range(1, 95, 3))
    if name == "bert_masked_lm":
        actual = torch.cat(engine.forward(rows))
    else:
        actual = engine.encode(rows).logits
    naive = logits_of(half, rows, gpu)
    check_against_naive(actual, naive, logits_of(half.double(), rows, "cpu"))


@pytest.mark.parametrize("weights", ["fp16", "bf16", "int8"])
def test_decisions_of_a_real_model_are_those_of_float64(weights, smollm2, gpu):
    directory, model, tokenizer = smollm2
    row = tokenizer(LICENSE.read_text())["input_ids"][:256]
    engine = Engine.from_pretrained(directory, device=gpu, dtype=weights)
    half = copy.deepcopy(model).to(DTYPES.get(weights, torch.float32))
    if weights == "int8":
        half = models.simulate_int8(half)
    naive = logits_of(copy.deepcopy(half).half() if weights == "int8" else half, [row], gpu)
    exact = logits_of(half.double(), [row], "cpu")
    decided = check_against_naive(engine.forward([row])[0], naive, exact)
    print(f"{weights}: decided positions {decided:.3f}")
