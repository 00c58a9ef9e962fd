"""DALI: encoded JPEGs in, what a view's graph makes of them out. The only module that imports ``nvidia.dali``.

Graphs draw nothing at random: boxes and flips come in with the images, as the fields of a view's inputs. On a GPU the
decoder is DALI's mixed one (or the CPU's, if that is chosen) and everything after it runs on the GPU. On a CPU, DALI's
resizing is slow: only the graph of squares has any there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np
import torch
from torch import Tensor

from vimfast.augment.colours import Normalization
from vimfast.errors import UserError

# Fields of a view's inputs, with DALI's type and the dimensions of one image's part. As nodes of a graph, DALI's own.
Encoded = Annotated[Sequence[np.ndarray], ("UINT8", 1)]  # n arrays of uint8
Flag = Annotated[np.ndarray, ("INT32", 0)]  # int32 [n]
Pair = Annotated[np.ndarray, ("INT32", 1)]  # int32 [n, 2]: of rows and of columns
Size = Annotated[np.ndarray, ("FLOAT", 1)]  # float32 [n, 2]: height and width to resize to

Feed = Callable[[], tuple[Any, ...]]

# Pillow's filters of the same names: the cubic is Keys' with a = -0.5, and both widen where they shrink an image.
_FILTERS = {"bicubic": "INTERP_CUBIC", "bilinear": "INTERP_LINEAR"}
_DTYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16"}


class DecodeError(RuntimeError):
    """DALI failed on the oldest batch in work; the graph is of no more use."""


@dataclass(frozen=True)
class GraphSettings:
    """What a graph runs on.

    Args:
        batch_size: the largest batch.
        device: where batches come out; a CUDA device with its index.
        threads: decoding threads on the CPU.
        prefetch: batches in work at once.
        decoder: ``"hardware"`` (the GPU's JPEG engine and its ordinary cores together), ``"cuda"`` or ``"cpu"``.
        engine_share: of the images, for the JPEG engine.
    """

    batch_size: int
    device: torch.device
    threads: int = 1
    prefetch: int = 2
    decoder: str = "cpu"
    engine_share: float = 0.65

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Graph:
    """A DALI pipeline that pulls batches from a feed and works ahead of whoever calls :meth:`next`."""

    def __init__(
        self,
        inputs: type[tuple[Any, ...]],
        define: Callable[[Any, GraphSettings], Sequence[Any]],
        settings: GraphSettings,
        feed: Feed,
    ) -> None:
        """
        Args:
            inputs: a NamedTuple whose fields are of the types above.
            define: makes the outputs, given inputs whose fields are nodes.
            feed: gives the next batch's inputs and raises StopIteration at the end. DALI does not copy them: they must
                not change while their batch is in work. It keeps them alive.
        """
        self._settings = settings
        self._pipe = import_dali().Pipeline(
            batch_size=settings.batch_size,
            num_threads=settings.threads,
            device_id=settings.device.index if settings.on_gpu else None,
            prefetch_queue_depth=settings.prefetch,
            exec_dynamic=True,  # a batch has memory of its own, which nobody overwrites while a tensor holds it
        )
        kinds = [hint.__metadata__[0] for hint in get_type_hints(inputs, include_extras=True).values()]
        with self._pipe:
            nodes = import_dali().fn.external_source(
                feed,
                num_outputs=len(kinds),
                dtype=[getattr(import_dali().types, name) for name, _ in kinds],
                ndim=[dimensions for _, dimensions in kinds],
                no_copy=True,
            )
            self._pipe.set_outputs(*define(inputs(*nodes), settings))
        self._pipe.build()

    def next(self) -> tuple[Any, ...]:
        """DALI's list of tensors for each output of the graph.

        On a GPU the host does not wait: the work that torch's current stream is given from here on does.

        Raises:
            StopIteration: the feed has ended and its last batch was handed out.
            DecodeError: DALI failed.
        """
        stream = torch.cuda.current_stream(self._settings.device) if self._settings.on_gpu else None
        try:
            outputs: tuple[Any, ...] = self._pipe.run(stream)
        except RuntimeError as error:
            raise DecodeError(str(error)) from error
        return outputs

    def drain(self) -> bool:
        """Drop the batches in work, once the feed has ended, and pull from it again with the next one.

        Returns: whether that worked; else DALI failed on one of them, and the graph is of no more use.
        """
        try:
            while True:
                self.next()
        except StopIteration:
            self._pipe.reset()
            return True
        except DecodeError:
            return False


def tensor(images: Any) -> Tensor:
    """A list of DALI's, of images of one size, as one tensor in the same memory."""
    return torch.from_dlpack(images.as_tensor())


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


# What graphs are made of. All take nodes and give nodes.


def decode(encoded: Any, settings: GraphSettings, *, fancy: bool = False) -> Any:
    """Whole RGB images on the device, as stored: nobody here applies EXIF rotation.

    Args:
        fancy: chroma as libjpeg, and so Pillow, has it, on a GPU too; costs time.
    """
    options = {"jpeg_fancy_upsampling": True} if fancy else {}
    return _decode(import_dali().fn.decoders.image, encoded, settings, **options)


def decode_boxes(encoded: Any, corner: Any, extent: Any, settings: GraphSettings) -> Any:
    """Parts of RGB images, where a decoder can do that without the rest."""
    operator = import_dali().fn.decoders.image_slice
    return _decode(operator, encoded, settings, start=corner, shape=extent, axes=[0, 1])


def cut(images: Any, corner: Any, extent: Any) -> Any:
    """Boxes of images; black where they lie outside."""
    return import_dali().fn.slice(images, start=corner, shape=extent, axes=[0, 1], out_of_bounds_policy="pad")


def resize(images: Any, size: Any, cubic: Any) -> Any:
    """To `size`, antialiased: bicubic where `cubic` is 1, bilinear where it is 0."""
    fn, types = import_dali().fn, import_dali().types
    linear_to_cubic = int(types.INTERP_CUBIC) - int(types.INTERP_LINEAR)
    filters = fn.cast(cubic * linear_to_cubic + int(types.INTERP_LINEAR), dtype=types.INTERP_TYPE)
    return fn.resize(images, size=size, interp_type=filters, antialias=True)


def resize_as_pillow(images: Any, size: Any, interpolation: str) -> Any:
    """Columns first, and 8 bits between the two directions. In one go, one value in six is off by 1."""
    fn, kind = import_dali().fn, getattr(import_dali().types, _FILTERS[interpolation])
    how = {"interp_type": kind, "antialias": True, "mode": "stretch"}
    return fn.resize(fn.resize(images, resize_x=size[1], **how), resize_y=size[0], **how)


def mirror(images: Any, flip: Any) -> Any:
    """In one launch for the batch. DALI's own flip makes one per image, and beside a training step each of them waits
    until one of the step's kernels leaves room."""
    return import_dali().fn.crop_mirror_normalize(
        images, mirror=flip, dtype=import_dali().types.UINT8, output_layout="HWC"
    )


def normalize(images: Any, by: Normalization) -> Any:
    """[b, 3, H, W] of (image / 255 - mean) / std."""
    return import_dali().fn.crop_mirror_normalize(
        images,
        mean=[255 * value for value in by.mean],
        std=[255 * value for value in by.std],
        dtype=getattr(import_dali().types, _DTYPES[by.dtype]),
        output_layout="CHW",
    )


def _decode(operator: Any, encoded: Any, settings: GraphSettings, **options: Any) -> Any:
    options |= {"output_type": import_dali().types.RGB, "adjust_orientation": False}
    if settings.decoder == "cpu":
        options.pop("jpeg_fancy_upsampling", None)  # the CPU's always does it
        decoded = operator(encoded, device="cpu", **options)
        return decoded.gpu() if settings.on_gpu else decoded
    load = settings.engine_share if settings.decoder == "hardware" else 0.0
    # Pinned decoding threads of several processes on one host would share the first few cores.
    return operator(encoded, device="mixed", hw_decoder_load=load, affine=False, **options)


def undecodable(encoded: Sequence[np.ndarray], settings: GraphSettings) -> list[int]:
    """The places of those that the decoder refuses, tried one by one: slow, for when a batch has failed."""
    refused: list[int] = []
    at = 0
    while (at := at + _decodable(encoded[at:], settings)) < len(encoded):
        refused.append(at)
        at += 1
    return refused


def _decodable(encoded: Sequence[np.ndarray], settings: GraphSettings) -> int:
    """How many images decode before the first that does not."""
    device = settings.device.index if settings.on_gpu else None
    pipe = import_dali().Pipeline(
        batch_size=1, num_threads=1, device_id=device, prefetch_queue_depth=1, exec_dynamic=True
    )
    fn, types = import_dali().fn, import_dali().types
    with pipe:
        data = fn.external_source(([image] for image in encoded), dtype=types.UINT8, ndim=1)
        pipe.set_outputs(decode(data, settings))
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


def import_dali() -> SimpleNamespace:
    """What is used of DALI.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        from nvidia.dali import backend, fn, types
        from nvidia.dali.pipeline import Pipeline
    except (ImportError, OSError) as error:
        raise UserError(
            f"NVIDIA DALI cannot be imported ({error}); pip install 'vimfast[cuda13]', or 'vimfast[cuda12]' for a "
            "driver before CUDA 13 (both decode on a machine without a GPU too)"
        ) from None
    return SimpleNamespace(fn=fn, types=types, Pipeline=Pipeline, release=backend.ReleaseUnusedMemory)  # type: ignore[attr-defined]
