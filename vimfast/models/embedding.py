"""From images to tokens: the patch embedding, and rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimfast.errors import UserError
from vimfast.models.options import PatchOptions
from vimfast.models.plain import is_plain
from vimfast.models.pos_embed import insert_tokens, rotary_tables
from vimfast_kernels.arithmetic import autocast_dtype

_CUT_OFF_DEVIATION = 0.87962566103423978  # of a standard normal cut off at 2


class PatchEmbed(nn.Module):
    """Images [B, channels, H, W] -> patches [B, rows * columns, C], row by row. Patches overlap if stride < size.

    Args:
        options: of the images and the patches.
        dim: C.
        to: device and dtype.
    """

    def __init__(self, options: PatchOptions, dim: int, **to: Any) -> None:
        super().__init__()
        self.img_size, self.dynamic = options.size, options.dynamic_img_size
        self.channels, self.patch_size, self.stride = options.channels, options.patch_size, options.stride
        self.resize(self.img_size)
        self.proj = nn.Conv2d(self.channels, dim, self.patch_size, self.stride, **to)
        assert self.proj.bias is not None
        # lecun_normal_ of timm 0.4.12, which hustvl/Vim pins: widened as for a normal cut off at two deviations, but
        # cut off at 2, many deviations away. Later timms cut off at two deviations, and so begin at 0.88 of this.
        fan_in = self.proj.weight[0].numel()
        nn.init.trunc_normal_(self.proj.weight, std=fan_in**-0.5 / _CUT_OFF_DEVIATION)
        nn.init.zeros_(self.proj.bias)

    def resize(self, size: tuple[int, int]) -> None:
        """Take images of this height and width from now on."""
        self.grid_size = self.grid(size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.img_size = size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches of images of this height and width.

        Raises:
            UserError: not one patch fits.
        """
        if self.patch_size > min(size) or self.stride < 1:
            raise UserError(
                f"a patch of {self.patch_size} pixels every {self.stride} does not fit an image of"
                f" {size[0]} x {size[1]}",
                "give a larger img_size or a smaller patch_size",
            )
        return (size[0] - self.patch_size) // self.stride + 1, (size[1] - self.patch_size) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        return self._embed(x, with_bias=True)

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(patches, the bias [C] that is not yet in them); None where the convolution itself adds it."""
        return self._embed(x, with_bias=False), self.proj.bias if self._is_product else None

    @property
    def _is_product(self) -> bool:
        return self.stride == self.patch_size and is_plain(self.proj, nn.Conv2d)

    def _embed(self, x: Tensor, with_bias: bool) -> Tensor:
        """A convolution that is called adds its bias in any case."""
        if x.ndim != 4:
            raise UserError(
                f"images are a tensor of shape {tuple(x.shape)}, and the model takes a batch, [B, channels, H, W]",
                "give a single image as image[None]" if x.ndim == 3 else "give it four dimensions",
            )
        channels, *given = x.shape[1:]
        if channels != self.channels or (not self.dynamic and tuple(given) != self.img_size):
            raise UserError(
                f"images are {' x '.join(map(str, x.shape[1:]))} (channels, height, width), the model was built for"
                f" {self.channels} x {self.img_size[0]} x {self.img_size[1]}",
                "build it with that size (--input-size), or for any size with dynamic_img_size=True",
            )
        rows, columns = self.grid((x.shape[2], x.shape[3]))
        size = self.patch_size
        if not self._is_product:
            maps: Tensor = self.proj(x)
            return maps.flatten(2).transpose(1, 2)  # [B, C, rows, columns] -> [B, P, C]
        # Patches that do not overlap are rows of a matrix: one copy, which also casts, and one product.
        x = x[:, :, : rows * size, : columns * size].unflatten(3, (columns, size)).unflatten(2, (rows, size))
        x = x.permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, channels, size, size]
        x = x.to(autocast_dtype(x), memory_format=torch.contiguous_format)
        bias = self.proj.bias if with_bias else None
        return F.linear(x.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), bias)


class Rotary(nn.Module):
    """Rotary position tables; its buffers are in hustvl/Vim's state dict."""

    def __init__(
        self, grid: tuple[int, int], dim: int, pretraining_side: int, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.grid, self.dim, self.pretraining_side = grid, dim, pretraining_side
        cos, sin = rotary_tables(grid, dim, pretraining_side)
        self.freqs_cos: Tensor
        self.freqs_sin: Tensor
        self.register_buffer("freqs_cos", cos.to(device))
        self.register_buffer("freqs_sin", sin.to(device))

    def forward(self, places: tuple[int, ...], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(cos, sin) [M, C] of a grid of patches and, at ``places``, class tokens, which do not turn."""
        cos, sin = self._tables(grid)  # [P, C]
        still = cos.new_ones(1, len(places), cos.shape[1])
        return insert_tokens(cos[None], still, places)[0], insert_tokens(sin[None], torch.zeros_like(still), places)[0]

    def resize(self, grid: tuple[int, int]) -> None:
        """Have the tables of this grid from now on."""
        cos, sin = self._tables(grid)
        self.grid, self.freqs_cos, self.freqs_sin = grid, cos, sin

    def _tables(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        own = self.freqs_cos
        if grid == self.grid:
            return own, self.freqs_sin
        cos, sin = rotary_tables(grid, self.dim, self.pretraining_side, own.device)
        return cos.to(own.dtype), sin.to(own.dtype)
