"""Features' activations and effects are those of a hooked model, one feature at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finding import lab_of, planted
from models import Zoo, deep
from recipes import make_sae
from sae_folders import files_of

from surgery.arch import Architecture, identify
from surgery.checkpoint import Checkpoint
from surgery.edits.autoencoders import opened
from surgery.edits.autoencoders.encoding import read_encoder
from surgery.edits.autoencoders.hooks import point_of
from surgery.errors import EditError, FindError, InputError
from surgery.export.load import forward_inputs, load_model
from surgery.export.tasks import find_task
from surgery.find.features import Features
from surgery.find.prompts.rows import Inputs
from surgery.find.scores.feature_effects import Site, attribution, direct
from surgery.runtimes.pytorch import widen
from surgery.stimuli import Stimulus

GPT2 = {
    "hook_resid_pre": ("transformer.h.1", "input"),
    "hook_resid_mid": ("transformer.h.1.ln_2", "input"),
    "hook_resid_post": ("transformer.h.1", "output"),
    "attn.hook_z": ("transformer.h.1.attn.c_proj", "input"),
    "hook_attn_out": ("transformer.h.1.attn.c_proj", "output"),
    "hook_mlp_out": ("transformer.h.1.mlp.c_proj", "output"),
    "mlp.input": ("transformer.h.1.mlp", "input"),
}
OTHERS = {
    ("llama", "hook_resid_post"): ("model.layers.1", "output"),
    ("llama", "hook_resid_mid"): ("model.layers.1.post_attention_layernorm", "input"),
    ("llama", "attn.hook_z"): ("model.layers.1.self_attn.o_proj", "input"),
    ("gemma2", "hook_attn_out"): ("model.layers.1.post_attention_layernorm", "output"),
    ("opt-unbiased", "hook_resid_post"): ("model.decoder.layers.1", "output"),
    ("opt", "mlp.input"): ("model.decoder.layers.1.fc1", "input"),
}
PLACES = {**{("gpt2", site): place for site, place in GPT2.items()}, **OTHERS}
CASES = [pytest.param(case, id="-".join(case)) for case in PLACES]
OFTEN = {("gpt2", "attn.hook_z"), ("llama", "hook_resid_mid"), ("gemma2", "hook_attn_out")}
INTO_STREAM = [
    pytest.param(c, id="-".join(c), marks=[] if c in OFTEN else [pytest.mark.campaign])
    for c in PLACES
    if c[1] != "mlp.input"
]
LATENTS = 12

Change = Callable[[Any], Any]


@dataclass
class Case:
    """A float64 model, an autoencoder at a hook point of it, and three prompts, the second one
    padded on the left."""

    model: Any
    arch: Architecture
    site: Site
    inputs: Inputs
    pairs: tuple[Any, Any]
    place: tuple[str, str]

    @property
    def shape(self) -> tuple[int, int]:
        batch, length = self.inputs["input_ids"].shape
        return batch, length

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        """Our own hand on the activation, by the name of the module."""
        path, side = self.place
        module = self.model.get_submodule(path)

        def before(module: Any, inputs: Any) -> Any:
            return (change(inputs[0]), *inputs[1:])

        def after(module: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        register = {"input": module.register_forward_pre_hook,
                    "output": module.register_forward_hook}[side]  # fmt: skip
        with register(before if side == "input" else after):
            yield

    def read(self) -> Any:
        kept: list[Any] = []

        def keep(x: Any) -> Any:
            kept.append(x.clone())
            return x

        with self.changed(keep), torch.no_grad():
            self.model(**self.inputs)
        return kept[0].reshape(*self.shape, -1)

    def margin(self, change: Change = lambda x: x) -> Any:
        """Logit differences [batch] of a whole run."""

        def shaped(x: Any) -> Any:
            return change(x.reshape(*self.shape, -1)).reshape(x.shape)

        with self.changed(shaped), torch.no_grad():
            last = self.model(**self.inputs).logits[:, -1]
        rows = torch.arange(len(last))
        return last[rows, self.pairs[0]] - last[rows, self.pairs[1]]

    def features(self) -> Any:
        """Activations [batch, length, n]; zero where padded."""
        return literal_features(self.site, self.read()) * self.inputs["attention_mask"][..., None]

    def without(self, f: Any, feature: int, share: float) -> Any:
        """The margins with a share of one feature taken out where it is active; the error term
        stays, for nothing else of x is touched."""
        wrote = f[..., feature, None] * self.site.encoder.w_dec[feature]
        return self.margin(lambda now: now - share * wrote)


def literal_features(site: Site, x: Any) -> Any:
    """A ReLU autoencoder that subtracts b_dec, one feature at a time."""
    seen = x - site.encoder.b_dec
    read = [(seen * site.encoder.w_enc[:, i]).sum(-1) for i in range(LATENTS)]
    return torch.stack([value * (value > 0) for value in read], dim=-1)


def wide(encoder: Any) -> Any:
    """An encoder in float64."""
    names = ("w_enc", "w_dec", "b_enc", "b_dec", "norms", "threshold")
    return replace(encoder, **{name: getattr(encoder, name).double() for name in names})


def site_of(model: Any, arch: Architecture, root: Path, site: str) -> Site:
    width = arch.sizes["z_width"] if site == "attn.hook_z" else arch.width
    make_sae(root / "sae", f"blocks.1.{site}", width, LATENTS)
    with opened("sae", files_of(root)) as sae:
        return Site(model, arch, point_of(sae, None, arch), read_encoder(sae))


@pytest.fixture
def case(request: pytest.FixtureRequest, zoo: Zoo, tmp_path: Path) -> Iterator[Case]:
    family, name = request.param
    path = zoo.checkpoint(family, **deep(family, 3))
    task, arch = find_task("causal-lm"), identify(Checkpoint.open(path))
    model = load_model(path, task, "float32").double()
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :2] = 0
    every = {
        "input_ids": torch.randint(3, arch.sizes["vocab"], (3, 7), generator=generator),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    inputs = {key: every[key] for key in forward_inputs(model, task)}
    site = site_of(model, arch, tmp_path, name)
    site = replace(site, encoder=wide(site.encoder))
    pairs = (torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    with widen(torch):  # float64 also where a model asks for float32 by name
        yield Case(model, arch, site, inputs, pairs, PLACES[request.param])


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_feature_is_read_where_it_belongs_and_nowhere_else(case: Case) -> None:
    _, found = case.site.read(case.inputs)
    expected = case.features()
    assert (expected > 0).any()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", INTO_STREAM, indirect=True)
def test_attribution_is_the_slope_of_the_ablation_that_keeps_the_error_term(case: Case) -> None:
    """Central differences: a millionth of each feature out, and in, at once at all positions."""
    found, _ = attribution(case.site, case.inputs, case.pairs, 1)
    step, f = 1e-6, case.features()
    for feature in range(0, LATENTS, 3):
        ends = [case.without(f, feature, share) for share in (step, -step)]
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(found[:, feature], slope, rtol=1e-5, atol=1e-6)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("case", INTO_STREAM, indirect=True)
def test_steps_add_up_to_what_all_features_do_together(case: Case) -> None:
    """The integral of the gradient along the way is the difference of its ends (arXiv
    1703.01365), which a sum over n steps comes n times as near to as the gradient at one end."""
    small = replace(case.site.encoder, w_dec=case.site.encoder.w_dec * 0.01)
    site = replace(case.site, encoder=small)
    f = case.features()
    explained = f @ small.w_dec
    expected = case.margin(lambda now: now - explained) - case.margin()
    many, once = (attribution(site, case.inputs, case.pairs, n)[0].sum(1) for n in (15, 1))
    assert (many - expected).abs().max() < 0.2 * (once - expected).abs().max()


LINEAR = [pytest.param(("gpt2", "hook_resid_post"), id="gpt2")]


@pytest.mark.parametrize("case", LINEAR, indirect=True)
@pytest.mark.parametrize("steps", [1, 3])
def test_where_all_that_follows_is_linear_attribution_is_exact(case: Case, steps: int) -> None:
    """Block 2 and the final norm passed by, the head alone reads what the feature is taken from."""
    model = case.model
    for name in ("attn.c_proj", "mlp.c_proj"):
        for parameter in model.get_submodule(f"transformer.h.2.{name}").parameters():
            parameter.data.zero_()
    model.transformer.ln_f = torch.nn.Identity()
    found, _ = attribution(case.site, case.inputs, case.pairs, steps)
    clean, f = case.margin(), case.features()
    for feature in range(LATENTS):
        exact = case.without(f, feature, 1.0) - clean
        torch.testing.assert_close(found[:, feature], exact, rtol=1e-9, atol=1e-9)


def literal_logits(case: Case, h: Any, v: Any) -> Any:
    """Logits [batch, vocab] of h + v through the final norm with the scale that h alone has."""
    model, arch = case.model, case.arch
    head = model.lm_head.weight
    if arch.family == "opt":
        return (h + v) @ head.T
    if arch.family == "gpt2":
        norm = model.transformer.ln_f
        sigma = (h.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        centred = (h + v) - (h + v).mean(-1, keepdim=True)
        return (centred / sigma * norm.weight + norm.bias) @ head.T
    norm = model.model.norm
    epsilon = norm.eps if arch.family == "gemma2" else norm.variance_epsilon
    weight = norm.weight + (1 if arch.family == "gemma2" else 0)
    sigma = ((h**2).mean(-1, keepdim=True) + epsilon).sqrt()
    return ((h + v) / sigma * weight) @ head.T


FINAL = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "gemma2": "model.norm",
    "opt": "lm_head",
}


@pytest.mark.parametrize("case", INTO_STREAM, indirect=True)
def test_a_direct_effect_is_that_of_the_logits_with_the_norm_held(case: Case) -> None:
    found, _ = direct(case.site, case.inputs, case.pairs)
    kept: list[Any] = []
    final = case.model.get_submodule(FINAL[case.arch.family])
    with final.register_forward_pre_hook(lambda m, given: kept.append(given[0])), torch.no_grad():
        case.model(**case.inputs)
    h = kept[0][:, -1]
    f = case.features()[:, -1]
    rows = torch.arange(3)
    for feature in range(LATENTS):
        wrote = f[:, feature, None] * case.site.encoder.w_dec[feature]
        if case.place[0].endswith("c_proj") and case.place[1] == "input":
            wrote = wrote @ case.model.get_submodule(case.place[0]).weight
        elif case.place[0].endswith("o_proj"):
            wrote = wrote @ case.model.get_submodule(case.place[0]).weight.T
        moved = literal_logits(case, h, -wrote) - literal_logits(case, h, 0 * h)
        expected = moved[rows, case.pairs[0]] - moved[rows, case.pairs[1]]
        torch.testing.assert_close(found[:, feature], expected, rtol=1e-7, atol=1e-9)
    assert found.abs().max() > 0.001


# --------------------------------------------------------------------------------- the finder


def stimuli(seed: int = 0) -> list[Stimulus]:
    """Prompts of unlike lengths, of both sets in turn."""
    rng = np.random.default_rng(seed)
    lengths = (3, 7, 5, 1, 6, 4, 2)
    return [
        Stimulus(
            f"s{n}",
            ("target", "preserve")[n % 2],
            input_ids=tuple(int(i) for i in rng.integers(3, 101, length)),
        )
        for n, length in enumerate(lengths)
    ]


def literal_difference(path: Path, place: tuple[str, str], position: str) -> dict[str, Any]:
    """Every prompt alone, without padding, on a model of transformers' own."""
    from oracles import load_model as stock

    model = stock(path)
    sae = np.random.default_rng(0)
    decoder = sae.normal(size=(LATENTS, 32)).astype(np.float32)
    encoder = sae.normal(size=(32, LATENTS)).astype(np.float32)
    found: dict[str, list[Any]] = {"target": [], "preserve": []}
    for stimulus in stimuli():
        kept: list[Any] = []
        with model.get_submodule(place[0]).register_forward_hook(
            lambda m, i, o, kept=kept: kept.append(o[0] if isinstance(o, tuple) else o)
        ), torch.no_grad():  # fmt: skip
            model(input_ids=torch.tensor([stimulus.input_ids]))
        x = kept[0][0].numpy()
        f = np.maximum((x - decoder[0]) @ encoder, 0)
        found[stimulus.set].append(f if position == "mean" else f[-1:])
    means = {name: np.mean([f.mean(0) for f in own], axis=0) for name, own in found.items()}
    often = np.mean([(f > 0).any(0) for f in found["target"]], axis=0)
    return {**means, "score": means["target"] - means["preserve"], "frequency": often}


@pytest.mark.parametrize("position", ["mean", "last"])
@pytest.mark.parametrize(
    ("family", "place"),
    [("gpt2", ("transformer.h.1", "output")), ("llama", ("model.layers.1", "output"))],
)
def test_the_difference_is_that_of_prompts_run_one_by_one(
    family: str, place: tuple[str, str], position: str, zoo: Zoo, tmp_path: Path
) -> None:
    path = zoo.checkpoint(family, **deep(family, 3))
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_post", 32, LATENTS)
    lab = lab_of(path, stimuli(), tmp_path / "journal")
    ranking = Features(sae=tmp_path / "sae", position=position).rank(lab)
    expected = literal_difference(path, place, position)
    features = [int(i) for i in ranking.column("feature")]
    assert sorted(features) == list(range(LATENTS))
    assert all(isinstance(row[0], int) for row in ranking.rows)
    assert ranking.column("score") == sorted(ranking.column("score"), reverse=True)
    for name, values in expected.items():
        np.testing.assert_allclose(ranking.column(name), values[features], atol=1e-5, err_msg=name)


def test_a_search_goes_on_where_it_stopped(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_post", 32, LATENTS)
    path = zoo.checkpoint("gpt2", **deep("gpt2", 3))
    finder = Features(sae=tmp_path / "sae")
    lab, told = lab_of(path, stimuli(), tmp_path / "journal"), []
    lab = replace(lab, progress=lambda *how: told.append(how))
    first = finder.rank(lab)
    assert told[-1] == ("features on preserve", 3, 3)
    monkeypatch.setattr(Site, "read", lambda *given: pytest.fail("read again"))
    assert finder.rank(lab) == first


def test_a_proposal_is_a_recipe_entry_that_names_the_hook(zoo: Zoo, tmp_path: Path) -> None:
    make_sae(tmp_path / "sae", "transformer.h.1", 32, LATENTS)
    lab = lab_of(zoo.checkpoint("gpt2", **deep("gpt2", 3)), stimuli(), tmp_path / "journal")
    finder = Features(sae=tmp_path / "sae")
    ranking = finder.rank(lab)
    proposal = finder.propose(lab, ranking, [2, 0])
    best = [int(ranking.column("feature")[index]) for index in (2, 0)]
    assert [dict(entry) for entry in proposal.entries] == [{
        "op": "sae", "sae": tmp_path / "sae", "features": best, "patch": "orthogonalize",
        "strength": 1.0, "hook": "blocks.1.hook_resid_post",
    }]  # fmt: skip
    assert proposal.untie


def test_random_features_are_active_ones_that_were_not_chosen(zoo: Zoo, tmp_path: Path) -> None:
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_post", 32, LATENTS)
    lab = lab_of(zoo.checkpoint("gpt2", **deep("gpt2", 3)), stimuli(), tmp_path / "journal")
    finder = Features(sae=tmp_path / "sae")
    ranking = finder.rank(lab)
    silent = {int(feature) for feature in ranking.column("feature")[-2:]}
    rows = [row[:-1] + (0.0 if row[0] in silent else 0.5,) for row in ranking.rows]
    ranking = replace(ranking, rows=tuple(rows))
    chosen = {int(ranking.column("feature")[index]) for index in (0, 1)}
    seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        [entry] = finder.draw(lab, ranking, [0, 1], rng).entries
        assert len(set(entry["features"])) == 2
        seen |= set(entry["features"])
    assert seen == set(range(LATENTS)) - chosen - silent


@pytest.mark.parametrize(
    ("family", "site", "options", "said"),
    [
        ("bert", "hook_resid_post", {}, "find features needs a decoder; bert is an"),
        ("gpt2", "hook_resid_post", {"position": "first"}, "position is 'first'; expected mean"),
        ("gpt2", "hook_resid_post", {"steps": 0}, "steps is 0; expected at least 1"),
        ("gpt2", "hook_resid_post", {"patch": "z_project"}, "z_project on gpt2 needs one of"),
        ("gpt2", "hook_resid_post", {"patch": "erase"}, "patch: Input should be"),
        ("gpt2", "hook_resid_post", {"strength": float("nan")}, "strength: Input should be"),
        ("gpt2", "hook_resid_post", {"method": "attribution"}, "no training prompt of set target"),
        ("gpt2", "mlp.input", {}, "orthogonalize on gpt2 needs one of"),
        ("opt", "mlp.input", {"patch": "append_neuron", "method": "direct"}, "can be taken out"),
        ("gemma2", "hook_resid_post", {}, "orthogonalize is not exact on gemma2"),
        ("gptj", "hook_resid_mid", {}, "gptj has no single activation at blocks.1.hook_resid_mid"),
        ("gpt2", "hook_nothing", {}, "hook_nothing"),
    ],
)
def test_what_cannot_be_found_is_said_before_anything_runs(
    family: str, site: str, options: dict[str, Any], said: str, zoo: Zoo, tmp_path: Path
) -> None:
    make_sae(tmp_path / "sae", f"blocks.1.{site}", 32, LATENTS)
    path = zoo.checkpoint(family)
    if family == "bert":
        arch = identify(Checkpoint.open(path))
        base = lab_of(zoo.checkpoint("gpt2"), stimuli(), tmp_path / "journal")
        lab = replace(base, arch=arch)
    else:
        lab = lab_of(path, stimuli(), tmp_path / "journal")
    with pytest.raises(FindError, match=said):
        Features(sae=tmp_path / "sae", **options).rank(lab)
    assert not (tmp_path / "journal").exists()


def test_features_of_what_an_mlp_reads_can_become_neurons(zoo: Zoo, tmp_path: Path) -> None:
    make_sae(tmp_path / "sae", "blocks.1.mlp.input", 32, LATENTS)
    lab = lab_of(zoo.checkpoint("opt"), stimuli(), tmp_path / "journal")
    finder = Features(sae=tmp_path / "sae", patch="append_neuron", strength=2.0)
    proposal = finder.propose(lab, finder.rank(lab), [0])
    assert not proposal.untie
    with planted(lab, proposal, tmp_path / "recipe"):
        pass


def test_prompts_of_one_set_alone_have_no_difference(zoo: Zoo, tmp_path: Path) -> None:
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_post", 32, LATENTS)
    train = [one for one in stimuli() if one.set == "target"]
    lab = lab_of(zoo.checkpoint("gpt2"), train, tmp_path / "journal")
    with pytest.raises(FindError, match="hold none of set preserve"):
        Features(sae=tmp_path / "sae").rank(lab)


def test_a_folder_without_an_autoencoder_is_bad_input(zoo: Zoo, tmp_path: Path) -> None:
    lab = lab_of(zoo.checkpoint("gpt2"), stimuli(), tmp_path / "journal")
    with pytest.raises(InputError, match="holds no autoencoder"):
        Features(sae=tmp_path).rank(lab)
    make_sae(tmp_path / "sae", "blocks.1.hook_resid_post", 32, LATENTS, architecture="new")
    with pytest.raises(EditError, match="has the activation 'new'"):
        Features(sae=tmp_path / "sae").rank(lab)
