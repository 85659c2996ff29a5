"""Sparse autoencoders on disk: one file per format. A folder is known by the files it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from surgery.edits.autoencoders.interface import Autoencoder, Folder, Format
from surgery.edits.interface import RecipeFiles
from surgery.errors import CheckpointError, quote
from surgery.registry import Registry

FORMATS: Registry[type[Format]] = Registry(
    "autoencoder format",
    {
        "saelens": "surgery.edits.autoencoders.saelens:SaeLens",
        "sparsify": "surgery.edits.autoencoders.sparsify:Sparsify",
        "dictionary_learning": "surgery.edits.autoencoders.dictionary_learning:DictionaryLearning",
        "gemma_scope": "surgery.edits.autoencoders.gemma_scope:GemmaScope",
        "gemma_scope_2": "surgery.edits.autoencoders.gemma_scope_2:GemmaScope2",
        "llama_scope": "surgery.edits.autoencoders.llama_scope:LlamaScope",
    },
)


@contextmanager
def opened(name: str, files: RecipeFiles, *, pickle: bool = False) -> Iterator[Autoencoder]:
    """The autoencoder in the folder a recipe calls `name`; its numbers can be read meanwhile.

    Raises `CheckpointError` for a folder of no known format, or of several, and what the format
    raises.
    """
    folder = Folder(name.rstrip("/"), files, pickle)
    with folder.stack:
        yield _format(folder)().read(folder)


def _format(folder: Folder) -> type[Format]:
    root = folder.files.folder(folder.name)
    found = {
        name: FORMATS[name]
        for name in FORMATS
        if all((root / file).is_file() for file in FORMATS[name].files)
    }
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise CheckpointError(
            f"{root}: holds autoencoders of several formats, {', '.join(found)}; "
            "keep one of them in a folder"
        )
    layouts = "; ".join(f"{name}: {' and '.join(FORMATS[name].files)}" for name in FORMATS)
    raise CheckpointError(f"{quote(root, 300)}: holds no autoencoder; expected {layouts}")


__all__ = ["FORMATS", "Autoencoder", "Folder", "Format", "opened"]
