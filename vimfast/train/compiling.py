"""Which models are compiled, and of which steps and evaluations are CUDA graphs.

A graph replays what was done when it was captured, so nothing in the model may be drawn or decided on the
host. A Vision Mamba says whether that is so. Of timm's models its vision transformers are known to be like that, and
compiling them pays: DeiT-Tiny takes 16.3 ms a step as a graph and 8.9 compiled (docs/benchmarks.md). A Vision Mamba is
made of kernels of its own, which the compiler leaves as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.models import VisionTransformer
from torch import nn

from vimfast.config import ModelConfig
from vimfast.errors import UserError


def is_capturable(model: nn.Module) -> bool:
    """Whether CUDA graphs can be made of a model: nothing in it is drawn or decided on the host."""
    return bool(getattr(model, "capturable", isinstance(model, VisionTransformer)))


def captures(model: nn.Module, cfg: ModelConfig, device: torch.device) -> bool:
    """Whether the training steps of a model, and its evaluations, are to be CUDA graphs."""
    return device.type == "cuda" and cfg.cuda_graph and is_capturable(model)


def compiles(model: nn.Module, cfg: ModelConfig, device: torch.device) -> bool:
    """Whether a model is to be compiled for training: as requested, else timm's vision transformers on a GPU."""
    if cfg.torch_compile is not None:
        return cfg.torch_compile
    if os.environ.get("TORCH_COMPILE") == "1":
        return True
    return device.type == "cuda" and isinstance(model, VisionTransformer)


def is_compiled(model: nn.Module) -> bool:
    """Whether :meth:`torch.nn.Module.compile` was called on it."""
    return getattr(model, "_compiled_call_impl", None) is not None


@contextmanager
def compiler_errors() -> Iterator[None]:
    """What the compiler fails on in the block is reported with the flag that helps. It compiles with the first batch.

    Raises:
        UserError: it failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # whose import takes a second
            raise
        why = " ".join(str(error).split()).partition(" Set TORCHDYNAMO_VERBOSE=1")[0]
        raise UserError(f"the model cannot be compiled ({why[:200]})", "add --no-torch-compile") from error


def uncompiled(models: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """Models compute as they are written: compiling them once more, for evaluation, takes longer than it saves."""
    eager: AbstractContextManager[object] = nullcontext()
    if any(map(is_compiled, models)):
        eager = torch.compiler.set_stance("force_eager")
    return eager
