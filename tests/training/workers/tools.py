"""The checks of test_integrations_ranks.py, as one rank of a torchrun job makes them.

As a program: DIRECTORY; writes results-RANK.json, {check: error or ""}, into the directory.
"""

import contextlib
import faulthandler
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_decoder import CausalDecoder, Decoder, Recorder, batch, loss_of, masters, wrap

from moq import MoQOptimizer
from moq.integrations import Training, unwrap_optimizer

DIRECTORY = Path(sys.argv[1])
FALLING = {
    "start_bits": 9,
    "target_bits": 4,
    "rounding": "stochastic",
    "schedule": {"finish_at": 0.8},
}


def require_equal_on_all_ranks(optimizer: MoQOptimizer) -> None:
    for name, master in masters(optimizer).items():
        for value in (master.detach(), optimizer.model.get_parameter(name).detach()):
            copies = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(copies, value.contiguous())
            assert all(torch.equal(copy, value) for copy in copies), name


def make_trainer(directory: Path, model: torch.nn.Module | None = None):
    from test_integrations import DATA, training_arguments
    from transformers import Trainer

    from moq.integrations.transformers import num_training_steps

    options = {"max_steps": -1, "num_train_epochs": 2, "ddp_backend": "gloo"}
    arguments = training_arguments(directory, **options, save_strategy="no")
    torch.manual_seed(0)
    model = model or CausalDecoder()
    recorder = Recorder()
    steps = num_training_steps(arguments, DATA)
    assert steps == 2 * 16 // (2 * 2)
    optimizer = wrap(model, FALLING, steps, loggers=recorder, log_every=1)
    trainer = Trainer(model, arguments, train_dataset=DATA, optimizers=(optimizer, None))
    return trainer, optimizer, recorder


def check_trainer() -> None:
    from moq.integrations.transformers import attach

    trainer, optimizer, recorder = make_trainer(DIRECTORY)
    attach(trainer, export=DIRECTORY / "trainer")
    trainer.train()
    assert dist.get_world_size() == 2
    assert optimizer.steps == optimizer.total_steps == trainer.state.global_step
    assert list(recorder.steps) == (list(range(1, 9)) if dist.get_rank() == 0 else [])
    require_equal_on_all_ranks(optimizer)
    assert (DIRECTORY / "trainer" / "SHA256SUMS").exists()


def check_models_that_differ_between_ranks_are_refused() -> None:
    from moq.integrations.transformers import attach

    torch.manual_seed(dist.get_rank())
    trainer, _, _ = make_trainer(DIRECTORY, CausalDecoder())
    attach(trainer)
    try:
        trainer.train()
    except RuntimeError as error:
        assert "the ranks must begin with the same weights" in str(error)
    else:
        raise AssertionError("ranks with different masters were accepted")


def check_accelerate() -> None:
    from accelerate import Accelerator

    from moq.integrations.accelerate import num_training_steps

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(torch.cat([batch(step) for step in range(6)]), batch_size=4)
    steps = num_training_steps(accelerator, loader, epochs=2)
    torch.manual_seed(0)
    model = Decoder()
    recorder = Recorder()
    optimizer = wrap(model, FALLING, steps, loggers=recorder, log_every=1)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(2):
        for tokens in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, tokens))
                prepared.step()
                prepared.zero_grad()
    assert optimizer.steps == steps == 4
    assert bool(recorder.steps) == accelerator.is_main_process
    require_equal_on_all_ranks(unwrap_optimizer(prepared))


def fit_lightning(config: dict, make=lambda module: module, **options):
    import lightning
    from test_integrations import BATCHES, Module

    from moq.integrations.lightning import MoQCallback

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=DIRECTORY,
        callbacks=[MoQCallback(**options)],
    )
    module = make(Module)(config=config)
    # Each rank has its own batches.
    own = [batch(step + 100 * dist.get_rank()) for step in range(len(BATCHES))]
    trainer.fit(module, DataLoader(own, batch_size=None))
    optimizer = unwrap_optimizer(trainer.optimizers[0])
    assert optimizer.steps == optimizer.total_steps == len(BATCHES)
    require_equal_on_all_ranks(optimizer)
    return optimizer


def without_lightning() -> bool:
    try:
        import lightning  # noqa: F401
    except ImportError:
        return True
    return False


def check_lightning() -> None:
    if without_lightning():
        return
    fit_lightning(FALLING, export=DIRECTORY / "lightning")
    assert (DIRECTORY / "lightning" / "SHA256SUMS").exists()


def check_lightning_with_weights_simulated_in_the_forward_pass() -> None:
    if not without_lightning():
        fit_lightning(FALLING | {"simulate": "autograd"})


def check_lightning_with_learned_scales() -> None:
    if without_lightning():
        return
    config = {key: value for key, value in FALLING.items() if key != "rounding"}
    config |= {"simulate": "autograd", "scale": "learned"}
    try:
        fit_lightning(config)
    except ValueError as error:
        assert "make MoQOptimizer in configure_model" in str(error)
    else:
        raise AssertionError("scales that DistributedDataParallel does not know were accepted")

    def early(module_class: type) -> type:
        class Early(module_class):
            def configure_model(self):
                self.total_steps = 8
                self.made = super().configure_optimizers()

            def configure_optimizers(self):
                return self.made

        return Early

    optimizer = fit_lightning(config, early)
    fingerprints = [""] * dist.get_world_size()
    dist.all_gather_object(fingerprints, optimizer.fingerprint())
    assert fingerprints[0] == fingerprints[1]


def check_ranks_that_trained_apart_do_not_export() -> None:
    for config in (FALLING, {"simulate": "autograd", "scale": "learned"}):
        torch.manual_seed(0)
        model = Decoder()
        optimizer = wrap(model, config, 4)
        training = Training(optimizer, "test", export=DIRECTORY / "apart")
        training.begin(0, 4)
        loss_of(model, batch(dist.get_rank())).backward()
        for parameter in model.parameters():
            if config is not FALLING and parameter.dim() > 1:
                parameter.grad = None  # scales alone differ
        optimizer.step()
        try:
            training.end()
        except RuntimeError as error:
            assert "the ranks must end with the same weights" in str(error)
        else:
            raise AssertionError("one rank's weights were exported")
    assert not (DIRECTORY / "apart").exists()


def main() -> None:
    """Makes every check, in one process group that the tools share.

    A rank that fails alone leaves at once, and the other one fails with it instead of waiting: what
    follows the first failure is not made.
    """
    faulthandler.dump_traceback_later(240, exit=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    checks = {name: f for name, f in sorted(globals().items()) if name.startswith("check_")}
    outcomes = dict.fromkeys(checks, "not made: one before it failed")
    for name, check in checks.items():
        try:
            check()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
            break
    rank = dist.get_rank()
    (DIRECTORY / f"results-{rank}.json").write_text(json.dumps(outcomes))
    if not any(outcomes.values()):
        with contextlib.suppress(RuntimeError):  # the other rank has failed and left
            dist.barrier()
    # Not through the interpreter's exit: under load torch's own threads may outlive what they use.
    os._exit(0)


if __name__ == "__main__":
    main()
