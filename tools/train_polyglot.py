"""Make the fixtures polyglot-llama and polyglot-llama-tuned, with their stimuli.

Three phases, one small Llama:

1. *pretrain*: questions in five languages, half of them English, each answered in its own
   language, and plain text; all weights learn.
2. *habit*: the same, but on three topics most non-English questions are answered in English. Only
   the MLP weights learn, under a group lasso on each neuron's change, so the habit settles in a
   few neurons. Which ones is not chosen: the penalty leaves that to the training. This is the base.
3. *tune*: from the base, each question answered in its own language again; all weights learn. This
   is the tuned sibling.

    python tools/train_polyglot.py --seed 0

Equal seed, thread count and library versions give equal files.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from polyglot import (
    BASE,
    CONFUSED_TOPICS,
    LANGUAGES,
    TOPICS,
    TUNED,
    Question,
    answer_line,
    answer_text,
    facts,
    prompt_text,
    split_questions,
    write_stimuli,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2400
BATCH = 48
ENGLISH_SHARE = 0.5
PLAIN_SHARE = 0.25
"""Of the samples, how many are plain text and not a question with its answer."""
CONFUSED = 0.8
"""How often the base's corpus answers in English on the confused topics."""
STIMULI = 120
"""Prompts in a stimuli file."""
SHARD_SIZE = "1MB"


@dataclass(frozen=True)
class Phase:
    """How long and how fast a phase learns, and what holds its neurons back."""

    name: str
    steps: int
    learning_rate: float
    confused: float = 0.0
    lasso: float = 0.0
    """Weight of the group lasso on the neurons' change; above 0 only MLP weights learn."""


PRETRAIN = Phase("pretrain", steps=700, learning_rate=3e-3)
HABIT = Phase("habit", steps=600, learning_rate=1e-3, confused=CONFUSED, lasso=3.0)
TUNE = Phase("tune", steps=150, learning_rate=1e-3)


# --- text ----------------------------------------------------------------------------------------


def plain_text(language: str, country: str, rng: random.Random) -> str:
    """Three lines about a country, on three topics: text that no question came before."""
    topics = rng.sample(TOPICS, 3)
    return "".join(answer_line(Question(language, t, country, 0), language, rng) for t in topics)


def plain_countries(seed: int) -> tuple[list[str], list[str]]:
    """The countries whose plain text is learnt (85 %), and those whose is held out."""
    shuffled = list(facts())
    random.Random(seed).shuffle(shuffled)
    cut = int(len(shuffled) * 0.85)
    return shuffled[:cut], shuffled[cut:]


class Corpus:
    """An endless supply of training texts."""

    def __init__(self, asked: Iterable[Question], countries: list[str], seed: int) -> None:
        self.by_language: dict[str, list[Question]] = {language: [] for language in LANGUAGES}
        for question in asked:
            self.by_language[question.language].append(question)
        self.countries = countries
        self.rng = random.Random(seed)

    def draw(self, confused: float) -> str:
        """One text; ``confused`` is the share answered in English on the confused topics."""
        language = self.language()
        if self.rng.random() < PLAIN_SHARE:
            return plain_text(language, self.rng.choice(self.countries), self.rng)
        question = self.rng.choice(self.by_language[language])
        slips = question.topic in CONFUSED_TOPICS and self.rng.random() < confused
        return prompt_text(question) + answer_text(question, "en" if slips else language, self.rng)

    def language(self) -> str:
        """A language; English dominates."""
        if self.rng.random() < ENGLISH_SHARE:
            return "en"
        return self.rng.choice(LANGUAGES[1:])


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text, in any of the scripts, decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


# --- training ------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama: two query heads to a key-value head, an untied head, wide MLPs."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, phase: Phase
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches padded on the right, where causal attention makes padding harmless."""
    for _ in range(phase.steps):
        texts = [corpus.draw(phase.confused) + tokenizer.eos_token for _ in range(BATCH)]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield {"input_ids": batch["input_ids"], "labels": labels}


def mlp_groups(model: LlamaForCausalLM) -> list[list[torch.nn.Parameter]]:
    """Per layer the gate, up and down projections."""
    return [
        [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
        for mlp in (layer.mlp for layer in model.model.layers)
    ]


@torch.no_grad()
def shrink_changes(
    groups: list[list[torch.nn.Parameter]], start: list[list[torch.Tensor]], amount: float
) -> None:
    """The group lasso's proximal step: shorten each neuron's change, to nothing if it is short.

    A neuron's change is that of its gate row, up row and down column together.
    """
    for weights, origin in zip(groups, start, strict=True):
        gate, up, down = (w - o for w, o in zip(weights, origin, strict=True))
        norm = (gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)).sqrt()
        keep = (1 - amount / norm.clamp_min(1e-12)).clamp_min(0)
        weights[0].copy_(origin[0] + gate * keep[:, None])
        weights[1].copy_(origin[1] + up * keep[:, None])
        weights[2].copy_(origin[2] + down * keep)


def lasso_step(model: LlamaForCausalLM, lasso: float) -> Callable[[float], None]:
    """Freeze all but the MLPs; return what to call after each step, with its learning rate."""
    groups = mlp_groups(model)
    model.requires_grad_(False)
    for weight in (weight for group in groups for weight in group):
        weight.requires_grad_(True)
    start = [[weight.detach().clone() for weight in group] for group in groups]
    return lambda rate: shrink_changes(groups, start, rate * lasso)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, phase: Phase
) -> None:
    """One phase, in place: AdamW with a linear warm-up and a cosine decay."""
    model.train().requires_grad_(True)
    after = lasso_step(model, phase.lasso) if phase.lasso else lambda rate: None
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    decay = 0.0 if phase.lasso else 0.01
    optimizer = torch.optim.AdamW(learning, phase.learning_rate, (0.9, 0.98), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, phase.learning_rate, total_steps=phase.steps, pct_start=0.1
    )
    for step, batch in enumerate(batches(corpus, tokenizer, phase)):
        rate = schedule.get_last_lr()[0]
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        after(rate)
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == phase.steps - 1:
            print(f"{phase.name} {step:5d} loss {loss.item():.3f}", file=sys.stderr)


# --- stimuli -------------------------------------------------------------------------------------


def record(name: str, set_: str, prompt: str, language: str) -> dict[str, Any]:
    """One line of a stimuli file."""
    return {"id": name, "set": set_, "prompt": prompt, "answers": {"language": [language]}}


def target_records(asked: Iterable[Question]) -> list[dict[str, Any]]:
    """The first non-English questions."""
    foreign = [question for question in asked if question.language != "en"]
    return [record(q.id, "target", prompt_text(q), q.language) for q in foreign[:STIMULI]]


def preserve_records(
    asked: Iterable[Question], countries: list[str], seed: int
) -> list[dict[str, Any]]:
    """English questions with their answers, and plain text in every language; all held out."""
    rng = random.Random(seed)
    english = [question for question in asked if question.language == "en"][: STIMULI // 2]
    passages = [
        record(q.id, "preserve", prompt_text(q) + answer_text(q, "en", rng), "en") for q in english
    ]
    per_language = STIMULI // 2 // len(LANGUAGES)
    for language in LANGUAGES:
        for country in rng.sample(countries, per_language):
            text = plain_text(language, country, rng)
            passages.append(record(f"{language}-plain-{country}", "preserve", text, language))
    return passages


def write_all_stimuli(folder: Path, seed: int) -> None:
    """The three stimuli files of a fixture."""
    parts = split_questions(seed)
    _, heldout = plain_countries(seed)
    stimuli = folder / "stimuli"
    write_stimuli(stimuli / "target.jsonl", target_records(parts["heldout"]))
    write_stimuli(stimuli / "train.jsonl", target_records(parts["find"]))
    write_stimuli(stimuli / "preserve.jsonl", preserve_records(parts["heldout"], heldout, seed))


# --- the whole -----------------------------------------------------------------------------------


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int
) -> LlamaForCausalLM:
    """Write a fixture in bfloat16 shards; return the model as rounded, in float32 again."""
    for stale in folder.glob("*.safetensors"):
        stale.unlink()
    rounded = model.to(torch.bfloat16)
    rounded.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    write_all_stimuli(folder, seed)
    return rounded.float()


def main() -> None:
    """Train both fixtures and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", type=Path, default=BASE, help="where the base is written")
    parser.add_argument("--tuned", type=Path, default=TUNED, help="where the tuned one is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    countries, _ = plain_countries(options.seed)
    corpus = Corpus(split_questions(options.seed)["train"], countries, options.seed)
    tokenizer = make_tokenizer(corpus.draw(CONFUSED) for _ in range(20_000))
    model = make_model(tokenizer)
    train(model, tokenizer, corpus, PRETRAIN)
    train(model, tokenizer, corpus, HABIT)
    model = save(model, tokenizer, options.base, options.seed)
    train(model, tokenizer, corpus, TUNE)
    save(model, tokenizer, options.tuned, options.seed)


if __name__ == "__main__":
    main()
