"""One rank on a GPU: runs every model of a folder; rank 0 prints what it got, as JSON.

Arguments: the folder of models, the prompts, and a list of options of Engine.from_pretrained, both
as JSON. The engine of the last model is alive when the process ends.
"""

import json
import sys
from pathlib import Path

import torch

from moq.inference import Engine


def drawn_by(engine: Engine, prompts: list[list[int]]) -> list[list[list[int]]]:
    """Greedy tokens twice, the second time every step is a captured graph, and sampled ones."""
    rows = [[g.token_ids for g in engine.generate(prompts, 20)] for _ in range(2)]
    sampled = engine.generate(prompts, 20, temperature=1.0, seed=5)
    return [*rows, [g.token_ids for g in sampled]]


def encoded_by(engine: Engine, prompts: list[list[int]]) -> list[dict[str, list]]:
    """What the model has of encodings, thrice: the third time the step is a captured graph."""
    runs = []
    for encoding in (engine.encode(prompts) for _ in range(3)):
        results = {
            "states": torch.cat(encoding.last_hidden_state),
            "pooled": encoding.pooled,
            "logits": encoding.logits,
        }
        runs.append({kind: found.tolist() for kind, found in results.items() if found is not None})
    return runs


directory, prompts, variants = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
results = {}
for path in sorted(directory.iterdir()):
    policy = path / "policy.json"
    for options in variants:
        engine = Engine.from_pretrained(
            path, device="cuda", policy=policy if policy.exists() else None, **options
        )
        run = drawn_by if engine.core.causal else encoded_by
        results[f"{path.name} {options}"] = run(engine, prompts)
if engine.core.rank == 0:
    print(json.dumps({"tp_size": engine.core.tp_size, "results": results}))
