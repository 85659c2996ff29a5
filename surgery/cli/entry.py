"""The entry point: errors as one line and their exit codes, signals as exceptions."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any

import click

from surgery.cli.group import cli
from surgery.errors import EnvironmentFault, SurgeryError

TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as an exception, so that staged folders are cleaned up."""


def main() -> None:
    """The entry point: `cli` with errors as one line and their exit codes."""
    try:
        _handle_signals()
        code = _call()
    except KeyboardInterrupt:
        code = 130
    except Terminated:
        code = 143
    sys.exit(code)


def _handle_signals() -> None:
    """Makes exceptions of signals, but for those that whoever started us has them ignore."""
    handlers: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: _terminate,
        signal.SIGHUP: _terminate,
    }
    for number, handler in handlers.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _call() -> int:
    """The exit code of one call."""
    debug = "--debug" in sys.argv[1:] or os.environ.get("SURGERY_DEBUG", "").lower() in TRUE
    try:
        options: dict[str, Any] = {"prog_name": "surgery", "auto_envvar_prefix": "SURGERY"}
        return int(cli.main(standalone_mode=False, **options) or 0)
    except click.exceptions.Abort:
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return error.exit_code
    except click.ClickException as error:
        return _complain(_usage_message(error), 2)
    except SurgeryError as error:
        return _complain(str(error), error.exit_code, debug)
    except OSError as error:
        fault = EnvironmentFault(f"{error.filename or 'system'}: {error.strerror}")
        return _complain(str(fault), fault.exit_code, debug)
    except Exception as error:  # the last resort: an error of ours, said in one line
        hint = "" if debug else "; --debug before the command shows where"
        return _complain(f"internal error: {type(error).__name__}: {error}{hint}", 3, debug)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _usage_message(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    return f"{error.format_message()}{hint}"


def _complain(message: str, code: int, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    click.echo(f"surgery: error: {printable}", err=True)
    return code
