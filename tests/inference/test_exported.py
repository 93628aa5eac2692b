"""Exported directories in the engine against the simulated PyTorch model."""

import models
import pytest
import rounded_models
import torch
from models import reference_logits, relative_error, sequences

from moq.inference import Engine

TOLERANCE = 5e-6


@pytest.mark.parametrize("grid", rounded_models.GRIDS)
def test_llama_logits_equal_the_simulated_model(grid, tmp_path):
    model = rounded_models.export(models.build("llama_even"), tmp_path / "out", grid)
    (row,) = sequences(30)
    logits = Engine.from_pretrained(tmp_path / "out").forward([row])[0]
    assert relative_error(logits, reference_logits(model, row)) < TOLERANCE


@pytest.mark.parametrize("grid", ["8 bits per channel", "4 bits asymmetric per group"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_other_decoders_equal_the_simulated_model(name, grid, tmp_path):
    if name == "qwen2":
        grid = "8 bits per channel"  # its sizes have no common group
    model = rounded_models.export(models.build(name), tmp_path / "out", grid)
    (row,) = sequences(30)
    logits = Engine.from_pretrained(tmp_path / "out").forward([row])[0]
    assert relative_error(logits, reference_logits(model, row)) < TOLERANCE


def test_encoder_equals_the_simulated_model(tmp_path):
    model = rounded_models.export(models.build("bert"), tmp_path / "out", "8 bits per channel")
    (row,) = sequences(30)
    logits = Engine.from_pretrained(tmp_path / "out").encode([row]).logits[0]
    assert relative_error(logits, reference_logits(model, row)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_checkpoints_equal_the_simulated_model(dtype, tmp_path):
    half = models.build("llama").to(dtype)
    single = models.build("llama")
    single.load_state_dict(half.state_dict())
    rounded_models.export(half, tmp_path / "out", "8 bits per channel")
    with torch.no_grad():  # scale * code, of which the 16-bit simulated weight is the rounding
        for name, parameter in single.named_parameters():
            if parameter.dim() == 2 and ".layers." in name:
                parameter.copy_(torch.ops.moq.fake_quantize(parameter, 8, scale_dtype=dtype))
    (row,) = sequences(30)
    logits = Engine.from_pretrained(tmp_path / "out").forward([row])[0]
    assert relative_error(logits, reference_logits(single, row)) < TOLERANCE


def test_int8_activations_run_where_the_checkpoint_was_trained_for_them(tmp_path):
    model = rounded_models.export(
        models.build("llama"), tmp_path / "out", "8 bits per channel", activations="dynamic"
    )
    (row,) = sequences(30)
    engine = Engine.from_pretrained(tmp_path / "out")
    assert engine.core.activations == "dynamic"
    assert 1e-4 < relative_error(engine.forward([row])[0], reference_logits(model, row)) < 0.1


def test_formats_are_those_of_the_checkpoint(tmp_path):
    rounded_models.export(models.build("llama_even"), tmp_path / "out", "4 bits per group")
    core = Engine.from_pretrained(tmp_path / "out").core
    assert (core.weight_format, core.head_format, core.activations) == (
        "int4",
        "float32",
        "weight_only",
    )


def test_quantize_head_quantizes_the_head_of_an_exported_checkpoint(tmp_path):
    rounded_models.export(models.build("llama"), tmp_path / "out", "8 bits per channel")
    engine = Engine.from_pretrained(tmp_path / "out", dtype="int8", quantize_head=True)
    assert engine.core.head_format == "int8"


def test_dtype_fp32_dequantizes(tmp_path):
    model = rounded_models.export(models.build("llama_even"), tmp_path / "out", "4 bits per group")
    (row,) = sequences(30)
    engine = Engine.from_pretrained(tmp_path / "out", dtype="fp32")
    assert engine.core.weight_format == "float32"
    assert relative_error(engine.forward([row])[0], reference_logits(model, row)) < TOLERANCE
