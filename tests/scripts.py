"""Python scripts that tests run in processes of their own."""

import os
import subprocess
import sys


def same_modules() -> dict[str, str]:
    """Environment variables by which a Python process imports what this one imports."""
    return {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -c script` with this process's modules and some more environment variables."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | environment | same_modules(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
