"""A small language of vectors, of which LLVM makes machine code.

Python writes a kernel by running it: arithmetic on a :class:`Value` appends an instruction to the function that is
being written, a loop in Python is unrolled, and :meth:`Code.loop` is a loop of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

_POINTER, _INT, _FLOAT = ir.PointerType(), ir.IntType(64), ir.FloatType()
_CONTRACT = ("contract",)  # a product and a sum may become one instruction, which rounds once


@dataclass(frozen=True)
class Value:
    """A vector of floats or of 32-bit integers, a 64-bit integer, or what a comparison gives."""

    code: Code
    of: Any  # llvmlite has no types

    def __add__(self, other: Value | float) -> Value:
        return self._arithmetic("add", self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self._arithmetic("sub", self, other)

    def __rsub__(self, other: float) -> Value:
        return self._arithmetic("sub", self.code.like(self, other), self)

    def __mul__(self, other: Value | float) -> Value:
        return self._arithmetic("mul", self, other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._arithmetic("div", self, other)

    def __floordiv__(self, other: Value) -> Value:
        return Value(self.code, self.code.build.udiv(self.of, other.of))

    def __mod__(self, other: Value) -> Value:
        return Value(self.code, self.code.build.urem(self.of, other.of))

    def __lshift__(self, bits: int) -> Value:
        return Value(self.code, self.code.build.shl(self.of, self.code.like(self, bits).of))

    def __lt__(self, other: Value | float) -> Value:
        return self._comparison("<", other)

    def __gt__(self, other: Value | float) -> Value:
        return self._comparison(">", other)

    def _arithmetic(self, name: str, a: Value, other: Value | float) -> Value:
        b = self.code.like(a, other)
        if self.code.is_float(a):
            return Value(self.code, getattr(self.code.build, f"f{name}")(a.of, b.of, flags=_CONTRACT))
        return Value(self.code, getattr(self.code.build, name)(a.of, b.of))

    def _comparison(self, how: str, other: Value | float) -> Value:
        compare = self.code.build.fcmp_ordered if self.code.is_float(self) else self.code.build.icmp_signed
        return Value(self.code, compare(how, self.of, self.code.like(self, other).of))


class Variable:
    """A value that changes; LLVM keeps it in a register."""

    def __init__(self, start: Value) -> None:
        self._code, self._type = start.code, start.of.type
        with self._code.build.goto_entry_block():
            self._place = self._code.build.alloca(self._type)
        self.set(start)

    def set(self, value: Value) -> None:
        self._code.build.store(value.of, self._place)

    def get(self) -> Value:
        return Value(self._code, self._code.build.load(self._place, typ=self._type))


class Code:
    """A function being written. It takes one pointer, to 64-bit integers.

    Args:
        names: of the integers, addresses and sizes, after the first one: a counter from which each of the threads that
            run the function takes its next piece of work.
        lanes: floats in a vector.
    """

    def __init__(self, module: Any, name: str, names: Sequence[str], lanes: int) -> None:
        self.lanes = lanes
        self._module = module
        self._vector, self._integers = ir.VectorType(_FLOAT, lanes), ir.VectorType(ir.IntType(32), lanes)
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
        entry, body = (function.append_basic_block(part) for part in ("entry", "body"))
        ir.IRBuilder(entry).branch(body)
        self.build = ir.IRBuilder(body)
        self._counter = function.args[0]
        self._slots = {name: i for i, name in enumerate(names, 1)}

    def argument(self, name: str) -> Value:
        return Value(self, self.build.load(self._at(self._counter, _INT, self._slots[name]), typ=_INT))

    # Values

    def integer(self, value: int) -> Value:
        return Value(self, _INT(value))

    def splat(self, value: float) -> Value:
        """A vector with this float in every lane."""
        return Value(self, ir.Constant(self._vector, [value] * self.lanes))

    def like(self, value: Value, other: Value | float) -> Value:
        """`other` as a value of the same type."""
        if isinstance(other, Value):
            return other
        kind = value.of.type
        return Value(self, ir.Constant(kind, other if kind == _INT else [other] * self.lanes))

    def is_float(self, value: Value) -> bool:
        return bool(value.of.type == self._vector)

    def bits(self, value: Value) -> Value:
        """The integers that stand for a vector's floats in memory."""
        return Value(self, self.build.bitcast(value.of, self._integers))

    def floats(self, value: Value) -> Value:
        """The inverse of :meth:`bits`."""
        return Value(self, self.build.bitcast(value.of, self._vector))

    def where(self, condition: Value, a: Value, b: Value) -> Value:
        return Value(self, self.build.select(condition.of, a.of, b.of))

    def sqrt(self, value: Value) -> Value:
        name = f"llvm.sqrt.v{self.lanes}f32"  # llvmlite cannot declare one of vectors by itself
        own = self._module.globals.get(name)
        own = own or ir.Function(self._module, ir.FunctionType(self._vector, [self._vector]), name)
        return Value(self, self.build.call(own, [value.of]))

    def total(self, value: Value) -> Value:
        """The sum over the lanes, in every lane."""
        step = self.lanes // 2
        while step:
            other = ir.Constant(self._integers, [lane ^ step for lane in range(self.lanes)])
            value = value + Value(self, self.build.shuffle_vector(value.of, value.of, other))
            step //= 2
        return value

    # Memory

    def load(self, address: Value, index: Value | int) -> Value:
        """The vector of the floats at address[index:]."""
        return Value(self, self.build.load(self._float(address, index), align=4, typ=self._vector))

    def load_one(self, address: Value, index: Value | int) -> Value:
        """The float address[index] in every lane."""
        one = self._insert(ir.Constant(self._vector, ir.Undefined), 0, address, index)
        return Value(self, self.build.shuffle_vector(one, one, ir.Constant(self._integers, [0] * self.lanes)))

    def load_every(self, address: Value, index: Value, stride: int) -> Value:
        """The vector of the floats address[index], address[index + stride], ..."""
        vector = ir.Constant(self._vector, ir.Undefined)
        for lane in range(self.lanes):
            vector = self._insert(vector, lane, address, index + lane * stride)
        return Value(self, vector)

    def store(self, value: Value, address: Value, index: Value | int) -> None:
        self.build.store(value.of, self._float(address, index), align=4)

    def scratch(self, vectors: int) -> Value:
        """The address of so many vectors on the stack."""
        with self.build.goto_entry_block():
            place = self.build.alloca(self._vector, vectors)
            place.align = 4 * self.lanes
            return Value(self, self.build.ptrtoint(place, _INT))

    def _insert(self, vector: Any, lane: int, address: Value, index: Value | int) -> Any:
        one = self.build.load(self._float(address, index), align=4, typ=_FLOAT)
        return self.build.insert_element(vector, one, _INT(lane))

    def _float(self, address: Value, index: Value | int) -> Any:
        return self._at(self.build.inttoptr(address.of, _POINTER), _FLOAT, index)

    def _at(self, pointer: Any, kind: Any, index: Value | int) -> Any:
        offset = index.of if isinstance(index, Value) else _INT(index)
        return self.build.gep(pointer, [offset], source_etype=kind)

    # Control

    @contextmanager
    def loop(self, start: Value | int, stop: Value | int) -> Iterator[Value]:
        """The block, for each integer from start to below stop."""
        first, end = (x if isinstance(x, Value) else self.integer(x) for x in (start, stop))
        i = Variable(first)
        test, body, after = (self.build.append_basic_block(name) for name in ("test", "body", "after"))
        self.build.branch(test)
        self.build.position_at_end(test)
        self.build.cbranch((i.get() < end).of, body, after)
        self.build.position_at_end(body)
        yield i.get()
        i.set(i.get() + 1)
        self.build.branch(test)
        self.build.position_at_end(after)

    @contextmanager
    def work(self, pieces: Value) -> Iterator[Value]:
        """The block, for each integer below `pieces` that no other thread has taken; the function ends after it."""
        take, body, after = (self.build.append_basic_block(name) for name in ("take", "piece", "done"))
        self.build.branch(take)
        self.build.position_at_end(take)
        taken = Value(self, self.build.atomic_rmw("add", self._counter, _INT(1), "monotonic"))
        self.build.cbranch((taken < pieces).of, body, after)
        self.build.position_at_end(body)
        yield taken
        self.build.branch(take)
        self.build.position_at_end(after)
        self.build.ret_void()
