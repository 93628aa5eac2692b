"""`moq doctor`: what this installation was built for against what it finds."""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
from dataclasses import asdict, dataclass

import torch

from moq import _C


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    found: str
    ok: bool
    remedy: str = ""


def _version_pair(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _torch_finding(info: dict[str, str | None]) -> Finding:
    built, found = str(info["torch"]), torch.__version__
    return Finding(
        "torch",
        f"built for {built}, found {found}",
        _version_pair(built) == _version_pair(found),
        f"rebuild against the installed torch (make build), or pip install torch=={built}",
    )


def _cuda_finding(info: dict[str, str | None]) -> Finding:
    architectures = info["cuda_architectures"]
    if architectures is None:
        return Finding(
            "CUDA kernels",
            "CPU-only extension"
            + (
                f", although {torch.cuda.device_count()} GPU(s) are visible"
                if torch.cuda.is_available()
                else ""
            ),
            not torch.cuda.is_available(),
            "install nvcc (the CUDA version of torch.version.cuda), then MOQ_CUDA=on make build",
        )
    if not torch.cuda.is_available():
        return Finding(
            "CUDA kernels",
            f"built for {architectures}, no GPU is visible here: models run on the CPU (for a GPU, "
            f"nvidia-smi must show it, with a driver for CUDA {torch.version.cuda})",
            True,
        )
    devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    oldest = min(int(name.rstrip("af")) for name in architectures.split(","))
    suitable = all(major * 10 + minor >= oldest for major, minor in devices)
    major, minor = devices[0]
    build = f"{major}{minor}{'a' if major == 9 else ''}"  # wgmma is of 9.0 alone
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(len(devices)))
    return Finding(
        "CUDA kernels",
        f"built for {architectures}, found {names}",
        suitable,
        f"build for this GPU: MOQ_CUDA_ARCHITECTURES='{build}' make build",
    )


def _peer_finding() -> Finding | None:
    count = torch.cuda.device_count()
    if count < 2:
        return None
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    blocked = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    return Finding(
        "GPU peer access",
        "every pair" if not blocked else f"no access between {blocked}",
        not blocked,
        "collectives go through host memory, which is slower: check the PCIe/NVLink topology",
    )


def _optional_finding(package: str, purpose: str) -> Finding:
    present = importlib.util.find_spec(package) is not None
    found = importlib.metadata.version(package) if present else "not installed"
    return Finding(package, f"{found} ({purpose})", present, f"pip install {package}")


def findings() -> list[Finding]:
    """Looks at everything once; an entry whose `ok` is false carries its remedy."""
    info = _C.build_info()
    result = [
        Finding("Python", f"{platform.python_version()} on {platform.machine()}", True),
        _torch_finding(info),
        Finding("CPU kernels", f"instruction set {info['cpu_isa']} (MOQ_CPU_ISA overrides)", True),
        _cuda_finding(info),
        _peer_finding(),
        _optional_finding("transformers", "configurations and tokenizers"),
        _optional_finding("safetensors", "checkpoints from Python"),
    ]
    return [finding for finding in result if finding is not None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `moq doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Prints every finding; returns 1 if one of them needs a remedy."""
    result = findings()
    for finding in result:
        if args.json:
            print(json.dumps(asdict(finding)))
        else:
            print(f"{'ok ' if finding.ok else 'BAD'} {finding.subject:16} {finding.found}")
            if not finding.ok:
                print(f"    remedy: {finding.remedy}")
    return 0 if all(finding.ok for finding in result) else 1
