"""One process of test_resume.py: goes on from the newest checkpoint, saves at every step.

As a program: DIRECTORY; writes result.json there when the training is complete.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_resume import STEPS, Run, inner_state


def main() -> None:
    """Trains to the end, if nobody kills it before."""
    directory = Path(sys.argv[1])
    newest, writing = directory / "checkpoint.pt", directory / "checkpoint.part"
    run, first = Run("bfloat16"), 0
    if newest.exists():
        saved = torch.load(newest, weights_only=True)
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.load_rest(saved["rest"])
        first = saved["step"]
    print("training", flush=True)
    for step in range(first, STEPS):
        run.train(range(step, step + 1))
        states = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        torch.save(states | {"rest": run.rest(), "step": step + 1}, writing)
        os.replace(writing, newest)  # a checkpoint is whole or not there
    digest = hashlib.sha256()
    tensors = dict(run.model.named_parameters()) | inner_state(run.optimizer)
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().float().numpy().tobytes())
    result = {"final": [digest.hexdigest(), run.losses], "resumed_at": first}
    (directory / "result.json").write_text(json.dumps(result))
    print("done", flush=True)


if __name__ == "__main__":
    main()
