"""Load-time INT8 against the PyTorch model whose weights are scale * code."""

import models
import pytest
import torch
from models import (
    greedy,
    open_fp32,
    reference_logits,
    relative_error,
    sequences,
    simulate_int8,
)
from transformers import LlamaConfig, LlamaForCausalLM

import moq
from moq.inference import Engine

TOLERANCE = 5e-6


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_biases_tied", "qwen3", "gpt2"])
def test_decoder_equals_the_model_with_simulated_weights(name, head, model_directory, device):
    (row,) = sequences(33)
    engine = open_fp32(
        model_directory(name), device, dtype="int8", quantize_head=None if head else False
    )
    simulated = simulate_int8(models.build(name), head)
    assert relative_error(engine.forward([row])[0], reference_logits(simulated, row)) < TOLERANCE
    assert engine.core.head_format == ("int8" if head else "float32")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_16_bit_directory_is_quantized_as_its_values_in_float32(name, stored, tmp_path, device):
    half = models.build(name).to(stored)
    models.save(name, half, tmp_path)
    simulated = models.build(name)
    simulated.load_state_dict(half.state_dict())
    simulate_int8(simulated)
    (row,) = sequences(33)
    logits = open_fp32(tmp_path, device, dtype="int8").forward([row])[0]
    assert relative_error(logits, reference_logits(simulated, row)) < TOLERANCE


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_encoder_equals_the_model_with_simulated_weights(name, model_directory, device):
    (row,) = sequences(33)
    logits = open_fp32(model_directory(name), device, dtype="int8").encode([row]).logits[0]
    simulated = simulate_int8(models.build(name))
    assert relative_error(logits, reference_logits(simulated, row)) < TOLERANCE


def test_greedy_tokens_equal_the_model_with_simulated_weights(model_directory, device):
    (row,) = sequences(8)
    engine = open_fp32(model_directory("gpt2"), device, dtype="int8")
    tokens = engine.generate(row, 40).token_ids
    assert tokens == greedy(simulate_int8(models.build("gpt2")), row, tokens)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_asymmetric"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dynamic_activations_cost_little_accuracy(name, kind, model_directory, device):
    (row,) = sequences(40)
    exact = open_fp32(model_directory(name), device, dtype="int8")
    dynamic = open_fp32(model_directory(name), device, dtype="int8", activations=kind)
    assert (exact.core.activations, dynamic.core.activations) == ("weight_only", kind)
    error = relative_error(dynamic.forward([row])[0], exact.forward([row])[0])
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_dtype_chooses_the_storage_of_the_weights(dtype, model_directory, device):
    (row,) = sequences(20)
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    engine = open_fp32(model_directory("llama"), device, dtype=dtype)
    model = models.build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.copy_(parameter.to(kinds[dtype]).float())
    assert relative_error(engine.forward([row])[0], reference_logits(model, row)) < TOLERANCE


@pytest.mark.skipif(
    moq._C.build_info()["cpu_isa"] == "scalar", reason="one number at a time, codes are slower"
)
def test_int8_weights_are_not_slower_than_floats(tmp_path):
    """A decode step reads every weight, and a byte is read sooner than four."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=models.VOCAB_SIZE,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    engines = {kind: Engine.from_pretrained(tmp_path, dtype=kind) for kind in ("fp32", "int8")}
    best = dict.fromkeys(engines, 0.0)
    for _ in range(4):  # in turns: others may have the machine meanwhile
        for kind, engine in engines.items():
            engine.generate(sequences(8), 12, stop_token_ids=[])
            best[kind] = max(best[kind], engine.timing.decode_tokens_per_second)
    assert best["int8"] > best["fp32"]
