"""Vision Mamba: patches and a class token, a stack of Mamba blocks, one linear head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimfast.errors import UserError
from vimfast.models.embedding import PatchEmbed, Rotary
from vimfast.models.mixer import AddLayerNorm, AddRMSNorm, Block, MambaMixer
from vimfast.models.pos_embed import RESAMPLE, insert_tokens, resample_pos_embed, resize_pos_embed, rotate
from vimfast.models.timm_api import TimmModel, known_pool, new_head


class VisionMamba(TimmModel):
    """Vision Mamba with the constructor options and state-dict keys of hustvl/Vim. An unknown option is an error.

    Args:
        img_size: height and width of the images, or the one number for both.
        dynamic_img_size: take images of other sizes too; positions are resampled for them in each pass.
        patch_size, stride: of the patch embedding, in pixels.
        depth, embed_dim, d_state: blocks, width C, state size N of the scan.
        channels: of the images.
        num_classes: of the head; 0 for features.
        ssm_cfg: further options of :class:`~vimfast.models.mixer.MambaMixer`.
        drop_rate: dropout after the position embedding, and only with one.
        drop_path_rate: stochastic depth: block i drops the output of the one before at linspace(0, rate)[i - 1], the
            last norm that of the last block at the full rate.
        norm_epsilon, rms_norm: of the norms; LayerNorm if not rms_norm.
        initializer_cfg: ``rescale_prenorm_residual``, ``n_residuals_per_layer`` of ``out_proj``'s initialization.
        fused_add_norm, residual_in_fp32, ft_seq_len: accepted as in hustvl/Vim, and ignored: add and norm are
            always one op, the residual is always fp32, and the grid follows from the sizes.
        pt_hw_seq_len: patches per side for which rotary positions are counted.
        if_bidirectional: even blocks read the sequence forward, odd ones backward, and each pair is summed.
        final_pool_type: what the head reads without a class token: ``none`` the last token, ``mean`` their mean,
            ``max`` the largest logit over all, ``all`` each of them (logits [B, M, K]).
        if_abs_pos_embed: learned position embedding, class tokens included.
        if_rope, if_rope_residual: rotary position before each block, on the residual too; class tokens do not turn.
        flip_img_sequences_ratio: how often the whole sequence is reversed, in evaluation too.
        if_bimamba: the same as ``bimamba_type="v1"``.
        bimamba_type: ``none``, ``v1`` or ``v2``, see the mixer.
        if_cls_token: one class token, which the head reads; in the middle with ``use_middle_cls_token``, else first.
        use_double_cls_token: one at either end instead; the head reads their mean.
        if_divide_out: halve the sum of v2's directions.
        init_layer_scale: start value of a learned scale on each mixer's output; None for none.
        if_random_cls_token_position: in training, insert the class token anywhere (a new place each step); needs
            ``use_middle_cls_token=False``.
        if_random_token_rank: in training, shuffle the sequence each step.
        scan_backend: one of :func:`vimfast_kernels.backend_names`, for all ops of the blocks.
        device, dtype: of the parameters; A_log and D stay fp32.

    Raises:
        UserError: an option's value is not one of those that exist, or options contradict each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 16,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        channels: int = 3,
        num_classes: int = 1000,
        ssm_cfg: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = True,
        initializer_cfg: Mapping[str, Any] | None = None,
        fused_add_norm: bool = True,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ft_seq_len: int | None = None,
        pt_hw_seq_len: int = 14,
        if_bidirectional: bool = False,
        final_pool_type: str = "none",
        if_abs_pos_embed: bool = True,
        if_rope: bool = False,
        if_rope_residual: bool = False,
        flip_img_sequences_ratio: float = -1.0,
        if_bimamba: bool = False,
        bimamba_type: str = "v2",
        if_cls_token: bool = True,
        if_divide_out: bool = True,
        init_layer_scale: float | None = None,
        use_double_cls_token: bool = False,
        use_middle_cls_token: bool = True,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
        scan_backend: str = "auto",
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        single_token = if_cls_token and not use_double_cls_token
        if if_random_cls_token_position and (use_middle_cls_token or not single_token):
            raise UserError(
                "if_random_cls_token_position needs a single class token that is not held in the middle;"
                " add use_middle_cls_token=False"
            )
        if if_bidirectional and depth % 2:
            raise UserError(f"if_bidirectional pairs the blocks, and depth {depth} is odd; make it even")
        if if_rope and embed_dim % 4:
            raise UserError(f"if_rope turns pairs of half the channels: embed_dim {embed_dim} must be a multiple of 4")
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.model_args: dict[str, Any] = {}  # of a named model, by the registry
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.final_pool_type = known_pool(final_pool_type)
        self.if_cls_token, self.use_double_cls_token = if_cls_token, use_double_cls_token
        self.use_middle_cls_token = use_middle_cls_token
        self.if_bidirectional, self.if_rope_residual = if_bidirectional, if_rope_residual
        self.flip_img_sequences_ratio = flip_img_sequences_ratio
        self.if_random_cls_token_position = if_random_cls_token_position
        self.if_random_token_rank = if_random_token_rank
        self.grad_checkpointing = False

        # The order of these lines is hustvl/Vim's: optimizer states in its checkpoints depend on it.
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        for name in self.class_token_names():
            self.register_parameter(name, _small_normal(1, 1, embed_dim, **to))
        self.patch_embed = PatchEmbed(size, patch_size, stride, channels, embed_dim, dynamic=dynamic_img_size, **to)
        tokens = self.patch_embed.num_patches + len(self.class_token_names())
        self.pos_embed = _small_normal(1, tokens, embed_dim, **to) if if_abs_pos_embed else None
        self.pos_drop = nn.Dropout(drop_rate if if_abs_pos_embed else 0.0)
        self.rope = Rotary(self.patch_embed.grid_size, embed_dim, pt_hw_seq_len, device) if if_rope else None
        self.head = new_head(embed_dim, num_classes, **to)
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth).tolist()]
        norm = AddRMSNorm if rms_norm else AddLayerNorm
        self.layers = nn.ModuleList(
            Block(
                MambaMixer(
                    embed_dim,
                    d_state=d_state,
                    bimamba_type="v1" if if_bimamba else bimamba_type,
                    if_divide_out=if_divide_out,
                    init_layer_scale=init_layer_scale,
                    scan_backend=scan_backend,
                    **(ssm_cfg or {}),
                    **to,
                ),
                norm(embed_dim, norm_epsilon, scan_backend, **to),
                rates[i],
            )
            for i in range(depth)
        )
        self.drop_path_rate = drop_path_rate
        self.norm_f = norm(embed_dim, norm_epsilon, scan_backend, **to)
        self._init_out_projections(**(initializer_cfg or {}))

    def _init_out_projections(
        self,
        initializer_range: float = 0.02,  # of embedding tables, which this model has none of
        rescale_prenorm_residual: bool = True,
        n_residuals_per_layer: int = 1,
    ) -> None:
        """Kaiming uniform over sqrt(blocks), so that the residual's variance does not grow with depth."""
        for name, weight in self.named_parameters():
            if rescale_prenorm_residual and name.endswith("out_proj.weight"):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                weight.data.div_(math.sqrt(n_residuals_per_layer * len(self.layers)))

    def class_token_names(self) -> tuple[str, ...]:
        if not self.if_cls_token:
            return ()
        return ("cls_token_head", "cls_token_tail") if self.use_double_cls_token else ("cls_token",)

    def class_places(self, patches: int) -> tuple[int, ...]:
        """The positions of the class tokens in a sequence with this many patches."""
        if not self.if_cls_token:
            return ()
        if self.use_double_cls_token:
            return (0, patches + 1)
        return (patches // 2,) if self.use_middle_cls_token else (0,)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> logits [B, K]; [B, M, K] with final_pool_type ``all`` and no class token."""
        tokens, places = self._encode(x)
        return self._classify(self._pool(tokens, places))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> normalized tokens [B, M, C], class tokens included, in scan order."""
        return self._encode(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, M, C] of :meth:`forward_features`, class tokens at their usual places, to logits [B, K].

        With ``pre_logits`` what the head would read: [B, C], or all tokens for final_pool_type ``max`` and ``all``.
        """
        x = self._pool(x, self.class_places(x.shape[1] - len(self.class_token_names())))
        return x if pre_logits else self._classify(x)

    def _encode(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """(normalized tokens [B, M, C] in scan order, places of the class tokens in it)."""
        x, turns, places, order = self._embed(x)
        if order is not None:
            places = tuple(order.index(place) for place in places)
        x, residual, noise = self._mix(x, turns)
        return self.norm_f(x, residual, noise, self.drop_path_rate)[0], places

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[int, ...], list[int] | None]:
        """(tokens [B, M, C] in scan order, rotary tables, places of the class tokens before ordering, the order)."""
        height, width = x.shape[2:]
        x = self.patch_embed(x)  # [B, P, C]
        grid = self.patch_embed.grid((height, width))
        places = self.class_places(x.shape[1])
        if self.training and self.if_random_cls_token_position:
            places = (int(torch.randint(x.shape[1] + 1, ())),)
        turns = None if self.rope is None else self.rope(places, grid)  # 2 x [M, C]
        if places:
            class_tokens = torch.cat([getattr(self, name) for name in self.class_token_names()], dim=1)
            x = insert_tokens(x, class_tokens.expand(len(x), -1, -1), places)  # [B, M, C]
        if self.pos_embed is not None:
            x = self.pos_drop(x + self._positions(self.pos_embed, grid))
        order = self._draw_order(x.shape[1])
        if order is not None:
            index = torch.tensor(order).to(x.device, non_blocking=True)
            x = x[:, index]
            turns = None if turns is None else (turns[0][index], turns[1][index])
        return x, turns, places, order

    def _positions(self, own: Tensor, grid: tuple[int, int]) -> Tensor:
        """The position embedding [1, M, C] of a grid of patches."""
        of = self.patch_embed.grid_size
        return own if grid == of else resize_pos_embed(own, of, grid, self.class_places)

    def _draw_order(self, length: int) -> list[int] | None:
        """A permutation of the sequence drawn for this step (on the CPU, so that no GPU is waited for), or None."""
        order = torch.randperm(length).tolist() if self.training and self.if_random_token_rank else None
        if self.flip_img_sequences_ratio > 0 and torch.rand(()).item() < self.flip_img_sequences_ratio:
            order = [*reversed(range(length) if order is None else order)]
        return order

    def _mix(
        self, x: Tensor, turns: tuple[Tensor, Tensor] | None, streams: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All blocks: tokens [B, M, C] to (output of the last, residual before it, noise for the last drop path).

        `streams` collects residuals.
        """
        residual = None
        *noise, last_noise = self._draw_noise(x)
        for i in range(0, len(self.layers), 2 if self.if_bidirectional else 1):
            if turns is not None:
                x = rotate(x, *turns)
                if self.if_rope_residual and residual is not None:
                    residual = rotate(residual, *turns)
            if self.if_bidirectional:
                ahead = self._run_block(i, x, residual, noise[i])
                back = self._run_block(i + 1, x.flip(1), None if residual is None else residual.flip(1), noise[i + 1])
                stream = ahead[1]
                x, residual = (a + b.flip(1) for a, b in zip(ahead, back, strict=True))
            else:
                x, residual = self._run_block(i, x, residual, noise[i], overwrite=streams is None)
                stream = residual
            if streams is not None:
                streams.append(stream)
        return x, residual, last_noise

    def _draw_noise(self, x: Tensor) -> list[Tensor | None]:
        """The noise of stochastic depth for each block and, last, for the last norm: [B] each, or None."""
        rates = [*(block.drop_path_rate for block in self.layers), self.drop_path_rate]
        if not self.training or not any(rates):
            return [None] * len(rates)
        noise = torch.rand(len(rates), len(x), device=x.device).unbind()
        return [u if rate else None for u, rate in zip(noise, rates, strict=True)]

    def _run_block(
        self, i: int, x: Tensor, residual: Tensor | None, noise: Tensor | None, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor]
        if self.grad_checkpointing and torch.is_grad_enabled():
            out = checkpoint(self.layers[i], x, residual, noise, use_reentrant=False)
        else:
            out = self.layers[i](x, residual, noise, overwrite)
        return out

    def _pool(self, x: Tensor, places: tuple[int, ...]) -> Tensor:  # [B, M, C] -> [B, C], or as it is
        if places:
            return x[:, places[0]] if len(places) == 1 else (x[:, places[0]] + x[:, places[1]]) / 2
        if self.final_pool_type == "none":
            return x[:, -1]
        return x.mean(1) if self.final_pool_type == "mean" else x

    def _classify(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return x.amax(1) if self.final_pool_type == "max" and not self.if_cls_token else x

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph of a training step can be replayed for the next one: nothing is drawn on the host."""
        on_host = self.if_random_cls_token_position or self.if_random_token_rank or self.flip_img_sequences_ratio > 0
        return not on_host

    def kernels(self, dtype: torch.dtype) -> str:
        """Which kernels run the model in this dtype where its weights are, and why not faster ones."""
        mixer = self.layers[0].mixer
        assert isinstance(mixer, MambaMixer)
        return mixer.kernels(dtype)

    def fit_pos_embed(self, state_dict: Mapping[str, Tensor], how: str = "patches") -> dict[str, Tensor]:
        """The state dict of a model of another image size or stride, its position embedding resampled to fit.

        ``how="original"`` resamples as hustvl/Vim does: as if the class tokens stood before the patches, wherever they
        are. What is of this model's size stays as it is.
        """
        if how not in RESAMPLE:
            raise UserError(f"position embeddings cannot be resampled by {how!r}; it must be {' or '.join(RESAMPLE)}")
        state = dict(state_dict)
        if "pos_embed" in state:
            first = tuple(range(len(self.class_token_names())))
            places = self.class_places if how == "patches" else lambda patches: first
            state["pos_embed"] = resample_pos_embed(state["pos_embed"], self.patch_embed.grid_size, places)
        if self.rope is not None:  # tables, not weights: of another grid, the own ones are right
            own = {f"rope.{name}": table for name, table in self.rope.state_dict().items()}
            state.update({name: table for name, table in own.items() if state.get(name, table).shape != table.shape})
        return state


def _small_normal(*shape: int, **to: Any) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape, **to), std=0.02))
