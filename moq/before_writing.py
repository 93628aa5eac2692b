"""What must hold before a training is written to a directory."""

from __future__ import annotations

import torch.distributed as dist

from moq.collective import all_gather


def require_equal_ranks(fingerprint: str, group: dist.ProcessGroup | None, rule: str) -> None:
    """Refuses ranks whose masters or plans differ; all ranks of the group must call.

    Args:
        fingerprint: MoQOptimizer.fingerprint() here.
        group: Ranks that train copies of one model; None: all.
        rule: What must hold, and why it may not: follows "the ranks must".

    Raises:
        RuntimeError: on all of them.
    """
    outside: object = dist.GroupMember.NON_GROUP_MEMBER  # a number
    if group is outside:
        return  # nobody else trains this one
    if len(set(all_gather(fingerprint, group))) > 1:
        raise RuntimeError(f"MoQOptimizer: the ranks must {rule}")
