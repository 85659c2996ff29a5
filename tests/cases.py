"""Every op on every model, as data: what is proven, and what is refused and why.

A new op yields cases for every entry of `MODELS`, in `CASES`; a field that makes it several goes to
`WAYS`; `pytest tests/contracts --update-golden` then writes its rows into `docs/coverage.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inputs import (
    SQUARE,
    write_adapter,
    write_auroc,
    write_box,
    write_factors,
    write_means,
    write_partners,
    write_patch,
    write_vector,
)
from models import FAMILIES, MODELS, family_of
from prunings import A_GROUP, DIVISOR, FREE, NO_FIELD, ONE_OF_EACH, THREE, pruned_neurons
from recipes import HEADS, NEURONS, make_sae, sae_edit

WIDTH = 32
WIDE_HEADS = (
    "llama-biased", "mistral", "qwen3", "qwen3_moe", "gemma", "gemma-biased", "gemma2",
    "gemma3_text",
)  # fmt: skip
Z_WIDTH = {model: 64 if model in WIDE_HEADS else 32 for model in MODELS}
EXPERT_NEURONS = {
    "mixtral": ["L0E1N3", "L1E0N40", "L1E2N40"],
    "qwen3_moe": ["L0N47", "L1E1N3", "L1E0N3", "L1E0N39"],
}
HOOKS = (
    "hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post",
    "attn.hook_z",
)  # fmt: skip
ATTENTION = ("hook_attn_out", "hook_resid_mid", "attn.hook_z")
PARALLEL = tuple(hook for hook in HOOKS if hook != "hook_resid_mid")
STEERED: dict[str, tuple[str, ...]] = {
    "gptj": ("hook_resid_pre", "hook_mlp_out", "hook_resid_post"),
    "gpt_neox": PARALLEL,
    "falcon": PARALLEL, "falcon-biased": PARALLEL, "falcon-new": PARALLEL,
    "falcon-one-norm": PARALLEL,
    "mpt": (), "mistral": (), "qwen2": (), "phi3": (), "phi3-partial": (), "mixtral": (),
    "qwen3": ATTENTION, "qwen3_moe": ATTENTION, "gemma": ATTENTION, "gemma-biased": ATTENTION,
    "gemma2": ("attn.hook_z",), "gemma3_text": ("attn.hook_z",),
}  # fmt: skip
"""Where a bias can hold a vector; everywhere, in models that are not listed."""
ENCODERS = ("bert", "roberta", "distilbert")
RESCALED = (*ENCODERS, "gemma2", "gemma3_text")
"""Models that normalise what blocks write; bloom does so with its embeddings alone."""
NORMALISES = "normalises what is written"
NORMED_QUERIES = ("qwen3", "qwen3_moe", "gemma3_text")
STILL = (*ENCODERS, "gpt2", "bloom", "mpt", "opt", "opt-unbiased", "falcon-rw")
"""Models whose queries and keys meet as they are, without rotary embedding or norms."""
WAYS = {
    "sae": {"patch": "orthogonalize"},
    "direction": {"keep_norms": "none"},
    "layers": {"factor": 0.0},
    "merge": {"method": "linear"},
    "head_spectrum": {"circuit": "ov", "fold_norm": False},
}
"""Fields by which one op is several, with their defaults."""


@dataclass(frozen=True)
class Case:
    """One edit of one model; `refused` is what the error says where it has no meaning.

    Of a family it says what the family does or lacks, as `docs/coverage.md` repeats it. `of` tells
    what is edited, where the fields of the edit do not.
    """

    model: str
    edit: dict[str, Any]
    hook: str = ""
    refused: str = ""
    untie: bool = False
    files: Callable[[Path, Path], None] | None = None
    of: str = ""

    def __str__(self) -> str:
        op = self.edit.get("patch", self.edit["op"])
        op = f"mean-{op}" if "mean" in self.edit else op
        keys = {"op", "sae", "patch", "features", "heads", "neurons", "file", "adapter", "at",
                "vector", "with", "mean", "auroc"}  # fmt: skip
        rest = [f"{k}={v}" for k, v in self.edit.items() if k not in keys]
        return "-".join(
            [self.model, op, self.hook.replace("blocks.", ""), *rest, *filter(None, [self.of])]
        )

    @property
    def op(self) -> str:
        return str(self.edit["op"])

    @property
    def way(self) -> str:
        """The op and what it is told to do, as `docs/coverage.md` names its rows."""
        fields = {key: self.edit.get(key, usual) for key, usual in WAYS.get(self.op, {}).items()}
        if self.op == "layers" and fields["factor"] != 0:
            fields["factor"] = "any"
        if "mean" in self.edit:
            fields = {"mean": "given"}
        if "prune" in self.edit:
            fields = {"prune": True}
        if "auroc" in self.edit:
            fields = {"method": self.edit["method"]}
        said = [
            f"{key}: {str(value).lower()}" for key, value in fields.items() if value is not False
        ]
        said += [self.of] if self.of else []
        return f"`{self.op}`" + (f" {', '.join(said)}" if said else "")

    def prepare(self, folder: Path, base: Path) -> dict[str, Any]:
        """Writes the files the edit reads for the model `base`; returns the recipe's fields."""
        if self.files is not None:
            self.files(folder, base)
        if self.hook:
            width = Z_WIDTH[self.model] if self.hook.endswith("hook_z") else WIDTH
            make_sae(folder / "sae", self.hook, width)
        return {"edits": [self.edit], "untie": self.untie}


def scaling_cases() -> Iterator[Case]:
    for model in MODELS:
        neurons = {**NEURONS, "neurons": EXPERT_NEURONS.get(model, NEURONS["neurons"])}
        for edit in (HEADS, neurons):
            for factor in (0.0, 0.5, -2.0):
                yield Case(model, {**edit, "factor": factor})


BIASLESS = {
    "heads": ("gptj", "mpt", "mistral", "qwen2", "phi3", "phi3-partial", "mixtral"),
    "neurons": (
        "mpt", "mistral", "qwen2", "qwen3", "gemma", "gemma-biased", "gemma2", "gemma3_text",
        "phi3", "phi3-partial",
    ),
}  # fmt: skip
"""Models whose output or down projection can have no bias."""


def mean_cases() -> Iterator[Case]:
    """Two heads of one layer go into one bias, and a head of another layer."""
    heads = {**HEADS, "heads": ["L0H1", "L1H2", "L1H0"], "mean": {"file": "means.safetensors"}}
    neurons = {**NEURONS, "neurons": ["L0N3", "L1N40", "L1N0"]}
    neurons["mean"] = {"file": "means.safetensors", "key": "neurons"}
    for model in MODELS:
        for edit in (heads, neurons):
            family, role = model.partition("-")[0], "o_proj" if edit is heads else "down_proj"
            refused = f"{family} has no bias at {role}" if model in BIASLESS[edit["op"]] else ""
            if edit is neurons and model in EXPERT_NEURONS:
                edit, refused = {**edit, "neurons": EXPERT_NEURONS[model]}, "depends on the router"
            for factor in (0.0, -0.5):
                yield Case(model, {**edit, "factor": factor}, refused=refused, files=write_means)


def pruning_cases() -> Iterator[Case]:
    for model in MODELS:
        fixed = "" if model in (*FREE, *DIVISOR) else "has no head_dim"
        yield Case(model, ONE_OF_EACH, refused=fixed)
        for edit in (A_GROUP, THREE):
            yield Case(model, edit, refused=fixed, of="whole key-value groups")
        wide = "has no field for the width of the MLP" if model in NO_FIELD else ""
        yield Case(model, pruned_neurons(model), refused=wide)


GATED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral",
    "qwen3_moe",
)  # fmt: skip
"""Families with two projections before the product of the MLP."""


def dampening_cases() -> Iterator[Case]:
    edit = {"op": "neurons", "auroc": {"file": "auroc.csv"}}
    for model in MODELS:
        family = model.partition("-")[0]
        sides = [{"on": "gate"}, {"on": "up"}] if family in GATED else [{}]
        for side in sides:
            for method in (
                {"method": "aura"},
                {"method": "det0", "top": 2},
                {"method": "damp", "factor": -0.5},
            ):
                yield Case(model, {**edit, **side, **method}, files=write_auroc)
        wrong = {} if family in GATED else {"on": "gate"}
        refused = f"{family} has a gated MLP" if family in GATED else f"{family} has no gate"
        edit_ = {**edit, **wrong, "method": "aura"}
        yield Case(model, edit_, refused=refused, files=write_auroc)


def projection_cases() -> Iterator[Case]:
    post, z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
    for model in MODELS:
        allow = {"approximate": True} if model in RESCALED else {}
        whole = {"approximate": True} if model == "bloom" else allow
        for features, more in (((1, 4, 7), {}), ((2,), {"strength": 0.5, "center": True})):
            edit = sae_edit("orthogonalize", features, **whole, **more)
            yield Case(model, edit, post, untie=True)
        for layers in ([1], "0-1"):
            edit = sae_edit("orthogonalize", layers=layers, **allow)
            yield Case(model, edit, "blocks.0.hook_mlp_out")
        yield Case(model, sae_edit("z_project", strength=0.75), z)
        yield Case(model, sae_edit("z_project", (3,)), "blocks.0.attn.hook_z")
        yield Case(model, sae_edit("z_project"), post, refused="hooks 'hook_resid_post'")
        yield Case(model, sae_edit("orthogonalize", **allow), z, refused="hooks 'attn.hook_z'")
    for model in (*RESCALED, "bloom"):
        edit = sae_edit("orthogonalize")
        yield Case(model, edit, post, untie=True, refused=NORMALISES)
    for model in RESCALED:
        edit = sae_edit("orthogonalize", layers=[0])
        yield Case(model, edit, post, refused=NORMALISES)


def rank_one_cases() -> Iterator[Case]:
    post = "blocks.1.hook_resid_post"
    for model in MODELS:
        allow = {"approximate": True} if model in RESCALED else {}
        whole = {"approximate": True} if model == "bloom" else allow
        yield Case(model, sae_edit("rank1", strength=0.2, **whole), post, untie=True)
        edit = sae_edit("rank1", (2,), strength=-0.5, layers=[1], **allow)
        yield Case(model, edit, "blocks.0.hook_mlp_out")
        yield Case(model, sae_edit("rank1"), "blocks.1.attn.hook_z", refused="hooks 'attn.hook_z'")
    for model in (*RESCALED, "bloom"):
        edit = sae_edit("rank1")
        yield Case(model, edit, post, untie=True, refused=NORMALISES)


def neuron_cases() -> Iterator[Case]:
    """With the family's usual activation, of which OPT alone has the one that a feature has."""
    for model in MODELS:
        relu = family_of(model) == "opt"
        gated = "" if relu else "gates neurons otherwise than a feature's relu"
        never = {
            "mixtral": "has experts, of which a token passes only some",
            **dict.fromkeys(("bloom", "mpt"), "has no config field for the width of its MLPs"),
        }
        for features, strength in (((1, 4, 7), 0.2), ((2,), -0.5)):
            edit = sae_edit("append_neuron", features, strength=strength)
            yield Case(model, edit, "blocks.0.mlp.input", refused=never.get(model, gated))
        if relu:
            elsewhere = "hooks 'hook_resid_post'; append_neuron on opt needs one of mlp.input"
            yield Case(model, edit, "blocks.1.hook_resid_post", refused=elsewhere)


def steering_cases() -> Iterator[Case]:
    for model in MODELS:
        for hook in HOOKS:
            for layer in (0, 1):
                yield Case(
                    model,
                    sae_edit("steer_bias", strength=3.0),
                    f"blocks.{layer}.{hook}",
                    refused=steering_refusal(model, hook, layer),
                )
        if STEERED.get(model, HOOKS):
            yield Case(
                model,
                sae_edit("steer_bias"),
                "blocks.0.hook_normalized",
                refused="hooks 'hook_normalized'",
            )


def steering_refusal(model: str, hook: str, layer: int) -> str:
    """Why no bias can hold a vector there, by hand: what enters the first block of a decoder is
    an embedding without a bias, but in bloom, which normalises it."""
    steered, family = STEERED.get(model, HOOKS), model.partition("-")[0]
    if not steered:
        return f"{family} has no bias that could hold this steering"
    if hook not in steered:
        return f"hooks '{hook}'; steer_bias on {family} needs one of"
    first = hook == "hook_resid_pre" and layer == 0 and model not in (*ENCODERS, "bloom")
    return f"{family} has no bias at blocks.0" if first else ""


def written_cases() -> Iterator[Case]:
    patch = {"op": "tensor", "file": "patch.safetensors"}
    lora = {"op": "lora", "adapter": "adapter"}
    for model in MODELS:
        yield Case(model, patch, files=write_patch, untie=True)
        yield Case(model, lora, files=write_adapter, untie=True)
        for scale in (1.0, -0.5) if model in FAMILIES else (-0.5,):
            edit = {"op": "low_rank", "file": "uv.safetensors", "scale": scale}
            yield Case(model, edit, files=write_factors, untie=True)
    for model in FAMILIES:
        at = {SQUARE[model].format(1): [3, 5]}
        yield Case(model, {"op": "tensor", "file": "box.safetensors", "at": at}, files=write_box)


def direction_cases() -> Iterator[Case]:
    vector = {"vector": {"file": "d.safetensors", "key": "d"}}
    edit = {"op": "direction", **vector}
    columns = {"keep_norms": "columns"}
    more: tuple[dict[str, Any], ...] = (
        {"strength": 0.5, "layers": [1]},
        {**columns, "strength": -0.5, "matrices": ["down_proj", "embed"]},
        {"matrices": ["o_proj"], "layers": "0-1"},
    )
    for model in MODELS:
        allow = {"approximate": True} if model in (*RESCALED, "bloom") else {}
        for fields in ({}, columns, *(more if model in FAMILIES else ())):
            yield Case(model, {**edit, **allow, **fields}, files=write_vector, untie=True)
        if allow:
            for fields in ({}, columns):
                yield Case(model, {**edit, **fields}, refused=NORMALISES, files=write_vector)
    yield Case("bloom", {**edit, "layers": [0, 1]}, files=write_vector)


def layer_cases() -> Iterator[Case]:
    edit = {"op": "layers", "layers": [1]}
    for model in MODELS:
        normalises = "normalises what a block gives before adding it"
        said = normalises if model in ("gemma2", "gemma3_text") else ""
        for part, factor in (("attn", 0.0), ("mlp", -0.5), ("both", 2.0)):
            refused = said if factor else ""
            yield Case(model, {**edit, "part": part, "factor": factor}, refused=refused)
        yield Case(model, {"op": "layers", "layers": "0-1"})


def merge_cases() -> Iterator[Case]:
    one = {"op": "merge", "with": [{"model": "other", "weight": 0.4}]}
    two = {**one, "with": [*one["with"], {"model": "third", "weight": 0.3}]}
    for model in MODELS:
        for edit in (
            {**one, "include": ["*.1.*"], "exclude": ["*norm*"]},
            {**two, "method": "task_arithmetic"},
            {**one, "method": "slerp"},
            {**two, "method": "ties", "density": 0.3},
        ):
            yield Case(model, edit, files=write_partners)


def spectrum_cases() -> Iterator[Case]:
    head = {"op": "head_spectrum", "heads": ["L0H1", "L1H0", "L1H3"], "components": [0, 2]}
    for model in MODELS:
        output = {"op": "lm_head_spectrum", "components": [0, 3]}
        for factor in (0.0, 0.5, -1.0) if model in FAMILIES else (-1.0,):
            yield Case(model, {**output, "factor": factor}, untie=True)
            yield Case(model, {**head, "factor": factor})
        qk = {**head, "circuit": "qk", "components": [0], "factor": -2.0}
        yield Case(model, qk, refused=meeting_refusal(model))
        norm = f"{model} has no norm before attention" if model in ENCODERS else ""
        yield Case(model, {**head, "fold_norm": True}, refused=norm)


def meeting_refusal(model: str) -> str:
    """Why no projection alone holds a change of where a head looks, by hand."""
    if model in NORMED_QUERIES:
        return "normalises its queries"
    turned = "turns queries and keys by their positions before they meet"
    return "" if model in STILL else turned


CASES = [
    *scaling_cases(),
    *mean_cases(),
    *pruning_cases(),
    *dampening_cases(),
    *projection_cases(),
    *rank_one_cases(),
    *neuron_cases(),
    *steering_cases(),
    *written_cases(),
    *direction_cases(),
    *layer_cases(),
    *merge_cases(),
    *spectrum_cases(),
]
MEANT = [case for case in CASES if not case.refused]
REFUSED = [case for case in CASES if case.refused]
