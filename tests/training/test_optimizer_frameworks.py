"""The wrapper inside accelerate and transformers' Trainer."""

import math

import pytest
import torch
from tiny_decoder import (
    FALLING_STOCHASTIC,
    CausalDecoder,
    assert_same,
    assert_simulated,
    batch,
    masters,
    weights,
    wrap,
)

from moq import MoQOptimizer

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def causal_decoder(dtype=torch.float32) -> CausalDecoder:
    torch.manual_seed(0)
    return CausalDecoder().to(dtype)


DATA = [{"input_ids": row, "labels": row} for step in range(4) for row in batch(step)]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_it_and_trains_as_without(decoder, precision):
    from accelerate import Accelerator

    plain, model = decoder(), decoder()
    reference = wrap(plain, FALLING_STOCHASTIC)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, wrap(model, FALLING_STOCHASTIC))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.optimizer, MoQOptimizer)
    for step in range(4):
        tokens = batch(step)
        for half in tokens.chunk(2):
            with accelerator.accumulate(prepared):
                logits = prepared(half[:, :-1]).float()
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), half[:, 1:].flatten()
                )
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = plain(half[:, :-1]).float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), half[:, 1:].flatten())
            (loss / 2).backward()
        reference.step()
        reference.zero_grad()
    assert optimizer.optimizer.steps == reference.steps == 4
    assert_same(weights(model), weights(plain))


def test_accelerate_saves_and_loads_its_state(decoder, tmp_path):
    from accelerate import Accelerator

    def prepared():
        accelerator = Accelerator(cpu=True)
        model = decoder()
        return accelerator, *accelerator.prepare(model, wrap(model, FALLING_STOCHASTIC))

    def train(accelerator, model, optimizer, steps):
        for step in steps:
            logits = model(batch(step)[:, :-1])
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch(step)[:, 1:].flatten()
            )
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    accelerator, model, optimizer = prepared()
    train(accelerator, model, optimizer, range(3))
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, range(3, 6))

    other_accelerator, other, resumed = prepared()
    other_accelerator.load_state(tmp_path)
    assert resumed.optimizer.steps == 3
    train(other_accelerator, other, resumed, range(3, 6))
    assert_same(weights(other), weights(model))
    assert_same(masters(resumed.optimizer), masters(optimizer.optimizer))


def trainer_of(model, directory, make=torch.optim.AdamW, **arguments):
    """A Trainer whose optimizer and scheduler are given; saves at every second step."""
    optimizer = MoQOptimizer(
        make(model.parameters(), lr=1e-2), model, FALLING_STOCHASTIC, total_steps=8, verbose=False
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    options = transformers.TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=2,
        max_steps=8,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **arguments,
    )
    return transformers.Trainer(
        model, options, train_dataset=DATA, optimizers=(optimizer, scheduler)
    ), optimizer


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("arguments", [{}, {"bf16": True, "gradient_accumulation_steps": 2}])
def test_trainer_saves_and_resumes_bit_for_bit(tmp_path, arguments):
    whole = causal_decoder()
    trainer, optimizer = trainer_of(whole, tmp_path / "whole", **arguments)
    trainer.train()
    assert optimizer.steps == 8
    assert set(optimizer.num_bits.values()) == {4}
    assert_simulated(optimizer)
    assert all(math.isfinite(loss) for loss in losses_of(trainer))

    model = causal_decoder()
    resumed_trainer, resumed = trainer_of(model, tmp_path / "other", **arguments)
    resumed_trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.steps == 8
    assert losses_of(resumed_trainer) == losses_of(trainer)
    assert_same(weights(model), weights(whole))
    assert_same(masters(resumed), masters(optimizer))


def test_trainer_clips_gradients_and_schedules_the_learning_rate(tmp_path):
    """With SGD a step is the rate times the gradient, so clipping bounds how far masters move."""
    moved = {}
    for norm in (1e-3, 1e3):
        model = causal_decoder()
        trainer, optimizer = trainer_of(model, tmp_path, make=torch.optim.SGD, max_grad_norm=norm)
        before = {name: value.detach().clone() for name, value in masters(optimizer).items()}
        trainer.train()
        assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - 8 / 10))
        change = [(value - before[name]).norm() for name, value in masters(optimizer).items()]
        moved[norm] = torch.stack(change).norm().item()
    path = sum(1e-2 * (1 - step / 10) for step in range(8))
    assert 0 < moved[1e-3] <= 1.01 * path * 1e-3
    assert moved[1e3] > 10 * moved[1e-3]


def test_resuming_trainer_without_the_optimizers_file_warns_what_is_lost(tmp_path):
    trainer, _ = trainer_of(causal_decoder(), tmp_path / "whole")
    trainer.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    (checkpoint / "optimizer.pt").unlink()
    resumed_trainer, _ = trainer_of(causal_decoder(), tmp_path / "other")
    with pytest.warns(UserWarning, match="full-precision masters"):
        resumed_trainer.train(resume_from_checkpoint=str(checkpoint))
