"""`moq report`: one page that tells what happened in a training, and nothing else."""

import json
import re
import shutil
from html import escape, unescape
from pathlib import Path

import pytest
from reported_runs import (
    HOSTILE,
    SECTIONS,
    STEPS,
    damage,
    deep_page,
    train_reported,
    training,
)
from tiny_decoder import Logits, tiny_llama, train_step, wrap

transformers = pytest.importorskip("transformers")

from moq import cli  # noqa: E402
from moq.inspect import describe_checkpoint  # noqa: E402
from moq.report_axis import Axis  # noqa: E402
from moq.report_charts import thinned  # noqa: E402
from moq.report_command import report  # noqa: E402
from moq.report_data import read_record  # noqa: E402
from moq.report_html import number, size  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_reported(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def text(trained):
    return report(trained[1])


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(trained[1], tmp_path / "run"))


def section(text: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}".*?</section>', text, re.DOTALL)
    return found


def words(html: str) -> str:
    """What a reader sees, on one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def rows(html: str, caption: str) -> list[list[str]]:
    """Cells of the table with a caption that begins so."""
    for found in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        if f"<caption>{caption}" in found:
            lines = re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)[1:]
            return [
                [unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)]
                for line in lines
            ]
    raise AssertionError(f"no table {caption!r}")


# ------------------------------------------------------------------------------- what it tells


def test_every_section_is_there_in_order_and_linked(text):
    assert tuple(re.findall(r'<section id="(\w+)"', text)) == SECTIONS
    assert tuple(re.findall(r'<a href="#(\w+)"', text)) == SECTIONS
    assert 'class="missing"' not in text


def test_arrivals_are_those_of_the_schedule(trained, text):
    optimizer, _ = trained
    schedule = optimizer.schedule()
    arrivals = {name: plan[-1][0] for name, plan in
                zip(schedule.block_names, schedule.plan(), strict=True)}  # fmt: skip
    plain = training()[1].schedule()
    earliest, latest = plain.bounds()
    found = rows(section(text, "plan"), "Step of arrival")
    assert [row[0] for row in found] == schedule.block_names
    for index, row in enumerate(found):
        assert row[1] == "16 → 4"
        assert row[2] == f"{earliest[index][-1][0]} – {latest[index][-1][0]}"
        assert int(row[3]) == plain.plan()[index][-1][0]
        assert int(row[4]) == arrivals[row[0]]
        assert int(row[5].replace("−", "-")) == int(row[4]) - int(row[3])


def test_logged_widths_are_compared_with_the_plan(trained, text):
    assert "All 36 widths that were logged meanwhile are those of the plan" in words(text)
    assert "3 of 3 layers have their target width after 24 of 24 steps" in words(text)


def test_widths_that_contradict_the_plan_are_counted(run):
    file = run / "scalars.csv"
    changed = re.sub(r"^(\d+,moq/bits/model.layers.0),[\d.]+$", r"\1,3.0", file.read_text(),
                     flags=re.MULTILINE)  # fmt: skip
    file.write_text(changed)
    assert "12 of 36 widths that were logged are not those of the plan" in words(report(run))


def test_each_first_step_at_a_width_is_in_the_table(trained, text):
    schedule = trained[0].schedule()
    for row, plan in zip(rows(text, "First step at each width"), schedule.plan(), strict=True):
        steps = {bits: step for step, bits in plan}
        assert [int(cell) for cell in row[1:]] == [steps[bits] for bits in sorted(steps)[::-1]]


def test_sensitivities_of_both_probes_are_told(trained, text):
    found = rows(text, "Sensitivity by probe")
    for index, probe in enumerate(trained[0].history):
        for row, value, share in zip(found, probe["values"], probe["normalised"], strict=True):
            assert row[1 + 2 * index].startswith(f"{number(value)} ± ")
            assert row[2 + 2 * index] == number(share, 2)
    costs = rows(text, "Probes")
    assert [row[0] for row in costs] == ["0", "10"]
    assert [int(row[2]) for row in costs] == [p["products"] for p in trained[0].history]
    assert all(row[4].endswith("%") for row in costs)


def test_values_that_are_noise_are_marked(run):
    def make_noise(data):
        found = data["history"]["sensitivities"][-1]
        found["standard_error"][0] = 2 * abs(found["values"][0])
        found["standard_error"][1] = 0.5 * abs(found["values"][1])

    damage(run / "run.json", make_noise)
    text = report(run)
    first, second = rows(text, "Sensitivity by probe")[:2]
    assert first[-2].endswith("(noise)") and not second[-2].endswith("(noise)")
    assert f"nothing but noise: {first[0]};" in words(section(text, "sensitivity"))
    assert f"({first[0]}), and these blocks' widths follow noise" in words(section(text, "front"))


def test_the_share_that_probes_may_take_is_told(run):
    damage(run / "run.json", lambda data: data["history"]["sensitivities"][-1]["cost"].update(
        seconds=1.5, max_cost=0.02))  # fmt: skip
    text = report(run)
    assert "at most 2 % of the training was allowed" in words(section(text, "cost"))
    assert rows(text, "Probes")[1][3].split() == ["1.50", "s"]


def test_the_share_of_probes_is_of_the_whole_training_as_their_budget_is(run):
    def change(data):
        data["history"]["step"] = 5
        data["pace"] = {"steps": 4, "seconds": 4.0}
        del data["history"]["sensitivities"][1:]
        data["history"]["sensitivities"][0]["cost"] = {
            "seconds": 0.48, "spent": 0.48, "training_seconds": 25.0, "max_cost": 0.02,
        }  # fmt: skip

    damage(run / "run.json", change)
    text = report(run)
    told = words(section(text, "cost"))
    assert "0.480 s, 2 % of the 24 s that all 24 steps of 1 s take" in told
    assert (
        "2 % of the training was allowed, which at the last probe was thought to take 25 s" in told
    )
    assert rows(text, "Probes")[0][4].split() == ["2", "%"]
    assert "0.480 s, 2 % of training" in words(text)


def test_before_any_step_the_share_of_probes_is_of_what_the_training_was_thought_to_take(run):
    def change(data):
        data["pace"] = {"steps": 0, "seconds": 0.0}
        for probe in data["history"]["sensitivities"]:
            probe["cost"].update(seconds=0.5, training_seconds=50.0)

    damage(run / "run.json", change)
    text = report(run)
    told = words(section(text, "cost"))
    assert "1 s, 2 % of the 50 s that all 24 steps were thought to take." in told
    assert [row[4].split()[0] for row in rows(text, "Probes")] == ["1", "1"]


@pytest.mark.parametrize(
    ("form", "matrix"),
    [
        ("exact", "Hessian"),
        ("finite_difference", "Hessian"),
        ("gauss_newton", "Gauss-Newton matrix"),
        ("fisher", "empirical Fisher matrix"),
    ],
)
def test_the_matrix_is_called_by_the_form_of_the_probe(run, form, matrix):
    change = lambda data: data["history"]["sensitivities"][-1].update(form=form)  # noqa: E731
    damage(run / "run.json", change)
    assert f"(trace of its block of the {matrix})" in words(section(report(run), "sensitivity"))


def test_the_spectrum_is_drawn(text):
    assert rows(text, "Spectra")[0][:2] == ["model.layers.1", "24"]
    assert "model.layers.1, step 24" in section(text, "spectrum")


def test_sizes_are_those_of_the_exported_checkpoint(trained, text, tmp_path):
    optimizer, _ = trained
    optimizer.export(tmp_path / "out")
    exported = describe_checkpoint(tmp_path / "out")
    assert words(section(text, "size")).startswith(
        f"Size Exported, the tensors of the model take {' '.join(size(exported['bytes']).split())},"
    )
    whole = sum(p.numel() for p in optimizer.model.parameters()) * 4
    assert f"of {' '.join(size(whole).split())} in FP32" in words(section(text, "size"))
    four, _ = rows(text, "Bytes by width")
    assert four[:2] == ["4 bits", "21"]
    assert four[3] == size(sum(entry["bytes"] for entry in exported["weights"]))


def test_the_targets_of_the_run_lie_where_the_planner_puts_them(trained, text, capsys):
    _, directory = trained
    assert cli.main(["schedule", "--run", str(directory), "--budget", "mean_bits=4", "--json"]) == 0
    choice = json.loads(capsys.readouterr().out)
    told = f"The targets of this run: 4 bits in the mean, loss {number(choice['loss'])}."
    assert told in words(section(text, "front"))
    assert rows(text, "Points of the front")[0] == ["4", number(choice["loss"]), "3 at 4"]


def test_figures_of_ones_own_are_drawn(trained, text):
    found = {row[0]: row[1:] for row in rows(text, "Figures")}
    assert found["accuracy"] == ["1", *["0.5000"] * 4]
    assert found["loss"][0] == "24"
    assert found[HOSTILE] == ["24", "0", "0", "23", "23"]


def test_the_last_error_of_every_layer_is_that_of_its_weights(trained, text):
    logged = dict(row for row in rows(text, "Quantization error of every layer"))
    layers = {row[0]: row for row in rows(text, "Layers")}
    assert logged.keys() == layers.keys()
    for row in layers.values():
        assert row[3:5] == ["4", "4"]
        assert 1 < float(row[6].split()[0]) < 50


# ------------------------------------------------------------------------- what the page is


def test_the_page_needs_no_network_and_runs_nothing(text):
    assert "default-src 'none'" in text
    for forbidden in ("<script", "<img", "<link", "src=", "url(", "@import", "http:", "https:"):
        assert forbidden not in text.replace(escape(HOSTILE), "")


def test_names_are_escaped(text):
    assert HOSTILE not in text
    assert escape(HOSTILE) in text
    assert "<h1>run &amp; more</h1>" in text


def test_numbers_of_tables_stand_at_the_right_and_charts_have_words(text):
    assert re.search(r'<td class="n">', text)
    charts = re.findall(r'role="img" aria-label="([^"]*)"', text)
    assert len(charts) == text.count('<figure class="chart"') > 10
    assert all(len(label) > 20 for label in charts)


@pytest.fixture(scope="module")
def deep():
    return deep_page()


def test_hundreds_of_layers_stay_in_sight(deep):
    heights = [int(height) for height in re.findall(r"--height:(\d+)px", deep)]
    assert heights == [1200] * 3
    assert len(deep) < 4e6
    assert len(rows(deep, "Layers")) == 300


# ------------------------------------------------------------------------- what is missing


def test_a_run_with_nothing_recorded_says_how_to_get_it(tmp_path):
    _, optimizer = training()
    optimizer.save(tmp_path / "run")
    text = report(tmp_path / "run")
    assert tuple(re.findall(r'<section id="(\w+)"', text)) == SECTIONS
    for name, remedy in {
        "sensitivity": "optimizer.probe(loss_fn, batches)",
        "spectrum": "moq.spectral_density(loss_fn, batches, optimizer",
        "front": 'optimizer.probe(loss_fn, batches, measure="trace")',
        "figures": 'optimizer.log({"loss": loss})',
        "error": 'loggers=CsvLogger("moq.csv")',
        "cost": "There was no probe.",
    }.items():
        assert remedy in words(section(text, name)), name
        assert "<figure" not in section(text, name)


def test_an_unfinished_training_is_told_apart_from_its_plan(tmp_path):
    model, optimizer = training()
    for step in range(5):
        train_step(Logits(model), optimizer, step)
    optimizer.save(tmp_path / "run")
    text = report(tmp_path / "run")
    assert "unfinished, saved after 5 of 24 steps: what lies ahead is plan" in words(text)
    assert "plan from here" in section(text, "plan")
    assert ' future"' in section(text, "bits")
    bits = optimizer.num_bits["model.layers.0.mlp.up_proj.weight"]
    assert rows(text, "Layers")[0][3] == str(bits) != "4"


@pytest.mark.parametrize(
    "config",
    [
        {"mode": "ternary", "target_bits": 2},
        {"mode": "binary", "target_bits": 1},
        {"mode": "asymmetric", "granularity": "per_group", "group_size": 8, "target_bits": 3},
        {"simulate": "autograd", "scale": "learned", "target_bits": 4},
        {"rules": [{"match": "*.mlp.*", "activations": "static"}]},
        {"schedule": {"table": {0: 16, 1: 12, 2: 8}}},
        {"schedule": {"period": 1, "on_unfinished": "allow"}},
    ],
    ids=str,
)
def test_every_grid_and_shape_of_schedule_has_a_page(tmp_path, config):
    model = tiny_llama(layers=3)
    optimizer = wrap(model, {"schedule": {"finish_at": 1.0}} | config, 3)
    for step in range(3):
        train_step(Logits(model), optimizer, step)
    optimizer.save(tmp_path / "run")
    text = report(tmp_path / "run")
    held = {row[0]: row[3] for row in rows(text, "Layers")}
    for name, bits in optimizer.num_bits.items():
        (layer,) = [block for block in held if name.startswith(block.partition(" ")[0] + ".")
                    and held[block] == str(bits)]  # fmt: skip
        assert layer
    if config.get("schedule", {}).get("on_unfinished"):
        assert all(row[4] == "after the end *" for row in rows(text, "Step of arrival"))
        assert "0 of 3 layers have their target width" in words(text)


def test_layers_that_rules_split_are_counted_once(tmp_path):
    model = tiny_llama(layers=3)
    rules = [{"match": "model.layers.[01].mlp.down_proj", "schedule": {"finish_at": 1.0}}]
    optimizer = wrap(model, {"schedule": {"finish_at": 0.6}, "rules": rules}, 20)
    for step in range(12):
        train_step(Logits(model), optimizer, step)
    assert len(optimizer.schedule().block_names) == 5
    optimizer.save(tmp_path / "run")
    text = words(report(tmp_path / "run"))
    assert "21 quantized weights in 3 layers" in text
    assert "1 of 3 layers have their target width after 12 of 20 steps" in text


def test_steps_that_a_resumed_training_made_again_count_once(run):
    file = run / "scalars.csv"
    file.write_text(file.read_text() + "3,loss,7.5\n999,loss,8.5\n")
    points = dict(read_record(run).scalars["loss"])
    assert points[3.0] == 7.5
    assert max(points) == STEPS


def test_scalars_may_lie_elsewhere(run, tmp_path):
    (run / "scalars.csv").rename(tmp_path / "elsewhere.csv")
    assert read_record(run).scalars == {}
    assert "loss" in read_record(run, tmp_path / "elsewhere.csv").scalars


def test_a_value_that_is_no_number_breaks_a_line_and_nothing_else(run):
    file = run / "scalars.csv"
    file.write_text(file.read_text() + "5,loss,nan\n6,loss,inf\n")
    text = report(run)
    assert not re.search(r'd="[^"]*(nan|inf)', text)


# ------------------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 40, False, ["0", "10", "20", "30", "40"]),
        (3.9, 3.95, False, ["3.90", "3.91", "3.92", "3.93", "3.94", "3.95"]),
        (-2, 2, False, ["−2", "−1", "0", "1", "2"]),
        (1e-3, 10, True, ["0.001", "0.01", "0.1", "1", "10"]),
        (0, 10_000, False, ["0", "2,000", "4,000", "6,000", "8,000", "10,000"]),
    ],
)
def test_ticks_are_round(low, high, log, ticks):
    axis = Axis(low, high, "", log)
    assert axis.words(axis.ticks(5)) == ticks


@pytest.mark.parametrize("values", [[], [0.0], [5.0], [-1.0], [float("nan")], [1e-12, 1e12]])
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_holds_whatever_there_is(values, log):
    axis = Axis.over(values, "", log=log)
    assert axis.low < axis.high
    assert all(0 <= axis.place(value) <= 1000 for value in values if value == value)
    assert len(axis.ticks(5)) < 12


def test_long_series_are_averaged():
    assert thinned([(float(i), float(i % 2)) for i in range(1000)], 500)[:2] == [(1, 0.5), (3, 0.5)]
