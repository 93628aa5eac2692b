"""`moq inspect` shows widths and sizes without being asked twice."""

import json

import pytest
from exported import Spec, export_tiny_llama, quantize_modules, tiny_llama

from moq import cli
from moq.export import export_checkpoint
from moq.inspect import describe_checkpoint
from moq.manifest import FormatError, read_json

SPECS = {
    "q_proj": Spec(8),
    "k_proj": Spec(6),
    "o_proj": Spec(4, "asymmetric", "per_group", 16),
    "up_proj": Spec(8, activations="dynamic"),
    "gate_proj": Spec(8, activations="static_asymmetric"),
    "down_proj": Spec(12),
}


@pytest.fixture(scope="module")
def mixed(memory_path):
    directory = memory_path / "out"
    model = tiny_llama()
    history = {"seed": 7, "drops": {"0": [[5, 8]]}}
    export_checkpoint(directory, model, quantize_modules(model, SPECS), history=history)
    return directory


def test_the_bit_map_has_a_row_per_layer_and_a_cell_per_weight(mixed, capsys):
    assert cli.main(["inspect", str(mixed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("model.layers.")]
    assert [row[:7] for row in rows] == [
        [f"model.layers.{layer}", "8", "6→8", "4ag16", "8+A8sa", "8+A8", "12"] for layer in range(2)
    ]


def test_sizes_are_those_of_the_files(mixed):
    description = describe_checkpoint(mixed)
    assert description["files"] == {
        path.name: path.stat().st_size for path in mixed.iterdir() if path.name != "SHA256SUMS"
    }
    header = description["files"]["model.safetensors"] - description["bytes"]
    assert 0 < header < 10_000
    up_proj = next(w for w in description["weights"] if "0.mlp.up_proj" in w["name"])
    assert up_proj["bytes"] == 72 * 48 + 72 * 4
    o_proj = next(w for w in description["weights"] if "0.self_attn.o_proj" in w["name"])
    assert o_proj["bytes"] == 48 * 24 + 48 * 3 * 4 + 6 * 3 * 4 + 16


def test_eight_bits_take_a_quarter_of_fp32(tmp_path):
    export_tiny_llama(tmp_path / "out")
    description = describe_checkpoint(tmp_path / "out")
    quantized = sum(weight["bytes"] for weight in description["weights"])
    other = sum(description["other_tensors"].values())
    assert description["bytes"] == quantized + other
    assert quantized / (description["dense_bytes"] - other) == pytest.approx(0.25, abs=0.05)
    assert description["mean_bits"] == 8


def test_json_output_is_one_object_with_the_history(mixed, capsys):
    assert cli.main(["inspect", str(mixed), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["history"] == {"seed": 7, "drops": {"0": [[5, 8]]}}
    assert {weight["trained_bits"] for weight in printed["weights"]} == {4, 6, 8, 12}


def test_a_directory_that_is_no_checkpoint_gives_one_line_and_status_1(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "moq.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_run_is_told_how_it_becomes_a_checkpoint(command, tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert cli.main([command, str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert f"got a run: moq export {tmp_path} -o DIR" in printed.out + printed.err


def test_names_of_columns_stay_whole_on_a_narrow_terminal(mixed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert cli.main(["inspect", str(mixed)]) == 0
    heading = next(line for line in capsys.readouterr().out.splitlines() if "error" in line)
    assert {"layer", "error", "MB"} < set(heading.split())
    assert all(len(word) > 1 for word in heading.split())


def test_a_directory_that_moq_did_not_write_is_said_to_lack_a_file(tmp_path):
    with pytest.raises(FormatError, match=r"moq\.json: must exist, and is missing"):
        read_json(tmp_path / "moq.json")
