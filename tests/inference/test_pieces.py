"""Prompts that are read in several pieces, against one forward pass of all their tokens."""

import pytest
import torch
from decoders import write_decoder
from models import open_fp32, sequences

NEW_TOKENS = 12
FORMS = {
    "gpt2": {},
    "llama": {
        "norm": "rms_norm",
        "positions": "rotary",
        "gated": True,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 24,
        "hidden_size": 48,
        "intermediate_size": 100,
    },
}


@pytest.fixture(scope="module", params=FORMS)
def directory(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    write_decoder(directory, attends=3.0, **FORMS[request.param], max_positions=4500)
    return directory


def check_rows(engine, rows, generated) -> None:
    """Every token is the choice of one forward pass of the whole row, as far as float32 decides."""
    for row, tokens in zip(rows, generated, strict=True):
        assert len(tokens) == NEW_TOKENS
        logits = engine.forward([[*row, *tokens[:-1]]])[0][len(row) - 1 :]
        lost = (
            logits.amax(dim=-1)
            - logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
        )
        assert lost.max() < 1e-4 * logits.abs().max()


def generate(engine, rows, **options) -> list[list[int]]:
    result = engine.core.generate(rows, max_new_tokens=NEW_TOKENS, **options)
    return [row.tokens for row in result.rows]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 65, 100, 333])
def test_small_pieces_of_ragged_prompts_are_one_prompt(chunk_tokens, directory, device):
    engine = open_fp32(directory, device)
    rows = sequences(150, 1, 64, 65, 100, 129)
    together = generate(engine, rows, chunk_tokens=chunk_tokens)
    check_rows(engine, rows, together)
    assert together == [generate(engine, [row])[0] for row in rows]
    assert generate(engine, rows, chunk_tokens=chunk_tokens, max_batch=2) == together


@pytest.mark.parametrize("lengths", [(4095,), (4096,), (4097,), (4400, 3, 4096, 700)])
def test_prompts_longer_than_a_piece_are_one_prompt(lengths, directory, device):
    """A GPU's pieces are of 4096 tokens, a CPU's of 512."""
    engine = open_fp32(directory, device)
    rows = sequences(*lengths)
    generated = generate(engine, rows)
    check_rows(engine, rows, generated)
    if device != "cpu":
        assert generated == generate(open_fp32(directory, "cpu"), rows)
