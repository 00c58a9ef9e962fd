"""Models as files that run without this package: programs of torch.export, and ONNX.

Whatever kernels a model runs with, what is written are standard operators, for any number of images at once.
"""

from vimfast.formats.checking import TOLERANCE, example_images, largest_difference
from vimfast.formats.onnx_model import read_onnx, require_onnx, write_onnx
from vimfast.formats.program import read_program, record, write_program

__all__ = [
    "TOLERANCE",
    "example_images",
    "largest_difference",
    "read_onnx",
    "read_program",
    "record",
    "require_onnx",
    "write_onnx",
    "write_program",
]
