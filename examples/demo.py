"""The whole path on one machine's CPU: train -> export -> verify -> serve with torchrun.

    python examples/demo.py            # what `make demo` runs
    python examples/demo.py --quick    # fewer training steps, for a check of the path alone

Every step is a command that a user would type; each is printed before it runs.
"""

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent
PROMPT = "My fellow Americans, the state of our Union"
NEW_TOKENS = 64
console = Console(highlight=False)


def run(*command: str | Path, expect: int = 0, capture: bool = False) -> str:
    """Prints and runs one command; stops the demo on another exit status."""
    words = [str(word) for word in command]
    console.print("\n[bold]$ " + shlex.join(words).replace(sys.executable, "python"))
    done = subprocess.run(
        words, check=False, text=True, stdout=subprocess.PIPE if capture else None
    )
    if done.returncode != expect:
        sys.exit(f"demo: exit status {expect} was expected, got {done.returncode}")
    return done.stdout or ""


def python(*arguments: str | Path, **options: bool | int) -> str:
    """Runs a Python command in this environment."""
    return run(sys.executable, *arguments, **options)


def show_verify_catches_a_flipped_bit(directory: Path) -> None:
    """Flips one bit of each kind of file in a copy; `moq verify` must refuse every one."""
    console.rule("one flipped bit in any file")
    copy = directory.with_name(directory.name + "-flipped")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    for file in sorted(path for path in copy.rglob("*") if path.is_file()):
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            byte = stream.read(1)[0]
            stream.seek(-1, 1)
            stream.write(bytes([byte ^ 1]))
            stream.flush()
            python("-m", "moq", "verify", copy, expect=1)
            stream.seek(-1, 1)
            stream.write(bytes([byte]))
    shutil.rmtree(copy)


def serve(directory: Path, ranks: int) -> dict[str, object]:
    """Generates with torchrun on `ranks` processes of one thread each; returns the JSON result."""
    console.rule(f"serve on {ranks} process{'es' if ranks > 1 else ''}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    generate = ["-m", "moq.inference", "generate", directory, "--prompt", PROMPT]
    length = ["--max-new-tokens", str(NEW_TOKENS), "--threads", "1"]
    python(*torchrun, *generate, *length, "--stream")
    result = python(*torchrun, *generate, *length, "--json", capture=True)
    return json.loads(result.strip().splitlines()[-1])


def transformers_speed(threads: int) -> dict[str, float]:
    """The JSON result of transformers generating the same with the original model."""
    program = [EXAMPLES / "transformers_speed.py", "--prompt", PROMPT]
    output = python(*program, "--threads", str(threads), capture=True)
    return json.loads(output.strip().splitlines()[-1])


def megabytes(folder: Path) -> str:
    """Size of all files below a folder."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:.0f} MB"


def main() -> None:
    """Runs every step and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder for everything written"
    )
    parser.add_argument("--quick", action="store_true", help="fewer training steps")
    args = parser.parse_args()
    started = time.perf_counter()
    decoder, encoder = args.output / "decoder", args.output / "encoder"

    console.rule("train, export")
    windows = 4 if args.quick else 16  # of 256 held-out tokens
    steps = ["--held-out-windows", str(windows)]
    if args.quick:
        steps += ["--fp32-steps", "3", "--moq-steps", "10"]
    python(EXAMPLES / "train_decoder.py", "--output", decoder, *steps)

    console.rule("inspect, verify")
    python("-m", "moq", "inspect", decoder)
    python("-m", "moq", "verify", decoder)
    show_verify_catches_a_flipped_bit(decoder)

    one, two = serve(decoder, 1), serve(decoder, 2)
    if one["token_ids"] != two["token_ids"]:
        sys.exit("demo: one and two processes generated different tokens")
    console.print("one and two processes generated the same tokens")

    console.rule("speed beside transformers FP32")
    peers = [transformers_speed(threads=1), transformers_speed(threads=2)]

    console.rule("encoder")
    short = ["--warmup-steps", "8", "--steps", "8", "--held-out", "100"] if args.quick else []
    python(EXAMPLES / "classify_text.py", "--output", encoder, *short)

    perplexities = json.loads(decoder.with_name("decoder-perplexity.json").read_text())
    table = Table(title=f"SmolLM2-135M on speeches from 2001 on ({256 * windows:,} tokens)")
    for column in ("model", "perplexity", "size on disk", "decode, tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    served = [float(result["decode_tokens_per_second"]) for result in (one, two)]
    speeds = {
        "original": (
            f"{peers[0]['megabytes']:.0f} MB",
            "transformers: {:.1f} (1 thread), {:.1f} (2 threads)".format(
                *(peer["tokens_per_second"] for peer in peers)
            ),
        ),
        "MoQ INT8, exported, in the engine": (
            megabytes(decoder),
            "{:.1f} (1 process), {:.1f} (2 processes of 1 thread)".format(*served),
        ),
    }
    for name, row in perplexities.items():
        value = f"{row['perplexity']:.3f} ± {row['standard_error']:.3f}"
        table.add_row(name, value, *speeds.get(name, ("", "")))
    console.print(table)
    simulated = perplexities["MoQ INT8, simulated in PyTorch"]["perplexity"]
    exported = perplexities["MoQ INT8, exported, in the engine"]["perplexity"]
    difference = abs(exported / simulated - 1)
    console.print(f"simulated and served perplexity differ by {difference:.5%}")
    if difference > 1e-3:
        sys.exit("demo: simulated and served perplexity must agree within 0.1 %")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    seconds = time.perf_counter() - started
    console.print(f"the demo took {seconds:.0f} s; its largest process took {peak:.1f} GiB")


if __name__ == "__main__":
    main()
