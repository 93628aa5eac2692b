"""MoQ in transformers' Trainer: MiniLM-L6 learns the topics of WordNet glosses, 16 -> 8 bits.

Trainer gets the MoQOptimizer by `optimizers=`; `attach` checks that both mean the same steps, adds
the optimizer's scalars to what Trainer logs, and exports at the end. Trainer's checkpoints hold the
whole state: `trainer.train(resume_from_checkpoint=True)` goes on from the last one, bit for bit as
if nothing had happened.

    python examples/with_trainer.py                   # about a minute on 2 cores
    python examples/with_trainer.py --steps 200
"""

import torch
from classify_text import BATCH_SIZE, Batch
from glosses import CONFIG, check_export, load_task, parse_arguments
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import moq
from moq.integrations.transformers import attach, num_training_steps


def rows_of(batch: Batch) -> list[Batch]:
    """The glosses of a padded batch one by one, as a dataset has them."""
    return [
        {
            name: value if name == "labels" else value[row["attention_mask"].bool()]
            for name, value in row.items()
        }
        for index in range(len(batch["labels"]))
        for row in [{name: values[index] for name, values in batch.items()}]
    ]


def main() -> None:
    """Trains, exports, compares."""
    args = parse_arguments(__doc__, "out/with-trainer")
    task = load_task(args)
    dataset = [row for batch in task.batches for row in rows_of(batch)]
    options = TrainingArguments(
        output_dir=str(args.output.with_name(args.output.name + "-run")),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        logging_steps=max(args.steps // 10, 1),
        save_steps=max(args.steps // 2, 1),
        save_total_limit=1,
        report_to=[],
        use_cpu=True,
        seed=args.seed,
    )
    optimizer = moq.MoQOptimizer(
        torch.optim.AdamW(task.model.parameters(), lr=args.learning_rate),
        task.model,
        CONFIG,
        total_steps=num_training_steps(options, dataset),
        log_every=options.logging_steps,
    )
    trainer = Trainer(
        task.model,
        options,
        train_dataset=dataset,
        data_collator=DataCollatorWithPadding(task.tokenizer),
        processing_class=task.tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    attach(trainer, export=args.output)
    trainer.train()
    check_export(task, args.output)


if __name__ == "__main__":
    main()
