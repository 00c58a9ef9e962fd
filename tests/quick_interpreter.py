"""Imported by what runs kernels in Triton's interpreter: it leaves out work that the interpreter does in vain.

Values are the same to the bit, for what is left out has no part in them: a check of integers for overflow whose result
nobody looks at, as ``device_assert`` does nothing where ``debug`` is off; listing the members of ``triton.language``
again for each call of a function by a kernel; a table of types for each operation. Together they take about half of the
time. The names are private to Triton: where a version has others, this fails, and may be left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from triton.runtime import interpreter

_builder = interpreter.interpreter_builder
assert not _builder.options.debug, "the checks for overflow would be heard"
_builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)

_listed = interpreter._get_np_dtype
_of_names: dict[str, Any] = {}


def _np_dtype(tt_dtype: Any) -> Any:
    """The interpreter makes its table for each operation again."""
    scalar = tt_dtype.scalar
    if scalar.name not in _of_names:
        _of_names[scalar.name] = _listed(scalar)
    return _of_names[scalar.name]


interpreter._get_np_dtype = _np_dtype

_launch, _patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
_patched: set[int] = set()  # modules whose functions have been called by the kernel that runs


def _launch_and_forget(self: Any, *args: Any, **kwargs: Any) -> Any:
    _patched.clear()
    return _launch(self, *args, **kwargs)


def _patch_once(fn: Any) -> Any:
    """What a kernel's own module sees is patched and, after the launch, restored; what others see stays patched."""
    module = id(fn.__globals__)
    if module in _patched:
        return None
    _patched.add(module)
    return _patch(fn)


interpreter.GridExecutor.__call__, interpreter._patch_lang = _launch_and_forget, _patch_once
