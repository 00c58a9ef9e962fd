"""Exported files against the model: programs of torch.export, ONNX in onnxruntime, TorchScript, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
import vim_float64
from torch import Tensor, nn

from vimfast import export, exporting
from vimfast.errors import UserError
from vimfast.formats import TOLERANCE, example_images, largest_difference, onnx_model, read_onnx, record, write_onnx
from vimfast.models import create_model
from vimfast_kernels import selective_scan

NAME = "vim_tiny_patch16_224"
SMALL = {"depth": 1, "embed_dim": 32, "num_classes": 5}


def small(size: int, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(NAME, img_size=size, **{**SMALL, **options}).eval()


def with_extreme_steps(model: nn.Module) -> nn.Module:
    """With time steps from 0 to hundreds, and rates from 1e-3 to 1e3."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
                value.copy_(torch.linspace(-120, 300, len(value))[torch.randperm(len(value))])
            elif name.endswith(("A_log", "A_b_log")):
                value.uniform_(-7, 7)
    return model


class Exported(NamedTuple):
    folder: Path
    model: nn.Module
    printed: str


def run_export(checkpoint: Path, out: Path, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vimfast export", str(checkpoint), "--out", str(out), *flags])
        export.main()


def save(model: nn.Module, size: int, path: Path) -> Path:
    config = {"model": {"model": NAME, "input_size": size, "model_kwargs": {"depth": 1, "embed_dim": 32}}}
    torch.save({"model": model.state_dict(), "config": config, "classes": list("abcde")}, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """All files of a model with extreme time steps, written by the command."""
    folder = tmp_path_factory.mktemp("formats")
    model = with_extreme_steps(small(224))
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        run_export(save(model, 224, folder / "run.pth"), folder / "out", "--onnx", "--pt2")
    return Exported(folder / "out", model, "\n".join(lines))


def test_the_command_compares_each_file_with_the_model(exported: Exported) -> None:
    names = {"model.safetensors", "config.json", "model.pt2", "model.onnx"}
    assert {path.name for path in exported.folder.iterdir()} == names
    for name in names - {"config.json"}:
        (line,) = (line for line in exported.printed.splitlines() if name in line)
        file, _, outputs = line.partition(": outputs ")
        assert file == str(exported.folder / name)
        found = re.fullmatch(r"(?:differ from the model's by at most (\S+)|are the model's, bit for bit)", outputs)
        assert found
        assert float(found[1] or 0) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnxruntime_computes_what_the_model_does(exported: Exported, batch: int) -> None:
    images = torch.randn(batch, 3, 224, 224)
    with torch.no_grad():
        wanted = exported.model(images)
    assert wanted.isfinite().all()
    assert wanted.abs().max() > 0.01
    got = read_onnx(exported.folder / "model.onnx")(images)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_the_onnx_model_is_standard_and_whole(exported: Exported) -> None:
    path = exported.folder / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert not {node.op_type for node in model.graph.node} & {
        "SplitToSequence",
        "SequenceAt",
        "Reciprocal",
        "Loop",
        "If",
    }
    assert [node.op_type for node in model.graph.node].count("Scan") == 1  # of the only block
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_nothing_is_said_about_constants_that_stay_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_onnx(small(32), example_images((3, 32, 32)), tmp_path / "model.onnx")  # so small that all are folded
    assert not [record.getMessage() for record in caplog.records if "onnxscript" in record.name]


def test_onnx_of_larger_images(tmp_path: Path) -> None:
    model, images = small(384), example_images((3, 384, 384))
    write_onnx(model, images, tmp_path / "model.onnx")
    assert largest_difference(model, read_onnx(tmp_path / "model.onnx"), images) < 1e-5


def test_a_program_runs_where_vimfast_cannot_be_imported(exported: Exported, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["vimfast"] = sys.modules["vimfast_kernels"] = None  # importing either fails
import torch
run = torch.export.load({str(exported.folder / "model.pt2")!r}).module()
torch.manual_seed(0)
torch.save([run(torch.randn(batch, 3, 224, 224)).detach() for batch in (1, 4)], {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
    torch.manual_seed(0)
    for batch, got in zip((1, 4), torch.load(tmp_path / "logits", weights_only=True), strict=True):
        with torch.no_grad():
            wanted = exported.model(torch.randn(batch, 3, 224, 224))
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {
            "bimamba_type": "none",
            "if_bidirectional": True,
            "depth": 2,
            "final_pool_type": "mean",
            "if_cls_token": False,
        },
        {"bimamba_type": "v1", "if_rope": True, "rms_norm": False, "stride": 12, "use_middle_cls_token": False},
    ],
    ids=["none", "v1"],
)
def test_other_kinds_of_models_are_recorded_too(options: dict[str, Any]) -> None:
    model = small(48, **options)
    run = record(model, example_images((3, 48, 48))).module()
    for batch in (0, 1, 4):
        images = torch.randn(batch, 3, 48, 48)
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), atol=1e-5, rtol=1e-5)


def test_torchscript_of_any_batch() -> None:
    model = small(48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of comparisons of shapes, and that torch would rather have torch.export used
        traced = torch.jit.trace(model, (torch.randn(3, 3, 48, 48),))
    for batch in (1, 5):
        images = torch.randn(batch, 3, 48, 48)
        with torch.no_grad():
            torch.testing.assert_close(traced(images), model(images), atol=1e-5, rtol=1e-5)
    assert "vimfast::" not in str(traced.inlined_graph)


def test_symbolic_traces_are_refused_with_the_alternative() -> None:
    with pytest.raises(UserError, match=r"symbolic_trace knows no shapes.*; take torch\.export\.export\(model"):
        torch.fx.symbolic_trace(small(48))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripts_are_refused_with_the_alternative() -> None:
    for model in (small(48), torch.nn.Sequential(small(48))):
        with pytest.raises(UserError, match=r"torch\.jit\.script compiles Python.*; take torch\.jit\.trace\(model"):
            torch.jit.script(model)


@pytest.mark.parametrize("dt", [-200.0, 0.0, 90.0, 1e4])
def test_extreme_time_steps_neither_overflow_nor_lose_the_present(dt: float) -> None:
    """Products of decays would underflow, and dividing by them would give inf or nan."""
    torch.manual_seed(0)
    u, B, C = torch.randn(2, 150, 6), torch.randn(2, 150, 4), torch.randn(2, 150, 4)
    delta, A = dt + 10 * torch.randn(2, 150, 6), -torch.logspace(-4, 4, 24).view(6, 4)
    wanted = vim_float64.scan(*(x.double() for x in (u, delta, A, B, C)))
    got = selective_scan(u, delta, A, B, C, backend="portable")
    torch.testing.assert_close(got.double(), wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-30, rtol=1e-4)


def test_what_is_missing_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "find_spec", lambda name: None if name == "onnxscript" else name)
    checkpoint = save(small(48), 48, tmp_path / "run.pth")
    with pytest.raises(
        UserError, match="needs onnxscript, not installed here; pip install onnx onnxscript onnxruntime"
    ):
        run_export(checkpoint, tmp_path / "out", "--onnx")
    assert not (tmp_path / "out").exists()


def test_files_of_an_earlier_export_do_not_stay(tmp_path: Path) -> None:
    checkpoint = save(small(48), 48, tmp_path / "run.pth")
    run_export(checkpoint, tmp_path / "out")
    (tmp_path / "out" / "model.onnx").touch()
    (tmp_path / "out" / "model.pt2").touch()
    run_export(checkpoint, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}


def test_what_takes_long_is_named_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of Vim-Tiny takes a minute on a busy machine, in which a terminal showed nothing."""
    model, said = small(48), []
    monkeypatch.setattr("vimfast.cli.LiveLine.say", lambda self, what: said.append(what))
    monkeypatch.setattr(exporting, "write_program", lambda *arguments: said.append("written"))
    monkeypatch.setattr(exporting, "read_program", lambda path: said.append("read") or model)
    run_export(save(model, 48, tmp_path / "run.pth"), tmp_path / "out", "--pt2")
    path = tmp_path / "out" / "model.pt2"
    assert said[-4:] == [f"writing {path}", "written", f"comparing {path} with the model", "read"]


def test_a_file_that_computes_something_else_is_reported(tmp_path: Path) -> None:
    model, images = small(48), example_images((3, 48, 48))

    def alone(batch: Tensor) -> Tensor:
        """Wrong for one image only, as a program with a fixed batch may be."""
        return model(batch) + (0.01 if len(batch) == 1 else 0.0)

    wrong: Sequence[Any] = (alone, lambda batch: model(batch) * torch.nan)
    for run in wrong:
        with pytest.raises(UserError, match=r"model.onnx differs from the model by .*; do not use it"):
            exporting._check(model, tmp_path / "model.onnx", lambda path, run=run: run, images)


def test_what_cannot_be_recorded_is_said_in_one_sentence() -> None:
    model = small(48, flip_img_sequences_ratio=0.5)
    with pytest.raises(UserError, match=r"torch.export cannot record this VisionMamba \(.*\); write its weights alone"):
        record(model, example_images((3, 48, 48)))
