"""What an image is, from its header alone, and the one way in which odd images become JPEGs.

``vimfast-prepare`` converts with these functions when it writes shards, and the folder source converts with them
in memory, so training from either sees the same bytes.
"""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

Buffer: TypeAlias = "bytes | memoryview | np.ndarray"

# What is tried on bytes that are not a JPEG. Pillow's full list includes stubs and formats that run other programs.
_OTHER_FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

_MOST_PIXELS = 2 * 89_478_485  # above which Pillow takes an image for an attack
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
    looks damaged, with junk between markers, no end marker, or more pixels than Pillow decodes: only decoding shows
    whether it is.
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
    return ImageInfo(kind, height, width, components, clean and ended and height * width <= _MOST_PIXELS)


def _named_rgb(view: bytes | memoryview, at: int) -> bool:
    """Whether a frame calls its components R, G and B, which counts where no segment says so (libjpeg)."""
    return bytes(view[at + 10 : at + 17 : 3]) == b"RGB"


def _inspect_other(view: bytes | memoryview) -> ImageInfo:
    try:
        with Image.open(BytesIO(view), formats=_OTHER_FORMATS) as image:
            width, height = image.size
            return ImageInfo((image.format or "unknown").lower(), height, width, len(image.getbands()), True)
    except Exception as error:  # Pillow's parsers raise nearly anything on garbage
        raise _fault(error, view, _webp_size(view)) from None


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
        MemoryError: there is too little memory for it, which is not its fault.
    """
    view = _view(data)
    size = _webp_size(view)
    try:
        with Image.open(BytesIO(view), formats=("JPEG", *_OTHER_FORMATS)) as image:
            size = image.size
            if resize is not None:
                # The decoder may halve in the DCT as long as twice the target size is left for the filter below:
                # the aliasing of the halving is then filtered out (Pillow's own thumbnail() keeps this gap).
                image.draft(None, (2 * resize, 2 * resize))
            image.load()
            rgb = _to_rgb(image)
        if resize is not None and min(rgb.size) > resize:
            scale = resize / min(rgb.size)
            width, height = (max(1, round(side * scale)) for side in rgb.size)
            rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
        rgb.info.clear()
        out = BytesIO()
        rgb.save(out, "JPEG", quality=quality, subsampling="4:4:4" if resize is None else "4:2:0")
    except Exception as error:  # as above
        raise _fault(error, view, size) from None
    return out.getvalue(), (rgb.height, rgb.width)


# Samples of more than 8 bits, which Pillow's own conversion clips: what is not black becomes white.


def wide_samples(data: Buffer) -> str | None:
    """``"16-bit"``, ``"32-bit integer"`` or ``"float"`` where :func:`to_rgb_jpeg` scales the samples to 8 bits.

    Raises:
        ValueError: not an image, or one that does not say what range its samples are in.
    """
    view = _view(data)
    if view[:2] == b"\xff\xd8":
        return None
    try:
        with Image.open(BytesIO(view), formats=_OTHER_FORMATS) as image:
            if _is_wide(image):
                low, high = _range(image)
                kinds = {"I": "16-bit" if (low, high) == _SIXTEEN_BITS else "32-bit integer", "F": "float"}
                return kinds.get(image.mode, "16-bit")
            raw = image.tile[0][3] if getattr(image, "tile", None) else ""
            return "16-bit" if ";16" in str(raw) else None
    except Exception as error:  # as above
        raise _fault(error, view, _webp_size(view)) from None


_SIXTEEN_BITS = (0.0, 65535.0)
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_FORMAT = 258, 262, 339
_TIFF_RANGES = ((340, 341), (280, 281))  # SMinSampleValue and SMaxSampleValue; MinSampleValue and MaxSampleValue


def _to_rgb(image: Image.Image) -> Image.Image:
    if not _is_wide(image):
        return image if image.mode == "RGB" else image.convert("RGB")
    low, high = _range(image)
    shades = (np.nan_to_num(np.asarray(image).astype(np.float32)) - low) * (255 / (high - low))
    shades = np.clip(np.rint(shades), 0, 255).astype(np.uint8)
    if _tags(image).get(_TIFF_PHOTOMETRIC) == 0:  # white is zero
        shades = 255 - shades
    return Image.fromarray(shades).convert("RGB")


def _is_wide(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.partition(";")[0] == "I"


def _range(image: Image.Image) -> tuple[float, float]:
    """What is black and what is white among the samples."""
    tags = _tags(image)
    if image.mode.startswith("I;16"):
        bits = _first(tags.get(_TIFF_BITS)) or 16
        return 0.0, float(2 ** int(bits) - 1)
    if image.mode == "I" and image.format != "TIFF":  # of 16 bits, or scaled to them by Pillow
        return _SIXTEEN_BITS
    for lowest, highest in _TIFF_RANGES:
        high = _first(tags.get(highest))
        low = _first(tags.get(lowest)) or 0.0
        if high is not None and np.isfinite([low, high]).all() and low < high:
            return low, high
    kind = "floats" if image.mode == "F" else "signed integers" if _first(tags.get(_TIFF_FORMAT)) == 2 else "integers"
    raise ValueError(f"its samples are {kind} of 16 or 32 bits in a range that it does not say: save it with 8 bits")


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _first(value: Any) -> float | None:
    """Of a tag that may hold a value or one for each channel."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    return None if value is None else float(value)


# Whose fault it is


def _fault(error: Exception, view: bytes | memoryview, size: tuple[int, int] | None) -> Exception:
    """What to raise for what Pillow raised on an image of these bytes and this (width, height).

    Some of its decoders call an allocation that failed a broken image. So it is looked whether there would have been
    memory: for the samples, and for the coefficients or buffers that a decoder holds beside them.
    """
    if isinstance(error, MemoryError):
        return error
    if size is not None and not isinstance(error, Image.DecompressionBombError):
        try:
            np.empty(size[0] * size[1] * _BYTES_PER_PIXEL, np.uint8)
        except MemoryError:
            return MemoryError(why_undecodable(error, view))
    return ValueError(why_undecodable(error, view))


_BYTES_PER_PIXEL = 16


def _webp_size(view: bytes | memoryview) -> tuple[int, int] | None:
    """The (width, height) of a WebP image, which Pillow does not say before it has memory for it; None of others."""
    head = bytes(view[:30])
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return width, height


def why_undecodable(error: Exception, data: Buffer) -> str:
    """The reason for which Pillow raised `error` on these bytes, without its object addresses."""
    if not isinstance(error, UnidentifiedImageError):
        return str(error) or type(error).__name__
    view = _view(data)
    if view[:2] == b"\xff\xd8":  # which Pillow does not say
        with suppress(ValueError):
            kind = inspect(view).format
            if kind.endswith("bit"):
                bits = kind.removeprefix("jpeg-").removesuffix("bit")
                return f"its samples have {bits} bits, and only JPEGs of 8 are decoded"
    return "not an image in any known format"
