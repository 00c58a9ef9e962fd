"""Checkpoint files: written atomically, read without running code from the file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimfast.checkpoint.checksum import ChecksumWriter, find_damage
from vimfast.checkpoint.plain_values import READABLE
from vimfast.errors import UserError, remedy
from vimfast.files import atomic_write

RAW, AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")  # the original's names and ours, then timm's
HUB_WEIGHTS = "model.safetensors"  # in a folder in the hub's layout
# What stands before the names of a model: DDP and torch.compile put it there, or it was an attribute of another module,
# such as a Lightning module or a detector.
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")

# In torch's words: a class that is not let in, or a function of a module that no checkpoint needs, such as os.
_REFUSED = re.compile(r"GLOBAL (\S+) (was not an allowed|whose module \S+ is blocked)")


class DamagedCheckpoint(UserError):
    """A file that is no checkpoint, or one whose bytes have changed since it was written."""


def save_checkpoint(path: Path, state: dict[str, Any], before: Callable[[], None] | None = None) -> None:
    """Write `state` so that `path` is always a whole checkpoint: the old one, or the new one.

    Args:
        before: as :func:`atomic_write` has it.
    """
    try:
        with atomic_write(path, before=before) as file:
            writer = ChecksumWriter(file)
            try:
                torch.save(state, cast(BinaryIO, writer))  # it needs no more of a file
            except RuntimeError:  # of its zip writer, which does not say what the disk said
                if writer.error is None:
                    raise
                raise writer.error from None
            writer.finish()
    except OSError as error:
        before_it = "the checkpoint before it is untouched" if path.exists() else "there is none before it"
        fix = remedy(error) or "check its disk"
        raise UserError(f"{path} cannot be written ({error.strerror})", f"{fix}; {before_it}") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, of the original code or of timm onto the CPU.

    Args:
        path: a file of torch.save (a dict of a run, or a bare state dict), a ``.safetensors`` file, or a folder in the
            Hugging Face hub's layout.

    Returns:
        a dict with ``model``, a state dict, and whatever else the file holds; averaged weights are under ``model_ema``,
        the hub's ``config.json`` is under ``hub``. What other modules put before names (:data:`WRAPPERS`) is removed;
        the names of weights beside the model in such a module, such as a loss's, are under ``beside``.

    Raises:
        DamagedCheckpoint: the file is no checkpoint, or its bytes have changed since it was written.
        UserError: missing, without weights, or holding objects that would run code.
    """
    if "://" in str(path) or str(path).startswith(("https:/", "http:/")):  # a Path has lost one slash
        raise UserError(f"{path} is an address; download the file and give its path")
    if path.is_dir():
        path = path / HUB_WEIGHTS
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if _is_state_dict(state):
        return {**_unwrapped(state), **_read_hub_config(path)}
    raw = next((state[name] for name in RAW if _is_state_dict(state.get(name))), None)
    if raw is None:
        raise UserError(f"{path} holds no model weights; it must be a state dict, or a dict with one under 'model'")
    if not _is_config(state.get("config")):  # another program's, whatever it calls so
        state.pop("config", None)
    averaged = next((state[name] for name in AVERAGED if _is_state_dict(state.get(name))), None)
    return {**state, "model_ema": None if averaged is None else _unwrapped(averaged)["model"], **_unwrapped(raw)}


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or a damaged one ({error}); use an earlier one") from None


def _read_hub_config(weights: Path) -> dict[str, Any]:
    """What lies beside weights in the hub's layout."""
    path = weights.with_name("config.json")
    if weights.name != HUB_WEIGHTS or not path.exists():
        return {}
    try:
        return {"hub": json.loads(path.read_bytes())}
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})", "export or download the folder again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "check its disk and permissions") from None


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        if damage := find_damage(path):
            raise _damaged(path, damage)
        with torch.serialization.safe_globals(READABLE):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a checkpoint.pth") from None
    except pickle.UnpicklingError as error:
        if named := _REFUSED.search(str(error)):
            hostile = "blocked" in named[2]
            alone = f'torch.save(torch.load("{path.name}", weights_only=False)["model"], "weights.pth")'
            raise UserError(
                f"{path} holds {named[1]}, which could run code and is refused",
                "do not load it elsewhere either" if hostile else f"if you trust it, save its weights alone: {alone}",
            ) from None
        raise _damaged(path) from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise _damaged(path, str(error.strerror)) from None
        raise UserError(f"{path} cannot be read ({error.strerror})", "check its disk and permissions") from None
    except Exception as error:  # torch's readers raise nearly anything on garbage
        if isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in str(error):  # of torch's allocator
            raise UserError(f"there is too little memory to read {path}", "free some, or use another machine") from None
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    return state if isinstance(state, dict) else {}


def _damaged(path: Path, why: str = "") -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path} is no checkpoint, or a damaged one{why and f' ({why})'}", "use an earlier one")


def _is_config(value: Any) -> bool:
    """Whether these are a run's settings, by section."""
    return isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The weights of the model, under ``model``; names of those beside it, if there are any, under ``beside``."""
    metadata = getattr(weights, "_metadata", None)  # of a module's state dict; a Vision Mamba's has its grid
    beside: list[str] = []
    for prefix in 2 * WRAPPERS:
        inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if 2 * len(inside) > len(weights):
            beside += [name for name in weights if not name.startswith(prefix)]
            weights = inside
    clean: Any = OrderedDict(weights)
    if isinstance(metadata, dict):
        clean._metadata = {name: entry for name, entry in metadata.items() if isinstance(entry, dict)}
    return {"model": clean, **({"beside": beside} if beside else {})}


def weights_held(state: Mapping[str, Any]) -> str:
    """Which weights :func:`load_checkpoint` found, for a line to the user."""
    return "weights" if state.get("model_ema") is None else "weights and their moving average (EMA)"
