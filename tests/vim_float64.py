"""Vision Mamba computed a second time, step by step and literally from its description; shares no code with vimfast.

Meant for float64 and small sizes. The backward direction is what the description says: the same on the reversed
sequence.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def scan(
    u: Tensor,  # [B, L, E]
    delta: Tensor,  # [B, L, E]
    A: Tensor,  # [E, N]
    B: Tensor,  # [B, L, N]
    C: Tensor,  # [B, L, N]
    D: Tensor | None = None,  # [E]
    z: Tensor | None = None,  # [B, L, E]
    delta_bias: Tensor | None = None,  # [E]
) -> Tensor:
    h = torch.zeros(u.shape[0], u.shape[2], A.shape[1], dtype=u.dtype)
    outputs = []
    for t in range(u.shape[1]):
        x = delta[:, t] if delta_bias is None else delta[:, t] + delta_bias
        dt = torch.where(x > 20, x, torch.log1p(torch.exp(x.clamp(max=20))))  # [B, E]
        h = torch.exp(dt[:, :, None] * A) * h + dt[:, :, None] * B[:, t, None, :] * u[:, t, :, None]
        y = (h * C[:, t, None, :]).sum(-1)
        if D is not None:
            y = y + D * u[:, t]
        if z is not None:
            y = y * z[:, t] / (1 + torch.exp(-z[:, t]))
        outputs.append(y)
    return torch.stack(outputs, 1)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, L, E], weight [E, W]: each position sees itself and the W - 1 before it."""
    width = weight.shape[1]
    outputs = []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, 0])
        for tap in range(width):
            if (s := t - (width - 1) + tap) >= 0:
                y = y + weight[:, tap] * x[:, s]
        y = y if bias is None else y + bias
        outputs.append(y / (1 + torch.exp(-y)))
    return torch.stack(outputs, 1)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """RMSNorm, or LayerNorm if there is a bias."""
    if bias is None:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight + bias


def mixer(x: Tensor, p: Mapping[str, Tensor], kind: str, halve: bool) -> Tensor:
    """x [B, L, C]; p holds the mixer's parameters under their names."""
    xz = x @ p["in_proj.weight"].T
    if "in_proj.bias" in p:
        xz = xz + p["in_proj.bias"]
    x, z = xz.chunk(2, -1)

    def inputs(x: Tensor, tail: str) -> tuple[Tensor, ...]:
        """What the scan reads: u, delta, B, C."""
        u = conv_silu(x, p[f"conv1d{tail}.weight"][:, 0], p.get(f"conv1d{tail}.bias"))
        rank, states = p[f"dt_proj{tail}.weight"].shape[1], p["A_log"].shape[1]
        dt, B, C = torch.split(u @ p[f"x_proj{tail}.weight"].T, [rank, states, states], dim=-1)
        return u, dt @ p[f"dt_proj{tail}.weight"].T, B, C

    u, delta, B, C = inputs(x, "")
    y = scan(u, delta, -torch.exp(p["A_log"]), B, C, p["D"], z, p["dt_proj.bias"])
    if kind == "v1":
        u, delta, B, C, z = (s.flip(1) for s in (u, delta, B, C, z))
        y = y + scan(u, delta, -torch.exp(p["A_b_log"]), B, C, p["D"], z, p["dt_proj.bias"]).flip(1)
    if kind == "v2":
        u, delta, B, C = inputs(x.flip(1), "_b")
        y = y + scan(u, delta, -torch.exp(p["A_b_log"]), B, C, p["D_b"], z.flip(1), p["dt_proj_b.bias"]).flip(1)
        y = y / 2 if halve else y
    y = y @ p["out_proj.weight"].T
    if "out_proj.bias" in p:
        y = y + p["out_proj.bias"]
    return y * p["gamma"] if "gamma" in p else y


def turn(x: Tensor, positions: list[tuple[float, float] | None]) -> Tensor:
    """Rotary embedding: x [B, M, C], (row, column) of each patch, None for a class token."""
    quarter = x.shape[2] // 4
    x = x.clone()
    for m, position in enumerate(positions):
        if position is None:
            continue
        for axis in (0, 1):
            for i in range(quarter):
                angle = torch.tensor(position[axis] * 10000.0 ** (-i / quarter), dtype=x.dtype)
                first = 2 * (axis * quarter + i)
                a, b = x[:, m, first].clone(), x[:, m, first + 1].clone()
                x[:, m, first] = a * torch.cos(angle) - b * torch.sin(angle)
                x[:, m, first + 1] = b * torch.cos(angle) + a * torch.sin(angle)
    return x


def vision_mamba(
    images: Tensor,  # [B, 3, H, W]
    p: Mapping[str, Tensor],
    *,
    stride: int,
    kind: str = "v2",
    halve: bool = True,
    token: str = "middle",  # middle, first, double, none
    pool: str = "none",
    alternate: bool = False,
    flip: bool = False,
    rope: bool = False,
    rope_residual: bool = False,
    side: int = 14,
    eps: float = 1e-5,
    place: int = 0,  # of a class token that is neither in the middle nor one of two
    order: list[int] | None = None,  # of the sequence, where it is shuffled
) -> Tensor:
    """Logits without dropout and stochastic depth. p: the state dict."""
    weight = p["patch_embed.proj.weight"]
    size = weight.shape[-1]
    rows = range(0, images.shape[2] - size + 1, stride)
    columns = range(0, images.shape[3] - size + 1, stride)
    patches, positions = [], []
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            window = images[:, None, :, r : r + size, c : c + size]
            patches.append((window * weight).sum((2, 3, 4)) + p["patch_embed.proj.bias"])
            positions.append((i * side / len(rows), j * side / len(columns)))
    sequence: list[Tensor] = list(patches)
    where: list[tuple[float, float] | None] = list(positions)

    def insert(place: int, name: str) -> None:
        sequence.insert(place, p[name][:, 0].expand(len(images), -1))
        where.insert(place, None)

    if token == "middle":
        insert(len(patches) // 2, "cls_token")
    elif token == "first":
        insert(place, "cls_token")
    elif token == "double":
        insert(0, "cls_token_head")
        insert(len(patches) + 1, "cls_token_tail")
    x = torch.stack(sequence, 1)
    if "pos_embed" in p:
        x = x + p["pos_embed"]
    if order is not None:
        x, where = torch.stack([x[:, i] for i in order], 1), [where[i] for i in order]
    if flip:
        x, where = x.flip(1), where[::-1]
    read = [i for i, position in enumerate(where) if position is None]

    def layer(i: int, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        own = {k.removeprefix(f"layers.{i}."): v for k, v in p.items() if k.startswith(f"layers.{i}.")}
        residual = x if residual is None else residual + x
        x = norm(residual, own["norm.weight"], own.get("norm.bias"), eps)
        inner = {k.removeprefix("mixer."): v for k, v in own.items() if k.startswith("mixer.")}
        return mixer(x, inner, kind, halve), residual

    residual = None
    depth = 1 + max(int(k.split(".")[1]) for k in p if k.startswith("layers."))
    for i in range(0, depth, 2 if alternate else 1):
        if rope:
            x = turn(x, where)
            if rope_residual and residual is not None:
                residual = turn(residual, where)
        if alternate:
            a, ra = layer(i, x, residual)
            b, rb = layer(i + 1, x.flip(1), None if residual is None else residual.flip(1))
            x, residual = a + b.flip(1), ra + rb.flip(1)
        else:
            x, residual = layer(i, x, residual)
    x = norm(x if residual is None else residual + x, p["norm_f.weight"], p.get("norm_f.bias"), eps)
    if read:
        x = sum(x[:, i] for i in read) / len(read)
    elif pool == "none":
        x = x[:, -1]
    elif pool == "mean":
        x = x.mean(1)
    x = x @ p["head.weight"].T + p["head.bias"]
    return x.max(1).values if pool == "max" and not read else x
