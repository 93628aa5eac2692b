"""Python scripts that tests run in processes of their own."""

import os
import subprocess
import sys


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -c script` with this process's modules and some more environment variables."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ
        | environment
        | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
