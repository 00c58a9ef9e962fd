"""Imported by what runs kernels in Triton's interpreter: it leaves out work that the interpreter does in vain.

Values are the same to the bit, for what is left out has no part in them: a check of integers for overflow whose result
nobody looks at, as ``device_assert`` does nothing where ``debug`` is off; listing the members of ``triton.language``
again for each call of a function by a kernel; a table of types for each operation; types of blocks and shapes of
tensors that have been made before; asking four times what kind each argument is of. Together they take more than half
of the time. The names are private to Triton: where a version has others, this fails, and may be left out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from triton.language import core
from triton.language.semantic import TritonSemantic
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

_broadcast, _unwrap = TritonSemantic.broadcast_impl_value, core._unwrap_if_constexpr
_make_block_type = core.block_type.__init__
_block_types: dict[tuple[Any, tuple[int, ...]], dict[str, Any]] = {}  # what is known of each, by element and shape
_of_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}  # the numbers of elements and the sides, as tensors have them


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    shape = tuple(type.shape.values) if type.is_block() else ()
    if shape not in _of_shapes:
        _of_shapes[shape] = core.constexpr(math.prod(shape)), core.tuple([core.constexpr(side) for side in shape])
    self.numel, self.shape = _of_shapes[shape]


def _know_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    if isinstance(element_ty, core.pointer_type):  # it has no hash
        return _make_block_type(self, element_ty, shape)
    sides = tuple(_unwrap_one(side) for side in shape)
    if (element_ty, sides) not in _block_types:
        _make_block_type(self, element_ty, shape)
        _block_types[element_ty, sides] = dict(vars(self))
    return vars(self).update(_block_types[element_ty, sides])


def _broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
    """Tensors of one shape are what they are."""
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


def _unwrap_one(value: Any) -> Any:
    if isinstance(value, (list, tuple, core.tuple)):
        return _unwrap(value)
    return value.value if isinstance(value, core.constexpr) else value


core.tensor.__init__, core._unwrap_if_constexpr = _make_tensor, _unwrap_one
core.block_type.__init__, TritonSemantic.broadcast_impl_value = _know_block_type, _broadcast_others
