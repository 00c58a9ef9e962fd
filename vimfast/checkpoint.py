"""Checkpoints: written atomically, read without running code from the file, hustvl/Vim's included."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vimfast.errors import UserError
from vimfast.files import atomic_write

RAW, AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")  # the original's names and ours, then timm's
WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before each name


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is always a whole checkpoint: the old one, or the new one."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); the checkpoint before it is untouched") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, of the original code or of timm onto the CPU.

    Args:
        path: a file of torch.save (a dict of a run, or a bare state dict), a ``.safetensors`` file, or a folder in the
            Hugging Face hub's layout.

    Returns:
        a dict with ``model``, a state dict, and whatever else the file holds; averaged weights are under ``model_ema``.
        The names that DDP and torch.compile prefix are cleaned.

    Raises:
        UserError: missing, damaged, no checkpoint, or holding objects that would run code.
    """
    if "://" in str(path) or str(path).startswith(("https:/", "http:/")):  # a Path has lost one slash
        raise UserError(f"{path} is an address; download the file and give its path")
    if path.is_dir():
        path = path / "model.safetensors"
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if _is_state_dict(state):
        return {"model": _unwrapped(state)}
    raw = next((state[name] for name in RAW if _is_state_dict(state.get(name))), None)
    if raw is None:
        raise UserError(f"{path} holds no model weights: want a state dict, or a dict with one under 'model'")
    averaged = next((state[name] for name in AVERAGED if _is_state_dict(state.get(name))), None)
    return {**state, "model": _unwrapped(raw), "model_ema": None if averaged is None else _unwrapped(averaged)}


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or a damaged one ({error}); use an earlier one") from None


def _read_pickle(path: Path) -> dict[str, Any]:
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
    return state if isinstance(state, dict) else {}


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in 2 * WRAPPERS:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return dict(weights)


def weights_held(state: Mapping[str, Any]) -> str:
    """Which weights :func:`load_checkpoint` found, for a line to the user."""
    return "raw weights" if state.get("model_ema") is None else "raw weights and their average (EMA)"


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], origin: str, *, resample: str | None = None
) -> list[str]:
    """Load a state dict strictly.

    Args:
        resample: how a position embedding of another grid is brought to the model's, one of
            :data:`vimfast.models.pos_embed.RESAMPLE`; None: it is an error.

    Returns:
        lines that tell what was changed on the way.

    Raises:
        UserError: names or shapes differ, with the first of them.
    """
    weights, notes = _fitted(model, weights, resample)
    shapes, missing, unknown = _differences(model, weights)
    trouble = (
        shapes + [f"{name} is missing there" for name in missing] + [f"{name} is unknown here" for name in unknown]
    )
    if trouble:
        more = f" (and {len(trouble) - 1} more)" if len(trouble) > 1 else ""
        raise UserError(
            f"{origin} is of another model: {trouble[0]}{more}; "
            "give the --model, --model-kwargs, --num-classes and --input-size it was trained with"
        )
    model.load_state_dict(weights)
    return notes


def load_for_finetuning(model: nn.Module, weights: dict[str, Tensor], origin: str, *, resample: str) -> list[str]:
    """Load what fits into a model with, perhaps, another head; a head of other classes keeps its initial values.

    Args:
        resample: as in :func:`load_weights`.

    Returns:
        lines that tell what was resampled, what was not loaded, and why.

    Raises:
        UserError: a shape outside the head differs, or nothing but the head would be loaded.
    """
    weights, notes = _fitted(model, weights, resample)
    own = model.state_dict()
    heads = head_names(model)
    anew: list[str] = []
    for head in heads:
        new, old = own.get(f"{head}.weight"), weights.get(f"{head}.weight")
        if new is not None and old is not None and new.shape != old.shape:
            anew += [f"{head}.weight", f"{head}.bias"]
            notes.append(f"{head} has {len(new)} classes here and {len(old)} in {origin}: it starts anew")
    weights = {name: value for name, value in weights.items() if name not in anew}
    shapes, missing, unknown = _differences(model, weights)
    if shapes:
        raise UserError(f"{origin} is of another model: {shapes[0]}; give the --model and --model-kwargs it is of")
    if not [name for name in own.keys() & weights.keys() if name.rpartition(".")[0] not in heads]:
        first = next(iter(weights), "nothing")
        raise UserError(f"{origin} has no weight of this model (its first is {first}); give the --model it is of")
    missing = [name for name in missing if name not in anew]
    if missing:
        notes.append(f"not in {origin}, so as initialized: {', '.join(missing)}")
    if unknown:
        notes.append(f"in {origin} and not loaded, for the model has none: {', '.join(unknown)}")
    model.load_state_dict({**own, **{name: value for name, value in weights.items() if name in own}})
    return notes


def load_optimizer(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the optimizer's state from a checkpoint of ours or of the original code.

    The original's numbers its parameters as timm 0.4.12 groups them. Its moments go to the parameters they belong to;
    learning rate, weight decay and the like stay what this run's settings say.

    Args:
        optimizer: over `model`'s trainable parameters.
        state: the checkpoint, with ``optimizer``; ``lr_scheduler`` tells that it is the original's.

    Raises:
        ValueError, KeyError: the state is of another optimizer or model.
    """
    saved = state["optimizer"]
    if "lr_scheduler" not in state:
        optimizer.load_state_dict(saved)
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    order = _original_order(model)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(numbers) != len(order) or sorted(own) != sorted(order):
        raise ValueError(f"it moves {len(numbers)} parameters and the model trains {len(own)}")
    number = dict(zip(order, numbers, strict=True))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    moved = {}
    for i, name in enumerate(own):
        values = saved["state"].get(number[name])
        if values is None:
            continue
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[name]:
                raise ValueError(f"{key} of {name} is {tuple(value.shape)} there and {tuple(shapes[name])} here")
        moved[i] = values
    optimizer.load_state_dict({"state": moved, "param_groups": optimizer.state_dict()["param_groups"]})


def _original_order(model: nn.Module) -> list[str]:
    """Names of the trainable parameters as timm 0.4.12's create_optimizer numbers them: those without decay first."""
    tokens = ("pos_embed", "cls_token", "cls_token_head", "cls_token_tail")
    decays: dict[bool, list[str]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays[parameter.ndim > 1 and not name.endswith(".bias") and name not in tokens].append(name)
    return decays[False] + decays[True]


def _fitted(model: nn.Module, weights: dict[str, Tensor], resample: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The weights with the position embedding of the model's grid, and a line if it was another's."""
    fit = getattr(model, "fit_pos_embed", None)
    if fit is None or resample is None:
        return weights, []
    fitted = fit(weights, resample)
    before, after = weights.get("pos_embed"), fitted.get("pos_embed")
    if before is None or after is None or before.shape == after.shape:
        return fitted, []
    how = " as the original does" if resample == "original" else ""
    return fitted, [f"position embedding resampled{how} from {before.shape[1]} to {after.shape[1]} positions"]


def _differences(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """(sentences on shapes, names missing in the weights, names unknown to the model)."""
    own = model.state_dict()
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    return shapes, [name for name in own if name not in weights], [name for name in weights if name not in own]


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The classifier's module names, as timm's models tell them."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)
