"""Mixup and cutmix: pixels and targets agree with each other, and the draws with timm's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup as TimmMixup

from vimfast.config import MixConfig
from vimfast.train.mixing import Mixup

K = 7


def constant_images(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose every pixel is their class index, so a pixel shows whose it is."""
    labels = torch.arange(batch) % K
    return labels.float()[:, None, None, None].expand(batch, 3, 20, 24).contiguous(), labels


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("batch", [1, 7, 8])
@pytest.mark.parametrize("options", [{"cutmix": 0.0}, {"mixup": 0.0}, {}, {"cutmix_minmax": (0.3, 0.8)}])
def test_targets_weigh_what_the_pixels_show(mode: str, batch: int, options: dict) -> None:
    mixup = Mixup(MixConfig(mixup_mode=mode, smoothing=0.0, **options), K, seed=3, rank=0)
    images, labels = constant_images(batch)
    for step in range(8):
        mixed, targets = mixup(images, labels, step)
        # The mean pixel is lam * own + (1 - lam) * partner, whether blended or pasted: so is the mean class.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(K).float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(targets.sum(1), torch.ones(batch))
    torch.testing.assert_close(images, constant_images(batch)[0])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_lambda_is_distributed_as_timm_draws_it(mode: str) -> None:
    cfg = MixConfig(mixup_mode=mode, mixup_prob=0.8, mixup_switch_prob=0.4)
    ours, theirs = [], []
    np.random.seed(0)
    reference = TimmMixup(0.8, 1.0, None, 0.8, 0.4, mode, label_smoothing=0.1, num_classes=K)
    mixup = Mixup(cfg, K, seed=0, rank=0)
    for step in range(1500):
        lam, _ = mixup.draw(np.random.default_rng(step), 2, 32, 32)
        ours.append(lam[0])
        # timm's weight of the own label, read off a target: (1 - 0.1) * lam + 0.1 / K
        _, target = reference(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
        theirs.append((float(target[0, 0]) - 0.1 / K) / 0.9)
    grid = np.linspace(0.01, 0.99, 50)
    gap = np.abs(np.searchsorted(np.sort(ours), grid) - np.searchsorted(np.sort(theirs), grid)).max() / 1500
    assert gap < 0.06  # Kolmogorov-Smirnov at p ~ 0.01


def test_draws_depend_on_step_and_rank_alone() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    make = lambda rank: Mixup(MixConfig(), K, seed=1, rank=rank)  # noqa: E731
    first, again, other_rank, other_step = (
        make(0)(images, labels, 5),
        make(0)(images, labels, 5),
        make(1)(images, labels, 5),
        make(0)(images, labels, 6),
    )
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other_rank[0])
    assert not torch.equal(first[0], other_step[0])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_groups_of_a_batch_are_mixed_as_batches_are(mode: str) -> None:
    """Each by draws of its own, with partners inside of it; a last group may be smaller."""
    images, labels = torch.rand(10, 3, 8, 8), torch.arange(10)
    whole, grouped = (Mixup(MixConfig(mixup_mode=mode, mixup_group=size), 10, 1, 0) for size in (None, 4))
    rng = np.random.default_rng((1, 0x6D69, 5, 0))
    mixed, targets = grouped(images, labels, 5)
    for own in (slice(0, 4), slice(4, 8), slice(8, 10)):
        wanted, weights = whole._mix_group(rng, images[own], whole._targets(labels[own]))
        assert torch.equal(mixed[own], wanted)
        assert torch.equal(targets[own], weights)
    assert len(targets.max(1).values.unique()) > 2
    at_once = Mixup(MixConfig(mixup_mode=mode, mixup_group=10), 10, 1, 0)
    assert all(map(torch.equal, whole(images, labels, 5), at_once(images, labels, 5)))


def test_off_is_label_smoothing() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    mixed, targets = Mixup(MixConfig(mixup=0, cutmix=0, smoothing=0.2), K, 0, 0)(images, labels, 0)
    assert mixed is images
    logits = torch.randn(4, K)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), expected)


def test_bce_targets_are_the_classes_present() -> None:
    images, labels = constant_images(6)
    _, targets = Mixup(MixConfig(bce_loss=True, cutmix=0.0), K, 0, 0)(images, labels, 0)
    assert set(targets.unique().tolist()) == {0.0, 1.0}
    assert targets.sum(1).tolist() == [2.0] * 6
