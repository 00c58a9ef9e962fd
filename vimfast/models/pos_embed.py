"""Position embeddings: of another resolution, and rotary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vimfast.errors import UserError

RESAMPLE = ("patches", "original")  # how: the patches' entries alone, or with hustvl/Vim's mistake
_GRID = "pos_embed_grid"  # in the metadata of a state dict


def note_grid(state_dict: Any, prefix: str, grid: tuple[int, int]) -> None:
    """Put the grid of a position embedding into the metadata of a module's state dict, where versions of modules are.

    Its length does not tell the grid: 64 patches are 8 x 8 or 4 x 16.
    """
    if hasattr(state_dict, "_metadata"):
        state_dict._metadata[prefix.rstrip(".")][_GRID] = list(grid)


def noted_grid(state_dict: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """What :func:`note_grid` has put there; None: nothing."""
    for entry in getattr(state_dict, "_metadata", {}).values():
        match entry.get(_GRID):
            case [int(rows), int(columns)]:
                return rows, columns
    return None


def resample_pos_embed(
    pos_embed: Tensor,  # [1, M, C], any float dtype
    grid: tuple[int, int],
    class_places: Callable[[int], tuple[int, ...]],
    old: tuple[int, int] | None = None,
) -> Tensor:  # [1, grid[0] * grid[1] + T, C], same dtype
    """The position embedding of ``old`` = (rows, columns) patches, resampled (bicubic) to ``grid``.

    ``class_places(patches)`` says where the T class tokens are in a sequence of so many patches. Their entries move
    to the new places as they are; only the patches' are resampled. Without ``old`` the grid is taken for a square, and
    an embedding of as many patches as ``grid`` has is returned as it is.

    Raises:
        UserError: the embedding's patches do not form the old grid.
    """
    patches = pos_embed.shape[1] - len(class_places(0))
    if old == grid or (old is None and patches == grid[0] * grid[1]):
        return pos_embed
    if old is None:
        side = math.isqrt(max(0, patches))
        old = side, side
    if patches < 1 or old[0] * old[1] != patches:
        shape = "a square grid" if old[0] == old[1] else f"a grid of {old[0]} x {old[1]}"
        raise UserError(
            f"the position embedding has {pos_embed.shape[1]} entries, which is not {shape} of patches and"
            f" {len(class_places(0))} class tokens",
            "load it into a model with the same class token options",
        )
    places = list(class_places(patches))
    tokens = pos_embed[:, places]  # [1, T, C]
    is_patch = torch.ones(pos_embed.shape[1], dtype=torch.bool)
    is_patch[places] = False
    image = pos_embed[:, is_patch].unflatten(1, old).permute(0, 3, 1, 2)  # [1, C, *old]
    image = F.interpolate(image.float(), size=grid, mode="bicubic", align_corners=False)  # [1, C, rows, columns]
    resampled = image.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # [1, rows * columns, C]
    return insert_tokens(resampled, tokens, class_places(grid[0] * grid[1]))


def resize_pos_embed(
    pos_embed: Tensor,  # [1, M, C], any float dtype
    old: tuple[int, int],
    new: tuple[int, int],
    class_places: Callable[[int], tuple[int, ...]],
) -> Tensor:  # [1, new[0] * new[1] + T, C], same dtype
    """The position embedding of ``old`` = (rows, columns) patches for ``new`` ones, differentiable.

    What :func:`resample_pos_embed` makes of weights, in each step. Resampling is a product with a matrix, whose rows
    are the resampled unit vectors. The backward pass of a product is deterministic, interpolation's is not on a GPU.
    """
    places = class_places(old[0] * old[1])
    tokens = take_tokens(pos_embed, places)  # [1, T, C]
    wide = torch.promote_types(pos_embed.dtype, torch.float32)
    kind = pos_embed.device.type
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
        units = torch.eye(old[0] * old[1], dtype=wide, device=pos_embed.device)  # [P, P]
        matrix = F.interpolate(units.view(-1, 1, *old), size=new, mode="bicubic", align_corners=False)
        patches = matrix.flatten(1).T @ remove_tokens(pos_embed, places).to(wide)  # [1, new P, C]
    return insert_tokens(patches.to(pos_embed.dtype), tokens, class_places(new[0] * new[1]))


def insert_tokens(patches: Tensor, tokens: Tensor, places: tuple[int, ...]) -> Tensor:
    """Patches [B, P, C] with tokens [B, T, C] at ``places`` (ascending) of the result [B, P + T, C]."""
    bounds = [0, *(place - i for i, place in enumerate(places)), patches.shape[1]]
    pieces = patches.split([b - a for a, b in itertools.pairwise(bounds)], dim=1)
    inserted = (x for i, piece in enumerate(pieces[1:]) for x in (tokens[:, i : i + 1], piece))
    return torch.cat([pieces[0], *inserted], dim=1)


def place_tokens(
    patches: Tensor,  # [B, P, C]
    bias: Tensor | None,  # [C], of the patches
    tokens: Tensor | None,  # [1, T, C]
    positions: Tensor | None,  # [1, P + T, C]
    places: tuple[int, ...],
) -> Tensor:  # [B, P + T, C]
    """Patches and their bias, tokens at ``places`` (ascending), and positions.

    All that is the same for each image is added up first: it is one addition to the patches, in which the tokens'
    places are left free, and one sum over the batch in the backward pass.
    """
    count, channels = patches.shape[1:]
    same = (patches.new_zeros(channels) if bias is None else bias).expand(1, count, channels)
    if tokens is not None:
        same = insert_tokens(same, tokens, places)
        patches = insert_tokens(patches, patches.new_zeros(patches.shape[0], tokens.shape[1], channels), places)
    return patches + (same if positions is None else same + positions)


def take_tokens(x: Tensor, places: tuple[int, ...]) -> Tensor:
    """[B, M, C], only what is at ``places``: [B, T, C]."""
    return torch.cat([x[:, place : place + 1] for place in places], dim=1) if places else x[:, :0]


def remove_tokens(x: Tensor, places: tuple[int, ...]) -> Tensor:
    """[B, M, C] without what is at ``places`` (ascending): [B, M - T, C]."""
    bounds = [-1, *places, x.shape[1]]
    return torch.cat([x[:, a + 1 : b] for a, b in itertools.pairwise(bounds)], dim=1)


def rotary_tables(
    grid: tuple[int, int], channels: int, pretraining_side: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [rows * columns, channels] of EVA-02's two-dimensional rotary embedding, theta 10000.

    The first half of the channels turns with the row, the second with the column, in neighbouring pairs. Positions are
    scaled so that any grid spans ``pretraining_side``.
    """
    half = channels // 2
    speeds = 10000.0 ** -(torch.arange(0, half, 2, device=device) / half)  # [half / 2]
    rows, columns = (torch.outer(torch.arange(n, device=device) / n * pretraining_side, speeds) for n in grid)
    rows, columns = (angles.repeat_interleave(2, dim=1) for angles in (rows, columns))  # [n, half]
    angles = torch.cat(
        [rows[:, None].expand(*grid, half), columns[None].expand(*grid, half)], dim=-1
    )  # [rows, columns, channels]
    angles = angles.flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, M, C] with each neighbouring pair of channels turned by the angles of cos, sin [M, C]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin
