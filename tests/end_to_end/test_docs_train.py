"""Every code block of docs/train.md, run as it stands there, on a small model."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

import moq
from moq.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
YAML, ACTIVATIONS = [text for language, text in BLOCKS if language == "yaml"]
PLAN, BUDGET, REPORT = [text for language, text in BLOCKS if language == ""]


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the page takes for granted: a model, data, and a moq.yaml as it shows one.

    And a training of hours: of this model's own half a minute 2 % are half a second, and on a busy
    machine, whose threads wait for each other, the first product alone takes many times that.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moq.sensitivity.gradient_seconds", lambda *_: 1.0)
    Path("moq.yaml").write_text(YAML)
    torch.manual_seed(1)
    rows = [torch.randint(50, (1, 16)) for _ in range(4)]
    batches = [{"input_ids": row, "labels": row} for row in rows]
    return {
        "torch": torch,
        "moq": moq,
        "model": llama(),
        "tokenizer": None,
        "loader": batches[:3],
        "probe_batches": batches[3:],
    }


def block_with(text: str) -> str:
    (block,) = [block for block in PYTHON if text in block]
    return block


def wrapped(names: dict, total_steps: int = 100) -> moq.MoQOptimizer:
    adamw = torch.optim.AdamW(names["model"].parameters())
    return moq.MoQOptimizer(
        adamw, names["model"], "moq.yaml", total_steps=total_steps, verbose=False
    )


def test_every_block_is_run_here():
    assert len(PYTHON) == 9
    assert {language for language, _ in BLOCKS} == {"python", "yaml", ""}


def test_the_loop_trains_and_exports(names, capsys):
    exec(block_with("optimizer.export("), names)
    assert names["optimizer"].steps == 3
    assert (Path("out/model") / "SHA256SUMS").exists()
    assert "arrives at step" in capsys.readouterr().out


def test_a_training_resumes_from_a_checkpoint_of_its_own(names):
    before, after = block_with("checkpoint.pt").split("# in a new process")
    model, optimizer = names["model"], wrapped(names)
    model(**names["loader"][0]).loss.backward()
    optimizer.step()
    exec(before, names | {"optimizer": optimizer})
    resumed = names | {"model": llama()}
    resumed["optimizer"] = wrapped(resumed)
    exec("#" + after, resumed)
    assert resumed["optimizer"].steps == 1
    for trained, made in ((model, optimizer), (resumed["model"], resumed["optimizer"])):
        made.zero_grad()
        trained(**names["loader"][1]).loss.backward()
        made.step()
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed["model"].state_dict().items())


def test_a_half_precision_model_trains_with_moqs_adamw(names):
    exec(block_with("moq.AdamW("), names)
    model, optimizer = names["model"], names["optimizer"]
    before = model.lm_head.weight.detach().clone()
    model(**names["loader"][0]).loss.backward()
    optimizer.step()
    assert optimizer.steps == 1
    assert before.dtype == torch.bfloat16
    assert not torch.equal(model.lm_head.weight, before)


def test_the_configuration_means_what_the_page_says(names):
    config = moq.MoQConfig.load("moq.yaml")
    quantized = wrapped(names).num_bits
    assert not any("layers.0." in name or "lm_head" in name for name in quantized)
    assert config.rules[0].group_size == 64
    assert config.rules[1].schedule == moq.Timing(finish_at=0.9)


def test_activations_are_placed_by_a_rule(names):
    Path("moq.yaml").write_text(ACTIVATIONS)
    optimizer = wrapped(names)
    placed = [name for name, m in names["model"].named_modules() if hasattr(m, "input_quantizer")]
    assert len(placed) == 9
    assert all(".mlp." in name for name in placed)
    exec(block_with("optimizer.export("), names | {"model": llama()})
    assert optimizer.config.observer == moq.config.ObserverConfig(momentum=0.9, freeze_at=0.5)


def test_the_command_shows_and_draws_the_schedule(names, capsys):
    words = shlex.split(PLAN.splitlines()[0], comments=True)
    assert words[0] == "moq"
    assert main(words[1:]) == 0
    assert "of 10000 steps" in capsys.readouterr().out
    assert Path("plan.svg").read_text().startswith("<?xml")


def test_a_schedule_prints_and_draws_itself(names, capsys):
    exec(block_with("print(optimizer.schedule())"), names | {"optimizer": wrapped(names)})
    assert "First step at each bit width, of 100 steps" in capsys.readouterr().out
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


def test_target_bits_are_chosen_in_a_training_and_from_its_run(names, capsys):
    pytest.importorskip("matplotlib")
    optimizer = names["optimizer"] = wrapped(names, 10_000)  # long enough for a probe's max_cost
    exec(block_with("choose_target_bits("), names)
    chosen = str(names["choice"])
    assert chosen in capsys.readouterr().out
    assert names["choice"].mean_bits <= 6
    Path("front.svg").unlink()
    optimizer.save("out/run")
    words = shlex.split(BUDGET, comments=True)
    assert words[0] == "moq"
    assert main(words[1:]) == 0
    assert chosen in capsys.readouterr().out
    assert Path("front.svg").read_text().startswith("<?xml")


def test_loggers_are_told(names):
    exec(block_with("TensorBoardLogger"), names)
    model, optimizer = names["model"], names["optimizer"]
    for batch in names["loader"]:
        model(**batch).loss.backward()
        optimizer.step()
    optimizer.flush_logs()
    assert "1,moq/bits," in Path("runs/1/moq.csv").read_text()
    assert list(Path("runs/1").glob("events.*"))


def test_densities_are_recorded_in_a_run_and_the_report_shows_it(names):
    Path("moq.yaml").write_text("target_bits: 4\n")  # rules split layers into blocks of other names
    exec(block_with("TensorBoardLogger"), names)
    model, optimizer = names["model"], names["optimizer"]
    optimizer.probe(lambda batch: model(**batch).loss, names["probe_batches"])
    for batch in names["loader"]:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.log({"loss": loss, "accuracy": 0.78})
    optimizer.save("out/run")
    exec(block_with("moq.spectral_density("), names)
    assert names["density"].block == "model.layers.0"
    words = shlex.split(REPORT, comments=True)
    assert words[0] == "moq"
    assert main(words[1:]) == 0
    page = Path("report.html").read_text()
    assert "moq report: run" in page
    assert 'class="missing"' not in page


def test_a_model_is_measured_before_it_is_sharded(names, tmp_path):
    from torch.distributed.fsdp import fully_shard

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        names["fully_shard"] = fully_shard
        exec(block_with("fully_shard(model)"), names)
        assert names["optimizer"].schedule().measured
    finally:
        torch.distributed.destroy_process_group()


def test_trainer_takes_it(names):
    pytest.importorskip("accelerate")
    names["Trainer"] = transformers.Trainer
    names["dataset"] = [{k: v[0] for k, v in batch.items()} for batch in names["loader"]]
    names["args"] = transformers.TrainingArguments(
        output_dir="run", max_steps=40, report_to=[], use_cpu=True, disable_tqdm=True
    )
    exec(block_with("attach(trainer"), names)
    assert names["optimizer"].steps == 40
    assert (Path("out/model") / "SHA256SUMS").exists()
