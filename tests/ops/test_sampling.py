"""torch.ops.moq.sample against the logits processors of transformers."""

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import moq  # noqa: F401  (registers the operators)

sample = torch.ops.moq.sample


def random_logits(batch, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn(batch, vocabulary, generator=generator)


def random_history(batch, vocabulary, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator)


def transformers_probabilities(logits, history, options):
    """What generate(do_sample=True) draws from: its processors in its order."""
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        processors.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    return processors(history, logits).softmax(dim=-1)


@pytest.mark.parametrize("vocabulary", [1, 31, 1009, 49152])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_p": 0.05},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
        {"temperature": 1.7, "top_p": 0.6, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_distribution_is_what_transformers_draws_from(options, vocabulary):
    logits = random_logits(5, vocabulary)
    history = random_history(5, vocabulary)
    _, probabilities = sample(logits, history, **options)
    expected = transformers_probabilities(logits, history, options)
    assert torch.equal(probabilities > 0, expected > 0)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-12)


def test_drawn_tokens_are_kept_ones():
    logits = random_logits(64, 1009)
    for step in range(5):
        tokens, probabilities = sample(logits, temperature=2.0, top_p=0.5, seed=3, step=step)
        assert (probabilities.gather(1, tokens[:, None]) > 0).all()


def test_temperature_zero_is_argmax():
    logits = random_logits(7, 1009)
    assert torch.equal(sample(logits, temperature=0.0)[0], logits.argmax(dim=1))


def test_seed_step_and_row_decide_the_draw():
    logits = torch.zeros(64, 49152)
    tokens = sample(logits, seed=5, step=2)[0]
    assert torch.equal(sample(logits, seed=5, step=2)[0], tokens)
    assert torch.equal(sample(logits[:9], seed=5, step=2)[0], tokens[:9])
    assert len(set(tokens.tolist())) > 48
    assert not torch.equal(sample(logits, seed=6, step=2)[0], tokens)
    assert not torch.equal(sample(logits, seed=5, step=3)[0], tokens)


def test_says_that_it_has_no_gradient():
    _, probabilities = sample(random_logits(3, 31).requires_grad_())
    with pytest.raises(RuntimeError, match="moq::sample.* not implemented"):
        probabilities.sum().backward()


def test_opcheck():
    logits = random_logits(3, 31)
    torch.library.opcheck(sample, (logits, random_history(3, 31)), {"top_k": 5, "seed": 1})
    torch.library.opcheck(sample, (logits,))


@pytest.mark.parametrize(
    ("logits", "history", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), None, TypeError, "float32"),
        (torch.zeros(3), None, ValueError, r"\[batch, vocabulary\]"),
        (torch.zeros(2, 3), torch.zeros(2, 1), TypeError, "int64"),
        (torch.zeros(2, 3), torch.zeros(1, 1, dtype=torch.int64), ValueError, "history"),
        (torch.zeros(2, 3), torch.full((2, 1), 3), RuntimeError, r"\[0, 3\), got 3"),
        (torch.full((1, 3), torch.nan), None, RuntimeError, "finite"),
    ],
)
def test_bad_input_is_an_error(logits, history, error, message):
    with pytest.raises(error, match=message):
        sample(logits, history)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named(options):
    with pytest.raises(RuntimeError, match=next(iter(options))):
        sample(torch.zeros(1, 3), **options)
