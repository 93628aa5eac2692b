"""The checks of test_optimizer_sharded.py, as one rank of a job makes them.

As a program: DIRECTORY RANK WORLD_SIZE BACKEND; writes {check: error or ""} into the directory.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from workers import measured, replicas, sharded
from workers.job import main

CHECKS = {
    name: check
    for module in (measured, replicas, sharded)
    for name, check in vars(module).items()
    if name.startswith("check_")
}

if __name__ == "__main__":
    main(CHECKS)
