"""The words that settings choose from, each list once: flags, YAML files and the parts of a run read it here."""

from __future__ import annotations

from typing import Literal

Auto = Literal["auto"]
Interpolation = Literal["bicubic", "bilinear", "random"]  # random: each image its own of the other two
Decoder = Literal["auto", "hardware", "cuda", "cpu"]
OnBadImage = Literal["stop", "skip"]
OnDivergence = Literal["stop", "rollback"]
ImageOrder = Literal["permutation", "window"]
CopiesOn = Literal["all-ranks", "one-rank"]
EraseMode = Literal["pixel", "const", "rand"]
MixMode = Literal["batch", "pair", "elem"]
PositionResampling = Literal["patches", "original"]
Distillation = Literal["none", "soft", "hard"]
Schedule = Literal["cosine", "tanh", "step", "multistep", "poly", "constant", "wsd", "rsqrt", "none"]

AUTO: Auto = "auto"
MUON = "muon"  # the optimizer that is ours; all others are timm's
