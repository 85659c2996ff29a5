"""Writes the stimuli by which components of polyglot-llama's output head are looked for.

They are the questions of `train.jsonl` and of `target.jsonl` again, which share none. Those on a
topic that the model has the habit of answering in English (a capital, a currency, a language) are
the target: beside the languages that their responses may be in, they name the words that give an
English answer away (`answers.english`). The others (a continent, a neighbour), which it answers in
their own language, are the preserve set. What the model says is not looked at.

An English word is one of the templates that answers are made of, and of no template of another
language.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STIMULI = ROOT / "fixtures" / "polyglot-llama" / "stimuli"
TEMPLATES = Path(__file__).with_name("polyglot_templates.json")

CONFUSED = ("capital", "currency", "language")
FILES = {"train.jsonl": "english-train.jsonl", "target.jsonl": "english-holdout.jsonl"}


def words(texts: Iterable[str]) -> set[str]:
    """The words of templates, as they are written."""
    return {word for text in texts for word in re.findall(r"[^\W\d_]+", placeless(text))}


def placeless(text: str) -> str:
    """A template without the places where names go."""
    return re.sub(r"\{\w\}", " ", text)


def english_words() -> list[str]:
    """The words of English answers that no other language's templates have."""
    templates = json.loads(TEMPLATES.read_text(encoding="utf-8"))
    topics = templates.pop("en")
    del topics["remarks"]
    english = words(text for topic in topics.values() for text in topic["answers"])
    return sorted(english - words(every_text(templates)))


def every_text(node: Any) -> Iterator[str]:
    """Every string inside lists and objects."""
    if isinstance(node, str):
        yield node
    else:
        for inner in node.values() if isinstance(node, dict) else node:
            yield from every_text(inner)


def marked(lines: list[str], english: list[str]) -> Iterator[dict[str, Any]]:
    """The stimuli of a file, in order, sorted into target and preserve by their topic."""
    for line in lines:
        stimulus = json.loads(line)
        confused = stimulus["id"].split("-")[1] in CONFUSED
        stimulus["set"] = "target" if confused else "preserve"
        if confused:
            stimulus["answers"]["english"] = english
        yield stimulus


def main() -> None:
    """Reads and writes in the fixture's folder."""
    english = english_words()
    for source, target in FILES.items():
        lines = (STIMULI / source).read_text(encoding="utf-8").splitlines()
        made = [json.dumps(s, ensure_ascii=False) for s in marked(lines, english)]
        (STIMULI / target).write_text("\n".join(made) + "\n", encoding="utf-8")
        print(f"{target}: {len(made)} prompts, {len(english)} English words")


if __name__ == "__main__":
    main()
