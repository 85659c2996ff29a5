"""Work that may hang, eat memory or crash, done in a child process with limits.

The parent writes `job.json` into a folder, starts `python -m MODULE job.json` in a session of its
own and waits; the child answers through `result.json` in the same folder. Whatever happens to the
child (exception, signal, time limit) is an `Ending`, never an exception of the parent's.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import surgery.errors
from surgery.errors import EnvironmentFault, InputError, SurgeryError, quote

# `-m` puts the working folder first on the import path: never a folder with somebody's files.
PACKAGE_ROOT = Path(surgery.errors.__file__).resolve().parent.parent
DETAIL_LENGTH = 400
PR_SET_PDEATHSIG = 1
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)
"""What the machine has run out of: nobody's model is to blame."""


@dataclass(frozen=True)
class Limits:
    """What a child may use: wall-clock seconds, and bytes of private memory.

    `memory_bytes` None means 80% of the machine's physical memory.
    """

    seconds: float = 600.0
    memory_bytes: int | None = None

    def memory(self) -> int:
        if self.memory_bytes is not None:
            return self.memory_bytes
        return int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    status: `ok`, `crash` (a signal or an exit without an answer), `timeout` or `error` (the child
    raised); detail: one line that says which; kind: of an error, `input` (bad input: exit 2),
    `environment` (exit 3) or empty (anything else); error: the class name of that exception;
    result: what the child's work returned.
    """

    status: str
    detail: str
    seconds: float
    peak_bytes: int
    kind: str = ""
    error: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    def value(self, what: str, otherwise: type[SurgeryError]) -> dict[str, Any]:
        """The result, or the child's own `SurgeryError` again, or `otherwise` for the rest."""
        if self.status == "ok":
            return self.result
        known = getattr(surgery.errors, self.error, None)
        if self.kind and isinstance(known, type) and issubclass(known, SurgeryError):
            raise known(self.detail)
        raise otherwise(f"{what}: {self.status}: {self.detail}")


def run(module: str, arguments: Mapping[str, Any], folder: Path, limits: Limits) -> Ending:
    """Run `module`'s `serve(work)` with JSON `arguments` in a child; `folder` must exist.

    The child's stdout and stderr go to `stdout.txt` and `stderr.txt` in `folder`. When this call
    is left by an exception the child and what it started in its session are killed first.
    """
    job = folder / "job.json"
    answer = {"memory_bytes": limits.memory(), "parent": os.getpid(), "arguments": dict(arguments)}
    job.write_text(json.dumps(answer), encoding="utf-8")
    (folder / "result.json").unlink(missing_ok=True)
    started = time.monotonic()
    with (folder / "stdout.txt").open("wb") as out, (folder / "stderr.txt").open("wb") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(job.resolve())],
            cwd=PACKAGE_ROOT,
            # onnxruntime reports to its makers, and leaves a file behind, unless told not to.
            env={"ORT_DISABLE_TELEMETRY": "1", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        timed_out, peak = _await(child, limits.seconds)
    seconds = time.monotonic() - started
    if timed_out:
        detail = f"killed at the limit of {limits.seconds:g} s"
        return Ending("timeout", detail, seconds, peak)
    return _ending(child.returncode, folder, seconds, peak)


def _await(child: subprocess.Popen[bytes], seconds: float) -> tuple[bool, int]:
    """Wait, kill the child's whole group, reap it: (ran past `seconds`, ru_maxrss in bytes)."""
    deadline = time.monotonic() + seconds
    pause, ended = 0.001, None
    try:
        while ended is None and time.monotonic() < deadline:
            # WNOWAIT leaves the child a zombie, so its group id cannot be anybody else's yet.
            ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is None:
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(pause * 1.5, 0.05)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    return ended is None, usage.ru_maxrss * 1024


def _ending(returncode: int, folder: Path, seconds: float, peak: int) -> Ending:
    if returncode < 0:
        return Ending("crash", f"killed by {_signal_name(-returncode)}", seconds, peak)
    try:
        reply = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        reply = None
    if returncode != 0 or not isinstance(reply, dict):
        line = _last_line(folder / "stderr.txt")
        return Ending(
            "crash", f"exit code {returncode}: {quote(line, DETAIL_LENGTH)}", seconds, peak
        )
    return Ending(
        reply["status"],
        reply["detail"],
        seconds,
        # The kernel starts a child's ru_maxrss at its parent's: the child's own high-water mark
        # is the better number where the child lived to report it.
        reply["peak_bytes"] or peak,
        reply["kind"],
        reply["error"],
        reply["result"],
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def serve(job_path: str, work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The child's side: set the limits, do the work, answer. Returns the exit code."""
    path = Path(job_path)
    job = json.loads(path.read_text(encoding="utf-8"))
    _confine(job["memory_bytes"], job["parent"])
    reply: dict[str, Any] = {"status": "ok", "detail": "", "kind": "", "error": "", "result": {}}
    try:
        reply["result"] = work(job["arguments"])
    except Exception as error:  # the border between two processes: every error becomes a line
        reply.update(_describe(error))
    reply["peak_bytes"] = _high_water_mark()
    staged = path.with_name("result.json.partial")
    staged.write_text(json.dumps(reply), encoding="utf-8")
    staged.replace(path.with_name("result.json"))
    return 0


def _describe(error: Exception) -> dict[str, str]:
    name, text = type(error).__name__, str(error)
    if isinstance(error, SurgeryError):
        kind = "input" if isinstance(error, InputError) else "environment"
        return {"status": "error", "kind": kind, "error": name, "detail": one_line(text)}
    if isinstance(error, ImportError) or getattr(error, "errno", None) in _EXHAUSTED:
        return {"status": "error", "kind": "environment", "error": "EnvironmentFault",
                "detail": one_line(f"{name}: {text}")}  # fmt: skip
    last = (text.strip().splitlines() or ["no message"])[-1]
    detail = quote(f"{name}: {last}", DETAIL_LENGTH)
    return {"status": "error", "kind": "", "error": name, "detail": detail}


def one_line(text: str, limit: int = 1000) -> str:
    """`text` with every unprintable character escaped, so that it stays one harmless line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)[:limit]


def _confine(memory_bytes: int, parent: int) -> None:
    """Memory limit, no core file, and death with the parent.

    RLIMIT_DATA counts private writable memory, used or not; RLIMIT_AS would count the address
    space that torch and onnxruntime merely reserve.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    allowed = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            raise EnvironmentFault("the parent process is gone")


def _high_water_mark() -> int:
    """Peak resident bytes of this process since it started its program; 0 where unknown."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    rows = dict(line.split(":", 1) for line in status.splitlines())
    return int(rows.get("VmHWM", "0 kB").split()[0]) * 1024
