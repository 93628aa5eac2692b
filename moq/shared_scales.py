"""One scale for a parameter of which every rank has a shard: what ranks tell each other of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from moq._C import COLLECTION_WORDS
from moq.rules import MatchedParameter
from moq.sharding import is_sharded, shard_groups


class SharedScales:
    """Memory for what is collected of per-tensor scales over shards, and its reduction.

    What is collected are integers (smallest and largest weight as ordered numbers, and sums), so
    that the scales are those of the whole parameter bit for bit.

    Args:
        matched: The quantized parameters.
    """

    def __init__(self, matched: Sequence[MatchedParameter]) -> None:
        """Finds the parameters whose scale is shared."""
        by_groups: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
        for m in matched:
            if m.granularity == "per_tensor" and is_sharded(m.parameter):
                groups = shard_groups(m.parameter)
                if groups:
                    device = m.parameter.to_local().device
                    by_groups[(device, *groups)].append(m.parameter)
        self._rows: dict[torch.Tensor, torch.Tensor] = {}
        self._groups: dict[torch.Tensor, list[Any]] = {}
        self._memory = []
        for (device, *groups), parameters in by_groups.items():
            words = torch.zeros(len(parameters), COLLECTION_WORDS, dtype=torch.int64, device=device)
            self._rows |= dict(zip(parameters, words, strict=True))
            self._groups |= dict.fromkeys(parameters, groups)
            self._memory.append((words, torch.zeros_like(words), groups))

    def __bool__(self) -> bool:
        """Says whether ranks share a scale: then they must write simulated values together."""
        return bool(self._memory)

    def on_any_rank(self, flag: bool) -> bool:
        """Returns whether a flag is set on any of the ranks that share scales with this one.

        All of them must call it; it waits for the device.
        """
        for words, _, groups in self._memory:
            told = torch.tensor(int(flag), device=words.device)
            for group in groups:
                dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
            flag = bool(told)
        return flag

    def row(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Returns where a parameter's scale is collected, or None if no other rank shares it."""
        return self._rows.get(parameter)

    @torch.no_grad()
    def with_extremes(self, parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Returns this rank's elements and the smallest and largest of all ranks, [1, n + 2].

        All ranks must call it.
        """
        groups = self._groups[parameter]
        elements = local.reshape(-1)
        extremes = elements.new_zeros(2)
        if len(elements):
            extremes = torch.stack([(-elements).amax(), elements.amax()])
        for group in groups:
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        extremes[0].neg_()
        return torch.cat([elements, extremes])[None]

    @torch.no_grad()
    def reduce(self, stage: int) -> None:
        """Brings together over the ranks what stage `stage` has collected."""
        for words, before, groups in self._memory:
            if stage == 0:
                extent = words[:, :1].view(torch.int32)  # lowest, highest
                lowest, highest = extent.unbind(1)
                upper = torch.stack([~lowest, highest])  # the lowest is the largest complement
                for group in groups:
                    dist.all_reduce(upper, dist.ReduceOp.MAX, group=group)
                lowest.copy_(~upper[0])
                highest.copy_(upper[1])
            else:
                added = words - before
                for group in groups:
                    dist.all_reduce(added, dist.ReduceOp.SUM, group=group)
                words.copy_(before + added)
            before.copy_(words)
