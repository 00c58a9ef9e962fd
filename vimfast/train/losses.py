"""What a training step minimizes: cross entropy or BCE on the targets, a teacher's opinion, agreement of two draws."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimfast.checkpoint import described, load_checkpoint, load_weights
from vimfast.config import DistillConfig
from vimfast.errors import UserError
from vimfast.image_size import SizeLike
from vimfast.models import create_model


def soft_distillation(logits: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 KL(teacher || student) at temperature tau, a mean over images and classes as DeiT takes it.

    Both [B, K]. Source: Hinton et al., "Distilling the knowledge in a neural network", 2015.
    """
    student, teacher = F.log_softmax(logits / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / logits.numel()


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy with the teacher's answer. Both [B, K]. Source: Touvron et al., "DeiT", 2021."""
    return F.cross_entropy(logits, teacher.argmax(dim=1))


def cosub(logits: Tensor, targets: Tensor) -> Tensor:
    """BCE of both halves of a doubled batch [2 B, K] on targets [B, K], and of each half on the other.

    Source: Touvron et al., "Co-training 2L submodels for visual recognition", 2022.
    """
    one, two = logits.chunk(2)
    bce = F.binary_cross_entropy_with_logits
    agreement = bce(one, two.detach().sigmoid()) + bce(two, one.detach().sigmoid())
    return (bce(one, targets) + bce(two, targets) + agreement) / 4


class Objective:
    """The loss of a step: (images, logits, targets) -> scalar. It keeps nothing between steps, and no host waits.

    Args:
        cfg: the teacher's share, and how it is heard; or cosub.
        bce: binary cross entropy on the targets instead of softmax cross entropy.
        teacher: images [B, 3, S, S] to logits [B, K], see :func:`build_teacher`.
        amp: the autocast context of the teacher.
    """

    def __init__(
        self,
        cfg: DistillConfig,
        bce: bool,
        teacher: nn.Module | None = None,
        amp: AbstractContextManager[None] | None = None,
    ) -> None:
        check(cfg)
        assert (teacher is not None) == (cfg.distillation_type != "none")
        self.cfg, self.bce, self.teacher, self.amp = cfg, bce, teacher, amp or nullcontext()

    def prepare(self, images: Tensor) -> Tensor:
        """The images that the model is to see: with cosub each of [B, 3, S, S] twice, [2 B, 3, S, S]."""
        return torch.cat([images, images]) if self.cfg.cosub else images

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Images as prepared, logits of them (fp32), targets [B, K] of the images before that."""
        cfg = self.cfg
        if cfg.cosub:
            return cosub(logits, targets)
        loss = F.binary_cross_entropy_with_logits(logits, targets) if self.bce else F.cross_entropy(logits, targets)
        if self.teacher is None:
            return loss
        with torch.no_grad(), self.amp:
            opinion = self.teacher(images)
        opinion = opinion.float()
        if cfg.distillation_type == "soft":
            lesson = soft_distillation(logits, opinion, cfg.distillation_tau)
        else:
            lesson = hard_distillation(logits, opinion)
        return loss * (1 - cfg.distillation_alpha) + lesson * cfg.distillation_alpha


def check(cfg: DistillConfig) -> None:
    """Whether the settings go together.

    Raises:
        UserError: they do not.
    """
    if cfg.distillation_type == "none":
        return
    if cfg.cosub:
        raise UserError(f"--cosub and --distillation-type {cfg.distillation_type} are two losses", "choose one")
    if not cfg.teacher_path:
        raise UserError(f"--distillation-type {cfg.distillation_type} needs a teacher", "give its --teacher-path")
    if cfg.distillation_alpha > 1 or cfg.distillation_tau <= 0:
        raise UserError(
            f"--distillation-alpha is {cfg.distillation_alpha} and --distillation-tau {cfg.distillation_tau}",
            "the share must be at most 1 and the temperature above 0",
        )


def build_teacher(
    cfg: DistillConfig, num_classes: int, input_size: SizeLike, dynamic_img_size: bool = False
) -> nn.Module | None:
    """The teacher with its weights, on the CPU and never trained; None without distillation.

    Args:
        dynamic_img_size: it sees images of other sizes too.

    Raises:
        UserError: there is no such model, or the checkpoint is of another one or runs code.
    """
    check(cfg)
    if cfg.distillation_type == "none":
        return None
    teacher = create_model(
        cfg.teacher_model, num_classes=num_classes, img_size=input_size, dynamic_img_size=dynamic_img_size
    )
    path = Path(cfg.teacher_path)
    try:
        state = load_checkpoint(path)
        size = described(state).img_size
        load_weights(
            teacher, state["model"], str(path), resample="patches", img_size=size, fix="give its --teacher-model"
        )
    except UserError as error:
        raise UserError(f"--teacher-path: {error.problem}", error.fix) from None
    return teacher.requires_grad_(False).eval()
