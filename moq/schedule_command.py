"""`moq schedule`: when every layer reaches every bit width, and which widths a budget allows."""

from __future__ import annotations

import argparse
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from moq._C import Schedule
from moq.config import MoQConfig, OnUnfinished
from moq.deepspeed import convert
from moq.outlook import (
    BlockOutlook,
    empty_model,
    model_outlook,
    outlook_of,
    rules_outlook,
    run_outlook,
    schedule_of_run,
    steps_of_run,
)
from moq.schedule import extent_of, plot, print_table
from moq.target_bits import Objective

_EXAMPLES = """examples:
  moq schedule moq.json --steps 10000
  moq schedule moq.json --steps 10000 --model out/bert --plot plan.svg
  moq schedule ds_config.json --deepspeed --steps 10000
  moq schedule --run out/run
  moq schedule --run out/run --budget mean_bits=6 --plot front.svg"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `moq schedule`."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "config",
        nargs="?",
        help="configuration file (.json, .yaml), as MoQOptimizer takes it; may be left out with "
        "--run: then that training's own counts",
    )
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of the training (with --run: as many as it has)"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        metavar="DIR",
        help="Hugging Face model directory (its config.json is enough): plan its own layers; "
        "without it each rule of the configuration is planned for a layer that it matches",
    )
    model.add_argument(
        "--run",
        metavar="RUN",
        help="a saved training (optimizer.save): its own plan, or with CONFIG the one of its "
        "model's layers with the sensitivities that it measured",
    )
    parser.add_argument(
        "--deepspeed",
        action="store_true",
        help="the file is DeepSpeed's (quantize_training or compression_training): read it in true "
        "steps, and list what moq does in another way",
    )
    parser.add_argument(
        "--on-unfinished",
        choices=typing.get_args(OnUnfinished),
        help="what to do about layers that would not reach their target: instead of what CONFIG "
        "says; with --deepspeed 'allow', which ends as DeepSpeed does",
    )
    budget = parser.add_argument_group("target widths under a budget, from a saved run")
    budget.add_argument(
        "--budget",
        metavar="KIND=N",
        help="mean_bits=6, bytes=90MB or latency=12ms: choose the last width of each layer of "
        "--run with the least expected loss (mean eigenvalue * squared rounding error), and print "
        "the Pareto front; with CONFIG the plan with these widths too",
    )
    budget.add_argument(
        "--widths", metavar="BITS", help="widths that are offered (4,8,16)", default="4,8,16"
    )
    budget.add_argument(
        "--objective",
        choices=typing.get_args(Objective),
        default="mean_eigenvalue",
        help="what a squared rounding error is weighed by: the mean eigenvalue of its layer, by "
        "which the sum is the expected increase of the loss (default), or its trace",
    )
    budget.add_argument(
        "--latency-table",
        metavar="FILE",
        help="for latency: what moq bench DIR --json printed for one directory per width",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the plan, or with --budget the front, to a .png or .svg file",
    )
    parser.set_defaults(usage_error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Runs `moq schedule`; a schedule that cannot finish is an error with the remedy."""
    _require_usable(options)
    if options.config is None and options.budget is None:
        schedule = schedule_of_run(options.run, options.steps, options.on_unfinished)
        facts, outlook = _facts_of(schedule), outlook_of(schedule)
        _show(options, outlook, facts, extent_of(schedule))
        return 0
    config = _configuration(options)
    if options.steps is None and options.run is not None:
        options.steps = steps_of_run(options.run)
    if options.budget is not None:
        return _run_budget(options, None if options.config is None else config)
    if options.run is not None:
        outlook = run_outlook(config, options.steps, options.run)
    elif options.model is None:
        outlook = rules_outlook(config, options.steps)
    else:
        outlook = model_outlook(config, options.steps, empty_model(options.model))
    _show(options, outlook, _facts(config, options.steps), _extent(config, options.steps))
    return 0


def _show(
    options: argparse.Namespace,
    outlook: Sequence[BlockOutlook],
    facts: Mapping[str, Any],
    extent: str,
) -> None:
    """Prints a plan, and draws it if that was asked for."""
    if options.json:
        print(json.dumps(_as_json(outlook, facts)))
    else:
        print_table(outlook, extent)
    # Last: without matplotlib the plan is printed all the same.
    if options.plot is not None:
        plot(outlook, facts["total_steps"], options.plot)


def _configuration(options: argparse.Namespace) -> MoQConfig:
    """Reads the configuration, and says what becomes of DeepSpeed's."""
    if options.deepspeed:
        conversion = convert(options.config, on_unfinished=options.on_unfinished or "allow")
        print(conversion, file=sys.stderr)
        return conversion.config
    config = MoQConfig.load(options.config)
    if options.on_unfinished is None:
        return config
    section = replace(config.schedule, on_unfinished=options.on_unfinished)
    return replace(config, schedule=section)


def _require_usable(options: argparse.Namespace) -> None:
    """Ends the program over options that say too little or too much together."""
    if options.budget is None:
        if options.run is None and (options.config is None or options.steps is None):
            options.usage_error("CONFIG and --steps are needed to plan (without --run)")
        if options.latency_table is not None:
            options.usage_error("--latency-table needs --budget latency=N")
    elif options.run is None:
        options.usage_error("--budget needs --run RUN, whose layers were measured")
    if options.config is None and options.deepspeed:
        options.usage_error("--deepspeed needs a CONFIG")
    if options.config is None and options.budget is not None and options.steps is not None:
        options.usage_error("--steps with --budget needs a CONFIG")


def _run_budget(options: argparse.Namespace, config: MoQConfig | None) -> int:
    """Chooses target widths, and plans with them if there are a configuration and steps."""
    from moq.budget import Budget, require_table
    from moq.budget_command import choose_for_run, parse_widths
    from moq.target_bits import require_widths

    budget = Budget.parse(options.budget)
    choice = choose_for_run(
        options.run,
        budget,
        config=config,
        table=require_table(budget, options.latency_table),
        widths=require_widths(parse_widths(options.widths)),
        objective=options.objective,
    )
    plan: dict[str, Any] | None = None
    outlook: list[BlockOutlook] = []
    if config is not None and options.steps is not None:
        outlook = run_outlook(config, options.steps, options.run, choice.target_bits)
        plan = _as_json(outlook, _facts(config, options.steps))
    if options.json:
        print(json.dumps(choice.to_dict() | {"plan": plan}))
    else:
        print(choice)
        if plan is not None:
            print_table(outlook, f"of {options.steps} steps")
    if options.plot is not None:
        choice.plot(options.plot)
    return 0


def _extent(config: MoQConfig, total_steps: int) -> str:
    finish_at = config.schedule.finish_at
    if finish_at is None or any(rule.schedule for rule in config.rules):
        return f"of {total_steps} steps"
    return f"of {total_steps} steps, all at their target by {100 * finish_at:g} %"


def _facts(config: MoQConfig, total_steps: int) -> dict[str, Any]:
    """What holds for all blocks of a plan."""
    return {
        "total_steps": total_steps,
        "finish_at": config.schedule.finish_at,
        "on_unfinished": config.schedule.on_unfinished,
        "sensitivity_rule": config.sensitivity.rule,
    }


def _facts_of(schedule: Schedule) -> dict[str, Any]:
    """The same of a schedule whose configuration is gone; finish_at if all blocks have one."""
    state = schedule.state_dict()
    shares = {block.get("finish_at") for block in state["blocks"]}
    return {
        "total_steps": schedule.total_steps,
        "finish_at": shares.pop() if len(shares) == 1 else None,
        "on_unfinished": state["on_unfinished"],
        "sensitivity_rule": state["stretch_rule"],
    }


def _as_json(outlook: Sequence[BlockOutlook], facts: Mapping[str, Any]) -> dict[str, Any]:
    return dict(facts) | {"blocks": [asdict(block) for block in outlook]}
