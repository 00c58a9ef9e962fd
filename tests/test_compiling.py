"""Which models are compiled and captured: timm's transformers where there is a GPU, and nobody's on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from runs import TINY, Stops, differences, train
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._inductor.exc import InductorError

from vimfast.config import ModelConfig
from vimfast.errors import UserError
from vimfast.models import create_model
from vimfast.train.compiling import captures, compiler_errors, compiles, is_compiled, uncompiled
from vimfast.train.loop import Hook, TrainingRun

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
    assert compiles(own, ModelConfig(), CPU)
    assert not compiles(own, ModelConfig(torch_compile=False), CPU)  # the flag that errors name


def test_what_cannot_be_compiled_is_said_in_a_sentence(tree: Path, tmp_path: Path) -> None:
    """Also where no step is captured."""

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        raise RuntimeError("no compiler\nhere")

    def compiled(run: TrainingRun) -> list[Hook]:
        run.model.compile(backend=backend)
        return []

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    with pytest.raises(UserError, match=r"cannot be compiled .*no compiler here\)") as error:
        train("--config", str(recipe), "--data-path", str(tree), hooks=compiled)
    assert "--no-torch-compile" in str(error.value)
    assert "\n" not in str(error.value)


DEIT = {
    "model": {
        "model": "deit_tiny_patch16_224",
        "input_size": 48,
        "drop_path": 0.5,
        "torch_compile": True,
        "model_kwargs": {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3},
    },
    "data": {"batch_size": 4, "num_workers": 1},
    "schedule": {"epochs": 2, "warmup_epochs": 0, "stages": [{"epochs": 1, "input_size": 32, "batch_size": 6}, {}]},
    "run": {"device": "cpu", "log_every": 50},
}


def test_each_stage_is_compiled_for_its_batches(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for batches of any shape, which is slower. And a run that leaves blocks out at random resumes alike."""
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        given = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        traced.extend(str(tuple(value.shape)) for value in given if isinstance(value, torch.Tensor) and value.ndim == 4)
        return graph

    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **how: compile_module(module, **{"backend": backend, **how})
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(DEIT))
    flags = ("--config", str(recipe), "--data-path", str(tree), "--output_dir")
    train(*flags, str(tmp_path / "whole"))
    weight = "(24, 3, 8, 8)"
    assert traced == ["(6, 3, 32, 32)", weight, "(4, 3, 48, 48)", weight]  # a dimension of any length has a name
    parts = str(tmp_path / "parts")
    train(*flags, parts, control=Stops("epoch 1, step 1 "))
    train(*flags, parts, "--resume", "auto")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def test_errors_of_the_compiler_are_told_from_others() -> None:
    """What generates kernels has errors of its own."""
    for error in (InductorError(ValueError("no compiler"), None), Unsupported("a branch")):
        with pytest.raises(UserError, match="add --no-torch-compile"), compiler_errors():
            raise error
    with pytest.raises(RuntimeError, match="size"), compiler_errors():
        raise RuntimeError("a size is wrong")


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
