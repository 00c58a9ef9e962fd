"""Headers are read correctly, garbage is reported as such, and conversion keeps the image."""

from __future__ import annotations

import random
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from vimfast.shards import jpeg


def smooth_image(size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("mode", "options", "components", "plain"),
    [
        ("RGB", {}, 3, True),
        ("RGB", {"progressive": True, "quality": 30}, 3, True),
        ("L", {}, 1, True),
        ("CMYK", {}, 4, False),
    ],
)
def test_jpeg_header(mode: str, options: dict[str, object], components: int, plain: bool) -> None:
    data = encode(smooth_image((61, 47)).convert(mode), **options)
    info = jpeg.inspect(data)
    assert info == ("jpeg", 47, 61, components, True)
    assert jpeg.is_plain(info) is plain
    assert jpeg.inspect(memoryview(data)) == info
    assert jpeg.inspect(np.frombuffer(data, np.uint8)) == info


def test_channels_that_are_rgb() -> None:
    """Recognized by Adobe's segment, or by the components' names where there is none, unless JFIF's says otherwise."""
    data = encode(smooth_image((61, 47)), keep_rgb=True)
    info = jpeg.inspect(data)
    assert info == ("jpeg-rgb", 47, 61, 3, True)
    assert not jpeg.is_plain(info)
    adobe = data.index(b"\xff\xee")
    nameless = data[:adobe] + data[adobe + 16 :]
    assert jpeg.inspect(nameless).format == "jpeg-rgb"
    assert Image.open(BytesIO(nameless)).getpixel((5, 5)) == Image.open(BytesIO(data)).getpixel((5, 5))
    jfif = encode(smooth_image((61, 47)))[2:20]
    assert jpeg.inspect(data[:2] + jfif + data[2:]).format == "jpeg"
    transformed = bytearray(data)
    transformed[adobe + 15] = 1
    assert jpeg.inspect(bytes(transformed)).format == "jpeg"


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_other_formats(format: str) -> None:
    data = encode(smooth_image((61, 47)), format)
    info = jpeg.inspect(data)
    assert (info.format, info.height, info.width) == (format.lower(), 47, 61)
    assert not jpeg.is_plain(info)
    converted, size = jpeg.to_rgb_jpeg(data)
    assert size == (47, 61)
    assert jpeg.is_plain(jpeg.inspect(converted))
    assert np.abs(decode(converted) - decode(data)).mean() < 4


@pytest.mark.parametrize(
    ("marker", "bits", "format"),
    [
        (0xC9, 8, "jpeg-arithmetic"),
        (0xC3, 8, "jpeg-lossless"),
        (0xC5, 8, "jpeg-hierarchical"),
        (0xC1, 12, "jpeg-12bit"),
    ],
)
def test_jpegs_that_few_decoders_read_are_not_plain(marker: int, bits: int, format: str) -> None:
    data = bytearray(encode(smooth_image()))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, bits
    info = jpeg.inspect(bytes(data))
    assert (info.format, info.height, info.width) == (format, 48, 64)
    assert not jpeg.is_plain(info)


def test_a_jpeg_of_12_bits_is_called_what_it_is() -> None:
    data = bytearray(encode(smooth_image()))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(ValueError, match=r"^its samples have 12 bits, and only JPEGs of 8 are decoded$"):
        jpeg.to_rgb_jpeg(bytes(data))


def test_the_frames_size_whatever_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    data = encode(smooth_image((60, 40)), exif=exif)
    assert jpeg.inspect(data)[1:3] == (40, 60)
    converted, size = jpeg.to_rgb_jpeg(data)
    assert size == (40, 60)
    assert not Image.open(BytesIO(converted)).getexif()
    assert np.abs(decode(converted) - decode(data)).mean() < 2


def test_a_cut_is_seen_and_a_tail_is_not_one() -> None:
    thumbnail = encode(smooth_image((32, 32)))  # has an end marker of its own, inside the header
    data = encode(smooth_image(), exif=b"Exif\0\0" + thumbnail)
    assert jpeg.inspect(data).complete
    assert jpeg.inspect(data + b"\0" * 100).complete
    for cut in (1, 2, 50, 300):
        assert not jpeg.inspect(data[:-cut]).complete
        assert not jpeg.inspect(data[:-cut] + bytes(cut)).complete
        with pytest.raises(ValueError, match="truncated"):
            jpeg.to_rgb_jpeg(data[:-cut])


def test_junk_between_markers_is_left_to_the_decoder() -> None:
    data = encode(smooth_image())
    at = data.index(b"\xff\xdb")
    info = jpeg.inspect(data[:at] + b"junk" + data[at:])
    assert info == ("jpeg", 48, 64, 3, False)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"\xff\xd8", "cut off"),
        (b"\xff\xd8\xff\xd9" + bytes(10), "without a frame"),
        (b"<html>not found</html>", "not an image"),
        (bytes(1000), "not an image"),
    ],
)
def test_no_image(data: bytes, why: str) -> None:
    for form in (data, np.frombuffer(data, np.uint8)):
        with pytest.raises(ValueError, match=why):
            jpeg.inspect(form)
        with pytest.raises(ValueError, match=r"."):
            jpeg.to_rgb_jpeg(form)


def test_an_absurd_size_is_refused_before_it_takes_memory() -> None:
    data = bytearray(encode(smooth_image()))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    assert jpeg.inspect(bytes(data))[1:3] == (65535, 65535)
    with pytest.raises(ValueError, match="exceeds limit"):
        jpeg.to_rgb_jpeg(bytes(data))


def test_garbage_raises_value_errors_only() -> None:
    rng = random.Random(0)
    outcomes = set()
    for format, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})):
        data = encode(smooth_image((40, 30)), format, **options)
        forms = [data[:length] for length in range(len(data))]
        for _ in range(1500):
            flipped = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                # half of the flips hit the header, where the parser looks
                flipped[rng.randrange(len(data) if rng.random() < 0.5 else 200)] = rng.choice(
                    [0, 0xFF, rng.randrange(256)]
                )
            forms.append(bytes(flipped))
        for i, form in enumerate(forms):
            try:
                jpeg.inspect(form)
                outcomes.add("read")
            except ValueError:
                outcomes.add("refused")
            if i % 10 == 0:
                try:
                    jpeg.to_rgb_jpeg(form)
                    outcomes.add("decoded")
                except ValueError:
                    outcomes.add("not decoded")
    assert outcomes == {"read", "refused", "decoded", "not decoded"}


SEGMENTS = st.sampled_from([0xC4, 0xDB, 0xDD, 0xFE, *range(0xE1, 0xEE)])  # tables, comments, application data
FRAMES = {0xC0: "jpeg", 0xC1: "jpeg", 0xC2: "jpeg", 0xC3: "jpeg-lossless", 0xC6: "jpeg-hierarchical"}
SIDES = st.integers(1, 0xFFFF)


def segment(marker: int, content: bytes, fill: int = 0) -> bytes:
    return b"\xff" * (1 + fill) + bytes([marker]) + (2 + len(content)).to_bytes(2, "big") + content


@given(
    st.lists(st.tuples(SEGMENTS, st.binary(max_size=40), st.integers(0, 3))),
    st.sampled_from(sorted(FRAMES)),
    st.tuples(SIDES, SIDES),
    st.sampled_from([1, 3, 4]),
    st.binary(max_size=40),
    st.booleans(),
)
def test_a_header_is_read_whatever_lies_before_it(
    before: list[tuple[int, bytes, int]],
    marker: int,
    size: tuple[int, int],
    components: int,
    scan: bytes,
    ended: bool,
) -> None:
    height, width = size
    frame = bytes([8]) + height.to_bytes(2, "big") + width.to_bytes(2, "big") + bytes([components])
    frame += b"".join(bytes([i, 0x11, 0]) for i in range(components))
    data = b"\xff\xd8" + b"".join(segment(*part) for part in before) + segment(marker, frame)
    data += scan.replace(b"\xff", b"") + b"\xff\xd9" * ended
    for form in (data, memoryview(data), np.frombuffer(data, np.uint8)):
        assert jpeg.inspect(form) == (
            FRAMES[marker],
            height,
            width,
            components,
            ended and height * width <= 178_956_970,
        )


@given(st.binary(max_size=200), st.booleans())
@example(b"\xff", True)
@example(b"\xff\xc0\x00\x00", True)
@example(b"\xff\xe0\xff\xff", True)
@example(b"\xff\xee\x00\x0eAdobe", True)
def test_any_bytes_are_read_or_refused(content: bytes, is_jpeg: bool) -> None:
    data = b"\xff\xd8" * is_jpeg + content
    outcomes = [inspected(form) for form in (data, memoryview(data), np.frombuffer(data, np.uint8))]
    assert outcomes[1:] == outcomes[:1] * 2


def inspected(data: jpeg.Buffer) -> jpeg.ImageInfo | str:
    try:
        return jpeg.inspect(data)
    except ValueError as error:
        return str(error)


def test_conversion_keeps_colours() -> None:
    image = smooth_image((200, 100))
    cmyk = encode(image.convert("CMYK"))
    assert np.abs(decode(jpeg.to_rgb_jpeg(cmyk)[0]) - decode(cmyk)).mean() < 0.5
    palette = encode(image.convert("P"), "PNG")
    assert np.abs(decode(jpeg.to_rgb_jpeg(palette)[0]) - decode(palette)).mean() < 0.5
    converted = Image.open(BytesIO(jpeg.to_rgb_jpeg(encode(image, "PNG"))[0]))
    assert JpegImagePlugin.get_sampling(converted) == 0  # 4:4:4


SHADES = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("resize", [None, 32])
def test_sixteen_bits_are_scaled_to_eight(format: str, resize: int | None) -> None:
    """Pillow's ``convert`` clips them: nearly all of such an image is white."""
    data = encode(Image.fromarray(SHADES), format)
    found = decode(jpeg.to_rgb_jpeg(data, resize=resize)[0])
    cells = 64 if resize is None else resize
    expected = (SHADES / 257).reshape(cells, 64 // cells, cells, 64 // cells).mean((1, 3))
    assert np.abs(found - expected[..., None]).max() <= 4
    assert jpeg.wide_samples(data) == "16-bit"


def test_sixteen_bits_a_channel_are_what_pillow_makes_of_them() -> None:
    """It has no such images, but reads them: the upper half of each value."""
    rows = b"".join(b"\0" + bytes([10, 1, 200, 2, 90, 3]) * 8 for _ in range(8))
    chunks = [(b"IHDR", (8).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])), (b"IDAT", zlib.compress(rows))]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in [*chunks, (b"IEND", b"")]:
        crc = zlib.crc32(name + content)
        data += len(content).to_bytes(4, "big") + name + content + crc.to_bytes(4, "big")
    assert jpeg.wide_samples(data) == "16-bit"
    assert np.abs(decode(jpeg.to_rgb_jpeg(data)[0]) - [10, 200, 90]).max() <= 3


def test_white_may_be_zero() -> None:
    data = encode(Image.fromarray(SHADES), "TIFF", tiffinfo={262: 0})
    assert Image.open(BytesIO(data)).tag_v2[262] == 0  # type: ignore[attr-defined]
    assert np.abs(decode(jpeg.to_rgb_jpeg(data)[0])[..., 0] - (255 - SHADES / 257)).max() <= 4


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_samples_of_a_range_that_is_not_known_are_refused(kind: type) -> None:
    image = Image.fromarray((SHADES.astype(kind) - 1000) * 3)
    data = encode(image, "TIFF")
    for read in (jpeg.to_rgb_jpeg, jpeg.wide_samples):
        with pytest.raises(ValueError, match="in a range that it does not say: save it with 8 bits"):
            read(data)
    stated = encode(image, "TIFF", tiffinfo={340: kind(-3000).item(), 341: kind(3 * 64535).item()})
    assert jpeg.wide_samples(stated) == ("float" if kind is np.float32 else "32-bit integer")
    assert np.abs(decode(jpeg.to_rgb_jpeg(stated)[0])[..., 0] - SHADES / 257).max() <= 4


def test_eight_bits_are_not_wide() -> None:
    for format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        assert jpeg.wide_samples(encode(smooth_image(), format)) is None


SHORT_OF_MEMORY = """
import resource, sys
from io import BytesIO
from PIL import Image
from vimfast.shards import jpeg
Image.init()
data = sys.stdin.buffer.read()
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 1_000_000,) * 2)
try:
    jpeg.inspect(data)
    jpeg.to_rgb_jpeg(data, resize=64)
except (MemoryError, ValueError) as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("format", "options", "megabytes"),
    [("PNG", {}, 60), ("JPEG", {"progressive": True}, 60), ("WEBP", {}, 60), ("GIF", {}, 20)],
)
def test_too_little_memory_is_no_fault_of_the_image(format: str, options: dict[str, object], megabytes: int) -> None:
    """Even where a decoder says so: libjpeg and libwebp do."""
    data = encode(Image.new("RGB", (6000, 6000), (3, 200, 90)), format, **options)
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(megabytes)]
    for form, expected in ((data, "MemoryError"), (encode(smooth_image(), format)[:300], "ValueError")):
        assert subprocess.run(command, input=form, capture_output=True, check=True).stdout.decode().strip() == expected


def test_resize_shrinks_the_short_side_only() -> None:
    for size, expected in (
        ((200, 100), (50, 100)),
        ((100, 200), (100, 50)),
        ((40, 90), (90, 40)),
        ((50, 50), (50, 50)),
    ):
        data, reported = jpeg.to_rgb_jpeg(encode(smooth_image(size)), resize=50, quality=90)
        assert reported == expected == jpeg.inspect(data)[1:3]


def test_a_shrunk_image_is_antialiased() -> None:
    """Against the box average over a detailed large image, which the decoder may shrink on its own first."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), quality=95)
    small = decode(jpeg.to_rgb_jpeg(data, resize=64, quality=95)[0])
    assert small.shape == (64, 128, 3)
    assert np.abs(small - 127.5).mean() < 20  # noise averages out; picked pixels would deviate by 64
    smooth = smooth_image((1024, 512))
    direct = np.asarray(smooth.resize((128, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(decode(jpeg.to_rgb_jpeg(encode(smooth, quality=95), resize=64, quality=95)[0]) - direct).mean() < 3
