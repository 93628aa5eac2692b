"""What must hold before a training is written to a directory."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from moq.collective import all_gather
from moq.rules import MatchedParameter, plain_name


def require_in_model(model: nn.Module, matched: Sequence[MatchedParameter], where: str) -> None:
    """Refuses weights that the model does not compute with any more: others are in their place.

    Raises:
        RuntimeError: naming them and the remedy.
    """
    present = {
        plain_name(name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    stale = [m.name for m in matched if present.get(m.name) is not m.parameter]
    if stale:
        more = f" and {len(stale) - 1} more" if stale[1:] else ""
        raise RuntimeError(
            f"{where}: the model must hold the parameters that were trained, and {stale[0]}{more} "
            "is another Parameter now, or gone, as after a module was replaced or "
            "load_state_dict(assign=True): copy values into the parameters "
            "(parameter.data.copy_(values), load_state_dict without assign) or make a new "
            "MoQOptimizer of the model as it is"
        )


def require_equal_ranks(fingerprint: str, group: dist.ProcessGroup | None, rule: str) -> None:
    """Refuses ranks whose masters or plans differ; all ranks of the group must call.

    Args:
        fingerprint: MoQOptimizer.fingerprint() here.
        group: Ranks that train copies of one model; None: all.
        rule: What must hold, and why it may not: follows "the ranks must".

    Raises:
        RuntimeError: on all of them.
    """
    if len(set(all_gather(fingerprint, group))) > 1:
        raise RuntimeError(f"MoQOptimizer: the ranks must {rule}")
