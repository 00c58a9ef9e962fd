"""Every setting of a run: defaults < recipe (``--config``) < command line, typed and strict.

:mod:`~vimfast.config.schema` has the settings, :mod:`~vimfast.config.choices` the words that they choose from,
:mod:`~vimfast.config.loading` the order in which they win, :mod:`~vimfast.config.stages` what they are in which epoch,
:mod:`~vimfast.config.checks` what is refused, and :mod:`~vimfast.config.compat` the flags of hustvl/Vim that are no
settings here.
"""

from vimfast.config.batches import Batches, plan_batches
from vimfast.config.loading import load_config, resolve
from vimfast.config.recipes import find_recipe, recipes
from vimfast.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    DistillConfig,
    EmaConfig,
    FinetuneConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)
from vimfast.config.stages import Staged, stage_of, staged

__all__ = [
    "AugmentConfig",
    "Batches",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EmaConfig",
    "FinetuneConfig",
    "MixConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "StageConfig",
    "Staged",
    "find_recipe",
    "load_config",
    "plan_batches",
    "recipes",
    "resolve",
    "stage_of",
    "staged",
]
