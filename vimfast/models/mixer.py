"""The block: a norm with a residual, then the Mamba mixer. The only caller of vimfast_kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimfast.errors import UserError
from vimfast.models.options import MixerOptions, ScanOptions
from vimfast_kernels import (
    Direction,
    MixerWeights,
    add_layer_norm,
    add_rms_norm,
    bidirectional_block,
    bidirectional_mixer,
    bidirectional_scan,
    causal_conv1d_silu,
    check_backend,
    drop_path,
    explain,
    selective_scan,
)

__all__ = ["AddLayerNorm", "AddRMSNorm", "Block", "MambaMixer", "drop_path"]


class MambaMixer(nn.Module):
    """Input projection, causal convolution, selective scan with a gate, output projection: [B, L, C] -> [B, L, C].

    ``bimamba_type``: ``none`` scans forward; ``v1`` scans forward and backward with all but A shared; ``v2`` gives each
    direction its own convolution, projections, A and D. The directions are summed and, for v2 with ``if_divide_out``,
    halved. Source: Zhu et al., "Vision Mamba", 2024, algorithm 1.

    The scan's state, A, D and time-step bias are fp32 under autocast too.
    """

    def __init__(
        self,
        dim: int,
        options: MixerOptions,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        try:
            self.scan_backend = check_backend(options.scan_backend)
        except ValueError as error:
            raise UserError(str(error)) from None
        scan = options.scan
        self.bimamba_type = options.kind
        self.scale = 0.5 if self.bimamba_type == "v2" and options.if_divide_out else 1.0
        self.d_state = options.d_state
        self.dt_rank = math.ceil(dim / 16) if scan.dt_rank == "auto" else scan.dt_rank
        inner = scan.expand * dim

        def linear(fan_in: int, fan_out: int, bias: bool) -> nn.Linear:
            return nn.Linear(fan_in, fan_out, bias=bias, device=device, dtype=dtype)

        def conv() -> nn.Conv1d:
            return nn.Conv1d(inner, inner, scan.d_conv, groups=inner, bias=scan.conv_bias, device=device, dtype=dtype)

        def fp32(x: Tensor) -> nn.Parameter:
            return nn.Parameter(x.to(device=device, dtype=torch.float32, copy=True))

        # The order of these lines is hustvl/Vim's: optimizer states in its checkpoints depend on it.
        self.gamma: nn.Parameter | None = None
        if options.init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((dim,), options.init_layer_scale, device=device, dtype=dtype))
        rates = torch.arange(1, self.d_state + 1).log().repeat(inner, 1)  # A = -1 .. -N in every channel
        self.in_proj = linear(dim, 2 * inner, scan.bias)
        self.conv1d = conv()
        self.x_proj = linear(inner, self.dt_rank + 2 * self.d_state, False)
        self.dt_proj = linear(self.dt_rank, inner, True)
        self.A_log = fp32(rates)
        self.D = fp32(torch.ones(inner))
        if self.bimamba_type != "none":
            self.A_b_log = fp32(rates)
        if self.bimamba_type == "v2":
            self.conv1d_b = conv()
            self.x_proj_b = linear(inner, self.dt_rank + 2 * self.d_state, False)
            self.dt_proj_b = linear(self.dt_rank, inner, True)
            self.D_b = fp32(torch.ones(inner))
            nn.init.zeros_(self.dt_proj_b.bias)  # hustvl/Vim's, unlike dt_proj's: its steps start at softplus(0)
        self.out_proj = linear(inner, dim, scan.bias)
        self._init_time_steps(scan)
        if scan.bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

    def _init_time_steps(self, scan: ScanOptions) -> None:
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        bound = scan.dt_scale * self.dt_rank**-0.5
        if scan.dt_init == "random":
            nn.init.uniform_(weight, -bound, bound)
        else:
            nn.init.constant_(weight, bound)
        dt = torch.empty(len(bias)).uniform_(math.log(scan.dt_min), math.log(scan.dt_max)).exp_()
        dt = dt.clamp_(min=scan.dt_init_floor)
        with torch.no_grad():
            bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def kernels(self, dtype: torch.dtype) -> str:
        """Which kernels run in this dtype where the weights are, and why not faster ones."""
        return explain(self.scan_backend, self.A_log.device, dtype, self.d_state)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, C] -> [B, L, C]
        if self.bimamba_type == "v2":
            return self.scaled(bidirectional_mixer(x, self.weights(), scale=self.scale, backend=self.scan_backend))
        y = self._shared(*self.in_proj(x).chunk(2, dim=-1))  # [B, L, E]
        return self.scaled(self.out_proj(y))

    def scaled(self, out: Tensor) -> Tensor:
        """The output times the learned scale, if there is one."""
        return out if self.gamma is None else out * self.gamma

    def weights(self) -> MixerWeights:
        """``v2``: all but the learned scale, as the kernels take it."""
        forth = self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D
        back = self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b
        return MixerWeights(
            self.in_proj.weight, self.in_proj.bias, _direction(*forth), _direction(*back), self.out_proj.weight,
            self.out_proj.bias,
        )  # fmt: skip

    def _shared(self, x: Tensor, z: Tensor) -> Tensor:
        """``none`` and ``v1``: one convolution and one set of projections."""
        u = causal_conv1d_silu(x, self.conv1d.weight[:, 0], self.conv1d.bias, backend=self.scan_backend)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)  # [B, L, R], 2 x [B, L, N]
        delta = F.linear(dt, self.dt_proj.weight)  # [B, L, E]
        tensors = u, delta, _rates(self.A_log), B, C, self.D
        if self.bimamba_type == "none":
            return selective_scan(*tensors, z, self.dt_proj.bias, backend=self.scan_backend)
        A = torch.stack([_rates(self.A_log), _rates(self.A_b_log)])  # [2, E, N]
        u, delta, B, C, D, bias = (t.expand(2, *t.shape) for t in (u, delta, B, C, self.D, self.dt_proj.bias))
        return bidirectional_scan(u, delta, A, B, C, D, z, bias, backend=self.scan_backend)


def _direction(conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> Direction:
    return Direction(conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D)


def _rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), at least in fp32."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


class AddRMSNorm(nn.Module):
    """(x, residual) -> (rms_norm(r) in x's dtype, r in fp32) with r = residual + x.

    With noise [B], uniform in [0, 1), x counts as 0 in samples whose noise is below ``drop_rate`` and as
    x / (1 - drop_rate) in the others: stochastic depth.
    """

    def __init__(self, dim: int, eps: float, backend: str, **to: Any) -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.ones(dim, **to))
        self.bias: nn.Parameter | None = None

    def forward(
        self, x: Tensor, residual: Tensor | None, noise: Tensor | None = None, drop_rate: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(
            x, residual, self.weight, eps=self.eps, noise=noise, drop_rate=drop_rate, backend=self.backend
        )


class AddLayerNorm(AddRMSNorm):
    """The same with LayerNorm."""

    def __init__(self, dim: int, eps: float, backend: str, **to: Any) -> None:
        super().__init__(dim, eps, backend, **to)
        self.bias = nn.Parameter(torch.zeros(dim, **to))

    def forward(
        self, x: Tensor, residual: Tensor | None, noise: Tensor | None = None, drop_rate: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return add_layer_norm(
            x, residual, self.weight, self.bias, eps=self.eps, noise=noise, drop_rate=drop_rate, backend=self.backend
        )


class Block(nn.Module):
    """Add, normalize, mix: (x, residual) -> (mixer(norm(r)), r) with r = residual + x in fp32.

    ``drop_path_rate`` is that of stochastic depth of x, which is the output of the block before; the noise [B],
    uniform in [0, 1), says which samples it meets. With ``overwrite``, r may take the residual's memory, or x's in
    the first block, where no gradient is needed.
    """

    def __init__(self, mixer: MambaMixer, norm: AddRMSNorm, drop_path_rate: float) -> None:
        super().__init__()
        self.mixer, self.norm, self.drop_path_rate = mixer, norm, drop_path_rate

    def forward(
        self, x: Tensor, residual: Tensor | None, noise: Tensor | None = None, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:  # [B, M, C]
        mixer, norm = self.mixer, self.norm
        if mixer.bimamba_type != "v2":
            x, residual = norm(x, residual, noise, self.drop_path_rate)
            return mixer(x), residual
        x, residual = bidirectional_block(
            x,
            residual,
            norm.weight,
            norm.bias,
            mixer.weights(),
            rms=not isinstance(norm, AddLayerNorm),
            eps=norm.eps,
            noise=noise,
            drop_rate=self.drop_path_rate,
            scale=mixer.scale,
            overwrite=overwrite,
            backend=mixer.scan_backend,
        )
        return mixer.scaled(x), residual
