"""Train a sparse autoencoder on a capitals model's activations; write a SAELens folder.

Prompts come from stimuli files. Conflict prompts are recombined (every country asked about
with other statements of the same file), so that a few hundred lines give enough activations.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from capitals import (
    CONFLICT,
    Sae,
    Stimulus,
    activations,
    explained_variance,
    load_model,
    load_sae,
    read_stimuli,
)
from safetensors.torch import save_file
from torch import Tensor


def recombined(stimuli: Sequence[Stimulus], count: int, seed: int) -> list[str]:
    """`count` conflict prompts: countries and statements of the stimuli, paired anew."""
    rng = random.Random(seed)
    conflicts = [s for s in stimuli if "stated" in s.answers]
    prompts: list[str] = []
    while conflicts and len(prompts) < count:
        asked, other = rng.choice(conflicts), rng.choice(conflicts)
        wrong = other.answers["stated"][0]
        if wrong not in asked.answers["remembered"]:
            prompts.append(CONFLICT.format(s=asked.subject, wrong=wrong))
    return prompts


def initial(x: Tensor, hook_name: str, size: int, k: int | None) -> Sae:
    """Decoder rows of unit norm in random directions, the encoder their transpose."""
    rows = torch.nn.functional.normalize(torch.randn(size, x.shape[1]), dim=1)
    return Sae(hook_name, k, rows.T.clone(), torch.zeros(size), rows, x.mean(0))


def fit(sae: Sae, x: Tensor, args: argparse.Namespace) -> None:
    """Minimise the squared error (and, without k, the L1 norm); decoder rows stay unit."""
    parameters = [sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    scale = (x - x.mean(0)).square().sum(-1).mean()
    for step in range(1, args.steps + 1):
        batch = x[torch.randint(len(x), (args.batch,))]
        features = sae.encode(batch)
        loss = (batch - sae.decode(features)).square().sum(-1).mean() / scale
        if sae.k is None:
            loss = loss + args.l1 * features.sum(-1).mean() / scale.sqrt()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            sae.w_dec.div_(sae.w_dec.norm(dim=1, keepdim=True))
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    for parameter in parameters:
        parameter.requires_grad_(False)


def save(sae: Sae, folder: Path, model_name: str) -> None:
    """`cfg.json` and `sae_weights.safetensors` as SAELens 6 reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"W_enc": sae.w_enc, "b_enc": sae.b_enc, "W_dec": sae.w_dec, "b_dec": sae.b_dec}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "sae_weights.safetensors")
    cfg = {
        "architecture": "standard" if sae.k is None else "topk",
        "d_in": sae.w_enc.shape[0],
        "d_sae": sae.w_enc.shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if sae.hook_name.endswith("hook_z") else "none",
        "metadata": {"model_name": model_name, "hook_name": sae.hook_name},
    }
    if sae.k is not None:
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--hook", required=True, help="e.g. blocks.2.hook_resid_post")
    parser.add_argument("--stimuli", type=Path, nargs="+", required=True)
    parser.add_argument("--holdout", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--conflicts", type=int, default=500, help="recombined prompts")
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--k", type=int, default=None, help="TopK; without it ReLU and L1")
    parser.add_argument("--l1", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Train, save and print what the autoencoder explains of the held-out prompts."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model)
    stimuli = [s for path in args.stimuli for s in read_stimuli(path)]
    prompts = [s.prompt for s in stimuli] + recombined(stimuli, args.conflicts, args.seed)
    x = activations(model, tokenizer, args.hook, prompts)
    print(f"{len(x)} activations of width {x.shape[1]}")
    sae = initial(x, args.hook, args.features, args.k)
    fit(sae, x, args)
    save(sae, args.output, args.model.resolve().name)
    sae = load_sae(args.output)
    held = [s.prompt for path in args.holdout for s in read_stimuli(path)]
    y = activations(model, tokenizer, args.hook, held)
    active = (sae.encode(y) > 0).float()
    print(f"held out: explained variance {explained_variance(sae, y):.4f}")
    print(f"features a token {active.sum(-1).mean():.1f}, dead {int((active.sum(0) == 0).sum())}")


if __name__ == "__main__":
    main()
