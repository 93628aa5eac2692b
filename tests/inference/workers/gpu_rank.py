"""One rank on a GPU: generates with every model of a folder; rank 0 prints what it got, as JSON.

Arguments: the folder of models, the prompts as JSON, what the weights are kept in, and "dynamic"
or "" for activations.
"""

import json
import sys
from pathlib import Path

import models

from moq.inference import Engine

directory, prompts, dtype = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
activations = sys.argv[4] or None
results = {}
for path in sorted(directory.iterdir()):
    engine = Engine.from_pretrained(
        path,
        device="cuda",
        dtype=dtype,
        compute_dtype="fp32",
        activations=activations,
        policy=models.policy_in(path),
    )
    # Twice: the second time every step is a captured graph.
    rows = [[g.token_ids for g in engine.generate(prompts, 20)] for _ in range(2)]
    sampled = engine.generate(prompts, 20, temperature=1.0, seed=5)
    results[path.name] = [*rows, [g.token_ids for g in sampled]]
if engine.core.rank == 0:
    print(json.dumps({"tp_size": engine.core.tp_size, "results": results}))
