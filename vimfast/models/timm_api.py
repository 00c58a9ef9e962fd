"""What timm expects of a model beside its forward pass: features, classifier, parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vimfast.errors import UserError
from vimfast.models.embedding import PatchEmbed
from vimfast.models.mixer import Block, drop_path
from vimfast.models.options import GLOBAL_POOLS, known_pool
from vimfast.models.pos_embed import remove_tokens


class TimmModel(nn.Module):
    """The part of a Vision Mamba that timm's tools call; what it is made of is :class:`~vimfast.models.VisionMamba`."""

    patch_embed: PatchEmbed
    layers: nn.ModuleList
    norm_f: nn.Module
    head: nn.Module
    embed_dim: int
    num_classes: int
    final_pool_type: str
    if_bidirectional: bool
    global_pool: str | None
    drop_path_rate: float
    grad_checkpointing: bool
    model_args: dict[str, Any]

    def class_token_names(self) -> tuple[str, ...]:
        """The parameters that are class tokens, in the order of the sequence."""
        raise NotImplementedError

    def class_places(self, patches: int) -> tuple[int, ...]:
        """The positions of the class tokens in a sequence with this many patches."""
        raise NotImplementedError

    def _encode(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        raise NotImplementedError

    def _pool(self, x: Tensor, places: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def _classify(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[int, ...], list[int] | None]:
        raise NotImplementedError

    def _mix(
        self,
        x: Tensor,
        turns: tuple[Tensor, Tensor] | None,
        streams: list[Tensor] | None = None,
        blocks: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> normalized tokens [B, M, C], class tokens included, in scan order."""
        return self._encode(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, M, C] of :meth:`forward_features`, class tokens at their usual places, to logits [B, K].

        With ``pre_logits`` what the head would read: [B, C], or all tokens for final_pool_type ``max`` and ``all``.
        """
        x = self._pool(x, self.class_places(x.shape[1] - len(self.class_token_names())))
        return x if pre_logits else self._classify(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What timm's feature extraction calls: the residual stream after some blocks, as maps of the patches.

        Args:
            x: images [B, channels, H, W].
            indices: after which blocks, or pairs of them with ``if_bidirectional``: this many last ones, these, or all.
            return_prefix_tokens: pairs of each map and its class tokens [B, T, C], wherever they are in the sequence.
            norm: apply the last norm to each.
            stop_early: run no more blocks than these take.
            output_fmt: ``NCHW`` for maps [B, C, rows, columns], ``NLC`` for sequences [B, rows * columns, C]; class
                tokens are left out, and a shuffled or reversed sequence is put right.
            intermediates_only: return the list of them alone, else (:meth:`forward_features`, the list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt is {output_fmt!r}", "it must be NCHW or NLC")
        paired = 2 if self.if_bidirectional else 1
        taken = _known_indices(len(self.layers) // paired, indices)
        blocks = (taken[-1] + 1) * paired if stop_early else len(self.layers)
        images = x
        x, turns, places, order = self._embed(images)
        height, width = images.shape[2:]
        grid = self.patch_embed.grid((height, width))
        streams: list[Tensor] = []
        x, residual, noise = self._mix(x, turns, streams, blocks)
        rate = self._rate_after(blocks)
        last = drop_path(x, noise, rate)
        streams = [*streams[1:], last if residual is None else residual + last]
        maps: list[Any] = []
        for i in taken:
            stream = self.norm_f(streams[i], None)[0] if norm else streams[i]
            if order is not None:
                stream = stream[:, torch.tensor(order).argsort().to(x.device, non_blocking=True)]
            patches = remove_tokens(stream, places)  # [B, P, C]
            found = patches.transpose(1, 2).unflatten(2, grid) if output_fmt == "NCHW" else patches
            maps.append((found, stream[:, list(places)]) if return_prefix_tokens else found)
        return maps if intermediates_only else (self.norm_f(last, residual)[0], maps)

    def _rate_after(self, blocks: int) -> float:
        """Of stochastic depth of what so many blocks give."""
        if blocks == len(self.layers):
            return self.drop_path_rate
        following = self.layers[blocks]
        assert isinstance(following, Block)
        return following.drop_path_rate

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """:meth:`forward_intermediates` as DINO's users call it: the list alone, as sequences unless `reshape`."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what :meth:`forward_intermediates` of these indices does not need; returns them counted from 0."""
        blocks = 2 if self.if_bidirectional else 1
        taken = _known_indices(len(self.layers) // blocks, indices)
        kept = (taken[-1] + 1) * blocks
        dropped = self.layers[kept:]
        for block in dropped[:1]:
            assert isinstance(block, Block)
            self.drop_path_rate = block.drop_path_rate  # the last kept output is dropped as often as before
        self.layers = self.layers[:kept]
        if prune_head:
            self.reset_classifier(0)
        if prune_norm:
            self.register_module("norm_f", nn.Identity())
        return taken

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and module of each map of :meth:`forward_intermediates`."""
        blocks = 2 if self.if_bidirectional else 1
        return [
            {"num_chs": self.embed_dim, "reduction": self.patch_embed.proj.stride[0], "module": f"layers.{i}"}
            for i in range(blocks - 1, len(self.layers), blocks)
        ]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, freshly initialized, for ``num_classes`` (0: none).

        Args:
            global_pool: what it reads, in timm's words (``token``, ``avg``, ``""``) or as a ``final_pool_type``, see
                :class:`~vimfast.models.options.HeadOptions`; None: as before.
        """
        if global_pool in GLOBAL_POOLS:
            if global_pool == "token" and not self.class_token_names():
                raise UserError("global_pool is 'token', and the model has no class token", "take 'avg' or ''")
            self.global_pool = global_pool
        elif global_pool is not None:
            self.final_pool_type, self.global_pool = known_pool(global_pool), None
        if self.model_args:
            self.model_args |= {"final_pool_type": self.final_pool_type, "global_pool": self.global_pool}
        weight = self.patch_embed.proj.weight
        self.num_classes = num_classes
        self.head = new_head(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of each block for backward and run it again then."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm numbers the parameters by depth: the embedding, each block (`coarse`: all in one), norm and head."""
        stem = r"^cls_token|^pos_embed|^patch_embed"
        blocks = r"^layers" if coarse else [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]
        return {"stem": stem, "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", *self.class_token_names()}


def _known_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Which of `count` maps are meant, ascending: the last so many, these (negative ones from the end), or all."""
    wanted = range(count) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
    taken = sorted({i + count if i < 0 else i for i in wanted})
    if not taken or taken[0] < 0 or taken[-1] >= count:
        raise UserError(f"out_indices is {indices}, and there are maps 0 to {count - 1}")
    return taken


def new_head(dim: int, num_classes: int, **to: Any) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(dim, num_classes, **to)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
