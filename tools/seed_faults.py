"""Plant faults in exports and see what finds them: `seed_faults.py [--model NAME] [--fault NAME]`.

Every fault of tests/localize/seeds that fits is planted in every model of tests/localize/bases.py,
in its first, its middle and its last layer; then right conversions are made of it, and edited
twins whose conversion holds another edit. The folder `--output` gets a file of outcomes for each
model as they come, and of all together `faults.json` and `faults.md`; `--resume` keeps those it
has of the same code, `--jobs` takes as many models at a time. Exits 1 if a fault well above the
noise passed, a wrong edit did, or a clean export failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests.localize.bases import SUBJECTS  # noqa: E402
from tests.localize.campaign import Campaign  # noqa: E402
from tests.localize.outcomes import CLEAN, EDIT, Outcome, Store  # noqa: E402
from tests.localize.seeds import names  # noqa: E402
from tests.localize.tables import save  # noqa: E402


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, action="append", help="repeatable")
    faults = sorted({CLEAN, EDIT, *(word for pair in names() for word in pair)})
    parser.add_argument("--fault", choices=faults, action="append", metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("build/faults"), metavar="DIR")
    parser.add_argument("--document", type=Path, metavar="FILE", help="faults.md goes here too")
    parser.add_argument("--resume", action="store_true", help="keep what is known")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at a time")
    return parser.parse_args()


def run(model: str, asked: argparse.Namespace) -> list[Outcome]:
    """All outcomes of one model, each kept and printed once it is known."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    store = Store(asked.output / "models", model)
    known = store.read() if asked.resume else {}
    store.begin(known.values())

    def wanted(kind: str, fault: str) -> bool:
        return not asked.fault or fault in asked.fault or kind in asked.fault

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in Campaign(model, Path(folder), known, wanted).run():
            found.append(outcome)
            if outcome.key not in known:
                store.add(outcome)
                print(outcome, file=sys.stderr, flush=True)
    return found


def main() -> int:
    asked = options()
    models = [name for name in SUBJECTS if not asked.model or name in asked.model]
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(max(1, asked.jobs)) as pool:
        for found in pool.map(partial(run, asked=asked), models):
            outcomes += found
            text = save(outcomes, asked.output)  # what is known, should somebody lose patience
    if asked.document:
        asked.document.write_text(text, encoding="utf-8")
    print(text)
    missed = [o for o in outcomes if o.kind not in (CLEAN, EDIT) and o.strong and not o.caught]
    edits = [o for o in outcomes if o.kind == EDIT and not (o.caught and o.as_such)]
    return int(bool(missed or edits) or any(o.caught for o in outcomes if o.kind == CLEAN))


if __name__ == "__main__":
    sys.exit(main())
