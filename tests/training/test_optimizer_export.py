"""From the optimizer to files: save, export, and what the two have in common."""

import contextlib
import json
import time

import pytest
import torch
from tiny_decoder import Logits, tiny_llama, train_step, wrap

transformers = pytest.importorskip("transformers")

from moq import MoQOptimizer, cli  # noqa: E402
from moq.config import MoQConfig  # noqa: E402
from moq.loggers import CsvLogger  # noqa: E402
from moq.outlook import outlook_of, run_outlook  # noqa: E402
from moq.saved_run import load_run  # noqa: E402

FALLING = {
    "start_bits": 9,
    "target_bits": 8,
    "rounding": "stochastic",
    "schedule": {"finish_at": 0.5},
}
STEPS = 4


def tiny_llama_in_training(optimizer=True):
    """A tiny Llama at the beginning of its training, and its optimizer."""
    model = tiny_llama()
    return model, (wrap(model, FALLING, STEPS) if optimizer else None)


@pytest.fixture
def trained():
    """A tiny Llama at the end of its training, and its optimizer."""
    model, optimizer = tiny_llama_in_training()
    for step in range(STEPS):
        train_step(Logits(model), optimizer, step)
    return model, optimizer


@contextlib.contextmanager
def single_rank(directory):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_a_saved_run_holds_both_values_widths_and_history(trained, tmp_path):
    model, optimizer = trained
    optimizer.save(tmp_path / "run")
    run = load_run(tmp_path / "run")
    expected = {q.name: q for q in optimizer.quantized_parameters()}
    assert {q.name for q in run.quantized} == expected.keys()
    for q in run.quantized:
        assert torch.equal(q.master, expected[q.name].master)
        assert torch.equal(q.simulated, expected[q.name].simulated)
        assert q.num_bits == 8
    assert (run.history["step"], run.history["total_steps"]) == (STEPS, STEPS)
    assert run.history["drops"]["model.layers.0"] == [[0, 9], [2, 8]]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_saved_run_keeps_what_a_csv_logger_heard_and_how_long_a_step_took(tmp_path):
    model, optimizer = tiny_llama_in_training()
    logger = CsvLogger(tmp_path / "log" / "moq.csv")
    optimizer.add_logger(logger)
    for count in range(2):
        model(input_ids=torch.ones(1, 4).long()).logits.sum().backward()
        optimizer.step()
        optimizer.log({"loss": float(count)})
        optimizer.save(tmp_path / "run")  # again: the file is one of the run's own
    assert (tmp_path / "run" / "scalars.csv").read_text() == logger.path.read_text()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["pace"]["steps"] == 1
    assert run["pace"]["seconds"] > 0
    assert run["history"]["schedule"] == optimizer.schedule().state_dict()
    logger.path.unlink()
    optimizer.save(tmp_path / "run")
    assert not (tmp_path / "run" / "scalars.csv").exists()


def test_a_saved_run_needs_no_pickle(trained, tmp_path):
    trained[1].save(tmp_path / "run")
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_exporting_the_saved_run_is_exporting_from_the_optimizer(trained, tmp_path):
    trained[1].save(tmp_path / "run")
    trained[1].export(tmp_path / "direct")
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "later")]) == 0
    files = sorted(path.name for path in (tmp_path / "direct").iterdir())
    assert sorted(path.name for path in (tmp_path / "later").iterdir()) == files
    for name in files:
        assert (tmp_path / "direct" / name).read_bytes() == (
            tmp_path / "later" / name
        ).read_bytes(), name


def test_the_same_training_exports_the_same_bytes_at_any_speed(tmp_path, monkeypatch):
    clock = time.perf_counter
    for speed in (1, 1000):
        monkeypatch.setattr(time, "perf_counter", lambda speed=speed: clock() / speed)
        model, optimizer = tiny_llama_in_training()
        optimizer.probe(
            lambda ids, model=model: model(input_ids=ids, labels=ids).loss,
            [torch.arange(8)[None]],
            max_cost=None,
            progress=False,
        )
        for step in range(STEPS):
            train_step(Logits(model), optimizer, step)
        optimizer.save(tmp_path / f"run{speed}")
        optimizer.export(tmp_path / f"direct{speed}")
        run, output = str(tmp_path / f"run{speed}"), str(tmp_path / f"later{speed}")
        assert cli.main(["export", run, "-o", output]) == 0
        saved = json.loads((tmp_path / f"run{speed}" / "run.json").read_text())
        (measured,) = saved["history"]["sensitivities"]
        assert measured == json.loads(json.dumps(optimizer.history[0]))  # the run keeps its times
    for file in (tmp_path / "direct1").iterdir():
        for other in ("direct1000", "later1", "later1000"):
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes(), file.name
    manifest = json.loads((tmp_path / "direct1" / "moq.json").read_text())
    (told,) = manifest["history"]["sensitivities"]
    assert told.pop("cost") == {"max_cost": None}
    assert told == {key: measured[key] for key in measured.keys() - {"cost", "seconds"}}


def test_the_exported_checkpoint_tells_its_history(trained, tmp_path):
    trained[1].export(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "moq.json").read_text())
    assert manifest["history"]["step"] == STEPS
    assert manifest["history"]["seed"] == 0


def test_an_export_before_the_target_width_says_so(tmp_path):
    _, optimizer = tiny_llama_in_training()
    with pytest.warns(UserWarning, match=r"14 of 14 weights .* after 0 steps \(.* at 9 of 8 bits"):
        optimizer.export(tmp_path / "early")


def test_an_export_after_steps_of_the_optimizer_inside_says_whose_count(tmp_path):
    model, _ = tiny_llama_in_training(optimizer=False)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = MoQOptimizer(inner, model, FALLING, total_steps=STEPS, verbose=False)
    train_step(Logits(model), inner, 0)
    with pytest.warns(UserWarning) as warned:
        optimizer.export(tmp_path / "out")
    told = " ".join(str(w.message) for w in warned)
    assert "after 0 steps" in told
    assert "A step counts if MoQOptimizer makes it, not the optimizer inside" in told
    assert "the step() of the optimizer inside, called in place of MoQOptimizer's" in told


def test_an_export_at_the_target_width_warns_of_nothing(trained, tmp_path, recwarn):
    trained[1].export(tmp_path / "out")
    assert not [w for w in recwarn if "target" in str(w.message)]


def planned(capsys, *arguments: str) -> list[list[str]]:
    assert cli.main(["schedule", *arguments]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_saved_run_alone_has_its_own_schedule_and_steps(tmp_path, capsys):
    model, _ = tiny_llama_in_training(optimizer=False)
    optimizer = wrap(model, FALLING | {"target_bits": 5}, 40)
    for step in range(2):
        train_step(Logits(model), optimizer, step)
    batches = [torch.tensor([[step, 1, 2, 3, 4]]) for step in range(2)]
    optimizer.probe(lambda tokens: model(tokens, labels=tokens).loss, batches, max_cost=None)
    optimizer.save(tmp_path / "run")
    run = str(tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["schedule", "--run", run]) == 0
    assert capsys.readouterr().out.strip() == str(optimizer.schedule()).strip()
    assert cli.main(["schedule", "--run", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["total_steps"], found["finish_at"]) == (40, 0.5)
    assert cli.main(["schedule", "--run", run, "--steps", "80", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_steps"] == 80
    (tmp_path / "moq.json").write_text(json.dumps(FALLING | {"target_bits": 5}))
    assert cli.main(["schedule", str(tmp_path / "moq.json"), "--run", run, "--json"]) == 0
    with_config = json.loads(capsys.readouterr().out)
    assert with_config["total_steps"] == 40
    arrivals = [
        [block["widths"][-1]["latest"] for block in f["blocks"]] for f in (found, with_config)
    ]
    assert arrivals[0] == arrivals[1]


def test_the_schedule_of_a_saved_run_follows_what_was_measured_in_it(tmp_path, capsys):
    model, optimizer = tiny_llama_in_training()
    config = tmp_path / "moq.json"
    config.write_text(json.dumps(FALLING | {"target_bits": 4}))
    optimizer.save(tmp_path / "run")
    command = ["schedule", str(config), "--steps", "1000", "--run", str(tmp_path / "run")]
    assert cli.main(command) == 1
    assert "must have been measured (probe), got none" in capsys.readouterr().err

    optimizer.probe(
        lambda ids: model(input_ids=ids, labels=ids).loss, [torch.ones(1, 4).long()], max_cost=None
    )
    optimizer.save(tmp_path / "run")
    rows = {row[0]: row[1:] for row in planned(capsys, *command[1:]) if row}
    (found,) = optimizer.history
    for name, sensitivity in zip(found["blocks"], found["normalised"], strict=True):
        arrival = int(rows[name][-3])  # a step, no longer a range
        assert (arrival == 500) == (sensitivity == 1.0)
    assert "Ranges:" not in rows

    both = ["--model", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main(command + both)
    capsys.readouterr()
    assert cli.main(["schedule", str(config), "--steps", "9", "--run", str(tmp_path)]) == 1
    assert "must be a run" in capsys.readouterr().err


SPLITTING = [
    {"match": "*.o_proj", "schedule": {"finish_at": 0.9}},
    {"match": "*.mlp.down_proj", "target_bits": 4},
]


def probed_run(directory, config: dict, frozen: str = "-"):
    """Saves a tiny Llama that was probed at its beginning; returns its optimizer."""
    model, _ = tiny_llama_in_training(optimizer=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    optimizer = wrap(model, config, 1000)
    optimizer.probe(
        lambda ids: model(input_ids=ids, labels=ids).loss, [torch.ones(1, 4).long()], max_cost=None
    )
    optimizer.save(directory)
    return optimizer


@pytest.mark.parametrize("frozen", ["-", "0.mlp.down_proj"])
def test_the_schedule_of_a_saved_run_is_that_of_its_training_where_rules_split_layers(
    tmp_path, frozen
):
    config = {"rules": SPLITTING, "sensitivity": {"rule": "stepped"}}
    optimizer = probed_run(tmp_path / "run", config, frozen)
    outlook = run_outlook(MoQConfig.from_dict(config), 1000, tmp_path / "run")
    assert len(outlook) == 6
    assert outlook == outlook_of(optimizer.schedule())


def test_a_layer_that_rules_split_anew_is_as_sensitive_as_the_most_sensitive_of_its_blocks(
    tmp_path,
):
    config = {"rules": SPLITTING, "sensitivity": {"rule": "stepped"}}
    (found,) = probed_run(tmp_path / "run", config).history
    whole = MoQConfig.from_dict({"schedule": {"period": 1}, "sensitivity": {"rule": "stepped"}})
    for block in run_outlook(whole, 10_000, tmp_path / "run"):
        values = zip(found["blocks"], found["normalised"], strict=True)
        largest = max(value for name, value in values if name.startswith(block.name))
        assert block.widths[1].latest == 1 + int(4 * largest)


def test_a_run_of_other_blocks_is_refused(tmp_path, capsys):
    model, optimizer = tiny_llama_in_training()
    optimizer.probe(
        lambda ids: model(input_ids=ids, labels=ids).loss, [torch.ones(1, 4).long()], max_cost=None
    )
    optimizer.save(tmp_path / "run")
    config = tmp_path / "moq.json"
    config.write_text(json.dumps({"block_pattern": "^model"}))
    command = ["schedule", str(config), "--steps", "1000", "--run", str(tmp_path / "run")]
    assert cli.main(command) == 1
    assert "blocks must be those of the configuration, model and" in capsys.readouterr().err


def test_a_model_without_a_config_cannot_be_saved_as_a_run(decoder, tmp_path):
    with pytest.raises(ValueError, match="Hugging Face model"):
        wrap(decoder(), FALLING).save(tmp_path / "run")


def test_the_best_of_several_models_is_exported_after_training(trained, tmp_path):
    model, optimizer = trained
    best = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.param_groups[0]["lr"] = 1.0
    train_step(Logits(model), optimizer, STEPS)
    model.load_state_dict(best)
    with pytest.warns(UserWarning, match="were replaced from outside"):
        optimizer.save(tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "later")]) == 0
    optimizer.export(tmp_path / "direct")
    for directory in ("later", "direct"):
        assert cli.main(["verify", str(tmp_path / directory)]) == 0


@pytest.mark.parametrize("where", ["root", "layers", "ddp"])
def test_a_compiled_model_is_saved_and_exported_as_the_plain_one(where, tmp_path):
    expected, plain = tiny_llama_in_training()
    model, _ = tiny_llama_in_training(optimizer=False)
    wrapped = model
    if where == "layers":
        for number, layer in enumerate(model.model.layers):
            model.model.layers[number] = torch.compile(layer, backend="eager")
        model.model.layers[0].mlp.up_proj = torch.compile(
            model.model.layers[0].mlp.up_proj, backend="eager"
        )
    else:
        wrapped = torch.compile(model, backend="eager")
    with single_rank(tmp_path) if where == "ddp" else contextlib.nullcontext():
        if where == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)
        optimizer = wrap(wrapped, FALLING, STEPS)
        assert optimizer.num_bits.keys() == plain.num_bits.keys()
        with torch.compiler.set_stance("force_eager"):  # compiled gradients differ in the last bit
            for step in range(STEPS):
                train_step(Logits(wrapped), optimizer, step)
                train_step(Logits(expected), plain, step)
        optimizer.save(tmp_path / "run")
        optimizer.export(tmp_path / "out")
        plain.export(tmp_path / "expected")
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "later")]) == 0
    for name in sorted(path.name for path in (tmp_path / "expected").iterdir()):
        content = (tmp_path / "expected" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == content, name
        assert (tmp_path / "later" / name).read_bytes() == content, name


def test_nothing_is_written_within_full_precision(trained, tmp_path):
    optimizer = trained[1]
    with optimizer.full_precision(), pytest.raises(RuntimeError, match="outside full_precision"):
        optimizer.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def normalisation(model, optimizer):
    return model.model.norm.weight


def weight(model, optimizer):
    return optimizer.state[model.model.layers[1].mlp.up_proj.weight]["moq_master"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "name"), [(normalisation, "model.norm"), (weight, "model.layers.1.mlp.up_proj")]
)
def test_what_is_not_finite_does_not_replace_the_last_good_run(
    trained, tmp_path, bad, tensor, name
):
    model, optimizer = trained
    optimizer.save(tmp_path / "run")
    files = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with torch.no_grad():
        tensor(model, optimizer).view(-1)[1] = bad
    for write, directory in ((optimizer.save, "run"), (optimizer.export, "out")):
        with pytest.raises(RuntimeError, match=f"{name}.weight: expected finite"):
            write(tmp_path / directory)
    assert not (tmp_path / "out").exists()
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == files


def test_a_directory_that_cannot_be_exported_to_is_refused_beforehand(trained, tmp_path):
    _, optimizer = trained
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for directory, error in (("notes", ValueError), ("file", ValueError), ("file/x", OSError)):
        with pytest.raises(error):
            optimizer.require_exportable(tmp_path / directory)
    optimizer.require_exportable(tmp_path / "new" / "model")
    assert not (tmp_path / "new" / "model").exists()
    assert list((tmp_path / "new").iterdir()) == []
    optimizer.export(tmp_path / "new" / "model")
    optimizer.require_exportable(tmp_path / "new" / "model")
