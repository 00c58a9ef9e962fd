"""Crops and their resizing against Pillow: the Triton kernels bit for bit, in the interpreter and on a GPU; a CPU's."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vimfast.augment import resize, resize_cpu
from vimfast.augment.threads import Threads
from vimfast.image_size import ImageSize, SizeLike

triton = pytest.importorskip("triton")

# Images and boxes (top, left, height, width) in them: at each border, of one pixel, long and thin, whole.
SIZES = [(50, 67), (1, 1), (90, 41), (9, 700), (700, 9), (33, 33), (40, 40)]
BOXES = [
    (0, [(0, 0, 20, 30), (30, 37, 20, 30), (0, 40, 33, 27), (17, 0, 33, 40), (3, 5, 2, 3), (49, 66, 1, 1)]),
    (1, [(0, 0, 1, 1)]),
    (2, [(0, 0, 90, 41), (1, 1, 89, 40), (50, 2, 33, 33), (4, 1, 40, 40), (7, 3, 80, 33), (7, 3, 33, 38)]),
    (3, [(2, 100, 5, 500), (0, 0, 9, 700), (8, 0, 1, 700)]),
    (4, [(100, 2, 500, 5), (0, 0, 700, 9), (0, 8, 699, 1)]),
    (5, [(0, 0, 33, 33)]),
    (6, [(0, 0, 40, 40)]),
]


def textured(sizes: list[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    """uint8 [h, w, 3] each: noise over the whole range, black and white cells, or smooth with noise on it."""
    rng = np.random.default_rng(seed)
    images = []
    for i, (height, width) in enumerate(sizes):
        cells = rng.integers(0, 256, (-(-height // 7), -(-width // 7), 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))
        noise = rng.integers(0, 256, (height, width, 3))
        image = (noise, 255 * (noise > 128), np.clip(smooth + noise // 8, 0, 255))[i % 3]
        images.append(torch.from_numpy(image.astype(np.uint8)))
    return images


def all_cases(variants: tuple[int, ...], *, in_turn: bool = False) -> dict[str, Any]:
    """Every box in these variants: bit 0 mirrors, bit 1 is for bicubic; `in_turn`: each box in one of them."""
    boxes = [(i, box) for i, boxes in BOXES for box in boxes]
    rows = [
        (i, box, variant & 1, variant >> 1)
        for number, (i, box) in enumerate(boxes)
        for variant in ((variants[number % len(variants)],) if in_turn else variants)
    ]
    which, boxes, mirror, cubic = map(np.array, zip(*rows, strict=True))
    return {"which": which, **as_int32(boxes=boxes, mirror=mirror, cubic=cubic)}


def as_int32(**arrays: Any) -> dict[str, Any]:
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def random_cases(sizes: list[tuple[int, int]], count: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    which = rng.integers(0, len(sizes), count)
    of_each = np.array(sizes)[which]
    extent = rng.integers(1, of_each + 1)
    boxes = np.concatenate([rng.integers(0, of_each - extent + 1), extent], axis=1)
    mirror, cubic = rng.integers(0, 2, (2, count))
    return {"which": which, **as_int32(boxes=boxes, mirror=mirror, cubic=cubic)}


def with_pillow(images: list[Tensor], which: Any, boxes: Any, mirror: Any, cubic: Any, size: SizeLike) -> Tensor:
    out_height, out_width = ImageSize.of(size)
    crops = []
    for i, (top, left, height, width), mirrored, smooth in zip(which, boxes.tolist(), mirror, cubic, strict=True):
        box = Image.fromarray(images[i].numpy()).crop((left, top, left + width, top + height))
        resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.BILINEAR
        crop = box.resize((out_width, height), resample).resize((out_width, out_height), resample)
        if height <= out_height:  # some versions of Pillow begin with the height of boxes that shrink a lot
            assert crop == box.resize((out_width, out_height), resample)
        if mirrored:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops.append(torch.from_numpy(np.array(crop)))
    return torch.stack(crops)


def check(ours: Tensor, images: list[Tensor], cases: dict[str, Any], size: SizeLike) -> None:
    wrong = (ours.cpu() != with_pillow(images, **cases, size=size)).flatten(1).sum(1)
    bad = {k: (*(array[k].tolist() for array in cases.values()), int(wrong[k])) for k in wrong.nonzero()[:, 0].tolist()}
    assert not bad, f"size {size}; which, box, mirror, cubic, values that differ: {bad}"


def compare_in_the_interpreter() -> None:
    from vimfast.augment import resize_triton

    def run(images: list[Tensor], cases: dict[str, Any], size: SizeLike) -> Tensor:
        # Bytes around an image are not the image's: they must not have a part in it.
        padded = [torch.nn.functional.pad(x.flatten(), (5, 5), value=255) for x in images]
        addresses = np.array([x.data_ptr() + 5 for x in padded], np.int64)
        sizes = np.array([x.shape[:2] for x in images], np.int64)
        return resize_triton.crop_resize(addresses, sizes, **cases, size=ImageSize.of(size), device=torch.device("cpu"))

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # every torch.empty is full of the largest number
    images = textured(SIZES)
    for size, variants in ((40, (0, 3)), ((33, 36), (1, 2))):
        cases = all_cases(variants, in_turn=True)
        check(run(images, cases, size), images, cases, size)
    sizes = [(61, 83), (47, 120)]
    images = textured(sizes, 1)
    for seed, (size, count) in enumerate(((8, 12), ((7, 21), 12), ((36, 9), 12), (1, 3))):  # one pixel costs most
        cases = random_cases(sizes, count, seed)
        check(run(images, cases, size), images, cases, size)
    assert run(images, random_cases(sizes, 0, 0), 8).shape == (0, 8, 8, 3)


@pytest.mark.slow
def test_kernels_give_pillows_bytes() -> None:
    """Whether a kernel is interpreted is settled when its module is imported, so this runs in a process of its own."""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    # Few programs, because each of them costs the interpreter much.
    code = "from vimfast.augment import resize_triton as r; r.STRIPS, r.ACROSS, r.DOWN = 2, *[(128, 32, 4)] * 2; "
    code += "import quick_interpreter, test_resize; test_resize.compare_in_the_interpreter()"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [224, 40, 33, (192, 256), (130, 55)])
def test_kernels_give_pillows_bytes_on_a_gpu(size: SizeLike) -> None:
    device = torch.device("cuda", torch.cuda.current_device())

    def run(images: list[Tensor], cases: dict[str, Any]) -> Tensor:
        # The memory that the op is given next holds a pattern, and each image begins at an odd address.
        torch.cuda.empty_cache()
        patterns = [
            torch.full((bytes_,), 171, dtype=torch.uint8, device=device) for bytes_ in (1 << 20, 8 << 20, 256 << 20)
        ]
        del patterns
        padded = [torch.nn.functional.pad(x.flatten().to(device), (5, 5), value=255) for x in images]
        there = [x[5:-5].view(image.shape) for x, image in zip(padded, images, strict=True)]
        first = resize.crop_resize(there, **cases, size=size)
        assert torch.equal(first, resize.crop_resize(there, **cases, size=size))
        return first

    images = textured(SIZES)
    cases = all_cases((0, 1, 2, 3))
    check(run(images, cases), images, cases, size)
    sizes = [(375, 500), (500, 333), (64, 64), (1200, 1600), (3000, 40), (5000, 4100)]
    images = textured(sizes, 1)
    cases = random_cases(sizes, 200, 1)
    check(run(images, cases), images, cases, size)
    assert resize.crop_resize(images[:1], **random_cases(sizes, 0, 0), size=size).shape == (0, *ImageSize.of(size), 3)


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="torch leaves it to Pillow here")
@pytest.mark.parametrize("size", [224, 40, 33, (20, 45)])
def test_on_a_cpu_it_is_pillow_within_two_levels(size: SizeLike) -> None:
    images, cases = textured(SIZES, 1), all_cases((0, 1, 2, 3))
    ours = resize.crop_resize(images, **cases, size=size)
    difference = (ours.int() - with_pillow(images, **cases, size=size).int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.01  # measured: at most 0.0046
    shared_out = resize.crop_resize(images, **cases, size=size, threads=Threads(3))
    assert torch.equal(ours, shared_out)


def test_without_vectors_it_is_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize_cpu, "_VECTORIZED", ())
    for size, seed in ((40, 0), (33, 1), ((20, 45), 2)):
        images, cases = textured(SIZES, seed), all_cases((0, 1, 2, 3))
        check(resize.crop_resize(images, **cases, size=size), images, cases, size)
    assert resize.crop_resize([], **random_cases([(1, 1)], 0, 0), size=8).shape == (0, 8, 8, 3)


def test_squares_of_resized_images_are_black_outside() -> None:
    images = textured([(30, 20), (16, 40)])
    corners = np.array([[-3, -2], [10, 45]], np.int32)
    sizes = np.array([[18, 12], [16, 50]], np.float32)
    mirror, cubic = as_int32(mirror=np.zeros(2), cubic=np.array([1, 0])).values()
    cut = functools.partial(resize_cpu.resize_cut, images, sizes, corners)
    squares = cut(mirror, cubic, ImageSize(16, 20), Threads(2)).numpy()
    first = resize_cpu.resized(images[0].numpy(), (18, 12), True)
    second = resize_cpu.resized(images[1].numpy(), (16, 50), False)
    assert np.array_equal(squares[0, 3:, 2:14], first[:13])
    assert np.array_equal(squares[1, :6, :5], second[10:, 45:])
    assert squares[0, :3].max() == squares[0, :, :2].max() == squares[0, :, 14:].max() == 0
    assert squares[1, 6:].max() == squares[1, :, 5:].max() == 0
    mirrored = cut(1 - mirror, cubic, ImageSize(16, 20), Threads(2)).numpy()
    assert np.array_equal(mirrored, squares[:, :, ::-1])


def test_an_image_of_its_size_already_is_not_resampled() -> None:
    image = textured([(30, 20)])[0].numpy()
    for cubic in (True, False):
        assert np.array_equal(resize_cpu.resized(image, (30, 20), cubic), image)


def test_errors_say_what_fits() -> None:
    images = textured([(20, 30)])
    cases = {
        "which": np.zeros(1, np.int64),
        **as_int32(boxes=np.array([[0, 0, 20, 30]]), mirror=np.zeros(1), cubic=np.ones(1)),
    }
    for box in ([0, 0, 21, 30], [1, 0, 20, 30], [0, -1, 5, 5], [0, 0, 0, 5]):
        with pytest.raises(ValueError, match=r"box 0 .* in an image of \[20, 30\]"):
            resize.crop_resize(images, **{**cases, "boxes": np.array([box])}, size=8)
    with pytest.raises(ValueError, match=r"which is in \[1, 1\] and there are 1 images"):
        resize.crop_resize(images, **{**cases, "which": np.ones(1, np.int64)}, size=8)
    with pytest.raises(ValueError, match=r"must be contiguous torch.uint8 \[h, w, 3\]"):
        resize.crop_resize([images[0][:, ::2]], **cases, size=8)
    with pytest.raises(ValueError, match="must be >= 1"):
        resize.crop_resize(images, **cases, size=0)
    with pytest.raises(ValueError, match=r"must be \[n\], \[n, 4\]"):
        resize.crop_resize(images, **{**cases, "mirror": np.zeros(2, np.int32)}, size=8)
    with pytest.raises(ValueError, match="must be integers"):
        resize.crop_resize(images, **{**cases, "cubic": np.ones(1)}, size=8)
    with pytest.raises(ValueError, match="must be on a CUDA device"):
        resize.crop_resize_at(
            np.zeros(1, np.int64), np.ones((1, 2), np.int64), **cases, size=8, device=torch.device("cpu")
        )


@pytest.mark.parametrize("width", [224, 33])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile(arch: int, width: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vimfast.augment import resize_triton

    def compiled(kernel: triton.JITFunction, fusion: bool, warps: int, **constants: int) -> str:
        types = {"crops_ptr": "*i64", "out_ptr": "*i32" if width % 4 == 0 else "*u8"}
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": warps, "enable_fp_fusion": fusion}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]

    def tile(shape: tuple[int, int, int]) -> dict[str, int]:
        rows, columns, warps = shape
        return {"W": width, "PITCH": -(-width // 4) * 4, "ROWS": rows, "COLUMNS": columns, "warps": warps}

    weights = compiled(resize_triton._weights, False, 4, H=192, W=width, BLOCK=resize_triton.TABLE_BLOCK)
    assert "fma.rn.f64" not in weights  # Pillow's C code has none, and a weight must not be off in its last bit
    rows = compiled(resize_triton._resize_rows, True, STRIPS=resize_triton.STRIPS, **tile(resize_triton.ACROSS))
    assert not re.search(r"ld\.global\.\w*8", rows)  # words, not bytes
    columns = compiled(resize_triton._resize_columns, True, H=192, **tile(resize_triton.DOWN))
    assert ".v4.b32" in columns  # four pixels in one load
