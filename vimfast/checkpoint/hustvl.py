"""Optimizer states of hustvl/Vim's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

SETTINGS = frozenset({"weight_decay", "betas", "eps", "momentum"})  # in a group, beside what an optimizer counts there


def load_optimizer(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the optimizer's state from a checkpoint of ours or of the original code.

    The original's numbers its parameters as timm 0.4.12 groups them. Its moments go to the parameters they belong to.
    Weight decay and the like stay what this run's settings say.

    Args:
        optimizer: over `model`'s trainable parameters.
        state: the checkpoint, with ``optimizer``; ``lr_scheduler`` shows that it is the original's.

    Raises:
        ValueError, KeyError: the state is of another optimizer or model.
    """
    saved = state["optimizer"]
    if "lr_scheduler" not in state:
        settings = [{key: group[key] for key in SETTINGS & group.keys()} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, kept in zip(optimizer.param_groups, settings, strict=True):
            group.update(kept)
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
