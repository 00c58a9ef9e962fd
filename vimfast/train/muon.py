"""Muon: hidden matrices take orthogonal steps, all other parameters those of AdamW.

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; the scale of a step, which lets
both share a learning rate and a weight decay, is that of Liu et al., "Muon is scalable for LLM training", 2025.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from vimfast.checkpoint import head_names

MOMENTUM = 0.95  # of the orthogonal steps, Nesterov's
STEPS = 5  # of the iteration; singular values are then between 0.7 and 1.2
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of the entries of a step, about what AdamW's have
_EPS = 1e-7


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices between the embedding and the head: the trained weights of linear layers but the last.

    Of a Vision Mamba, ``in_proj``, ``x_proj``, ``dt_proj`` and ``out_proj``; of a transformer, those of attention and
    MLP. Convolutions, embeddings, norms, biases, ``A_log`` and ``D`` are none.
    """
    heads = head_names(model)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and name not in heads
    }


@torch.no_grad()
def orthogonalize(matrices: Tensor) -> Tensor:  # [n, rows, columns], any float dtype -> the same
    """The nearest semi-orthogonal matrices, roughly: singular values become about 1, by Newton and Schulz's iteration.

    All at once, as products of batches. They are of bf16 on a GPU, whose errors are smaller than the iteration's.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Orthogonal steps for groups with ``muon``, AdamW's for the others; nothing in a step waits for the GPU.

    Matrices of one shape are stepped together, by a few launches, however many there are.

    As torch's fused optimizers do, it leaves parameters and state alone in a step whose ``found_inf`` (a scalar on the
    device, 1 or 0) is set.

    Args:
        groups: of parameters; in those with ``muon`` true, matrices alone.
        lr: learning rate of all.
        betas, eps: AdamW's.

    Raises:
        ValueError: there are not two betas, or one is not in [0, 1).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; AdamW takes two, each from 0 to below 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False, "fused": True}
        super().__init__(groups, defaults)
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update, from the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_matrices()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if trained and not group["muon"]:
                self._adamw_step(trained, group)
        return loss

    @torch.no_grad()
    def step_matrices(self) -> None:
        """The part of an update that is not AdamW's."""
        for group in self.param_groups:
            if group["muon"]:
                shapes: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
                for p in group["params"]:
                    if p.grad is not None:
                        shapes[p.shape, p.dtype].append(p)
                for alike in shapes.values():
                    self._orthogonal_step(alike, group["lr"], group["weight_decay"])

    def _orthogonal_step(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        buffers = [self._state(p, "momentum_buffer")["momentum_buffer"] for p in matrices]
        gradients = torch.stack([p.grad for p in matrices if p.grad is not None])  # [n, rows, columns]
        momentum = torch.stack(buffers)
        moved = momentum.lerp(gradients, 1 - MOMENTUM)
        step: Tensor | float = lr
        if self.found_inf is not None:  # a product would keep a NaN
            skip = self.found_inf.reshape(()) > 0
            moved, gradients = torch.where(skip, momentum, moved), torch.where(skip, momentum, gradients)
            step = torch.where(skip, 0.0, lr)
        torch._foreach_copy_(buffers, [*moved.unbind()])
        update = orthogonalize(gradients.lerp(moved, MOMENTUM))
        update = update * (step * (-RMS * math.sqrt(max(update.shape[1:]))))
        kept = 1 - step * weight_decay
        torch._foreach_mul_(matrices, kept)
        torch._foreach_add_(matrices, [*update.unbind()])

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(p, "exp_avg", "exp_avg_sq", counted=True) for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, p: Tensor, *names: str, counted: bool = False) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state.update({name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names})
            if counted:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        return state
