"""`moq schedule`: the plan of a configuration, and of a model's layers."""

import json
import os
import subprocess
import sys

import pytest

from moq.cli import main

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 50,
}


@pytest.fixture
def config_file(tmp_path):
    def write(**config):
        path = tmp_path / "moq.json"
        path.write_text(json.dumps(config))
        return str(path)

    return write


def test_the_command_prints_the_steps_of_every_layer(config_file, capsys):
    config = config_file(sensitivity={"rule": "none"}, start_bits=10)
    assert main(["schedule", config, "--steps", "100"]) == 0
    printed = capsys.readouterr().out
    assert "of 100 steps, all at their target by 60 %" in printed
    row = next(line for line in printed.splitlines() if "default" in line)
    assert row.split() == ["default", "0", "20", "60"]


def test_the_command_plans_the_layers_of_a_model(config_file, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    config = config_file(rules=[{"match": "*.mlp.*", "target_bits": 4}])
    arguments = ["schedule", config, "--steps", "400", "--model", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total_steps"] == 400
    assert len(found["blocks"]) == 6
    assert found["blocks"][1]["name"] == "model.layers.0 (16 to 4 bits)"
    assert found["blocks"][1]["widths"][-1] == {"bits": 4, "earliest": 48, "latest": 240}
    assert main(arguments) == 0
    assert "model.layers.{0-2} (16 to 4 bits)" in capsys.readouterr().out


def test_the_command_warns_as_it_reports_errors(config_file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    config = config_file(rules=[{"match": "*.mlp.*", "target_bits": 4}, {"match": "*"}])
    command = ["schedule", config, "--steps", "400", "--model", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "moq", *command], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith(
        "moq schedule: warning: rules[0] ('*.mlp.*') decides nothing: rules[1] ('*') matches all"
    )
    assert done.stderr.count("\n") == 1


def test_the_command_refuses_a_schedule_that_cannot_finish(config_file, capsys):
    config = config_file(schedule={"period": 10}, sensitivity={"rule": "none"})
    assert main(["schedule", config, "--steps", "2000"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "period <= 7" in captured.err and "total_steps >= 2550" in captured.err
    assert "got 1 of 1 that" in captured.err
    assert "or finish_at (at most 1.0) instead of period" in captured.err
    assert main(["schedule", config, "--steps", "2550"]) == 0


def test_what_the_command_does_about_an_unfinished_schedule_can_be_said(config_file, capsys):
    config = config_file(schedule={"table": {"0": 16, "100": 12, "300": 8}})
    command = ["schedule", config, "--steps", "200"]
    assert main(command) == 1
    assert "or no step of the table beyond 200" in capsys.readouterr().err
    steps = {}
    for choice in ("allow", "clamp"):
        assert main([*command, "--on-unfinished", choice, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["on_unfinished"] == choice
        steps[choice] = [width["latest"] for width in found["blocks"][0]["widths"]]
    assert steps == {"allow": [0, 100, None], "clamp": [0, 100, 200]}


@pytest.mark.parametrize("directory", ["nowhere", "empty"])
def test_a_model_directory_that_is_none_is_refused_without_a_look_elsewhere(
    config_file, tmp_path, capsys, monkeypatch, directory
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["schedule", config_file(), "--steps", "400", "--model", directory]) == 1
    assert f"{directory}: expected a directory with" in capsys.readouterr().err


def test_the_command_names_a_rule_that_matches_nothing(config_file, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    config = config_file(rules=[{"match": "*.mpl.*", "target_bits": 4}])
    assert main(["schedule", config, "--steps", "400", "--model", str(tmp_path)]) == 1
    assert "'*.mpl.*'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_command_draws_the_plan(config_file, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan{suffix}"
    assert main(["schedule", config_file(), "--steps", "100", "--plot", str(path)]) == 0
    start = {".png": b"\x89PNG", ".svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(start)


def test_the_command_refuses_another_kind_of_plot(config_file, capsys):
    assert main(["schedule", config_file(), "--steps", "100", "--plot", "plan.jpg"]) == 1
    assert ".png or .svg" in capsys.readouterr().err


def test_the_plan_is_printed_though_it_cannot_be_drawn(config_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["schedule", config_file(), "--steps", "100", "--plot", "plan.svg"]) == 1
    captured = capsys.readouterr()
    assert "First step at each bit width" in captured.out
    assert "pip install matplotlib" in captured.err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_nothing_is_said_to_a_reader_that_has_enough(config_file, form):
    command = [sys.executable, "-m", "moq", "schedule", config_file(), "--steps", "100", *form]
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")
