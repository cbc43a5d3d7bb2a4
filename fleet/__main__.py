"""The command line: ``python -m fleet``, or ``python fleet``, in the pack's folder (as in streaming/__main__.py)."""

import sys
from pathlib import Path

if __package__:
    from .command_line import main
else:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from fleet.command_line import main

if __name__ == "__main__":
    sys.exit(main())
