"""Backbones of Castling-ViT, each with `attention=`: the published softmax model, the paper's castling model, rivals.

    build_model("levit128")                         the paper's model: linear-angular attention + auxiliary branch
    build_model("levit128", attention="softmax")    LeViT as published, official weights and logits
    build_model("deit_tiny", attention="cosine")    a kernel of Table 5 in the castling architecture

DeiT    Touvron et al., arXiv:2012.12877;  timm 1.0.31, vision_transformer.py
LeViT   Graham et al., arXiv:2104.01136;   github.com/facebookresearch/LeViT @ 3772b8e, levit.py
MViTv2  Li et al., arXiv:2112.01526;       timm 1.0.31, mvitv2.py
LCNet   Cui et al., arXiv:2109.15099;      timm 1.0.31, mobilenetv3.py
ESNet   Yu et al., arXiv:2111.00902;       github.com/PaddlePaddle/PaddleDetection @ v2.6.0, ppdet/.../esnet.py
ViT     He et al., arXiv:2111.06377 (MAE); dense, for segment.py: feature maps instead of logits
Castling variants: arXiv:2211.10526v4, section 4, and the counts of its tables, which fix what the text leaves out: a
depthwise convolution inside the MLPs (D7, D8), 3x3 depthwise pooling of q, k, v, queries added to the output.

`convert` makes castling models of other libraries' vision transformers; `fuse` and `export` take any of them along.
Parameter names are timm's, for all families but ESNet, which it lacks; plus `attn.dconv`, `attn.{pool,norm}_{q,k,v}`,
`mlp.dwconv` and `skip`.
Shapes: B images, N tokens, C channels, H heads, D channels per head; `grid` is the token grid (y, x), row-major.
"""

import copy
import importlib.util
import inspect
import math
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path
from torchvision.ops import StochasticDepth

from attention import KERNELS, AttentionCore, castle, cores, look_up

ATTENTIONS = {  # name: options of AttentionCore
    "castling": dict(kernel="linear_angular", auxiliary=True),
    **{kernel: dict(kernel=kernel) for kernel in KERNELS},
}

BASELINE = dict(kernel="softmax", auxiliary=False)

DEIT = {  # arXiv:2012.12877, Table 1; drop path as released; the first is this project's own, for images of 32 pixels
    "deit_mini": dict(dim=96, heads=3, depth=6, patch_size=4, drop_path=0.0),
    "deit_tiny": dict(dim=192, heads=3, depth=12),
    "deit_small": dict(dim=384, heads=6, depth=12),
    "deit_base": dict(dim=768, heads=12, depth=12),
}

VIT_DENSE = {  # ViT without class token or final norm; drop path of MAE's fine-tuning; the last is for small images
    "vit_base_dense": dict(dim=768, heads=12, depth=12),
    "vit_small_dense": dict(dim=384, heads=6, depth=12),
    "vit_tiny_dense": dict(dim=192, heads=3, depth=12),
    "vit_mini_dense": dict(dim=128, heads=4, depth=4),
}

LEVIT = {  # arXiv:2104.01136, Table 1 and released specification, the first our own; key_dim is D in stage blocks
    "levit_mini": dict(dims=(64, 96, 128), heads=(2, 3, 4), key_dim=16, drop_path=0.0),
    "levit128": dict(dims=(128, 256, 384), heads=(4, 8, 12), key_dim=16),
    "levit192": dict(dims=(192, 288, 384), heads=(3, 5, 6), key_dim=32),
    "levit256": dict(dims=(256, 384, 512), heads=(4, 6, 8), key_dim=32),
    "levit384": dict(dims=(384, 512, 768), heads=(6, 9, 12), key_dim=32, drop_path=0.1),
}

# Table 1 by row: stages whose keys and values are pooled by 2; D < E in stage blocks; queries subsampled after their
# projection, and added to what has as many channels.
DESIGNS = {
    1: dict(token_pooled=(0, 1), bottleneck=False, post_q=False),
    2: dict(token_pooled=(), bottleneck=True, post_q=False),
    3: dict(token_pooled=(), bottleneck=False, post_q=False),
    4: dict(token_pooled=(0, 1, 2), bottleneck=False, post_q=True),
    5: dict(token_pooled=(), bottleneck=True, post_q=True),
    6: dict(token_pooled=(), bottleneck=False, post_q=True),
}

MVITV2 = {  # arXiv:2112.01526, Table 1 and released configurations
    "mvitv2_tiny": dict(depths=(1, 2, 5, 2)),
    "mvitv2_small": dict(depths=(1, 2, 11, 2)),
    "mvitv2_base": dict(depths=(2, 3, 16, 3), drop_path=0.3),
}

# Depthwise separable convolutions (kernel, stride, squeeze and excitation) of each stage; timm's division into stages.
LCNET_STAGES = (
    ((3, 1, False),),
    ((3, 2, False), (3, 1, False)),
    ((3, 2, False), (3, 1, False)),
    ((3, 2, False), (5, 1, False)),
    ((5, 1, False),) * 4,
    ((5, 2, True), (5, 1, True)),
)
LCNET_DIMS = (32, 64, 128, 256, 256, 512)  # channels at width 1

# Each stride-16 and stride-32 stage of LCNet-ViT is its stride-2 convolution and one transformer block.
LCNET = {
    "lcnet_s": dict(width=0.75),
    "lcnet_m": dict(width=1.5),
    "lcnet_l": dict(width=2.0),
    "lcnet_vit_s": dict(width=0.75, heads=(8, 16)),
    "lcnet_vit_m": dict(width=1.5, heads=(8, 16)),
    "lcnet_vit_l": dict(width=2.0, heads=(8, 16)),
}

# Inner channels of each block over the stage's 128, 256, 512 times `width`.
ESNET_RATIOS_S = ((0.875, 0.5, 0.5), (0.5, 0.625, 0.5, 0.625, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ESNET_RATIOS_ML = ((0.875, 0.5, 1.0), (0.625, 0.5, 0.75, 0.625, 0.625, 0.5, 0.625), (1.0, 0.625, 0.75))

ESNET = {  # the stride-32 stage of ESNet-ViT is its stride-2 block and two transformer blocks
    "esnet_s": dict(width=0.75, ratios=ESNET_RATIOS_S),
    "esnet_m": dict(width=1.0, ratios=ESNET_RATIOS_ML),
    "esnet_l": dict(width=1.25, ratios=ESNET_RATIOS_ML),
    "esnet_vit_s": dict(width=0.75, ratios=ESNET_RATIOS_S, heads=16),
    "esnet_vit_m": dict(width=1.0, ratios=ESNET_RATIOS_ML, heads=16),
    "esnet_vit_l": dict(width=1.25, ratios=ESNET_RATIOS_ML, heads=16),
}

HIDDEN_BYTES = 3 * 2**19  # of an MLP's hidden layer, float32, that inference on a CPU works on at a time

Grid = tuple[int, int]


# ---- shared parts ----------------------------------------------------------------------------------------------------


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Image size as (height, width) in pixels."""
    sides = tuple(size) if isinstance(size, Iterable) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"image size must be a number of whole pixels above 0, or a pair of them, got {size!r}")
    return sides


def symbolic(sizes: Iterable[int]) -> bool:
    """Whether a graph is being exported in which one of these sizes may be any: no branch can depend on it."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def channels_per_head(dim: int, heads: int) -> int:
    """dim / heads. Raises ValueError if that is no whole number."""
    if heads < 1 or dim % heads:
        raise ValueError(f"dim {dim} must be divisible by the number of heads, {heads}")
    return dim // heads


def halved(grid: Grid) -> Grid:
    """Token grid after a stride-2 step: 14 -> 7 -> 4."""
    return (grid[0] - 1) // 2 + 1, (grid[1] - 1) // 2 + 1


def init_linear(module: nn.Module) -> None:
    """Linear weights ~ N(0, 0.02), cut at two; biases 0: DeiT's and MViTv2's initialisation."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mlp_kernel(given: int | None, core: Mapping, castling: int = 5) -> int:
    """Kernel size of the MLPs' DWConv: as given; else 0 in published architectures, `castling` in the other (D7)."""
    if given is not None:
        return given
    return 0 if core["kernel"] == "softmax" else castling


class TokenConv(nn.Conv2d):
    """Depthwise convolution on token maps, (B, C, y, x) -> (B, C, y', x'), padded by kernel // 2.

    On a map so small that the outer taps meet padding only, they are left out: the same function, up
    to 4 times as fast in training on a CPU where the map is a single token. Their gradient is 0.
    """

    def __init__(self, channels: int, kernel: int, stride: int = 1, bias: bool = False):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        sides, reach = x.shape[2:], self.kernel_size[0] // 2
        if symbolic(sides) or min(sides) > reach:
            return super().forward(x)
        down, right = (min(reach, side - 1) for side in sides)  # from one token to the farthest
        weight = self.weight[:, :, reach - down : reach + down + 1, reach - right : reach + right + 1]
        return F.conv2d(x, weight, self.bias, self.stride, (down, right), groups=self.groups)


class MlpDWConv(TokenConv):
    """Depthwise convolution on the token grid, between the two layers of an MLP; starts as the identity.  D7

    (B, N, C), grid -> same. The paper says only "DWConv in the middle of MLP layers". With `norm` a BatchNorm follows.
    """

    def __init__(self, channels: int, kernel: int, bias: bool = False, norm: bool = False):
        super().__init__(channels, kernel, bias=bias)
        nn.init.dirac_(self.weight, groups=channels)
        if bias:
            nn.init.zeros_(self.bias)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        # Contiguous tokens are a channels-last map without a copy, the layout in which this convolution is fast.
        x = self.norm(super().forward(rearrange(x.contiguous(), "b (y x) c -> b c y x", y=grid[0])))
        return rearrange(x, "b c y x -> b (y x) c")


def subsample(x: Tensor, grid: Grid, stride: int = 2) -> tuple[Tensor, Grid]:
    """Every `stride`-th token of every `stride`-th row, (..., N, C) -> (..., N', C). No averaging."""
    x = x.unflatten(-2, grid)[..., ::stride, ::stride, :]
    return x.flatten(-3, -2), (x.shape[-3], x.shape[-2])


def pool_heads(x: Tensor, grid: Grid, conv: nn.Conv2d, norm: nn.LayerNorm) -> tuple[Tensor, Grid]:
    """Depthwise convolution on the token grid with weights shared over heads, then LayerNorm over D.

    (B, H, N, D), grid -> (B, H, N', D), grid'.
    """
    heads = x.shape[1]
    # Contiguous tokens are a channels-last map without a copy, the layout in which this convolution is fast.
    x = conv(rearrange(x.contiguous(), "b h (y x) d -> (b h) d y x", y=grid[0]))
    grid = (x.shape[2], x.shape[3])
    return norm(rearrange(x, "(b h) d y x -> b h (y x) d", h=heads)), grid


class PooledAttention(AttentionCore):
    """Self-attention on pooled q, k, v: 3x3 depthwise convolutions and norms shared over heads.

    (B, N, C), grid -> (B, N', C'), grid'. The pooled query is added to the attention's output if `residual`.

    Args:
        qkv: the layer C -> H (2 D + E); its output is laid out (q|k|v, H, D) or, `head_major`, (H, q|k|v).
        proj: the layer H E -> C'.
        key_dim, value_dim: D and E per head.
        stride_q, stride_kv: of the convolutions.
        pool_q: False takes every stride_q-th query of every stride_q-th row instead of a convolution's.
        core: options of AttentionCore.
    Source: MViTv2, arXiv:2112.01526, section 4.1 (residual pooling connection); timm's and the official names.
    """

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        stride_q: int = 1,
        stride_kv: int = 1,
        head_major: bool = False,
        residual: bool = True,
        pool_q: bool = True,
        core: Mapping,
    ):
        super().__init__(heads, **core)
        self.split, self.head_major, self.residual = [key_dim, key_dim, value_dim], head_major, residual
        self.stride_q = stride_q
        self.qkv, self.proj = qkv, proj
        for name, dim, stride in zip("qkv", self.split, (stride_q, stride_kv, stride_kv), strict=True):
            if name != "q" or pool_q:
                self.add_module(f"pool_{name}", TokenConv(dim, 3, stride))
                self.add_module(f"norm_{name}", nn.LayerNorm(dim, eps=1e-6))
            else:
                self.pool_q = None

    def logit_bias(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor | None:
        """Added to the softmax baseline's logits, (H, N', M) or (B, H, N', M)."""
        return None

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        if self.head_major:
            q, k, v = rearrange(self.qkv(x), "b n (h c) -> b h n c", h=self.heads).split(self.split, dim=-1)
        else:
            q, k, v = rearrange(self.qkv(x), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        if self.pool_q is None:
            q, q_grid = subsample(q, grid, self.stride_q)
        else:
            q, q_grid = pool_heads(q, grid, self.pool_q, self.norm_q)
        k, k_grid = pool_heads(k, grid, self.pool_k, self.norm_k)
        v, _ = pool_heads(v, grid, self.pool_v, self.norm_v)
        y = self.attend(q, k, v, self.logit_bias(q, q_grid, k_grid))
        y = y + q if self.residual else y
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), q_grid


# ---- DeiT ------------------------------------------------------------------------------------------------------------


def resize_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Position embeddings (1, y x, C) of grid `old`, resampled to grid `new` (bicubic)."""
    if not symbolic(new) and old == new:
        return table
    table = rearrange(table, "1 (y x) c -> 1 c y x", y=old[0])
    table = F.interpolate(table.float(), size=new, mode="bicubic", align_corners=False).to(table.dtype)
    return rearrange(table, "1 c y x -> 1 (y x) c")


class SelfAttention(AttentionCore):
    """(B, N, C) -> (B, N, C): one linear layer to q, k, v (biased, laid out (3, H, D)), the core, one linear layer."""

    def __init__(self, dim: int, heads: int, **core):
        channels_per_head(dim, heads)  # a whole number
        super().__init__(heads, **core)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        return self.proj(rearrange(self.attend(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Linear, [DWConv, [BatchNorm,]] GELU, linear on (B, P + N, C); `conv` is the DWConv's kernel size, 0 for none.

    The P prefix tokens pass the DWConv by (D6). Inference on a CPU takes as many images at a time as stay
    in cache: hooks on its layers see parts of the batch.
    """

    def __init__(self, dim: int, hidden: int, conv: int = 0, conv_bias: bool = False, conv_norm: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = MlpDWConv(hidden, conv, conv_bias, conv_norm) if conv else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        whole = self.training or torch.is_grad_enabled()
        whole = whole or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if x.device.type != "cpu" or whole:  # exported graphs go this way: they compare no sizes
            return self.layers(x, grid)
        together = max(1, HIDDEN_BYTES // (4 * x.shape[1] * self.fc1.out_features))
        return torch.cat([self.layers(part, grid) for part in x.split(together)])

    def layers(self, x: Tensor, grid: Grid) -> Tensor:
        """The MLP of one part of the batch."""
        before = x.shape[1] - grid[0] * grid[1]
        if self.dwconv is None:
            return self.fc2(F.gelu(self.fc1(x)))
        if before:  # apart from the start, because to cut and paste them in the hidden layer costs more
            prefix, patches = self.fc2(F.gelu(self.fc1(x[:, :before]))), self.layers(x[:, before:], grid)    # D6
            return torch.cat([prefix, patches], dim=1)
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), grid)))


class ViTBlock(nn.Module):
    """Pre-norm transformer block on (B, N, C)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: int,
        mlp_dwconv: int,
        drop_path: float,
        core: Mapping,
        conv_bias: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads, **core)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim, mlp_dwconv, conv_bias=conv_bias)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class DeiT(nn.Module):
    """(B, 3, H, W) pixels -> (B, num_classes) logits; any H x W, the position embeddings are resampled to its grid.

    Args:
        dim, heads, depth: C, H and the number of blocks; mlp_ratio: hidden channels of the MLPs over C.
        patch_size: pixels.
        image_size: what the position embeddings are made for, pixels; images are padded to whole patches.
        distilled: second class token and head; in training the logits are a pair (class, distillation), in eval their
            mean.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        mlp_dwconv: kernel of the MLPs' DWConv, 0 for none; None means 5 for every kernel but the softmax baseline (D7).
        core: options of AttentionCore.
    Raises: ValueError if dim is not divisible by heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        mlp_ratio: int = 4,
        patch_size: int = 16,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        distilled: bool = False,
        drop_path: float = 0.1,
        mlp_dwconv: int | None = None,
        core: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
        mlp_dwconv = mlp_kernel(mlp_dwconv, core)
        self.patch_size = patch_size
        self.grid = tuple(-(-side // patch_size) for side in pair(image_size))
        self.prefix = 2 if distilled else 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + self.grid[0] * self.grid[1], dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(ViTBlock(dim, heads, mlp_ratio, mlp_dwconv, rate, core) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.head_dist = nn.Linear(dim, num_classes) if distilled else None
        self.apply(init_linear)
        for token in (self.cls_token, self.dist_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the published recipe exempts, beyond biases and norms."""
        return {"cls_token", "dist_token", "pos_embed"}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.pad(x, (0, -x.shape[-1] % self.patch_size, 0, -x.shape[-2] % self.patch_size))
        x = self.patch_embed(x)                                                      # (B, C, y, x)
        grid = (x.shape[2], x.shape[3])
        prefix_pos, patch_pos = self.pos_embed.split([self.prefix, self.grid[0] * self.grid[1]], dim=1)
        x = rearrange(x, "b c y x -> b (y x) c") + resize_positions(patch_pos, self.grid, grid)
        tokens = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        prefix = (torch.cat(tokens, dim=1) + prefix_pos).expand(x.shape[0], -1, -1)
        x = torch.cat([prefix, x], dim=1)                                            # (B, P + N, C)
        for block in self.blocks:
            x = block(x, grid)
        x = self.norm(x)
        if self.head_dist is None:
            return self.head(x[:, 0])
        logits = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return logits if self.training else (logits[0] + logits[1]) / 2


# ---- dense ViT -------------------------------------------------------------------------------------------------------


class DenseViT(nn.Module):
    """(B, 3, H, W) pixels -> (B, C, h, w), the last block's features, h = ceil(H / patch_size): a plain ViT for dense
    prediction, without class token, final norm or head. Any H x W: images are padded to whole patches, position
    embeddings resampled to their grid.

    Args: dim, heads, depth, image_size, drop_path, core: as in `DeiT`.
        mlp_dwconv: kernel of the MLPs' DWConv, here with a bias, 0 for none; None: 3, for the softmax baseline 0. The
            paper's 118 M and 147 G for Castling-ViT-B leave no room for a 5x5 (D8).
    """

    prefix = 1  # rows of pos_embed before the patches': the class token's. As in ViT and MAE files; nothing reads it.

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        mlp_ratio: int = 4,
        patch_size: int = 16,
        image_size: int | tuple[int, int] = 512,
        drop_path: float = 0.1,
        mlp_dwconv: int | None = None,
        core: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
        mlp_dwconv = mlp_kernel(mlp_dwconv, core, castling=3)                           # D8
        self.dim, self.patch_size = dim, patch_size
        self.grid = tuple(-(-side // patch_size) for side in pair(image_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + self.grid[0] * self.grid[1], dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(ViTBlock(dim, heads, mlp_ratio, mlp_dwconv, rate, core, True) for rate in rates)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the published recipe exempts, beyond biases and norms."""
        return {"pos_embed"}

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[-1] % self.patch_size, 0, -x.shape[-2] % self.patch_size))
        x = self.patch_embed(x)                                                      # (B, C, y, x)
        grid = (x.shape[2], x.shape[3])
        x = rearrange(x, "b c y x -> b (y x) c") + resize_positions(self.pos_embed[:, self.prefix :], self.grid, grid)
        for block in self.blocks:
            x = block(x, grid)
        return rearrange(x, "b (y x) c -> b c y x", y=grid[0])


# ---- LeViT -----------------------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """3x3 stride-2 convolution and BatchNorm."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.linear = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x))


class LinearNorm(nn.Module):
    """Linear layer and BatchNorm over all tokens of the batch, (B, N, C) -> (B, N, C')."""

    def __init__(self, dim: int, out_dim: int, bn_weight: float = 1.0):
        super().__init__()
        self.linear = nn.Linear(dim, out_dim, bias=False)
        self.bn = nn.BatchNorm1d(out_dim)
        nn.init.constant_(self.bn.weight, bn_weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).view_as(x)


class NormLinear(nn.Module):
    """BatchNorm and linear layer, (B, C) -> (B, classes)."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(x))


def activated_projection(dim: int, out_dim: int, bn_weight: float = 1.0) -> nn.Sequential:
    """Hardswish before the output projection of every LeViT attention."""
    return nn.Sequential(OrderedDict(act=nn.Hardswish(), ln=LinearNorm(dim, out_dim, bn_weight)))


def resize_offsets(table: Tensor, grid: Grid) -> Tensor:
    """A table of absolute offsets, (H, y, x), for another grid (bilinear); the first and last offset keep theirs."""
    if not symbolic(grid) and tuple(table.shape[1:]) == tuple(grid):
        return table
    return F.interpolate(table[None].float(), size=grid, mode="bilinear", align_corners=True)[0].to(table.dtype)


def offset_bias(table: Tensor, built: Grid, grid: Grid, stride: int) -> Tensor:
    """LeViT's attention bias (H, N, M) from one entry per head and absolute offset, |dy| * x + |dx|.

    Args:
        table: (H, y x) learned for the key grid `built`; resampled where the image leads to another key grid, such
            that the zero offset stays itself.
        grid: key grid (y, x); stride: query (i, j) sits at key (stride i, stride j).
    """
    table = resize_offsets(rearrange(table, "h (y x) -> h y x", y=built[0]), grid)
    y, x = (torch.arange(side, device=table.device) for side in grid)
    dy, dx = (y[::stride, None] - y).abs(), (x[::stride, None] - x).abs()             # (queries, keys) along each axis
    return table[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3, 4).flatten(1, 2)


class LeViTAttention(AttentionCore):
    """LeViT's softmax attention as published, with a bias per head and absolute offset.

    (B, N, C), grid -> (B, N', C'), grid'. Values have twice (stride 2: four times) the channels D of queries and keys.
    Stride 2 takes queries from every second token of every second row; its output has no residual.

    Args:
        key_dim: D; heads: H; value_ratio: channels of a value over D.
        grid: key grid that the bias table is made for.
    """

    def __init__(
        self, dim: int, out_dim: int, heads: int, key_dim: int, value_ratio: int, grid: Grid, stride: int, core: Mapping
    ):
        super().__init__(heads, **core)
        self.stride, self.grid = stride, grid
        self.attention_biases = nn.Parameter(torch.zeros(heads, grid[0] * grid[1]))
        self.split = [key_dim, value_ratio * key_dim]
        if stride == 1:
            self.split = [key_dim] + self.split
            self.qkv = LinearNorm(dim, heads * sum(self.split))
        else:
            self.kv = LinearNorm(dim, heads * sum(self.split))
            self.q = nn.Sequential(OrderedDict(ln=LinearNorm(dim, heads * key_dim)))
        self.proj = activated_projection(heads * self.split[-1], out_dim, bn_weight=0.0 if stride == 1 else 1.0)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        def heads_first(y: Tensor) -> Tensor:  # channels are laid out (H, channels of one head)
            return rearrange(y, "b n (h d) -> b h n d", h=self.heads)

        out_grid = grid
        if self.stride == 1:
            q, k, v = heads_first(self.qkv(x)).split(self.split, dim=-1)
        else:
            k, v = heads_first(self.kv(x)).split(self.split, dim=-1)
            x, out_grid = subsample(x, grid)
            q = heads_first(self.q(x))
        bias = offset_bias(self.attention_biases, self.grid, grid, self.stride)
        y = self.attend(q, k, v, bias)
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), out_grid


class CastlingLeViTAttention(PooledAttention):
    """LeViT's attention in the castling architecture: no bottleneck, pooled q, k, v, residual query, any kernel.

    (B, N, C), grid -> (B, N', C'), grid'. With `stride` 2 the queries are pooled, and so are the keys and values unless
    the kernel is softmax, which then keeps LeViT's bias (D5).
    """

    def __init__(self, dim: int, out_dim: int, heads: int, head_dim: int, grid: Grid, stride: int, core: Mapping):
        softmax = core["kernel"] == "softmax"
        super().__init__(
            LinearNorm(dim, 3 * heads * head_dim),
            activated_projection(heads * head_dim, out_dim, bn_weight=0.0 if stride == 1 else 1.0),
            heads,
            head_dim,
            head_dim,
            stride_q=stride,
            stride_kv=1 if softmax else stride,
            head_major=True,
            core=core,
        )
        self.grid = grid
        self.attention_biases = nn.Parameter(torch.zeros(heads, grid[0] * grid[1])) if softmax else None

    def logit_bias(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor | None:
        if self.attention_biases is None:
            return None
        return offset_bias(self.attention_biases, self.grid, k_grid, self.stride_q)


class DesignAttention(PooledAttention):
    """LeViT's attention in the designs that Table 1 compares: softmax, q, k, v through 3x3 convolutions, no bias.

    Stride 2 is "post-Q" pooling: all q, k, v are projected at full resolution, then queries are subsampled. `residual`
    adds the queries to an output of as many channels.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        stride: int,
        stride_kv: int,
        residual: bool,
        core: Mapping,
    ):
        super().__init__(
            LinearNorm(dim, heads * (2 * key_dim + value_dim)),
            activated_projection(heads * value_dim, out_dim, bn_weight=0.0 if stride == 1 else 1.0),
            heads,
            key_dim,
            value_dim,
            stride_q=stride,
            stride_kv=stride_kv,
            head_major=True,
            residual=residual and key_dim == value_dim,
            pool_q=stride == 1,
            core=core,
        )


class LeViTMlp(nn.Module):
    """Linear, [DWConv,] Hardswish, linear on (B, N, C), each linear with BatchNorm."""

    def __init__(self, dim: int, hidden: int, conv: int = 0):
        super().__init__()
        self.ln1 = LinearNorm(dim, hidden)
        self.dwconv = MlpDWConv(hidden, conv) if conv else None
        self.ln2 = LinearNorm(hidden, dim, bn_weight=0.0)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.ln1(x)
        if self.dwconv is not None:
            x = self.dwconv(x, grid)
        return self.ln2(F.hardswish(x))


class LeViTBlock(nn.Module):
    """Residual attention and MLP on (B, N, C)."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, drop_path: float):
        super().__init__()
        self.attn, self.mlp, self.drop_path = attn, mlp, StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(x, grid)[0])
        return x + self.drop_path(self.mlp(x, grid))


class LeViTDownsample(nn.Module):
    """Attention onto every second token of every second row, then a residual MLP: (B, N, C) -> (B, N', C').

    The published block has no way round its attention; the castling one has a linear `skip`, computed at full
    resolution and then subsampled, as the MACs of Tables 1 and 2 require.
    """

    def __init__(self, attn: nn.Module, mlp: nn.Module, skip: nn.Module | None, drop_path: float):
        super().__init__()
        self.attn_downsample, self.mlp, self.skip = attn, mlp, skip
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        y, out_grid = self.attn_downsample(x, grid)
        if self.skip is not None:
            y = y + subsample(self.skip(x), grid)[0]
        return y + self.drop_path(self.mlp(y, out_grid)), out_grid


class LeViTStage(nn.Module):
    """An optional down-sampling block, then `depth` blocks."""

    def __init__(self, downsample: nn.Module | None, blocks: list[nn.Module]):
        super().__init__()
        self.downsample, self.blocks = downsample, nn.ModuleList(blocks)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        if self.downsample is not None:
            x, grid = self.downsample(x, grid)
        for block in self.blocks:
            x = block(x, grid)
        return x, grid


class LeViT(nn.Module):
    """(B, 3, H, W) pixels -> (B, num_classes) logits; any H x W.

    With the softmax kernel, LeViT as published (attention-bias tables are made for `image_size` and resampled for other
    images). With any other, the castling architecture, which has none.

    Args:
        dims, heads, depths: per stage; key_dim: D. Down-sampling blocks have dims[i] // D heads and 4 D channels each.
        image_size: pixels.
        distilled: second head; in training the logits are a pair (class, distillation), in eval their mean. None means
            as published for the softmax kernel (two heads) and as counted by the paper for the others (one).
        drop_path: stochastic depth, the same in all blocks.
        castle_downsample: in the castling architecture, down-sampling blocks use `core` too, with keys and values
            pooled onto the queries' grid (D5, "C2"); False keeps softmax there ("C1").
        mlp_dwconv: kernel of the DWConv in the stage blocks' MLPs, 0 for none; None: 5 in the castling architecture
            (D7).
        design: a row of Table 1 (1..6, see DESIGNS) instead of the published softmax model.
        core: options of AttentionCore.
    Raises: ValueError if dims, heads and depths differ in length, or for a design that is unknown or not of softmax.
    Source: arXiv:2104.01136; facebookresearch/LeViT @ 3772b8e, levit.py; arXiv:2211.10526v4, Tables 1 and 2.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        heads: tuple[int, ...],
        key_dim: int,
        depths: tuple[int, ...] = (4, 4, 4),
        mlp_ratio: int = 2,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        distilled: bool | None = None,
        drop_path: float = 0.0,
        castle_downsample: bool = True,
        mlp_dwconv: int | None = None,
        design: int | None = None,
        core: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
        if not len(dims) == len(heads) == len(depths):
            raise ValueError(f"dims, heads and depths must have one entry per stage: {dims}, {heads}, {depths}")
        published = core["kernel"] == "softmax"
        row = {} if design is None else look_up(DESIGNS, design, "design")
        mlp_dwconv = mlp_kernel(mlp_dwconv, core)
        if row and not published:
            raise ValueError("the designs of Table 1 have softmax attention: design= needs attention='softmax'")
        widths = [3, dims[0] // 8, dims[0] // 4, dims[0] // 2, dims[0]]
        grid = pair(image_size)
        self.stem = nn.Sequential()
        for i in range(4):
            self.stem.add_module(f"conv{i + 1}", ConvNorm(widths[i], widths[i + 1]))
            if i < 3:
                self.stem.add_module(f"act{i + 1}", nn.Hardswish())
            grid = halved(grid)

        def down(dim: int, out_dim: int, grid: Grid) -> LeViTDownsample:
            """The block before a stage, from a key grid to half of it: published, a design of Table 1, or castling."""
            mlp, heads, skip = LeViTMlp(out_dim, mlp_ratio * out_dim), dim // key_dim, None
            if published and not row.get("post_q"):
                attn = LeViTAttention(dim, out_dim, heads, key_dim, 4, grid, 2, core)
            else:
                skip = LinearNorm(dim, out_dim)
                if published:
                    stride_kv = 2 if row["token_pooled"] else 1
                    attn = DesignAttention(dim, out_dim, heads, 4 * key_dim, 4 * key_dim, 2, stride_kv, True, core)
                else:
                    chosen = core if castle_downsample else {**core, **BASELINE}             # D5
                    attn = CastlingLeViTAttention(dim, out_dim, heads, 4 * key_dim, grid, 2, chosen)
            return LeViTDownsample(attn, mlp, skip, drop_path)

        def block(stage: int, dim: int, grid: Grid) -> LeViTBlock:
            """A block of a stage, likewise."""
            if row:
                width = key_dim if row["bottleneck"] else 2 * key_dim
                stride_kv = 2 if stage in row["token_pooled"] else 1
                residual = row["post_q"]
                attn = DesignAttention(dim, dim, heads[stage], width, 2 * key_dim, 1, stride_kv, residual, core)
            elif published:
                attn = LeViTAttention(dim, dim, heads[stage], key_dim, 2, grid, 1, core)
            else:
                attn = CastlingLeViTAttention(dim, dim, heads[stage], 2 * key_dim, grid, 1, core)
            return LeViTBlock(attn, LeViTMlp(dim, mlp_ratio * dim, mlp_dwconv), drop_path)

        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            downsample = None
            if i > 0:
                downsample, grid = down(dims[i - 1], dim, grid), halved(grid)
            stages.append(LeViTStage(downsample, [block(i, dim, grid) for _ in range(depth)]))
        self.stages = nn.ModuleList(stages)
        self.head = NormLinear(dims[-1], num_classes)
        distilled = published if distilled is None else distilled
        self.head_dist = NormLinear(dims[-1], num_classes) if distilled else None

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the published recipe exempts, beyond biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)                                                             # (B, C, y, x)
        grid = (x.shape[2], x.shape[3])
        x = rearrange(x, "b c y x -> b (y x) c")
        for stage in self.stages:
            x, grid = stage(x, grid)
        x = x.mean(dim=1)
        if self.head_dist is None:
            return self.head(x)
        logits = self.head(x), self.head_dist(x)
        return logits if self.training else (logits[0] + logits[1]) / 2


# ---- MViTv2 ----------------------------------------------------------------------------------------------------------


def resize_relative(table: Tensor, length: int) -> Tensor:
    """A table of relative positions along one axis, (length', D), for another length (linear)."""
    if not symbolic([length]) and len(table) == length:
        return table
    return F.interpolate(table.T[None].float(), size=length, mode="linear")[0].T.to(table.dtype)


def relative_rows(table: Tensor, queries: int, keys: int) -> Tensor:
    """Rows of a table of relative positions for each query and key along one axis, (length, D) -> (queries, keys, D).

    The longer axis has unit steps, the shorter one steps of their ratio. A table for another size is resampled.
    Source: MViTv2, arXiv:2112.01526, section 4.1; timm 1.0.31, mvitv2.py, cal_rel_pos_type.
    """
    table = resize_relative(table, 2 * max(queries, keys) - 1)
    q = torch.arange(queries, device=table.device)[:, None] * max(keys / queries, 1.0)
    k = torch.arange(keys, device=table.device)[None, :] * max(queries / keys, 1.0)
    return table[(q - k + (keys - 1) * max(queries / keys, 1.0)).long()]


class MViTAttention(PooledAttention):
    """MViTv2's pooling attention. With the softmax kernel, decomposed relative positions are added to its logits.

    (B, N, C), grid -> (B, N', C'), grid'. Args: grid: of x, in the images that the tables are made for.
    """

    def __init__(self, dim: int, out_dim: int, heads: int, grid: Grid, stride_q: int, stride_kv: int, core: Mapping):
        head_dim = channels_per_head(out_dim, heads)
        super().__init__(
            nn.Linear(dim, 3 * out_dim),
            nn.Linear(out_dim, out_dim),
            heads,
            head_dim,
            head_dim,
            stride_q=stride_q,
            stride_kv=stride_kv,
            core=core,
        )
        self.rel_pos_h = self.rel_pos_w = None
        if core["kernel"] == "softmax":
            lengths = [2 * -(-side // min(stride_q, stride_kv)) - 1 for side in grid]
            self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(length, head_dim)) for length in lengths)

    def logit_bias(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor | None:
        if self.rel_pos_h is None:
            return None
        q = rearrange(q, "b h (y x) d -> b h y x d", y=q_grid[0])  # not scaled, unlike in the logits
        rows, columns = (
            relative_rows(table, n, m)
            for table, n, m in zip((self.rel_pos_h, self.rel_pos_w), q_grid, k_grid, strict=True)
        )
        rows = torch.einsum("bhyxd,ykd->bhyxk", q, rows)
        columns = torch.einsum("bhyxd,xkd->bhyxk", q, columns)
        return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


class MViTBlock(nn.Module):
    """Pre-norm block, (B, N, C), grid -> (B, N', C'), grid'.

    Where C changes, the way round attention is linear, after the norm; where the grid does, it is max-pooled.
    """

    def __init__(self, dim: int, attn: PooledAttention, out_dim: int, mlp: nn.Module, stride: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.shortcut_proj_attn = nn.Linear(dim, out_dim) if dim != out_dim else None
        self.stride = stride
        self.attn = attn
        self.norm2 = nn.LayerNorm(out_dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        normed = self.norm1(x)
        y, out_grid = self.attn(normed, grid)
        if self.shortcut_proj_attn is not None:
            x = self.shortcut_proj_attn(normed)
        if self.stride > 1:
            x = F.max_pool2d(rearrange(x, "b (y x) c -> b c y x", y=grid[0]), 3, self.stride, padding=1)
            x = rearrange(x, "b c y x -> b (y x) c")
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x), out_grid)), out_grid


class MViTv2(nn.Module):
    """(B, 3, H, W) pixels -> (B, num_classes) logits; any H x W.

    With the softmax kernel, MViTv2 as published: keys and values pooled by 4, 2, 1, 1 in stages 1 to 4, decomposed
    relative positions. With any other, the castling architecture: one value per query, so no such pooling; a DWConv in
    the MLPs of blocks that do not down-sample (D7).

    Args:
        depths: blocks per stage; dim, heads: C and H of the first stage, both double from stage to stage.
        castle_downsample: as in `LeViT`; with False ("C1") the down-sampling blocks pool q, k and v all by 2.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        image_size, num_classes, mlp_dwconv, core: as in `LeViT`.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        dim: int = 96,
        heads: int = 1,
        mlp_ratio: int = 4,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        drop_path: float = 0.1,
        castle_downsample: bool = True,
        mlp_dwconv: int | None = None,
        core: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
        published = core["kernel"] == "softmax"
        mlp_dwconv = mlp_kernel(mlp_dwconv, core)
        grid = tuple((side - 1) // 4 + 1 for side in pair(image_size))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, 7, stride=4, padding=3)))
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        stages, stride_kv = [], 4
        for i, depth in enumerate(depths):
            blocks, in_dim = [], dim
            if i > 0:
                dim, heads, stride_kv = 2 * dim, 2 * heads, max(1, stride_kv // 2)
            for j in range(depth):
                down = i > 0 and j == 0
                stride = 2 if down else 1
                chosen = core if published or castle_downsample or not down else {**core, **BASELINE}        # D5
                attn = MViTAttention(in_dim, dim, heads, grid, stride, stride_kv if published else stride, chosen)
                mlp = Mlp(dim, mlp_ratio * dim, 0 if down else mlp_dwconv)
                blocks.append(MViTBlock(in_dim, attn, dim, mlp, stride, rates.pop(0)))
                in_dim, grid = dim, halved(grid) if down else grid
            stages.append(nn.ModuleDict(dict(blocks=nn.ModuleList(blocks))))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(dim, num_classes)))
        self.apply(init_linear)
        for name, parameter in self.named_parameters():
            if "rel_pos" in name:
                nn.init.trunc_normal_(parameter, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the published recipe exempts, beyond biases and norms."""
        return {name for name, _ in self.named_parameters() if "rel_pos" in name}

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)                                                      # (B, C, y, x)
        grid = (x.shape[2], x.shape[3])
        x = rearrange(x, "b c y x -> b (y x) c")
        for stage in self.stages:
            for block in stage["blocks"]:
                x, grid = block(x, grid)
        return self.head(self.norm(x).mean(dim=1))


# ---- LCNet, ESNet, and their ViT variants ----------------------------------------------------------------------------


def make_divisible(value: float, divisor: int) -> int:
    """`value` rounded to a multiple of `divisor`, at least one, and not below 90% of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def conv_norm(
    channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution (He initialisation), BatchNorm and, if `act`, Hardswish; (B, C, y, x) -> (B, C', y', x')."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), *([nn.Hardswish()] if act else []))


class SqueezeExcitation(nn.Module):
    """Channels scaled by a gate in 0..1 from their means; torchvision's module under timm's parameter names."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels // 4, 1)
        self.conv_expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.conv_expand(F.relu(self.conv_reduce(gate))))


class DepthSeparable(nn.Module):
    """Depthwise and pointwise convolution, each with BatchNorm and Hardswish; no residual. timm's names."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, squeeze: bool = False):
        super().__init__()
        self.conv_dw, self.bn1, self.act1 = conv_norm(channels_in, channels_in, kernel, stride, groups=channels_in)
        self.se = SqueezeExcitation(channels_in) if squeeze else nn.Identity()
        self.conv_pw, self.bn2, self.act2 = conv_norm(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.act1(self.bn1(self.conv_dw(x))))
        return self.act2(self.bn2(self.conv_pw(x)))


class MapBlock(MViTBlock):
    """Transformer block on a feature map, (B, C, y, x) -> (B, C, y, x): MViTv2's pooled attention, MLP ratio 2.

    No position embedding, so any y x x. The MLP's DWConv has a BatchNorm. Source: recovered from the counts of the
    paper's Tables 3, 6 and 7, which say what the text leaves out.
    """

    def __init__(self, dim: int, heads: int, mlp_dwconv: int, drop_path: float, core: Mapping):
        qkv, proj, head_dim = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), channels_per_head(dim, heads)
        attn = PooledAttention(qkv, proj, heads, head_dim, head_dim, core=core)
        super().__init__(dim, attn, dim, Mlp(dim, 2 * dim, mlp_dwconv, conv_norm=True), stride=1, drop_path=drop_path)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        tokens, _ = super().forward(rearrange(x, "b c y x -> b (y x) c"), grid)
        return rearrange(tokens, "b (y x) c -> b c y x", y=grid[0])


class ConvBackbone(nn.Module):
    """(B, 3, H, W) pixels -> feature maps [C3, C4, C5] of strides 8, 16, 32, or, with `num_classes`, logits.

    Subclasses make `channels`, those of the three maps, and `features(x)`, the maps. Sides need not be multiples of
    32: each stride-2 step rounds up.
    """

    channels: tuple[int, int, int]

    def make_classifier(self, num_classes: int | None) -> None:
        """The published classifier: 1x1 convolution to 1280 channels, Hardswish, linear. timm's names."""
        self.conv_head = nn.Conv2d(self.channels[-1], 1280, 1) if num_classes else None
        self.classifier = nn.Linear(1280, num_classes) if num_classes else None

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        maps = self.features(x)
        if self.classifier is None:
            return maps
        pooled = F.hardswish(self.conv_head(F.adaptive_avg_pool2d(maps[-1], 1)))
        return self.classifier(pooled.flatten(1))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the published recipe exempts: none."""
        return set()


class LCNet(ConvBackbone):
    """LCNet, and LCNet-ViT where `heads` are given.

    Args:
        width: factor on all channels.
        heads: of the transformer block at stride 16, and at stride 32.
        mlp_dwconv: kernel of the MLPs' DWConv, 0 for none; None means 5 for every kernel but the softmax baseline (D7).
        drop_path: stochastic depth of the transformer blocks.
    """

    def __init__(
        self,
        width: float,
        heads: tuple[int, int] | None = None,
        num_classes: int | None = None,
        mlp_dwconv: int | None = None,
        drop_path: float = 0.0,
        core: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
        mlp_dwconv = mlp_kernel(mlp_dwconv, core)
        dims = [make_divisible(dim * width, 8) for dim in LCNET_DIMS]
        dim = make_divisible(16 * width, 8)
        self.conv_stem, self.bn1, self.act1 = conv_norm(3, dim, 3, stride=2)
        self.blocks = nn.ModuleList()
        for stage, (out_dim, rows) in enumerate(zip(dims, LCNET_STAGES, strict=True)):
            transformer = heads is not None and stage >= 3
            blocks = []
            for kernel, stride, squeeze in rows:
                if stride == 2 or not transformer:
                    blocks.append(DepthSeparable(dim, out_dim, kernel, stride, squeeze))
                elif stage != 4:  # one transformer block for all of stages 3 and 4
                    blocks.append(MapBlock(dim, heads[stage == 5], mlp_dwconv, drop_path, core))
                dim = out_dim
            self.blocks.append(nn.Sequential(*blocks))
        self.channels = (dims[2], dims[4], dims[5])
        self.make_classifier(num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.act1(self.bn1(self.conv_stem(x)))
        maps = []
        for stage, blocks in enumerate(self.blocks):
            x = blocks(x)
            if stage in (2, 4, 5):
                maps.append(x)
        return maps


class ESBlockDown(nn.Module):
    """Stride-2 block of ESNet, (B, C, y, x) -> (B, C', y/2, x/2) with sides rounded up: two branches, then both mixed.

    Args: inner: channels, of which the second branch has half.
    """

    def __init__(self, channels_in: int, channels_out: int, inner: int):
        super().__init__()
        half = channels_out // 2
        self.branch1 = nn.Sequential(
            conv_norm(channels_in, channels_in, 3, stride=2, groups=channels_in, act=False),
            conv_norm(channels_in, half),
        )
        self.branch2 = nn.Sequential(
            conv_norm(channels_in, inner // 2),
            conv_norm(inner // 2, inner // 2, 3, stride=2, groups=inner // 2, act=False),
            SqueezeExcitation(inner // 2),
            conv_norm(inner // 2, half),
        )
        self.mix = nn.Sequential(
            conv_norm(channels_out, channels_out, 3, groups=channels_out), conv_norm(channels_out, channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.branch1(x), self.branch2(x)], dim=1))


class ESBlock(nn.Module):
    """Stride-1 block of ESNet, (B, C, y, x) -> same: one half of the channels passes, then the halves are shuffled."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        half = channels // 2
        self.expand = conv_norm(half, inner // 2)
        self.depthwise = conv_norm(inner // 2, inner // 2, 3, groups=inner // 2, act=False)
        self.se = SqueezeExcitation(inner)
        self.project = conv_norm(inner, half)

    def forward(self, x: Tensor) -> Tensor:
        passed, x = x.chunk(2, dim=1)
        x = self.expand(x)
        x = self.project(self.se(torch.cat([x, self.depthwise(x)], dim=1)))
        return rearrange([passed, x], "halves b c y x -> b (c halves) y x")


class ESNet(ConvBackbone):
    """ESNet, and ESNet-ViT where `heads` are given.

    Args:
        width: factor on all channels but the stem's 24.
        ratios: inner channels of each block of each stage, over the stage's.
        heads: of the two transformer blocks at stride 32.
        mlp_dwconv, drop_path: see `LCNet`.
    """

    def __init__(
        self,
        width: float,
        ratios: tuple[tuple[float, ...], ...],
        heads: int | None = None,
        num_classes: int | None = None,
        mlp_dwconv: int | None = None,
        drop_path: float = 0.0,
        core: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
        mlp_dwconv = mlp_kernel(mlp_dwconv, core)
        self.channels = tuple(make_divisible(dim * width, 16) for dim in (128, 256, 512))
        self.stem = nn.Sequential(conv_norm(3, 24, 3, stride=2), nn.MaxPool2d(3, stride=2, padding=1))
        self.stages, dim = nn.ModuleList(), 24
        for stage, (out_dim, row) in enumerate(zip(self.channels, ratios, strict=True)):
            inner = [make_divisible(int(out_dim * ratio), 8) for ratio in row]
            blocks = [ESBlockDown(dim, out_dim, inner[0])]
            if heads is not None and stage == 2:
                blocks += [MapBlock(out_dim, heads, mlp_dwconv, drop_path, core) for _ in inner[1:]]
            else:
                blocks += [ESBlock(out_dim, channels) for channels in inner[1:]]
            self.stages.append(nn.Sequential(*blocks))
            dim = out_dim
        self.make_classifier(num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for blocks in self.stages:
            x = blocks(x)
            maps.append(x)
        return maps


# ---- builders --------------------------------------------------------------------------------------------------------

MODELS = {
    name: (family, row)
    for family, table in (
        (DeiT, DEIT), (LeViT, LEVIT), (MViTv2, MVITV2), (DenseViT, VIT_DENSE), (LCNet, LCNET), (ESNet, ESNET),
    )  # fmt: skip
    for name, row in table.items()
}


def list_models() -> list[str]:
    """Names that `build_model` takes."""
    return list(MODELS)


def build_model(
    name: str,
    attention: str = "castling",
    num_classes: int | None = None,
    image_size: int | tuple[int, int] = 224,
    castle_downsample: bool = True,
    **overrides,
) -> nn.Module:
    """A backbone by name, randomly initialised.

    Args:
        name: one of `list_models()`.
        attention: "castling" (linear-angular with the auxiliary branch), "softmax" (the published architecture), or
            another kernel of Table 5 in the castling architecture, without the branch unless `auxiliary=True`.
        num_classes: length of the logits. None means 1000, and for the detection backbones LCNet and ESNet, that the
            model returns its feature maps [C3, C4, C5] instead; no effect on dense models, which have no logits.
        image_size: pixels, one number or (height, width); the model runs at other sizes too.
        castle_downsample: see `LeViT`; no effect on families without down-sampling blocks.
        overrides: further arguments of the model (dims, depth, drop_path, distilled, mlp_dwconv, ...) or of its
            AttentionCore (auxiliary, epsilon, schedule, dconv, dropout).
    Raises: ValueError for an unknown name, attention or override, with what is known.
    """
    family, row = look_up(MODELS, name, "model")
    core = dict(look_up(ATTENTIONS, attention, "attention"))
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    core_options = set(inspect.signature(AttentionCore).parameters) - {"heads", "kernel"}
    core |= {key: overrides.pop(key) for key in core_options & set(overrides)}
    known = set(inspect.signature(family).parameters) - {"core"}
    for key in set(overrides) - known:
        choices = sorted(core_options | known)
        raise ValueError(f"{name} has no option {key!r}: choose from {', '.join(choices)}")
    for key in {"mlp_dwconv"} & set(overrides):
        if overrides[key] and (overrides[key] < 0 or overrides[key] % 2 == 0):
            raise ValueError(f"{key} must be odd, or 0 for none, got {overrides[key]}")
    common = dict(image_size=image_size, castle_downsample=castle_downsample)
    if num_classes is not None:
        common["num_classes"] = num_classes
    options = {key: value for key, value in common.items() if key in known} | row | overrides
    return family(core=core, **options)


# ---- BatchNorm folded ------------------------------------------------------------------------------------------------

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def normed_layers(module: nn.Module) -> list[tuple[nn.Conv2d | nn.Linear, str]]:
    """(layer, name of a norm) where the module's forward is known to apply the norm right after the layer."""
    if isinstance(module, MlpDWConv):
        return [(module, "norm")]
    if isinstance(module, ConvNorm | LinearNorm):
        return [(module.linear, "bn")]
    if isinstance(module, DepthSeparable):
        return [(module.conv_dw, "bn1"), (module.conv_pw, "bn2")]
    if isinstance(module, LCNet):
        return [(module.conv_stem, "bn1")]
    if type(module).forward is not nn.Sequential.forward:
        return []
    children = list(module.named_children())
    pairs = zip(children, children[1:], strict=False)
    return [(layer, name) for (_, layer), (name, norm) in pairs if type(layer) is nn.Conv2d]


def fuse(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm that follows a convolution or linear layer into it, in place; return the model. Idempotent.

    With running mean m and variance u, scale g and shift b:  g (W x + c - m) / s + b  is  W' x + c'  with
    W' = (g / s) W,  c' = (g / s) (c - m) + b,  s = sqrt(u + eps). Before a linear layer, as in LeViT's heads:
    W' = W diag(g / s),  c' = c + W (b - (g / s) m). The same function up to rounding, and for inference only: there are
    no statistics left for training to follow.

    Of other people's models, a Conv2d and the norm after it in an nn.Sequential are folded; any other BatchNorm, and
    shared layers, stay.
    Raises: ValueError for a model in training mode, whose norms are no constants.
    """
    if any(isinstance(module, BatchNorm) and module.training for module in model.modules()):
        raise ValueError("fuse needs a model in eval mode: call model.eval() first")
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for module in list(model.modules()):
        if isinstance(module, NormLinear) and isinstance(module.bn, BatchNorm):
            bn, linear = module.bn, module.linear
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            linear.bias = nn.Parameter(linear(bn.bias - scale * bn.running_mean).detach(), linear.bias.requires_grad)
            linear.weight = nn.Parameter((linear.weight * scale).detach(), linear.weight.requires_grad)
            module.bn = nn.Identity()
        for layer, name in normed_layers(module):
            norm = getattr(module, name)
            plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) and norm.track_running_stats  # subclasses do more
            if plain and uses[id(layer)] == uses[id(norm)] == 1:
                statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                fold = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
                layer.weight, layer.bias = fold(layer.weight, layer.bias, *statistics)
                setattr(module, name, nn.Identity())
    return model


# ---- other people's models -------------------------------------------------------------------------------------------


class ConvertedAttention(AttentionCore):
    """Another library's self-attention: its own layers under their own names, the castling core between them.

    A subclass knows one layout. `parts` are the children and parameters it carries over, `inputs` the arguments of the
    original's forward that it knows; `heads_of` gives (H, D). Arguments that change what attends to what are a
    ValueError when given.
    """

    parts: tuple[str, ...]
    inputs: tuple[str, ...]

    def __init__(self, original: nn.Module, **core):
        rates = (getattr(original, name, 0.0) for name in ("attn_drop", "attention_dropout", "dropout"))
        dropout = max(getattr(rate, "p", rate) for rate in rates)
        super().__init__(self.heads_of(original)[0], auxiliary=True, dropout=dropout, **core)
        like = next(original.parameters())
        self.to(like.device, like.dtype)
        for name in self.parts:
            if name in original._modules:
                self.add_module(name, original._modules[name])
            elif name in original._parameters:
                self.register_parameter(name, original._parameters[name])
        self.train(original.training)

    @classmethod
    def problems(cls, module: nn.Module) -> list[str]:
        """Why a module of this layout cannot be converted; [] if it can."""
        state = {name.split(".")[0] for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]}
        inputs = inspect.signature(module.forward).parameters
        scale, dim = getattr(module, "scale", getattr(module, "scaling", None)), cls.heads_of(module)[1]
        found = []
        if extra := sorted(state - set(cls.parts)):
            found.append(f"linear-angular attention has no place for {', '.join(extra)}")
        if unknown := [name for name in inputs if name not in (*cls.inputs, "kwargs")]:
            found.append(f"it is called with {', '.join(unknown)}, unknown here")
        if isinstance(scale, float) and not math.isclose(scale, dim**-0.5):
            found.append(f"its logits are scaled by {scale:.4g}, not 1 / sqrt({dim})")
        if getattr(module, "is_causal", False):
            found.append("it is causal")
        return found or cls.strange(module)

    @classmethod
    def strange(cls, module: nn.Module) -> list[str]:
        """Where a module does something else with a few tokens than its layers with plain softmax attention between."""
        weight = next(module.parameters())
        if weight.is_meta:
            return []
        original = copy.deepcopy(module).eval().cpu().float()
        ours = cls(copy.deepcopy(original))
        ours.kernel, ours.auxiliary = "softmax", False
        x = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        args = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
        try:
            with torch.no_grad():
                theirs, ours = original(*args), ours(*args)
        except Exception as error:  # whatever its own checks raise
            return [f"it does not take tokens (B, N, C) alone: {str(error).splitlines()[0]}"]
        if isinstance(theirs, tuple) != isinstance(ours, tuple):
            return [f"it returns a {type(theirs).__name__}, its like a {type(ours).__name__}"]
        theirs, ours = (y[0] if isinstance(y, tuple) else y for y in (theirs, ours))
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-4, rtol=1e-4):
            return ["it computes something else than softmax attention over tokens"]
        return []

    def refuse(self, **given) -> None:
        """ValueError for arguments that are given and mean something to softmax attention only."""
        for name, value in given.items():
            if value is not None and value is not False:
                raise ValueError(f"a converted {type(self).__name__} cannot honour {name}")

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, (B, H, N, D), as the original compares them."""
        return q, k

    def split_and_attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
        """The core on (B, N, H D), heads side by side."""
        if q.ndim != 3:
            raise ValueError(f"expected tokens (B, N, C), got {q.ndim} axes: {tuple(q.shape)}")
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in (q, k, v))
        return rearrange(self.attend(*self.normed(q, k), v, padding=padding), "b h n d -> b n (h d)")


class FusedAttention(ConvertedAttention):
    """timm's `Attention`: one layer to q, k, v, laid out (3, H, D); norms of q and k over D, of the output over H D."""

    parts = ("qkv", "q_norm", "k_norm", "norm", "proj", "proj_drop")
    inputs = ("x", "attn_mask", "is_causal")

    def __init__(self, original: nn.Module, **core):
        super().__init__(original, **core)
        for name in self.parts:
            if not hasattr(self, name):  # older versions have fewer
                self.add_module(name, nn.Identity())

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("qkv", "proj"))

    @staticmethod
    def heads_of(module: nn.Module) -> tuple[int, int]:
        return module.num_heads, module.qkv.out_features // 3 // module.num_heads

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        self.refuse(attn_mask=attn_mask, is_causal=is_causal)
        y = self.split_and_attend(*self.qkv(x).chunk(3, dim=-1))
        return self.proj_drop(self.proj(self.norm(y)))


class SeparateAttention(ConvertedAttention):
    """Hugging Face's: three layers to q, k, v; the output layer inside, or, in older versions, in the parent."""

    triples = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
    outputs = ("o_proj", "out_proj")
    parts = (*triples[0], *triples[1], *outputs)
    inputs = ("hidden_states", "attention_mask", "head_mask", "output_attentions")

    def __init__(self, original: nn.Module, **core):
        super().__init__(original, **core)
        self.inputs = tuple(inspect.signature(original.forward).parameters)  # their order differs between versions

    @classmethod
    def layers(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        """Those to q, k and v; () if there are no such."""
        for triple in cls.triples:
            if all(isinstance(getattr(module, name, None), nn.Linear) for name in triple):
                return tuple(getattr(module, name) for name in triple)
        return ()

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return bool(cls.layers(module))

    @classmethod
    def heads_of(cls, module: nn.Module) -> tuple[int, int]:
        heads = getattr(module, "num_attention_heads", None) or module.num_heads
        return heads, cls.layers(module)[0].out_features // heads

    @classmethod
    def problems(cls, module: nn.Module) -> list[str]:
        widths = [layer.out_features for layer in cls.layers(module)]
        unequal = [] if len(set(widths)) == 1 else [f"q, k and v have {widths} channels: not one head each"]
        return unequal + super().problems(module)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        given = dict(zip(self.inputs[1:], args, strict=False)) | kwargs
        self.refuse(**{name: given[name] for name in given if name not in ("output_hidden_states", "return_dict")})
        y = self.split_and_attend(*(layer(hidden_states) for layer in self.layers(self)))
        for name in self.outputs:
            y = getattr(self, name)(y) if hasattr(self, name) else y
        return y, None


class PackedAttention(ConvertedAttention):
    """torch.nn.MultiheadAttention as self-attention, in torchvision's models and nn.TransformerEncoder.

    Called like it, with one tensor for query, key and value; returns (output, None) whatever `need_weights` says.
    """

    parts = ("in_proj_weight", "in_proj_bias", "out_proj")
    inputs = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights",
              "is_causal")  # fmt: skip
    # nn.TransformerEncoderLayer asks for this: True would let it compute softmax from our weights, past `forward`.
    _qkv_same_embed_dim = False

    def __init__(self, original: nn.MultiheadAttention, **core):
        super().__init__(original, **core)
        self.batch_first = original.batch_first

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @staticmethod
    def heads_of(module: nn.Module) -> tuple[int, int]:
        return module.num_heads, module.head_dim

    @classmethod
    def problems(cls, module: nn.MultiheadAttention) -> list[str]:
        zero = ["add_zero_attn has no place in linear-angular attention"] if module.add_zero_attn else []
        return zero + super().problems(module)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        self.refuse(attn_mask=attn_mask, is_causal=is_causal)
        if key is not query or value is not query:
            raise ValueError("a converted attention is self-attention: query, key and value must be one tensor")
        padding = key_padding_mask
        if padding is not None and padding.dtype != torch.bool:  # nn.TransformerEncoderLayer makes it 0 and -inf
            padding = padding == -math.inf
            if (key_padding_mask.masked_fill(padding, 0) != 0).any():
                raise ValueError("a converted attention can leave tokens out, not weigh them: key_padding_mask")
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        y = self.out_proj(self.split_and_attend(q, k, v, padding))
        return y if self.batch_first else y.transpose(0, 1), None


LAYOUTS = (PackedAttention, FusedAttention, SeparateAttention)


@dataclass
class Conversion:
    """What became of one attention layer: parameters kept and new, by name; what went."""

    kept: list[str]
    dropped: list[str]
    new: list[str]


@dataclass
class ConversionReport:
    """What `convert` did, by layer; printing it lists equal layers once."""

    layers: dict[str, Conversion]

    def __str__(self) -> str:
        groups = {}
        for name, layer in self.layers.items():
            groups.setdefault((re.sub(r"\d+", "*", name), str(layer)), []).append(layer)
        lines = []
        for (kind, _), (layer, *others) in groups.items():
            lines.append(f"{kind} x {len(others) + 1}")
            lines += [f"  {group.name}: {', '.join(getattr(layer, group.name))}" for group in fields(layer)]
        advice = "The converted model is another function with the same weights: fine-tune it before you use it."
        return "\n".join([*lines, advice])


def convert(
    model: nn.Module, *, epsilon: float = 0.02, schedule: str = "ramp", dconv: int = 9
) -> ConversionReport:
    """Swap the softmax self-attention of another library's vision transformer for the castling core, in place.

    Known: timm's `Attention`; Hugging Face's with query, key and value layers (ViT, DINOv2, ...);
    torch.nn.MultiheadAttention (torchvision's ViT, nn.TransformerEncoder). Every weight stays, under its name, in the
    model and in its state dict, which gains a `dconv.weight` per layer. Norms of q and k, prefix tokens and attention
    dropout (on the branch) go on as they were. Fine-tune the result with `set_threshold`, then `castle` it. Every layer
    is tried on a few tokens first; a mask or another sequence that a model gives to its layers is a ValueError in its
    first forward.

    Args: epsilon, schedule, dconv: of every AttentionCore.
    Raises: ValueError that names every attention layer which cannot be carried over, and why, and for a model without
        any; the model is then unchanged.
    """
    if cores(model):
        raise ValueError("the model has attention cores already: there is nothing to convert")
    found, wrong = {}, {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or outer == "" for outer in found):
            continue  # a part of one
        layout = next((layout for layout in LAYOUTS if layout.matches(module)), None)
        parent = model.get_submodule(name.rpartition(".")[0])
        if layout is None:
            called = name.rpartition(".")[2] in ("attn", "attention", "self_attn", "self_attention")
            called = called or "attention" in type(module).__name__.lower()
            known = any(layout.matches(part) for part in module.modules() for layout in LAYOUTS)
            if called and not known and any(True for _ in module.parameters()):
                wrong[name] = ["its layout is none of those known here"]
            continue
        found[name] = layout
        try:
            problems = layout.problems(module)
        except AttributeError as error:
            problems = [f"it lacks what its like have: {error}"]
        if isinstance(parent, nn.TransformerDecoderLayer):
            problems.append("a decoder's attention is causal or to another sequence")
        if name == "":
            problems.append("the model itself is one attention layer: put it into a module")
        if problems:
            wrong[name] = problems
    if wrong:
        alike = {}
        for name, problems in wrong.items():
            kind = type(model.get_submodule(name)).__name__
            alike.setdefault((kind, "; ".join(problems)), []).append(name or "model")
        reasons = [f"{', '.join(names)} ({kind}): {problems}" for (kind, problems), names in alike.items()]
        raise ValueError(f"cannot convert {type(model).__name__}\n" + "\n".join(reasons))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no self-attention that is known here: looked for nn.MultiheadAttention, and "
            f"for modules with linear layers named qkv and proj, q_proj, k_proj and v_proj, or query, key and value"
        )
    new, report = {}, ConversionReport({})
    for name, layout in found.items():
        original = model.get_submodule(name)
        core = layout(original, epsilon=epsilon, schedule=schedule, dconv=dconv)
        new[original] = core
        kept = [key for key, _ in original.named_parameters()]
        report.layers[name] = Conversion(
            kept=kept,
            dropped=["softmax over all pairs of tokens: what is above the threshold stays until castle()"],
            new=[key for key, _ in core.named_parameters() if key not in kept],
        )
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in new:
                setattr(module, name, new[child])
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only its own attention can take
    return report


# ---- export ----------------------------------------------------------------------------------------------------------


def traced(model: nn.Module, image_size: int | tuple[int, int]) -> torch.export.ExportedProgram:
    """The castled model, its norms folded, as one graph for images (B, 3, H, W) of any number and size.

    A model that itself takes one size only (as timm's do) gives a graph for `image_size`; one with an attribute
    `images` a graph for that many. A grid is more than one token wide and high in the graph: LeViT's sides are 65
    pixels or more. torch.export makes sure of that, ONNX does not ask.
    """
    model = fuse(castle(copy.deepcopy(model)).eval()).cpu().float()
    (height, width), images = pair(image_size), getattr(model, "images", 2)
    example = torch.zeros(images, 3, max(height, 128), max(width, 128) + 64)  # no two sides equal, no grid of 1
    sides = torch.export.Dim.AUTO
    with torch.no_grad():
        try:
            model(example)
        except Exception:  # whatever its own check raises
            example, sides = torch.zeros(images, 3, height, width), torch.export.Dim.STATIC
        free = {0: torch.export.Dim.AUTO if images > 1 else torch.export.Dim.STATIC, 2: sides, 3: sides}
        return torch.export.export(model, (example,), dynamic_shapes=(free,), strict=False)


def check_export(path: str | Path) -> None:
    """Raise ValueError for a file that `export` cannot write here: its kind, its folder, missing packages."""
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2") or not path.parent.is_dir():
        raise ValueError(f"a model is exported to a .onnx or .pt2 file in an existing folder, not to {path}")
    if path.suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(name)]
        if missing:
            raise ValueError(f"{path} needs {', '.join(missing)}: pip install onnx onnxruntime onnxscript")


def flattened(outputs: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dictionaries, in order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def export(model: nn.Module, path: str | Path, image_size: int | tuple[int, int]) -> tuple[list[tuple], float]:
    """Write `traced` to a .onnx or .pt2 file, read the file back and run it beside the model itself, castled.

    Returns: the shapes that it was run on, and the largest difference, relative to outputs that are greater than 1.
    Raises: ValueError, see `check_export`.
    """
    check_export(path)
    path, program = Path(path), traced(model, image_size)
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        run = torch.export.load(path).module()
    else:
        import onnxruntime

        torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"]).save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(x: Tensor) -> list[Tensor]:
            return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]

    example = next(node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    height, width = pair(image_size)
    sizes = [(height, width)]
    if symbolic(example.shape[2:]):
        least = 96 if path.suffix == ".pt2" else 32  # see `traced`
        height, width = max(height, least), max(width, least)
        sizes = [(height, width), (height + 32, width + 64), (2 * height, width + 32)]
    castled, shapes, differences = castle(copy.deepcopy(model)).eval().cpu().float(), [], []
    for seed, size in enumerate(sizes, 1):
        batch = seed if symbolic(example.shape[:1]) else example.shape[0]
        x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for ours, expected in zip(flattened(run(x)), flattened(castled(x)), strict=True):
                scale = max(1.0, expected.abs().max().item())
                differences.append((ours - expected).abs().max() / scale)
        shapes.append(tuple(x.shape))
    return shapes, torch.stack(differences).max().item()  # NaN if one is


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, by the checksums that torch.save puts into it; None if it is whole."""
    try:
        with zipfile.ZipFile(path) as file:
            record = file.testzip()
    except Exception as error:  # a damaged file can raise nearly anything
        return f"{path} is damaged: {error}"
    return record and f"{path} is damaged: the checksum of {record} is wrong"


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary in a checkpoint file, on the CPU. Only tensors and plain data are ever unpickled.

    Raises: ValueError that names the file if it is missing, damaged, needs arbitrary code to load,
        is no dictionary, or has tensors that are not plain ones.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint file {path}")
    if zipfile.is_zipfile(path) and (reason := damage(path)):
        raise ValueError(reason)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(f"{path} holds more than tensors and plain data, or is damaged; refused: {reason}") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is damaged or is no PyTorch checkpoint: {error!r}") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(key, str) for key in checkpoint):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary by name")
    for place, leaf in tree_leaves_with_path(checkpoint):
        if isinstance(leaf, Tensor) and (
            leaf.layout != torch.strided or leaf.is_meta or leaf.is_quantized or leaf.is_nested
        ):
            kinds = "sparse, meta, quantised or nested"
            raise ValueError(f"{path} holds a {kinds} tensor, {keystr(place)}")
    return checkpoint


# Names of the class head's weights, (classes, C): LCNet and ESNet, DeiT, LeViT, MViTv2; the last two are official.
HEADS = ("classifier.weight", "head.weight", "head.linear.weight", "head.fc.weight",
         "head.l.weight", "head.projection.weight")  # fmt: skip


def weights_in(checkpoint: dict) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: the averaged weights where there are any, or the dictionary itself.

    Prefixes that DistributedDataParallel and torch.compile put before names are removed.
    """
    for key in ("ema", "model_ema", "state_dict_ema", "model", "model_state", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    weights = {}
    for name, value in checkpoint.items():
        if name == "n_averaged":  # of torch's AveragedModel
            continue
        while isinstance(name, str) and name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        weights[name] = value
    return weights


@dataclass
class LoadReport:
    """What became of each parameter and buffer when a checkpoint was loaded, by name."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # tables made for another image size
    partly: list[str] = field(default_factory=list)  # only the rows of values carry over
    new: list[str] = field(default_factory=list)  # in the model only
    ignored: list[str] = field(default_factory=list)  # in the file only

    def __str__(self) -> str:
        lines = []
        for group in fields(self):
            # blocks.3.attn.dconv.weight of every block as one entry, blocks.*.attn.dconv.weight
            kinds = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in getattr(self, group.name))
            names = [f"{kind} x {count}" if count > 1 else kind for kind, count in sorted(kinds.items())]
            if group.name == "loaded":
                names = [f"{sum(kinds.values())} parameters and buffers"]
            if kinds:
                lines.append(f"{group.name}: {', '.join(names)}")
        return "\n".join(lines)


def official_levit_names(weights: dict[str, Tensor], depths: list[int]) -> dict[str, Tensor]:
    """LeViT's released names to this project's (timm's).

    Released: one flat list, attention and MLP of a block in turn, a down-sampling attention and its MLP between stages;
    `m` is a residual, `c`/`l` the linear part, `bn` its norm. Source: facebookresearch/LeViT @ 3772b8e, levit.py.
    """
    places = []
    for stage, depth in enumerate(depths):
        if stage > 0:
            places += [f"stages.{stage}.downsample.attn_downsample", f"stages.{stage}.downsample.mlp"]
        for block in range(depth):
            places += [f"stages.{stage}.blocks.{block}.attn", f"stages.{stage}.blocks.{block}.mlp"]
    renamed = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            parts[:2] = ["stem", f"conv{int(parts[1]) // 2 + 1}"]
        elif parts[0] == "blocks" and int(parts[1]) < len(places):
            place, rest = places[int(parts[1])], [part for part in parts[2:] if part != "m"]
            inner = {"0": "ln1", "2": "ln2"} if place.endswith(".mlp") else {"1": "ln"}
            parts = [place, *(inner.get(part, part) for part in rest)]
        renamed[".".join("linear" if part in ("c", "l") else part for part in parts)] = value
    return renamed


def official_mvit_names(weights: dict[str, Tensor], depths: list[int]) -> dict[str, Tensor]:
    """MViTv2's released names, blocks in one flat list, to this project's (timm's)."""
    places = [f"stages.{stage}.blocks.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    renamed = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "blocks" and int(parts[1]) < len(places):
            parts[:2] = [places[int(parts[1])]]
            if parts[1] == "proj":
                parts[1] = "shortcut_proj_attn"
        renamed[".".join(parts).replace("head.projection.", "head.fc.")] = value
    return renamed


def square_side(entries: int) -> int | None:
    """Side of the square grid of so many entries, or None if there is no such grid."""
    side = math.isqrt(max(0, entries))
    return side if side > 0 and side**2 == entries else None


def resized_table(name: str, value: Tensor, own: Tensor, model: nn.Module, file_has_dist: bool) -> Tensor | None:
    """A position table of a file in the shape of the model's own, or None if it is no such table or does not fit."""
    layer, _, kind = name.rpartition(".")
    owner = model.get_submodule(layer)
    if value.ndim != own.ndim:
        return None
    if kind == "pos_embed" and value.shape[::2] == own.shape[::2] and isinstance(owner, DeiT | DenseViT):
        prefix = 2 if file_has_dist else 1
        side = square_side(value.shape[1] - prefix)
        if side is None:
            return None
        patches = resize_positions(value[:, prefix:], (side, side), owner.grid)
        kept = value[:, : min(prefix, owner.prefix)]
        return torch.cat([kept, own[:, kept.shape[1] : owner.prefix], patches], dim=1)
    if kind == "attention_biases" and len(value) == len(own) and (side := square_side(value.shape[1])):
        return resize_offsets(value.unflatten(1, (side, side)), owner.grid).flatten(1)
    if kind in ("rel_pos_h", "rel_pos_w") and value.shape[1] == own.shape[1] and len(value) > 0:
        return resize_relative(value, len(own))
    return None


def value_rows(name: str, weights: dict[str, Tensor], own: Tensor, model: nn.Module) -> Tensor | None:
    """A castling LeViT's qkv with V's rows from a published LeViT's qkv or kv, where Q and K are narrower."""
    match = re.fullmatch(r"(.*)\.qkv\.((?:linear|bn)\.\w+)", name)
    core = model.get_submodule(match[1]) if match else None
    if not isinstance(core, CastlingLeViTAttention) or own.ndim == 0:
        return None
    source = weights.get(name, weights.get(f"{match[1]}.kv.{match[2]}"))
    dim = core.split[-1]
    if source is None or len(source) % core.heads or source.shape[1:] != own.shape[1:]:
        return None
    source, result = source.unflatten(0, (core.heads, -1)), own.clone().unflatten(0, (core.heads, -1))
    if source.shape[1] < dim:
        return None
    result[:, -dim:] = source[:, -dim:]  # head by head, values last
    return result.flatten(0, 1)


def load_pretrained(model: nn.Module, path: str | Path, fresh: str | None = None) -> LoadReport:
    """Load a checkpoint: this project's, timm's names, or the official files of DeiT, LeViT, MViTv2 and MAE.

    A castling model takes over all that carries over from a published softmax one; what it has beyond that keeps its
    initialisation, in which the MLP's DWConv is the identity. A dense model has no use for class token, final norm and
    head. Tables for another image size are resized; files do not say their grid, so it is taken as square, or, if the
    length is the model's, as the model's.

    Args: fresh: what parameters' names start with that keep their initialisation, whatever the file has for them.
    Returns: what was loaded, resized, partly loaded, newly initialised and ignored; printing it lists them.
    Raises: ValueError that names the file and whatever is missing, left over or of another shape without an
        explanation; the model is then unchanged.
    """
    weights, own, report = weights_in(read_checkpoint(path)), model.state_dict(), LoadReport()
    if not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path} holds no parameters by name")
    # How far training was is no weight: who loads says where the thresholds start.
    weights, own = ({n: x for n, x in state.items() if not n.endswith("progress")} for state in (weights, own))
    if "patch_embed.0.c.weight" in weights and isinstance(model, LeViT):
        weights = official_levit_names(weights, [len(stage.blocks) for stage in model.stages])
    if "blocks.0.attn.pool_q.weight" in weights and isinstance(model, MViTv2):
        weights = official_mvit_names(weights, [len(stage["blocks"]) for stage in model.stages])
    kernels = {name: core.kernel for name, core in cores(model).items()}
    castling = any(kernel != "softmax" for kernel in kernels.values())
    published = not any(".dconv." in name for name in weights)
    file_has_dist = "dist_token" in weights or any(name.startswith("head_dist.") for name in weights)

    def expected_new(name: str) -> bool:
        """The model has it, the file need not."""
        if name.startswith(("head_dist.", "dist_token")):
            return not file_has_dist
        if name.startswith("head."):  # MAE's encoder has no classifier
            return published and not any(other.startswith(("head.", "fc_norm.")) for other in weights)
        if name.endswith(".dwconv.bias") and name.removesuffix("bias") + "weight" in weights:
            return True  # a DeiT's DWConv has none: zero, as it starts, is the same
        added = r"\.(dconv|dwconv|pool_[qkv]|norm_[qkv]|skip)\.|attn_downsample\.qkv\.bn\.num_batches_tracked"
        return castling and published and bool(re.search(added, name))

    def expected_rest(name: str) -> bool:
        """The file has it, the model need not."""
        layer, kind = name.rpartition(".")[::2]
        if kind == "attention_bias_idxs" or name.startswith(("decoder_", "mask_token")):
            return True
        if name.startswith(("head_dist.", "dist_token")):
            return getattr(model, "head_dist", None) is None
        if isinstance(model, DenseViT) and name.startswith(("cls_token", "norm.", "fc_norm.", "head.")):
            return True
        if kind in ("attention_biases", "rel_pos_h", "rel_pos_w"):
            return kernels.get(layer, "softmax") != "softmax"
        if name.startswith(("conv_head.", "classifier.")):
            return getattr(model, "classifier", model) is None  # a detector's backbone
        # a published LeViT's down-sampling attention projects kv and q apart
        return castling and bool(re.search(r"\.attn_downsample\.(kv|q\.ln)\.", name))

    final = {}
    tensors = {name: x for name, x in weights.items() if isinstance(x, Tensor)}
    numbers = {name: x.float() for name, x in tensors.items() if x.is_floating_point()}
    wrong = [f"{name} holds nan or inf" for name, x in numbers.items() if not x.isfinite().all()]
    for name, value in own.items():
        found = weights.get(name)
        if fresh and name.startswith(fresh):
            report.new.append(name)
        elif found is not None and not isinstance(found, Tensor):
            wrong.append(f"{name} is no tensor")
        elif found is not None and value.is_floating_point() and name not in numbers:
            wrong.append(f"{name} is {found.dtype} in the file, {value.dtype} in the model")
        elif found is not None and found.shape == value.shape:
            final[name] = found
            report.loaded.append(name)
        elif found is not None and (table := resized_table(name, found, value, model, file_has_dist)) is not None:
            final[name] = table
            report.resized.append(name)
        elif published and (rows := value_rows(name, weights, value, model)) is not None:
            final[name] = rows
            report.partly.append(name)
        elif found is None and expected_new(name):
            report.new.append(name)
        elif found is None:
            wrong.append(f"missing {name}")
        else:
            if name in HEADS and found.shape[:1] != value.shape[:1]:
                wrong.insert(0, f"{(*found.shape, 0)[0]} classes in the file, {len(value)} in the model")
            wrong.append(f"{name} is {tuple(found.shape)} in the file, {tuple(value.shape)} in the model")
    for name in weights:
        if name not in own:
            if expected_rest(name):
                report.ignored.append(name)
            else:
                wrong.append(f"unknown {name}")
    if wrong:
        more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(wrong[:8])}{more}")
    model.load_state_dict(model.state_dict() | final)
    return report
