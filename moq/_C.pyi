"""Types of the compiled extension's own functions; its classes document themselves."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from torch import Tensor, dtype

class Error(RuntimeError): ...

class TensorInfo:
    name: str
    dtype: str
    shape: list[int]
    size_bytes: int

class Checkpoint:
    def __init__(self, directory: str) -> None: ...
    def __contains__(self, name: str) -> bool: ...
    def names(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str) -> Tensor: ...
    def files(self) -> list[str]: ...

def read_safetensors(path: str) -> dict[str, Tensor]: ...
def write_safetensors(
    path: str, tensors: Sequence[tuple[str, Tensor]], metadata: dict[str, str]
) -> None: ...
def exchange_paths(first: str, second: str) -> bool: ...
def recover_codes(
    name: str,
    master: Tensor,
    simulated: Tensor,
    *,
    num_bits: int,
    mode: str,
    granularity: str,
    group_size: int,
    transposed: bool,
    scale_dtype: dtype,
    scale_rule: str = "absmax",
    absmax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, float]: ...
def pack_codes(codes: Tensor, num_bits: int) -> Tensor: ...
def unpack_codes(words: Tensor, num_bits: int, columns: int) -> Tensor: ...

class Eigenvalues(TypedDict):
    largest: float
    smallest: float
    dominant: float
    residual: float
    iterations: int
    converged: bool

class BlockEigenvalues(Eigenvalues):
    largest_residual: float
    smallest_residual: float

class CurvatureOperator:
    @property
    def parameters(self) -> list[Tensor]: ...
    def product(self, block: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor]: ...
    def traces(
        self,
        blocks: Sequence[Sequence[int]],
        *,
        tolerance: float,
        min_products: int,
        max_products: int,
        seed: int,
        batch: int = 0,
        names: Sequence[str] = (),
        progress: Callable[[int], None] | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> tuple[list[list[float]], bool]: ...
    def eigenvalues(
        self,
        block: Sequence[int],
        *,
        max_iterations: int,
        tolerance: float,
        seed: int,
        progress: Callable[[int], None] | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> BlockEigenvalues: ...

class HvpOperator(CurvatureOperator):
    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None: ...

class GaussNewtonOperator(CurvatureOperator):
    def __init__(self, loss: Tensor, outputs: Tensor, parameters: Sequence[Tensor]) -> None: ...

class FisherOperator(CurvatureOperator):
    examples: int
    def __init__(self, losses: Tensor, parameters: Sequence[Tensor]) -> None: ...
    def exact_traces(
        self,
        blocks: Sequence[Sequence[int]],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[float]: ...
    def largest_eigenvalue(
        self, block: Sequence[int], *, progress: Callable[[int], None] | None = None
    ) -> float: ...

class Sharding:
    def __init__(
        self,
        pieces: Sequence[tuple[Sequence[int], Sequence[int]]],
        sum: Callable[[list[int], list[float]], list[float]],
        join: Callable[[int, Tensor], Tensor],
    ) -> None: ...

class FiniteDifferenceOperator(CurvatureOperator):
    scale: float
    rate: float
    def check_all(self) -> None: ...
    def __init__(
        self,
        gradient: Callable[[list[int]], list[Tensor]],
        parameters: Sequence[Tensor],
        *,
        check_all: bool = False,
        scale: float = 1.0,
        rate: float = 0.0,
        sharding: Sharding | None = None,
    ) -> None: ...

def require_loss(loss: Tensor) -> None: ...
def standard_errors(samples: Sequence[Sequence[float]]) -> list[float]: ...

class LanczosResult(Eigenvalues):
    history: list[float]

def lanczos(
    product: Callable[[Tensor], Tensor],
    n: int,
    *,
    dtype: dtype,
    max_iterations: int,
    tolerance: float,
    seed: int,
) -> LanczosResult: ...

class SpectralQuadrature:
    n: int
    products: int
    exact: bool
    rules: list[tuple[list[float], list[float]]]
    def trace(self, power: int = 1) -> tuple[float, float]: ...
    def density(self, values: Sequence[float], width: float) -> list[tuple[float, float]]: ...

def spectral_quadrature(
    product: Callable[[Tensor], Tensor],
    n: int,
    *,
    dtype: dtype,
    steps: int,
    probes: int,
    seed: int,
) -> SpectralQuadrature: ...

class ParetoFront:
    points: list[tuple[int, float]]
    def __init__(
        self, names: Sequence[str], options: Sequence[Sequence[tuple[int, float]]]
    ) -> None: ...
    def choice(self, point: int) -> list[int]: ...
    def within(self, budget: int) -> int: ...

class ScheduledBlock:
    name: str
    def __init__(
        self,
        name: str,
        *,
        start_bits: int = 16,
        target_bits: int = 8,
        period: int = 1,
        offset: int = 0,
        growth: float = 2.0,
        finish_at: float | None = None,
        counts_per_step: int = 0,
    ) -> None: ...
    @staticmethod
    def from_table(name: str, table: dict[int, int]) -> ScheduledBlock: ...

class Schedule:
    num_blocks: int
    total_steps: int
    block_names: list[str]
    measured: bool
    completed_steps: int
    def __init__(
        self,
        blocks: Sequence[ScheduledBlock],
        total_steps: int,
        *,
        on_unfinished: str = "error",
        stretch_rule: str = "none",
    ) -> None: ...
    def bits_at(self, block: int, step: int) -> int: ...
    def finished(self, step: int) -> bool: ...
    def set_sensitivities(self, step: int, sensitivities: Sequence[float]) -> None: ...
    def plan(self) -> list[list[tuple[int, int]]]: ...
    def bounds(self) -> tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]]: ...
    def unfinished(self) -> list[dict[str, Any]]: ...
    def plot(self, path: str | PathLike[str]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> Schedule: ...

def all_gather_bytes(process_group_name: str, own: bytes) -> list[bytes]: ...

COLLECTION_WORDS: int

def name_hash(name: str) -> int: ...

class TrainedParameter:
    def __init__(
        self,
        *,
        name: str,
        parameter: Tensor,
        master: Tensor,
        simulated: Tensor,
        full_precision: Tensor,
        block: int,
        granularity: str,
        mode: str,
        rounding: str,
        group_size: int,
        transposed: bool,
        blend_steps: int,
        first_element: int,
        unsharded_cols: int,
        scale_rule: str = "absmax",
        collected: Tensor | None = None,
    ) -> None: ...

class Trainer:
    schedule: Schedule
    step: int
    step_on_device: Tensor
    step_seen: int
    step_at_most: int
    def __init__(
        self,
        parameters: Sequence[TrainedParameter],
        schedule: Schedule,
        seed: int,
        step: int = 0,
        in_place: bool = True,
    ) -> None: ...
    def set_reduction(self, reduce: Callable[[int], None]) -> None: ...
    def control_of(self, parameter: int) -> tuple[Tensor, Tensor | None, Tensor]: ...
    def begin_step(self, cast: bool = True) -> None: ...
    def end_step(self, found_inf: Tensor | None = None) -> None: ...
    def abandon_step(self) -> None: ...
    def write_simulated(self) -> None: ...
    def write_masters(self) -> None: ...
    def check_layouts(self) -> None: ...
    def touched(self) -> bool: ...
    def overwritten(self) -> list[int]: ...
    def grid_width(self, parameter: int) -> int | None: ...
    def adopt(self, changed: Sequence[int]) -> None: ...
    def rebind(self, simulated: Sequence[Tensor], full_precision: Sequence[Tensor]) -> None: ...
    def set_sensitivities(self, sensitivities: Sequence[float]) -> None: ...
    def restore(self, schedule: Schedule, step: int) -> None: ...
    def next_drop(self, step: int) -> int | None: ...

def stretch(rule: str, sensitivity: float) -> float: ...
def stretch_rules() -> list[str]: ...
def build_info() -> dict[str, str | None]: ...

class KvCache:
    num_slots: int
    capacity: int
    num_free_slots: int
    def allocate(self) -> int: ...
    def free(self, slot: int) -> None: ...
    def fork(self, slot: int) -> int: ...
    def reorder(self, slots: Sequence[int], sources: Sequence[int]) -> list[int]: ...
    def length(self, slot: int) -> int: ...
    def truncate(self, slot: int, length: int) -> None: ...

class FinishReason:
    name: str

class GeneratedRow:
    tokens: list[int]
    finish_reason: FinishReason

class GenerationResult:
    rows: list[GeneratedRow]
    prompt_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

class Encoding:
    last_hidden_state: Tensor
    pooled: Tensor | None
    logits: Tensor | None

# Of every sequence, or [sequences, tokens].
_Ids: TypeAlias = Sequence[Sequence[int]] | Tensor

class Engine:
    communicator: Communicator
    architecture: str
    policy: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_token_types: int
    max_positions: int
    has_head: bool
    causal: bool
    activations: str
    weight_format: str
    head_format: str
    weight_bytes: int
    device: str
    compute_dtype: str
    kv_cache_dtype: str
    rank: int
    tp_size: int
    transport: str
    @staticmethod
    def open(
        directory: Path,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        compute_dtype: str | None = None,
        kv_cache_dtype: str | None = None,
        quantize_head: bool | None = None,
        activations: str | None = None,
        policy: Path | None = None,
        communicator: Communicator | None = None,
        device_group: str = "",
    ) -> Engine: ...
    def outside_captures(self) -> AbstractContextManager[None]: ...
    def release_graphs(self) -> None: ...
    def memory_report(self) -> dict[str, int]: ...
    def decode_kernels(self) -> list[tuple[str, int, int, int]]: ...
    def generate(
        self,
        prompts: _Ids,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] = ...,
        max_batch: int = 16,
        chunk_tokens: int | None = None,
        on_token: Callable[[int, int], bool] | None = None,
    ) -> GenerationResult: ...
    def forward(
        self,
        token_ids: _Ids,
        token_types: _Ids = ...,
        cache: KvCache | None = None,
        slots: Sequence[int] = ...,
    ) -> Tensor: ...
    def encode(self, token_ids: _Ids, token_types: _Ids = ...) -> Encoding: ...
    def make_cache(self, num_slots: int, capacity: int) -> KvCache: ...

class Communicator:
    rank: int
    size: int
    transport: str
    def all_reduce_sum(self, tensor: Tensor) -> None: ...
    def all_reduce_max(self, tensor: Tensor) -> None: ...
    def broadcast(self, tensor: Tensor, root: int) -> None: ...
    def all_gather_columns(self, shard: Tensor, widths: Sequence[int]) -> Tensor: ...
    def barrier(self) -> None: ...

def single_process() -> Communicator: ...
def make_communicator(process_group_name: str, transport: str = "auto") -> Communicator: ...
def shard_heads(
    num_heads: int, num_kv_heads: int, rank: int, size: int
) -> tuple[tuple[int, int], tuple[int, int]]: ...
def shard_range(total: int, alignment: int, rank: int, size: int) -> tuple[int, int]: ...
def __getattr__(name: str) -> Any: ...
