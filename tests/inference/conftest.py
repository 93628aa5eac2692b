"""Directories of models, made once per session."""

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import models
import pytest
from decoders import WIDE_HEADS, write_decoder

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Callable[[str], Path]:
    """Maps the name of a small random model to a Hugging Face directory of it."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            if name in WIDE_HEADS:
                write_decoder(made[name], **WIDE_HEADS[name])
            else:
                models.save(name, models.build(name), made[name])
        return made[name]

    return directory


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The real SmolLM2-135M-Instruct: (directory, model, tokenizer)."""
    from pretrained import load_decoder

    directory = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_decoder()
    model.eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory, model, tokenizer


def pytest_terminal_summary(terminalreporter):
    """Sums up the shares of decided positions (test_half_precision.py), test by test."""
    shares = defaultdict(list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for what, share in getattr(report, "user_properties", ()):
                if what == "decided positions" and report.when == "call":
                    shares[report.nodeid.partition("[")[0]].append((share, report.nodeid))
    if not shares:
        return
    terminalreporter.section("positions whose token the errors leave no doubt about")
    for name, found in sorted(shares.items()):
        least, where = min(found)
        median = statistics.median(share for share, _ in found)
        test, case = name.rpartition("::")[2], where.partition("[")[2].rstrip("]")
        terminalreporter.line(
            f"{test}: median {median:.3f} of {len(found)}, least {least:.3f} ({case})"
        )
