"""What the README shows, run as it stands there: train, export, verify and serve a real model."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from language_modelling import perplexity, token_windows  # noqa: E402
from pretrained import load_decoder, state_of_the_union  # noqa: E402

from moq.inference import Engine  # noqa: E402

NUM_STEPS = 4
PROMPT = "My fellow Americans"


def readme_block(heading: str, number: int = 0) -> str:
    """A code block below a heading of the README."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[number]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Runs a command of this environment in a folder."""
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": scripts + os.pathsep + os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The README's training on real text, in a few steps: (folder, simulated model, tokenizer)."""
    folder = tmp_path_factory.mktemp("readme")
    model, tokenizer = load_decoder()
    windows = token_windows(tokenizer, state_of_the_union()[0], NUM_STEPS + 1, seed=0)[:, :32]
    batches = [{"input_ids": row[None], "labels": row[None]} for row in windows]
    loader, probe_batches = batches[:NUM_STEPS], batches[NUM_STEPS:]
    names = {
        "model": model,
        "tokenizer": tokenizer,
        "torch": torch,
        "loader": loader,
        "probe_batches": probe_batches,
    }
    setup, export = re.split(r"^\.\.\..*\n", readme_block("Train: one wrapper"), flags=re.MULTILINE)
    exec(setup, names)
    for batch in loader:
        model(**batch).loss.backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(export, names)
    return folder, model.eval(), tokenizer


def test_the_export_verifies(trained):
    folder, _, _ = trained
    done = run([sys.executable, "-m", "moq", "verify", "out/model"], folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_engine_has_the_simulated_models_perplexity(trained):
    folder, model, tokenizer = trained
    held_out = token_windows(tokenizer, state_of_the_union()[1], 4)
    engine = Engine.from_pretrained(folder / "out/model")
    simulated = perplexity(lambda ids: model(input_ids=ids).logits, held_out, "simulated")
    served = perplexity(engine.forward, held_out, "served")
    assert served.value == pytest.approx(simulated.value, rel=1e-3)
    with torch.no_grad():
        expected = model(input_ids=held_out[:1]).logits
    error = (engine.forward(held_out[:1]) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


def test_torchrun_serves_the_simulated_models_greedy_text(trained):
    folder, model, tokenizer = trained
    command = shlex.split(readme_block("Serve: one line"))
    two_ranks = run([*command, "--max-new-tokens", "48"], folder)
    assert two_ranks.returncode == 0, two_ranks.stderr
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0]
    new_ids = ids[inputs["input_ids"].shape[1] :]
    assert two_ranks.stdout.strip() == tokenizer.decode(new_ids, skip_special_tokens=True).strip()


def test_python_serves_the_same_text_as_torchrun(trained, monkeypatch, capsys):
    folder, _, _ = trained
    monkeypatch.chdir(folder)
    exec(readme_block("Serve: one line", number=1), {})
    printed = capsys.readouterr().out
    command = [*shlex.split(readme_block("Serve: one line")), "--max-new-tokens", "64"]
    assert printed.strip() == run(command, folder).stdout.strip()


def test_the_encoder_example_serves_what_it_trained(tmp_path):
    example = ROOT / "examples" / "classify_text.py"
    lengths = ["--warmup-steps", "6", "--steps", "5", "--held-out", "64"]
    done = run([sys.executable, str(example), *lengths, "--output", "out"], tmp_path)
    # The example fails by itself where a prediction of the engine differs.
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = json.loads((tmp_path / "out-accuracy.json").read_text())
    assert accuracy["held_out"] == 64
    assert accuracy["MoQ INT8, engine"] == accuracy["MoQ INT8"] > 2 / 26
