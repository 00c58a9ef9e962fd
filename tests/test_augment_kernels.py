"""The augmentation's Triton kernels against Pillow: in the interpreter on a CPU, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vimfast.augment import pixels_pillow, randaugment
from vimfast.augment.plan import OPERATION, PATCH, Op, Plan
from vimfast.augment.recipe import Recipe
from vimfast.config import AugmentConfig
from vimfast.image_size import ImageSize

triton = pytest.importorskip("triton")

NORMALIZATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HEIGHT, WIDTH = 23, 36  # no multiple of a block


def random_images(count: int) -> Tensor:
    """uint8 [count, HEIGHT, WIDTH, 3]: detail, flat areas, few levels, one level."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        cells = rng.integers(0, 256, (3 + 5 * (i % 3), 4 + 3 * (i % 3), 3), dtype=np.uint8)
        image = Image.fromarray(cells).resize((WIDTH, HEIGHT), (Image.BICUBIC, Image.NEAREST)[i % 2])
        made.append(np.asarray(image) // (1, 1, 3, 200)[i % 4] + (0, 0, 60, 90)[i % 4])
    return torch.from_numpy(np.stack(made).astype(np.uint8))


def all_operations() -> np.ndarray:
    """OPERATION [n, 6]: every operation, weak and strong, in both directions, with both filters."""
    rows = []
    for name in randaugment._BUILDERS:
        for magnitude, sign, interpolation in ((2.2, 0.1, "bicubic"), (9, 0.9, "bicubic"), (10, 0.1, "bilinear")):
            policy = randaugment.RandAugment((name,), None, magnitude, 1, 1.0, interpolation=interpolation)
            u = np.zeros((1, policy.columns))
            u[0, randaugment.SIGN] = sign
            row = policy.draw(u, ImageSize(HEIGHT, WIDTH))
            rows.append(np.pad(row, ((0, 0), (6 - row.shape[1], 0))))
    shifts = np.zeros((2, 6), OPERATION)
    shifts["code"][:, -1] = Op.SHIFT
    shifts["args"][:, -1, :2] = (4, -3), (-4, 2)
    return np.concatenate([*rows, shifts])


def plans() -> dict[str, Plan]:
    """Each operation alone; whole recipes, of one to seven slots; boxes that overlap."""
    every = all_operations()
    drawn = np.arange(24)
    patches = np.zeros((24, 3), PATCH)
    patches["bottom"], patches["right"] = (20, 15, 9), (30, 36, 5)
    patches["top"], patches["left"], patches["seed"] = (2, 8, 9), (3, 20, 1), -1
    patches["fill"] = np.random.default_rng(0).normal(size=(24, 3, 3))
    return {
        "each": Plan.of(every, np.zeros((len(every), 0), PATCH)),
        "recipe": Recipe(AugmentConfig(recount=2, remode="const")).draw(0, 0, drawn, (HEIGHT, WIDTH)),
        "ThreeAugment": Recipe(AugmentConfig(three_augment=True)).draw(0, 1, drawn, (HEIGHT, WIDTH)),
        "boxes": Plan(np.zeros((24, 1), OPERATION), patches),
    }


def compare(device: str) -> None:
    """Measured in the interpreter: the same pixels but for 1 in 5,000 of a warp, which are a level off."""
    from vimfast.augment import pixels_triton

    mean, std = NORMALIZATION["mean"], NORMALIZATION["std"]
    for title, plan in plans().items():
        images = random_images(len(plan.operations))
        ours = pixels_triton.carry_out(images.to(device), plan, mean, std, torch.float32).cpu()
        level = ours.new_tensor(std).view(3, 1, 1) * 255
        difference = (ours - pixels_pillow.carry_out(images, plan, mean, std, torch.float32)).abs() * level
        assert difference.max() <= 1.001, title
        assert (difference > 0.5).float().mean() < 1e-3, title
        # The comparison means something: most images were changed.
        unchanged = pixels_pillow.carry_out(images, Plan.nothing(len(images)), mean, std, torch.float32)
        assert ((unchanged - ours).abs().amax((1, 2, 3)) > 0.02).float().mean() > 0.6, title
    check_noise(device)


def check_noise(device: str) -> None:
    from vimfast.augment import pixels_triton

    patches = np.zeros((6, 1), PATCH)
    patches["bottom"], patches["right"], patches["seed"][:, 0] = HEIGHT, WIDTH, (1, 2, 3, 4, 2**30, 1)
    plan = Plan(np.zeros((6, 1), OPERATION), patches)
    out = pixels_triton.carry_out(random_images(6).to(device), plan, *NORMALIZATION.values(), torch.float16).cpu()
    assert out.dtype == torch.float16
    assert torch.equal(out[0], out[5])
    noise = out[:5].float()
    assert abs(noise.mean()) < 0.04
    assert abs(noise.std() - 1) < 0.03
    of_each = noise.reshape(15, -1)
    assert (torch.corrcoef(of_each) - torch.eye(15)).abs().max() < 5 / of_each.shape[1] ** 0.5


def test_kernels_give_pillows_pixels() -> None:
    """Whether a kernel is interpreted is settled when its module is imported, so this runs in a process of its own."""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    code = "from vimfast.augment import pixels_triton; pixels_triton.BLOCK = 1024; "
    code += "import quick_interpreter, test_augment_kernels; test_augment_kernels.compare('cpu')"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]


@pytest.mark.gpu
def test_kernels_give_pillows_pixels_on_a_gpu() -> None:
    compare("cuda")


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile(arch: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vimfast.augment import pixels_triton

    def compiled(kernel: triton.JITFunction, warps: int, **constants: int) -> str:
        types = {"images_ptr": "*u8", "before_ptr": "*u8", "after_ptr": "*u8", "tables_ptr": "*u8", "out_ptr": "*fp32"}
        types |= {"ops_ptr": "*i64", "patches_ptr": "*i64"}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "fp32" if name[:3] in ("mea", "std") else "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        options = {"num_warps": warps, "enable_fp_fusion": False}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]

    block, warps = pixels_triton.BLOCK, pixels_triton.WARPS
    apply = compiled(pixels_triton._apply, warps, H=224, W=224, LAST=True, BLOCK=block)
    assert "fma.rn.f32" not in apply  # Pillow's C code has none, so with them pixels would be a level off
    assert compiled(pixels_triton._tables, pixels_triton.TABLE_WARPS, BLOCK=pixels_triton.TABLE_BLOCK)
