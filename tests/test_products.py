"""Which products run as three of tf32 parts; what these compute is in test_triton_interpreter and test_products_gpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from vimfast_kernels.product import launch
from vimfast_kernels.product.launch import parts_of, splits
from vimfast_kernels.tuning import DEFAULT


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[int, int]]]:
    """What torch reports of the GPU that meta tensors are said to be on."""
    reported = {"is": (9, 0)}
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: reported["is"])
    launch._has_fast_tf32.cache_clear()
    yield reported
    launch._has_fast_tf32.cache_clear()


def test_only_fp32_on_gpus_where_it_was_measured(capability: dict[str, tuple[int, int]]) -> None:
    assert launch._has_fast_tf32(torch.device("cuda", 0))
    capability["is"] = (8, 9)
    assert not launch._has_fast_tf32(torch.device("cuda", 1))
    assert splits(torch.zeros(1))
    assert not splits(torch.zeros(1, dtype=torch.bfloat16))
    assert not splits(torch.zeros(1, dtype=torch.float64))


def test_not_where_the_user_allows_tf32() -> None:
    """By either of torch's settings, of which reading the older raises an error after the newer was set."""
    x = torch.zeros(1)
    for allow, refuse in (
        (lambda: torch.set_float32_matmul_precision("high"), lambda: torch.set_float32_matmul_precision("highest")),
        (
            lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
            lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        ),
    ):
        allow()
        assert not splits(x)
        refuse()
        assert splits(x)


@pytest.mark.parametrize(
    ("weight", "parts", "of_fp32"),
    [
        ((768, 192), 8, 32),  # Tiny's in_proj, out_proj and both of x_proj: as measured
        ((192, 384), 16, 32),
        ((2 * 48, 384), 16, 32),
        ((1536, 384), 4, 16),  # Small's
        ((384, 768), 8, 32),
        ((2 * 56, 768), 8, 32),
        ((3072, 768), 2, 8),  # Base's
        ((768, 1536), 4, 16),
        ((2 * 80, 1536), 8, 32),
        ((8192, 4096), 1, 2),
        ((1, 1), 16, 32),
    ],
)
def test_larger_gradients_are_split_into_fewer_products(weight: tuple[int, int], parts: int, of_fp32: int) -> None:
    """What is left to be summed grows with the weight, and a larger product fills the GPU by itself."""
    entries = weight[0] * weight[1]
    assert parts_of(entries, DEFAULT.products) == parts
    assert parts_of(entries, DEFAULT.products_fp32) == of_fp32
