"""A run that is killed at any step and resumed is, bit for bit, the run that nobody disturbed."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_decoder import Decoder, assert_same, batch, loss_of, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from moq import MoQOptimizer

STEPS = 24
WORKER = Path(__file__).parent / "workers" / "killed.py"

# Everything that has a state: stochastic draws, blends, groups, several schedules, sensitivities,
# moving averages of activations.
CONFIG = {
    "start_bits": 10,
    "target_bits": 4,
    "rounding": "stochastic",
    "seed": 7,
    "schedule": {"finish_at": 0.8},
    "rules": [
        {"match": "*.down_proj", "mode": "asymmetric", "blend_steps": 3, "activations": "static"},
        {"match": r"re:.*\.(gate|up)_proj", "activations": "static_asymmetric"},
        {
            "match": "layers.1.down_proj",
            "granularity": "per_group",
            "group_size": 4,
            "activations": "dynamic",
            "schedule": {"table": {0: 10, 3: 8, 15: 4}},
        },
    ],
}

AUTOGRAD = CONFIG | {"simulate": "autograd"}
# Learned scales are symmetric and have no gradient through draws.
LEARNED = AUTOGRAD | {
    "scale": "learned",
    "rounding": "nearest",
    "rules": [
        {key: value for key, value in rule.items() if key != "mode"} for rule in CONFIG["rules"]
    ],
}


class Dropping(Decoder):
    """The decoder with dropout, so that torch's random state matters too."""

    def forward(self, tokens):
        x = nn.functional.dropout(self.embedding(tokens), 0.1, training=self.training)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


# name -> (dtype of the parameters, dtype of autocast, whether gradients are scaled, configuration)
KINDS = {
    "float32": (torch.float32, None, False, CONFIG),
    "bfloat16": (torch.bfloat16, None, False, CONFIG),
    "float16": (torch.float16, None, True, CONFIG),
    "bfloat16 autocast": (torch.float32, torch.bfloat16, False, CONFIG),
    "float16 autocast": (torch.float32, torch.float16, True, CONFIG),
    "bfloat16 masters": (torch.bfloat16, None, False, CONFIG | {"master_dtype": "parameter"}),
    "float16 masters": (torch.float16, None, True, CONFIG | {"master_dtype": "parameter"}),
    "autograd": (torch.float32, None, False, AUTOGRAD),
    "autograd, float16 autocast": (torch.float32, torch.float16, True, AUTOGRAD),
    "learned": (torch.float32, None, False, LEARNED),
    "learned, bfloat16": (
        torch.bfloat16, None, False, LEARNED | {"master_dtype": "parameter"}
    ),
}  # fmt: skip


@dataclass
class Run:
    """A training with all that a user keeps: model, optimizer, scheduler, scaler, random state."""

    kind: str
    device: str = "cpu"
    seed: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        dtype, self.autocast, scaled, config = KINDS[self.kind]
        torch.manual_seed(self.seed)
        self.model = Dropping().to(self.device, dtype)
        if self.seed:
            for p in self.model.parameters():
                nn.init.normal_(p)
        # Only a fused optimizer takes scaled float16 gradients.
        fused = dtype == torch.float16
        adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-4, fused=fused)
        self.clips = not fused
        self.optimizer = MoQOptimizer(adamw, self.model, config, total_steps=STEPS, verbose=False)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        # So large a scale that the first steps overflow and are skipped.
        self.scaler = torch.amp.GradScaler(self.device, init_scale=2.0**20, enabled=scaled)
        torch.manual_seed(11)

    def train(self, steps: range) -> None:
        for step in steps:
            if step == 6:
                self.optimizer._masters.trainer.set_sensitivities(
                    [0.1 * block for block in range(self.optimizer.schedule().num_blocks)]
                )
            with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
                loss = loss_of(self.model, batch(step))
            self.scaler.scale(loss).backward()
            if self.clips:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a skipped first step
                self.scheduler.step()
            self.losses.append(loss.item())

    def _device_random(self) -> torch.Generator:
        cuda = self.device == "cuda"
        return torch.cuda.default_generators[0] if cuda else torch.default_generator

    def rest(self) -> dict:
        return {
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_on_device": self._device_random().get_state(),
            "losses": list(self.losses),
        }

    def load_rest(self, saved: dict) -> None:
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])
        self._device_random().set_state(saved["random_on_device"])
        self.losses = list(saved["losses"])


def save_file(run: Run, directory: Path) -> Callable[[Run], None]:
    """Through torch.save, as trainers save; returns what loads it into another run."""
    file = io.BytesIO()
    states = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(states | {"rest": run.rest()}, file)

    def load(other: Run) -> None:
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other.model.load_state_dict(saved["model"])
        other.optimizer.load_state_dict(saved["optimizer"])
        other.load_rest(saved["rest"])

    return load


def save_distributed(run: Run, directory: Path) -> Callable[[Run], None]:
    """Through torch.distributed.checkpoint; returns what loads it into another run."""
    states = get_state_dict(run.model, run.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=directory)
    rest = run.rest()

    def load(other: Run) -> None:
        own = get_state_dict(other.model, other.optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load({"model": own[0], "optimizer": own[1]}, checkpoint_id=directory)
        set_state_dict(
            other.model, other.optimizer, model_state_dict=own[0], optim_state_dict=own[1]
        )
        other.load_rest(rest)

    return load


def inner_state(optimizer: MoQOptimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state
    return {
        f"{name} {key}": value.detach().clone()
        for name, p in optimizer.model.named_parameters()
        for key, value in state[p].items()
        if isinstance(value, torch.Tensor)
    }


def require_equal(actual: Run, expected: Run) -> None:
    assert actual.losses == expected.losses
    assert actual.optimizer.steps == expected.optimizer.steps
    assert_same(weights(actual.model), weights(expected.model))
    assert_same(inner_state(actual.optimizer), inner_state(expected.optimizer))
    assert actual.optimizer.num_bits == expected.optimizer.num_bits
    assert actual.optimizer._record().activations == expected.optimizer._record().activations
    assert actual.optimizer.schedule().state_dict() == expected.optimizer.schedule().state_dict()


def train_and_resume(kind: str, save: Callable, directory: Path, points: int, device: str) -> None:
    at = set(random.Random(f"{kind} {save.__name__}").sample(range(STEPS + 1), points))
    whole = Run(kind, device)
    saved = {}
    for step in range(STEPS + 1):
        if step in at:
            saved[step] = save(whole, directory / str(step))
        if step < STEPS:
            whole.train(range(step, step + 1))
    # With a scaler some steps were skipped: the state must cover these too.
    assert (whole.optimizer.steps < STEPS) == KINDS[kind][2]
    assert set(whole.optimizer.num_bits.values()) == {4}

    untouched = Run(kind, device)
    untouched.train(range(STEPS))
    require_equal(untouched, whole)  # saving disturbs nothing

    for step, load in saved.items():
        resumed = Run(kind, device, seed=99)
        load(resumed)
        resumed.train(range(step, STEPS))
        require_equal(resumed, whole)


@pytest.mark.parametrize("save", [save_file, save_distributed])
@pytest.mark.parametrize("kind", [kind for kind, of in KINDS.items() if of[3] is CONFIG])
def test_a_run_resumed_at_any_of_20_random_steps_is_the_uninterrupted_one(kind, save, tmp_path):
    train_and_resume(kind, save, tmp_path, 20, "cpu")


@pytest.mark.parametrize("save", [save_file, save_distributed])
@pytest.mark.parametrize("kind", [kind for kind, of in KINDS.items() if of[3] is not CONFIG])
def test_a_run_of_another_form_is_resumed_alike(kind, save, tmp_path):
    train_and_resume(kind, save, tmp_path, 4, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "float16 autocast", "autograd", "learned"])
def test_a_run_resumed_on_a_gpu_is_the_uninterrupted_one(kind, tmp_path, gpu):
    train_and_resume(kind, save_file, tmp_path, 6, gpu)


def test_a_process_killed_again_and_again_ends_where_an_undisturbed_one_does(tmp_path):
    """Each process goes on from the newest complete checkpoint; each is killed past that one."""

    def start(directory: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(WORKER), str(directory)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def time_of(checkpoint: Path) -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    rng = random.Random(5)
    killed = tmp_path / "killed"
    killed.mkdir()
    checkpoint = killed / "checkpoint.pt"
    for _ in range(3):
        before = time_of(checkpoint)
        process = start(killed)
        # Its first line says that it trains; then it saves at least once and dies wherever it is.
        assert process.stdout.readline() == "training\n", process.communicate()[1][-3000:]
        deadline = time.monotonic() + 120
        while time_of(checkpoint) == before and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.03))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    saved_at = torch.load(checkpoint, weights_only=True)["step"]
    assert saved_at >= 3  # each of the three has trained
    whole = tmp_path / "whole"
    whole.mkdir()
    for directory in (killed, whole):
        output, errors = start(directory).communicate(timeout=300)
        assert "done" in output, errors[-3000:]
    digests = [json.loads((d / "result.json").read_text()) for d in (killed, whole)]
    assert digests[0]["final"] == digests[1]["final"]
    assert [digest["resumed_at"] for digest in digests] == [saved_at, 0]
