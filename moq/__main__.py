"""`python -m moq` is the `moq` command."""

import sys

from moq.cli import main

sys.exit(main())
