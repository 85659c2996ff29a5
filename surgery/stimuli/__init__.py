"""Inputs: prompts, seeded tokens, shapes and padding, each named by digest and seed."""

from surgery.stimuli.interface import SETS, Batch, Stimulus

__all__ = ["SETS", "Batch", "Stimulus"]
