"""`python -m moq.inference COMMAND DIRECTORY`: serves a checkpoint directory."""

import argparse
import os
import sys

from moq.inference import bench, encode, generate

_COMMANDS = {
    "generate": (generate, "generate text"),
    "encode": (encode, "sentence vectors and class predictions"),
    "bench": (bench, "measure the speed on this machine"),
}


def main() -> int:
    """Runs one command; returns 0, or 1 with the error on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m moq.inference",
        description="Serves an exported moq directory or a plain Hugging Face one.",
        epilog="COMMAND --help teaches one command.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (command, summary) in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary.capitalize())
        command.add_arguments(subparser)
    args = parser.parse_args()
    try:
        status: int = _COMMANDS[args.command][0].run(args)
        return status
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"moq {args.command}{rank}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
