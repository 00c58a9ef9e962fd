"""Whether a module may be run by reading its parameters, or has to be called.

Fused kernels take the parameters of many modules at once and call none of them. That is the same only as long as
nobody hooked, wrapped, parametrized or replaced one: adapters, quantization, pruning and probes do.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import Tensor, nn

Kind = TypeVar("Kind", nn.Linear, nn.Conv1d, nn.Conv2d)

_TRACED = "torch._subclasses"  # tensors of torch.export and the compiler, which stand for plain ones


def unwatched(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether it is of one of these classes itself, without hooks of its own and with the class's forward pass.

    A parametrization makes the module one of another class. Hooks on all modules at once
    (``torch.nn.modules.module.register_module_forward_hook``) do not count.
    """
    return type(module) in kinds and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """:func:`unwatched`, and its weight is a tensor like any other, not one that computes itself."""
    if not unwatched(module, kind):
        return False
    weight: type = type(module._parameters.get("weight"))
    return weight is nn.Parameter or weight is Tensor or weight.__module__.startswith(_TRACED)
