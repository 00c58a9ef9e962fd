"""What is tried with torch, DALI and the models. Imported where it may fail: in the processes of isolated functions."""

from __future__ import annotations

import copy
import io
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vimfast.data import decoding
from vimfast.data.decoding import Encoded, GraphSettings
from vimfast.data.hardware import engine_rate
from vimfast.doctor.results import Error, Gpu, Trial

ON_GPU, ON_CPU = (8, 224), (2, 64)  # images, side in pixels
_MODEL = "vim_tiny_patch16_224"
_LEVELS = 3.0  # by which a decoded image may differ from Pillow's on the mean: chroma is interpolated otherwise


def see_gpus() -> list[Gpu]:
    """All that torch sees, after a small computation on each."""
    torch.cuda.init()
    found = []
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        known = torch.cuda.get_device_properties(device)
        trouble, free = "", 0
        try:
            ones = torch.ones(256, 256, device=device)
            if float((ones @ ones).sum()) != 256**3:
                trouble = "it multiplies ones to something else"
            del ones
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(device)[0]
        except RuntimeError as error:
            trouble = str(error).splitlines()[0]
        capability = (known.major, known.minor)
        found.append(Gpu(known.name, capability, known.total_memory, free, engine_rate(device) > 0, trouble))
    return found


class _Inputs(NamedTuple):
    encoded: Encoded


def decode(name: str) -> list[str]:
    """The decoders of a device, once each has decoded an image as Pillow does; a GPU's include the CPU's.

    Raises:
        UserError, DecodeError, ValueError: one did not.
    """
    device = torch.device(name)
    ramp = np.arange(64, dtype=np.uint8)
    pixels = np.stack([*np.meshgrid(3 * ramp, 2 * ramp), np.full((64, 64), 90, np.uint8)], axis=-1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    encoded = np.frombuffer(file.getvalue(), np.uint8)
    with Image.open(file) as image:
        wanted = np.asarray(image, np.float32)
    decoders = ["cpu"] if device.type == "cpu" else ["cpu", "cuda", *(["hardware"] if engine_rate(device) else [])]
    for decoder in decoders:
        settings = GraphSettings(1, device, prefetch=1, decoder=decoder)
        graph = decoding.Graph(_Inputs, _decode_all, settings, lambda: ([encoded],))
        decoded = decoding.tensor(graph.next()[0])[0].float().cpu().numpy()
        if (off := float(np.abs(decoded - wanted).mean())) > _LEVELS:
            raise ValueError(f"decoder {decoder} is off by {off:.0f} levels of 255 on the mean")
    return decoders


def _decode_all(x: _Inputs, settings: GraphSettings) -> list[Any]:
    return [decoding.decode(x.encoded, settings)]


def backends() -> list[str]:
    """Those that a model can be built for."""
    from vimfast_kernels.backends import AUTO, backend_names

    return [name for name in backend_names() if name != AUTO]


def train_vim_tiny(backend: str, name: str, threads: int | None = None) -> Trial:
    """Forward and backward of Vim-Tiny, and inference: what they are off by from the reference in float64.

    Args:
        threads: of this process from now on; None: as many as torch takes.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    from vimfast.models import create_model
    from vimfast_kernels.backends import REFERENCE, report

    device = torch.device(name)
    size, side = ON_CPU if device.type == "cpu" else ON_GPU
    try:
        report(backend, device, torch.float32)
    except ValueError as error:
        return Trial(str(error).rpartition("; ")[0].removeprefix(f"scan backend {backend!r} "), {}, 0.0)
    torch.manual_seed(0)
    exact = create_model(_MODEL, img_size=side, drop_path_rate=0.0, scan_backend=REFERENCE).to(device)
    model = create_model(_MODEL, img_size=side, drop_path_rate=0.0, scan_backend=backend).to(device)
    model.load_state_dict(exact.state_dict())
    images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    wanted = _run(copy.deepcopy(exact).double(), images.double())
    precisions = ["fp32"]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        precisions.append("bf16")
    errors, seconds = {}, 0.0
    for precision in precisions:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            _run(model, images)  # compiles
            begin = time.perf_counter()
            got = _run(model, images)
            seconds = time.perf_counter() - begin
            with torch.no_grad():  # whose kernels may be others
                inferred = model(images).double()
        of = [float((a - b).norm() / b.norm()) for a, b in zip((*got, inferred), (*wanted, wanted[0]), strict=True)]
        errors[precision] = Error(outputs=float(np.max([of[0], of[2]])), gradients=of[1])  # NaN if one is
    return Trial(None, errors, seconds)


def _run(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and all gradients in one vector, in float64."""
    for parameter in model.parameters():
        parameter.grad = None
    outputs = model(images)
    F.cross_entropy(outputs, torch.arange(len(images), device=images.device)).backward()
    gradients = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return outputs.detach().double(), gradients
