"""Every architecture against transformers, in FP32."""

import shutil

import models
import pytest
import torch
from models import (
    DECODERS,
    ENCODERS,
    greedy,
    open_fp32,
    reference_logits,
    relative_error,
    sequences,
)
from safetensors.torch import load_file, save_file

from moq.inference import Engine

# Both sides sum in float32 in their own order; measured: up to 3.4e-6.
TOLERANCE = 1e-5


def open_model(name, model_directory, device) -> Engine:
    return open_fp32(model_directory(name), device)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("length", [1, 17, 96])
def test_decoder_logits_equal_transformers(name, length, model_directory, device):
    (row,) = sequences(length)
    logits = open_model(name, model_directory, device).forward([row])[0]
    assert relative_error(logits, reference_logits(models.build(name), row)) < TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_equal_transformers(name, model_directory, device):
    (row,) = sequences(11, seed=1)
    tokens = open_model(name, model_directory, device).generate(row, 40).token_ids
    assert len(tokens) == 40
    assert tokens == greedy(models.build(name), row, tokens)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_hidden_states_equal_transformers(name, model_directory, device):
    rows = sequences(1, 23, 94)
    encoding = open_model(name, model_directory, device).encode(rows)
    model = models.build(name)
    for row, states in zip(rows, encoding.last_hidden_state, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([row]), output_hidden_states=True)
        assert relative_error(states, output.hidden_states[-1][0]) < TOLERANCE


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_classification_logits_equal_transformers(name, model_directory, device):
    rows = sequences(5, 31)
    logits = open_model(name, model_directory, device).encode(rows).logits
    expected = torch.stack([reference_logits(models.build(name), row) for row in rows])
    assert relative_error(logits, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["bert_base", "roberta_base"])
def test_pooled_output_equals_transformers(name, model_directory, device):
    (row,) = sequences(13)
    pooled = open_model(name, model_directory, device).encode([row]).pooled
    with torch.no_grad():
        expected = models.build(name)(torch.tensor([row])).pooler_output
    assert relative_error(pooled, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["bert_masked_lm", "roberta_masked_lm"])
def test_masked_lm_logits_equal_transformers(name, model_directory, device):
    (row,) = sequences(19)
    logits = open_model(name, model_directory, device).forward([row])[0]
    assert relative_error(logits, reference_logits(models.build(name), row)) < TOLERANCE


def test_bert_opens_with_the_parameter_names_of_its_tensorflow_original(
    model_directory, tmp_path, device
):
    # bert-base-uncased's own file: norms of gamma and beta, and a second head that is not computed.
    directory = shutil.copytree(model_directory("bert_masked_lm"), tmp_path / "copy")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    assert any(name.endswith("LayerNorm.beta") for name in tensors)
    tensors["cls.seq_relationship.weight"] = torch.ones(2, 36)
    tensors["cls.seq_relationship.bias"] = torch.ones(2)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    rows = sequences(19)
    logits = open_fp32(directory, device).forward(rows)[0]
    assert torch.equal(
        logits, open_model("bert_masked_lm", model_directory, device).forward(rows)[0]
    )


def test_token_types_select_their_embedding(model_directory, device):
    ids, types = torch.tensor(sequences(9)), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    logits = open_model("bert_masked_lm", model_directory, device).forward(
        ids, token_type_ids=types
    )
    with torch.no_grad():
        expected = models.build("bert_masked_lm")(ids, token_type_ids=types).logits
    assert relative_error(logits, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_16_bit_checkpoints_are_computed_in_fp32_with_their_own_weights(
    name, dtype, tmp_path, device
):
    models.build(name).to(dtype).save_pretrained(tmp_path)
    model = type(models.build(name)).from_pretrained(tmp_path, dtype=torch.float32).eval()
    (row,) = sequences(29)
    engine = open_fp32(tmp_path, device)
    logits = engine.encode([row]).logits[0] if name == "bert" else engine.forward([row])[0]
    assert relative_error(logits, reference_logits(model, row)) < TOLERANCE
    assert engine.core.weight_format == str(dtype).removeprefix("torch.")


def test_sharded_checkpoint_equals_a_single_file(model_directory, tmp_path, device):
    models.build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    rows = sequences(21)
    sharded = open_fp32(tmp_path, device).forward(rows)[0]
    assert torch.equal(sharded, open_model("llama", model_directory, device).forward(rows)[0])
