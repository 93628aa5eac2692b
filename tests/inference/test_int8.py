"""Load-time INT8 against the PyTorch model whose weights are scale * code."""

import models
import pytest
import torch
from models import greedy, reference_logits, relative_error, sequences

from moq.inference import Engine

TOLERANCE = 5e-6


def quantized_rows(weight):
    """The definition: 8 bits, symmetric, narrow range, one scale per row, half to even."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight * (1 / scale)).round().clamp(-127, 127) * scale


@torch.no_grad()
def simulate(model, head=True):
    """Rounds the layers' projections, and the head, to their INT8 grids."""
    if head and model.get_output_embeddings() is not None:
        embeddings = model.get_output_embeddings()
        embeddings.weight = torch.nn.Parameter(quantized_rows(embeddings.weight))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Conv1D":
            weight.copy_(quantized_rows(weight.T).T)
        elif isinstance(module, torch.nn.Linear) and "layer" in name:
            weight.copy_(quantized_rows(weight))
    return model


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_biases_tied", "qwen3", "gpt2"])
def test_decoder_equals_the_model_with_simulated_weights(name, head, model_directory):
    (row,) = sequences(33)
    engine = Engine.from_pretrained(
        model_directory(name), dtype="int8", quantize_head=None if head else False
    )
    simulated = simulate(models.build(name), head)
    assert relative_error(engine.forward([row])[0], reference_logits(simulated, row)) < TOLERANCE
    assert engine.core.head_format == ("int8" if head else "float32")


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_encoder_equals_the_model_with_simulated_weights(name, model_directory):
    (row,) = sequences(33)
    logits = Engine.from_pretrained(model_directory(name), dtype="int8").encode([row]).logits[0]
    simulated = simulate(models.build(name))
    assert relative_error(logits, reference_logits(simulated, row)) < TOLERANCE


def test_greedy_tokens_equal_the_model_with_simulated_weights(model_directory):
    (row,) = sequences(8)
    engine = Engine.from_pretrained(model_directory("gpt2"), dtype="int8")
    tokens = engine.generate(row, 40).token_ids
    assert tokens == greedy(simulate(models.build("gpt2")), row, tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dynamic_activations_cost_little_accuracy(name, model_directory):
    (row,) = sequences(40)
    exact = Engine.from_pretrained(model_directory(name), dtype="int8")
    dynamic = Engine.from_pretrained(model_directory(name), dtype="int8", activations="dynamic")
    assert (exact.core.activations, dynamic.core.activations) == ("weight_only", "dynamic")
    error = relative_error(dynamic.forward([row])[0], exact.forward([row])[0])
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_dtype_chooses_the_storage_of_the_weights(dtype, model_directory):
    (row,) = sequences(20)
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    engine = Engine.from_pretrained(model_directory("llama"), dtype=dtype)
    model = models.build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.copy_(parameter.to(kinds[dtype]).float())
    assert relative_error(engine.forward([row])[0], reference_logits(model, row)) < TOLERANCE
