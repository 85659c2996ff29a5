"""`surgery` and `python -m surgery`: says what a signal means before anything else is imported.

The command's own modules take a fraction of a second to import; whoever interrupts that gets the
exit code of a signal and no traceback. Nothing is written until then, so nothing is cleaned up.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(130 if number == signal.SIGINT else 143)


def main() -> None:
    """The entry point; `surgery.cli.main` takes the signals over."""
    from surgery.cli import main as run

    run()


for _signal in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    # nohup and background jobs have some of them ignored, and shall keep that.
    if signal.getsignal(_signal) is not signal.SIG_IGN:
        signal.signal(_signal, _leave)

if __name__ == "__main__":
    main()
