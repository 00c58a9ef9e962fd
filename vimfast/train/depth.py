"""Stochastic depth whose rate is changed while a model is trained."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn

from vimfast.errors import UserError
from vimfast.models.mixer import Block
from vimfast.models.vision_mamba import VisionMamba


class StochasticDepth:
    """The rates of a model's blocks, which stay in proportion to each other.

    Args:
        model: a Vision Mamba, or any model with timm's DropPath.
        rate: that it was built with; at least as large as all that follow, since with a rate of 0 it has no DropPath.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self._built = rate
        self._rates = [
            (module, name, float(getattr(module, name)))
            for module in model.modules()
            for kind, name in ((Block, "drop_path_rate"), (VisionMamba, "drop_path_rate"), (DropPath, "drop_prob"))
            if isinstance(module, kind)
        ]

    def set(self, rate: float) -> None:
        """Have the last block's rate be this one from the next pass on.

        Raises:
            UserError: the model has nothing that could be set.
        """
        if not self._rates:
            raise UserError(f"the model has no stochastic depth to set to {rate:g}", "give all stages one --drop-path")
        for module, name, own in self._rates:
            setattr(module, name, own * rate / self._built)
