"""MoQ in Lightning: MiniLM-L6 learns the topics of WordNet glosses, 16 -> 8 bits.

The module configures a MoQOptimizer as any other; the callback checks that both mean the same
steps, gives the optimizer's scalars to Lightning's loggers (here a CSV file), and exports.

    python examples/with_lightning.py                 # about a minute on 2 cores
"""

import lightning
import torch
from glosses import CONFIG, Batch, check_export, load_task, parse_arguments
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import moq
from moq.integrations.lightning import MoQCallback


class TopicClassifier(lightning.LightningModule):
    """A transformers model with a loss of its own, in the form that Lightning trains."""

    def __init__(self, model: PreTrainedModel, learning_rate: float) -> None:
        """Keeps the model."""
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        """The loss of one batch."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> moq.MoQOptimizer:
        """An AdamW inside a MoQOptimizer, over the transformers model, which it can export."""
        return moq.MoQOptimizer(
            torch.optim.AdamW(self.parameters(), lr=self.learning_rate),
            self.model,
            CONFIG,
            total_steps=int(self.trainer.estimated_stepping_batches),
        )


def main() -> None:
    """Trains, exports, compares."""
    args = parse_arguments(__doc__, "out/with-lightning")
    task = load_task(args)
    run = args.output.with_name(args.output.name + "-run")
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(run),
        log_every_n_steps=10,
        default_root_dir=run,
        enable_model_summary=False,
        callbacks=[MoQCallback(export=args.output, tokenizer=task.tokenizer)],
    )
    # The batches are made already; batch_size=None hands them on as they are.
    loader = DataLoader(task.batches, batch_size=None, shuffle=False)
    trainer.fit(TopicClassifier(task.model, args.learning_rate), loader)
    check_export(task, args.output)


if __name__ == "__main__":
    main()
