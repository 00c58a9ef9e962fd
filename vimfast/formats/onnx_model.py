"""Models in ONNX, for onnxruntime and other runtimes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from vimfast.errors import UserError, one_line, remedy
from vimfast.files import write_bytes
from vimfast.formats.program import record
from vimfast_kernels.portable import recurrence_op, recurrences_as_one_op

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # of the extra "export"
IMAGES, LOGITS = "images", "logits"  # the input and the output


def require_onnx() -> None:
    """Raise UserError where a package that writing or checking ONNX takes is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}, not installed here", f"pip install {' '.join(PACKAGES)}")


def write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write a model in evaluation mode as one .onnx file with its weights, for batches of any size, atomically.

    Its input is ``images`` [B, channels, H, W], its output ``logits``, both fp32; each scan is an ONNX Scan.

    Args:
        images: an example, as for :func:`~vimfast.formats.record`.

    Raises:
        UserError: a package is not installed, the model cannot be recorded or converted, or the file not be written.
    """
    require_onnx()
    from onnxscript import optimizer

    from vimfast.formats.onnx_scan import recurrence

    with recurrences_as_one_op():
        program = record(model, images)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and onnxscript about each other's versions
            converted = torch.onnx.export(
                program,
                custom_translation_table={recurrence_op._opoverload: recurrence},
                input_names=[IMAGES],
                output_names=[LOGITS],
                external_data=False,
                optimize=False,  # takes time in the square of the depth, and runtimes do the same as they load
                verbose=False,
            )
            assert converted is not None
            # What is left are operators that all runtimes have. Those with several outputs it cannot fold, and warns.
            optimizer.fold_constants(
                converted.model, should_fold=lambda node: None if len(node.outputs) == 1 else False
            )
            optimizer.remove_unused_nodes(converted.model)
    except Exception as error:  # of private classes
        why = one_line(str(error).strip().partition("\n")[0])
        raise UserError(
            f"torch.onnx cannot convert this {type(model).__name__} ({why})", "write it without ONNX"
        ) from error
    try:
        write_bytes(path, converted.model_proto.SerializeToString())
    except OSError as error:
        fix = remedy(error, "choose another folder")
        raise UserError(f"{path} cannot be written ({error.strerror})", fix) from None


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """What an .onnx file of :func:`write_onnx` computes, by onnxruntime on the CPU."""
    require_onnx()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])

    return run
