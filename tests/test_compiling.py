"""Which models are compiled and captured: timm's transformers where there is a GPU, and nobody's on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vimfast.config import ModelConfig
from vimfast.models import create_model
from vimfast.train.compiling import captures, compiles, is_compiled, uncompiled

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def model(name: str) -> nn.Module:
    return create_model(name) if name == "resnet18" else create_model(name, img_size=32, depth=1, embed_dim=48)


@pytest.mark.parametrize(
    ("name", "captured", "compiled"),
    [("deit_tiny_patch16_224", True, True), ("vim_tiny_patch16_224", True, False), ("resnet18", False, False)],
)
def test_by_default(name: str, captured: bool, compiled: bool) -> None:
    own, cfg = model(name), ModelConfig(model=name)
    assert (captures(own, cfg, GPU), compiles(own, cfg, GPU)) == (captured, compiled)
    assert not captures(own, cfg, CPU)
    assert not compiles(own, cfg, CPU)


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    own = model("deit_tiny_patch16_224")
    assert not captures(own, ModelConfig(cuda_graph=False), GPU)
    assert not compiles(own, ModelConfig(torch_compile=False), GPU)
    assert compiles(own, ModelConfig(torch_compile=True), CPU)
    monkeypatch.setenv("TORCH_COMPILE", "1")
    assert compiles(own, ModelConfig(torch_compile=False), CPU)


def test_an_evaluation_compiles_nothing() -> None:
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(str(graph))
        return graph

    own, images = nn.Linear(4, 4), torch.zeros(2, 4)
    assert not is_compiled(own)
    own.compile(backend=backend)
    assert is_compiled(own)
    with uncompiled([own]):
        own(images)
    assert not compiled
    own(images)
    assert len(compiled) == 1
