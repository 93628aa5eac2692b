"""One rank on a GPU: generates with every model of a folder; rank 0 prints what it got, as JSON.

Arguments: the folder of models, the prompts, and a list of options of Engine.from_pretrained, both
as JSON. The engine of the last model is alive when the process ends.
"""

import json
import sys
from pathlib import Path

from moq.inference import Engine

directory, prompts, variants = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
results = {}
for path in sorted(directory.iterdir()):
    policy = path / "policy.json"
    for options in variants:
        engine = Engine.from_pretrained(
            path, device="cuda", policy=policy if policy.exists() else None, **options
        )
        # Twice: the second time every step is a captured graph.
        rows = [[g.token_ids for g in engine.generate(prompts, 20)] for _ in range(2)]
        sampled = engine.generate(prompts, 20, temperature=1.0, seed=5)
        results[f"{path.name} {options}"] = [*rows, [g.token_ids for g in sampled]]
if engine.core.rank == 0:
    print(json.dumps({"tp_size": engine.core.tp_size, "results": results}))
