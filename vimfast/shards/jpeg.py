"""What an image is, from its header alone, and the one way in which odd images become JPEGs.

``vimfast-prepare`` converts with these functions when it writes shards, and the folder source converts with them
in memory, so training from either sees the same bytes.
"""

from __future__ import annotations

from io import BytesIO
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

Buffer: TypeAlias = "bytes | memoryview | np.ndarray"

# What is tried on bytes that are not a JPEG. Pillow's full list includes stubs and formats that run other programs.
_OTHER_FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # markers that no length follows: TEM, RST0-7
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
_JFIF, _ADOBE = 0xE0, 0xEE  # application segments that name the colour space
# Start-of-frame markers. 0xC4, 0xC8 and 0xCC lie in their range but are not among them.
_FRAMES = {
    **dict.fromkeys((0xC0, 0xC1, 0xC2), "jpeg"),  # baseline, extended, progressive
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "jpeg-lossless"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "jpeg-hierarchical"),
    **dict.fromkeys((0xC9, 0xCA), "jpeg-arithmetic"),
}


class ImageInfo(NamedTuple):
    """What the header says.

    `format` is ``"jpeg"`` for 8-bit Huffman-coded JPEGs, which every decoder reads; ``"jpeg-rgb"`` where the channels
    are not YCbCr but RGB, which GPUs decode to wrong colours; ``"jpeg-12bit"``, ``"jpeg-lossless"``,
    ``"jpeg-arithmetic"`` or ``"jpeg-hierarchical"`` for the others; else Pillow's name in lower case. `height` and
    `width` are the stored frame's, in pixels, whatever EXIF says about rotation. `complete` is False for a JPEG that
    looks damaged, with junk between markers or no end marker: only decoding shows whether it is.
    """

    format: str
    height: int
    width: int
    components: int
    complete: bool


def inspect(data: Buffer) -> ImageInfo:
    """Read the header of an encoded image; about 10 microseconds for a JPEG.

    Raises:
        ValueError: these bytes are not an image; the message says why.
    """
    view = _view(data)
    if view[:2] != b"\xff\xd8":
        return _inspect_other(view)
    clean, at, end = True, 2, len(view)
    rgb: bool | None = None  # None: not known yet
    while at + 4 <= end:
        code = view[at + 1]
        if view[at] != 0xFF or code == 0x00:  # junk: decoders skip to the next 0xFF, with a warning
            clean, view = False, bytes(view)
            at = view.find(b"\xff", at + 1)
            if at < 0:
                break
        elif code == 0xFF:  # fill byte
            at += 1
        elif code in _STANDALONE:
            at += 2
        elif code in _FRAMES:
            return _read_frame(view, at, clean, rgb)
        elif code in (_END_OF_IMAGE, _START_OF_SCAN):
            raise ValueError("a JPEG without a frame header")
        else:
            if code == _JFIF and view[at + 4 : at + 9] == b"JFIF\0":
                rgb = False
            elif code == _ADOBE and rgb is None and view[at + 4 : at + 9] == b"Adobe" and at + 15 < end:
                rgb = view[at + 15] == 0
            at += 2 + max(2, view[at + 2] << 8 | view[at + 3])
    raise ValueError("a JPEG cut off before its frame header")


def _view(data: Buffer) -> bytes | memoryview:
    """The bytes, not copied, as something that indexes to ints and slices to its kind."""
    if len(data) == 0:
        raise ValueError("the file is empty")
    return data if isinstance(data, bytes) else memoryview(data).cast("B")  # type: ignore[arg-type]


def _read_frame(view: bytes | memoryview, at: int, clean: bool, rgb: bool | None) -> ImageInfo:
    """The start-of-frame segment whose marker lies at byte `at`; `rgb`: what earlier segments say of the colours."""
    if at + 10 > len(view):
        raise ValueError("a JPEG cut off in its frame header")
    bits, components = view[at + 4], view[at + 9]
    height, width = view[at + 5] << 8 | view[at + 6], view[at + 7] << 8 | view[at + 8]
    if not height or not width or not components:
        raise ValueError(f"a JPEG of {width} x {height} pixels and {components} components")
    kind = _FRAMES[view[at + 1]]
    if kind == "jpeg" and bits != 8:
        kind = f"jpeg-{bits}bit"
    elif kind == "jpeg" and components == 3 and (_named_rgb(view, at) if rgb is None else rgb):
        kind = "jpeg-rgb"
    # Entropy-coded data never holds FF D9, so one anywhere after the header is the end (some files carry a tail).
    ended = view[-2:] == b"\xff\xd9" or bytes(view[at:]).rfind(b"\xff\xd9") >= 0
    return ImageInfo(kind, height, width, components, clean and ended)


def _named_rgb(view: bytes | memoryview, at: int) -> bool:
    """Whether a frame calls its components R, G and B, which counts where no segment says so (libjpeg)."""
    return bytes(view[at + 10 : at + 17 : 3]) == b"RGB"


def _inspect_other(view: bytes | memoryview) -> ImageInfo:
    try:
        with Image.open(BytesIO(view), formats=_OTHER_FORMATS) as image:
            width, height = image.size
            return ImageInfo((image.format or "unknown").lower(), height, width, len(image.getbands()), True)
    except Exception as error:  # Pillow's parsers raise nearly anything on garbage
        raise ValueError(_why(error)) from None


def is_plain(info: ImageInfo) -> bool:
    """Whether the image is stored and decoded as it is: an 8-bit JPEG, grey or of three components."""
    return info.format == "jpeg" and info.components in (1, 3)


def to_rgb_jpeg(data: Buffer, *, resize: int | None = None, quality: int = 100) -> tuple[bytes, tuple[int, int]]:
    """Decode with Pillow, convert to RGB, optionally shrink, and encode as JPEG.

    Args:
        resize: shrink so that the short side is this many pixels; smaller images stay as they are.
        quality: of the JPEG, 1 to 100, where 100 is off by 0.2 levels on the mean. Chroma is kept at full resolution
            (4:4:4) unless the image is to be resized, where 4:2:0 is what people who ask for small shards expect.

    Returns:
        The JPEG's bytes and the image's (height, width). EXIF rotation is not applied, and no metadata is kept.

    Raises:
        ValueError: the image does not decode; the message says why.
    """
    view = _view(data)
    try:
        with Image.open(BytesIO(view), formats=("JPEG", *_OTHER_FORMATS)) as image:
            if resize is not None:
                # The decoder may halve in the DCT as long as twice the target size is left for the filter below:
                # the aliasing of the halving is then filtered out (Pillow's own thumbnail() keeps this gap).
                image.draft(None, (2 * resize, 2 * resize))
            image.load()
            rgb = image if image.mode == "RGB" else image.convert("RGB")
        if resize is not None and min(rgb.size) > resize:
            scale = resize / min(rgb.size)
            width, height = (max(1, round(side * scale)) for side in rgb.size)
            rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
        rgb.info.clear()
        out = BytesIO()
        rgb.save(out, "JPEG", quality=quality, subsampling="4:4:4" if resize is None else "4:2:0")
    except Exception as error:  # as above
        raise ValueError(_why(error)) from None
    return out.getvalue(), (rgb.height, rgb.width)


def _why(error: Exception) -> str:
    """Pillow's reason without its object addresses."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in any known format"
    return str(error) or type(error).__name__
