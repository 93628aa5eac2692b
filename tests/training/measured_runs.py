"""Trainings whose layers were measured, and tables of latencies, to choose target widths for."""

import json

import torch
from tiny_decoder import tiny_llama, wrap

from moq.sensitivity import Sensitivity, normalise

STEPS = 20

BENCH = {
    "context": 256,
    "batch": 2,
    "decode_tokens_per_second": 200.0,
    "architecture": "llama",
    "device": "cpu",
    "weights": "int8",
    "head": "float32",
    "weight_bytes": 100,
}


def traces(model_blocks, values, measure="trace") -> Sensitivity:
    """A measurement that nobody made."""
    return Sensitivity(
        measure=measure,
        blocks=tuple(model_blocks),
        values=tuple(values),
        normalised=normalise(values),
        standard_error=(0.0,) * len(values),
        products=1,
        seconds=0.0,
        converged=True,
    )


def measured(decoder, values=(2.0, 0.5), total_steps=STEPS, model=None, **config):
    """An optimizer whose layers have the given traces."""
    model = model or decoder(layers=len(values))
    optimizer = wrap(model, config, total_steps)
    optimizer.apply_sensitivity(traces([f"layers.{i}" for i in range(len(values))], values))
    return model, optimizer


def write_table(path, *entries, lines=True):
    entries = [BENCH | entry for entry in entries]
    path.write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(entries))
    return path


def llama(dtype=torch.float32):
    return tiny_llama(
        dtype,
        layers=3,
        hidden_size=32,
        intermediate_size=64,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )


def tokens(seed):
    row = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": row, "labels": row}


def probed_llama(model, config, total_steps=STEPS):
    optimizer = wrap(model, config, total_steps, lr=1e-4)
    optimizer.probe(lambda row: model(**row).loss, [tokens(9)], progress=False, max_cost=None)
    return optimizer
