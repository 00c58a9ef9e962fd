"""The DALI graphs: encoded JPEGs in, pictures of one size out. The only module that imports ``nvidia.dali``.

The graphs draw nothing at random: boxes and flips come in with the pictures. On a GPU the decoder is DALI's mixed one
(or the CPU's, if that is asked for) and everything behind it runs on the GPU; on a CPU the graph is the same with CPU
operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vimfast.errors import UserError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pillow's filters of the same names: the cubic is Keys' with a = -0.5, and both widen where they shrink a picture.
_FILTERS = {"bicubic": "INTERP_CUBIC", "bilinear": "INTERP_LINEAR"}
_INTERPOLATIONS = (*_FILTERS, "random")
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
        interpolation: the resampling filter, ``"bicubic"`` or ``"bilinear"``, antialiased; in training also
            ``"random"``, each picture's own.
        mean, std: of the three channels, for values in [0, 1].
        dtype: float32 or float16.
        threads: decoding threads on the CPU.
        prefetch: batches in work at once.
        decoder: ``"hardware"`` (the GPU's JPEG engine and its ordinary cores together), ``"cuda"`` or ``"cpu"``.
        hw_decoder_load: share of the images that go to the JPEG engine.
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
    decoder: str = "cpu"
    hw_decoder_load: float = 0.65

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATIONS:
            raise UserError(
                f"interpolation is {self.interpolation!r}{did_you_mean(self.interpolation, _INTERPOLATIONS)}; "
                f"want one of {', '.join(_INTERPOLATIONS)}"
            )

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Graph:
    """A DALI pipeline that pulls batches from a feed and works ahead of whoever calls :meth:`next`."""

    def __init__(self, define: Callable[[GraphSettings, Feed], tuple[Any, ...]], settings: GraphSettings, feed: Feed):
        """
        Args:
            define: :func:`training_graph`, :func:`copies_graph`, :func:`cut_graph`, :func:`evaluation_graph` or
                :func:`regions_graph`.
            feed: gives the next batch's inputs, as `define` lists them, and raises StopIteration at the end. DALI
                does not copy them: they must not change while their batch is in work. It keeps them alive.
        """
        self._settings = settings
        self._pipe = import_dali().Pipeline(
            batch_size=settings.batch_size,
            num_threads=settings.threads,
            device_id=settings.device.index if settings.on_gpu else None,
            prefetch_queue_depth=settings.prefetch,
            exec_dynamic=True,  # a batch has memory of its own, which nobody overwrites while a tensor holds it
        )
        with self._pipe:
            self._pipe.set_outputs(*define(settings, feed))
        self._pipe.build()

    def next(self) -> Tensor:
        """Images as the graph makes them, on the device; copies of an image side by side.

        On a GPU the host does not wait: the work that torch's current stream is given from here on does.

        Raises:
            StopIteration: the feed has ended and its last batch was handed out.
            DecodeError: DALI failed.
        """
        images = [torch.from_dlpack(output.as_tensor()) for output in self._run()]
        return images[0] if len(images) == 1 else torch.stack(images, 1).flatten(0, 1)

    def next_regions(self) -> Regions:
        """What :func:`regions_graph` makes. Otherwise as :meth:`next`."""
        return Regions.of(*self._run())

    def skip(self) -> bool:
        """Drop the next batch; False at the end, where there is none."""
        try:
            self._run()
        except StopIteration:
            return False
        return True

    def _run(self) -> tuple[Any, ...]:
        stream = torch.cuda.current_stream(self._settings.device) if self._settings.on_gpu else None
        try:
            return self._pipe.run(stream)
        except RuntimeError as error:
            raise DecodeError(str(error)) from error

    def rewind(self) -> None:
        """Pull from the feed again, after :meth:`next` raised StopIteration."""
        self._pipe.reset()


class Regions(NamedTuple):
    """Decoded parts of images, uint8 [h, w, 3] each, in memory of DALI's that lives as long as this does.

    On a GPU, DALI takes it back in the order of the stream that was current when the graph was asked for it.
    """

    addresses: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int64 [n, 2]: height, width
    held: tuple[Any, ...]  # DALI's tensors, n

    @classmethod
    def of(cls, tensors: Any) -> Regions:
        """Those of a list of DALI's."""
        held = tuple(tensors)
        addresses = np.fromiter((tensor.data_ptr() for tensor in held), np.int64, len(held))
        return cls(addresses, np.array([shape[:2] for shape in tensors.shape()], np.int64), held)

    def split(self, counts: Sequence[int]) -> list[Regions]:
        """Consecutive parts of these lengths."""
        ends = np.cumsum(counts).tolist()
        parts = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
        return [Regions(self.addresses[part], self.sizes[part], self.held[part]) for part in parts]

    def images(self) -> list[Tensor]:
        return [torch.from_dlpack(tensor) for tensor in self.held]


def regions_graph(settings: GraphSettings, feed: Feed) -> tuple[Any]:
    """Decode a box; uint8 [h, w, 3] for each, from which crops are cut later.

    The feed gives: n arrays of uint8; the box's corner (top, left) and its extent (height, width) in pixels, int32
    [n, 2] each.
    """
    fn, types = import_dali().fn, import_dali().types
    encoded, corner, extent = fn.external_source(
        feed, num_outputs=3, dtype=[types.UINT8, types.INT32, types.INT32], ndim=[1, 1, 1], no_copy=True
    )
    return (_decode(fn.decoders.image_slice, encoded, settings, start=corner, shape=extent, axes=[0, 1]),)


def training_graph(settings: GraphSettings, feed: Feed) -> tuple[Any]:
    """Decode a box, resize it to the square, mirror; uint8 [b, size, size, 3].

    The feed gives: n arrays of uint8; the box's corner (top, left) and its extent (height, width) in pixels, int32
    [n, 2] each; 1 where to mirror, int32 [n]; 1 for bicubic, 0 for bilinear, int32 [n].
    """
    fn, types = import_dali().fn, import_dali().types
    encoded, corner, extent, flip, cubic = fn.external_source(
        feed, num_outputs=5, dtype=[types.UINT8, *4 * [types.INT32]], ndim=[1, 1, 1, 0, 0], no_copy=True
    )
    boxes = _decode(fn.decoders.image_slice, encoded, settings, start=corner, shape=extent, axes=[0, 1])
    squares = _resize(boxes, [settings.size, settings.size], _filters(cubic))
    return (_mirror(squares, flip),)


def copies_graph(copies: int) -> Callable[[GraphSettings, Feed], tuple[Any, ...]]:
    """As :func:`training_graph`, several pictures from each: what is decoded once is what their boxes cover together.

    The feed gives: n arrays of uint8; corner and extent of what is decoded; then for each copy its box's corner in
    there and its extent, where to mirror and which filter.
    """

    def define(settings: GraphSettings, feed: Feed) -> tuple[Any, ...]:
        fn, types = import_dali().fn, import_dali().types
        encoded, corner, extent, *cuts = fn.external_source(
            feed,
            num_outputs=3 + 4 * copies,
            dtype=[types.UINT8, *(2 + 4 * copies) * [types.INT32]],
            ndim=[1, 1, 1, *copies * [1, 1, 0, 0]],
            no_copy=True,
        )
        covered = _decode(fn.decoders.image_slice, encoded, settings, start=corner, shape=extent, axes=[0, 1])
        squares = []
        for start, shape, flip, cubic in zip(*4 * [iter(cuts)], strict=True):
            box = fn.slice(covered, start=start, shape=shape, axes=[0, 1])
            squares.append(_mirror(_resize(box, [settings.size, settings.size], _filters(cubic)), flip))
        return tuple(squares)

    return define


def cut_graph(settings: GraphSettings, feed: Feed) -> tuple[Any]:
    """Decode, resize, cut the square out, black where it lies outside, mirror; uint8 [b, size, size, 3].

    The feed gives: n arrays of uint8; height and width to resize to, float32 [n, 2]; the square's corner (top, left) in
    the resized image, int32 [n, 2]; then as for :func:`training_graph`.
    """
    fn, types = import_dali().fn, import_dali().types
    encoded, resized, corner, flip, cubic = fn.external_source(
        feed, num_outputs=5, dtype=[types.UINT8, types.FLOAT, *3 * [types.INT32]], ndim=[1, 1, 1, 0, 0], no_copy=True
    )
    whole = _resize(_decode(fn.decoders.image, encoded, settings), resized, _filters(cubic))
    squares = fn.slice(
        whole, start=corner, shape=[settings.size, settings.size], axes=[0, 1], out_of_bounds_policy="pad"
    )
    return (_mirror(squares, flip),)


def evaluation_graph(settings: GraphSettings, feed: Feed) -> tuple[Any]:
    """Decode, resize, cut the square out, normalize; [b, 3, size, size].

    The feed gives: n arrays of uint8; height and width to resize to, float32 [n, 2]; the square's corner (top, left) in
    the resized image, int32 [n, 2].
    """
    fn, types = import_dali().fn, import_dali().types
    encoded, resized, corner = fn.external_source(
        feed, num_outputs=3, dtype=[types.UINT8, types.FLOAT, types.INT32], ndim=[1, 1, 1], no_copy=True
    )
    # Chroma as libjpeg, and so Pillow, has it; costs time.
    whole = _decode(fn.decoders.image, encoded, settings, jpeg_fancy_upsampling=True)
    # As Pillow does it: columns first, and 8 bits between the two directions. In one go, one value in six is off by 1.
    how = {"interp_type": getattr(types, _FILTERS[settings.interpolation]), "antialias": True, "mode": "stretch"}
    whole = fn.resize(fn.resize(whole, resize_x=resized[1], **how), resize_y=resized[0], **how)
    squares = fn.slice(whole, start=corner, shape=[settings.size, settings.size], axes=[0, 1])
    return (_normalize(squares, settings),)


def undecodable(encoded: Sequence[np.ndarray], settings: GraphSettings) -> list[int]:
    """The places of those that the decoder refuses, tried one by one: slow, for when a batch has failed."""
    refused: list[int] = []
    at = 0
    while (at := at + _decodable(encoded[at:], settings)) < len(encoded):
        refused.append(at)
        at += 1
    return refused


def _decodable(encoded: Sequence[np.ndarray], settings: GraphSettings) -> int:
    """How many pictures decode before the first that does not."""
    device = settings.device.index if settings.on_gpu else None
    pipe = import_dali().Pipeline(
        batch_size=1, num_threads=1, device_id=device, prefetch_queue_depth=1, exec_dynamic=True
    )
    fn, types = import_dali().fn, import_dali().types
    with pipe:
        data = fn.external_source(([picture] for picture in encoded), dtype=types.UINT8, ndim=1)
        pipe.set_outputs(_decode(fn.decoders.image, data, settings))
    pipe.build()
    done = 0
    with suppress(StopIteration, RuntimeError):
        while True:
            pipe.run()
            done += 1
    return done


def release_memory() -> None:
    """Give back the GPU memory that DALI keeps for later and nothing uses."""
    import_dali().release()


def _decode(operator: Any, encoded: Any, settings: GraphSettings, **options: Any) -> Any:
    """RGB pictures on the device, as stored: nobody here applies EXIF rotation."""
    options |= {"output_type": import_dali().types.RGB, "adjust_orientation": False}
    if settings.decoder == "cpu":
        options.pop("jpeg_fancy_upsampling", None)  # the CPU's always does it
        decoded = operator(encoded, device="cpu", **options)
        return decoded.gpu() if settings.on_gpu else decoded
    load = settings.hw_decoder_load if settings.decoder == "hardware" else 0.0
    # Pinned decoding threads of several processes on one host would share the first few cores.
    return operator(encoded, device="mixed", hw_decoder_load=load, affine=False, **options)


def _resize(pictures: Any, size: Any, filter_type: Any) -> Any:
    return import_dali().fn.resize(pictures, size=size, interp_type=filter_type, antialias=True)


def _filters(cubic: Any) -> Any:
    """Bicubic where 1, bilinear where 0."""
    fn, types = import_dali().fn, import_dali().types
    linear_to_cubic = int(types.INTERP_CUBIC) - int(types.INTERP_LINEAR)
    return fn.cast(cubic * linear_to_cubic + int(types.INTERP_LINEAR), dtype=types.INTERP_TYPE)


def _mirror(pictures: Any, flip: Any) -> Any:
    """In one launch for the batch. DALI's own flip makes one a picture, and beside a training step each of them waits
    until one of the step's kernels leaves room."""
    return import_dali().fn.crop_mirror_normalize(
        pictures, mirror=flip, dtype=import_dali().types.UINT8, output_layout="HWC"
    )


def _normalize(pictures: Any, settings: GraphSettings) -> Any:
    return import_dali().fn.crop_mirror_normalize(
        pictures,
        mean=[255 * value for value in settings.mean],
        std=[255 * value for value in settings.std],
        dtype=getattr(import_dali().types, _DTYPES[settings.dtype]),
        output_layout="CHW",
    )


def import_dali() -> SimpleNamespace:
    """What is used of DALI.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        from nvidia.dali import backend, fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI cannot be imported ({error}); pip install 'vimfast[cuda13]', or 'vimfast[cuda12]' for a "
            "driver before CUDA 13 (both decode on a machine without a GPU too)"
        ) from None
    return SimpleNamespace(fn=fn, types=types, Pipeline=Pipeline, release=backend.ReleaseUnusedMemory)  # type: ignore[attr-defined]
