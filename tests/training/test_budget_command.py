"""`moq schedule --budget`: target widths for a saved run, and lines that it cannot use."""

import json

import pytest
from measured_runs import STEPS, llama, probed_llama, write_table
from tiny_decoder import wrap

from moq.cli import main


@pytest.fixture
def run(tmp_path):
    """A saved run whose layers were measured, and its optimizer."""
    optimizer = probed_llama(llama(), {"granularity": "per_group", "group_size": 16})
    optimizer.save(tmp_path / "run")
    return str(tmp_path / "run"), optimizer


def test_the_command_chooses_as_the_training_does(run, tmp_path, capsys):
    directory, optimizer = run
    expected = optimizer.choose_target_bits(mean_bits=6)
    arguments = ["schedule", "--run", directory, "--budget", "mean_bits=6"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == expected.to_dict() | {"plan": None}
    pytest.importorskip("matplotlib")
    assert main([*arguments, "--plot", str(tmp_path / "front.png")]) == 0
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert str(expected) in capsys.readouterr().out
    assert main(["schedule", "--run", directory, "--budget", "bytes=1MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == optimizer.choose_target_bits(bytes=10**6).to_dict() | {"plan": None}
    assert main([*arguments, "--objective", "trace", "--json"]) == 0
    by_trace = optimizer.choose_target_bits(mean_bits=6, objective="trace")
    assert json.loads(capsys.readouterr().out) == by_trace.to_dict() | {"plan": None}


def test_the_command_plans_with_the_chosen_widths(run, tmp_path, capsys):
    directory, optimizer = run
    config = tmp_path / "moq.json"
    config.write_text('{"granularity": "per_group", "group_size": 16}')
    choice = optimizer.choose_target_bits(mean_bits=6)
    arguments = ["schedule", str(config), "--steps", str(STEPS), "--run", directory]
    arguments += ["--budget", "mean_bits=6"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target_bits"] == choice.target_bits
    plans = [
        [(width["latest"], width["bits"]) for width in block["widths"]]
        for block in found["plan"]["blocks"]
    ]
    assert plans == optimizer.schedule().plan()
    assert main(arguments) == 0
    assert "First step at each bit width, of 20 steps" in capsys.readouterr().out


def test_the_command_reads_a_latency_table(run, tmp_path, capsys):
    directory, _ = run
    table = write_table(tmp_path / "bench.json", {}, {"weights": "int4", "batch": 2})
    arguments = ["schedule", "--run", directory, "--budget", "latency=9ms"]
    assert main([*arguments, "--latency-table", str(table)]) == 1
    assert (
        "latency must be at least 0.009999999, the smallest feasible budget"
        in capsys.readouterr().err
    )
    arguments[-1] = "latency=10ms"
    assert main([*arguments, "--latency-table", str(table), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(block["widths"] == [4, 8] for block in found["blocks"])


def test_the_command_refuses_other_blocks_than_those_measured(run, tmp_path, capsys):
    directory, _ = run
    config = tmp_path / "moq.json"
    config.write_text('{"rules": [{"match": "*.mlp.*", "target_bits": 4}]}')
    assert main(["schedule", str(config), "--run", directory, "--budget", "mean_bits=6"]) == 1
    assert "must hold the same weights as those of the run" in capsys.readouterr().err


def test_the_command_refuses_a_run_without_traces(tmp_path, capsys):
    optimizer = wrap(llama(), {}, STEPS)
    optimizer.save(tmp_path / "run")
    arguments = ["schedule", "--run", str(tmp_path / "run"), "--budget", "mean_bits=6"]
    assert main(arguments) == 1
    assert "traces of the blocks must have been measured" in capsys.readouterr().err


def test_the_command_refuses_a_run_that_does_not_name_its_blocks(run, tmp_path, capsys):
    directory, _ = run
    path = tmp_path / "run" / "run.json"
    saved = json.loads(path.read_text())
    del saved["history"]["blocks"]
    path.write_text(json.dumps(saved))
    assert main(["schedule", "--run", directory, "--budget", "mean_bits=6"]) == 1
    assert "history.blocks must name the block of every" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "mean_bits=6"], "--budget needs --run RUN"),
        ([], "CONFIG and --steps are needed"),
        (["x"], "CONFIG and --steps are needed"),
        (["--steps", "9"], "CONFIG and --steps are needed"),
        (["x", "--steps", "9", "--latency-table", "t"], "--latency-table needs --budget"),
        (["--run", "x", "--budget", "bytes=9", "--steps", "9"], "--steps with --budget needs a"),
        (["--run", "x", "--deepspeed"], "--deepspeed needs a CONFIG"),
    ],
)
def test_the_command_refuses_a_line_that_it_cannot_use(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["schedule", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["4;8", "", "4,", "four"])
def test_the_command_refuses_widths_that_are_no_list(run, text, capsys):
    directory, _ = run
    arguments = ["schedule", "--run", directory, "--budget", "mean_bits=6", "--widths", text]
    assert main(arguments) == 1
    assert "--widths must be bits between commas" in capsys.readouterr().err
