"""Ranks of a tensor-parallel engine: who they are, and the communicator between them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import weakref

import torch
import torch.distributed as dist

from moq import _C

# What torchrun sets for every process that it starts, and init_process_group reads.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PR_SET_PDEATHSIG = 1

_engines: weakref.WeakSet[_C.Engine] = weakref.WeakSet()
# Groups that were made beside callers' ones, by these and by backend.
_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, dist.ProcessGroup]]
_made = weakref.WeakKeyDictionary()


def connect(
    tp_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    transport: str = "auto",
    device: torch.device | None = None,
) -> _C.Communicator:
    """Connects this process with the other ranks of its tensor-parallel group.

    All ranks call it together. Under torchrun the process group is made here, on gloo (and on NCCL
    for GPUs), unless the caller has made one already. Without a launcher this process holds the
    whole model.

    Args:
        tp_size: number of ranks that share the model; None: all of them. 1 makes every rank hold
            the whole model.
        group: the ranks to use instead of all of torchrun's; may have any backend.
        transport: "auto" (shared memory between ranks of one host, c10d otherwise),
            "shared_memory" or "c10d". It carries what ranks on the CPU exchange; GPUs use NCCL.
        device: where this rank computes; None: the CPU.

    Returns:
        The communicator; its rank and size are tp_rank and tp_size.

    Raises:
        ValueError: if tp_size is neither 1 nor the number of ranks.
        moq.Error: if the transport or the GPU asked for can't be had, or a rank failed on the
            way.
    """
    launched = all(variable in os.environ for variable in _LAUNCHER_VARIABLES)
    if dist.is_initialized():
        num_ranks = dist.get_world_size(group)
    else:
        num_ranks = int(os.environ["WORLD_SIZE"]) if launched else 1
    if tp_size not in (None, 1, num_ranks):
        raise ValueError(
            f"tp_size must be 1 or the number of ranks, got {tp_size} with {num_ranks} ranks: "
            f"start as many with torchrun --standalone --nproc-per-node {tp_size} -m moq.inference"
        )
    if tp_size == 1 or num_ranks == 1:
        return _C.single_process()
    gpu = device if device is not None and device.type == "cuda" else None
    if gpu is not None:
        _check_gpu(gpu)
    if not dist.is_initialized():
        _end_with_the_launcher()
        if gpu is not None:
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=gpu)
        else:
            dist.init_process_group("gloo")
        atexit.register(_destroy_process_group)
    cpu_group = _group_for(torch.device("cpu"), group, "gloo")
    return _C.make_communicator(cpu_group.group_name, transport)


def rank_device(device: str | torch.device | None) -> torch.device:
    """Where this process computes: for torchrun's ranks "cuda" is the GPU of their LOCAL_RANK."""
    place = torch.device("cpu" if device is None else device)
    if place.type == "cuda" and place.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return place


def device_group_name(
    communicator: _C.Communicator, group: dist.ProcessGroup | None, device: torch.device
) -> str:
    """The name, as c10d knows it, of the ranks' process group that carries GPU tensors; or ""."""
    if communicator.size == 1 or device.type != "cuda":
        return ""
    # Before whatever ends the process group then.
    atexit.unregister(_release_graphs)
    atexit.register(_release_graphs)
    return _group_for(device, group, "nccl").group_name


def _check_gpu(device: torch.device) -> None:
    """What the engine would check later: NCCL's own message says less.

    Raises:
        moq.Error: if the GPU does not exist.
    """
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise _C.Error(
            f"engine: device {device} must be one of the GPUs here, a rank on each, got {count}: "
            "`moq doctor` says what was found"
        )


def broadcast_text(communicator: _C.Communicator, text: str) -> str:
    """Rank 0's text, on every rank; what the others pass does not matter."""
    data = bytearray(text.encode())
    length = torch.tensor([len(data)])
    communicator.broadcast(length, 0)
    if communicator.rank != 0:
        data = bytearray(int(length))
    if data:
        communicator.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0)
    return data.decode()


def _group_for(
    device: torch.device, group: dist.ProcessGroup | None, backend: str
) -> dist.ProcessGroup:
    """The group itself if it serves the device, otherwise another of the same ranks.

    One of the CPU may have any backend. That of GPUs must be NCCL's: what others do with GPU
    tensors, as gloo, passes through the host and can't be captured in a CUDA graph.
    """
    group = group or dist.group.WORLD
    assert group is not None
    place = torch.device(device.type)
    if place in group._device_types and (
        place.type == "cpu" or group._get_backend(place).name() == backend
    ):
        return group
    made = _made.setdefault(group, {})
    if backend not in made:
        ranks = dist.get_process_group_ranks(group)
        other = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
        assert isinstance(other, dist.ProcessGroup)
        made[backend] = other
    return made[backend]


def release_before_the_group(engine: _C.Engine) -> None:
    """Lets a process group that ends with the process find the engine without captured steps.

    NCCL waits for ever to end a communicator that a captured step holds.
    """
    _engines.add(engine)


def _release_graphs() -> None:
    for engine in _engines:
        with contextlib.suppress(_C.Error):  # a broken GPU: the process ends anyway
            engine.release_graphs()


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_the_launcher() -> None:
    """Makes the kernel end this rank when torchrun is killed and can't do it any more.

    Raises:
        ConnectionError: if torchrun has ended already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) must succeed")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    # torchrun's store listens before any rank starts. Without this a rank that was still importing
    # when torchrun was killed would wait half an hour for it.
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.create_connection((address, int(port)), timeout=60).close()
    except OSError as error:
        raise ConnectionError(
            f"torchrun must be reachable at {address}:{port}, got {error}: it has ended"
        ) from error
