"""Which implementation runs an op. A backend is one object; to add one, register it.

``auto`` picks, for each op, the first registered backend that implements it and serves the given tensors; it never
fails. While torch.export or torch.jit.trace records a model to run elsewhere, it picks ``portable``. Under
transforms of ``torch.func``, ``portable`` also stands in for the reference. A backend that is requested by name runs
the ops it has, or raises ValueError; the reference runs those it lacks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch

F = TypeVar("F", bound=Callable[..., Any])
Op = Literal["scan", "conv", "norm", "block"]
OPS: tuple[Op, ...] = get_args(Op)
AUTO = "auto"
REFERENCE = "reference"  # has every op and serves every tensor
PORTABLE = "portable"  # likewise, in operators that other programs know
STATES = 16  # the state size to ask about for ops that have none


def _nothing(*_: Any) -> None:
    """Default: no objection."""


@dataclass(frozen=True, eq=False)
class Backend:
    """Implementations of some ops, and whether they can serve.

    Attributes:
        ops: functions with the signatures given in :mod:`vimfast_kernels.reference`.
        why_not: ``why_not(device, dtype, states)`` is the reason why supported tensors cannot be served after all, or
            None. ``auto`` warns about it once. Answers are cached, so a trial run is affordable.
        missing: what this machine lacks, phrased to follow the backend's name ("needs ..."), or None.
        devices, dtypes: what the ops support; anything if empty. ``auto`` skips unsupported tensors silently.
        gradients: False: the ops give what needs gradients to the reference.
    """

    name: str
    ops: Mapping[Op, Callable[..., Any]]
    why_not: Callable[[torch.device, torch.dtype, int], str | None] = _nothing
    missing: Callable[[], str | None] = _nothing
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    gradients: bool = True

    def unfit(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why such tensors are unsupported, or None."""
        if self.devices and device.type not in self.devices:
            return "no GPU" if device.type == "cpu" else f"{self.name} does not run on {device.type}"
        if self.dtypes and dtype not in self.dtypes:
            return f"{self.name} does not take {dtype}"
        lacking = self.missing()
        return lacking and f"{self.name} {lacking}"


class Choice(NamedTuple):
    """The backend that runs an op, and why the one that ``auto`` prefers most does not (None if it does)."""

    backend: str
    reason: str | None


_registry: dict[str, Backend] = {}  # in ``auto``'s order of preference


def register(backend: Backend, *, before: str | None = None) -> None:
    """Make a backend available by name. ``auto`` prefers it to ``before`` if given, and otherwise never picks it."""
    if backend.name in (AUTO, *_registry):
        raise ValueError(f"kernel backend {backend.name!r} already exists; choose another name")
    if unknown := [op for op in backend.ops if op not in OPS]:
        raise ValueError(f"kernel backend {backend.name!r} has the unknown op {unknown[0]!r}; ops are {', '.join(OPS)}")
    if before is not None and before not in _registry:
        raise ValueError(
            f"there is no kernel backend {before!r} to prefer {backend.name!r} to; use {', '.join(_registry)}"
        )
    names = list(_registry)
    later = [] if before is None else names[names.index(before) :]
    _registry.update({backend.name: backend, **{name: _registry.pop(name) for name in later}})
    _forget()


def unregister(name: str) -> None:
    """The inverse of :func:`register`."""
    del _registry[name]
    _forget()


def _forget() -> None:
    _serves.cache_clear()
    _choose.cache_clear()


def backend_names() -> tuple[str, ...]:
    """The choices of a model's backend: ``auto`` and every registered one."""
    return (AUTO, *_registry)


def check_backend(name: str) -> str:
    """``name`` itself if this machine can run it; otherwise ValueError with the fix."""
    if name not in backend_names():
        raise ValueError(f"unknown scan backend {name!r}; the known ones are {', '.join(backend_names())}")
    if name != AUTO and (lacking := _registry[name].missing()):
        raise ValueError(f"scan backend {name!r} {lacking}; use 'auto'")
    return name


def dispatch(
    op: Op, backend: str, device: torch.device, dtype: torch.dtype, states: int = STATES
) -> Callable[..., Any]:
    """The function that runs an op on such tensors, given a backend's name or ``auto``."""
    if backend in (AUTO, REFERENCE) and torch._C._are_functorch_transforms_active():
        backend = PORTABLE  # the reference's custom ops have no rules for vmap, and their gradients none for grad
    elif backend == AUTO and (torch.compiler.is_exporting() or torch.jit.is_tracing()):
        backend = PORTABLE
    return _registry[_chosen(op, backend, device, dtype, states)].ops[op]


def serving(op: Op, device: torch.device, dtype: torch.dtype, states: int = STATES) -> list[str]:
    """The backends that implement an op and serve such tensors, in ``auto``'s order of preference."""
    return [backend.name for backend in _having(op) if _objection(backend, device, dtype, states) is None]


def report(backend: str, device: torch.device, dtype: torch.dtype, states: int = STATES) -> dict[Op, Choice]:
    """For each op: which backend runs it on such tensors, and why not a preferred one."""
    device = torch.empty(0, device=device).device  # fills in the index
    choices = {}
    for op in OPS:
        name = _choose(op, backend, device, dtype, states)
        passed = _preferred(op, name) if backend == AUTO else ()
        choices[op] = Choice(name, next((_objection(b, device, dtype, states) for b in passed), None))
    return choices


def explain(backend: str, device: torch.device, dtype: torch.dtype, states: int = STATES) -> str:
    """:func:`report` in one line: ``"reference"``, ``"llvm (no GPU; training: reference)"``,
    ``"mamba_ssm (norm and block: reference)"``."""
    choices = report(backend, device, dtype, states)
    main, reason = choices["scan"]
    notes = [reason] if reason else []
    for other in dict.fromkeys(choice.backend for choice in choices.values()):
        ops = [op for op, choice in choices.items() if choice.backend == other]
        if other != main:
            notes.append(f"{' and '.join(filter(None, [', '.join(ops[:-1]), ops[-1]]))}: {other}")
    if not _registry[main].gradients:
        notes.append(f"training: {REFERENCE}")
    return f"{main} ({'; '.join(notes)})" if notes else main


def _constant(function: F) -> F:
    """Keep torch.compile, which traces through caches, out of a function whose result is constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports the whole compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _chosen(op: Op, backend: str, device: torch.device, dtype: torch.dtype, states: int) -> str:
    return _choose(op, backend, device, dtype, states)


@functools.cache  # free in a training step
def _choose(op: Op, backend: str, device: torch.device, dtype: torch.dtype, states: int) -> str:
    if backend == AUTO:
        return next(b.name for b in _having(op) if _serves(b.name, device, dtype, states))
    named = _registry[check_backend(backend)]
    if named.devices and device.type not in named.devices:
        kinds = " or ".join(named.devices)
        raise ValueError(f"scan backend {backend!r} runs on {kinds} tensors and these are on {device}; use 'auto'")
    if reason := _objection(named, device, dtype, states):
        raise ValueError(f"scan backend {backend!r} does not serve {dtype} on {device} ({reason}); use 'auto'")
    return backend if op in named.ops else REFERENCE


def _having(op: Op) -> Iterator[Backend]:
    return (backend for backend in _registry.values() if op in backend.ops)


def _preferred(op: Op, chosen: str) -> Iterator[Backend]:
    """The backends with an op that ``auto`` tries before the chosen one."""
    return takewhile(lambda backend: backend.name != chosen, _having(op))


def _objection(backend: Backend, device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    return backend.unfit(device, dtype) or backend.why_not(device, dtype, states)


@functools.cache  # warns once
def _serves(name: str, device: torch.device, dtype: torch.dtype, states: int) -> bool:
    backend = _registry[name]
    if backend.unfit(device, dtype):
        return False
    reason = backend.why_not(device, dtype, states)
    if reason is not None:
        later = list(_registry)[list(_registry).index(name) + 1 :]
        rest = next(n for n in later if "scan" in _registry[n].ops and _serves(n, device, dtype, states))
        warnings.warn(f"the {name} kernels do not run on {device} ({reason}); using {rest!r}", stacklevel=2)
    return reason is None
