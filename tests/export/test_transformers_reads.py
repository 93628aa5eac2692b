"""transformers + compressed-tensors open an exported directory and compute the same logits."""

import json

import pytest
import torch
import transformers
from exported import LLAMA_LINEARS, Spec, quantize_modules, tiny_llama

from moq.activations import exported_inputs
from moq.export import export_checkpoint
from moq.input_grid import KINDS, InputGrid

IDS = torch.tensor([[1, 5, 9, 90, 7, 3, 3, 44]])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)

MIXED = {
    "q_proj": Spec(8),
    "k_proj": Spec(8),
    "v_proj": Spec(8),
    "o_proj": Spec(4, "asymmetric", "per_group", 16),
    "gate_proj": Spec(6, "asymmetric"),
    "up_proj": Spec(3, "symmetric", "per_tensor"),
    "down_proj": Spec(2, "symmetric", "per_group", 24),
}


def logits_of(directory) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    with torch.no_grad():
        return model(IDS).logits


def export_and_compare(directory, model, specs, **options):
    quantized = quantize_modules(model, specs)
    export_checkpoint(directory, model, quantized, **options)
    with torch.no_grad():
        expected = model(IDS).logits
    found = logits_of(directory)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@DTYPES
def test_8_bit_channels_give_equal_logits(tmp_path, dtype):
    specs = dict.fromkeys(LLAMA_LINEARS, Spec())
    config = export_and_compare(tmp_path / "out", tiny_llama(dtype), specs)
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]


@DTYPES
def test_mixed_widths_and_grids_give_equal_logits(tmp_path, dtype):
    config = export_and_compare(tmp_path / "out", tiny_llama(dtype), MIXED)
    assert len(config["config_groups"]) == 5


def test_shards_and_a_tied_head_give_equal_logits(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    specs = dict.fromkeys(LLAMA_LINEARS, Spec())
    export_and_compare(tmp_path / "out", model, specs, max_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]


def test_a_layer_above_8_bits_stays_dense_and_is_ignored(tmp_path):
    specs = dict.fromkeys(LLAMA_LINEARS, Spec()) | {"down_proj": Spec(12)}
    config = export_and_compare(tmp_path / "out", tiny_llama(), specs)
    assert "model.layers.0.mlp.down_proj" in config["ignore"]


def test_a_quantized_head_gives_equal_logits(tmp_path):
    specs = dict.fromkeys((*LLAMA_LINEARS, "lm_head"), Spec())
    config = export_and_compare(tmp_path / "out", tiny_llama(), specs)
    assert config["ignore"] == ["model.embed_tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_int8_activations_are_declared_and_read_like_the_weights(tmp_path, kind):
    model = tiny_llama()
    specs = dict.fromkeys(LLAMA_LINEARS, Spec(activations=kind))
    quantized = quantize_modules(model, specs)
    export_checkpoint(tmp_path / "out", model, quantized)
    grids = {
        p.name.removesuffix(".weight"): InputGrid(kind, p.input_scale, p.input_zero_point)
        for p in quantized
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    declared = config["config_groups"]["group_0"]["input_activations"]
    assert declared["strategy"] == ("tensor" if kind.startswith("static") else "token")
    assert declared["symmetric"] == (not kind.endswith("asymmetric"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        logits = loaded(IDS).logits  # the first forward unpacks
        weights = dict(loaded.named_parameters())
        exact = model(IDS).logits
        with exported_inputs(model, grids):
            rounded = model(IDS).logits
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name
    if kind == "dynamic":  # of which compressed-tensors makes another grid: absmax / 127.5
        assert 0 < (logits - exact).norm() < 0.1 * exact.norm()
    else:  # it divides by the scale where moq multiplies by its inverse: a code may differ
        assert (logits - rounded).norm() < 0.1 * (exact - rounded).norm()


def test_formats_that_differ_are_called_mixed_precision(tmp_path):
    model = tiny_llama()
    specs = dict.fromkeys(LLAMA_LINEARS, Spec()) | {"down_proj": Spec(activations="dynamic")}
    export_checkpoint(tmp_path / "out", model, quantize_modules(model, specs))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {g["format"] for g in config["config_groups"].values()} == {
        "pack-quantized",
        "int-quantized",
    }
    assert logits_of(tmp_path / "out").isfinite().all()


def test_conv1d_is_not_claimed_to_be_compressed_tensors(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    specs = dict.fromkeys(("c_attn", "c_fc", "c_proj"), Spec())
    export_checkpoint(tmp_path / "out", model, quantize_modules(model, specs))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "moq"
    manifest = json.loads((tmp_path / "out" / "moq.json").read_text())
    assert manifest["weights"]["transformer.h.0.attn.c_attn.weight"]["transposed"]


def test_a_quantized_embedding_is_not_claimed_to_be_compressed_tensors(tmp_path):
    model = tiny_llama()
    specs = dict.fromkeys((*LLAMA_LINEARS, "embed_tokens"), Spec())
    export_checkpoint(tmp_path / "out", model, quantize_modules(model, specs))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "moq"


def test_a_quantized_tied_embedding_is_stored_once_and_not_claimed(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    specs = dict.fromkeys((*LLAMA_LINEARS, "embed_tokens"), Spec())
    export_checkpoint(tmp_path / "out", model, quantize_modules(model, specs))
    manifest = json.loads((tmp_path / "out" / "moq.json").read_text())
    assert manifest["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not any(name.startswith("lm_head") for name in manifest["tensors"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "moq"
