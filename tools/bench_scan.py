"""How fast is the plain torch scan? Against a step-by-step one in the manner of mamba_ssm's selective_scan_ref.

    python tools/bench_scan.py                       # [8, 197, 384], state 16: Vim-Tiny at batch 8
    python tools/bench_scan.py --device cuda --batch 128

Outputs and gradients are compared before anything is timed. Times are the best of a few runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vimfast.cli import run_main
from vimfast_kernels import selective_scan
from vimfast_kernels.scan.reference import piece

Scan = Callable[..., Tensor]


def step_by_step(
    u: Tensor,  # [b, L, d]
    delta: Tensor,
    A: Tensor,  # [d, N]
    B: Tensor,  # [b, L, N]
    C: Tensor,
    D: Tensor,  # [d]
    z: Tensor,
    delta_bias: Tensor,  # [d]
    views: bool = False,
) -> Tensor:
    """All of exp(dt A) and dt B u first, as [b, d, L, N]; then L steps of autograd.

    A step picks its slice by index, as the original does, and the backward of each such pick fills a tensor of the
    whole size; with ``views`` the slices are taken by one unbind, the cheapest fix.
    """
    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))  # [b, d or N, L]
    dt = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", dt, B, u)
    state, outputs = A.new_zeros(len(u), *A.shape), []
    decays: Iterable[Tensor] = decay.unbind(2) if views else (decay[:, :, t] for t in range(u.shape[2]))
    drives: Iterable[Tensor] = drive.unbind(2) if views else (drive[:, :, t] for t in range(u.shape[2]))
    for a, x, c in zip(decays, drives, C.unbind(2), strict=True):
        state = a * state + x
        outputs.append(torch.einsum("bdn,bn->bd", state, c))
    y = torch.stack(outputs, 2) + u * D[:, None]
    return (y * F.silu(z)).transpose(1, 2)


def seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Best of `repeats`, the device waited for."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def gradients(scan: Scan, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = scan(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"batch": 8, "length": 197, "channels": 384, "states": 16, "threads": 2, "repeats": 5}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    b, length, d, n = args.batch, args.length, args.channels, args.states
    sequence, per_state = (b, length, d), (b, length, n)
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    inputs = [torch.randn(sequence), torch.randn(sequence), A, torch.randn(per_state), torch.randn(per_state)]
    inputs = [x.to(args.device) for x in (*inputs, torch.ones(d), torch.randn(sequence), torch.randn(d) - 4)]
    grad = torch.randn(sequence, device=args.device)
    scans: dict[str, tuple[Scan, int]] = {
        "step by step, by index": (step_by_step, 1),
        "step by step, by unbind": (partial(step_by_step, views=True), args.repeats),
        "vimfast reference": (partial(selective_scan, backend="reference"), args.repeats),
        "the same, reversed": (partial(selective_scan, reverse=True, backend="reference"), args.repeats),
    }

    ours, naive = (gradients(scans[name][0], inputs, grad) for name in ("vimfast reference", "step by step, by unbind"))
    names = ("out", "u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    errors = {k: ((x - y).norm() / y.norm()).item() for k, x, y in zip(names, ours, naive, strict=True)}
    worst = max(errors, key=lambda k: errors[k])
    print(f"[{b}, {length}, {d}], state {n}, fp32, {args.device}, {args.threads} threads")
    print(f"largest relative difference, output and all gradients: {errors[worst]:.1e} ({worst})")
    _, steps = piece(b, length, d, n, on_gpu=args.device == "cuda")
    saved = 4 * b * -(-length // steps) * d * n / 2**20
    print(f"kept for backward beside the inputs: {saved:.1f} MiB, a state every {steps} steps\n")

    print(f"{'milliseconds':26}{'forward':>10}{'+ backward':>12}{'ratio':>8}")
    first = 0.0
    for name, (scan, repeats) in scans.items():
        with torch.no_grad():
            forward = seconds(partial(scan, *inputs), repeats, args.device)
        both = seconds(partial(gradients, scan, inputs, grad), repeats, args.device)
        first = first or both
        print(f"{name:26}{1e3 * forward:10.1f}{1e3 * both:12.1f}{first / both:8.1f}")


if __name__ == "__main__":
    run_main(main)
