"""The real SmolLM2-135M against transformers."""

import torch
from models import greedy, reference_logits, relative_error

from moq.inference import Engine

PROMPT = "My fellow Americans, the state of our union is"


def test_greedy_tokens_equal_transformers_for_128_tokens(smollm2):
    directory, model, tokenizer = smollm2
    row = tokenizer(PROMPT)["input_ids"]
    tokens = Engine.from_pretrained(directory).generate(row, 128, stop_token_ids=[]).token_ids
    assert len(tokens) == 128
    assert tokens == greedy(model, row, tokens)


def test_logits_equal_transformers(smollm2):
    directory, model, tokenizer = smollm2
    row = tokenizer(PROMPT)["input_ids"]
    error = relative_error(
        Engine.from_pretrained(directory).forward([row])[0], reference_logits(model, row)
    )
    assert error < 1e-5  # measured: 1.8e-6


def test_int8_weights_keep_the_perplexity(smollm2):
    directory, model, tokenizer = smollm2
    row = tokenizer(PROMPT + " strong, because the people of this country are strong.")["input_ids"]
    logits = Engine.from_pretrained(directory, dtype="int8").forward([row])[0]
    targets = torch.tensor(row[1:])
    loss, expected = (
        torch.nn.functional.cross_entropy(values[:-1], targets)
        for values in (logits, reference_logits(model, row))
    )
    assert abs(loss - expected) < 0.02 * expected
