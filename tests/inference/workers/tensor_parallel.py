"""One rank: opens every model of a folder, runs it and saves what it got.

Arguments: the folder of models, each with its prompts.pt (a list of token lists), and the folder
for results.
"""

import os
import sys
from pathlib import Path

import torch

from moq import _C
from moq.inference import Engine

DTYPES = ("fp32", "int8")
NEW_TOKENS = 12


def memory_megabytes(field: str) -> float:
    """A line of this process's status: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def load(directory: Path) -> dict:
    """How far this rank's memory grew while it loaded the model, in MB."""
    before = memory_megabytes("VmRSS")
    Engine.from_pretrained(directory, dtype="fp32")
    return {"peak_growth": memory_megabytes("VmHWM") - before}


def disagree(directory: Path) -> dict:
    """What a rank is told when every rank asks for something else."""
    engine = Engine.from_pretrained(directory)
    rank, core = engine.core.rank, engine.core
    cache = core.make_cache(core.tp_size, 8)
    slots = [cache.allocate() for _ in range(core.tp_size)]
    shared, own = [[1, 2, 3]], [[1 + rank, 2, 3]]
    calls = {
        "prompts": lambda: engine.generate(own, 4),
        "temperature": lambda: engine.generate(shared, 4, temperature=1 + rank),
        "top_k": lambda: engine.generate(shared, 4, top_k=rank),
        "stop tokens": lambda: engine.generate(shared, 4, stop_token_ids=[rank]),
        "batch": lambda: engine.generate(shared, 4, max_batch=1 + rank),
        "tokens": lambda: engine.forward(own),
        "slots": lambda: core.forward(shared, [], cache, [slots[rank]]),
    }
    errors = {}
    for name, call in calls.items():
        try:
            call()
        except _C.Error as error:
            errors[name] = str(error)
    return errors


def run(directory: Path, dtype: str) -> dict:
    """Outputs and tokens of a model, or the error that refuses it."""
    try:
        policy = directory / "policy.json"
        engine = Engine.from_pretrained(
            directory, dtype=dtype, policy=policy if policy.exists() else None
        )
    except _C.Error as error:
        return {"error": str(error)}
    results = {"tp_size": engine.core.tp_size}
    prompts = torch.load(directory / "prompts.pt")
    if directory.name == "bert":
        encoding = engine.encode(prompts)
        outputs = torch.cat(encoding.last_hidden_state)
        return results | {"outputs": outputs, "pooled": encoding.pooled}
    greedy = engine.generate(prompts, NEW_TOKENS, stop_token_ids=[])
    sampled = engine.generate(prompts, NEW_TOKENS, stop_token_ids=[], temperature=1.0)
    return results | {
        "outputs": torch.cat(engine.forward(prompts)),
        "tokens": [generation.token_ids for generation in greedy],
        "sampled": [generation.token_ids for generation in sampled],
    }


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    # First, so that the peak is this model's.
    results = {"large": load(models / "large")}
    for directory in sorted(models.iterdir()):
        if directory.name != "large":
            results |= {(directory.name, dtype): run(directory, dtype) for dtype in DTYPES}
    results["disagreement"] = disagree(models / "llama")
    torch.save(results, output / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
