"""The block: a norm with a residual, then the Mamba mixer. The only caller of vimfast_kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimfast.errors import UserError
from vimfast.models.options import MixerOptions, ScanOptions
from vimfast.models.plain import is_plain, unwatched
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

_LINEARS = ("in_proj", "x_proj", "dt_proj", "x_proj_b", "dt_proj_b", "out_proj")
_CONVOLUTIONS = ("conv1d", "conv1d_b")


class MambaMixer(nn.Module):
    """Input projection, causal convolution, selective scan with a gate, output projection: [B, L, C] -> [B, L, C].

    ``bimamba_type``: ``none`` scans forward; ``v1`` scans forward and backward with all but A shared; ``v2`` gives each
    direction its own convolution, projections, A and D. The directions are summed and, for v2 with ``if_divide_out``,
    halved. Source: Zhu et al., "Vision Mamba", 2024, algorithm 1.

    In ``v2``, all projections and convolutions run in one op, which reads their parameters. If one of them has hooks,
    parametrizations or an adapter around it, or another module in its place, each is called instead, at the cost of
    speed. A ``dt_proj`` that is called adds its bias in its own precision; a convolution gets [B, E, L + taps - 1].

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
        self.d_state, self.d_conv = options.d_state, scan.d_conv
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
        # A = -1 .. -N in every channel; of fp32 from the start, whatever torch's default dtype is.
        rates = torch.arange(1, self.d_state + 1, dtype=torch.float32).log().repeat(inner, 1)
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
        if self.fused:
            return self.scaled(bidirectional_mixer(x, self.weights(), scale=self.scale, backend=self.scan_backend))
        x, z = self.in_proj(x).chunk(2, dim=-1)  # 2 x [B, L, E]
        y = self._both(x, z) if self.bimamba_type == "v2" else self._shared(x, z)
        return self.scaled(self.out_proj(y))

    @property
    def fused(self) -> bool:
        """Whether one op may take all parameters; looked at in each pass, since hooks and adapters come and go."""
        own: dict[str, Any] = self._modules
        return (
            self.bimamba_type == "v2"
            and all(is_plain(own[name], nn.Linear) for name in _LINEARS)
            and all(is_plain(own[name], nn.Conv1d) for name in _CONVOLUTIONS)
        )

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

    def _both(self, x: Tensor, z: Tensor) -> Tensor:
        """``v2``, module by module: each direction has its own."""
        u = self._convolve(self.conv1d, x), self._convolve(self.conv1d_b, x, reverse=True)
        forth = self._project(u[0], self.x_proj, self.dt_proj)
        back = self._project(u[1], self.x_proj_b, self.dt_proj_b)
        delta, B, C, bias = (torch.stack(pair) for pair in zip(forth, back, strict=True))
        A = torch.stack([_rates(self.A_log), _rates(self.A_b_log)])  # [2, E, N]
        D = torch.stack([self.D, self.D_b])
        return bidirectional_scan(
            torch.stack(u), delta, A, B, C, D, z, bias, scale=self.scale, backend=self.scan_backend
        )

    def _shared(self, x: Tensor, z: Tensor) -> Tensor:
        """``none`` and ``v1``: one convolution and one set of projections."""
        u = self._convolve(self.conv1d, x)
        delta, B, C, bias = self._project(u, self.x_proj, self.dt_proj)
        if self.bimamba_type == "none":
            return selective_scan(u, delta, _rates(self.A_log), B, C, self.D, z, bias, backend=self.scan_backend)
        A = torch.stack([_rates(self.A_log), _rates(self.A_b_log)])  # [2, E, N]
        u, delta, B, C, D, bias = (t.expand(2, *t.shape) for t in (u, delta, B, C, self.D, bias))
        return bidirectional_scan(u, delta, A, B, C, D, z, bias, backend=self.scan_backend)

    def _convolve(self, conv: nn.Module, x: Tensor, reverse: bool = False) -> Tensor:  # [B, L, E] -> [B, L, E]
        """silu of the causal convolution, which looks ahead if `reverse`."""
        if is_plain(conv, nn.Conv1d):
            return causal_conv1d_silu(x, conv.weight[:, 0], conv.bias, reverse=reverse, backend=self.scan_backend)
        x = F.pad((x.flip(1) if reverse else x).transpose(1, 2), (self.d_conv - 1, 0))
        x = F.silu(conv(x)).transpose(1, 2)
        return x.flip(1) if reverse else x

    def _project(self, u: Tensor, x_proj: nn.Module, dt_proj: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the scan of u [B, L, E] takes: delta [B, L, E], B and C [B, L, N], and the bias [E] of delta."""
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if is_plain(dt_proj, nn.Linear):
            return F.linear(dt, dt_proj.weight), B, C, dt_proj.bias  # which the scan adds in fp32
        return dt_proj(dt), B, C, torch.zeros_like(self.D)


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
        if not (unwatched(norm, AddRMSNorm, AddLayerNorm) and unwatched(mixer, MambaMixer) and mixer.fused):
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

    @property
    def unwatched(self) -> bool:
        """Whether nobody may have kept what goes in or comes out, so that its memory can be used again."""
        return (
            unwatched(self, Block)
            and unwatched(self.norm, AddRMSNorm, AddLayerNorm)
            and unwatched(self.mixer, MambaMixer)
        )
