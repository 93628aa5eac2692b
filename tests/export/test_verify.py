"""`moq verify` finds what is wrong, says where, and its exit status says so."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from exported import LLAMA_LINEARS, Spec, export_tiny_llama, quantize_modules, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from moq import _C, cli
from moq.export import export_checkpoint
from moq.manifest import (
    FormatError,
    list_files,
    read_manifest,
    read_sums,
    tensor_sha256,
    write_json,
    write_sums,
)
from moq.verify import verify_checkpoint

FILES = [
    "SHA256SUMS",
    "config.json",
    "generation_config.json",
    "model-00001-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "moq.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.fixture(scope="module")
def pristine(memory_path):
    directory = memory_path
    export_tiny_llama(directory / "out", tokenizer=tiny_tokenizer(), max_shard_size=30_000)
    return directory / "out"


@pytest.fixture(scope="module")
def grouped(memory_path):
    model = tiny_llama()
    specs = {"up_proj": Spec(granularity="per_group", group_size=8)}
    export_checkpoint(memory_path / "grouped", model, quantize_modules(model, specs))
    return memory_path / "grouped"


@pytest.fixture
def checkpoint(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "out")


def outcome(directory) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verify_checkpoint(directory)}


def problems(directory) -> str:
    return "\n".join(p for check in verify_checkpoint(directory) for p in check.problems)


def rewrite_sums(directory) -> None:
    """What somebody does who changes a file on purpose."""
    write_sums(directory, list_files(directory))


def rewrite_tensor(directory, name, change) -> None:
    """Changes one tensor in its file, and every hash that covers it."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    path = directory / index["weight_map"][name]
    tensors = _C.read_safetensors(str(path))
    tensors[name] = change(tensors[name])
    _C.write_safetensors(str(path), list(tensors.items()), {"format": "pt"})
    manifest = read_manifest(directory)
    manifest["tensors"][name]["sha256"] = tensor_sha256(tensors[name])
    write_json(directory / "moq.json", manifest)
    rewrite_sums(directory)


def test_a_fresh_export_passes_every_check(pristine, capsys):
    assert problems(pristine) == ""
    assert outcome(pristine) == dict.fromkeys(("hashes", "structure", "grid", "probe"), True)
    assert cli.main(["verify", str(pristine)]) == 0
    assert capsys.readouterr().out.count("passed") == 4


def test_the_exported_files_are_those_that_the_tests_below_damage(pristine):
    present = {path.name for path in pristine.iterdir()}
    assert present == {*FILES, "model-00002-of-00003.safetensors"}


@pytest.mark.parametrize("where", [0.0, 0.37, 0.99], ids=["start", "middle", "end"])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_makes_verify_exit_1(checkpoint, name, where, capsys):
    data = bytearray((checkpoint / name).read_bytes())
    data[int(where * len(data))] ^= 1 << (len(name) % 8)
    (checkpoint / name).write_bytes(data)
    assert cli.main(["verify", str(checkpoint)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_every_flipped_bit_of_the_sums_is_found(checkpoint):
    """Every bit of the file that nothing else vouches for, line breaks above all."""
    sums = checkpoint / "SHA256SUMS"
    pristine, expected = sums.read_bytes(), read_sums(checkpoint)
    for position in range(len(pristine)):
        for bit in range(8):
            data = bytearray(pristine)
            data[position] ^= 1 << bit
            sums.write_bytes(data)
            with contextlib.suppress(FormatError):
                assert read_sums(checkpoint) != expected, (position, bit)


@pytest.mark.parametrize("character", "\x0b\x0c\r\x1c\x1d\x1e\x85\u2028\u2029", ids=ascii)
def test_only_a_line_feed_ends_a_line_of_the_sums(checkpoint, character):
    sums = checkpoint / "SHA256SUMS"
    lines = sums.read_text().split("\n")
    for number in range(1, len(lines)):
        sums.write_text("\n".join(lines[:number]) + character + "\n".join(lines[number:]))
        assert outcome(checkpoint)["hashes"] is False


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-00002-of-00003.safetensors"]
)
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert f"{name}: listed in SHA256SUMS, missing" in problems(checkpoint)


def test_an_extra_file_is_named(checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin: not listed in SHA256SUMS" in problems(checkpoint)


def test_an_extra_file_in_a_folder_is_named(checkpoint):
    (checkpoint / "a" / "b").mkdir(parents=True)
    assert "a/b: not listed in SHA256SUMS" in problems(checkpoint)
    (checkpoint / "a" / "b" / "c").touch()
    assert "a/b/c: not listed in SHA256SUMS" in problems(checkpoint)


def test_several_chat_templates_are_exported_covered_and_copied(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    export_tiny_llama(tmp_path / "out", tokenizer=tokenizer)
    template = Path("additional_chat_templates") / "tool_use.jinja"
    assert str(template) in read_sums(tmp_path / "out")
    export_tiny_llama(tmp_path / "out", tokenizer=tokenizer)
    export_tiny_llama(tmp_path / "copied", tokenizer=tmp_path / "out")
    for directory in (tmp_path / "out", tmp_path / "copied"):
        assert problems(directory) == ""
        read = PreTrainedTokenizerFast.from_pretrained(directory)
        assert read.chat_template == tokenizer.chat_template
    (tmp_path / "out" / template).write_text("{{ other }}")
    assert f"{template}: expected sha256" in problems(tmp_path / "out")


def test_a_link_in_place_of_a_file_is_named(checkpoint, pristine):
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to(pristine / "config.json")
    assert "config.json: expected a regular file" in problems(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "garbage\n",
        lambda text: text[1:],
        lambda text: text.upper(),
        lambda text: text.rstrip("\n"),
        lambda text: text + text.splitlines(keepends=True)[0],
        lambda text: text.replace("  config.json", "  ../config.json"),
        lambda text: text.replace("  config.json", "  ./config.json"),
        lambda text: text.replace("  config.json", "  a/../config.json"),
        lambda text: text.replace("  config.json", "  /config.json"),
        lambda text: text.replace("  config.json", "  config.json/"),
        lambda text: "",
    ],
    ids=[
        *("line", "short", "upper", "no line break", "twice"),
        *("parent", "dot", "out and back", "absolute", "folder", "empty"),
    ],
)
def test_sums_that_cannot_be_trusted_fail(checkpoint, change):
    sums = checkpoint / "SHA256SUMS"
    sums.write_text(change(sums.read_text()))
    assert outcome(checkpoint)["hashes"] is False


def test_the_sums_are_those_that_sha256sum_reads(pristine):
    lines = (pristine / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{digest}  {name}" for name, digest in sorted(read_sums(pristine).items())]


def test_a_code_outside_the_trained_grid_is_found(tmp_path):
    model = tiny_llama()
    specs = dict.fromkeys(LLAMA_LINEARS, Spec(6))
    export_checkpoint(
        tmp_path / "out", model, quantize_modules(model, specs), max_shard_size=30_000
    )
    name = "model.layers.0.mlp.up_proj.weight_packed"
    rewrite_tensor(tmp_path / "out", name, lambda words: words | 0x40)
    assert outcome(tmp_path / "out") == {
        "hashes": True,
        "structure": True,
        "grid": False,
        "probe": None,
    }
    assert "up_proj.weight: expected codes of 6 bits in [-31, 31]" in problems(tmp_path / "out")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
def test_a_scale_that_no_grid_has_is_found(checkpoint, scale):
    name = "model.layers.1.mlp.up_proj.weight_scale"
    rewrite_tensor(checkpoint, name, lambda values: values.fill_(scale))
    assert outcome(checkpoint)["grid"] is False
    assert "up_proj.weight_scale: expected finite scales" in problems(checkpoint)


def test_a_weight_shape_that_lies_is_found(checkpoint):
    name = "model.layers.1.mlp.up_proj.weight_shape"
    rewrite_tensor(checkpoint, name, lambda shape: shape.flip(0))
    assert "weight_shape: expected [72, 48], got [48, 72]" in problems(checkpoint)


def test_a_tensor_of_another_shape_is_found(checkpoint):
    name = "model.layers.1.mlp.up_proj.weight_scale"
    rewrite_tensor(checkpoint, name, lambda values: values.flatten())
    assert "weight_scale: expected F32 [72, 1], got F32 [72]" in problems(checkpoint)


def test_a_quantization_config_that_disagrees_with_the_manifest_is_found(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    write_json(checkpoint / "config.json", config)
    rewrite_sums(checkpoint)
    assert "quantization_config: expected what moq.json describes" in problems(checkpoint)


def test_other_logits_than_the_recorded_ones_are_found(checkpoint):
    name = "model.layers.1.mlp.up_proj.weight_scale"
    rewrite_tensor(checkpoint, name, lambda values: values * 1.5)
    assert outcome(checkpoint) == {
        "hashes": True,
        "structure": True,
        "grid": True,
        "probe": False,
    }


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(checkpoint, version):
    manifest = read_manifest(checkpoint)
    manifest["format_version"] = version
    write_json(checkpoint / "moq.json", manifest)
    rewrite_sums(checkpoint)
    assert "format_version must be 1" in problems(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "\ufeff{}", '{"weights": {}}']
)
def test_a_manifest_that_is_not_one_is_refused(checkpoint, text):
    (checkpoint / "moq.json").write_text(text)
    rewrite_sums(checkpoint)
    assert outcome(checkpoint)["structure"] is False


@pytest.mark.parametrize("entry", [{}, {"module": 1}, [], None])
def test_a_manifest_entry_that_is_not_one_is_refused(checkpoint, entry):
    manifest = read_manifest(checkpoint)
    manifest["weights"]["model.layers.0.mlp.up_proj.weight"] = entry
    write_json(checkpoint / "moq.json", manifest)
    rewrite_sums(checkpoint)
    assert outcome(checkpoint)["structure"] is False


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("group_size", 0, "group_size must divide 48 input features, got 0"),
        ("group_size", 9, "group_size must divide 48 input features, got 9"),
        ("granularity", "per_channel", "group_size must be 0 for per_channel, got 8"),
        ("stored_bits", None, "stored_bits must be 8, got None"),
        ("stored_bits", 4, "stored_bits must be 8, got 4"),
        ("trained_bits", 9, r"trained_bits must lie in \[2, 8\] for pack-quantized, got 9"),
        ("trained_bits", 0, r"trained_bits must lie in \[2, 8\] for pack-quantized, got 0"),
        ("format", "dense", r"trained_bits must lie in \[9, 16\] for dense, got 8"),
        ("format", "int_quantized", "format must be one of .*did you mean 'int-quantized'"),
        ("mode", "quaternary", "mode must be one of"),
        ("shape", [72], r"shape must be \[output features, input features\], got \[72\]"),
        ("shape", [72, 48.0], r"shape\[1\] must be an integer, got 48.0"),
        ("shape", [72, -48], "shape must be"),
        ("scale_dtype", "float64", "scale_dtype must be one of"),
        ("activations", "token", "activations must be one of 'dynamic', 'static', .*, got 'token'"),
        ("activations", "static", "format must be int-quantized when activations are"),
        ("quantization_error", -0.5, "quantization_error must be a finite number >= 0"),
        ("transposed", 1, "transposed must be true or false, got 1"),
        ("module_klass", "Linear", "module_klass is not a known key .did you mean 'module_class'"),
    ],
)
def test_a_field_that_no_weight_has_is_named(grouped, tmp_path, field, value, message, capsys):
    checkpoint = shutil.copytree(grouped, tmp_path / "out")
    manifest = read_manifest(checkpoint)
    manifest["weights"]["model.layers.0.mlp.up_proj.weight"][field] = value
    write_json(checkpoint / "moq.json", manifest)
    rewrite_sums(checkpoint)
    where = r"moq\.json: weights\['model\.layers\.0\.mlp\.up_proj\.weight'\]\."
    assert re.search(where + message, problems(checkpoint))
    assert cli.main(["inspect", str(checkpoint)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(where + message, line)


def test_a_directory_that_does_not_exist_fails(tmp_path):
    assert cli.main(["verify", str(tmp_path / "none")]) == 1


def test_json_output_names_every_check(checkpoint, capsys):
    (checkpoint / "extra").touch()
    assert cli.main(["verify", str(checkpoint), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False
    assert [check["name"] for check in printed["checks"]] == [
        "hashes",
        "structure",
        "grid",
        "probe",
    ]
    assert "extra" in printed["checks"][0]["problems"][0]


def probe_of(directory, *options, capsys) -> dict:
    """What `moq verify` says of the probe of a checkpoint in which it finds nothing wrong."""
    assert cli.main(["verify", str(directory), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["checks"][3]


def test_a_model_that_answers_no_token_ids_is_exported_without_a_probe(tmp_path, capsys):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    with pytest.warns(UserWarning, match="ViTForImageClassification does not answer input_ids"):
        export_checkpoint(tmp_path / "out", model, quantize_modules(model, {"query": Spec()}))
    probe = probe_of(tmp_path / "out", capsys=capsys)
    assert probe["passed"] is None
    assert "ViTForImageClassification does not answer input_ids" in probe["summary"]


def test_a_model_that_needs_a_decoders_input_is_exported_without_a_probe(tmp_path, capsys):
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.warns(UserWarning, match="no logit probe"):
        export_checkpoint(tmp_path / "out", model, quantize_modules(model, {"wi": Spec()}))
    assert "T5ForConditionalGeneration" in probe_of(tmp_path / "out", capsys=capsys)["summary"]


def test_a_probe_asks_for_no_padding(tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config)
    specs = {"query": Spec(8), "key": Spec(8), "value": Spec(8)}
    export_checkpoint(tmp_path / "out", model, quantize_modules(model, specs))
    assert model.config.pad_token_id not in read_manifest(tmp_path / "out")["probe"]["input_ids"]
    assert probe_of(tmp_path / "out", capsys=capsys)["passed"] is True


def test_probe_tokens_that_the_model_refuses_are_an_error(tmp_path):
    with pytest.raises(IndexError):
        export_tiny_llama(tmp_path / "out", probe=[97])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "spec",
    [
        Spec(),
        Spec(4, granularity="per_group", group_size=24),
        Spec(4, "asymmetric", "per_group", 12),
        Spec(8, "asymmetric", "per_tensor"),
    ],
    ids=["int8", "grouped_int4", "asymmetric_int4", "one_scale"],
)
def test_the_probe_of_a_16_bit_model_is_that_of_products_without_rounding(
    tmp_path, dtype, spec, capsys
):
    model = tiny_llama(dtype)
    quantized = quantize_modules(model, dict.fromkeys(LLAMA_LINEARS, spec))
    export_checkpoint(tmp_path / "out", model, quantized)
    assert probe_of(tmp_path / "out", capsys=capsys)["passed"] is True


def test_an_export_leaves_no_trace_in_the_model_and_the_random_state(tmp_path):
    model = tiny_llama(torch.bfloat16).train()
    quantized = quantize_modules(model, dict.fromkeys(LLAMA_LINEARS, Spec()))
    before = torch.get_rng_state()
    export_checkpoint(tmp_path / "out", model, quantized)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_an_architecture_that_the_engine_lacks_passes_and_a_policy_replays_it(tmp_path, capsys):
    config = transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    quantized = quantize_modules(model, {"dense_h_to_4h": Spec()})
    export_checkpoint(tmp_path / "out", model, quantized)
    probe = probe_of(tmp_path / "out", capsys=capsys)
    assert probe["passed"] is None
    assert "could not run: config.json: architectures must name one of" in probe["summary"]
    policies = Path(__file__).parents[1] / "inference" / "policies"
    options = ["--policy", str(policies / "bloom.json")]
    assert probe_of(tmp_path / "out", *options, capsys=capsys)["passed"] is True
    assert cli.main(["verify", str(tmp_path / "out"), "--policy", "no.json"]) == 1


def test_a_setting_that_the_engine_lacks_passes(tmp_path, capsys):
    model = tiny_llama(hidden_act="relu2")
    export_checkpoint(tmp_path / "out", model, quantize_modules(model, {"q_proj": Spec()}))
    assert (
        "could not run: config.json: hidden_act"
        in probe_of(tmp_path / "out", capsys=capsys)["summary"]
    )


def test_a_checkpoint_without_a_probe_passes(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    export_checkpoint(tmp_path / "out", model, quantize_modules(model, {"0": Spec()}))
    assert outcome(tmp_path / "out")["probe"] is None
    assert read_manifest(tmp_path / "out")["no_probe"] == "Sequential is not a Hugging Face model"
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
