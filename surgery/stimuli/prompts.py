"""Stimuli files: JSON lines of prompts or token ids, and their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from surgery.documents import load_json, read_text, validate
from surgery.errors import StimuliError, quote
from surgery.stimuli.interface import Stimulus

MAX_FILE_BYTES = 64 << 20
MAX_CORRUPTED = 1 << 18
"""Characters of a corrupted prompt; it must have as many tokens as the prompt to be of use."""
TOKENIZER = "tokenizer.json"


Answer = Annotated[str, Field(pattern=r"\S")]
"""An empty answer would start every response."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(min_length=1)]
    set: Literal["target", "preserve", "probe"]
    prompt: Annotated[str, Field(min_length=1)] | None = None
    input_ids: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    answers: dict[str, Annotated[tuple[Answer, ...], Field(min_length=1)]] | None = None
    corrupted: Annotated[str, Field(min_length=1, max_length=MAX_CORRUPTED)] | None = None

    @model_validator(mode="after")
    def _one_input(self) -> _Line:
        if (self.prompt is None) == (self.input_ids is None):
            raise ValueError("give either prompt or input_ids")
        if self.corrupted is not None and self.prompt is None:
            raise ValueError("corrupted goes with prompt")
        return self


def load_stimuli(paths: Iterable[Path]) -> tuple[Stimulus, ...]:
    """Every line of every file, in order; raises `StimuliError` naming file, line and field.

    Ids must be unique across the files: a finding names a stimulus by its id.
    """
    found: dict[str, Stimulus] = {}
    for path in paths:
        text = read_text(path, StimuliError, MAX_FILE_BYTES)
        if not text.strip():
            raise StimuliError(f"{path}: holds no stimuli; expected a JSON object per line")
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                stimulus = _parse(line, str(path), number)
                if stimulus.id in found:
                    raise StimuliError(
                        f"{path}: id {quote(stimulus.id)} comes twice (line {number})"
                    )
                found[stimulus.id] = stimulus
    return tuple(found.values())


def _parse(line: str, source: str, number: int) -> Stimulus:
    document = load_json(line, source, StimuliError, number)
    parsed: Any = validate(_Line, document, StimuliError)
    return Stimulus(
        parsed.id,
        parsed.set,
        parsed.prompt,
        parsed.input_ids,
        parsed.answers,
        parsed.corrupted,
    )


class Tokenizer:
    """The tokenizer of a checkpoint folder, without importing torch.

    `tokenizer.json` is what `AutoTokenizer` itself runs; prompts get the special tokens its
    post-processor adds.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Fast

        path = folder / TOKENIZER
        if not path.is_file():
            raise StimuliError(f"{folder}: has no {TOKENIZER}; give input_ids in place of prompt")
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # what the library raises for any malformed file
            raise StimuliError(f"{path}: not a tokenizer: {quote(error)}") from None
        self._fast.no_padding()
        self._fast.no_truncation()

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._fast.encode(text).ids)

    def encode_alone(self, text: str) -> tuple[int, ...]:
        """The tokens of text that follows something, so without special ones."""
        return tuple(self._fast.encode(text, add_special_tokens=False).ids)

    def split(self, prompt: str, following: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of both texts written on end, and where the second one begins.

        It begins at the first token that the prompt alone does not have: where a token would
        reach across, it belongs to what follows. Special tokens at the end are left out.
        """
        alone, whole = self._open(prompt), self._open(prompt + following)
        pairs = enumerate(zip(alone, whole, strict=False))
        shared = min(len(alone), len(whole))
        begin = next((number for number, (a, b) in pairs if a != b), shared)
        return whole[:begin], whole[begin:]

    def _open(self, text: str) -> tuple[int, ...]:
        """The tokens of text that goes on: with the special ones before it, not those after."""
        encoded = self._fast.encode(text)
        added = list(encoded.special_tokens_mask)
        end = next((n for n in range(len(added), 0, -1) if not added[n - 1]), 0)
        return tuple(encoded.ids[:end])

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._fast.decode(list(ids), skip_special_tokens=True))


def tokens_of(
    stimuli: Iterable[Stimulus], tokenizer: Tokenizer | None, vocab: int, positions: int
) -> dict[str, tuple[int, ...]]:
    """Token ids by stimulus id; raises `StimuliError` for ids or lengths the model cannot take."""
    found: dict[str, tuple[int, ...]] = {}
    for stimulus in stimuli:
        ids = stimulus.input_ids or _encode(stimulus, tokenizer)
        if not ids or len(ids) > positions:
            raise StimuliError(
                f"stimulus {quote(stimulus.id)}: has {len(ids)} tokens; this model takes 1 to "
                f"{positions}"
            )
        if max(ids) >= vocab:
            raise StimuliError(
                f"stimulus {quote(stimulus.id)}: token id {max(ids)} is out of range "
                f"0 to {vocab - 1}"
            )
        found[stimulus.id] = ids
    return found


def _encode(stimulus: Stimulus, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if tokenizer is None or stimulus.prompt is None:
        raise StimuliError(f"stimulus {quote(stimulus.id)}: a prompt needs a {TOKENIZER}")
    return tokenizer.encode(stimulus.prompt)
