"""`moq report`: one page that tells what happened in a training, and nothing else."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
import torch
from conftest import Logits, tiny_llama, train_step, wrap

transformers = pytest.importorskip("transformers")

import moq  # noqa: E402
from moq import cli  # noqa: E402
from moq.inspect import describe_checkpoint  # noqa: E402
from moq.loggers import CsvLogger  # noqa: E402
from moq.report_axis import Axis  # noqa: E402
from moq.report_charts import thinned  # noqa: E402
from moq.report_command import report  # noqa: E402
from moq.report_data import Layer, RunRecord, read_record  # noqa: E402
from moq.report_html import number, size  # noqa: E402
from moq.report_page import page  # noqa: E402
from moq.report_weights import LayerWeights, RunWeights, WidthTotal  # noqa: E402

STEPS = 24
SECTIONS = (
    "plan", "bits", "sensitivity", "spectrum", "front", "size", "figures", "error", "cost",
    "layers",
)  # fmt: skip
HOSTILE = 'loss <img src="https://example.org/x">'


def training(**options):
    model = tiny_llama(layers=3)
    config = {"start_bits": 16, "target_bits": 4, "schedule": {"finish_at": 0.75}}
    return model, wrap(model, config, STEPS, **options)


def loss_of(model):
    return lambda ids: model(input_ids=ids, labels=ids).loss


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole training with everything that a page can show: (optimizer, directory of the run)."""
    folder = tmp_path_factory.mktemp("report")
    model, optimizer = training(loggers=CsvLogger(folder / "moq.csv"), log_every=2)
    optimizer.probe(loss_of(model), [tokens(1)], max_cost=None, progress=False)
    for step in range(STEPS):
        optimizer.log({"loss": train_step(Logits(model), optimizer, step), HOSTILE: float(step)})
        if step == 9:
            optimizer.probe(loss_of(model), [tokens(2)], max_cost=None, progress=False)
    optimizer.log({"accuracy": 0.5})
    optimizer.save(folder / "run & more")
    moq.spectral_density(
        loss_of(model),
        [tokens(3)],
        optimizer,
        blocks=["model.layers.1"],
        steps=6,
        probes=2,
        run=folder / "run & more",
        progress=False,
    )
    return optimizer, folder / "run & more"


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


def layer(index: int, steps: int) -> Layer:
    plan = [(0, 16), (steps // 4, 8), (steps // 4 + index, 4)]
    return Layer(f"h.{index}", f"h.{index}", plan, plan, plan, plan)


@pytest.fixture(scope="module")
def deep() -> str:
    """The page of a run with 300 layers and 100,000 steps."""
    layers = [layer(index, 100_000) for index in range(300)]
    logged = {f"moq/flips/h.{i}": [(100.0 * s, 0.1) for s in range(400)] for i in range(300)}
    record = RunRecord(
        directory=Path("deep"), model="Big", step=40_000, total_steps=100_000, layers=layers,
        chosen={},
        probes=[], scalars=logged | {"moq/flips": [(1.0, 0.1)]}, scalars_file=None, spectra=[],
        seconds_per_step=None, blocks={},
    )  # fmt: skip
    own = {one.name: LayerWeights(100, 50, 1.0, 100.0) for one in layers}
    weights = RunWeights(own, {4: WidthTotal(300, 30000, 15000)}, 40000, 40000, 30000)
    return page(record, weights, "no front", "")


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


# ------------------------------------------------------------------------- the command


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


def damage(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


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


# ------------------------------------------------------------------------- in a browser


def works(program: str) -> bool:
    """Whether a browser is there, and no stub of a package manager."""
    if shutil.which(program) is None:
        return False
    asked = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and "Chrom" in asked.stdout


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of this machine."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    program = next(filter(works, ("chromium", "chromium-browser", "google-chrome")), None)
    if program is None:
        pytest.skip("needs Chromium: sudo apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=shutil.which(program))
        yield found
        found.close()


def luminance(color: str) -> float:
    """Of a CSS colour, rgb(…), from 0 to 1, near enough to tell dark from light."""
    red, green, blue = map(float, re.findall(r"[\d.]+", color)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


OVERLAPS = """all => all.flatMap(labels => {
    const shown = [...labels.children].filter(one => one.offsetWidth > 0)
    return shown.slice(1).filter((one, i) =>
        one.getBoundingClientRect().left < shown[i].getBoundingClientRect().right)
}).map(one => one.textContent)"""


@pytest.mark.parametrize("width", [1280, 390, 340])
def test_labels_have_room_beside_each_other(browser, text, deep, tmp_path, width):
    for name, content in (("text", text), ("deep", deep)):
        file = tmp_path / f"{name}.html"
        file.write_text(content)
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(file.as_uri())
        assert page.locator(".plot .x").evaluate_all(OVERLAPS) == []
        cut = "all => all.filter(one => one.scrollWidth > one.clientWidth + 1).length"
        assert page.locator(".plot .y span").evaluate_all(cut) == 0
        charts = page.locator(".plot .x").count()
        assert page.locator(".plot .x span:visible").count() >= 2 * charts > 0
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_whole(browser, text, tmp_path, scheme, width):
    file = tmp_path / "report.html"
    file.write_text(text)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())

    assert asked == [file.as_uri()]
    assert told == []
    for name in SECTIONS:
        assert page.locator(f"#{name} h2").bounding_box()["height"] > 10, name
    boxes = page.locator("figure .plot, figure .bar svg").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(b => [b.left, b.right, b.height])"
    )
    assert len(boxes) > 12
    for left, right, height in boxes:
        assert 0 <= left < right - 100 and right <= width and height >= 20
    shapes = page.locator("svg path, svg rect").evaluate_all(
        "all => all.filter(one => !one.closest('.legend')).map(one => "
        "[getComputedStyle(one).stroke, getComputedStyle(one).fill])"
    )
    assert all(("none", "none") != tuple(paint) for paint in shapes)
    # Nothing is wider than the window but tables, which scroll by themselves.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    body = "getComputedStyle(document.body)"
    paper, ink = (luminance(page.evaluate(f"{body}.{key}")) for key in ("backgroundColor", "color"))
    assert (paper > ink) == (scheme == "light")
    assert abs(paper - ink) > 0.7

    picture = tmp_path / "report.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
    page.close()


def test_charts_have_words_at_their_axes_and_under_the_pointer(browser, text, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(text)
    page = browser.new_page()
    page.goto(file.as_uri())
    chart = page.locator("#plan .plot").first
    ticks = chart.locator(".x span").all_inner_texts()
    assert ticks == ["0", "5", "10", "15", "20"]
    lefts = chart.locator(".x span").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(b => [b.left, b.right])"
    )
    assert all(right < left for (_, right), (left, _) in zip(lefts, lefts[1:], strict=False))
    titles = page.locator("#bits rect title").evaluate_all("all => all.map(t => t.textContent)")
    assert any("model.layers.0: 16 bits, steps 0 to" in title for title in titles)
    page.locator("#plan summary").click()
    assert page.get_by_role("table", name="Step of arrival at the target width").is_visible()
    page.close()


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
