"""Exported directories in the engine against the simulated PyTorch model."""

import json
import shutil
from collections import defaultdict

import models
import pytest
import rounded_models
import torch
from models import open_fp32, reference_logits, relative_error, sequences
from safetensors.torch import load_file, save_file

from moq import _C
from moq.input_grid import InputGrid

TOLERANCE = 5e-6


@pytest.mark.parametrize("grid", rounded_models.GRIDS)
def test_llama_logits_equal_the_simulated_model(grid, tmp_path, device):
    model = rounded_models.export(models.build("llama_even"), tmp_path / "out", grid)
    (row,) = sequences(30)
    logits = open_fp32(tmp_path / "out", device).forward([row])[0]
    assert relative_error(logits, reference_logits(model, row)) < TOLERANCE


@pytest.mark.parametrize("grid", ["8 bits per channel", "4 bits asymmetric per group"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_other_decoders_equal_the_simulated_model(name, grid, tmp_path, device):
    if name == "qwen2":
        grid = "8 bits per channel"  # its sizes have no common group
    model = rounded_models.export(models.build(name), tmp_path / "out", grid)
    (row,) = sequences(30)
    logits = open_fp32(tmp_path / "out", device).forward([row])[0]
    assert relative_error(logits, reference_logits(model, row)) < TOLERANCE


def test_encoder_equals_the_simulated_model(tmp_path, device):
    model = rounded_models.export(models.build("bert"), tmp_path / "out", "8 bits per channel")
    (row,) = sequences(30)
    logits = open_fp32(tmp_path / "out", device).encode([row]).logits[0]
    assert relative_error(logits, reference_logits(model, row)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_checkpoints_equal_the_simulated_model(dtype, tmp_path, device):
    half = models.build("llama").to(dtype)
    single = models.build("llama")
    single.load_state_dict(half.state_dict())
    rounded_models.export(half, tmp_path / "out", "8 bits per channel")
    with torch.no_grad():  # scale * code, of which the 16-bit simulated weight is the rounding
        for name, parameter in single.named_parameters():
            if parameter.dim() == 2 and ".layers." in name:
                parameter.copy_(torch.ops.moq.fake_quantize(parameter, 8, scale_dtype=dtype))
    (row,) = sequences(30)
    logits = open_fp32(tmp_path / "out", device).forward([row])[0]
    assert relative_error(logits, reference_logits(single, row)) < TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_asymmetric"])
def test_int8_activations_run_where_the_checkpoint_was_trained_for_them(kind, tmp_path, device):
    model = rounded_models.export(
        models.build("llama"), tmp_path / "out", "8 bits per channel", activations=kind
    )
    (row,) = sequences(30)
    engine = open_fp32(tmp_path / "out", device)
    assert engine.core.activations == kind
    assert 1e-4 < relative_error(engine.forward([row])[0], reference_logits(model, row)) < 0.1


@pytest.mark.parametrize("kind", ["static", "static_asymmetric"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "bert"])
def test_static_activations_are_those_of_the_simulated_model(name, kind, tmp_path, device):
    model = models.build(name)
    (row,) = sequences(40)
    grids = rounded_models.static_input_grids(model, row, kind)
    rounded_models.export(model, tmp_path / "out", "8 bits per channel", kind, grids)
    exact = reference_logits(model, row)
    rounded_models.round_inputs(model, grids)
    simulated = reference_logits(model, row)
    engine = open_fp32(tmp_path / "out", device)
    assert engine.core.activations == kind
    if name == "bert":
        results = [engine.encode([row]).logits[0]]
    else:
        cache = engine.core.make_cache(1, len(row))
        slot = cache.allocate()
        pieces = [row[:20], *([token] for token in row[20:25]), row[25:]]
        steps = [engine.core.forward([piece], [], cache, [slot]) for piece in pieces]
        results = [engine.forward([row])[0], torch.cat(steps)]
    # Where sums in two orders lie on both sides of an edge between two codes, a code differs.
    difference = relative_error(simulated, exact)
    assert difference > 1e-3
    for logits in results:
        assert relative_error(logits, simulated) < 0.1 * difference


def change_groups(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["config_groups"])
    path.write_text(json.dumps(config))


def test_groups_choose_the_modules_that_read_int8_activations(tmp_path, device):
    directory = tmp_path / "out"
    model = rounded_models.export(
        models.build("llama"), directory, "8 bits per channel", activations="dynamic"
    )
    (row,) = sequences(30)
    all_dynamic = open_fp32(directory, device).forward([row])[0]

    def split(groups):
        targets = groups["group_0"]["targets"]
        first = [name for name in targets if ".layers.0." in name]
        rest = [name for name in targets if name not in first]
        groups["group_1"] = groups["group_0"] | {"targets": rest, "input_activations": None}
        groups["group_0"]["targets"] = first

    change_groups(directory, split)
    mixed = open_fp32(directory, device).forward([row])[0]
    change_groups(directory, lambda groups: groups["group_0"].update(input_activations=None))
    exact = open_fp32(directory, device).forward([row])[0]
    assert relative_error(exact, reference_logits(model, row)) < TOLERANCE
    assert 1e-5 < relative_error(mixed, exact) < 0.1
    assert 1e-5 < relative_error(mixed, all_dynamic) < 0.1


@pytest.mark.parametrize("part", ["o_proj", "down_proj"])
def test_the_engine_names_the_int8_inputs_of_any_projection(part, tmp_path, device):
    directory = tmp_path / "out"
    rounded_models.export(
        models.build("llama"), directory, "8 bits per channel", activations="dynamic_asymmetric"
    )

    def only_one_part(groups):
        targets = groups["group_0"]["targets"]
        chosen = [name for name in targets if name.endswith(part)]
        rest = [name for name in targets if name not in chosen]
        groups["group_1"] = groups["group_0"] | {"targets": rest, "input_activations": None}
        groups["group_0"]["targets"] = chosen

    change_groups(directory, only_one_part)
    assert open_fp32(directory, device).core.activations == "dynamic_asymmetric"


@pytest.fixture
def static_asymmetric(tmp_path):
    """A small Llama that was exported with one zero point for all inputs."""
    grids = defaultdict(lambda: InputGrid("static_asymmetric", 0.03125, -37))
    directory = tmp_path / "out"
    rounded_models.export(
        models.build("llama"), directory, "8 bits per channel", "static_asymmetric", grids
    )
    return directory


def change_tensor(directory, name, change):
    """Puts change(tensor) in a tensor's place; None: nothing."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, path)


DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_a_zero_point_of_another_writer_may_be_a_scalar_or_a_matrix(shape, static_asymmetric):
    (row,) = sequences(12)
    expected = open_fp32(static_asymmetric, "cpu").forward([row])[0]
    for suffix in ("input_scale", "input_zero_point"):
        change_tensor(static_asymmetric, f"{DOWN}.{suffix}", lambda t: t.reshape(shape))
    assert torch.equal(open_fp32(static_asymmetric, "cpu").forward([row])[0], expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{DOWN}.input_zero_point", lambda t: None, f"{DOWN}.input_zero_point"),
        (f"{DOWN}.input_zero_point", lambda t: t.int(), "input_zero_point must be I8, got I32"),
        (f"{DOWN}.input_zero_point", lambda t: t.repeat(3), "must hold one number, got 3"),
        (f"{DOWN}.input_scale", lambda t: t[:0], "input_scale must hold one number, got 0"),
        (f"{DOWN}.input_scale", lambda t: t * 0, "input_scale must be finite and >= .*, got 0"),
        (
            f"{UP}.input_zero_point",
            lambda t: t + 1,
            r"must read their input alike, .*input_zero_point -37\) and .*input_zero_point -36\)",
        ),
    ],
)
def test_a_static_grid_that_is_none_is_refused(name, change, message, static_asymmetric):
    change_tensor(static_asymmetric, name, change)
    with pytest.raises(_C.Error, match=message):
        open_fp32(static_asymmetric, "cpu")


@pytest.mark.parametrize("strategy", ["tensor", "token"])
def test_a_zero_point_of_inputs_declared_without_must_be_0(strategy, static_asymmetric):
    declared = {"symmetric": True, "strategy": strategy, "dynamic": strategy == "token"}
    change_groups(
        static_asymmetric, lambda groups: groups["group_0"]["input_activations"].update(declared)
    )
    with pytest.raises(_C.Error, match='input_zero_point must be 0 or absent, .*"symmetric": fal'):
        open_fp32(static_asymmetric, "cpu")
    path = static_asymmetric / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v * (not k.endswith("input_zero_point")) for k, v in tensors.items()}, path)
    engine = open_fp32(static_asymmetric, "cpu")
    assert engine.core.activations == ("static" if strategy == "tensor" else "dynamic")


@pytest.mark.parametrize("packed", [False, True])
def test_a_quantized_embedding_is_looked_up(packed, model_directory, tmp_path, device):
    shutil.copytree(model_directory("llama"), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = "model.embed_tokens.weight"
    scale = tensors[name].abs().amax(dim=1, keepdim=True) / 127
    codes = (tensors.pop(name) / scale).round().to(torch.int8)
    tensors[f"{name}_scale"] = scale
    if packed:
        words = (codes.short() + 128).to(torch.uint8).view(torch.int32)
        tensors |= {f"{name}_packed": words, f"{name}_shape": torch.tensor(codes.shape)}
    else:
        tensors[name] = codes
    save_file(tensors, path, metadata={"format": "pt"})
    model = models.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(scale * codes)
    (row,) = sequences(30)
    logits = open_fp32(tmp_path / "out", device).forward([row])[0]
    assert relative_error(logits, reference_logits(model, row)) < TOLERANCE


def test_formats_are_those_of_the_checkpoint(tmp_path, device):
    rounded_models.export(models.build("llama_even"), tmp_path / "out", "4 bits per group")
    core = open_fp32(tmp_path / "out", device).core
    assert (core.weight_format, core.head_format, core.activations) == (
        "int4",
        "float32",
        "weight_only",
    )


def test_quantize_head_quantizes_the_head_of_an_exported_checkpoint(tmp_path, device):
    rounded_models.export(models.build("llama"), tmp_path / "out", "8 bits per channel")
    engine = open_fp32(tmp_path / "out", device, dtype="int8", quantize_head=True)
    assert engine.core.head_format == "int8"


def test_dtype_fp32_dequantizes(tmp_path, device):
    model = rounded_models.export(models.build("llama_even"), tmp_path / "out", "4 bits per group")
    (row,) = sequences(30)
    engine = open_fp32(tmp_path / "out", device, dtype="fp32")
    assert engine.core.weight_format == "float32"
    assert relative_error(engine.forward([row])[0], reference_logits(model, row)) < TOLERANCE
