"""A process under ptrace(2) that meets one fault at one of its write-side system calls.

strace injects faults as well, but counts calls per thread: where every file has a writer thread
of its own, the second `pwrite64` of any of them never comes. Here calls are counted over the
whole process, so that the N-th `pwrite64` is met for every N there is. The process is a fork of
this one, with everything imported already; this one must not have threads.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

supported = sys.platform == "linux" and platform.machine() == "x86_64"
"""Numbers of system calls and offsets of registers are those of this machine."""

CALLS = {
    1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 328: "pwritev2",
    2: "open", 257: "openat", 85: "creat", 76: "truncate", 77: "ftruncate", 285: "fallocate",
    74: "fsync", 75: "fdatasync", 162: "sync", 306: "syncfs", 277: "sync_file_range",
    82: "rename", 264: "renameat", 316: "renameat2", 86: "link", 265: "linkat", 88: "symlink",
    266: "symlinkat", 83: "mkdir", 258: "mkdirat", 84: "rmdir", 87: "unlink", 263: "unlinkat",
    90: "chmod", 91: "fchmod", 268: "fchmodat", 92: "chown", 93: "fchown", 260: "fchownat",
    280: "utimensat", 40: "sendfile", 326: "copy_file_range", 16: "ioctl", 72: "fcntl",
    73: "flock",
}  # fmt: skip
"""Every call through which a process can change a file system, by its number."""

_FLAGS = {"open": 1, "openat": 2}
"""Where calls that may only read have the argument that says so: they count with O_CREAT."""
_FICLONE = 0x40049409

_TRACEME, _POKEUSER, _SYSCALL, _SETOPTIONS, _SYSCALL_INFO = 0, 6, 24, 0x4200, 0x420E
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x100000
"""TRACESYSGOOD, TRACEFORK, TRACEVFORK, TRACECLONE, EXITKILL."""
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_RAX, _ORIG_RAX = 80, 120
_WALL = 0x40000000


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info at the entry of a call."""

    _fields_ = [
        ("op", ctypes.c_uint8), ("pad", ctypes.c_uint8 * 3), ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64), ("sp", ctypes.c_uint64), ("nr", ctypes.c_uint64),
        ("args", ctypes.c_uint64 * 6),
    ]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """At `call` number `number` (from 1) of a run: signal `kill`, or `errno` in place of it."""

    call: str
    number: int
    kill: signal.Signals | None = None
    errno: int = 0


@dataclass
class Run:
    """The write-side calls of a process in order, its exit code (or minus its signal), its words.

    `met` says whether the fault was.
    """

    calls: list[str] = field(default_factory=list)
    code: int = 0
    said: str = ""
    met: bool = False


def trace(program: Callable[[], int], log: Path, fault: Fault | None = None) -> Run:
    """Forks, runs `program` in the child, its output in the file `log`, and waits for its end."""
    child = os.fork()
    if child == 0:
        _ptrace(_TRACEME, 0)
        _play(program, log)
    os.waitpid(child, 0)
    _ptrace(_SETOPTIONS, child, 0, _OPTIONS)
    run = _Follower(child, fault).follow()
    run.said = log.read_text()
    return run


def call(program: Callable[[], int], log: Path) -> tuple[int, str]:
    """As `trace`, untraced: the exit code and the output."""
    child = os.fork()
    if child == 0:
        _play(program, log, stop=False)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()


def _play(program: Callable[[], int], log: Path, stop: bool = True) -> None:
    """The child's side; never returns."""
    code = 70
    try:
        # Modules that are imported late would be compiled into files.
        sys.dont_write_bytecode = True
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        code = program()
        with suppress(OSError):
            sys.stdout.flush()
    finally:
        os._exit(code)


class _Follower:
    """Lets a stopped child go from one system call to the next, and counts."""

    def __init__(self, child: int, fault: Fault | None) -> None:
        self._child, self._fault = child, fault
        self._run = Run()
        self._failing: int | None = None

    def follow(self) -> Run:
        self._resume(self._child, 0)
        while True:
            thread, status = os.waitpid(-1, _WALL)
            if os.WIFSTOPPED(status):
                self._resume(thread, self._stopped(thread, status))
            elif thread == self._child:
                self._run.code = os.waitstatus_to_exitcode(status)
                return self._run

    def _stopped(self, thread: int, status: int) -> int:
        """Deals with a stop; the signal to go on with."""
        number = os.WSTOPSIG(status)
        if number == _SYSCALL_STOP:
            self._at_call(thread)
            return 0
        # Events, and the stop a new thread begins with, are the tracer's own.
        return 0 if number in (signal.SIGTRAP, signal.SIGSTOP) else number

    def _at_call(self, thread: int) -> None:
        info = _Info()
        with suppress(ProcessLookupError):  # killed meanwhile
            _ptrace(_SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == 2 and thread == self._failing and self._fault is not None:
            _ptrace(_POKEUSER, thread, _RAX, -self._fault.errno)
            self._failing = None
        elif info.op == 1 and (name := _writing(info)):
            self._run.calls.append(name)
            if self._fault is not None and self._is_due(self._fault, name):
                self._run.met = True
                self._strike(self._fault, thread)

    def _is_due(self, fault: Fault, name: str) -> bool:
        return name == fault.call and self._run.calls.count(name) == fault.number

    def _strike(self, fault: Fault, thread: int) -> None:
        if fault.kill is not None:
            os.kill(self._child, fault.kill)
        else:
            self._failing = thread
            _ptrace(_POKEUSER, thread, _ORIG_RAX, -1)  # no such call: the kernel does nothing

    @staticmethod
    def _resume(thread: int, number: int) -> None:
        with suppress(ProcessLookupError):
            _ptrace(_SYSCALL, thread, 0, number)


def _writing(info: _Info) -> str:
    """The name of the call if it is one through which files are written, else nothing."""
    name = CALLS.get(info.nr, "")
    if name in _FLAGS and not info.args[_FLAGS[name]] & os.O_CREAT:
        return ""
    return "" if name == "ioctl" and info.args[1] != _FICLONE else name


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, thread, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.ptrace.restype = ctypes.c_long
