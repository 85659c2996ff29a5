"""The `surgery` command: parse, call one library function, print.

Exit codes: 0 pass, 1 the verdict is fail, 2 bad input or usage, 3 environment or internal error,
5 nothing was compared, 130 and 143 on signals. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

from surgery.cli import checkpoints, finding, graphs, house, verdicts
from surgery.cli.entry import main
from surgery.cli.group import cli
from surgery.cli.verdicts import FORMATS

__all__ = ["FORMATS", "checkpoints", "cli", "finding", "graphs", "house", "main", "verdicts"]
