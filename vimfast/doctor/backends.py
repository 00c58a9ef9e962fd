"""Vim-Tiny on each backend, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from vimfast.doctor.isolation import Failed, NoAnswer, import_here, isolated
from vimfast.doctor.lines import Line
from vimfast.doctor.results import Trial, Usable

PART = "Vim-Tiny"
_SECONDS = 300.0  # the first run on a GPU compiles its kernels
_IMPORTED = ("vimfast.doctor.trials", "vimfast.models")  # by what is tried
_OLDEST_GPU = (8, 0)  # that gluon serves
_ALLOWED = {"fp32": 1e-4, "bf16": 0.1}  # largest error: tens of times what is usual
_OPTIONAL = "mamba_ssm"  # used only where it is asked for
_AGAIN = "please report it with the output of vimfast doctor --json; --scan-backend reference avoids it"
_BUSY = f"if other work keeps this machine busy, try again without it; else {_AGAIN}"


def look_at_backends(
    usable: Usable, threads: int | None = None, begin: Callable[[str], None] = lambda name: None
) -> list[Line]:
    """A line for each, on the first GPU if there is one.

    Args:
        threads: of torch; None: as many as usual.
        begin: is told the name of the next one.
    """
    device = f"cuda:{usable.numbers[0]}" if usable.numbers else "cpu"
    lines = []
    names = isolated(_names, _SECONDS)
    with suppress(Failed):  # which is then said of each
        isolated(_import_all, _SECONDS)
        _import_all()
    for name in names:
        begin(name)
        lines.append(_look(name, device, usable, threads))
    return lines


def _names() -> list[str]:
    from vimfast.doctor.trials import backends

    return backends()


def _import_all() -> None:
    for module in _IMPORTED:
        import_here(module)


def _train(name: str, device: str, threads: int | None) -> Trial:
    from vimfast.doctor.trials import train_vim_tiny

    return train_vim_tiny(name, device, threads)


def _look(name: str, device: str, usable: Usable, threads: int | None = None) -> Line:
    try:
        trial = isolated(partial(_train, name, device, threads), _SECONDS)
    except Failed as error:
        if name == _OPTIONAL:
            return Line(
                PART, name, "yellow", f"fails on {device} ({error})", "fix or uninstall its packages, see above"
            )
        return Line(PART, name, "red", f"fails on {device} ({error})", _BUSY if isinstance(error, NoAnswer) else _AGAIN)
    if trial.unfit is not None:
        if name == "gluon" and usable.capability >= _OLDEST_GPU:
            fix = "install the triton that torch goes with, and a C compiler; training is many times slower without"
            return Line(PART, name, "red", f"does not run on {device}: {trial.unfit}", fix)
        return Line(PART, name, "green", f"not on this machine: {trial.unfit}")
    errors = (
        f"{precision} is off by {error.outputs:.0e} (outputs) and {error.gradients:.0e} (gradients)"
        for precision, error in trial.errors.items()
    )
    milliseconds = 1000 * trial.seconds
    found = f"{device}: {', '.join(errors)}, {milliseconds:,.0f} ms for forward and backward"
    figures = {"device": device, "ms": milliseconds, **{name: e._asdict() for name, e in trial.errors.items()}}
    if all(max(error) <= _ALLOWED[precision] for precision, error in trial.errors.items()):  # not if one is nan
        return Line(PART, name, "green", found, figures=figures)
    return Line(PART, name, "red", f"{found}; that is too much", _AGAIN, figures)
