"""Which parameters of a model the configuration quantizes, and on which grid."""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from moq.caller_warning import warn_caller
from moq.config import MoQConfig, QuantSpec, Rule, Timing
from moq.input_grid import is_static
from moq.strict import suggestion

DEFAULT_RULE = "default"
# A module with one of these in its name belongs to the head, and so do the output embeddings that
# transformers models declare and a Linear that shares an embedding's weight.
HEAD_NAMES = frozenset({"lm_head", "embed_out", "classifier", "score", "qa_outputs", "cls"})
# Modules of one parent that inference multiplies as one matrix.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What wrappers of a module insert into the names of its parameters.
_WRAPPER_PARTS = ("_orig_mod", "_checkpoint_wrapped_module")
# What torch.nn.utils.parametrize makes of a parameter's name.
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)\.original$")


@dataclass(frozen=True)
class MatchedParameter:
    """A weight matrix and the grid that the rules give it.

    Attributes:
        name: First name of the parameter in the model; tied weights have others as well.
        parameter: The model's own parameter.
        spec: Its grid and widths.
        rule: Pattern of the rule that decided, or ``default``.
        block: Name of the block that it falls with.
        transposed: True for the storage [input features, output features] of Conv1D.
        timing: When its width falls, if the rule says so; None follows the configuration.
    """

    name: str
    parameter: nn.Parameter
    spec: QuantSpec
    rule: str
    block: str
    transposed: bool
    timing: Timing | None = None

    @property
    def in_features(self) -> int:
        """Number of input features, whatever the storage."""
        return int(self.parameter.shape[0 if self.transposed else 1])

    @property
    def out_features(self) -> int:
        """Number of output features, whatever the storage."""
        return int(self.parameter.shape[1 if self.transposed else 0])

    @property
    def granularity(self) -> str:
        """Which weights share a scale, `groups` per matrix resolved: may be ``per_rows`` then."""
        return self._grouping[0]

    @property
    def group_size(self) -> int:
        """Input features per scale (``per_group``), output features (``per_rows``), or 0."""
        return self._grouping[1]

    @property
    def _grouping(self) -> tuple[str, int]:
        groups, rows = self.spec.groups, self.out_features
        if groups == 0:
            return self.spec.granularity, self.spec.group_size
        if groups == 1:
            return "per_tensor", 0
        if groups == rows:
            return "per_channel", 0
        if rows % groups == 0:
            return "per_rows", rows // groups
        return "per_group", self.in_features // max(1, groups // rows)

    def groups(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns a weight of this parameter's shape as [groups, elements that share a scale]."""
        matrix = weight.t() if self.transposed else weight
        granularity, size = self._grouping
        count = {
            "per_tensor": 1,
            "per_channel": self.out_features,
            "per_group": self.out_features * (self.in_features // max(size, 1)),
            "per_rows": self.out_features // max(size, 1),
        }[granularity]
        return matrix.reshape(count, matrix.numel() // max(count, 1))

    @property
    def can_have_groups(self) -> bool:
        """Says whether `groups` per matrix are whole output features or divide one."""
        groups, rows = self.spec.groups, self.out_features
        if groups == 0 or rows % groups == 0:
            return True
        return rows > 0 and groups % rows == 0 and self.in_features % (groups // rows) == 0


@dataclass(frozen=True)
class _Candidate:
    """A module that owns a weight matrix, under one of its names."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    kind: str


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module inside DistributedDataParallel, DataParallel and torch.compile."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif inner := next(
            (model._modules[p] for p in _WRAPPER_PARTS if p in model._modules), None
        ):
            model = inner
        else:
            return model


def plain_name(name: str) -> str:
    """Removes what torch.compile, activation checkpointing and parametrizations put into names."""
    name = _PARAMETRIZED.sub(r"\1\2", name)
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """Returns the parameter ``weight`` of a module, also one that moq simulates in the forward."""
    weight = module._parameters.get("weight")
    if weight is None and parametrize.is_parametrized(module, "weight"):
        chain: Any = module.parametrizations["weight"]  # type: ignore[index]
        if any(getattr(step, "is_weight_simulator", False) for step in chain):
            original: nn.Parameter = chain.original
            return original
    return weight


def match_parameters(
    model: nn.Module, config: MoQConfig, held: Iterable[torch.Tensor]
) -> tuple[list[MatchedParameter], list[str]]:
    """Applies the rules of `config` to `model`.

    Args:
        model: The model, unwrapped.
        config: The configuration.
        held: The parameters of the optimizer; only these can be quantized.

    Returns:
        The quantized parameters in the order of the model, and the names of the parameters that
        match but that the optimizer does not hold.

    Raises:
        ValueError: if a rule matches nothing, siblings disagree, or a weight cannot be quantized;
            the message names it.
    """
    candidates = list(_candidates(model))
    for index, rule in enumerate(config.rules):
        _require_match(index, rule, candidates, model)
    aliases: dict[int, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        aliases[id(candidate.parameter)].append(candidate)

    held_ids = {id(parameter) for parameter in held}
    matched, unheld = [], []
    for names in aliases.values():
        decided = _decide(names, config)
        if decided is None:
            continue
        if id(names[0].parameter) in held_ids:
            _require_one_input(names, *decided[:2])
            matched.append(_checked(names[0], *decided, config))
        else:
            unheld.append(f"{names[0].name}.weight")
    _require_equal_siblings(candidates, matched)
    _require_distinct_storage(matched)
    return matched, unheld


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """Yields every module with a weight matrix, under every name that it has."""
    modules = [
        (plain_name(name), module) for name, module in model.named_modules(remove_duplicate=False)
    ]
    embeddings = {id(own_weight(m)) for _, m in modules if isinstance(m, nn.Embedding)} - {id(None)}
    declared = getattr(model, "get_output_embeddings", None)
    output = declared() if callable(declared) else None
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    for name, module in modules:
        weight = own_weight(module)
        if weight is None:
            continue
        if isinstance(module, nn.Embedding):
            kind = "embedding"
        elif isinstance(module, nn.Linear | conv1d if conv1d else nn.Linear):
            is_head = (
                module is output
                or id(weight) in embeddings
                or not HEAD_NAMES.isdisjoint(name.split("."))
            )
            kind = "head" if is_head else "linear" if isinstance(module, nn.Linear) else "conv1d"
        else:
            continue
        yield _Candidate(name, module, weight, kind)


def _is_exact(rule: Rule) -> bool:
    return not rule.match.startswith("re:") and not any(c in rule.match for c in "*?[")


def _fits(rule: Rule, name: str) -> bool:
    """Says whether the pattern of `rule` matches a module's name."""
    if rule.match.startswith("re:"):
        return re.fullmatch(rule.match.removeprefix("re:"), name) is not None
    if _is_exact(rule):
        return rule.match in (name, f"{name}.weight")
    return fnmatch.fnmatchcase(name, rule.match)


def _applies(rule: Rule, candidate: _Candidate) -> bool:
    return _fits(rule, candidate.name) and (_is_exact(rule) or candidate.kind in rule.modules)


def _require_match(index: int, rule: Rule, candidates: list[_Candidate], model: nn.Module) -> None:
    """Refuses a rule without effect, saying what it came nearest to."""
    if any(_applies(rule, candidate) for candidate in candidates):
        return
    where = f"rules[{index}] ({rule.match!r}) matches nothing"
    kinds = sorted({c.kind for c in candidates if _fits(rule, c.name)})
    if kinds:
        raise ValueError(
            f"{where} of kind {', '.join(rule.modules)}; what it matches is of kind "
            f"{', '.join(kinds)}: add modules={tuple(kinds)} to the rule"
        )
    for name, module in model.named_modules():
        if name and _fits(rule, plain_name(name)):
            raise ValueError(
                f"{where} with a weight matrix: {name} is a {type(module).__name__}, and Linear, "
                "Conv1D and Embedding can be quantized"
            )
    raise ValueError(f"{where}{_nearest(rule, candidates)}")


def _nearest(rule: Rule, candidates: Sequence[_Candidate]) -> str:
    """Names the pattern nearest to that of `rule` that would match, or some of the modules."""
    names = [candidate.name for candidate in candidates]
    if _is_exact(rule) and "." in rule.match and (near := suggestion(rule.match, names)):
        return near
    parts = sorted({part for name in names for part in name.split(".") if not part.isdecimal()})
    stem = rule.match.removeprefix("re:").removesuffix(".weight")
    last = (re.findall(r"\w+", stem) or [""])[-1]
    for near in difflib.get_close_matches(last, parts, n=3, cutoff=0.5):
        head, _, tail = rule.match.rpartition(last)
        for pattern in (f"{head}{near}{tail}", f"*.{near}", f"*{near}*"):
            with suppress(ValueError):  # for a broken regular expression
                tried = replace(rule, match=pattern)
                if any(_applies(tried, candidate) for candidate in candidates):
                    return f" (did you mean {pattern!r}?)"
    if not names:
        return ": the model has no module with a weight matrix"
    more = ", …" if names[3:] else ""
    return f"; the {len(names)} modules with a weight matrix are {', '.join(names[:3])}{more}"


def _deciding(names: list[_Candidate], config: MoQConfig) -> int | None:
    """Returns the number of the last rule that matches a parameter, or None."""
    matching = (
        index
        for index, rule in enumerate(config.rules)
        if any(_applies(rule, candidate) for candidate in names)
    )
    return max(matching, default=None)


def warn_of_overruled(model: nn.Module, config: MoQConfig) -> None:
    """Warns of rules that stand before one that matches all that they match: it decides alone.

    Rules that exclude, and a rule for everything, are defaults that others may well replace.
    """
    candidates = list(_candidates(model))
    reach = [{c.name for c in candidates if _applies(rule, c)} for rule in config.rules]
    for index, rule in enumerate(config.rules):
        if rule.exclude or rule.match == "*":
            continue
        for later in range(index + 1, len(reach)):
            if reach[index] <= reach[later]:
                where = f"rules[{later}] ({config.rules[later].match!r})"
                warn_caller(
                    f"rules[{index}] ({rule.match!r}) decides nothing: {where} matches all that it "
                    "matches, and the last rule that matches a module decides alone. Put it "
                    f"behind rules[{later}], or its values into that rule"
                )
                break


def _decide(
    names: list[_Candidate], config: MoQConfig
) -> tuple[QuantSpec, str, Timing | None] | None:
    """Returns the spec of a parameter, the rule behind it and that rule's schedule.

    None: it is not quantized.
    """
    index = _deciding(names, config)
    if index is not None:
        rule = config.rules[index]
        return None if rule.exclude else (config.spec(rule), rule.match, rule.schedule)
    if all(candidate.kind in ("linear", "conv1d") for candidate in names):
        return config.spec(), DEFAULT_RULE, None
    return None


def _checked(
    candidate: _Candidate, spec: QuantSpec, rule: str, timing: Timing | None, config: MoQConfig
) -> MatchedParameter:
    """Builds the result, refusing a weight that has no grid.

    Raises:
        ValueError: naming the parameter and what it must be.
    """
    parameter = candidate.parameter
    found = re.search(config.block_pattern, candidate.name)
    matched = MatchedParameter(
        name=f"{candidate.name}.weight" if candidate.name else "weight",
        parameter=parameter,
        spec=spec,
        rule=rule,
        block=found.group() if found else candidate.name,
        transposed=not isinstance(candidate.module, nn.Linear | nn.Embedding),
        timing=timing,
    )

    def require(condition: bool, what: str, got: object) -> None:
        if not condition:
            raise ValueError(f"{matched.name} (rule {rule!r}): {what}, got {got}")

    require(parameter.dim() == 2, "a weight matrix must have 2 dimensions", parameter.dim())
    require(parameter.dtype in DTYPES, "must be float32, bfloat16 or float16", parameter.dtype)
    require(
        parameter.device.type in ("cpu", "cuda"),
        "must be on the CPU or a CUDA device before the optimizer is wrapped",
        parameter.device,
    )
    require(
        not getattr(candidate.module, "sparse", False),
        "an embedding with sparse gradients cannot be quantized (the masters take dense ones): "
        "sparse must be False, or exclude it by a rule",
        "sparse=True",
    )
    require(
        spec.activations == "none" or candidate.kind != "embedding",
        "activations must be 'none': an embedding reads token ids",
        repr(spec.activations),
    )
    require(
        spec.activations == "none"
        or not isinstance(candidate.module, NonDynamicallyQuantizableLinear),
        "activations must be 'none': its owner, as MultiheadAttention, reads the weight and never "
        "calls the layer, whose inputs nobody could round",
        repr(spec.activations),
    )
    require(
        matched.can_have_groups,
        f"groups must divide its {matched.out_features} output features, or be a multiple of them "
        f"whose quotient divides its {matched.in_features} input features: no checkpoint has a "
        "place for scales that begin inside an output feature and end in another",
        spec.groups,
    )
    if spec.granularity == "per_group" and spec.groups == 0:
        require(
            matched.in_features % spec.group_size == 0,
            f"group_size must divide its {matched.in_features} input features",
            spec.group_size,
        )
    return matched


def _require_one_input(names: list[_Candidate], spec: QuantSpec, rule: str) -> None:
    """Refuses a static scale for the inputs of several modules: a weight is exported with one.

    Raises:
        ValueError: naming two of them.
    """
    modules = list({id(c.module): c.name for c in names if c.kind != "embedding"}.values())
    if is_static(spec.activations) and len(modules) > 1:
        raise ValueError(
            f"{modules[0]}.weight (rule {rule!r}): activations must not be {spec.activations!r}: "
            f"{modules[1]} has the same weight and inputs of its own, and a weight is exported "
            "with one scale; 'dynamic' needs none"
        )


def _require_equal_siblings(candidates: list[_Candidate], matched: list[MatchedParameter]) -> None:
    """Refuses siblings that do not share one spec and one block: inference fuses them.

    Raises:
        ValueError: naming the siblings and the rule of each.
    """
    by_parameter = {id(m.parameter): m for m in matched}
    by_name = {c.name: by_parameter.get(id(c.parameter)) for c in candidates}
    parents = dict.fromkeys(name.rpartition(".")[0] for name in by_name)
    for parent in parents:
        prefix = f"{parent}." if parent else ""
        for family in SIBLINGS:
            present = {part: by_name[prefix + part] for part in family if prefix + part in by_name}
            # A schedule may hold a table, which cannot be hashed.
            if len({repr((m.spec, m.block, m.timing)) if m else "" for m in present.values()}) <= 1:
                continue
            raise ValueError(
                f"{parent}: {', '.join(present)} are one matrix at inference and must share one "
                f"spec, got {_differences(present)}; write one rule that matches all of them"
            )


def _differences(siblings: Mapping[str, MatchedParameter | None]) -> str:
    """Says of every sibling which rule it has, and the values that differ from another's."""
    values = {
        part: m.spec.to_dict() | {"block": m.block, "schedule": m.timing and _given(m.timing)}
        for part, m in siblings.items()
        if m
    }
    every = list(values.values())
    keys = [key for key in every[0] if any(other[key] != every[0][key] for other in every)]
    words = []
    for part, m in siblings.items():
        own = "".join(f", {key} {values[part][key]!r}" for key in keys) if m else ""
        words.append(f"{part}: rule {m.rule!r}{own}" if m else f"{part}: not quantized")
    return "; ".join(words)


def _given(timing: Timing) -> dict[str, Any]:
    """The values of a rule's schedule that are not the usual ones."""
    usual = {field.name: field.default for field in fields(Timing)}
    return {key: value for key, value in timing.to_dict().items() if value != usual[key]}


def _require_distinct_storage(matched: list[MatchedParameter]) -> None:
    """Refuses two parameters over the same memory: each would overwrite the other's values.

    Raises:
        ValueError: naming both.
    """
    owners: dict[tuple[torch.device, int], str] = {}
    for m in matched:
        local = getattr(m.parameter, "_local_tensor", m.parameter)
        if local.numel() == 0:
            continue
        owner = owners.setdefault((local.device, local.data_ptr()), m.name)
        if owner != m.name:
            raise ValueError(
                f"{owner} and {m.name} must not be two Parameters over one memory: tie them by "
                "assigning one Parameter object to both modules"
            )
