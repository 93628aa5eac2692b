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


OPTIONS = [
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
]


@pytest.mark.parametrize("vocabulary", [1, 31, 1009, 49152])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_distribution_is_what_transformers_draws_from(options, vocabulary):
    logits = random_logits(5, vocabulary)
    history = random_history(5, vocabulary)
    _, probabilities = sample(logits, history, **options, probabilities=True)
    expected = transformers_probabilities(logits, history, options)
    assert torch.equal(probabilities > 0, expected > 0)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-12)


def test_drawn_tokens_are_kept_ones():
    logits = random_logits(64, 1009)
    for step in range(5):
        tokens, probabilities = sample(
            logits, temperature=2.0, top_p=0.5, seed=3, step=step, probabilities=True
        )
        assert (probabilities.gather(1, tokens[:, None]) > 0).all()


def test_temperature_zero_is_argmax(device):
    logits = random_logits(7, 1009).to(device)
    assert torch.equal(sample(logits, temperature=0.0)[0], logits.argmax(dim=1))


def test_seed_step_and_row_decide_the_draw(device):
    logits = torch.zeros(64, 49152, device=device)
    tokens = sample(logits, seed=5, step=2)[0]
    assert torch.equal(sample(logits, seed=5, step=2)[0], tokens)
    assert torch.equal(sample(logits[:9], seed=5, step=2)[0], tokens[:9])
    assert len(set(tokens.tolist())) > 48
    assert not torch.equal(sample(logits, seed=6, step=2)[0], tokens)
    assert not torch.equal(sample(logits, seed=5, step=3)[0], tokens)


@pytest.mark.parametrize("vocabulary", [1, 31, 1009, 50257])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_gpu_draws_what_the_cpu_draws(gpu, options, vocabulary):
    logits, history = random_logits(128, vocabulary), random_history(128, vocabulary)
    differ = 0
    for step in range(4):
        arguments = options | {"seed": 9, "step": step}
        tokens, probabilities = sample(logits, history, **arguments, probabilities=True)
        drawn = sample(logits.to(gpu), history.to(gpu), **arguments)[0].cpu()
        assert (probabilities.gather(1, drawn[:, None]) > 0).all()
        differ += (tokens != drawn).sum().item()
    # A uniform that falls on the edge of two tokens goes to either, as sums are rounded.
    assert differ <= 128 * 4 * 0.005


def test_a_bad_row_on_a_gpu_gives_no_token(gpu):
    logits = random_logits(4, 1009)
    logits[1, 7] = torch.nan
    logits[3, 5] = torch.inf
    for temperature in (0.0, 1.0):
        tokens = sample(logits.to(gpu), temperature=temperature)[0].tolist()
        assert [token == -1 for token in tokens] == [False, True, False, True]


def test_probabilities_come_when_they_are_asked_for():
    assert sample(random_logits(3, 31))[1].shape == (0,)


def test_says_that_it_has_no_gradient():
    _, probabilities = sample(random_logits(3, 31).requires_grad_(), probabilities=True)
    with pytest.raises(RuntimeError, match="moq::sample.* not implemented"):
        probabilities.sum().backward()


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


def test_bad_input_on_a_gpu_is_an_error(gpu):
    logits = torch.zeros(2, 3, device=gpu)
    with pytest.raises(ValueError, match="history must be on cuda:0 .*, got cpu"):
        sample(logits, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"history must hold tokens in \[0, 3\), got 0 to 3"):
        history = torch.tensor([[0], [3]], device=gpu)
        sample(logits, history, repetition_penalty=1.5)
    with pytest.raises(NotImplementedError, match="probabilities must be False on a GPU, got True"):
        sample(logits, probabilities=True)


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
def test_an_option_out_of_range_is_named(options, device):
    with pytest.raises(RuntimeError, match=next(iter(options))):
        sample(torch.zeros(1, 3, device=device), **options)
