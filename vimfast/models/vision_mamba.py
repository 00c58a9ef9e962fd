"""Vision Mamba: patches and a class token, a stack of Mamba blocks, one linear head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimfast.errors import UserError
from vimfast.models.embedding import PatchEmbed, Rotary
from vimfast.models.mixer import AddLayerNorm, AddRMSNorm, Block, MambaMixer
from vimfast.models.options import InitialValues, VimOptions
from vimfast.models.plain import unwatched
from vimfast.models.pos_embed import (
    RESAMPLE,
    note_grid,
    noted_grid,
    place_tokens,
    remove_tokens,
    resample_pos_embed,
    resize_pos_embed,
    rotate,
    take_tokens,
)
from vimfast.models.timm_api import TimmModel, new_head


class VisionMamba(TimmModel):
    """Vision Mamba with the constructor options and state-dict keys of hustvl/Vim.

    Args:
        device, dtype: of the parameters; A_log and D stay fp32.
        options: by name, those of the groups in :mod:`vimfast.models.options`.

    Raises:
        UserError: an option does not exist, its value is not one of those that do, or options contradict each other.
    """

    def __init__(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        super().__init__()
        given = VimOptions.of(options)
        patches, positions, stack = given.patches, given.positions, given.stack
        dim = stack.embed_dim
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.model_args: dict[str, Any] = {}  # of a named model, by the registry
        self.sequence = given.sequence
        self.num_classes, self.final_pool_type = given.head.num_classes, given.head.final_pool_type
        self.global_pool = given.head.global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.if_bidirectional, self.if_rope_residual = stack.if_bidirectional, positions.if_rope_residual
        self.grad_checkpointing = False

        # The order of these lines is hustvl/Vim's: optimizer states in its checkpoints depend on it.
        for name in self.class_token_names():
            self.register_parameter(name, _small_normal(1, 1, dim, **to))
        self.patch_embed = PatchEmbed(patches, dim, **to)
        tokens = self.patch_embed.num_patches + len(self.class_token_names())
        self.pos_embed = _small_normal(1, tokens, dim, **to) if positions.if_abs_pos_embed else None
        self.pos_drop = nn.Dropout(positions.drop_rate if positions.if_abs_pos_embed else 0.0)
        self.rope: Rotary | None = None
        if positions.if_rope:
            self.rope = Rotary(self.patch_embed.grid_size, dim, positions.pt_hw_seq_len, device)
        self.head = new_head(dim, self.num_classes, **to)
        rates = [0.0, *torch.linspace(0, stack.drop_path_rate, stack.depth, device="cpu").tolist()]
        norm = partial(
            AddRMSNorm if stack.rms_norm else AddLayerNorm, dim, stack.norm_epsilon, given.mixer.scan_backend, **to
        )
        self.layers = nn.ModuleList(
            Block(MambaMixer(dim, given.mixer, **to), norm(), rate) for rate in rates[: stack.depth]
        )
        self.drop_path_rate = stack.drop_path_rate
        self.norm_f = norm()
        self._init_out_projections(stack.initial)

    def _init_out_projections(self, initial: InitialValues) -> None:
        """Kaiming uniform over sqrt(blocks)."""
        for name, weight in self.named_parameters():
            if initial.rescale_prenorm_residual and name.endswith("out_proj.weight"):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                weight.data.div_(math.sqrt(initial.n_residuals_per_layer * len(self.layers)))

    def class_token_names(self) -> tuple[str, ...]:
        if not self.sequence.if_cls_token:
            return ()
        return ("cls_token_head", "cls_token_tail") if self.sequence.use_double_cls_token else ("cls_token",)

    def class_places(self, patches: int) -> tuple[int, ...]:
        """The positions of the class tokens in a sequence with this many patches."""
        if not self.sequence.if_cls_token:
            return ()
        if self.sequence.use_double_cls_token:
            return (0, patches + 1)
        return (patches // 2,) if self.sequence.use_middle_cls_token else (0,)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> logits [B, K]; [B, M, K] with final_pool_type ``all`` and no class token."""
        x, residual, noise, places = self._run(x)
        if places and self.global_pool in (None, "token") and unwatched(self.norm_f, AddRMSNorm, AddLayerNorm):
            # The head reads nothing else.
            x, residual = take_tokens(x, places), None if residual is None else take_tokens(residual, places)
            places = tuple(range(len(places)))
        return self._classify(self._pool(self.norm_f(x, residual, noise, self.drop_path_rate)[0], places))

    def _encode(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """(normalized tokens [B, M, C] in scan order, places of the class tokens in it)."""
        x, residual, noise, places = self._run(x)
        return self.norm_f(x, residual, noise, self.drop_path_rate)[0], places

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, ...]]:
        """(what the last norm takes, three arguments; places of the class tokens in scan order)."""
        x, turns, places, order = self._embed(x)
        if order is not None:
            places = tuple(order.index(place) for place in places)
        return *self._mix(x, turns), places

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[int, ...], list[int] | None]:
        """(tokens [B, M, C] in scan order, rotary tables, places of the class tokens before ordering, the order)."""
        if isinstance(x, torch.fx.Proxy):
            raise UserError(
                "torch.fx.symbolic_trace knows no shapes, which decide what a Vision Mamba does",
                "take torch.export.export(model, (images,)).module(), which is a torch.fx.GraphModule",
            )
        size, bias = x.shape[2:], None
        placed = self.sequence.if_cls_token or self.pos_embed is not None
        if placed and unwatched(self.patch_embed, PatchEmbed):
            x, bias = self.patch_embed.without_bias(x)
        else:
            x = self.patch_embed(x)  # [B, P, C]
        grid = self.patch_embed.grid((size[0], size[1]))
        places = self.class_places(x.shape[1])
        if self.training and self.sequence.if_random_cls_token_position:
            places = (int(torch.randint(x.shape[1] + 1, ())),)
        turns = None if self.rope is None else self.rope(places, grid)  # 2 x [M, C]
        if placed:
            tokens = torch.cat([getattr(self, name) for name in self.class_token_names()], dim=1) if places else None
            positions = None if self.pos_embed is None else self._positions(self.pos_embed, grid)
            x = place_tokens(x, bias, tokens, positions, places)  # [B, M, C]
        if self.pos_embed is not None:
            x = self.pos_drop(x)
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
        order = torch.randperm(length).tolist() if self.training and self.sequence.if_random_token_rank else None
        if (
            self.sequence.flip_img_sequences_ratio > 0
            and torch.rand(()).item() < self.sequence.flip_img_sequences_ratio
        ):
            order = [*reversed(range(length) if order is None else order)]
        return order

    def _mix(
        self,
        x: Tensor,
        turns: tuple[Tensor, Tensor] | None,
        streams: list[Tensor] | None = None,
        blocks: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Blocks: tokens [B, M, C] to (output of the last, residual before it, noise for its drop path).

        Args:
            streams: collects residuals.
            blocks: the first so many; None: all.
        """
        residual = None
        # What a hook has kept must stay as it was.
        overwrite = streams is None and not torch.is_grad_enabled() and self._unwatched
        noise = self._draw_noise(x)
        blocks = len(self.layers) if blocks is None else blocks
        for i in range(0, blocks, 2 if self.if_bidirectional else 1):
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
                x, residual = self._run_block(i, x, residual, noise[i], overwrite=overwrite)
                stream = residual
            if streams is not None:
                streams.append(stream)
        return x, residual, noise[blocks]

    @property
    def _unwatched(self) -> bool:
        return (
            unwatched(self.patch_embed, PatchEmbed)
            and unwatched(self.pos_drop, nn.Dropout)
            and all(isinstance(block, Block) and block.unwatched for block in self.layers)
        )

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
        if self.global_pool == "":
            return x
        if self.global_pool == "avg":
            return remove_tokens(x, tuple(sorted(places))).mean(1)
        if places:
            return x[:, places[0]] if len(places) == 1 else (x[:, places[0]] + x[:, places[1]]) / 2
        if self.final_pool_type == "none":
            return x[:, -1]
        return x.mean(1) if self.final_pool_type == "mean" else x

    def _classify(self, x: Tensor) -> Tensor:
        x = self.head(x)
        by_logit = self.global_pool is None and self.final_pool_type == "max" and not self.sequence.if_cls_token
        return x.amax(1) if by_logit else x

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script calls first."""
        raise UserError(
            "torch.jit.script compiles Python, of which a Vision Mamba has more than it knows",
            "take torch.jit.trace(model, (images,)), or better torch.export.export, which torch has in its place",
        )

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph of a training step can be replayed for the next one: nothing is drawn on the host."""
        on_host = (
            self.sequence.if_random_cls_token_position
            or self.sequence.if_random_token_rank
            or self.sequence.flip_img_sequences_ratio > 0
        )
        return not on_host

    def kernels(self, dtype: torch.dtype) -> str:
        """Which kernels run the model in this dtype where its weights are, and why not faster ones."""
        mixer = self.layers[0].mixer
        assert isinstance(mixer, MambaMixer)
        return mixer.kernels(dtype)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of this size (pixels, or height and width) from now on; positions are resampled to it."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        old = self.patch_embed.grid_size
        self.patch_embed.resize((height, width))
        new = self.patch_embed.grid_size
        if self.pos_embed is not None and new != old:
            resampled = resample_pos_embed(self.pos_embed.detach(), new, self.class_places, old)
            self.pos_embed = nn.Parameter(resampled, self.pos_embed.requires_grad)
        if self.rope is not None:
            self.rope.resize(new)
        if self.model_args:
            self.model_args["img_size"] = [height, width]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_grid(destination, prefix, self.patch_embed.grid_size)

    def pos_embed_grid(
        self, state_dict: Mapping[str, Tensor], img_size: int | tuple[int, int] | None = None
    ) -> tuple[int, int] | None:
        """Rows and columns of the patches that a state dict's position embedding is of; None: nothing says it.

        Args:
            state_dict: one of a Vision Mamba says it, unless it was copied into another kind of dict.
            img_size: of the images that it is of, which says it for patches like this model's.
        """
        known = [noted_grid(state_dict)]
        if img_size is not None:
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
            known.append(self.patch_embed.grid((height, width)))
        patches = state_dict["pos_embed"].shape[1] - len(self.class_token_names())
        return next((grid for grid in known if grid is not None and grid[0] * grid[1] == patches), None)

    def fit_pos_embed(
        self,
        state_dict: Mapping[str, Tensor],
        how: str = "patches",
        img_size: int | tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """The state dict of a model of another image size or stride, its position embedding resampled to fit.

        ``how="original"`` resamples as hustvl/Vim does: as if the class tokens stood before the patches, wherever they
        are. What is of this model's size stays as it is. The grid it is of is that of :meth:`pos_embed_grid`, or a
        square.
        """
        if how not in RESAMPLE:
            raise UserError(
                f"position embeddings cannot be resampled by {how!r}", f"it must be {' or '.join(RESAMPLE)}"
            )
        state = dict(state_dict)
        if "pos_embed" in state:
            first = tuple(range(len(self.class_token_names())))
            places = self.class_places if how == "patches" else lambda patches: first
            old = self.pos_embed_grid(state_dict, img_size)
            state["pos_embed"] = resample_pos_embed(state["pos_embed"], self.patch_embed.grid_size, places, old)
        if self.rope is not None:  # tables, not weights: of another grid, the own ones are right
            own = {f"rope.{name}": table for name, table in self.rope.state_dict().items()}
            state.update({name: table for name, table in own.items() if state.get(name, table).shape != table.shape})
        return state


def _small_normal(*shape: int, **to: Any) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape, **to), std=0.02))
