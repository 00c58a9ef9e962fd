"""The selective scan's recurrence as ONNX's Scan, in ONNX Script. Imports onnxscript, which is optional.

A Scan holds one state at a time, [k, b, N, d], small enough for a core's cache, and its body is six operators.
"""

# ONNX Script reads annotations as ONNX's types, and has none that would suit the step of a Scan.
# mypy: allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op


@script(default_opset=op)
def recurrence(
    start: FLOAT[...],
    A: FLOAT[...],
    dt: FLOAT[...],
    dtu: FLOAT[...],
    B: FLOAT[...],
    C: FLOAT[...],
) -> FLOAT[...]:
    """:func:`vimfast_kernels.portable.recurrence_op`."""

    @graph()
    def step(before, dt_t, dtu_t, B_t, C_t):
        after = op.Add(op.Mul(op.Exp(op.Mul(dt_t, A)), before), op.Mul(dtu_t, B_t))
        y_t = op.MatMul(C_t, after)
        return after, y_t

    _, y = op.Scan(start, dt, dtu, B, C, body=step, num_scan_inputs=4)
    return y
