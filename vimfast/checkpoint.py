"""Checkpoints: written aside and renamed, read without running code from the file, hustvl/Vim's included."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vimfast.errors import UserError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is always a whole checkpoint: the old one, or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}); the checkpoint before it is untouched") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours or of the original code onto the CPU.

    Returns:
        a dict with at least ``model``, a state dict; a bare state dict is wrapped so.

    Raises:
        UserError: missing, damaged, no checkpoint, or holding objects that would run code.
    """
    try:
        # The original's files carry their command line as a Namespace: plain data, the one class let in.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a checkpoint.pth") from None
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            raise UserError(
                f"{path} holds objects that could run code and is refused; save its tensors alone"
            ) from None
        raise UserError(f"{path} is no checkpoint, or a damaged one; use an earlier one") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no checkpoint, or a damaged one ({first}); use an earlier one") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        return state
    if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
        return {"model": state}
    raise UserError(f"{path} holds no model weights: want a state dict, or a dict with one under 'model'")


def load_weights(model: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load a state dict strictly.

    Raises:
        UserError: names or shapes differ, with the first of them.
    """
    own = model.state_dict()
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    trouble = shapes + [f"{name} is missing there" for name in sorted(missing)]
    trouble += [f"{name} is unknown here" for name in sorted(unknown)]
    if trouble:
        more = f" (and {len(trouble) - 1} more)" if len(trouble) > 1 else ""
        raise UserError(
            f"{origin} is of another model: {trouble[0]}{more}; "
            "give the --model, --model-kwargs, --num-classes and --input-size it was trained with"
        )
    model.load_state_dict(weights)
