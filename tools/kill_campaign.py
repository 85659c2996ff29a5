"""Kill writing runs at every system call: `kill_campaign.py [--fault KILL] [--run NAME]`.

apply, with --delta, with --link, one that adds tensors, apply DELTA and revert are run once per
write-side system call they make and killed right before it (or sent another signal, or the call
fails with an error), as tests/faults/campaign.py says. Prints what came of it as Markdown; exits
1 if any run left a mixture, changed what it reads or was not healed by running it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from faults.campaign import FAULTS, Campaign, markdown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=FAULTS, action="append", help="repeatable; default KILL")
    parser.add_argument("--run", action="append", metavar="NAME", help="repeatable; default all")
    parser.add_argument("--sample", type=int, metavar="N", help="only N calls of each run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder))
        tallies = [
            campaign.run(scenario, fault, options.sample)
            for fault in options.fault or ["KILL"]
            for scenario in campaign.scenarios
            if scenario.name in (options.run or [scenario.name])
        ]
    print(markdown(tallies))
    return int(any(tally.broken for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
