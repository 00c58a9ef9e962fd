"""The DALI graphs: encoded JPEGs in, normalized tensors out. The only module that imports ``nvidia.dali``.

The graphs draw nothing at random: boxes and flips come in with the pictures. On a GPU the decoder is DALI's mixed one
and everything behind it runs on the GPU; on a CPU the graph is the same with CPU operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vimfast.errors import UserError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pillow's filters of the same names: the cubic is Keys' with a = -0.5, and both widen where they shrink a picture.
_FILTERS = {"bicubic": "INTERP_CUBIC", "bilinear": "INTERP_LINEAR"}
_DTYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16"}

Feed = Callable[[], tuple[Any, ...]]


class DecodeError(RuntimeError):
    """DALI failed on the oldest batch in work; the graph is of no more use."""


@dataclass(frozen=True)
class GraphSettings:
    """What a graph is built from.

    Args:
        batch_size: the largest batch.
        size: side of the square pictures that come out, pixels.
        device: where batches come out; a CUDA device with its index.
        interpolation: the resampling filter, ``"bicubic"`` or ``"bilinear"``; antialiased.
        mean, std: of the three channels, for values in [0, 1].
        dtype: float32 or float16.
        threads: decoding threads on the CPU.
        prefetch: batches in work at once.
        hw_decoder_load: share of the pictures that go to the GPU's JPEG engine, where it has one.
    """

    batch_size: int
    size: int
    device: torch.device
    interpolation: str = "bicubic"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    dtype: torch.dtype = torch.float32
    threads: int = 1
    prefetch: int = 2
    hw_decoder_load: float = 0.65

    def __post_init__(self) -> None:
        if self.interpolation not in _FILTERS:
            raise UserError(
                f"interpolation is {self.interpolation!r}{did_you_mean(self.interpolation, _FILTERS)}; "
                f"want one of {', '.join(_FILTERS)}"
            )

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Graph:
    """A DALI pipeline that pulls batches from a feed and works ahead of whoever calls :meth:`next`."""

    def __init__(self, define: Callable[[GraphSettings, Feed], tuple[Any, Any]], settings: GraphSettings, feed: Feed):
        """
        Args:
            define: :func:`training_graph` or :func:`evaluation_graph`.
            feed: gives the next batch's inputs, as `define` lists them, and raises StopIteration at the end. DALI
                does not copy them: they must not change while their batch is in work. It keeps them alive.
        """
        self._settings = settings
        self._pipe = _dali().Pipeline(
            batch_size=settings.batch_size,
            num_threads=settings.threads,
            device_id=settings.device.index if settings.on_gpu else None,
            prefetch_queue_depth=settings.prefetch,
            exec_dynamic=True,  # a batch has memory of its own, which nobody overwrites while a tensor holds it
        )
        with self._pipe:
            self._pipe.set_outputs(*define(settings, feed))
        self._pipe.build()

    def next(self) -> tuple[Tensor, Tensor]:
        """Images [b, 3, size, size] and labels int64 [b], on the device, in DALI's memory.

        On a GPU the host does not wait: the work that torch's current stream is given from here on does.

        Raises:
            StopIteration: the feed has ended and its last batch was handed out.
            DecodeError: DALI failed.
        """
        stream = torch.cuda.current_stream(self._settings.device) if self._settings.on_gpu else None
        try:
            images, labels = self._pipe.run(stream)
        except RuntimeError as error:
            raise DecodeError(str(error)) from error
        return torch.from_dlpack(images.as_tensor()), torch.from_dlpack(labels.as_tensor())

    def rewind(self) -> None:
        """Pull from the feed again, after :meth:`next` raised StopIteration."""
        self._pipe.reset()


def training_graph(settings: GraphSettings, feed: Feed) -> tuple[Any, Any]:
    """Decode a box, resize it to the square, mirror, normalize.

    The feed gives: n arrays of uint8; labels, int64 [n]; the box's corner (top, left) and its extent (height, width)
    in pixels, int32 [n, 2] each; 1 where to mirror, int32 [n].
    """
    fn, types = _dali().fn, _dali().types
    encoded, labels, corner, extent, flip = fn.external_source(
        feed,
        num_outputs=5,
        dtype=[types.UINT8, types.INT64, types.INT32, types.INT32, types.INT32],
        ndim=[1, 0, 1, 1, 0],
        no_copy=True,
    )
    boxes = fn.decoders.image_slice(encoded, start=corner, shape=extent, axes=[0, 1], **_decoder(settings))
    squares = _resize(boxes, settings, [settings.size, settings.size])
    return _normalize(squares, settings, mirror=flip), labels.gpu() if settings.on_gpu else labels


def evaluation_graph(settings: GraphSettings, feed: Feed) -> tuple[Any, Any]:
    """Decode, resize, cut the square out, normalize.

    The feed gives: n arrays of uint8; labels, int64 [n]; height and width to resize to, float32 [n, 2]; the square's
    corner (top, left) in the resized picture, int32 [n, 2].
    """
    fn, types = _dali().fn, _dali().types
    encoded, labels, resized, corner = fn.external_source(
        feed,
        num_outputs=4,
        dtype=[types.UINT8, types.INT64, types.FLOAT, types.INT32],
        ndim=[1, 0, 1, 1],
        no_copy=True,
    )
    options = _decoder(settings)
    if settings.on_gpu:
        options["jpeg_fancy_upsampling"] = True  # chroma as libjpeg, and so Pillow, has it; costs time
    whole = _resize(fn.decoders.image(encoded, **options), settings, resized)
    squares = fn.slice(whole, start=corner, shape=[settings.size, settings.size], axes=[0, 1])
    return _normalize(squares, settings), labels.gpu() if settings.on_gpu else labels


def _decoder(settings: GraphSettings) -> dict[str, Any]:
    options = {"output_type": _dali().types.RGB, "adjust_orientation": False}  # nobody here applies EXIF rotation
    if not settings.on_gpu:
        return {**options, "device": "cpu"}
    # Pinned decoding threads of several processes on one host would share the first few cores.
    return {**options, "device": "mixed", "hw_decoder_load": settings.hw_decoder_load, "affine": False}


def _resize(pictures: Any, settings: GraphSettings, size: Any) -> Any:
    filter_type = getattr(_dali().types, _FILTERS[settings.interpolation])
    return _dali().fn.resize(pictures, size=size, interp_type=filter_type, antialias=True)


def _normalize(pictures: Any, settings: GraphSettings, mirror: Any = 0) -> Any:
    return _dali().fn.crop_mirror_normalize(
        pictures,
        mirror=mirror,
        mean=[255 * value for value in settings.mean],
        std=[255 * value for value in settings.std],
        dtype=getattr(_dali().types, _DTYPES[settings.dtype]),
        output_layout="CHW",
    )


def _dali() -> SimpleNamespace:
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI cannot be imported ({error}); pip install 'vimfast[cuda13]', or 'vimfast[cuda12]' for a "
            "driver before CUDA 13 (both decode on a machine without a GPU too)"
        ) from None
    return SimpleNamespace(fn=fn, types=types, Pipeline=Pipeline)
