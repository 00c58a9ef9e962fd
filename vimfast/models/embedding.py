"""From images to tokens: the patch embedding, and rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import lecun_normal_
from torch import Tensor, nn

from vimfast.errors import UserError
from vimfast.models.pos_embed import insert_tokens, rotary_tables


class PatchEmbed(nn.Module):
    """Images [B, channels, H, W] -> patches [B, rows * columns, C], row by row. Patches overlap if stride < size."""

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, stride: int, channels: int, dim: int, **to: Any
    ) -> None:
        super().__init__()
        if patch_size > min(img_size) or stride < 1:
            raise UserError(
                f"a patch of {patch_size} pixels every {stride} does not fit an image of"
                f" {img_size[0]} x {img_size[1]}; give a larger img_size or a smaller patch_size"
            )
        self.img_size, self.channels = img_size, channels
        self.grid_size = (img_size[0] - patch_size) // stride + 1, (img_size[1] - patch_size) // stride + 1
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(channels, dim, patch_size, stride, **to)
        assert self.proj.bias is not None
        lecun_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (self.channels, *self.img_size):
            raise UserError(
                f"images are {' x '.join(map(str, x.shape[1:]))} (channels, height, width), the model was built for"
                f" {self.channels} x {self.img_size[0]} x {self.img_size[1]}; build it with that size (--input-size)"
            )
        size = self.proj.kernel_size[0]
        if self.proj.stride[0] != size:
            maps: Tensor = self.proj(x)
            return maps.flatten(2).transpose(1, 2)  # [B, C, rows, columns] -> [B, P, C]
        # Patches that do not overlap are rows of a matrix: one copy, which also casts, and one product.
        rows, columns = self.grid_size
        x = x[:, :, : rows * size, : columns * size].unflatten(3, (columns, size)).unflatten(2, (rows, size))
        x = x.permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, channels, size, size]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type), memory_format=torch.contiguous_format)
        return F.linear(x.reshape(len(x), rows * columns, -1), self.proj.weight.flatten(1), self.proj.bias)


class Rotary(nn.Module):
    """Rotary position tables; its buffers are in hustvl/Vim's state dict."""

    def __init__(
        self, grid: tuple[int, int], dim: int, pretraining_side: int, device: torch.device | str | None
    ) -> None:
        super().__init__()
        cos, sin = rotary_tables(grid, dim, pretraining_side)
        self.freqs_cos: Tensor
        self.freqs_sin: Tensor
        self.register_buffer("freqs_cos", cos.to(device))
        self.register_buffer("freqs_sin", sin.to(device))

    def forward(self, places: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(cos, sin) [M, C] of patches and, at ``places``, class tokens, which do not turn."""
        cos, sin = self.freqs_cos[None], self.freqs_sin[None]  # [1, P, C]
        still = cos.new_ones(1, len(places), cos.shape[2])
        return insert_tokens(cos, still, places)[0], insert_tokens(sin, torch.zeros_like(still), places)[0]
