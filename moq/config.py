"""What is quantized, how, and when: the configuration of MoQOptimizer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moq.caller_warning import warn_caller
from moq.config_file import read_file
from moq.input_grid import Kind
from moq.strict import Strict, require

Mode = Literal["symmetric", "asymmetric", "ternary", "binary"]
Granularity = Literal["per_tensor", "per_channel", "per_group"]
Rounding = Literal["nearest", "stochastic"]
Scale = Literal["absmax", "mse", "learned"]
Activations = Literal["none", Kind]
OnUnfinished = Literal["error", "clamp", "allow"]
ModuleKind = Literal["linear", "conv1d", "embedding", "head"]
MIN_BITS, MAX_BITS = 1, 16
MAX_STEPS = 2**40
MAX_COUNTS = 2**20
#: Where the modes end that are made of signs: ternary codes take 2 bits, binary ones 1.
SIGN_BITS = {"ternary": 2, "binary": 1}
#: Finds the transformer layer in the name of a module or parameter, as ``model.layers.3`` or
#: ``bert.encoder.layer.0``: the shortest prefix that ends with the number of an entry of a list.
BLOCK_PATTERN = r"^(?:.*?\.)?\d+(?=\.|$)"


@dataclass(frozen=True, kw_only=True)
class QuantSpec(Strict):
    """The grid of one weight matrix and the widths it passes through.

    Attributes:
        start_bits: Width at the first step, at most 16.
        target_bits: Width at the end, 2 to start_bits; 2 for ``ternary``, 1 for ``binary``.
        mode: ``symmetric`` (zero point 0, codes in [-qmax, qmax]), ``asymmetric``, ``ternary`` or
            ``binary``. The last two are symmetric down to 3 bits, then both {-a, 0, a} with a the
            mean of the magnitudes above 0.7 times their mean; ``binary`` goes on to 1 bit, {-a, a}
            with a the mean magnitude (an exact 0 stays 0).
        granularity: Which weights share a scale: ``per_tensor``, ``per_channel`` (one scale per
            output feature) or ``per_group`` (`group_size` consecutive input features, or `groups`
            scales a matrix).
        group_size: Input features per scale, for ``per_group`` only (otherwise 0); divides the
            number of input features.
        groups: Scales per matrix instead, as DeepSpeed's quantize_groups: each for as many
            consecutive weights, counted along the output features. Whole output features must
            share a scale, or scales divide one: other counts are refused.
        scale: ``absmax`` (from the largest and smallest weight) or ``mse``: the same, clipped to
            the ratio among 1, 31/32 ... 9/32 with the least squared error. It costs 24 passes over
            the weights a step. Signs have means instead. ``learned``: trained along with the
            weights (LSQ, symmetric and nearest only, with simulate ``autograd``).
        rounding: ``nearest`` (half to even) or ``stochastic`` (the same draws on every device,
            rank and sharding).
        activations: How the layer reads its input in training and when it is served: ``none`` (as
            it is), or rounded to INT8: ``dynamic`` (a symmetric grid for each token), ``static``
            (one, from what the observer saw), ``dynamic_asymmetric`` or ``static_asymmetric`` (with
            zero points: for inputs that are not centred, as those behind a ReLU or GELU).
        blend_steps: Steps over which the weight fades from full precision to the grid after each
            drop: r * w + (1 - r) * Q(w), r falling from 1 to 0. 0: at once.
    """

    start_bits: int = 16
    target_bits: int = 8
    mode: Mode = "symmetric"
    granularity: Granularity = "per_channel"
    group_size: int = 0
    groups: int = 0
    scale: Scale = "absmax"
    rounding: Rounding = "nearest"
    activations: Activations = "none"
    blend_steps: int = 0

    def validate(self) -> None:
        """Refuses widths, group sizes and blends that no grid has.

        Raises:
            ValueError: naming the field, its range and the value.
        """
        least = SIGN_BITS.get(self.mode, 2)
        bounds = f"must lie in [{least}, {MAX_BITS}]"
        for name in ("start_bits", "target_bits"):
            bits = getattr(self, name)
            binary = " unless mode is 'binary'" if bits == 1 else ""
            require(least <= bits <= MAX_BITS, f"{name} {bounds}{binary}", bits)
        require(
            self.start_bits >= self.target_bits,
            f"start_bits must be at least target_bits ({self.target_bits})",
            self.start_bits,
        )
        if self.scale == "learned":
            require(
                self.mode == "symmetric" and self.rounding == "nearest",
                "scale must be 'absmax' or 'mse' unless mode is 'symmetric' and rounding 'nearest'",
                self.scale,
            )
        if self.mode in SIGN_BITS:
            require(
                self.target_bits == least,
                f"target_bits must be {least} when mode is {self.mode!r}",
                self.target_bits,
            )
            require(
                self.rounding == "nearest",
                f"rounding must be 'nearest' when mode is {self.mode!r}, whose codes are signs",
                self.rounding,
            )
        self._validate_groups()
        require(self.blend_steps >= 0, "blend_steps must be at least 0", self.blend_steps)

    def _validate_groups(self) -> None:
        if self.granularity != "per_group":
            for name in ("group_size", "groups"):
                require(
                    getattr(self, name) == 0,
                    f"{name} must be 0 unless granularity is 'per_group' (it is "
                    f"{self.granularity!r})",
                    getattr(self, name),
                )
            return
        require(self.groups >= 0, "groups must be at least 1, or 0 beside group_size", self.groups)
        require(
            self.groups == 0 or self.group_size == 0,
            "group_size must be 0 when groups says how many scales there are",
            self.group_size,
        )
        require(
            self.group_size >= 1 or self.groups > 0,
            "group_size must be at least 1 when granularity is 'per_group' (or give groups)",
            self.group_size,
        )


@dataclass(frozen=True, kw_only=True)
class Timing(Strict):
    """When widths fall; time is completed optimizer steps and nothing else.

    Three shapes, of which one is given: `finish_at`, `period` with `offset`, or `table`. Residence
    times grow by the factor `growth` from width to width in the first two.

    Attributes:
        finish_at: Share of total_steps, in (0, 1], at which the slowest layer arrives exactly: of
            all layers with the same finish_at.
        period: Steps at start_bits.
        offset: Steps at start_bits before the first period begins.
        growth: Factor between the residence times of two consecutive widths, in [1, 16].
        table: {step: bits}, first entry at step 0 with start_bits, last one with target_bits.
        counts_per_step: Makes `period` a count, as DeepSpeed with eigenvalues has it: from the
            offset on a counter grows by so many a step, the width falls when it reaches `period`,
            and each next time at `growth` times the count before; a sensitivity multiplies each of
            these counts but the first.
    """

    finish_at: float | None = None
    period: int | None = None
    offset: int = 0
    growth: float = 2.0
    table: dict[int, int] | None = None
    counts_per_step: int | None = None

    def validate(self) -> None:
        """Refuses mixed shapes and values out of range.

        Raises:
            ValueError: naming the field.
        """
        shapes = [
            name for name in ("finish_at", "period", "table") if getattr(self, name) is not None
        ]
        require(
            len(shapes) == 1, "finish_at, period and table exclude each other: give one", shapes
        )
        if self.finish_at is not None:
            require(0 < self.finish_at <= 1, "finish_at must lie in (0, 1]", self.finish_at)
        if self.period is not None:
            require(
                1 <= self.period <= MAX_STEPS, "period must lie in [1, 2^40] steps", self.period
            )
        require(0 <= self.offset <= MAX_STEPS, "offset must lie in [0, 2^40] steps", self.offset)
        require(
            self.offset == 0 or self.period is not None,
            "offset must be 0 unless period is given",
            self.offset,
        )
        require(1 <= self.growth <= 16, "growth must lie in [1, 16]", self.growth)
        if self.counts_per_step is not None:
            require(
                self.period is not None,
                "counts_per_step must be left out unless period is given",
                self.counts_per_step,
            )
            require(
                1 <= self.counts_per_step <= MAX_COUNTS,
                "counts_per_step must lie in [1, 2^20]",
                self.counts_per_step,
            )
        if self.table is not None:
            self._validate_table(self.table)

    @staticmethod
    def _validate_table(table: dict[int, int]) -> None:
        steps = sorted(table)
        require(bool(steps) and steps[0] == 0, "table must begin at step 0", steps)
        require(steps[-1] <= MAX_STEPS, "table must end by step 2^40", steps[-1])
        widths = [table[step] for step in steps]
        require(
            all(MIN_BITS <= bits <= MAX_BITS for bits in widths),
            f"table must hold widths in [{MIN_BITS}, {MAX_BITS}]",
            widths,
        )
        require(
            all(a > b for a, b in zip(widths, widths[1:], strict=False)),
            "table must fall strictly from step to step",
            widths,
        )

    def require_ends(self, spec: QuantSpec) -> None:
        """Refuses a table that begins or ends at other widths than the layers that follow it.

        Raises:
            ValueError: naming the field of the spec.
        """
        if self.table is not None:
            steps = sorted(self.table)
            for name, bits in (
                ("start_bits", self.table[steps[0]]),
                ("target_bits", self.table[steps[-1]]),
            ):
                require(
                    getattr(spec, name) == bits,
                    f"{name} must be the {bits} bits of schedule.table",
                    getattr(spec, name),
                )


@dataclass(frozen=True, kw_only=True)
class Rule(Strict):
    """Which modules deviate from the configuration's own values, and how.

    Attributes:
        match: Exact module name (``model.layers.0.mlp.up_proj``; with ``.weight`` it means the
            same), glob (``*.mlp.*``) or ``re:`` and a regular expression that the whole name must
            match. Names are those of ``model.named_modules()``.
        modules: Kinds of modules that a glob or regular expression reaches: ``linear``,
            ``conv1d`` (transformers' Conv1D), ``embedding``, ``head`` (the last linear layer). An
            exact name reaches any of them.
        exclude: True keeps the modules in full precision.
        start_bits, target_bits, mode, granularity, group_size, groups, scale, rounding,
            activations, blend_steps: As in QuantSpec; None takes the configuration's own value. A
            rule that sets `mode` to ternary or binary alone also ends at its width.
        schedule: When these modules' widths fall, instead of the configuration's own schedule.
    """

    match: str = field(kw_only=False)
    modules: tuple[ModuleKind, ...] = ("linear", "conv1d")
    exclude: bool = False
    start_bits: int | None = None
    target_bits: int | None = None
    mode: Mode | None = None
    granularity: Granularity | None = None
    group_size: int | None = None
    groups: int | None = None
    scale: Scale | None = None
    rounding: Rounding | None = None
    activations: Activations | None = None
    blend_steps: int | None = None
    schedule: Timing | None = None

    def validate(self) -> None:
        """Refuses an empty pattern and values beside `exclude`.

        Raises:
            ValueError: naming the field.
        """
        require(bool(self.match), "match must name a module or hold a pattern", self.match)
        if self.match.startswith("re:"):
            try:
                re.compile(self.match.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"match must be a regular expression: {error}") from None
        require(bool(self.modules), "modules must name at least one kind", self.modules)
        given = [
            name for name in (*QuantSpec.keys(), "schedule") if getattr(self, name) is not None
        ]
        require(
            not (self.exclude and given),
            "exclude must be false when the rule sets other values",
            given,
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Timing):
    """When the widths of all layers fall for which no rule says otherwise; Timing has the shapes.

    Without a shape it is `finish_at` 0.6. A rule with narrower bounds of its own keeps to the part
    of `table` within them; one with wider bounds is refused unless it has a schedule of its own.

    Attributes:
        on_unfinished: What to do about a layer that would not reach its target by total_steps:
            ``error`` (before training, with the smallest change that helps), ``clamp`` or
            ``allow``. It holds for the schedules of rules too.
    """

    on_unfinished: OnUnfinished = "error"

    def __post_init__(self) -> None:
        """Fills in the default shape, then checks."""
        if self.finish_at is None and self.period is None and self.table is None:
            object.__setattr__(self, "finish_at", 0.6)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig(Strict):
    """How second-order sensitivity is measured by MoQOptimizer.probe and what it does.

    Attributes:
        measure: ``trace`` (Hutchinson, all blocks from one product), ``eigenvalue`` (of largest
            magnitude, by Lanczos: products for each block) or ``both``, where the trace decides.
        form: What stands for the curvature, as in moq.sensitivity.measure: ``auto``, ``exact``,
            ``finite_difference``, ``gauss_newton`` or ``fisher``.
        rule: How a normalised sensitivity s stretches the residence times of a block:
            ``stepped`` 1 + floor(4 s), ``linear`` 1 + 4 s, ``none`` not at all.
        tolerance: Accuracy at which measuring stops; None takes that of moq.sensitivity.measure.
        max_products: Bound on Hessian-vector products, over all batches for the trace, per block
            and batch for the eigenvalue; None likewise.
        max_cost: Share of the training's time that all measurements may take together, in (0, 1]:
            batches and products are fewer and measurements rarer if they must be. None: any.
    """

    measure: Literal["trace", "eigenvalue", "both"] = "trace"
    form: Literal["auto", "exact", "finite_difference", "gauss_newton", "fisher"] = "auto"
    rule: Literal["stepped", "linear", "none"] = "stepped"
    tolerance: float | None = None
    max_products: int | None = None
    max_cost: float | None = 0.02

    def validate(self) -> None:
        """Refuses a tolerance or a share outside (0, 1) and bounds below 1.

        Raises:
            ValueError: naming the field.
        """
        if self.tolerance is not None:
            require(0 < self.tolerance < 1, "tolerance must lie in (0, 1)", self.tolerance)
        if self.max_products is not None:
            require(self.max_products >= 1, "max_products must be at least 1", self.max_products)
        if self.max_cost is not None:
            require(0 < self.max_cost <= 1, "max_cost must lie in (0, 1]", self.max_cost)


@dataclass(frozen=True, kw_only=True)
class ObserverConfig(Strict):
    """How the grids of static activations follow the magnitudes that training sees.

    Attributes:
        momentum: Weight of the past in the moving average of a step's largest magnitude (over all
            its micro-batches and ranks; of an asymmetric grid those below and above 0), in [0, 1).
        freeze_at: Share of total_steps, in (0, 1], after which the scales stay as they are.
    """

    momentum: float = 0.9
    freeze_at: float = 0.5

    def validate(self) -> None:
        """Refuses values out of range.

        Raises:
            ValueError: naming the field.
        """
        require(0 <= self.momentum < 1, "momentum must lie in [0, 1)", self.momentum)
        require(0 < self.freeze_at <= 1, "freeze_at must lie in (0, 1]", self.freeze_at)


@dataclass(frozen=True, kw_only=True)
class MoQConfig(QuantSpec):
    """The whole configuration; every field has a default.

    The fields of QuantSpec, given here, hold for every Linear and Conv1D but the head. `rules`
    deviate from them, in order: the last rule that matches a module decides alone. What it leaves
    out is as given here, whatever earlier rules say.

    Attributes:
        rules: Deviations; each must match at least one module of the model.
        block_pattern: Regular expression; the part of a module's name that it finds names the
            block that falls and is measured together. The default finds transformer layers
            (``model.layers.3``); a module in which it finds nothing is a block of its own.
        schedule: When widths fall.
        sensitivity: How layers are compared.
        observer: How static grids of activations are found.
        seed: Key of stochastic rounding and of the sensitivity's random vectors, >= 0.
        master_dtype: Dtype of the full-precision values: ``float32``, or ``parameter`` for the
            model's own dtype (BF16 weights then hardly move at small learning rates).
        simulate: ``in_place`` (the simulated values are in the parameters, the masters beside them)
            or ``autograd`` (the parameters are the masters, and the forward pass computes the
            simulated values wherever it reads them; needed for learned scales).

    Example:
        >>> config = MoQConfig(target_bits=8, rules=[Rule("*.mlp.*", target_bits=6)])
        >>> config.spec(config.rules[0]).target_bits
        6
    """

    rules: tuple[Rule, ...] = ()
    block_pattern: str = BLOCK_PATTERN
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    observer: ObserverConfig = field(default_factory=ObserverConfig)
    seed: int = 0
    master_dtype: Literal["float32", "parameter"] = "float32"
    simulate: Literal["in_place", "autograd"] = "in_place"

    def validate(self) -> None:
        """Checks the values here, and each rule's together with those it inherits.

        Raises:
            ValueError: naming the field.
        """
        super().validate()
        for scale in (self.scale, *(rule.scale for rule in self.rules)):
            require(
                scale != "learned" or self.simulate == "autograd",
                "simulate must be 'autograd' for scales that are learned",
                self.simulate,
            )
        require(0 <= self.seed < 2**63, "seed must lie in [0, 2^63)", self.seed)
        self.schedule.require_ends(self)
        try:
            re.compile(self.block_pattern)
        except re.error as error:
            raise ValueError(f"block_pattern must be a regular expression: {error}") from None
        for index, rule in enumerate(self.rules):
            try:
                self._validate_rule(rule)
            except ValueError as error:
                raise ValueError(f"rules[{index}] ({rule.match!r}).{error}") from None

    def _validate_rule(self, rule: Rule) -> None:
        spec = self.spec(rule)
        if rule.schedule is not None:
            rule.schedule.require_ends(spec)
        elif self.schedule.table is not None:
            require(
                spec.start_bits <= self.start_bits,
                f"start_bits must be at most the {self.start_bits} bits that schedule.table begins "
                "with",
                spec.start_bits,
            )
            require(
                spec.target_bits >= self.target_bits,
                f"target_bits must be at least the {self.target_bits} bits that schedule.table "
                "ends with (give the table more steps, and the other layers rules that keep them "
                "above; or give the rule a schedule of its own)",
                spec.target_bits,
            )

    def spec(self, rule: Rule | None = None) -> QuantSpec:
        """Returns the configuration's own QuantSpec, or the one of a rule.

        Raises:
            ValueError: if the rule's values and the inherited ones contradict each other.
        """
        values = {name: getattr(self, name) for name in QuantSpec.keys()}
        if rule is not None:
            own = {name: getattr(rule, name) for name in values}
            values |= {name: value for name, value in own.items() if value is not None}
            for name, other in (("group_size", "groups"), ("groups", "group_size")):
                if own[name] is None and (
                    rule.granularity not in (None, "per_group") or own[other] is not None
                ):
                    values[name] = 0
            if rule.target_bits is None and rule.mode in SIGN_BITS:
                values["target_bits"] = SIGN_BITS[rule.mode]
            elif rule.target_bits is None and rule.start_bits is not None:
                values["target_bits"] = min(values["target_bits"], rule.start_bits)
        return QuantSpec(**values)

    @classmethod
    def load(
        cls, source: MoQConfig | Mapping[str, Any] | str | os.PathLike[str] | None
    ) -> MoQConfig:
        """Returns a configuration, whatever form it is given in.

        Args:
            source: A MoQConfig, a mapping, the path of a .json, .yaml or .yml file, or None for
                the defaults.

        Raises:
            TypeError: for another form or a wrong type inside.
            ValueError: for unknown keys, values out of range, or a file with another suffix.
            OSError: if the file cannot be read.
        """
        if source is None:
            return cls()
        if isinstance(source, MoQConfig):
            return source
        if isinstance(source, Mapping):
            return cls._from_mapping(source, "config")
        if isinstance(source, str | os.PathLike):
            return cls._from_mapping(read_file(Path(source)), str(Path(source).name))
        raise TypeError(f"config must be a MoQConfig, a mapping, a path or None, got {source!r}")

    @classmethod
    def _from_mapping(cls, data: Any, where: str) -> MoQConfig:
        theirs = {"quantize_training", "compression_training"}
        if isinstance(data, Mapping) and not theirs.isdisjoint(data):
            raise ValueError(
                f"{where} must hold the keys of moq, got a configuration of DeepSpeed: "
                "MoQConfig.from_deepspeed reads it (on the command line: --deepspeed)"
            )
        return cls.from_dict(data, where)

    @classmethod
    def from_deepspeed(
        cls,
        source: Mapping[str, Any] | str | os.PathLike[str],
        *,
        on_unfinished: OnUnfinished = "error",
    ) -> MoQConfig:
        """Returns a configuration of DeepSpeed as one of moq, with its schedule in true steps.

        Both spellings are read: ``quantize_training`` (DeepSpeed 0.4 to 0.6) and
        ``compression_training.weight_quantization`` (since 0.7). One warning lists what moq does in
        another way and which keys mean nothing to it; moq.deepspeed.convert returns these lists.

        Args:
            source: The whole configuration or a mapping with one of the two blocks, or its file.
            on_unfinished: As in ScheduleConfig. DeepSpeed ends at the width reached, ``allow``.

        Raises:
            TypeError: for a wrong type inside.
            ValueError: if MoQ is not enabled in exactly one spelling, for unknown keys inside its
                block and for values out of range.
        """
        from moq.deepspeed import convert

        conversion = convert(source, on_unfinished=on_unfinished)
        warn_caller(f"MoQConfig.from_deepspeed:\n{conversion}")
        return conversion.config
