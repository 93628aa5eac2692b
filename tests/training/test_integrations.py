"""Trainer, Lightning and accelerate with what moq.integrations adds to them."""

import math
import warnings

import pytest
import torch
from tiny_decoder import (
    FALLING_STOCHASTIC,
    CausalDecoder,
    Decoder,
    assert_same,
    batch,
    loss_of,
    masters,
    train_step,
    weights,
    wrap,
)
from torch import nn
from torch.utils.data import DataLoader

from moq import MoQOptimizer
from moq.integrations import Training, unwrap_optimizer

STEPS = 8
TOTALS = {"moq/bits", "moq/quantization_error", "moq/flips"}


# ------------------------------------------------------------------ what two tools share


def test_an_optimizer_is_found_inside_its_wrappers(decoder):
    optimizer = wrap(decoder(), FALLING_STOCHASTIC)

    class Outer:
        def __init__(self, name, inner):
            setattr(self, name, inner)

    assert unwrap_optimizer(optimizer) is optimizer
    assert unwrap_optimizer(Outer("optimizer", Outer("_optimizer", optimizer))) is optimizer


@pytest.mark.parametrize("other", [None, 3, "adamw"])
def test_what_holds_no_moq_optimizer_is_refused(other):
    with pytest.raises(TypeError, match=f"must be a MoQOptimizer.*got {type(other).__name__}"):
        unwrap_optimizer(other)
    with pytest.raises(TypeError, match="got AdamW"):
        unwrap_optimizer(torch.optim.AdamW(nn.Linear(2, 2).parameters()))


def test_only_the_models_own_scalars_are_taken_once_unless_layers_are_wanted(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING_STOCHASTIC, log_every=1)
    few, all_of_them = Training(optimizer, "test"), Training(optimizer, "test", layers=True)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    step, scalars = few.take()
    assert (step, scalars.keys()) == (1, TOTALS)
    assert few.take() is None
    assert all_of_them.take()[1].keys() > TOTALS


def test_a_training_that_ends_early_says_what_has_not_arrived(decoder):
    optimizer = wrap(decoder(), FALLING_STOCHASTIC)
    with pytest.warns(UserWarning, match="ended after 0 of 12 steps, and layers.0, layers.1 had"):
        Training(optimizer, "test").end()


@pytest.mark.parametrize(
    ("made", "steps", "planned", "message"),
    [
        (0, 0, 12, None),
        (0, 0, math.inf, None),
        (5, 5, 12, None),
        (5, 3, 12, None),  # two were lost to overflows
        (0, 0, 13, "must be the 13 optimizer steps that test will make, got 12"),
        (1, 0, 12, "test resumes at step 1, and the optimizer's state was not in its checkpoint"),
        (4, 5, 12, "test begins at step 4, and the optimizer has made 5 already"),
        (0, 1, 12, "test begins at step 0, and the optimizer has made 1 already"),
    ],
)
def test_a_training_begins_where_its_optimizer_is(decoder, made, steps, planned, message):
    model = decoder()
    optimizer = wrap(model, FALLING_STOCHASTIC)
    for step in range(steps):
        train_step(model, optimizer, step)
    training = Training(optimizer, "test")
    if message is None:
        training.begin(made, planned)
    else:
        with pytest.raises((ValueError, RuntimeError), match=message):
            training.begin(made, planned)


@pytest.mark.parametrize(
    ("total", "steps", "warns"), [(12, 11, False), (4, 4, False), (4, 3, True)]
)
def test_a_training_that_ends_is_warned_of_only_if_steps_would_have_lowered_widths(
    decoder, total, steps, warns
):
    """Ended early with every width reached; complete without that, which `allow` accepted."""
    section = {"period": 2, "growth": 1.0, "on_unfinished": "allow"}
    config = FALLING_STOCHASTIC | {"schedule": section, "sensitivity": {"rule": "none"}}
    model = decoder()
    optimizer = wrap(model, config, total)
    for step in range(steps):
        train_step(model, optimizer, step)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        Training(optimizer, "test").end()
    assert ["had not reached the target width" in str(w.message) for w in found] == [True] * warns


# ------------------------------------------------------------------ transformers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


DATA = [{"input_ids": row, "labels": row} for step in range(4) for row in batch(step)]


class Reports(transformers.TrainerCallback):
    """Sees what a reporter to TensorBoard or Weights & Biases sees."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def training_arguments(directory, **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return transformers.TrainingArguments(output_dir=str(directory), **(defaults | options))


def make_trainer(directory, total_steps=STEPS, callbacks=(), **options):
    torch.manual_seed(0)
    model = CausalDecoder()
    optimizer = wrap(model, FALLING_STOCHASTIC, total_steps, log_every=1)
    return transformers.Trainer(
        model,
        training_arguments(directory, **options),
        train_dataset=DATA,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def test_trainer_reports_the_scalars_with_its_losses(tmp_path):
    from moq.integrations.transformers import attach

    reports = Reports()
    trainer = make_trainer(tmp_path, callbacks=[reports], save_strategy="no")
    attach(trainer)
    trainer.train()
    for history in (trainer.state.log_history, reports.logs):
        losses = [entry for entry in history if "loss" in entry]
        assert len(losses) == STEPS
        assert all(entry.keys() >= TOTALS for entry in losses)
        assert [entry["moq/bits"] for entry in losses][-1] == 4
        assert not any("moq/bits/layers.0" in entry for entry in losses)


def test_trainer_reports_every_layer_when_asked(tmp_path):
    from moq.integrations.transformers import attach

    trainer = make_trainer(tmp_path, save_strategy="no", logging_steps=4)
    attach(trainer, layers=True)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["moq/bits/layers.1"] for entry in entries][-1] == 4


def test_trainer_resumes_bit_for_bit_and_exports_at_the_end(tmp_path):
    from moq.integrations.transformers import attach

    whole = make_trainer(tmp_path / "whole")
    attach(whole, export=tmp_path / "export")
    whole.train()
    assert (tmp_path / "export" / "SHA256SUMS").exists()

    resumed = make_trainer(tmp_path / "other")
    attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(weights(resumed.model), weights(whole.model))
    optimizers = [unwrap_optimizer(t.optimizer) for t in (resumed, whole)]
    assert_same(*(masters(optimizer) for optimizer in optimizers))


def test_trainer_may_be_given_the_callback_itself(tmp_path):
    from moq.integrations.transformers import MoQCallback

    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.add_callback(MoQCallback(trainer.optimizer))
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry.keys() >= TOTALS for entry in losses)


def test_a_schedule_for_other_steps_than_trainers_is_refused_before_the_first(tmp_path):
    from moq.integrations.transformers import attach

    trainer = make_trainer(tmp_path, total_steps=STEPS + 1)
    attach(trainer)
    with pytest.raises(ValueError, match="total_steps must be the 8 .* Trainer will make, got 9"):
        trainer.train()
    assert unwrap_optimizer(trainer.optimizer).steps == 0


def test_a_directory_that_cannot_be_exported_to_is_refused_before_the_first_step(tmp_path):
    from moq.integrations.transformers import attach

    trainer = make_trainer(tmp_path / "trainer", save_strategy="no")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep")
    attach(trainer, export=tmp_path / "notes")
    with pytest.raises(ValueError, match=r"expected a directory that may be replaced .* todo\.txt"):
        trainer.train()
    assert unwrap_optimizer(trainer.optimizer).steps == 0


def test_a_checkpoint_without_the_optimizers_file_is_refused(tmp_path):
    from moq.integrations.transformers import attach

    make_trainer(tmp_path / "whole").train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    (checkpoint / "optimizer.pt").unlink()
    resumed = make_trainer(tmp_path / "other")
    attach(resumed)
    with pytest.raises(RuntimeError, match="resumes at step 4.*masters and the schedule are lost"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_a_second_training_with_a_used_optimizer_is_refused(tmp_path):
    from moq.integrations.transformers import attach

    trainer = make_trainer(tmp_path, save_strategy="no")
    attach(trainer)
    trainer.train()
    with pytest.raises(RuntimeError, match="begins at step 0, and the optimizer has made 8"):
        trainer.train()


def test_checkpoints_of_weights_alone_are_warned_of(tmp_path):
    from moq.integrations.transformers import attach

    trainer = make_trainer(tmp_path, save_only_model=True)
    attach(trainer)
    with pytest.warns(
        UserWarning, match="save_only_model leaves the full-precision masters"
    ) as told:
        trainer.train()
    (about,) = (warning for warning in told if "save_only_model" in str(warning.message))
    assert about.filename == __file__


def test_a_trainer_without_a_moq_optimizer_is_refused(tmp_path):
    from moq.integrations.transformers import attach

    model = CausalDecoder()
    arguments = training_arguments(tmp_path)
    with pytest.raises(TypeError, match=r"optimizers=\(MoQOptimizer"):
        attach(transformers.Trainer(model, arguments))
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="got AdamW"):
        attach(transformers.Trainer(model, arguments, optimizers=(adamw, None)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 3},
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3},
        {
            "max_steps": -1,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "dataloader_drop_last": True,
        },
        {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 50},
    ],
)
def test_the_steps_are_known_before_trainer_is_made(tmp_path, options):
    from moq.integrations.transformers import attach, num_training_steps

    steps = num_training_steps(training_arguments(tmp_path, **options), DATA)
    config = {"schedule": {"finish_at": 1.0}}
    model = CausalDecoder()
    optimizer = wrap(model, config, steps)
    trainer = transformers.Trainer(
        model,
        training_arguments(tmp_path, **options, save_strategy="no"),
        train_dataset=DATA,
        optimizers=(optimizer, None),
    )
    attach(trainer)
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == steps == optimizer.steps


def test_the_steps_of_a_dataset_without_a_length_must_be_given(tmp_path):
    from moq.integrations.transformers import num_training_steps

    with pytest.raises(ValueError, match="max_steps must be set for a dataset without a length"):
        num_training_steps(training_arguments(tmp_path, max_steps=-1), iter(DATA))


# ------------------------------------------------------------------ accelerate


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accelerate_makes_the_steps_that_were_counted(decoder, fresh_accelerator, accumulation):
    from accelerate import Accelerator

    from moq.integrations.accelerate import num_training_steps

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    loader = DataLoader(torch.cat([batch(step) for step in range(5)]), batch_size=4)
    steps = num_training_steps(accelerator, loader, epochs=2)
    model = decoder()
    model, prepared, loader = accelerator.prepare(
        model, wrap(model, FALLING_STOCHASTIC, steps), loader
    )
    for _ in range(2):
        for tokens in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, tokens))
                prepared.step()
                prepared.zero_grad()
    optimizer = unwrap_optimizer(prepared)
    assert optimizer.steps == steps == 2 * math.ceil(5 / accumulation)
    assert set(optimizer.num_bits.values()) == {4}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("split", [False, True], ids=["batches", "split batches"])
def test_the_steps_of_accelerate_are_those_of_one_process(processes, drop_last, split):
    from types import SimpleNamespace

    from accelerate.data_loader import BatchSamplerShard

    from moq.integrations.accelerate import num_training_steps

    accelerator = SimpleNamespace(
        split_batches=split, num_processes=processes, gradient_accumulation_steps=1
    )
    for rows in range(13, 29):
        loader = DataLoader(list(range(rows)), batch_size=12 if split else 4, drop_last=drop_last)
        steps = num_training_steps(accelerator, loader)
        for process in range(processes):
            shard = BatchSamplerShard(loader.batch_sampler, processes, process, split)
            assert steps == len(shard) == len(list(shard))


def test_nothing_to_train_on_is_refused(fresh_accelerator):
    from accelerate import Accelerator

    from moq.integrations.accelerate import num_training_steps

    with pytest.raises(ValueError, match="got 0 batches and 1 epochs"):
        num_training_steps(Accelerator(cpu=True), [])


# ------------------------------------------------------------------ Lightning

try:
    import lightning
except ImportError:
    lightning = None
needs_lightning = pytest.mark.skipif(lightning is None, reason="needs lightning")
LightningModule = lightning.LightningModule if lightning else nn.Module


class Module(LightningModule):
    """The decoder in the form that Lightning trains."""

    def __init__(self, total_steps=None, optimizers=1, config=FALLING_STOCHASTIC) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder()
        self.total_steps = total_steps
        self.optimizers_wanted = optimizers
        self.config = config

    def training_step(self, tokens, index):
        return loss_of(self.decoder, tokens)

    def configure_optimizers(self):
        steps = self.total_steps or self.trainer.estimated_stepping_batches
        if self.optimizers_wanted != 1:
            self.automatic_optimization = False
            halves = [self.decoder.layers[i].parameters() for i in range(2)]
            return [torch.optim.SGD(half, lr=0.1) for half in halves]
        return wrap(self, self.config, steps, log_every=1)


BATCHES = DataLoader([batch(step) for step in range(STEPS)], batch_size=None)


def fit(directory, callback, module=None, ckpt_path=None, **options):
    module = module or Module()
    defaults = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    callbacks = [callback, *options.pop("callbacks", [])]
    trainer = lightning.Trainer(
        default_root_dir=directory, callbacks=callbacks, **(defaults | options)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, BATCHES, ckpt_path=ckpt_path)
    return trainer, module


@needs_lightning
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_as_the_plain_loop(tmp_path, precision):
    from moq.integrations.lightning import MoQCallback

    trainer, module = fit(tmp_path, MoQCallback(), accumulate_grad_batches=2, precision=precision)
    reference = Module(total_steps=STEPS // 2)
    optimizer = reference.configure_optimizers()
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = loss_of(reference.decoder, batch(step)) / 2
        loss.backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert unwrap_optimizer(trainer.optimizers[0]).steps == STEPS // 2
    assert_same(weights(module), weights(reference))


@needs_lightning
def test_lightning_resumes_bit_for_bit_and_exports_at_the_end(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from moq.integrations.lightning import MoQCallback

    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1)
    whole, module = fit(
        tmp_path,
        MoQCallback(export=tmp_path / "export"),
        callbacks=[saver],
        enable_checkpointing=True,
        max_epochs=2,
    )
    assert (tmp_path / "export" / "SHA256SUMS").exists()
    (saved,) = (tmp_path / "saved").glob(f"*step={STEPS}.ckpt")
    other = Module()
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    resumed, _ = fit(tmp_path, MoQCallback(), other, ckpt_path=str(saved), max_epochs=2)
    assert_same(weights(other), weights(module))
    optimizers = [unwrap_optimizer(t.optimizers[0]) for t in (resumed, whole)]
    assert [optimizer.steps for optimizer in optimizers] == [2 * STEPS, 2 * STEPS]
    assert_same(*(masters(optimizer) for optimizer in optimizers))


@needs_lightning
def test_lightnings_loggers_get_the_scalars(tmp_path):
    import csv

    from lightning.pytorch.loggers import CSVLogger

    from moq.integrations.lightning import MoQCallback

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(tmp_path, MoQCallback(layers=True), logger=logger)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["moq/bits"]]
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert float(rows[-1]["moq/bits"]) == float(rows[-1]["moq/bits/decoder.layers.1"]) == 4


@needs_lightning
def test_a_schedule_for_other_steps_than_lightnings_is_refused(tmp_path):
    from moq.integrations.lightning import MoQCallback

    with pytest.raises(ValueError, match="must be the 8 .* Lightning will make, got 20"):
        fit(tmp_path, MoQCallback(), Module(total_steps=20))


@needs_lightning
def test_several_optimizers_are_refused(tmp_path):
    from moq.integrations.lightning import MoQCallback

    with pytest.raises(ValueError, match="must configure one optimizer.*got 2"):
        fit(tmp_path, MoQCallback(), Module(optimizers=2))


@needs_lightning
def test_lightning_checkpoints_of_weights_alone_are_warned_of(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from moq.integrations.lightning import MoQCallback

    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="save_weights_only leaves the full-precision") as told:
        fit(tmp_path, MoQCallback(), callbacks=[saver], enable_checkpointing=True)
    (about,) = (warning for warning in told if "save_weights_only" in str(warning.message))
    assert about.filename == __file__


def test_the_optimizer_keeps_its_type_in_the_package():
    assert unwrap_optimizer.__module__ == "moq.integrations"
    assert issubclass(MoQOptimizer, torch.optim.Optimizer)
