"""The plain Triton kernels in Triton's interpreter, on a CPU, at small sizes; each in float32 against float64.

The checks are in triton_on_cpu.py; there the block's op runs too, with the reference in the place of the Gluon scan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    # Whether a kernel is interpreted is settled when its module is imported: the checks need a process of their own.
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_on_cpu.py"))],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
def test_kernels_match_float64(errors: dict[str, float]) -> None:
    assert len(errors) == 32
    # Eight roundings of fp32; with 17 draws, the inputs of a block gave at most 2.7e-7.
    bad = {name: error for name, error in errors.items() if not error < 5e-7}
    assert not bad


def test_errors_say_what_fits() -> None:
    from vimfast_kernels.conv.launch import causal_conv_silu
    from vimfast_kernels.norm.launch import add_norm

    x: Tensor = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="weight is for 6 channels, x has 8"):
        causal_conv_silu(x, torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match="reverse has 1 entries for 2 directions"):
        causal_conv_silu(x, torch.zeros(2, 8, 4), reverse=[False])
    with pytest.raises(ValueError, match=r"weight is \(7,\) for 8 channels"):
        add_norm(x, None, torch.zeros(7))
    with pytest.raises(ValueError, match=r"noise is \(2,\) for 1 samples"):
        add_norm(x, None, torch.zeros(8), noise=torch.zeros(2))
