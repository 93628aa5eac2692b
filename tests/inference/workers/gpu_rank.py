"""One rank on a GPU: runs every model of a folder; rank 0 prints what it got, as JSON.

Arguments: the folder of models, the prompts, and a list of options of Engine.from_pretrained, both
as JSON. The engine of the last model is alive when the process ends. With MOQ_TEST_BACKEND the
script makes a process group of that backend itself, which MOQ_TEST_ENDS_GROUP=1 lets it end.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import cached_logits, in_pieces
from torch.profiler import ProfilerActivity, profile

from moq.inference import Engine


def counting_graphs(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and how many captured graphs this rank launched meanwhile."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        result = call()
    return result, sum(event.name == "cudaGraphLaunch" for event in profiler.events())


def run_decoder(engine: Engine, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy tokens twice, the second time every step is a captured graph; sampled ones; logits."""

    def drawn(**options: Any) -> list[list[int]]:
        return [g.token_ids for g in engine.generate(prompts, 20, **options)]

    first, (again, graphs) = drawn(), counting_graphs(drawn)
    for _ in range(2):  # then a forward pass is a captured graph, too
        engine.forward(prompts)
    logits, forward_graphs = counting_graphs(lambda: torch.cat(engine.forward(prompts)))
    pieces = [prompts[-1][:30], *in_pieces(prompts[-1][30:], 1)]
    return {
        "tokens": [first, again, drawn(temperature=1.0, seed=5)],
        "logits": logits.tolist(),
        "logits of steps": cached_logits(engine.core, pieces).tolist(),
        "graphs": [graphs, forward_graphs],
    }


def run_encoder(engine: Engine, prompts: list[list[int]]) -> dict[str, Any]:
    """What the model has of encodings, thrice: the third time the step is a captured graph; and a
    masked language model's logits."""
    encodings = [engine.encode(prompts) for _ in range(2)]
    third, graphs = counting_graphs(lambda: engine.encode(prompts))
    token_logits = torch.cat(engine.forward(prompts)) if engine.core.has_head else None
    runs = []
    for encoding in (*encodings, third):
        results = {
            "states": torch.cat(encoding.last_hidden_state),
            "pooled": encoding.pooled,
            "logits": encoding.logits,
            "token logits": token_logits,
        }
        runs.append({kind: found.tolist() for kind, found in results.items() if found is not None})
    return {"runs": runs, "graphs": [graphs]}


def run_all(device: str) -> Engine:
    """Does what the arguments say on a device; returns the last engine."""
    directory, prompts, variants = Path(sys.argv[1]), *map(json.loads, sys.argv[2:4])
    results = {}
    for path in sorted(directory.iterdir()):
        policy = path / "policy.json"
        for options in variants:
            engine = Engine.from_pretrained(
                path, device=device, policy=policy if policy.exists() else None, **options
            )
            run = run_decoder if engine.core.causal else run_encoder
            results[f"{path.name} {options}"] = run(engine, prompts)
    if engine.core.rank == 0:
        print(json.dumps({"tp_size": engine.core.tp_size, "results": results}))
    return engine


if __name__ == "__main__":
    backend = os.environ.get("MOQ_TEST_BACKEND")
    if backend:
        dist.init_process_group(backend)
    last_engine = run_all("cuda")
    if os.environ.get("MOQ_TEST_ENDS_GROUP") == "1":
        del last_engine
        dist.destroy_process_group()
