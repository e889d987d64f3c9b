"""`python -m typebar`: the same as the `typebar` command."""

from __future__ import annotations

import sys

from typebar.host.cli import main

if __name__ == "__main__":
    sys.exit(main())
