"""Every error this package raises on purpose.

    SurgeryError
    ├── InputError                exit 2: the user gave something that cannot be used
    │   ├── CheckpointError       a safetensors folder
    │   ├── ArchitectureError     a model family we do not know, or know otherwise
    │   ├── EditError             an edit that has no meaning for this model
    │   ├── RecipeError           recipe text
    │   ├── FindError             a search that the model or the prompts do not allow
    │   ├── PolicyError           policy text
    │   ├── StimuliError          stimuli text
    │   ├── OnnxError             an ONNX file
    │   ├── ReceiptError          no receipt to verify
    │   ├── ReportError           a report file
    │   └── OutputError           a place we may not write to
    ├── EnvironmentFault          exit 3: disk full, missing package, a failed child
    │   └── ExportError           the exporter could not make a graph
    └── NothingCompared           exit 5: there was nothing to judge

A message is one line that says what, where, what was expected, what was found and the way out.
"""

from __future__ import annotations

from collections.abc import Iterable


class SurgeryError(Exception):
    """Base of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 3


class InputError(SurgeryError):
    exit_code = 2


class CheckpointError(InputError):
    pass


class ArchitectureError(InputError):
    pass


class EditError(InputError):
    pass


class RecipeError(InputError):
    pass


class FindError(InputError):
    pass


class PolicyError(InputError):
    pass


class StimuliError(InputError):
    pass


class OnnxError(InputError):
    pass


class ReceiptError(InputError):
    pass


class ReportError(InputError):
    pass


class OutputError(InputError):
    pass


class EnvironmentFault(SurgeryError):
    exit_code = 3


class ExportError(EnvironmentFault):
    pass


class NothingCompared(SurgeryError):
    exit_code = 5


def quote(text: object, limit: int = 80) -> str:
    """`text` as a printable ASCII literal of at most `limit` characters.

    Names come from untrusted files: they may hold line breaks, terminal escapes, lone
    surrogates or a megabyte of text, none of which may reach a terminal or a log line.
    """
    literal = ascii(str(text))
    return literal if len(literal) <= limit else f"{literal[: limit - 4]}...{literal[-1]}"


def describe(names: Iterable[str], limit: int = 3) -> str:
    """The first few of `names`, escaped, for a message."""
    listed = list(names)
    shown = ", ".join(quote(name) for name in listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"
