"""What the examples of the integrations share: a model that names the topic of a WordNet gloss."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from classify_text import BATCH_SIZE, Batch, engine_logits, make_batches, predict
from pretrained import load_encoder, wordnet_glosses
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moq.inference import Engine

#: 16 -> 8 bits, every layer at its target by 60 % of the steps.
CONFIG = {"start_bits": 16, "target_bits": 8, "schedule": {"finish_at": 0.6}}


@dataclass(frozen=True)
class Task:
    """MiniLM-L6 and glosses of 26 topics.

    Attributes:
        model: With a new head of 26 classes.
        tokenizer: The model's.
        batches: For training, one for each step, padded and with labels.
        held_out: For measuring.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batches: list[Batch]
    held_out: list[Batch]


def parse_arguments(description: str | None, output: str) -> argparse.Namespace:
    """Reads the command line of an example."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path(output), help="checkpoint directory to write")
    add("--steps", type=int, default=60, help=f"optimizer steps of {BATCH_SIZE} glosses")
    add("--held-out", type=int, default=320, help="number of held-out glosses")
    add("--learning-rate", type=float, default=2e-4)
    add("--seed", type=int, default=0, help="shuffles the glosses")
    return parser.parse_args()


def load_task(args: argparse.Namespace) -> Task:
    """Loads the model and as many glosses as the steps need."""
    torch.manual_seed(args.seed)
    data = wordnet_glosses()
    model, tokenizer = load_encoder(data.num_classes)
    model.train()
    shuffle = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(data.texts), generator=shuffle).tolist()
    held_out, rows = rows[: args.held_out], rows[args.held_out :]
    return Task(
        model=model,
        tokenizer=tokenizer,
        batches=make_batches(tokenizer, data, rows[: args.steps * BATCH_SIZE]),
        held_out=make_batches(tokenizer, data, held_out),
    )


def check_export(task: Task, directory: Path) -> None:
    """Prints the accuracy of the model and whether the engine predicts the same from its export.

    Raises:
        SystemExit: if a prediction differs.
    """
    task.model.eval()
    simulated = predict(lambda batch: task.model(**batch).logits, task.held_out, "simulated")
    engine = Engine.from_pretrained(directory)
    served = predict(lambda batch: engine_logits(engine, batch), task.held_out, "engine")
    labels = torch.cat([batch["labels"] for batch in task.held_out])
    accuracy = (served == labels).double().mean().item()
    same = int((served == simulated).sum())
    print(f"{directory}: accuracy {accuracy:.3f} on {len(labels)} held-out glosses at 8 bits")
    print(f"the engine gives the same prediction on {same} of {len(labels)}")
    if same != len(labels):
        raise SystemExit("the engine's predictions differ from the simulated model's")
