"""What torch's FlopCounterMode says of the models, on any backend and without computing anything."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vimfast.models import VisionMamba, create_model
from vimfast.models.mixer import Block
from vimfast.models.registry import MODELS
from vimfast_kernels.block import launch as block_launch
from vimfast_kernels.conv import launch as conv_launch
from vimfast_kernels.scan import launch as scan_launch

DOCS = Path(__file__).parent.parent / "docs"
OPTIONS: dict[str, Any] = {"embed_dim": 48, "depth": 1, "ssm_cfg": {"bias": True}, "drop_path_rate": 0.0}


def counted(run: Any, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        out = run()
        if backward:
            out.sum().backward()
    return int(counter.get_total_flops())


def test_the_table_in_the_docs() -> None:
    """Multiply-adds, as papers have them; Vision Mamba's says 1.5 G of its Tiny."""
    rows = re.findall(r"^\| `(vim_\w+)` \| ([\d.]+) M \| ([\d.]+) G \|", (DOCS / "models.md").read_text(), re.MULTILINE)
    assert [name for name, _, _ in rows] == [name for name in MODELS if "bimambav2" not in name]
    for name, parameters, macs in rows:
        with torch.device("meta"):
            model = create_model(name).eval()
            images = torch.empty(1, 3, *model.patch_embed.img_size)
        assert parameters == f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"
        with torch.no_grad():
            assert macs == f"{counted(partial(model, images)) / 2e9:.2f}"


def test_the_code_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"^```python\n(.*?)^```", (DOCS / "models.md").read_text(), re.MULTILINE | re.DOTALL)
    (code,) = (text for text in found if "FlopCounterMode" in text)
    exec(compile(code, "docs/models.md", "exec"), {})
    assert capsys.readouterr().out.startswith("1.50")


def meta_block() -> tuple[Block, Tensor, Tensor]:
    block = VisionMamba(**OPTIONS, device="meta").layers[0]
    assert isinstance(block, Block)
    return block, *(torch.empty(2, 21, 48, device="meta", requires_grad=True) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("grad", [False, True])
def test_the_op_of_a_gpu_counts_as_the_ops_it_replaces(grad: bool) -> None:
    block, x, residual = meta_block()
    with torch.set_grad_enabled(grad):
        want = counted(lambda: block(x, residual)[0], backward=grad)
        got = counted(
            lambda: block_launch.bidirectional_block(
                x, residual, block.norm.weight, None, block.mixer.weights(), dtype=torch.float32
            )[0],
            backward=grad,
        )
    assert got == want > 0
    assert want == (3 if grad else 1) * counted(lambda: block(x, residual)[0])


def test_conv_and_scan_of_a_gpu_count_as_those_of_the_reference() -> None:
    b, length, d, n = 2, 21, 32, 16
    u, delta = (torch.empty(2, b, length, d, device="meta", requires_grad=True) for _ in range(2))
    B, C = (torch.empty(2, b, length, n, device="meta") for _ in range(2))
    A, D = torch.empty(2, d, n, device="meta"), torch.empty(2, d, device="meta")
    inputs = (u, delta, A, B, C, D, None, D)
    scans = [
        counted(lambda: torch.ops.vimfast.scan(*inputs, [False, True], 1.0)[0], backward=True),
        counted(lambda: torch.ops.vimfast.selective_scan_gluon(*inputs, [False, True], 1.0, True)[0], backward=True),
    ]
    assert scans[0] == scans[1] == 3 * 2 * b * length * d * (7 * n + 3)
    x, weight = u[0], torch.empty(2, d, 4, device="meta")
    convs = [
        counted(lambda: torch.ops.vimfast.conv_silu(x, weight, None, [False, True]), backward=True),
        counted(lambda: torch.ops.vimfast.causal_conv_silu_triton(x, weight, None, [False, True]), backward=True),
    ]
    assert convs[0] == convs[1] == 3 * 2 * 2 * b * length * d * 4
    assert conv_launch
    assert scan_launch


def test_wrapped_it_is_counted_too() -> None:
    """Module by module, as hooks and adapters have it, there is as much to do."""
    block, x, residual = meta_block()
    want = counted(lambda: block(x, residual)[0])
    block.mixer.in_proj = nn.Sequential(block.mixer.in_proj)
    assert not block.mixer.fused
    assert counted(lambda: block(x, residual)[0]) == want
