"""Scores of neurons are what their formulas say, neuron by neuron, written out a second time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Zoo, deep
from oracles import load_model as plain_model

from surgery.arch import Architecture, identify
from surgery.checkpoint import Checkpoint
from surgery.errors import FindError
from surgery.export.load import forward_inputs, load_model
from surgery.export.tasks import find_task
from surgery.find.scores.neuron_scores import Attribution, ablation_scores, gradient_scores
from surgery.runtimes.pytorch import widen

TOLERANCE = 1e-5
LENGTHS = (7, 5, 1)


@dataclass(frozen=True)
class Names:
    """Where the reference finds things: `stream`, the norm that reads the stream after attention,
    or in parallel blocks the block and its attention; `conv`: weights lie [in, out]."""

    down: str
    final: str
    stream: str = ""
    block: str = ""
    attention: str = ""
    after: str = ""
    conv: bool = False
    centred: bool = False
    offset: int = 0


LLAMA = Names(
    "model.layers.{}.mlp.down_proj", "model.norm", "model.layers.{}.post_attention_layernorm"
)
GEMMA = Names(
    "model.layers.{}.mlp.down_proj",
    "model.norm",
    "model.layers.{}.pre_feedforward_layernorm",
    after="model.layers.{}.post_feedforward_layernorm",
    offset=1,
)
NAMES = {
    "gpt2": Names(
        "transformer.h.{}.mlp.c_proj",
        "transformer.ln_f",
        "transformer.h.{}.ln_2",
        conv=True,
        centred=True,
    ),
    "llama": LLAMA,
    "gptj": Names(
        "transformer.h.{}.mlp.fc_out",
        "transformer.ln_f",
        block="transformer.h.{}",
        attention="transformer.h.{}.attn",
        centred=True,
    ),
    "gemma2": GEMMA,
    "gpt_neox": Names(
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "gpt_neox.final_layer_norm",
        block="gpt_neox.layers.{}",
        attention="gpt_neox.layers.{}.attention",
        centred=True,
    ),
    "llama-biased": LLAMA,
    "phi3": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": GEMMA,
    "bloom": Names(
        "transformer.h.{}.mlp.dense_4h_to_h",
        "transformer.ln_f",
        "transformer.h.{}.post_attention_layernorm",
        centred=True,
    ),
    "opt": Names(
        "model.decoder.layers.{}.fc2",
        "model.decoder.final_layer_norm",
        "model.decoder.layers.{}.final_layer_norm",
        centred=True,
    ),
    "mpt": Names(
        "transformer.blocks.{}.ffn.down_proj",
        "transformer.norm_f",
        "transformer.blocks.{}.norm_2",
        centred=True,
    ),
    "falcon": Names(
        "transformer.h.{}.mlp.dense_4h_to_h",
        "transformer.ln_f",
        block="transformer.h.{}",
        attention="transformer.h.{}.self_attention",
        centred=True,
    ),
}
CAPPED = {"gemma2": {"final_logit_softcapping": 1.0}}
"""So low that the cap bends the small logits of a random model."""
QUICK = ("gpt2", "llama", "gptj", "gemma2")
FAMILIES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.campaign) for name in NAMES
]


@dataclass
class Case:
    """A model and three prompts of unlike lengths, by themselves and padded on the left."""

    name: str
    path: Path
    model: Any
    arch: Architecture
    rows: list[list[int]]

    @property
    def batch(self) -> dict[str, Any]:
        length = max(LENGTHS)
        ids = torch.tensor([[0] * (length - len(row)) + row for row in self.rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in self.rows])
        return self._taken(ids, mask)

    def single(self, row: list[int]) -> dict[str, Any]:
        ids = torch.tensor([row])
        return self._taken(ids, torch.ones_like(ids))

    def _taken(self, ids: Any, mask: Any) -> dict[str, Any]:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        every = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: every[name] for name in forward_inputs(self.model, find_task("causal-lm"))}

    def module(self, path: str, layer: int = 0) -> Any:
        return self.model.get_submodule(path.format(layer))


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, zoo: Zoo) -> Case:
    name = request.param
    path = zoo.checkpoint(name, **deep(name, 2), **CAPPED.get(name, {}))
    arch = identify(Checkpoint.open(path))
    model = load_model(path, find_task("causal-lm"), "float32")
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 101, length).tolist() for length in LENGTHS]
    return Case(name, path, model, arch, rows)


# --- attribution ---------------------------------------------------------------------------------


def read(case: Case, row: list[int]) -> dict[str, Any]:
    """What the formula is made of, in float64, at the last position of one prompt alone."""
    names, kept = NAMES[case.name], {}
    layers = range(case.arch.layers)

    def keep_input(key: Any) -> Callable[..., None]:
        def hook(module: Any, given: Any, named: Any) -> None:
            value = given[0] if given else named["hidden_states"]
            kept[key] = value.reshape(-1, value.shape[-1])[-1].double().numpy().copy()

        return hook

    def keep_output(key: Any) -> Callable[..., None]:
        def hook(module: Any, given: Any, result: Any) -> None:
            value = result[0] if isinstance(result, tuple) else result
            kept[key] = value.reshape(-1, value.shape[-1])[-1].double().numpy().copy()

        return hook

    inputs = [(names.down, "m"), (names.stream or names.block, "r"), (names.after, "mlp")]
    with ExitStack() as stack, torch.no_grad():
        final = case.module(names.final)
        hook = final.register_forward_pre_hook(keep_input("final"), with_kwargs=True)
        stack.enter_context(hook)
        for layer in layers:
            for path, key in inputs:
                if path:
                    hook = case.module(path, layer).register_forward_pre_hook(
                        keep_input((key, layer)), with_kwargs=True
                    )
                    stack.enter_context(hook)
            if names.attention:
                module = case.module(names.attention, layer)
                stack.enter_context(module.register_forward_hook(keep_output(("a", layer))))
        logits = case.model(**case.single(row), use_cache=False).logits[0, -1]
    return {"kept": kept, "choice": int(logits.argmax())}


def frozen(x: Any, like: Any, module: Any, names: Names, bias: bool = True) -> Any:
    """A norm of x with the variance of `like`."""
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    weight = module.weight.detach().double().numpy() + names.offset
    if names.centred:
        variance = np.mean((like - like.mean()) ** 2)
        x = x - x.mean()
    else:
        variance = np.mean(like**2)
    y = weight * x / np.sqrt(variance + eps)
    own = getattr(module, "bias", None)
    return y if own is None or not bias else y + own.detach().double().numpy()


def literal(case: Case, row: list[int]) -> Any:
    """log p(w* | r + m·v) − log p(w* | r) for one neuron after another: [layers, neurons]."""
    names, found = NAMES[case.name], read(case, row)
    kept, choice = found["kept"], found["choice"]
    head = case.model.get_output_embeddings()
    matrix = head.weight.detach().double().numpy()
    cap = CAPPED.get(case.name, {}).get("final_logit_softcapping")

    def log_p(stream: Any) -> float:
        z = matrix @ frozen(stream, kept["final"], case.module(names.final), names)
        z = z if getattr(head, "bias", None) is None else z + head.bias.detach().double().numpy()
        z = z if cap is None else cap * np.tanh(z / cap)
        p = np.exp(z - z.max())
        return float(np.log(p[choice] / p.sum()))

    scores = np.zeros((case.arch.layers, case.arch.sizes["mlp_width"]))
    for layer in range(case.arch.layers):
        r, m = kept["r", layer], kept["m", layer]
        r = r + kept["a", layer] if names.attention else r
        weight = case.module(names.down, layer).weight.detach().double().numpy()
        for neuron in range(len(m)):
            added = m[neuron] * (weight[neuron] if names.conv else weight[:, neuron])
            if names.after:
                norm = case.module(names.after, layer)
                added = frozen(added, kept["mlp", layer], norm, names, bias=False)
            scores[layer, neuron] = log_p(r + added) - log_p(r)
    return scores


def attributed(case: Case, budget: int) -> Any:
    attribution = Attribution(case.model, case.arch)
    recorded = attribution.record(case.batch)
    layers = [attribution.scores(layer, recorded, budget) for layer in range(case.arch.layers)]
    return np.stack(layers, axis=1)


def test_attribution_is_the_formula_of_the_paper_for_each_neuron(case: Case) -> None:
    wanted = np.stack([literal(case, row) for row in case.rows])
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(attributed(case, 7), wanted, rtol=0, atol=TOLERANCE)


def test_a_head_that_does_more_is_refused_and_not_read_wrongly(zoo: Zoo) -> None:
    path = zoo.checkpoint("llama")
    model = load_model(path, find_task("causal-lm"), "float32")
    model.lm_head.register_forward_hook(lambda module, given, result: result * 2)
    inputs = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).long()}
    with pytest.raises(FindError, match="llama: the final norm and the head alone do not give"):
        Attribution(model, identify(Checkpoint.open(path))).record(inputs)


def test_a_model_without_a_final_norm_is_refused(zoo: Zoo) -> None:
    path = zoo.checkpoint("opt-unbiased")
    model = load_model(path, find_task("causal-lm"), "float32")
    with pytest.raises(FindError, match="opt: this model has no norm before its head"):
        Attribution(model, identify(Checkpoint.open(path)))


# --- ablation and gradient -----------------------------------------------------------------------


def changed(
    model: Any, inputs: dict[str, Any], down: str, layer: int, neuron: int, factor: float
) -> Any:
    """Logits of the last position with one neuron scaled at every position."""

    def scale(module: Any, given: Any) -> Any:
        active = given[0].clone()
        active[..., neuron] *= factor
        return (active,)

    hook = model.get_submodule(down.format(layer)).register_forward_pre_hook(scale)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, -1]
    hook.remove()
    return logits.double()


def test_ablation_is_the_live_model_with_the_neuron_zero(case: Case) -> None:
    row, down = case.rows[0], NAMES[case.name].down
    single, listed = case.single(row), {0: list(range(12)), 1: [3, 1, 40]}
    found = ablation_scores(case.model, case.arch, single, listed, 5 * len(row))
    before = changed(case.model, single, down, 0, 0, 1.0).log_softmax(-1)
    choice = int(before.argmax())
    wanted = np.zeros_like(found)
    for layer, neurons in listed.items():
        for neuron in neurons:
            after = changed(case.model, single, down, layer, neuron, 0.0).log_softmax(-1)
            wanted[layer, neuron] = before[choice] - after[choice]
    assert np.abs(wanted).max() > 100 * TOLERANCE
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_the_gradient_is_the_central_difference(case: Case) -> None:
    """Each neuron a little larger and a little smaller at all positions, in float64."""
    found = gradient_scores(case.model, case.arch, case.batch)
    precise, step = plain_model(case.path, torch.float64), 1e-3
    down, chosen = NAMES[case.name].down, [(0, 0), (0, 17), (1, 5), (1, 47)]
    for number, row in enumerate(case.rows):
        single = case.single(row)
        for layer, neuron in chosen:
            with widen(torch):
                logits = [
                    changed(precise, single, down, layer, neuron, 1 + sign * step)
                    for sign in (1, -1)
                ]
            choice = int(logits[0].argmax())
            up, below = (z.log_softmax(-1)[choice] for z in logits)
            slope = float(up - below) / (2 * step)
            assert found[number, layer, neuron] == pytest.approx(slope, abs=TOLERANCE)
    assert np.abs(found).max() > 0.01


def test_nothing_is_left_in_the_model(case: Case) -> None:
    single = case.single(case.rows[0])
    with torch.no_grad():
        before = case.model(**single).logits
        attributed(case, 50)
        gradient_scores(case.model, case.arch, single)
        ablation_scores(case.model, case.arch, single, {0: [1]}, 4)
        assert torch.equal(case.model(**single).logits, before)
