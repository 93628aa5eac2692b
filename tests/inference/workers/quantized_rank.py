"""One rank: runs the jobs of a file in the engine and saves what they gave."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from moq.inference import Engine


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Opens a directory as the job says; returns logits and greedy tokens."""
    engine = Engine.from_pretrained(job["directory"], **job["options"])
    return {
        "logits": torch.cat(engine.forward(job["rows"])),
        "greedy": [g.token_ids for g in engine.generate(job["rows"], 24)],
    }


if __name__ == "__main__":
    jobs_file = Path(sys.argv[1])
    results = [run(job) for job in torch.load(jobs_file)]
    torch.save(results, jobs_file.with_name(f"rank{os.environ['RANK']}.pt"))
