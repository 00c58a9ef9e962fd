"""vimfast: ImageNet shards, a DALI loader and a distributed trainer for Vision Mamba.

What is named here is imported when it is first used: torch and DALI take seconds. ``__init__.pyi`` has the same names
for type checkers and editors.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "AugmentConfig": "vimfast.config",
    "Batch": "vimfast.data.views",
    "Evaluation": "vimfast.data.views",
    "Loader": "vimfast.data.loader",
    "LoaderSettings": "vimfast.data.loader",
    "Order": "vimfast.data.order",
    "UserError": "vimfast.errors",
    "create_model": "vimfast.models",
    "embed": "vimfast.inference",
    "evaluation_loader": "vimfast.data.opening",
    "load_classifier": "vimfast.inference",
    "open_source": "vimfast.data.source",
    "predict": "vimfast.inference",
    "training_loader": "vimfast.data.opening",
    "training_view": "vimfast.data.views",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
