"""The command line: ``python -m streaming``, or ``python streaming``, in the pack's folder.

The second way is for Windows portable, whose Python finds no modules in the current folder, but runs a folder by its
path.
"""

import sys
from pathlib import Path

if __package__:
    from .command_line import main
else:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from streaming.command_line import main

if __name__ == "__main__":
    sys.exit(main())
