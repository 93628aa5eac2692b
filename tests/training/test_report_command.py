"""`moq report` on the command line: the file that it writes, and runs that are damaged."""

import shutil
from pathlib import Path

import pytest
from reported_runs import damage, train_reported

from moq import cli

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_reported(tmp_path_factory.mktemp("report"))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(trained[1], tmp_path / "run"))


def test_the_command_writes_one_file(trained, tmp_path, capsys):
    output = tmp_path / "report.html"
    output.write_text("old")
    assert cli.main(["report", str(trained[1]), "-o", str(output)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert output.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", "--help"])
    shown = capsys.readouterr().out
    assert "moq report out/run -o report.html" in shown
    assert 'optimizer.log({"loss": loss' in shown


def without_schedule(run: Path) -> None:
    damage(run / "run.json", lambda data: data["history"].pop("schedule"))


def short_probe(run: Path) -> None:
    damage(run / "run.json", lambda data: data["history"]["sensitivities"][0]["values"].pop())


def text_products(run: Path) -> None:
    damage(run / "run.json", lambda data: data["history"]["sensitivities"][1].update(products="9"))


def numeric_converged(run: Path) -> None:
    damage(run / "run.json", lambda data: data["history"]["sensitivities"][1].update(converged=1))


def text_cost(key: str):
    def change(run: Path) -> None:
        damage(
            run / "run.json",
            lambda data: data["history"]["sensitivities"][0]["cost"].update({key: "long"}),
        )

    return change


def damaged_plan(run: Path) -> None:
    damage(run / "run.json", lambda data: data["history"]["schedule"].pop("blocks"))


def damaged_spectrum(run: Path) -> None:
    damage(run / "run.json", lambda data: data["history"]["spectra"][0]["density"].pop())


def text_step(run: Path) -> None:
    damage(run / "run.json", lambda data: data["history"].update(step="many"))


def cut_json(run: Path) -> None:
    (run / "run.json").write_text((run / "run.json").read_text()[:-30])


def damaged_scalars(run: Path) -> None:
    (run / "scalars.csv").write_text("step,name,value\n1,loss,1.0\n2,loss\n")


def other_columns(run: Path) -> None:
    (run / "scalars.csv").write_text("a,b\n")


def damaged_masters(run: Path) -> None:
    (run / "masters.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "must be a run, the directory that optimizer.save(DIR) wrote, got nothing"),
        (lambda run: (run / "run.json").unlink(), "got a directory without run.json"),
        (lambda run: (run / "run.json").rename(run / "moq.json"), "a checkpoint, which has no"),
        (without_schedule, "history.schedule must hold the plan, and is missing"),
        (damaged_plan, "run.json: history.schedule:"),
        (short_probe, "history.sensitivities[0]: values must be a list of 3 numbers"),
        (text_products, "history.sensitivities[1]: products must be an integer, got '9'"),
        (numeric_converged, "history.sensitivities[1]: converged must be true or false, got 1"),
        (text_cost("seconds"), "history.sensitivities[0]: seconds must be a number, got 'long'"),
        (text_cost("training_seconds"), "sensitivities[0]: training_seconds must be a number"),
        (text_cost("max_cost"), "history.sensitivities[0]: max_cost must be a number, got 'long'"),
        (damaged_spectrum, "history.spectra[0]: density must be a list of 401 numbers"),
        (text_step, "run.json: step must be an integer, got 'many'"),
        (cut_json, "run.json: expected a JSON object"),
        (damaged_scalars, "line 3 must hold a step, a name and a number, got '2,loss'"),
        (other_columns, "scalars.csv: must begin with the columns step, name, value"),
        (damaged_masters, "masters.safetensors"),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_place(run, tmp_path, capsys, change, message):
    change(run)
    output = tmp_path / "report.html"
    output.write_text("old")
    assert cli.main(["report", str(run), "-o", str(output)]) == 1
    assert message in capsys.readouterr().err
    assert output.read_text() == "old"


def test_an_output_that_cannot_be_is_refused_first(trained, tmp_path, capsys):
    run = str(trained[1])
    assert cli.main(["report", run, "-o", str(tmp_path / "no" / "report.html")]) == 1
    assert "must exist: mkdir -p it first" in capsys.readouterr().err
    assert cli.main(["report", run, "-o", str(tmp_path)]) == 1
    assert "must be a file, got a directory" in capsys.readouterr().err
    assert cli.main(["report", run, "-o", str(tmp_path / "r.html"), "--scalars", "no.csv"]) == 1
    assert "no.csv: No such file" in capsys.readouterr().err
