"""The real SmolLM2-135M against transformers."""

import torch
from models import greedy, open_fp32, reference_logits, relative_error

PROMPT = "My fellow Americans, the state of our union is"


def test_greedy_tokens_equal_transformers_for_256_tokens(smollm2, device):
    directory, model, tokenizer = smollm2
    row = tokenizer(PROMPT)["input_ids"]
    tokens = open_fp32(directory, device).generate(row, 256, stop_token_ids=[]).token_ids
    assert len(tokens) == 256
    assert tokens == greedy(model, row, tokens)


def test_logits_equal_transformers(smollm2, device):
    directory, model, tokenizer = smollm2
    row = tokenizer(PROMPT)["input_ids"]
    error = relative_error(
        open_fp32(directory, device).forward([row])[0], reference_logits(model, row)
    )
    assert error < 1e-5  # measured: 1.8e-6


def test_int8_weights_keep_the_perplexity(smollm2, device):
    directory, model, tokenizer = smollm2
    row = tokenizer(PROMPT + " strong, because the people of this country are strong.")["input_ids"]
    logits = open_fp32(directory, device, dtype="int8").forward([row])[0].cpu()
    targets = torch.tensor(row[1:])
    loss, expected = (
        torch.nn.functional.cross_entropy(values[:-1], targets)
        for values in (logits, reference_logits(model, row))
    )
    assert abs(loss - expected) < 0.02 * expected
