"""What the capitals scripts share: prompts, stimuli, answers, weight edits and figures.

The edits here are written straight from their formulas and use nothing of the `surgery`
package, so that the figures of the fixture are a second opinion on it.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

PLAIN = "Q: What is the capital of {s}? A:"
STATEMENT = "The capital of {s} is {wrong}."
CONFLICT = f"{STATEMENT} {PLAIN}"
_SUBJECT = re.compile(r"capital of (.+?)\? A:$")

MAX_ANSWER_TOKENS = 5
BATCH = 256

Answers = dict[str, list[str]]


@dataclass(frozen=True)
class Stimulus:
    """One line of a stimuli file; `answers` maps a name to the strings that count as it."""

    id: str
    set: str
    prompt: str
    answers: Answers

    @property
    def subject(self) -> str:
        """The country asked about."""
        found = _SUBJECT.search(self.prompt)
        if found is None:
            raise ValueError(f"{self.id}: not a capitals prompt: {self.prompt!r}")
        return found.group(1)


@dataclass(frozen=True)
class Head:
    """One attention head, written L2H1."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"

    @classmethod
    def parse(cls, text: str) -> "Head":
        """Read `L2H1`."""
        found = re.fullmatch(r"L(\d+)H(\d+)", text)
        if found is None:
            raise ValueError(f"not a head: {text!r}, expected e.g. L2H1")
        return cls(int(found.group(1)), int(found.group(2)))


@dataclass(frozen=True)
class Sae:
    """A sparse autoencoder in SAELens' frame: W_enc[d, n], W_dec[n, d]."""

    hook_name: str
    k: int | None
    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor

    @property
    def layer(self) -> int:
        """The block the hook belongs to."""
        return int(self.hook_name.split(".")[1])

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [..., n] of x [..., d]."""
        pre = (x - self.b_dec) @ self.w_enc + self.b_enc
        return keep_top(torch.relu(pre), self.k)

    def decode(self, features: Tensor) -> Tensor:
        """The reconstruction [..., d] of feature activations [..., n]."""
        return features @ self.w_dec + self.b_dec


def keep_top(features: Tensor, k: int | None) -> Tensor:
    """The k greatest activations of each row, zeros elsewhere; all of them when k is None."""
    if k is None:
        return features
    top = features.topk(k, dim=-1)
    return torch.zeros_like(features).scatter(-1, top.indices, top.values)


# ---------------------------------------------------------------- files


def read_stimuli(path: Path) -> list[Stimulus]:
    """The stimuli of a JSONL file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Stimulus(**json.loads(line)) for line in lines if line]


def write_stimuli(path: Path, stimuli: Iterable[Stimulus]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(vars(s), ensure_ascii=False) for s in stimuli]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_model(folder: Path) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """The fixture in float32, ready to run."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def load_sae(folder: Path) -> Sae:
    """Read a SAELens folder of architecture `standard` or `topk`."""
    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "sae_weights.safetensors")
    return Sae(
        hook_name=cfg["metadata"]["hook_name"],
        k=cfg["k"] if cfg["architecture"] == "topk" else None,
        w_enc=weights["W_enc"],
        b_enc=weights["b_enc"],
        w_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
    )


# ---------------------------------------------------------------- running


@dataclass
class Batch:
    """Left-padded token ids [rows, length] and their mask."""

    ids: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        """Positions that count real tokens only, as `generate` computes them."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def append(self, tokens: Tensor) -> "Batch":
        """The batch with one more token [rows] on the right."""
        column = tokens[:, None]
        return Batch(
            torch.cat([self.ids, column], 1),
            torch.cat([self.mask, torch.ones_like(column)], 1),
        )


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Batch:
    """Prompts as one left-padded batch."""
    coded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    return Batch(coded["input_ids"], coded["attention_mask"])


def scores(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    """Logits [rows, length, vocabulary], with gradients."""
    out = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    )
    return out.logits


def logits(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    """Logits [rows, length, vocabulary]."""
    with torch.no_grad():
        return scores(model, batch)


def chunks(items: Sequence[Any], size: int = BATCH) -> Iterable[Sequence[Any]]:
    """Consecutive slices of at most `size` items."""
    return (items[i : i + size] for i in range(0, len(items), size))


def continuations(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[str]:
    """The greedy answer to every prompt, as text."""
    answers: list[str] = []
    for part in chunks(prompts):
        batch = encode(tokenizer, part)
        start = batch.ids.shape[1]
        for _ in range(MAX_ANSWER_TOKENS):
            batch = batch.append(logits(model, batch)[:, -1].argmax(-1))
        answers += [_until_eos(row, tokenizer) for row in batch.ids[:, start:]]
    return answers


def _until_eos(row: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    tokens = row.tolist()
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(tokens))


def says(continuation: str, answers: Sequence[str]) -> bool:
    """Whether a continuation starts with one of the answers, at a word boundary."""
    text = continuation.strip()
    return any(re.match(re.escape(a) + r"(?!\w)", text) for a in answers)


def answer_rates(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, stimuli: Sequence[Stimulus]
) -> dict[str, float]:
    """Share of greedy continuations that give each named answer."""
    given = continuations(model, tokenizer, [s.prompt for s in stimuli])
    return {
        name: sum(says(g, s.answers[name]) for g, s in zip(given, stimuli, strict=True))
        / len(stimuli)
        for name in stimuli[0].answers
    }


@dataclass
class FirstTokens:
    """Stimuli reduced to the first token of each answer, for searches that run often.

    Prompts of a pair never share it (see `train_capitals`), so it decides which is given.
    """

    batch: Batch
    wanted: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stimuli: Sequence[Stimulus]) -> "FirstTokens":
        """Encode once, so that a search only runs the model."""
        wanted = {
            name: torch.tensor([tokenizer(s.answers[name][0])["input_ids"][0] for s in stimuli])
            for name in stimuli[0].answers
        }
        return cls(encode(tokenizer, [s.prompt for s in stimuli]), wanted)

    def rates(self, model: GPT2LMHeadModel) -> dict[str, float]:
        """Share of prompts whose top token opens each named answer."""
        top = logits(model, self.batch)[:, -1].argmax(-1)
        return {name: (top == want).float().mean().item() for name, want in self.wanted.items()}


# ---------------------------------------------------------------- edits


def blocks(model: GPT2LMHeadModel) -> list[Any]:
    """The transformer blocks; untyped, since torch types a submodule as tensor or module."""
    return list(model.transformer.h)


def without_heads(model: GPT2LMHeadModel, heads: Iterable[Head]) -> GPT2LMHeadModel:
    """A copy whose heads write nothing: their rows of attn.c_proj (Conv1D, [in, out]) are 0."""
    edited = copy.deepcopy(model)
    width = model.config.n_embd // model.config.n_head
    for head in heads:
        weight = blocks(edited)[head.layer].attn.c_proj.weight.data
        weight[head.index * width : (head.index + 1) * width] = 0.0
    return edited


def basis(directions: Tensor) -> Tensor:
    """Orthonormal columns [d, k] that span the rows of `directions` [k, d]."""
    return torch.linalg.qr(directions.T.double())[0].float()


def orthogonalized(model: GPT2LMHeadModel, directions: Tensor) -> GPT2LMHeadModel:
    """A copy in which nothing writes `directions` [k, d] to the residual stream.

    W' = W - W Q Q^T for embeddings and Conv1D weights, b' = b - b Q Q^T for biases.
    """
    edited = copy.deepcopy(model)
    q = basis(directions)
    writers = [edited.transformer.wte.weight, edited.transformer.wpe.weight]
    for block in blocks(edited):
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            writers += [layer.weight, layer.bias]
    for weight in writers:
        weight.data -= (weight.data @ q) @ q.T
    return edited


def z_projected(model: GPT2LMHeadModel, layer: int, directions: Tensor) -> GPT2LMHeadModel:
    """A copy whose attn.c_proj of `layer` no longer reads `directions` [k, d] from z.

    W' = (I - Q Q^T) W for a Conv1D weight [in, out].
    """
    edited = copy.deepcopy(model)
    q = basis(directions)
    weight = blocks(edited)[layer].attn.c_proj.weight.data
    weight -= q @ (q.T @ weight)
    return edited


def without_features(model: GPT2LMHeadModel, sae: Sae, features: Sequence[int]) -> GPT2LMHeadModel:
    """The weight edit that removes SAE features: on z by projection, else by the writers."""
    if not features:
        return copy.deepcopy(model)
    directions = sae.w_dec[list(features)]
    if sae.hook_name.endswith("hook_z"):
        return z_projected(model, sae.layer, directions)
    return orthogonalized(model, directions)


# ---------------------------------------------------------------- activations


def hooked_module(model: GPT2LMHeadModel, hook_name: str) -> tuple[torch.nn.Module, bool]:
    """The module whose input (True) or output (False) a TransformerLens hook name means."""
    _, layer, point = hook_name.split(".", 2)
    block = blocks(model)[int(layer)]
    if point == "attn.hook_z":
        return block.attn.c_proj, True
    if point in ("hook_resid_pre", "hook_resid_post"):
        return block, point == "hook_resid_pre"
    raise ValueError(f"hook {hook_name!r}: expected hook_resid_pre, hook_resid_post or attn.hook_z")


@contextmanager
def tapped(model: GPT2LMHeadModel, hook_name: str, seen: list[Tensor]) -> Iterator[None]:
    """Append what the hook sees, [rows, length, d], to `seen` at every run of the model."""
    module, is_input = hooked_module(model, hook_name)

    def keep(_: torch.nn.Module, args: Any, output: Any) -> None:
        value = args[0] if is_input else output
        seen.append(value[0] if isinstance(value, tuple) else value)

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def activations(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    hook_name: str,
    prompts: Sequence[str],
) -> Tensor:
    """Activations [tokens, d] at every real token of the prompts."""
    seen: list[Tensor] = []
    batches = [encode(tokenizer, part) for part in chunks(prompts)]
    with tapped(model, hook_name, seen):
        for batch in batches:
            logits(model, batch)
    return torch.cat([x[b.mask.bool()] for x, b in zip(seen, batches, strict=True)])


def explained_variance(sae: Sae, x: Tensor) -> float:
    """1 - |x - SAE(x)|^2 / |x - mean|^2 over activations [tokens, d]."""
    error = (x - sae.decode(sae.encode(x))).square().sum()
    return 1.0 - (error / (x - x.mean(0)).square().sum()).item()


# ---------------------------------------------------------------- differences


@dataclass(frozen=True)
class Drift:
    """How far an edit moves the next-token distributions; KL in nats per token."""

    kl_all: float
    kl_last: float
    flips_all: float
    flips_last: float


def drift(
    model: GPT2LMHeadModel,
    edited: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
) -> Drift:
    """KL(original || edited) and top-1 changes, over all real positions and at the last."""
    batch = encode(tokenizer, prompts)
    real = batch.mask.bool()
    before = logits(model, batch).double().log_softmax(-1)
    after = logits(edited, batch).double().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    flips = (before.argmax(-1) != after.argmax(-1)).double()
    return Drift(
        kl_all=kl[real].mean().item(),
        kl_last=kl[:, -1].mean().item(),
        flips_all=flips[real].mean().item(),
        flips_last=flips[:, -1].mean().item(),
    )
