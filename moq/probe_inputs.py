"""What a measurement is made of, blocks and batches: checked, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from moq.collective import all_gather, raise_together
from moq.curvature import Form
from moq.sharding import is_sharded


def listed_batches(batches: Iterable[Any]) -> list[Any]:
    """Lists the batches, of which one alone is refused: it would be taken for a list of its keys.

    Raises:
        TypeError: if they are a mapping.
    """
    if isinstance(batches, Mapping):
        raise TypeError(
            "measure: batches must be an iterable of batches, got one batch alone, a "
            f"{type(batches).__name__} with the keys {list(batches)}: put it into a list"
        )
    return list(batches)


def trainable_blocks(blocks: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """Drops frozen parameters and empty blocks, and refuses blocks that overlap.

    Raises:
        ValueError: naming two blocks that overlap, or if nothing is left.
    """
    seen: dict[Tensor, str] = {}
    result: dict[str, list[Tensor]] = {}
    for name, parameters in blocks.items():
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter in seen:
                raise ValueError(
                    f"measure: blocks must not overlap, got one parameter in {seen[parameter]!r} "
                    f"and {name!r}"
                )
            seen[parameter] = name
            result.setdefault(name, []).append(parameter)
    if not result:
        raise ValueError("measure: there must be a block with a trainable parameter, got none")
    return result


def require_whole(blocks: Mapping[str, Sequence[Tensor]], where: str) -> None:
    """Refuses parameters that fully_shard has divided.

    Raises:
        TypeError: naming a block with one.
    """
    for name, parameters in blocks.items():
        if any(is_sharded(p) for p in parameters):
            raise TypeError(
                f"{where}: parameters must be whole tensors, got a DTensor in block {name!r}: "
                "measure before fully_shard"
            )


def are_sharded(blocks: Mapping[str, Sequence[Tensor]], form: Form) -> bool:
    """Says whether parameters are sharded, and refuses a form or a mixture that cannot be."""
    kinds = {is_sharded(p): name for name, block in blocks.items() for p in block}
    if True not in kinds:
        return False
    if False in kinds:
        raise TypeError(
            "measure: parameters must be all sharded or all whole, got whole ones in block "
            f"{kinds[False]!r} and sharded ones in {kinds[True]!r}"
        )
    if form not in ("auto", "finite_difference"):
        raise TypeError(
            f"measure: form must be 'finite_difference' (or 'auto') for sharded parameters, got "
            f"{form!r} and a DTensor in block {kinds[True]!r}: before fully_shard, measure "
            "moq.sensitivity.quantized_blocks(model, config), and give the result to "
            "MoQOptimizer.apply_sensitivity"
        )
    return True


def _keys(batch: Any) -> tuple[str, ...] | None:
    """Returns the keys of a batch that has some."""
    return tuple(sorted(map(str, batch.keys()))) if hasattr(batch, "keys") else None


def count_batches(
    names: tuple[str, ...],
    own: Sequence[Any],
    group: ProcessGroup | None,
    *,
    sharded: bool = False,
) -> list[int]:
    """Makes sure that all ranks mean the same, and returns how many batches each has.

    Args:
        names: Of the blocks.
        own: Batches of this rank.
        group: Ranks that measure together, all of which must call.
        sharded: Whether they share parameters, and so the batches, which then count once.

    Raises:
        ValueError: naming what differs, or what is empty.
    """
    with raise_together(group):
        for index, batch in enumerate(own):
            tensors = [leaf for leaf in tree_leaves(_plain(batch)) if isinstance(leaf, Tensor)]
            if tensors and all(tensor.numel() == 0 for tensor in tensors):
                raise ValueError(
                    f"measure: every batch must hold data, got only empty tensors in batch {index}"
                )
    ranks = all_gather((names, [_keys(batch) for batch in own]), group)
    if any(other != names for other, _ in ranks):
        raise ValueError(f"measure: blocks must be the same on all ranks, got {list(names)} here")
    keys = [(rank, batch) for rank, (_, batches) in enumerate(ranks) for batch in batches]
    for rank, found in keys:
        if found != keys[0][1]:
            raise ValueError(
                f"measure: batches must have the same keys on all ranks, got "
                f"{_listed(keys[0][1])} on rank {keys[0][0]} and {_listed(found)} on rank {rank}"
            )
    counts = [len(batches) for _, batches in ranks]
    if sum(counts) == 0:
        raise ValueError("measure: batches must hold at least one batch, got none")
    if sharded and len(set(counts)) > 1:
        raise ValueError(
            "measure: every rank must have as many batches of a sharded model, which its ranks "
            f"evaluate together, got {counts}"
        )
    return counts[:1] if sharded else counts


def _plain(batch: Any) -> Any:
    """Shows the tensors of mappings that torch does not know, such as BatchEncoding."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _listed(keys: tuple[str, ...] | None) -> str:
    return "none" if keys is None else str(list(keys))
