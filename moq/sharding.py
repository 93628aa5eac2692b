"""Where a rank's shard of a quantized parameter lies in the whole parameter."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from moq.collective import raise_over
from moq.rules import MatchedParameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Says whether a tensor is a DTensor, without importing what only sharded models need."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's memory of a DTensor, or the tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor gathered from all ranks, which must all call; a plain one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def mesh_groups(parameter: DTensor) -> list[Any]:
    """Returns the process groups of a parameter's mesh, one a dimension of several ranks."""
    mesh = parameter.device_mesh
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


def shard_groups(parameter: DTensor) -> list[Any]:
    """Returns the process groups over which a parameter is split, one a mesh dimension."""
    from torch.distributed.tensor import Shard

    mesh = parameter.device_mesh
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if type(placement) is Shard and mesh.size(dim) > 1
    ]


def raise_on_all_shards(matched: Iterable[MatchedParameter]) -> AbstractContextManager[None]:
    """Lets an exception on one rank raise on all that have shards of the parameters.

    All of them must call it; of whole parameters nothing is said to anybody.

    Raises:
        RuntimeError: on ranks that had no exception of their own, naming the first that had.
    """
    parameters = [m.parameter for m in matched]
    groups = [group for p in parameters if is_sharded(p) for group in mesh_groups(p)]
    return raise_over(dict.fromkeys(groups))


def first_element(matched: MatchedParameter) -> tuple[int, int]:
    """Returns the number of the shard's first element, and the columns of the whole parameter.

    Elements are counted row-major over [output features, input features], whatever the storage.

    Raises:
        ValueError: if elements that share a scale lie on different ranks; every rank raises it.
    """
    parameter = matched.parameter
    row_dim, column_dim = (1, 0) if matched.transposed else (0, 1)
    if not is_sharded(parameter):
        return 0, int(parameter.shape[column_dim])
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    sharded: dict[int, int] = {}  # dimension -> ranks that it is split over
    for mesh_dim, placement in enumerate(placements):
        if type(placement) is Shard:
            sharded[placement.dim] = sharded.get(placement.dim, 1) * mesh.size(mesh_dim)
        elif type(placement) is not Replicate:
            raise ValueError(
                f"{matched.name}: a DTensor must be placed by Shard and Replicate, got {placement}"
            )
    sharded = {dim: ranks for dim, ranks in sharded.items() if ranks > 1}
    _require_whole_groups(matched, sharded, column_dim)
    _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    columns = int(parameter.shape[column_dim])
    return int(offset[row_dim]) * columns + int(offset[column_dim]), columns


def _require_whole_groups(
    matched: MatchedParameter, sharded: dict[int, int], column_dim: int
) -> None:
    """Refuses a sharding that splits a group of weights with one scale."""
    where = f"{matched.name} is sharded over ranks as {matched.parameter.placements}"  # type: ignore[attr-defined]
    if matched.granularity == "per_tensor":
        return  # its one scale is brought together over the ranks
    ranks = sharded.get(1 - column_dim, 1)
    if matched.granularity == "per_rows" and (
        column_dim in sharded or matched.out_features % (ranks * matched.group_size)
    ):
        raise ValueError(
            f"{where}: its {matched.out_features} output features must split into equal shards of "
            f"whole groups of the {matched.group_size} that share a scale, and its input features "
            "not at all: change groups, or use granularity 'per_channel'"
        )
    ranks = sharded.get(column_dim, 1)
    if ranks == 1:
        return
    shard_output = f"fully_shard(..., shard_placement_fn=lambda parameter: Shard({1 - column_dim}))"
    if matched.granularity == "per_channel":
        raise ValueError(
            f"{where}: its input features are split, and per_channel has one scale for all of "
            f"them: shard output features instead, {shard_output}, or use granularity 'per_group'"
        )
    if matched.in_features % (ranks * matched.group_size):
        raise ValueError(
            f"{where}: its {matched.in_features} input features must split into {ranks} equal "
            f"shards of whole groups of {matched.group_size}: change group_size, or shard output "
            f"features instead, {shard_output}"
        )
