"""The registry of families: `model_type` of a config to the file of its facts."""

from collections.abc import Mapping

FAMILIES: Mapping[str, str] = {
    "bert": "bert.json",
    "bloom": "bloom.json",
    "distilbert": "distilbert.json",
    "falcon": "falcon.json",
    "gemma": "gemma.json",
    "gemma2": "gemma2.json",
    "gemma3_text": "gemma3_text.json",
    "gpt2": "gpt2.json",
    "gpt_neox": "gpt_neox.json",
    "gptj": "gptj.json",
    "llama": "llama.json",
    "mistral": "mistral.json",
    "mixtral": "mixtral.json",
    "mpt": "mpt.json",
    "opt": "opt.json",
    "phi3": "phi3.json",
    "qwen2": "qwen2.json",
    "qwen3": "qwen3.json",
    "qwen3_moe": "qwen3_moe.json",
    "roberta": "roberta.json",
}
