"""From a kernel to machine code for this processor, and to the threads of torch, which run it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import llvmlite
import llvmlite.binding as llvm
import torch
from llvmlite import ir

from vimfast_kernels.llvm.language import Code
from vimfast_kernels.llvm.objects import kept

_WIDTHS = {"avx512f": 16, "avx": 8}  # floats in the vectors of a processor with this feature; else 4


class Kernel(Protocol):
    """A function to be written; equal ones are compiled once."""

    def __hash__(self) -> int: ...

    @property
    def names(self) -> tuple[str, ...]: ...  # of the arguments

    def write(self, code: Code) -> None: ...


def run(kernel: Kernel, channels: int, arguments: Sequence[int]) -> None:
    """Call it on as many threads as torch uses, and wait.

    They are torch's own: a second pool would share the cores with threads of the first, which spin for a while after
    each product.

    Args:
        channels: vectors are as long as divides them.
        arguments: addresses and sizes, in the order of the kernel's names.
    """
    address, _ = _compiled(kernel, _lanes(channels))
    _gomp_parallel()(address, (ctypes.c_int64 * (len(arguments) + 1))(0, *arguments), torch.get_num_threads(), 0)


def missing() -> str | None:
    """What torch would have to have, or None."""
    return None if hasattr(ctypes.CDLL(None), "GOMP_parallel") else "needs a torch that uses GNU's OpenMP"


@functools.cache
def _gomp_parallel() -> Any:
    function = ctypes.CDLL(None).GOMP_parallel  # torch makes its OpenMP library global; calling it releases the GIL
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.cache
def _processor() -> tuple[str, str, int]:
    """(name, features, floats in a vector) of this one."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    has = llvm.get_host_cpu_features()
    features = has.flatten() + ",-prefer-256-bit" * bool(has.get("avx512f"))  # vectors are as long as they are written
    return llvm.get_host_cpu_name(), features, next((width for name, width in _WIDTHS.items() if has.get(name)), 4)


@functools.cache
def _lanes(channels: int) -> int:
    """The longest vector, a power of two, that divides the channels."""
    return min(_processor()[2], channels & -channels)


@functools.cache
def _compiled(kernel: Kernel, lanes: int) -> tuple[int, Any]:
    """(address of the function, what keeps it in memory)."""
    module = ir.Module()
    kernel.write(Code(module, "kernel", kernel.names, lanes))
    text = str(module)
    name, features, _ = _processor()
    # One for each engine, which takes it over and frees it in the end.
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=name, features=features, opt=3)
    program = kept((text, name, features, *_compiler()), lambda: _object(text, machine))
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(program))
    engine.finalize_object()
    return engine.get_function_address("kernel"), engine


def _object(text: str, machine: llvm.TargetMachine) -> bytes:
    """An object file of ELF that holds the function."""
    parsed = llvm.parse_assembly(text)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(parsed, passes)
    made: bytes = machine.emit_object(parsed)
    return made


@functools.cache
def _compiler() -> tuple[str, ...]:
    """What compiles: versions of llvmlite and LLVM, and this module, which chooses the passes."""
    return llvmlite.__version__, str(llvm.llvm_version_info), Path(__file__).read_text()
