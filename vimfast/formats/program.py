"""Programs of torch.export: one file with the operators and the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vimfast.errors import UserError, one_line, remedy
from vimfast.files import atomic_write


def record(model: nn.Module, images: Tensor) -> ExportedProgram:
    """The model in evaluation mode as standard operators, for batches of any size.

    Args:
        images: an example [B, channels, H, W], B >= 2; the program takes images of its channels, height and width.

    Raises:
        UserError: what the model does depends on the images' values, or torch.export fails for another reason.
    """
    training = model.training
    try:
        with torch.no_grad():
            return torch.export.export(model.eval(), (images,), dynamic_shapes=({0: Dim("batch")},))
    except UserError:
        raise
    except Exception as error:  # of many classes, some of them private
        why = one_line(str(error).strip().partition("\n")[0])
        raise UserError(
            f"torch.export cannot record this {type(model).__name__} ({type(error).__name__}: {why})",
            "write its weights alone, or give it options that draw nothing at random in evaluation",
        ) from error
    finally:
        model.train(training)


def write_program(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write what :func:`record` returns as a .pt2 file, atomically.

    Raises:
        UserError: as :func:`record` does, or the file cannot be written.
    """
    program = record(model, images)
    try:
        with atomic_write(path) as file:
            torch.export.save(program, file)
    except OSError as error:
        fix = remedy(error, "choose another folder")
        raise UserError(f"{path} cannot be written ({error.strerror})", fix) from None


def read_program(path: Path) -> Callable[[Tensor], Tensor]:
    """What a .pt2 file computes: images [B, channels, H, W] -> the model's output."""
    run: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return run
