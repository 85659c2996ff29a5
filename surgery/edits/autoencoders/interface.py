"""The one frame that every file format of sparse autoencoders is read into.

With n latents on activations x of width d, scaled by s as the autoencoder was trained on them:

    f = activation(s·x·W_enc + b_enc),    x̂ = (f·W_dec + b_dec) / s

W_enc is [d, n] and W_dec [n, d], whichever way a file has them. Headers are read at once, numbers
when they are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint import TensorFile
from surgery.checkpoint.dtypes import numpy_dtype
from surgery.checkpoint.files import parse_json_object, read_small
from surgery.edits.interface import RecipeFiles
from surgery.errors import CheckpointError, EditError, quote

Vectors = NDArray[np.float64]

BAND_BYTES = 1 << 20
"""What is read of a matrix at a time to take columns out of it."""


@dataclass(frozen=True)
class Stored:
    """One tensor in the frame's orientation; `transposed`: the file has it the other way round."""

    file: TensorFile
    key: str
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.file.info(self.key).shape
        return shape[::-1] if self.transposed else shape

    def read(self) -> Vectors:
        """The whole tensor, float64."""
        values = self.file.read(self.key)
        return values.T if self.transposed else values

    def single(self) -> NDArray[np.float32]:
        """The whole tensor, float32."""
        values = self.file.rows(self.key, 0, self.file.info(self.key).shape[0])
        return (values.T if self.transposed else values).astype(np.float32)

    def take(self, axis: int, indices: Sequence[int]) -> Vectors:
        """The slices of a matrix at `indices` of `axis`, float64 [len(indices), other axis].

        Rows of the file are one read each; for its columns the file is read band by band.
        """
        if axis == (1 if self.transposed else 0):
            rows = [self.file.rows(self.key, index, index + 1)[0] for index in indices]
            return np.stack(rows).astype(np.float64)
        info = self.file.info(self.key)
        rows_, columns = info.shape
        height = max(1, BAND_BYTES // max(1, columns * numpy_dtype(info.dtype).itemsize))
        taken = np.empty((len(indices), rows_))
        for start in range(0, rows_, height):
            stop = min(start + height, rows_)
            taken[:, start:stop] = self.file.rows(self.key, start, stop)[:, list(indices)].T
        return taken


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder of one activation, or a transcoder, which writes another than it reads.

    `tensors` are those of `W_enc` [d, n], `b_enc` [n], `W_dec` [n, d], `b_dec` [d] and
    `threshold` [n] or [] that the format has; `threshold` is one that the config gives for all.
    `hook` is the hook point as the files name it, None where they do not; `layer` what they say of
    it beside that. `input_scale` is None where x is scaled by what no file holds. `centered`: the
    encoder sees s·x − b_dec. `writes` is the hook point a transcoder writes, "" where its files do
    not name it, and None for an autoencoder. A gated one has `b_gate`, `b_mag` and `r_mag`, all
    [n]; of a top-k one `k` features are active, None where the files do not say how many.
    `by_norm`: features are compared, with each other or with a threshold, by what they write, that
    is multiplied by the norms of their decoder rows.
    """

    path: Path
    tensors: Mapping[str, Stored]
    activation: str
    hook: str | None
    layer: int | None = None
    input_scale: float | None = 1.0
    threshold: float | None = None
    centered: bool = False
    writes: str | None = None
    k: int | None = None
    by_norm: bool = False

    def __post_init__(self) -> None:
        """Raises `CheckpointError` for tensors of shapes that do not fit together."""
        if len(self.tensors["W_dec"].shape) != 2:
            self._refuse("W_dec", "[latents, width]")
        n, d = self.latents, self.width
        expected: dict[str, list[tuple[int, ...]]] = {
            "W_enc": [(d, n)], "b_enc": [(n,)], "b_dec": [(d,)],
            "threshold": [(n,), ()], "b_gate": [(n,)], "b_mag": [(n,)], "r_mag": [(n,)],
        }  # fmt: skip
        for name, stored in self.tensors.items():
            if name in expected and stored.shape not in expected[name]:
                self._refuse(name, str(list(expected[name][0])))

    @property
    def latents(self) -> int:
        return self.tensors["W_dec"].shape[0]

    @property
    def width(self) -> int:
        return self.tensors["W_dec"].shape[1]

    def scale(self, patch: str) -> float:
        """`input_scale`; raises `EditError` where `patch` needs one and no file holds it."""
        if self.input_scale is None:
            raise EditError(
                f"{self.path}: normalises its input by what no file holds, so it is not in the "
                f"model's units, which {patch} needs; fold the normalisation into its weights"
            )
        return self.input_scale

    def decoder_rows(self, features: Sequence[int]) -> Vectors:
        """W_dec[features] as stored, float64 [len(features), d].

        Raises `EditError` for a feature that does not exist or whose row is zero or not finite.
        """
        return self._vectors("W_dec", "row", 0, features)

    def encoder_columns(self, features: Sequence[int]) -> Vectors:
        """W_enc[:, features] as stored, float64 [len(features), d]; raises like `decoder_rows`."""
        return self._vectors("W_enc", "column", 1, features)

    def vector(self, name: str) -> Vectors:
        """A vector of the frame, float64; of `b_enc` [n] and `b_dec` [d] zeros where the format has
        none.

        Raises `EditError` where it is not finite.
        """
        if name not in self.tensors:
            return np.zeros(self.latents if name == "b_enc" else self.width)
        vector = self.tensors[name].read().astype(np.float64)
        if not np.isfinite(vector).all():
            raise EditError(f"{self.path}: {name} holds NaN or infinities")
        return vector

    def _vectors(self, name: str, noun: str, axis: int, features: Sequence[int]) -> Vectors:
        if name not in self.tensors:
            raise EditError(f"{self.path}: has no {name}")
        for feature in features:
            if not 0 <= feature < self.latents:
                raise EditError(
                    f"{self.path}: feature {feature} is out of range 0 to {self.latents - 1}"
                )
        vectors = self.tensors[name].take(axis, features)
        for feature, norm in zip(features, np.linalg.norm(vectors, axis=1), strict=True):
            if not np.isfinite(norm) or norm == 0:
                kind = "decoder" if name == "W_dec" else "encoder"
                raise EditError(f"{self.path}: {kind} {noun} {feature} has norm {norm}")
        return vectors

    def _refuse(self, name: str, expected: str) -> None:
        stored = self.tensors[name]
        raise CheckpointError(
            f"{self.path}: {quote(stored.key)} has shape {list(stored.file.info(stored.key).shape)}"
            f"; expected {name} {expected}{' transposed' if stored.transposed else ''}"
        )


@dataclass(frozen=True)
class Config:
    """A JSON object of a folder, and the file that messages name."""

    path: Path
    fields: Mapping[str, Any]

    def get(self, *names: str) -> Any:
        """The value under nested `names`, None where there is none."""
        value: Any = self.fields
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def text(self, *names: str) -> str | None:
        """The same, which must be a string or null; raises `CheckpointError`."""
        value = self.get(*names)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(
                f"{self.path}: {'.'.join(names)} is {quote(value)}; expected a string"
            )
        return value

    def number(self, *names: str) -> float:
        """The same, which must be a positive number; raises `CheckpointError`."""
        value = self.get(*names)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf"):
            raise CheckpointError(
                f"{self.path}: {'.'.join(names)} is {quote(value)}; expected a positive number"
            )
        return float(value)

    def count(self, *names: str) -> int | None:
        """The same, which must be a positive integer or null; raises `CheckpointError`."""
        value = self.get(*names)
        if value is not None and (type(value) is not int or value < 1):
            raise CheckpointError(
                f"{self.path}: {'.'.join(names)} is {quote(value)}; expected a positive integer"
            )
        return value

    def check_sizes(self, sae: Autoencoder, latents: Sequence[str], width: Sequence[str]) -> None:
        """Raises `CheckpointError` where the fields say otherwise than the weights."""
        for names, found in ((latents, sae.latents), (width, sae.width)):
            declared = self.get(*names)
            # A size of zero is one that is left to be worked out.
            if declared not in (None, 0, found):
                raise CheckpointError(
                    f"{self.path}: {'.'.join(names)} is {quote(declared)}, the weights have {found}"
                )

    def refuse_transcoder(self, told: bool) -> None:
        """Raises `EditError` if the config has `told` that it is one."""
        if told:
            refuse_transcoder(self.path)


def refuse_transcoder(path: Path) -> NoReturn:
    """Raises `EditError`."""
    raise EditError(
        f"{path}: is a transcoder, which reads one activation and writes another; "
        "expected an autoencoder of one"
    )


@dataclass(frozen=True)
class Folder:
    """A folder that a recipe names `name`; what a format reads goes through `files`.

    `pickle`: pickles may be read; `stack` lives as long as what is read from them.
    """

    name: str
    files: RecipeFiles
    pickle: bool
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the folder and those around it, as far as the recipe gives them."""
        return PurePosixPath(self.name).parts

    def path(self, file: str) -> Path:
        return self.files.path(f"{self.name}/{file}")

    def config(self, file: str) -> Config:
        path = self.path(file)
        return Config(path, parse_json_object(read_small(path), str(path)))

    def weights(self, file: str) -> TensorFile:
        return TensorFile.open(self.path(file))


class Format(ABC):
    """How one tool lays an autoencoder out; `files` together are what a folder is known by."""

    files: ClassVar[tuple[str, ...]]

    @abstractmethod
    def read(self, folder: Folder) -> Autoencoder:
        """The autoencoder of a folder; raises `InputError` for a malformed or unfit one."""


def stored(
    file: TensorFile, names: Mapping[str, str], transposed: Sequence[str] = ()
) -> dict[str, Stored]:
    """The tensors of the frame among `names` (frame name to key) that `file` has.

    `W_dec` is asked for in any case; raises `CheckpointError` where it is missing.
    """
    return {
        name: Stored(file, key, name in transposed)
        for name, key in names.items()
        if key in file.tensors or (name == "W_dec" and file.info(key))
    }
