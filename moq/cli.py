"""The `moq` command: one subcommand per thing a user does."""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import moq

# name -> (module with add_arguments(parser) and run(args) -> exit status, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "schedule": (
        "moq.schedule_command",
        "print the step at which every layer reaches every bit width",
    ),
    "report": ("moq.report_command", "make one HTML page about a saved training run"),
    "export": ("moq.export_command", "turn a saved training run into a checkpoint directory"),
    "inspect": ("moq.inspect", "show the bit map and the sizes of a checkpoint directory"),
    "verify": (
        "moq.verify",
        "check every byte of a checkpoint directory and replay its logit probe",
    ),
    "generate": ("moq.inference.generate", "generate text from a checkpoint directory"),
    "encode": ("moq.inference.encode", "sentence vectors and class predictions of texts"),
    "bench": ("moq.inference.bench", "measure the speed of a checkpoint directory on this machine"),
    "doctor": ("moq.doctor", "compare what this installation was built for with what it finds"),
}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Returns the parser; imports only the module of `command`, so that `moq --help` is fast."""
    parser = argparse.ArgumentParser(
        prog="moq",
        description="Mixture-of-quantization training and INT8 inference.",
        epilog="moq COMMAND --help teaches one command.",
    )
    parser.add_argument("--version", action="version", version=f"moq {moq.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=summary.capitalize() + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command:
            importlib.import_module(module).add_arguments(subparser)
    return parser


@contextmanager
def warnings_of(command: str) -> Iterator[None]:
    """Shows the warnings of moq as its errors are shown: whoever types a command has no script."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    shown_else = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, *others: Any, **more: Any
    ) -> None:
        if filename == program:
            print(f"moq {command}: warning: {message}", file=sys.stderr)
        else:
            shown_else(message, category, filename, *others, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The command line without the program's name; None reads sys.argv.

    Returns:
        The exit status: 0 if the command did what it says, 1 if it found something wrong, 2 for a
        command line that it could not use.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in arguments if word in COMMANDS), None)
    options = build_parser(command).parse_args(arguments)
    try:
        with warnings_of(options.command):
            status = int(importlib.import_module(COMMANDS[options.command][0]).run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has enough of it; Python must not flush the rest at its exit.
        # The status is that of rich, which ends the program itself where it prints.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        print(f"moq {options.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
