"""Fine-tunes MiniLM-L6 to name the topic of a WordNet gloss (26 topics), in FP32 and with MoQ.

Three models that saw the same batches are compared on held-out glosses: fine-tuned in FP32, the
same quantized to INT8 after training, and trained with MoQ (16 -> 8 bits, each transformer layer at
a pace set by the top eigenvalue of its Hessian). The MoQ model is exported, and the inference
engine's predictions are compared with PyTorch's.

    python examples/classify_text.py                       # about two minutes on 2 cores
    python examples/classify_text.py --warmup-steps 400 --steps 400 --held-out 4000
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from language_modelling import progress_bar
from pretrained import LabelledText, load_encoder, wordnet_glosses
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import moq
from moq.inference import Engine

Batch = dict[str, Tensor]

BATCH_SIZE = 32
PROBE_SIZE = 16  # glosses


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("out/encoder"), help="checkpoint directory to write")
    add("--warmup-steps", type=int, default=50, help="FP32 steps that all three models share")
    add("--steps", type=int, default=40, help="further steps, in FP32 and with MoQ")
    add("--held-out", type=int, default=600, help="number of held-out glosses")
    add("--learning-rate", type=float, default=2e-4)
    add("--seed", type=int, default=0, help="shuffles the glosses")
    return parser.parse_args()


def make_batches(
    tokenizer: PreTrainedTokenizerBase, data: LabelledText, rows: Sequence[int]
) -> list[Batch]:
    """Tokenized batches of BATCH_SIZE with their labels, each padded to its longest text."""
    batches = []
    for start in range(0, len(rows), BATCH_SIZE):
        chosen = rows[start : start + BATCH_SIZE]
        texts = [data.texts[row] for row in chosen]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([data.labels[row] for row in chosen])})
    return batches


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    title: str,
) -> None:
    """Trains one step a batch."""
    model.train()
    with progress_bar() as bar:
        task = bar.add_task(title, total=len(batches), figures="")
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(task, advance=1, figures=f"loss {loss.item():.3f}")
    model.eval()


def predict(
    logits_of: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    title: str,
) -> Tensor:
    """The most likely class of every example."""
    answers = []
    with torch.no_grad(), progress_bar() as bar:
        task = bar.add_task(title, total=len(batches), figures="")
        for batch in batches:
            answers.append(logits_of(batch).argmax(-1))
            bar.update(task, advance=1)
    return torch.cat(answers)


def main() -> None:
    """Trains the three models, exports one, compares."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    data = wordnet_glosses()
    model, tokenizer = load_encoder(data.num_classes)

    shuffle = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(data.texts), generator=shuffle).tolist()
    held_out_rows, train_rows = rows[: args.held_out], rows[args.held_out :]
    steps = args.warmup_steps + args.steps
    batches = make_batches(tokenizer, data, train_rows[: steps * BATCH_SIZE])
    shared, further = batches[: args.warmup_steps], batches[args.warmup_steps :]
    probe = make_batches(tokenizer, data, train_rows[-PROBE_SIZE:])
    held_out = make_batches(tokenizer, data, held_out_rows)
    labels = torch.cat([batch["labels"] for batch in held_out])
    accuracy: dict[str, float] = {}

    def adamw(module: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(module.parameters(), lr=args.learning_rate, weight_decay=0.01)

    def measure(name: str, logits_of: Callable[[Batch], Tensor]) -> Tensor:
        answers = predict(logits_of, held_out, name)
        accuracy[name] = (answers == labels).double().mean().item()
        return answers

    train(model, adamw(model), shared, "FP32, shared steps")
    fp32_model = copy.deepcopy(model)
    train(fp32_model, adamw(fp32_model), further, "FP32, further steps")
    measure("FP32", lambda batch: fp32_model(**batch).logits)

    fp32_folder = args.output.with_name(args.output.name + "-fp32")
    fp32_model.save_pretrained(fp32_folder)
    tokenizer.save_pretrained(fp32_folder)
    post_training = Engine.from_pretrained(fp32_folder, dtype="int8")
    measure("INT8 after training", lambda batch: engine_logits(post_training, batch))

    optimizer = moq.MoQOptimizer(
        adamw(model),
        model,
        {
            "start_bits": 16,
            "target_bits": 8,
            "schedule": {"finish_at": 0.6},
            # A rough eigenvalue ranks the layers as well as an exact one. Of so few steps, 2 % is
            # less than one measurement.
            "sensitivity": {
                "measure": "eigenvalue",
                "max_products": 8,
                "tolerance": 0.05,
                "max_cost": None,
            },
        },
        total_steps=args.steps,
    )
    optimizer.probe(lambda batch: model(**batch).loss, probe)
    train(model, optimizer, further, "MoQ, 16 -> 8 bits")
    simulated = measure("MoQ INT8", lambda batch: model(**batch).logits)

    optimizer.export(args.output, tokenizer=tokenizer)
    engine = Engine.from_pretrained(args.output)
    served = measure("MoQ INT8, engine", lambda batch: engine_logits(engine, batch))

    for name, value in accuracy.items():
        print(f"{name:24} accuracy {value:.3f} on {len(labels)} held-out glosses")
    print(f"the engine gives the same prediction on {(simulated == served).sum()} of {len(labels)}")
    args.output.with_name(args.output.name + "-accuracy.json").write_text(
        json.dumps(accuracy | {"held_out": len(labels)}, indent=2) + "\n"
    )
    if not torch.equal(simulated, served):
        raise SystemExit("the engine's predictions differ from the simulated model's")


def engine_logits(engine: Engine, batch: Batch) -> Tensor:
    """Classification logits of a padded batch from the engine, which takes rows without padding."""
    padded = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    rows = [ids[mask.bool()].tolist() for ids, mask in padded]
    return engine.encode(rows).logits


if __name__ == "__main__":
    main()
