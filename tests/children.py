"""A child for the tests of `surgery.process`: it dies as it is told."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from surgery import process
from surgery.errors import CheckpointError


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    match arguments["do"]:
        case "echo":
            core = resource.getrlimit(resource.RLIMIT_CORE)[0]
            return {"core": core, "stdin": sys.stdin.read(), "session": os.getsid(0) == os.getpid()}
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            sys.stderr.write("last words \x1b[31m\n")
            sys.stderr.flush()
            os._exit(arguments["code"])
        case "allocate":
            bytearray(arguments["bytes"])
        case "ignore terminate and sleep":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path(arguments["pid_file"]).write_text(str(os.getpid()))
            time.sleep(60)
        case "refuse":
            raise CheckpointError("config.json: bad \x1b[31m\nname")
        case "raise":
            raise RuntimeError("first line\nlast \x1b[31m line")
    return {}


if __name__ == "__main__":
    sys.exit(process.serve(sys.argv[1], work))
