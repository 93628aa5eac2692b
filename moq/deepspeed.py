"""DeepSpeed's configurations of MoQ, in both spellings, as a MoQConfig with the same schedule.

The first spelling (DeepSpeed 0.4 to 0.6) is the block ``quantize_training``. Its counter grows by 6
at each optimizer step, or by 6 times the number of layers with eigenvalues; period and offset are
compared with that counter. The second (since 0.7) is ``compression_training.weight_quantization``,
whose unit is one optimizer step. In both the width falls at the counts P, 2 P, 4 P, … after the
offset, so the second width stays as long as the first. A table in true steps says exactly that.
With eigenvalues each count but the first is multiplied by 1 + floor(4 s) once more than the one
before: P, 2 f P, 4 f² P, … for a layer of factor f. `counts_per_step` says that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moq.config import (
    Mode,
    ModuleKind,
    MoQConfig,
    OnUnfinished,
    Rule,
    ScheduleConfig,
    SensitivityConfig,
    Timing,
)
from moq.config_file import read_file
from moq.strict import Strict, require

OLD, NEW = "quantize_training", "compression_training"
SPELLINGS = (OLD, NEW)
COUNTS_PER_STEP = 6  # the 2-dimensional parameters that DeepSpeed assumes in a layer
# DeepSpeed leaves weights as they are until the offset is over; 16 bits come nearest to that.
UNQUANTIZED_BITS = 16
# What DeepSpeed makes of these widths since 0.7.
SIGNS: dict[int, Mode] = {2: "ternary", 1: "binary"}
ALL_KINDS: tuple[ModuleKind, ...] = ("linear", "conv1d", "embedding", "head")


@dataclass(frozen=True)
class Conversion:
    """A configuration of DeepSpeed as one of moq.

    Attributes:
        config: The configuration.
        changed: What moq does in another way, and how.
        ignored: Keys without a meaning to moq, and why.
        kept: What moq does as DeepSpeed, and may surprise.
    """

    config: MoQConfig
    changed: tuple[str, ...]
    ignored: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Everything that changed, was ignored or may surprise, one line each."""
        lines = [f"changed: {text}" for text in self.changed]
        lines += [f"ignored: {text}" for text in self.ignored]
        lines += [f"kept: {text}" for text in self.kept]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Mixed(Strict):
    enabled: bool = False
    quantize_change_ratio: float = 0.001

    def validate(self) -> None:
        ratio = self.quantize_change_ratio
        require(0 < ratio <= 1, "quantize_change_ratio must lie in (0, 1]", ratio)


@dataclass(frozen=True, kw_only=True)
class _Algorithm(Strict):
    q_type: Literal["symmetric", "asymmetric"] = "symmetric"
    rounding: Literal["nearest", "stochastic"] = "nearest"


@dataclass(frozen=True, kw_only=True)
class _Bits(Strict):
    target_bits: int
    start_bits: int = 16


@dataclass(frozen=True, kw_only=True)
class _Schedule(Strict):
    quantize_period: int = 1000
    schedule_offset: int = 1000

    def validate(self) -> None:
        require(self.quantize_period >= 1, "quantize_period must be >= 1", self.quantize_period)
        require(self.schedule_offset >= 0, "schedule_offset must be >= 0", self.schedule_offset)


@dataclass(frozen=True, kw_only=True)
class _Eigenvalue(Strict):
    enabled: bool = False
    verbose: bool = False
    max_iter: int = 100
    tol: float = 1e-2
    stability: float = 1e-6
    gas_boundary_resolution: int = 1
    layer_name: str = "bert.encoder.layer"
    layer_num: int = 0

    def validate(self) -> None:
        require(
            self.layer_num >= 1 or not self.enabled,
            "layer_num must be the number of layers, at least 1",
            self.layer_num,
        )


@dataclass(frozen=True, kw_only=True)
class _QuantizeTraining(Strict):
    quantize_bits: _Bits
    enabled: bool = False
    quantize_verbose: bool = False
    quantizer_kernel: bool = False
    quantize_type: str | None = None
    quantize_algo: _Algorithm = field(default_factory=_Algorithm)
    quantize_groups: int = 1
    quantize_schedule: _Schedule = field(default_factory=_Schedule)
    fp16_mixed_quantize: _Mixed = field(default_factory=_Mixed)
    eigenvalue: _Eigenvalue = field(default_factory=_Eigenvalue)

    def validate(self) -> None:
        require(self.quantize_groups >= 1, "quantize_groups must be >= 1", self.quantize_groups)


@dataclass(frozen=True, kw_only=True)
class _SharedParameters(Strict):
    enabled: bool = False
    quantizer_kernel: bool = False
    schedule_offset: int = 0
    quantize_groups: int = 1
    quantize_verbose: bool = False
    quantization_type: Literal["symmetric", "asymmetric"] = "symmetric"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    quantize_weight_in_forward: bool = False
    fp16_mixed_quantize: _Mixed = field(default_factory=_Mixed)

    def validate(self) -> None:
        require(self.schedule_offset >= 0, "schedule_offset must be >= 0", self.schedule_offset)
        require(self.quantize_groups >= 1, "quantize_groups must be >= 1", self.quantize_groups)


@dataclass(frozen=True, kw_only=True)
class _GroupParameters(Strict):
    start_bits: int
    target_bits: int
    quantization_period: int = 1

    def validate(self) -> None:
        period = self.quantization_period
        require(period >= 1, "quantization_period must be >= 1", period)


@dataclass(frozen=True, kw_only=True)
class _Group(Strict):
    params: _GroupParameters
    modules: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):  # the default of DeepSpeed is a plain "*"
            object.__setattr__(self, "modules", (self.modules,))
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class _WeightQuantization(Strict):
    shared_parameters: _SharedParameters
    different_groups: dict[str, _Group]

    def validate(self) -> None:
        groups = list(self.different_groups)
        require(bool(groups), "different_groups must have at least one group", groups)


def convert(
    source: Mapping[str, Any] | str | os.PathLike[str], *, on_unfinished: OnUnfinished = "error"
) -> Conversion:
    """Reads a configuration of DeepSpeed; MoQConfig.from_deepspeed documents it."""
    where, data = "ds_config", source
    if isinstance(source, str | os.PathLike):
        where, data = Path(source).name, read_file(Path(source))
    if not isinstance(data, Mapping):
        raise TypeError(f"{where} must be a mapping, got {data!r}")
    enabled = [name for name, block in _blocks(data, where).items() if _is_enabled(block)]
    if len(enabled) != 1:
        raise ValueError(
            f"{where}: one of {OLD} and {NEW}.weight_quantization.shared_parameters must have "
            f"enabled: true, got {' and '.join(enabled) or 'none (DeepSpeed quantizes nothing)'}"
        )
    converter = _Converter(on_unfinished)
    if enabled == [OLD]:
        path = f"{where}.{OLD}"
        old = _QuantizeTraining.from_dict(data[OLD], path)
    else:
        path = f"{where}.{NEW}.weight_quantization"
        new = _WeightQuantization.from_dict(data[NEW]["weight_quantization"], path)
    try:
        config = converter.from_old(old) if enabled == [OLD] else converter.from_new(new)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if enabled == [NEW]:
        for name in data[NEW]:
            if name != "weight_quantization":
                converter.ignored.append(f"{NEW}.{name}: {_remark(name, data[NEW][name])}")
    others = [name for name in data if name not in SPELLINGS]
    if others:
        converter.ignored.append(f"{', '.join(others)}: not about quantization")
    return Conversion(
        config, tuple(converter.changed), tuple(converter.ignored), tuple(converter.kept)
    )


def _blocks(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns what could switch MoQ on."""
    blocks = {OLD: data.get(OLD, {})}
    compression = data.get(NEW, {})
    if not isinstance(compression, Mapping):
        raise TypeError(f"{where}.{NEW} must be a mapping, got {compression!r}")
    weights = compression.get("weight_quantization", {})
    if not isinstance(weights, Mapping):
        raise TypeError(f"{where}.{NEW}.weight_quantization must be a mapping, got {weights!r}")
    blocks[NEW] = weights.get("shared_parameters", {})
    for name, block in blocks.items():
        if not isinstance(block, Mapping):
            raise TypeError(f"{where}.{name} must be a mapping, got {block!r}")
    return blocks


def _remark(name: str, block: object) -> str:
    shared = block.get("shared_parameters") if isinstance(block, Mapping) else None
    if name == "activation_quantization" and isinstance(shared, Mapping) and _is_enabled(shared):
        kind = shared.get("range_calibration", "dynamic")
        if shared.get("quantization_type", "symmetric") == "asymmetric":
            kind = f"{kind}_asymmetric"
        return f"write activations: {kind} (8 bits) into the rules of these modules"
    return "only weight_quantization is MoQ"


def _is_enabled(block: Mapping[str, Any]) -> bool:
    return block.get("enabled", False) is not False


class _Converter:
    """Makes a MoQConfig, and collects what changes on the way."""

    def __init__(self, on_unfinished: OnUnfinished) -> None:
        self.on_unfinished = on_unfinished
        self.changed: list[str] = []
        self.ignored: list[str] = []
        self.kept: list[str] = []

    def from_old(self, old: _QuantizeTraining) -> MoQConfig:
        """Converts ``quantize_training``."""
        bits, schedule, eigenvalue = old.quantize_bits, old.quantize_schedule, old.eigenvalue
        if old.quantize_type is not None:
            self.ignored.append("quantize_type: DeepSpeed reads quantize_algo.q_type instead")
        self._ignore_switches(old.quantize_verbose, old.quantizer_kernel)
        counts = COUNTS_PER_STEP * (eigenvalue.layer_num if eigenvalue.enabled else 1)
        self.changed.append(
            f"quantize_period {schedule.quantize_period} and schedule_offset "
            f"{schedule.schedule_offset} are counts, of which DeepSpeed adds {counts} at each "
            "optimizer step: here "
            + (
                "the offset is true steps, and the period a count of a layer's own "
                "(counts_per_step)"
                if eigenvalue.enabled
                else "they are true steps"
            )
        )
        offset = math.ceil(schedule.schedule_offset / counts)
        values = self._grid(
            old.quantize_groups,
            old.quantize_algo.q_type,
            old.quantize_algo.rounding,
            old.fp16_mixed_quantize,
        )
        rules = (Rule("*", modules=ALL_KINDS),)
        self.kept.append(
            "every weight matrix is quantized, as in DeepSpeed: embeddings and the head too "
            "(remove the rule '*' to leave those in full precision)"
        )
        if eigenvalue.enabled:
            if offset and bits.start_bits < UNQUANTIZED_BITS:
                self.changed.append(
                    f"schedule_offset: weights have {bits.start_bits} bits from the start, where "
                    "DeepSpeed leaves them as they are until the offset is over"
                )
            return MoQConfig(
                **values,
                start_bits=bits.start_bits,
                target_bits=bits.target_bits,
                rules=rules,
                schedule=ScheduleConfig(
                    period=schedule.quantize_period,
                    counts_per_step=counts,
                    offset=offset,
                    on_unfinished=self.on_unfinished,
                ),
                sensitivity=self._sensitivity(eigenvalue),
            )
        table = _table(bits, schedule.quantize_period, counts, offset, offset)
        return MoQConfig(
            **values,
            start_bits=table[0],
            target_bits=bits.target_bits,
            rules=rules,
            schedule=ScheduleConfig(table=table, on_unfinished=self.on_unfinished),
        )

    def from_new(self, new: _WeightQuantization) -> MoQConfig:
        """Converts ``compression_training.weight_quantization``."""
        shared = new.shared_parameters
        self._ignore_switches(shared.quantize_verbose, shared.quantizer_kernel)
        if shared.quantize_weight_in_forward:
            self.kept.append(
                "quantize_weight_in_forward: as in DeepSpeed the width goes to target_bits at "
                "once after schedule_offset; set it to false for the schedule"
            )
        elif shared.schedule_offset == 0:
            self.changed.append(
                "schedule_offset 0: DeepSpeed counts each micro-batch of the first step as a step "
                "more; here a step is a step"
            )
        values = self._grid(
            shared.quantize_groups,
            shared.quantization_type,
            shared.rounding,
            shared.fp16_mixed_quantize,
        )
        rules = [Rule("*", exclude=True)]
        for name, group in new.different_groups.items():
            rules += self._rules(name, group, shared)
        return MoQConfig(
            **values,
            rules=tuple(rules),
            schedule=ScheduleConfig(on_unfinished=self.on_unfinished),
        )

    def _rules(self, name: str, group: _Group, shared: _SharedParameters) -> list[Rule]:
        params = group.params
        bits = _Bits(start_bits=params.start_bits, target_bits=params.target_bits)
        if shared.quantize_weight_in_forward:
            bits = _Bits(start_bits=params.target_bits, target_bits=params.target_bits)
        mode: Mode | None = None
        if params.target_bits in SIGNS:
            require(
                shared.quantization_type == "symmetric",
                f"quantization_type must be 'symmetric' for {params.target_bits} bits, which are "
                "signs",
                shared.quantization_type,
            )
            mode = SIGNS[params.target_bits]
        # Quantization begins in the step after the one that completes the offset.
        begins = shared.schedule_offset + 1 if shared.schedule_offset else 0
        table = _table(bits, params.quantization_period, 1, shared.schedule_offset, begins)
        return [
            Rule(
                "*" if pattern == "*" else f"re:.*(?:{pattern}).*",
                modules=ALL_KINDS,
                start_bits=table[0],
                target_bits=params.target_bits,
                mode=mode,
                schedule=Timing(table=table),
            )
            for pattern in group.modules
        ]

    def _grid(
        self,
        groups: int,
        mode: Literal["symmetric", "asymmetric"],
        rounding: Literal["nearest", "stochastic"],
        mixed: _Mixed,
    ) -> dict[str, Any]:
        """Returns the fields of QuantSpec but the widths."""
        if groups > 1:
            self.changed.append(
                f"quantize_groups {groups}: matrices in which a group would begin inside an output "
                "feature and end in another are refused"
            )
        self.changed.append(
            f"the {mode} grid is moq's: "
            + (
                "codes in [-qmax, qmax], so that the largest weight is not clipped"
                if mode == "symmetric"
                else "2^b - 1 steps from smallest to largest weight, of which one is zero"
            )
        )
        blend_steps = 0
        if mixed.enabled:
            blend_steps = math.ceil(1 / mixed.quantize_change_ratio - 1e-9)
            self.changed.append(
                f"fp16_mixed_quantize: a weight fades into its grid over {blend_steps} steps after "
                "each drop of its own layer, and must have done so by the end of the training"
            )
        return {
            "granularity": "per_tensor" if groups == 1 else "per_group",
            "groups": 0 if groups == 1 else groups,
            "mode": mode,
            "rounding": rounding,
            "blend_steps": blend_steps,
        }

    def _sensitivity(self, eigenvalue: _Eigenvalue) -> SensitivityConfig:
        self.changed.append(
            "eigenvalue: optimizer.probe measures once, on batches that you give it, instead of at "
            "each switch: a layer's factor 1 + floor(4 s), which multiplies each count beside the "
            "2, is one for all its drops"
        )
        self.ignored.append(
            "eigenvalue.layer_name, stability, gas_boundary_resolution, verbose: layers are found, "
            "and nothing needs tuning"
        )
        return SensitivityConfig(
            measure="eigenvalue", tolerance=eigenvalue.tol, max_products=eigenvalue.max_iter
        )

    def _ignore_switches(self, verbose: bool, kernel: bool) -> None:
        if verbose:
            self.ignored.append("quantize_verbose: MoQOptimizer(verbose=…) decides")
        if kernel:
            self.ignored.append("quantizer_kernel: there is one way to quantize, and it is fast")


def _table(
    bits: _Bits, period: int, counts_per_step: int, offset: int, begins: int
) -> dict[int, int]:
    """Returns the widths of DeepSpeed by true steps.

    Args:
        bits: First and last width.
        period: Count of the first drop; each next one comes at twice the count.
        counts_per_step: What an optimizer step adds to the count.
        offset: Step at which the count begins.
        begins: Step after which weights are quantized at all.
    """
    require(
        bits.start_bits >= bits.target_bits,
        f"start_bits must be at least target_bits ({bits.target_bits})",
        bits.start_bits,
    )
    table = {0: UNQUANTIZED_BITS if begins else bits.start_bits}
    for drop in range(bits.start_bits - bits.target_bits + 1):
        step = begins
        if drop:
            step = offset + -(-period * 2 ** (drop - 1) // counts_per_step)
        table[step] = bits.start_bits - drop
    # Several drops of one step leave the last width; the offset may change nothing.
    falling: dict[int, int] = {}
    for step, width in table.items():
        if width not in falling.values():
            falling[step] = width
    return falling
