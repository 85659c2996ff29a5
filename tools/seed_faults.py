"""Plant faults in exports and see what finds them: `seed_faults.py [--model NAME] [--fault NAME]`.

Every fault of tests/localize/seeds that fits is planted in every model of
tests/localize/campaign.py, in its first and its last layer. Prints the totals and a row for each
fault as Markdown, and writes them with every single outcome to the folder `--output`; exits 1 if a
fault well above the noise passed or a clean export failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests.localize.campaign import CATCH, FAMILIES, campaign, save  # noqa: E402
from tests.localize.seeds import names  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=FAMILIES, action="append", help="repeatable")
    parser.add_argument("--fault", choices=sorted({n for _, n in names()}), action="append")
    parser.add_argument("--output", type=Path, default=Path("build/faults"), metavar="DIR")
    options = parser.parse_args()
    families = {name: FAMILIES[name] for name in options.model or FAMILIES}

    def wanted(kind: str, fault: str) -> bool:
        return not options.fault or fault in options.fault

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        outcomes = []
        for outcome in campaign(Path(folder), families, tell, wanted=wanted):
            outcomes.append(outcome)
            save(outcomes, options.output)  # what is known, should somebody lose patience
    print(save(outcomes, options.output))
    missed = [o for o in outcomes if o.effect > CATCH and not o.caught]
    return int(bool(missed) or any(o.caught for o in outcomes if o.kind == "clean"))


if __name__ == "__main__":
    sys.exit(main())
