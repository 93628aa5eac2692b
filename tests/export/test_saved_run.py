"""A saved run exports to the same files as the training process itself."""

import argparse

import pytest
import torch
from exported import LLAMA_LINEARS, Spec, quantize_modules, tiny_llama

from moq import cli
from moq.export import export_checkpoint
from moq.export_command import parse_size
from moq.manifest import FormatError, read_json, write_json
from moq.saved_run import load_run, save_run

SPECS = dict.fromkeys(LLAMA_LINEARS, Spec()) | {
    "down_proj": Spec(4, "asymmetric", "per_group", 24),
    "up_proj": Spec(8, rounding="stochastic"),
    "gate_proj": Spec(12),
}


def save(directory, dtype=torch.float32):
    model = tiny_llama(dtype, tie_word_embeddings=True)
    quantized = quantize_modules(model, SPECS)
    save_run(directory, model, quantized, history={"seed": 3})
    return model, quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_exporting_a_run_equals_exporting_the_model(tmp_path, dtype):
    model, quantized = save(tmp_path / "run", dtype)
    export_checkpoint(tmp_path / "direct", model, quantized, history={"seed": 3})
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "through")]) == 0
    direct = {path.name: path.read_bytes() for path in (tmp_path / "direct").iterdir()}
    through = {path.name: path.read_bytes() for path in (tmp_path / "through").iterdir()}
    assert direct.keys() == through.keys()
    for name in direct:
        assert direct[name] == through[name], name


def test_a_run_keeps_both_values_of_every_parameter(tmp_path):
    _, quantized = save(tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert [p.name for p in loaded.quantized] == [p.name for p in quantized]
    for found, expected in zip(loaded.quantized, quantized, strict=True):
        assert torch.equal(found.master, expected.master)
        assert torch.equal(found.simulated, expected.simulated)
    assert loaded.history == {"seed": 3}


def test_a_run_is_replaced_by_the_next(tmp_path):
    save(tmp_path / "run")
    save(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"got notes\.md in it"):
        save(tmp_path)
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_what_others_put_into_a_run_is_not_deleted_with_it(tmp_path):
    save(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-500").mkdir()
    (tmp_path / "run" / "checkpoint-500" / "optimizer.pt").write_text("hours")
    with pytest.raises(ValueError, match=r"got checkpoint-500/optimizer\.pt in it"):
        save(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-500" / "optimizer.pt").read_text() == "hours"


def test_a_model_without_a_config_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="needs a Hugging Face model"):
        save_run(tmp_path / "run", model, [])


def test_another_run_version_is_refused(tmp_path):
    save(tmp_path / "run")
    run = read_json(tmp_path / "run" / "run.json")
    write_json(tmp_path / "run" / "run.json", run | {"run_version": 9})
    with pytest.raises(FormatError, match="run_version must be 1, got 9"):
        load_run(tmp_path / "run")


def test_a_missing_master_is_named(tmp_path):
    save(tmp_path / "run")
    run = read_json(tmp_path / "run" / "run.json")
    run["quantized"]["no.such.weight"] = next(iter(run["quantized"].values()))
    write_json(tmp_path / "run" / "run.json", run)
    with pytest.raises(FormatError, match=r"no\.such\.weight: expected by run\.json, missing"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("run.json", lambda run: run.pop("quantized"), "run.json: quantized must be an object"),
        ("run.json", lambda run: run.pop("history"), "run.json: history must be an object"),
        ("run.json", lambda run: run.pop("files"), "run.json: files must be a list, got None"),
        ("run.json", lambda run: entry_of(run).pop("num_bits"), "quantized.num_bits is missing"),
        ("run.json", lambda run: entry_of(run).update(num_bits=1), "num_bits must lie in"),
        ("run.json", lambda run: entry_of(run).update(mode=3), "quantized.mode must be a string"),
        ("run.json", lambda run: entry_of(run).update(bits=3), "bits is not a known key"),
        ("run.json", lambda run: entry_of(run).update(scale_dtype="int8"), "scale_dtype must be"),
        ("config.json", lambda config: config.pop("architectures"), "architectures must name"),
        ("config.json", lambda config: config.update(architectures=[]), "architectures must name"),
        ("config.json", lambda config: config.update(architectures=["X"]), "architectures must"),
    ],
)
def test_a_file_without_a_key_gives_one_line_and_status_1(tmp_path, capsys, file, change, message):
    save(tmp_path / "run")
    content = read_json(tmp_path / "run" / file)
    change(content)
    write_json(tmp_path / "run" / file, content)
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def entry_of(run: dict) -> dict:
    return run["quantized"]["model.layers.0.mlp.up_proj.weight"]


def test_what_is_not_a_run_gives_one_line_and_status_1(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "run.json" in capsys.readouterr().err


def test_sizes_are_read_with_their_units():
    assert [parse_size(text) for text in ("4096", "500MB", "5 GB")] == [4096, 5 * 10**8, 5 * 10**9]
    for text in ("", "0", "-1", "5 TB", "many"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_size(text)


def test_reading_a_run_draws_no_progress_bar_of_another_library(tmp_path, capsys):
    save(tmp_path / "run")
    capsys.readouterr()
    load_run(tmp_path / "run")
    assert "Loading weights" not in capsys.readouterr().err
