"""Train a semantic segmenter, Mask2Former on a dense ViT, and castle it at the end. Any number of processes.

    python segment.py                                              built-in rendered scenes, one process, no download
    torchrun --nproc-per-node=8 segment.py --data ADE20K --batch-size 2 --checkpoint mae_pretrain_vit_base.pth
    python segment.py --eval --checkpoint runs/X/best.pt           mIoU with and without the auxiliary branch
    python segment.py --image photo.jpg --checkpoint runs/X/best.pt --output overlay.png

Mask2Former  Cheng et al., arXiv:2112.01527;  facebookresearch/Mask2Former @ 161be51, mask2former/ and the
             ADE20K semantic-segmentation/maskformer2_R50_bs16_160k.yaml of its configs/: architecture, losses, recipe
Pyramid      Li et al., arXiv:2203.16527 (ViTDet), section 3;  detectron2, modeling/backbone/vit.py
Castling     arXiv:2211.10526v4, section 4.2 and Table 4; where the text is silent, the table's counts decide (D8)

Shapes: B images, K classes, Q queries, C channels, N tokens; maps are (B, C, y, x), token grids row-major. Strides are
those of a 16-pixel patch: 4, 8, 16, 32. The pyramid of another patch size p has strides p/4, p/2, p, 2p.
Labels: 0..K-1, and 255 for pixels without one. `train` below is the loop; run.py has what it calls.
"""

import argparse
import colorsys
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import fast
import run
from attention import look_up, set_threshold, without_autocast
from convert import LoadReport, load_pretrained, read_checkpoint, weights_in
from data import (
    SHAPES,
    Augmented,
    DataError,
    EpochSampler,
    Shapes,
    make_loader,
    mixed_seed,
    read_image,
    to_model_input,
)
from models import DenseViT, build_model
from run import agreed, all_sum, at_least, autocast, rank, say, share, world_size

METRICS = {"mIoU": "mIoU", "mAcc": "mAcc", "pAcc": "pAcc"}  # of `evaluate`; best.pt is best in the first

SEGMENTERS = {  # name: its backbone
    "vit_base": "vit_base_dense",
    "vit_small": "vit_small_dense",
    "vit_tiny": "vit_tiny_dense",
    "vit_mini": "vit_mini_dense",
}

IGNORE = 255  # label of pixels that belong to no class
WEIGHTS = dict(label=2.0, bce=5.0, dice=5.0)  # of the three losses, and of the matching costs of the same names
NO_OBJECT = 0.1  # weight in the class loss of queries that are matched to nothing
GREY = 128  # padding of training crops, before normalisation

# Folders: Mask2Former's ADE20K recipe. Rendered scenes: a narrow model and a short recipe for two CPU cores.
DATA_DEFAULTS = {
    "folder": dict(
        model="vit_base", image_size=512, batch_size=16, lr=1e-4, backbone_lr=0.1, weight_decay=0.05, clip_grad=0.01,
        drop_path=0.1, ema_decay=0.0, eval_steps=5000,
        patch_size=16, width=256, queries=100, layers=9, encoder_layers=6, points=12544,
    ),
    "shapes": dict(
        model="vit_mini", image_size=64, batch_size=16, lr=6e-4, backbone_lr=1.0, weight_decay=0.05, clip_grad=0.01,
        drop_path=0.0, eval_steps=250, shapes_length=32000,
        patch_size=8, width=64, queries=20, layers=3, encoder_layers=1, points=512,
    ),
}  # fmt: skip
STEPS = {"folder": 160_000, "shapes": 2000}  # of a run, where neither --epochs nor --max-steps bounds it
LR_BATCH = 16  # `lr` is the first learning rate at a global batch of this size; it scales with the batch


def widened(x: Tensor) -> Tensor:
    """In float32 or wider, as sampling positions, mask products and losses need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- backbone: dense ViT and simple feature pyramid ------------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at each pixel, (B, C, y, x) -> same."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PyramidBackbone(nn.Module):
    """(B, 3, H, W) pixels -> four maps of `width` channels, strides 4, 8, 16, 32, all from the ViT's last map.

    H and W are multiples of twice the patch.  ViTDet, arXiv:2203.16527, section 3, "simple feature pyramid"
    """

    def __init__(self, vit: DenseViT, width: int):
        super().__init__()
        half, quarter = vit.dim // 2, vit.dim // 4

        def level(channels: int, *resize: nn.Module) -> nn.Sequential:
            convolutions = nn.Conv2d(channels, width, 1, bias=False), nn.Conv2d(width, width, 3, padding=1, bias=False)
            return nn.Sequential(*resize, *(layer for conv in convolutions for layer in (conv, ChannelNorm(width))))

        def twice(channels: int, out: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(channels, out, 2, stride=2)

        self.vit = vit
        self.pyramid = nn.ModuleList([
            level(quarter, twice(vit.dim, half), ChannelNorm(half), nn.GELU(), twice(half, quarter)),
            level(half, twice(vit.dim, half)),
            level(vit.dim),
            level(vit.dim, nn.MaxPool2d(2)),
        ])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.vit(x)
        return [level(x) for level in self.pyramid]


# ---- parts of both decoders ------------------------------------------------------------------------------------------


def sine_positions(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """Positions of a token grid as sines and cosines, (N, dim) float32: dim / 2 channels for y, then as many for x.

    Position i = 1..n on an axis of n has the phase 2 pi i / n; channel j has sin (j even) or cos (j odd) of
    phase / 10000^(2 floor(j / 2) / (dim / 2)).  Source: Mask2Former, transformer_decoder/position_encoding.py.
    """
    channel = torch.arange(dim // 2, device=device)
    wavelength = 10000 ** ((channel - channel % 2) / (dim // 2))

    def axis(n: int) -> Tensor:
        phase = torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi
        angle = phase[:, None] / wavelength
        return torch.where(channel % 2 == 0, angle.sin(), angle.cos())                # (n, dim / 2)

    y, x = axis(grid[0])[:, None], axis(grid[1])[None]
    return torch.cat([y.expand(*grid, -1), x.expand(*grid, -1)], dim=-1).flatten(0, 1)


def tokens_of(x: Tensor) -> Tensor:
    """(B, C, y, x) -> (B, N, C)."""
    return rearrange(x, "b c y x -> b (y x) c")


def init_xavier(module: nn.Module) -> None:
    """Xavier-uniform matrices, the rest as it is, as Mask2Former initialises attention and feed-forward."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


def init_convs(module: nn.Module) -> None:
    """Kaiming-uniform filters with a = 1, biases 0: detectron2's c2_xavier_fill, for the pixel decoders."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


def conv_group_norm(channels: int, kernel: int) -> nn.Sequential:
    """Convolution without bias and GroupNorm of 32 groups."""
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(32, channels))


class Attention(nn.MultiheadAttention):
    """Softmax attention, (B, N, C), (B, M, C), (B, M, C) -> (B, N, C); `blocked` (B H, N, M) is True where masked."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
        return super().forward(query, key, value, attn_mask=blocked, need_weights=False)[0]


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


class EncoderLayer(nn.Module):
    """Post-norm self-attention and feed-forward on (B, N, C); `position` is added to queries and keys only."""

    def __init__(self, attn: nn.Module, dim: int, hidden: int):
        super().__init__()
        self.attn, self.norm1 = attn, nn.LayerNorm(dim)
        self.ffn, self.norm2 = FeedForward(dim, hidden), nn.LayerNorm(dim)

    def attend(self, x: Tensor, position: Tensor) -> Tensor:
        return self.attn(x + position, x + position, x)

    def forward(self, x: Tensor, *where) -> Tensor:
        x = self.norm1(x + self.attend(x, *where))
        return self.norm2(x + self.ffn(x))


# ---- pixel decoder A: FPN and transformer encoder --------------------------------------------------------------------


class FPNTransformer(nn.Module):
    """Four maps, finest first -> (mask features at stride 4, [maps at strides 32, 16, 8]).

    A transformer encoder on the coarsest map, then a top-down FPN. The counts in the paper's Table 4 fit this pixel
    decoder, not Mask2Former's default (D8).
    Source: Mask2Former, pixel_decoder/fpn.py, TransformerEncoderPixelDecoder.
    """

    def __init__(self, width: int, heads: int = 8, layers: int = 6):
        super().__init__()
        self.input = nn.Conv2d(width, width, 1)
        self.encoder = nn.ModuleList(EncoderLayer(Attention(width, heads), width, 8 * width) for _ in range(layers))
        self.lateral = nn.ModuleList(conv_group_norm(width, 1) for _ in range(3))  # coarse to fine, as what follows
        self.output = nn.ModuleList(conv_group_norm(width, 3) for _ in range(4))
        self.mask_features = nn.Conv2d(width, width, 3, padding=1)
        init_convs(self)
        init_xavier(self.encoder)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        *finer, coarsest = maps
        grid = tuple(coarsest.shape[2:])
        x = tokens_of(self.input(coarsest))
        position = sine_positions(grid, x.shape[2], x.device).to(x.dtype)
        for layer in self.encoder:
            x = layer(x, position)
        y = F.relu(self.output[0](rearrange(x, "b (y x) c -> b c y x", y=grid[0])))
        levels = [y]
        for lateral, output, fine in zip(self.lateral, self.output[1:], reversed(finer), strict=True):
            y = F.relu(output(lateral(fine) + F.interpolate(y, size=fine.shape[2:], mode="nearest")))
            levels.append(y)
        return self.mask_features(y), levels[:3]


# ---- pixel decoder B: multi-scale deformable attention ---------------------------------------------------------------


def sample_levels(value: Tensor, grids: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples from several maps; 0 outside them.  Deformable DETR, arXiv:2010.04159, Eq. (3)

    Args:
        value: (B, T, H, D), the tokens of all maps one after the other, map l on grids[l] = (y, x), H heads.
        locations: (B, N, H, L, P, 2), points (x, y) within 0..1 of each map: 0 and 1 are its outer edges.
        weights: (B, N, H, L, P).
    Returns: (B, N, H D), head-major.
    """
    heads, sampled = value.shape[2], []
    for level, tokens in enumerate(value.split([y * x for y, x in grids], dim=1)):
        maps = rearrange(tokens, "b (y x) h d -> (b h) d y x", y=grids[level][0])
        points = rearrange(2 * locations[:, :, :, level] - 1, "b n h p s -> (b h) n p s")
        sampled.append(F.grid_sample(maps, points, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = rearrange(weights, "b n h l p -> (b h) 1 n (l p)")
    return rearrange((torch.cat(sampled, dim=-1) * weights).sum(dim=-1), "(b h) d n -> b n (h d)", h=heads)


class DeformableAttention(nn.Module):
    """Each token attends to `points` learned places on each map, (B, T, C) -> (B, T, C).

    Offsets are in pixels of their map. At first a head looks in one direction, its points 1, 2, 3, ... pixels away,
    with equal weights.  Source: Deformable DETR, arXiv:2010.04159, section 4.1.
    """

    def __init__(self, dim: int, heads: int, levels: int = 3, points: int = 4):
        super().__init__()
        self.split = (heads, levels, points)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        for layer, init in ((self.value, nn.init.xavier_uniform_), (self.out, nn.init.xavier_uniform_),
                            (self.offsets, nn.init.zeros_), (self.weights, nn.init.zeros_)):  # fmt: skip
            init(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        way = torch.stack([angle.cos(), angle.sin()], dim=-1)                         # (H, 2), x and y
        way = way / way.abs().amax(dim=-1, keepdim=True)
        bias = torch.arange(1, points + 1)[:, None] * way[:, None, None]              # (H, 1, P, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, levels, -1, -1).flatten())

    def forward(self, query: Tensor, x: Tensor, references: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """query, x: (B, T, C), x the tokens of all maps; references: (T, 2), each token's own place (x, y) in 0..1."""
        heads, levels, points = self.split
        offsets = self.offsets(query).unflatten(-1, (heads, levels, points, 2))
        weights = self.weights(query).unflatten(-1, (heads, levels * points)).softmax(dim=-1)
        sizes = torch.stack([offsets.new_full((), side) for y, x in grids for side in (x, y)]).view(levels, 2)
        locations = references[:, None, None, None] + offsets / sizes[:, None]        # (B, T, H, L, P, 2)
        value = self.value(x).unflatten(-1, (heads, -1))
        return self.out(sample_levels(value, grids, locations, weights.unflatten(-1, (levels, points))))


class DeformableLayer(EncoderLayer):
    """EncoderLayer of deformable attention: `position` is added to queries, and values come from all maps."""

    def attend(self, x: Tensor, position: Tensor, references: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        return self.attn(x + position, x, references, grids)


def reference_points(grids: list[tuple[int, int]], like: Tensor) -> Tensor:
    """(T, 2): the centre (x, y) of every token of every map, as shares of its width and height."""
    points = []
    for rows, columns in grids:
        y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (rows, columns))
        points.append(torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1).flatten(0, 1))
    return torch.cat(points)


class DeformableEncoder(nn.Module):
    """Four maps, finest first -> (mask features at stride 4, [maps at strides 32, 16, 8]): Mask2Former as published.

    Runs in float32: bfloat16 cannot tell neighbouring places of a large map apart.
    Source: Mask2Former, pixel_decoder/msdeformattn.py, MSDeformAttnPixelDecoder.
    """

    def __init__(self, width: int, heads: int = 8, layers: int = 6):
        super().__init__()
        self.input = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.GroupNorm(32, width)) for _ in range(3)
        )
        self.level_embed = nn.Parameter(torch.randn(3, width))
        self.encoder = nn.ModuleList(
            DeformableLayer(DeformableAttention(width, heads), width, 4 * width) for _ in range(layers)
        )
        self.lateral, self.output = conv_group_norm(width, 1), conv_group_norm(width, 3)
        self.mask_features = nn.Conv2d(width, width, 1)
        init_convs(self)
        for projection in self.input:
            nn.init.xavier_uniform_(projection[0].weight)
        for layer in self.encoder:
            init_xavier(layer.ffn)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with without_autocast(maps[0].device):
            finest, *coarser = (widened(x) for x in maps)
            levels = [conv(x) for conv, x in zip(self.input, reversed(coarser), strict=True)]
            grids = [tuple(x.shape[2:]) for x in levels]
            x = torch.cat([tokens_of(level) for level in levels], dim=1)              # (B, T, C)
            position = torch.cat([
                sine_positions(grid, x.shape[2], x.device) + embed
                for grid, embed in zip(grids, self.level_embed, strict=True)
            ]).to(x.dtype)
            references = reference_points(grids, x)
            for layer in self.encoder:
                x = layer(x, position, references, grids)
            parts = x.split([rows * columns for rows, columns in grids], dim=1)
            levels = [rearrange(t, "b (y x) c -> b c y x", y=g[0]) for t, g in zip(parts, grids, strict=True)]
            up = F.interpolate(levels[-1], size=finest.shape[2:], mode="bilinear", align_corners=False)
            return self.mask_features(F.relu(self.output(self.lateral(finest) + up))), levels


PIXEL_DECODERS = {"fpn_transformer": FPNTransformer, "msdeform": DeformableEncoder}


# ---- masked-attention decoder ----------------------------------------------------------------------------------------


def attention_mask(masks: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """Where queries may not look: (B, Q, y, x) mask logits -> (B H, Q, N) booleans for a level of that grid.

    A token is blocked where the resized mask's probability is below one half. A query that would see nothing sees all:
    its softmax would be 0 / 0.  Mask2Former, arXiv:2112.01527, Eq. (2) and (3)
    """
    resized = F.interpolate(widened(masks.detach()), size=grid, mode="bilinear", align_corners=False)
    blocked = resized.flatten(2) < 0                                                  # sigmoid < 0.5
    blocked = blocked & ~blocked.all(dim=-1, keepdim=True)
    return blocked.repeat_interleave(heads, dim=0)


class DecoderLayer(nn.Module):
    """Post-norm masked cross-attention, self-attention, feed-forward on queries (B, Q, C)."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.cross, self.norm1 = Attention(dim, heads), nn.LayerNorm(dim)
        self.attn, self.norm2 = Attention(dim, heads), nn.LayerNorm(dim)
        self.ffn, self.norm3 = FeedForward(dim, hidden), nn.LayerNorm(dim)
        init_xavier(self)

    def forward(self, x: Tensor, position: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
        """position: (Q, C), added to queries, and to the keys of self-attention. key, value: (B, N, C)."""
        x = self.norm1(x + self.cross(x + position, key, value, blocked))
        x = self.norm2(x + self.attn(x + position, x + position, x))
        return self.norm3(x + self.ffn(x))


class MaskedDecoder(nn.Module):
    """Queries that look at the levels in turn, each only where its latest mask is.  Mask2Former, section 3.2

    Returns the predictions of the initial queries and of every layer's: pairs of class logits (B, Q, K + 1), the last
    class for "no object", and mask logits (B, Q, y, x) at stride 4.
    """

    def __init__(self, width: int, num_classes: int, heads: int = 8, queries: int = 100, layers: int = 9):
        super().__init__()
        self.heads = heads
        self.query_feat = nn.Embedding(queries, width)       # what the queries start from
        self.query_embed = nn.Embedding(queries, width)      # their positions
        self.level_embed = nn.Embedding(3, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, 8 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.mask_head = nn.Sequential(FeedForward(width, width), nn.ReLU(), nn.Linear(width, width))

    def predict(self, x: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """Classes and masks of queries (B, Q, C). Only the heads see them normalised, not the next layer."""
        y = self.norm(x)
        embed = self.mask_head(y)
        with without_autocast(x.device):
            masks = torch.einsum("bqc,bcyx->bqyx", widened(embed), widened(mask_features))
        return self.class_head(y), masks

    def forward(self, mask_features: Tensor, levels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        memories = []
        for level, embed in zip(levels, self.level_embed.weight, strict=True):
            grid, value = tuple(level.shape[2:]), tokens_of(level) + embed
            memories.append((grid, value + sine_positions(grid, value.shape[2], value.device).to(value.dtype), value))
        x = self.query_feat.weight.repeat(len(mask_features), 1, 1)                    # (B, Q, C)
        outputs = [self.predict(x, mask_features)]
        for i, layer in enumerate(self.layers):
            grid, key, value = memories[i % len(memories)]
            blocked = attention_mask(outputs[-1][1], grid, self.heads)
            x = layer(x, self.query_embed.weight, key, value, blocked)
            outputs.append(self.predict(x, mask_features))
        return outputs


class Segmenter(nn.Module):
    """(B, 3, H, W) normalised pixels -> the predictions of `MaskedDecoder`, masks at the pyramid's finest stride.

    Images are padded with zeros, at the bottom and right, to a multiple of `stride`.
    """

    def __init__(self, vit: DenseViT, num_classes: int, pixel_decoder: str, width: int, heads: int, queries: int,
                 layers: int, encoder_layers: int):  # fmt: skip
        super().__init__()
        self.stride = 2 * vit.patch_size
        self.backbone = PyramidBackbone(vit, width)
        self.pixel_decoder = look_up(PIXEL_DECODERS, pixel_decoder, "pixel decoder")(width, heads, encoder_layers)
        self.decoder = MaskedDecoder(width, num_classes, heads, queries, layers)

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size, (height, width), that images of `size` are padded to."""
        return tuple(-(-side // self.stride) * self.stride for side in size)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        height, width = self.padded(x.shape[2:])
        x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
        return self.decoder(*self.pixel_decoder(self.backbone(x)))


def build_segmenter(
    name: str = "vit_base",
    attention: str = "castling",
    num_classes: int = 150,
    pixel_decoder: str = "fpn_transformer",
    image_size: int | tuple[int, int] = 512,
    *,
    width: int = 256,
    heads: int = 8,
    queries: int = 100,
    layers: int = 9,
    encoder_layers: int = 6,
    **overrides,
) -> Segmenter:
    """A segmenter by name, randomly initialised.

    Args:
        name: a key of SEGMENTERS. attention: of the backbone, as in `models.build_model`; the decoders are softmax.
        pixel_decoder: "fpn_transformer", which the paper's counts fit, or "msdeform", Mask2Former's default (D8).
        image_size: what the position embeddings are made for, pixels.
        width, heads, queries: C, heads and Q of pyramid and decoders. layers: of the masked decoder.
        encoder_layers: of the pixel decoder.
        overrides: of the backbone: patch_size, depth, drop_path, mlp_dwconv, epsilon, schedule, ...
    Raises: ValueError for unknown names, with the near ones, and for sizes that do not fit together.
    """
    backbone = look_up(SEGMENTERS, name, "segmenter")
    if num_classes < 1 or num_classes > IGNORE:
        raise ValueError(f"num_classes must be within 1..{IGNORE}, got {num_classes}")
    for what, value in dict(heads=heads, queries=queries, layers=layers, encoder_layers=encoder_layers).items():
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    if width < 32 or width % 32 or width % heads:
        raise ValueError(f"width must be a multiple of 32 (GroupNorm's groups) and of heads {heads}, got {width}")
    patch_size = overrides.get("patch_size", 16)
    if patch_size < 4 or patch_size % 4:
        raise ValueError(f"patch_size must be a multiple of 4, got {patch_size}")
    vit = build_model(backbone, attention, image_size=image_size, **overrides)
    return Segmenter(vit, num_classes, pixel_decoder, width, heads, queries, layers, encoder_layers)


def load_start(model: Segmenter, path: str | Path) -> LoadReport:
    """Weights to start from: a segmenter's, as `run.load_start` does; or a ViT's (MAE, DeiT, timm) for the backbone.

    Raises: ValueError as `load_pretrained` does.
    """
    if any(name.startswith("backbone.") for name in weights_in(read_checkpoint(path))):
        return run.load_start(model, path, "decoder.class_head.")
    prefix = "backbone.vit."
    report = load_pretrained(model.backbone.vit, path)
    for group in (report.loaded, report.resized, report.partly, report.new):
        group[:] = [prefix + name for name in group]
    report.new += [name for name in model.state_dict() if not name.startswith(prefix)]
    return report


# ---- matching and losses ---------------------------------------------------------------------------------------------

Targets = list[tuple[Tensor, Tensor]]  # per image: labels (n,) and masks (n, H, W) boolean, one of each class in it


def targets_of(labels: Tensor, padded: tuple[int, int]) -> Targets:
    """Label maps (B, H, W) -> per image, a target for each class in it. Ignored pixels and padding are in no mask.

    Masks have the `padded` size (height, width), which the model sees.
    """
    edges = (0, padded[1] - labels.shape[2], 0, padded[0] - labels.shape[1])
    targets = []
    for label in F.pad(labels, edges, value=IGNORE):
        classes = label.unique()
        classes = classes[classes != IGNORE]
        targets.append((classes.long(), label[None] == classes[:, None, None]))
    return targets


def random_points(masks: int, points: int, device: torch.device) -> Tensor:
    """(masks, points, 2): uniform places (x, y) in 0..1."""
    return torch.rand(masks, points, 2, device=device)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps (N, C, y, x) at points (N, P, 2), places (x, y) in 0..1 -> (N, C, P)."""
    return F.grid_sample(maps, 2 * points[:, :, None].to(maps.dtype) - 1, align_corners=False)[..., 0]


@torch.no_grad()
def uncertain_points(logits: Tensor, points: int, oversample: int = 3, uncertain: float = 0.75) -> Tensor:
    """Places at which to compare masks (M, y, x) with their targets, (M, points, 2).

    The share `uncertain` of them are those of least |logit| among `oversample` times as many uniform places; the rest
    are uniform.  PointRend, arXiv:1912.08193, section 3.1
    """
    candidates = random_points(len(logits), oversample * points, logits.device)
    certainty = sample(logits[:, None], candidates)[:, 0].abs()
    kept = certainty.topk(int(uncertain * points), largest=False).indices
    chosen = candidates.gather(1, kept[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, random_points(len(logits), points - kept.shape[1], logits.device)], dim=1)


def bce_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy, mean over P points, of paired masks (M, P) -> (M,)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)


def dice_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 sum s t + 1) / (sum s + sum t + 1), s = sigmoid(logits), of paired masks (M, P) -> (M,)."""
    s = logits.sigmoid()
    return 1 - (2 * (s * targets).sum(dim=1) + 1) / (s.sum(dim=1) + targets.sum(dim=1) + 1)


def pairwise_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`bce_losses` and `dice_losses` of every mask (Q, P) with every target (n, P), both (Q, n)."""
    bce = (F.softplus(-logits) @ targets.T + F.softplus(logits) @ (1 - targets).T) / logits.shape[1]
    s = logits.sigmoid()
    return bce, 1 - (2 * s @ targets.T + 1) / (s.sum(dim=1)[:, None] + targets.sum(dim=1) + 1)


@torch.no_grad()
def match(classes: Tensor, masks: Tensor, labels: Tensor, targets: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """The assignment of least cost between queries and targets of one image.  Mask2Former, section 3.3

    Args: classes (Q, K + 1) and masks (Q, y, x), logits; labels (n,) and targets (n, H, W); all compared at the same
        `points` uniform places.
    Returns: indices of queries and of targets, both (min(Q, n),).
    """
    from scipy.optimize import linear_sum_assignment

    places = random_points(1, points, masks.device)
    bce, dice = pairwise_costs(sample(masks[None], places)[0], sample(targets[None].to(masks.dtype), places)[0])
    label = -classes.softmax(dim=-1)[:, labels]
    cost = WEIGHTS["bce"] * bce + WEIGHTS["label"] * label + WEIGHTS["dice"] * dice
    rows, columns = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
    return tuple(torch.as_tensor(indices, device=masks.device) for indices in (rows, columns))


def prediction_loss(classes: Tensor, masks: Tensor, targets: Targets, num_masks: float, points: int) -> Tensor:
    """Loss of one prediction (class logits (B, Q, K + 1), mask logits (B, Q, y, x)) against its own matching.

    Mask losses are sums over matched pairs, divided by `num_masks`; without any target they are 0, with a gradient.
    The class loss is a weighted mean over queries, with the sum of weights averaged over ranks: so DDP's mean of
    gradients is that of one process with the whole batch. Mask2Former divides by each rank's own sum.
    """
    classes, masks = widened(classes), widened(masks)
    pairs = [match(classes[i], masks[i], *target, points) for i, target in enumerate(targets)]
    image = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
    query = torch.cat([queries for queries, _ in pairs])
    labels, truths = (
        torch.cat([target[kind][order] for target, (_, order) in zip(targets, pairs, strict=True)]) for kind in (0, 1)
    )
    wanted = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)  # no object
    wanted[image, query] = labels
    logits = masks[image, query]                                                      # (M, y, x), truths (M, H, W)
    weight = classes.new_ones(classes.shape[2])
    weight[-1] = NO_OBJECT
    label = F.cross_entropy(classes.flatten(0, 1), wanted.flatten(), weight, reduction="sum")
    label = label * world_size() / all_sum(weight[wanted].sum()[None])[0]
    places = uncertain_points(logits, points)
    logits, truths = (sample(maps[:, None].to(masks.dtype), places)[:, 0] for maps in (logits, truths))
    bce, dice = (losses(logits, truths).sum() / num_masks for losses in (bce_losses, dice_losses))
    return WEIGHTS["label"] * label + WEIGHTS["bce"] * bce + WEIGHTS["dice"] * dice


def mean_masks(targets: Targets, device: torch.device) -> float:
    """Targets of a batch, averaged over ranks, at least 1: DDP's mean of gradients is then a mean over masks."""
    return max(1.0, agreed(device, sum(len(labels) for labels, _ in targets))[0])


def set_loss(outputs: list[tuple[Tensor, Tensor]], targets: Targets, num_masks: float, points: int) -> Tensor:
    """The sum of the losses of all predictions: deep supervision."""
    with without_autocast(outputs[0][0].device):
        return sum(prediction_loss(*output, targets, num_masks, points) for output in outputs)


# ---- inference and metric --------------------------------------------------------------------------------------------


def class_scores(output: tuple[Tensor, Tensor], padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Sum over queries of p(class) sigmoid(mask), (B, K, *size), from one prediction; "no object" is left out.

    Masks are resized to the padded image before the sigmoid; then the padding is cut off.
    """
    classes, masks = (widened(x) for x in output)
    masks = F.interpolate(masks, size=padded, mode="bilinear", align_corners=False).sigmoid()
    masks = masks[:, :, : size[0], : size[1]]
    return torch.einsum("bqk,bqyx->bkyx", classes.softmax(dim=-1)[..., :-1], masks)


def resized_argmax(scores: Tensor, size: tuple[int, int], at_once: int = 16) -> Tensor:
    """(B, K, y, x) -> the class with the highest score after bilinear resizing, (B, *size).

    A few classes at a time: at the size of a photograph all 150 would not fit into memory.
    """
    best = scores.new_full((len(scores), *size), -math.inf)
    labels = torch.zeros_like(best, dtype=torch.int64)
    for first in range(0, scores.shape[1], at_once):
        part = F.interpolate(scores[:, first : first + at_once], size=size, mode="bilinear", align_corners=False)
        highest, arg = part.max(dim=1)
        labels = torch.where(highest > best, first + arg, labels)
        best = torch.maximum(best, highest)
    return labels


def segment(
    model: Segmenter, images: Tensor, size: tuple[int, int], args: argparse.Namespace, device: torch.device
) -> Tensor:
    """Labels (B, *size) of uint8 images (B, 3, h, w), which the model sees at their own size."""
    with autocast(args, device):
        outputs = model(to_model_input(images, device))
    with without_autocast(device):
        seen = tuple(images.shape[2:])
        return resized_argmax(class_scores(outputs[-1], model.padded(seen), seen), size)


class Scores(nn.Module):
    """What `--export` writes of a segmenter: (1, 3, H, W) normalised pixels -> class scores (1, K, H, W). H and W are
    multiples of `stride`: who runs it pads images."""

    images = 1  # at a time: to torch.export one image and more are two graphs of torch's multi-head attention

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        return class_scores(self.segmenter(x)[-1], self.segmenter.padded(size), size)


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64: pixels by predicted class (row) and true class (column), ignored ones left out."""
    known = labels != IGNORE
    pairs = predicted[known].long() * num_classes + labels[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def metrics_of(matrix: Tensor, classes: list[str]) -> dict:
    """mIoU, mAcc and pAcc in percent, and the IoU of each class, None where it does not occur.

    Means are over the classes that occur in the ground truth. With a class "background" also iou_background, and
    mIoU_foreground, the mean over the others; each is None where there are no such pixels.
    """
    hits, truth, guessed = matrix.diagonal().double(), matrix.sum(dim=0).double(), matrix.sum(dim=1).double()
    present = truth > 0
    iou, accuracy = 100 * hits / (truth + guessed - hits), 100 * hits / truth
    metrics = dict(
        mIoU=iou[present].mean().item(),
        mAcc=accuracy[present].mean().item(),
        pAcc=(100 * hits.sum() / truth.sum()).item(),
        iou={name: value if there else None for name, value, there in zip(classes, iou.tolist(), present, strict=True)},
    )
    if "background" in classes:
        others = metrics["iou"] | dict(background=None)
        others = [value for value in others.values() if value is not None]
        metrics["iou_background"] = metrics["iou"]["background"]
        metrics["mIoU_foreground"] = sum(others) / len(others) if others else None
    return metrics


@torch.inference_mode()
def evaluate(model: Segmenter, loader: DataLoader, args: argparse.Namespace, device: torch.device) -> dict:
    """`metrics_of` the whole set at its original resolution, each image counted once over all ranks."""
    model.eval()
    classes = loader.dataset.base.classes
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    for images, labels in loader:
        predicted = segment(model, images, tuple(labels.shape[1:]), args, device)
        matrix += confusion(predicted, labels.to(device), len(classes))
    total = torch.tensor(all_sum(matrix))
    if not total.any():
        raise DataError(f"no pixel of the {len(loader.dataset)} images to evaluate has a label")
    return metrics_of(total, classes)


# ---- data ------------------------------------------------------------------------------------------------------------


class ShapeScenes(Shapes):
    """Rendered scenes of one shape each: (uint8 image (3, S, S), uint8 labels (S, S)); background is class 0."""

    classes = ["background", *SHAPES]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.scene(index)
        return torch.from_numpy(scene.image).permute(2, 0, 1), torch.from_numpy(scene.mask)


@contextlib.contextmanager
def annotation_file(path: Path) -> Iterator[Image.Image]:
    """A PNG of one 8-bit number per pixel; only its header is read. DataError names other files."""
    try:
        with Image.open(path) as image:
            if image.format != "PNG":
                raise DataError(f"annotation {path} is a {image.format} file: expected PNG, which keeps numbers")
            # Grey of fewer bits would be stretched to 0..255.
            if image.mode not in ("L", "P") or (image.mode == "L" and image.tile[0][3] != "L"):
                what = image.tile[0][3] if image.mode == "L" else image.mode
                raise DataError(f"annotation {path} has mode {what}: expected one number of 8 bits per pixel")
            yield image
    except DataError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataError(f"cannot read annotation {path}: {error}") from None


class SegmentationFolder(Dataset):
    """ADE20K's layout, images/SPLIT and annotations/SPLIT with PNGs of the same stem: (uint8 (3, H, W), uint8 (H, W)).

    In a file 0 is "no label" and 1..K are classes; here they are 255 and 0..K-1.
    Raises: ValueError for a missing folder or annotation; DataError for a file that does not fit,
    when it is read or by `check`.
    """

    def __init__(self, root: Path, split: str, classes: list[str]):
        self.classes = classes
        folders = [root / kind / split for kind in ("images", "annotations")]
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"no folder {folder}: images/ and annotations/ need training/ and validation/")
        images = sorted(path for path in folders[0].iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
        if not images:
            raise ValueError(f"no images in {folders[0]}")
        known = {path.name for path in folders[1].iterdir()}
        self.pairs = [(path, folders[1] / f"{path.stem}.png") for path in images]
        for image, annotation in self.pairs:
            if annotation.name not in known:
                raise ValueError(f"image {image} has no annotation {annotation}")

    def check(self, whole: int = 8) -> None:
        """Look at all files' headers and at the labels of up to `whole` items; DataError if bad."""
        for index, (image_path, annotation_path) in enumerate(self.pairs):
            with annotation_file(annotation_path) as annotation:
                size = annotation.size
            try:
                with Image.open(image_path) as image:
                    suspect = sorted(size) != sorted(image.size)  # EXIF may turn the image
            except Exception:  # a damaged file can raise nearly anything
                suspect = True
            if suspect or index % -(-len(self) // whole) == 0:
                self[index]  # which says what is wrong

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, annotation_path = self.pairs[index]
        image = read_image(image_path, upright=True)
        with annotation_file(annotation_path) as annotation:
            numbers = np.array(annotation)  # of a palette's image the indices, never colours
        if numbers.shape != (image.height, image.width):
            raise DataError(
                f"annotation {annotation_path} is {numbers.shape[1]} x {numbers.shape[0]} pixels, its image "
                f"{image_path} {image.width} x {image.height}"
            )
        if numbers.max(initial=0) > len(self.classes):
            raise DataError(f"annotation {annotation_path} has label {numbers.max()} of {len(self.classes)} classes")
        return v2.functional.pil_to_tensor(image), torch.from_numpy(numbers - np.uint8(1))  # 0 becomes 255


def class_names(root: Path, num_classes: int | None) -> list[str]:
    """The names in a folder's classes.txt (one a line) or objectInfo*.txt (ADE20K's), else numbers, 150 of them.

    Raises: ValueError for an empty or doubtful list, or one that is not of --num-classes.
    """
    found = [path for path in (root / "classes.txt", *sorted(root.glob("objectInfo*.txt"))) if path.is_file()]
    if not found:
        return [f"class {i}" for i in range(num_classes or 150)]
    source = found[0]
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {source}: {error}") from None
    if source.name != "classes.txt":  # Idx, ..., Name, separated by tabs, under a heading
        lines = [line.split("\t")[-1] for line in lines[1:]]
    names = [line.strip() for line in lines if line.strip()]
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if not 1 <= len(names) <= IGNORE or repeated:
        what = f"names {repeated[0]!r} twice" if repeated else f"names {len(names)} classes"
        raise ValueError(f"{source} {what}: expected 1..{IGNORE} different ones, one a line")
    if num_classes not in (None, len(names)):
        raise ValueError(f"--num-classes {num_classes}, but {source} names {len(names)}")
    return names


def open_split(args: argparse.Namespace, split: str) -> Dataset:
    """"train" or "val" of `args.data`, with `.classes`, not augmented. ValueError for bad data."""
    if args.data == "shapes":
        if args.num_classes not in (None, len(ShapeScenes.classes)):
            raise ValueError(f"--num-classes {args.num_classes}, but shapes has {len(ShapeScenes.classes)}")
        length = args.shapes_length if split == "train" else max(1, args.shapes_length // 64)
        return ShapeScenes(split, length, args.image_size, args.seed)
    root = Path(args.data)
    if not root.is_dir():
        raise ValueError(f"unknown data {args.data!r}: shapes or an existing folder of images/ and "
                         "annotations/ with training/ and validation/ each")  # fmt: skip
    folder = {"train": "training", "val": "validation"}[split]
    dataset = SegmentationFolder(root, folder, class_names(root, args.num_classes))
    if split == "val":  # a training set may be large: there a bad file stops the run when it is read
        try:
            dataset.check()
        except DataError as error:
            raise ValueError(error) from None
    return dataset


def fitted(size: tuple[int, int], short: int, long: int) -> list[int]:
    """(height, width) scaled such that the short edge is `short`, or the long edge `long` if it would be longer."""
    scale = min(short / min(size), long / max(size))
    return [max(1, int(side * scale + 0.5)) for side in size]


def random_resize(image: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Short edge one of 0.5, 0.6, ..., 2.0 times `size`, long edge up to 4 times."""
    edges = [int(0.1 * k * size) for k in range(5, 21)]
    shape = fitted(tuple(labels.shape), edges[torch.randint(len(edges), ())], 4 * size)
    # Not as a Mask: torchvision takes its pixels from half an output pixel too far left and up, on average.
    plain, exact = labels.as_subclass(Tensor)[None], v2.InterpolationMode.NEAREST_EXACT
    resized = v2.functional.resize(plain, shape, interpolation=exact)[0]
    return v2.functional.resize(image, shape), tv_tensors.Mask(resized)


def random_crop(image: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A random window of `size` x `size`, or less where the image is smaller."""
    kept = [min(size, side) for side in labels.shape]
    corner = [int(torch.randint(side - k + 1, ())) for side, k in zip(labels.shape, kept, strict=True)]
    return v2.functional.crop(image, *corner, *kept), v2.functional.crop(labels, *corner, *kept)


def pad_to(image: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pad at the bottom and right to `size` x `size`, images with grey, labels with "ignore"."""
    edges = [0, 0, size - labels.shape[1], size - labels.shape[0]]
    return v2.functional.pad(image, edges, fill=GREY), v2.functional.pad(labels, edges, fill=IGNORE)


def shift_brightness(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the images get lighter or darker by up to 32 of 255."""
    if torch.rand(()) < 0.5:
        shift = int(torch.randint(-32, 33, ()))
        image = tv_tensors.Image((image.int() + shift).clamp(0, 255).to(torch.uint8))
    return image, labels


def colour_jitter() -> v2.Transform:
    """SSD's colour augmentation, arXiv:1512.02325, section 2.2: each change in half of the images, in two orders.

    SSD's contrast is torchvision's brightness, a factor on pixel values. Saturation blends with grey, where Mask2Former
    scales HSV's S. Hue moves by up to 36 degrees.
    """

    def half(**ranges) -> v2.Transform:
        return v2.RandomApply([v2.ColorJitter(**ranges)], p=0.5)

    contrast, saturation, hue = half(brightness=(0.5, 1.5)), half(saturation=(0.5, 1.5)), half(hue=0.1)
    return v2.RandomChoice([v2.Compose([contrast, saturation, hue]), v2.Compose([saturation, hue, contrast])])


def train_transform(args: argparse.Namespace) -> Callable:
    """(uint8 Image (3, H, W), Mask (H, W)) -> augmented ones, (3, S, S) and (S, S)."""
    flip = v2.RandomHorizontalFlip()
    steps = [flip]
    if args.data != "shapes":  # rendered at the size they are wanted
        resize, crop, pad = (partial(step, size=args.image_size) for step in (random_resize, random_crop, pad_to))
        steps = [resize, crop, shift_brightness, colour_jitter(), flip, pad]
    return v2.Compose(steps)


def resized_whole(image: Tensor, labels: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """For evaluation: the image with its short edge at `size`, long edge up to 4 times that; labels as they are."""
    return v2.functional.resize(image, fitted(tuple(image.shape[1:]), size, 4 * size)), labels


class Pairs(Augmented):
    """`Augmented` whose transform changes image and labels together; its items are plain tensors."""

    def apply(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        pair = self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return tuple(x.as_subclass(Tensor) for x in pair)


class IntervalSampler(EpochSampler):
    """This rank's items, as (pass, index), of an interval: of so many items, whatever the length of the data set.

    Training order is an endless sequence of permutations, one per pass. Interval `epoch` is its items from
    epoch * interval on: nothing is left out, and a set may be smaller than a batch.
    """

    def __init__(self, length: int, interval: int, *, rank: int = 0, world: int = 1, seed: int = 0):
        """interval: items per interval over all ranks, a multiple of the global batch."""
        super().__init__(length, rank=rank, world=world, seed=seed)
        self.interval = interval

    def __len__(self) -> int:
        return len(range(self.rank, self.interval, self.world)[self.start :])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        current, order = -1, None
        first = self.epoch * self.interval
        for position in range(first + self.rank, first + self.interval, self.world)[self.start :]:
            passed, place = divmod(position, self.length)
            if passed != current:
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, passed))
                current, order = passed, torch.randperm(self.length, generator=generator)
            yield passed, int(order[place])


# ---- recipe ----------------------------------------------------------------------------------------------------------


def kind_of(args: argparse.Namespace) -> str:
    """The row of DATA_DEFAULTS: "shapes" or "folder"."""
    return "shapes" if args.data in (None, "shapes") else "folder"


def interval_and_run(args: argparse.Namespace, images: int) -> tuple[int, int]:
    """Steps from one log record to the next, and of the run. The log calls such an interval an epoch."""
    bounds = [args.max_steps] if args.max_steps else []
    if args.epochs:
        bounds.append(max(1, args.epochs * images // args.global_batch))
    total_steps = min(bounds, default=STEPS[kind_of(args)])
    return min(args.eval_steps, total_steps), total_steps


def make_model(args: argparse.Namespace, num_classes: int, image_size: int) -> Segmenter:
    """The model that resolved flags describe. Raises ValueError as `build_segmenter` does, and where a GroupNorm would
    have a single number to normalise."""
    coarsest = 2 * args.patch_size  # stride of the coarsest map, pixels
    if args.width == 32 and image_size <= coarsest:
        raise ValueError(
            f"--width 32 with --patch-size {args.patch_size} needs an --image-size above "
            f"{coarsest}, got {image_size}: a GroupNorm would see one number"
        )
    named = ("width", "queries", "layers", "encoder_layers", "patch_size", "drop_path")
    options = {name: getattr(args, name) for name in named} | run.core_options(args)
    return build_segmenter(args.model, args.attention, num_classes, args.pixel_decoder, image_size, **options)


def parameter_groups(model: nn.Module, weight_decay: float, backbone_lr: float) -> list[dict]:
    """By learning rate (`lr_scale`: `backbone_lr` for the backbone, pyramid included) and weight decay.

    Norms, embeddings and position tables do not decay. Biases do, as in Mask2Former.
    """
    groups = {}
    for layer, module in model.named_modules():
        exempt = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Embedding)
        scale = backbone_lr if layer.split(".")[0] == "backbone" else 1.0
        for name, parameter in module.named_parameters(recurse=False):
            decay = 0.0 if exempt or name == "pos_embed" else weight_decay
            groups.setdefault((scale, decay), []).append(parameter)
    return [dict(params=params, lr_scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]


def learning_rate(args: argparse.Namespace, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (0-based): polynomial decay of power 0.9 to zero, no warm-up."""
    return args.lr * args.global_batch / LR_BATCH * (1 - step / total_steps) ** 0.9


# ---- training --------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train to the end, a checkpoint, an evaluation and a log line per interval; then the castling report."""
    with run.checked(args):
        resolve(args)
        train_set, val_set = open_split(args, "train"), open_split(args, "val")
        run.same_classes(args, train_set, val_set)
        interval, total_steps = interval_and_run(args, len(train_set))
        if args.ema_decay is None:
            args.ema_decay = run.ema_decay_for(total_steps)

        torch.manual_seed(args.seed)  # the same first weights on every rank
        model = make_model(args, len(train_set.classes), args.image_size)
        run.start_from(model, args, load_start)
        model.to(device)
        ema = run.averaged(model, args.ema_decay)
        optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, args.backbone_lr))

        order = dict(rank=rank(), world=world_size())
        sampler = IntervalSampler(len(train_set), interval * args.global_batch, seed=args.seed, **order)
        augmented = Pairs(train_set, train_transform(args), args.seed)
        train_loader = make_loader(augmented, sampler, args.batch_size, args.workers)
        val_loader = validation_loader(args, val_set)
        state = run.Run(
            args, train_set.classes, model, ema, optimizer, train_loader, device,
            steps_per_epoch=interval, total_steps=total_steps, metrics=METRICS,
        )  # fmt: skip

    net, scaler = run.parallel(model, args, device), state.scaler
    with state:
        state.bar.say(run.describe(state, describe_recipe(state), val_set))
        for _ in state.epochs():                                                           # each is one interval
            net.train()
            for batches in state.steps(train_loader):
                set_threshold(model, state.progress)                                       # Eq. (10), D4
                lr = run.set_lr(optimizer, learning_rate(args, state.step, total_steps))
                loss = torch.zeros((), device=device)
                for i, (images, labels) in enumerate(batches):
                    net.require_backward_grad_sync = i == len(batches) - 1                 # DDP: once a step
                    images, labels = to_model_input(images, device), labels.to(device)
                    targets = targets_of(labels, model.padded(labels.shape[1:]))
                    num_masks = mean_masks(targets, device)
                    with autocast(args, device):
                        outputs = net(images)
                    part = set_loss(outputs, targets, num_masks, args.points) / len(batches)
                    scaler.scale(part).backward()
                    loss += part.detach()
                state.agree(loss, lr)                                                      # NaN stops every rank
                if args.clip_grad > 0:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                ema.update_parameters(model)

            metrics = {}
            if state.evaluation_due():                                                     # with and without branch
                metrics = run.evaluate_castling(lambda m: evaluate(m, val_loader, args, device), ema.module, "mIoU")
            state.log(metrics)
        state.report()


def validation_loader(args: argparse.Namespace, val_set: Dataset) -> DataLoader:
    """This rank's share of the validation set; images of a folder one by one, since their sizes differ."""
    sampler = EpochSampler(len(val_set), rank=rank(), world=world_size())
    batch_size = args.batch_size if args.data == "shapes" else 1
    pairs = Pairs(val_set, partial(resized_whole, size=args.image_size), args.seed)
    return make_loader(pairs, sampler, batch_size, args.workers)


def describe_recipe(state: run.Run) -> str:
    """Optimiser, learning rate and what is compared."""
    a = state.args
    passes = state.total_steps * a.global_batch / state.images
    return f"""an epoch of the log is {state.steps_per_epoch} steps; the run is {passes:.4g} passes over the images
recipe: adamw, learning rate {a.lr * a.global_batch / LR_BATCH:.4g} ({a.lr} per {LR_BATCH} images, x {a.backbone_lr} \
for the backbone), polynomial decay, weight decay {a.weight_decay}, gradient norm at most {a.clip_grad}, \
EMA {a.ema_decay:.5f}
decoder: {a.pixel_decoder}, {a.queries} queries, {a.layers} layers, losses at {a.points} points"""


# ---- drawing ---------------------------------------------------------------------------------------------------------


def colour_of(index: int) -> tuple[int, int, int]:
    """A class's colour, one of 180: 30 hues, neighbours far apart, in three brightnesses and two saturations."""
    hue, shade = index * 7 % 30 / 30, index // 30
    saturation, value = (1.0, 0.5)[shade % 2], (1.0, 0.75, 0.5)[shade % 3]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def shares_of(labels: np.ndarray, classes: list[str]) -> dict[str, float]:
    """{class: share of pixels} of what a label map (H, W) holds, largest first."""
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    return {classes[i]: counts[i] / labels.size for i in np.argsort(-counts, kind="stable") if counts[i]}


def overlay(image: Image.Image, labels: np.ndarray, classes: list[str]) -> Image.Image:
    """The image under the colours of its labels (H, W), with a legend of the classes found below."""
    colours = np.array([colour_of(i) for i in range(len(classes))], np.uint8)
    blended = Image.blend(image, Image.fromarray(colours[labels]), 0.5)
    shares, font, line = shares_of(labels, classes), ImageFont.load_default(), 16
    texts = [f"{name} {share:.1%}" for name, share in shares.items()]
    width = max(image.width, *(math.ceil(font.getlength(text)) + 2 * line for text in texts))
    canvas = Image.new("RGB", (width, image.height + line * len(shares) + 4), "white")
    canvas.paste(blended, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (name, text) in enumerate(zip(shares, texts, strict=True)):
        top = image.height + 4 + line * row
        draw.rectangle((4, top, line, top + line - 4), fill=colour_of(classes.index(name)))
        draw.text((line + 6, top), text, fill="black", font=font)
    return canvas


# ---- what is done with a checkpoint ----------------------------------------------------------------------------------


def load(args: argparse.Namespace, classes: list | None = None) -> tuple[Segmenter, list]:
    """The model in --checkpoint, ready to be used, and the classes it knows; `classes` if the file does not say."""
    trained = run.settings_for(args)
    resolve(args, trained)
    classes = trained.get("classes") or classes
    if not classes:
        rows = run.count_classes(args.checkpoint, ["decoder.class_head.weight"])
        classes = [f"class {i}" for i in range(rows - 1)]  # the last row is "no object"
    model = make_model(args, len(classes), trained.get("image_size") or args.image_size)
    return run.load_trained(model, args), classes


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """--eval: prints the metrics of the checkpoint with and without its auxiliary branch."""
    with run.checked(args):
        resolve(args, run.settings_for(args))
        val_set = open_split(args, args.split)
        model, classes = load(args, val_set.classes)
        run.check_classes(args, classes, val_set.classes)
        loader = validation_loader(args, val_set)
    record = run.evaluate_castling(lambda m: evaluate(m, loader, args, device), model.to(device), "mIoU")
    run.print_evaluation(args, record, METRICS)


@torch.inference_mode()
def predict(args: argparse.Namespace, device: torch.device) -> None:
    """--image: draws the classes of each file over it and prints their shares of its pixels.

    With --json the shares are one JSON list, {"image": file, "shares": {class: share}} for each file, also where a
    later one cannot be read; then only a given --output is drawn to.
    """
    with run.checked(args):
        targets = run.drawing_paths(args.image, args.output, "overlay")
        if args.data is None and not run.settings_for(args):
            args.data = "folder"  # somebody else's model: the size of photographs
        model, classes = load(args)
    model.to(device)
    with run.json_list(args) as found:
        for path, image in run.read_each(targets):
            pixels, _ = resized_whole(v2.functional.pil_to_tensor(image), None, args.image_size)
            labels = segment(model, pixels[None], (image.height, image.width), args, device)[0].cpu().numpy()
            shares = shares_of(labels, classes)
            found.append(dict(image=str(path), shares=shares))
            if args.output is not None or not args.json:
                run.write_image(overlay(image, labels, classes), targets[path])
            if not args.json:
                text = ", ".join(f"{name} {part:.1%}" for name, part in shares.items())
                say(f"{path}: {text}, drawn to {targets[path]}")


# ---- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of segment.py; what is left None is filled in by `resolve`."""
    p = run.Parser(
        "segment.py", __doc__,
        epilog=f"models: {', '.join(SEGMENTERS)}\n"
        "data: shapes, of which 1 in 64 as many validate, or a folder with training/ and validation/ in images/ and in "
        "annotations/, and class names in classes.txt or objectInfo*.txt\n"
        f"steps of a run that neither --epochs nor --max-steps bounds: "
        f"{', '.join(f'{steps} for {data}' for data, steps in STEPS.items())}",
    )  # fmt: skip
    recipe = run.shared_flags(p, DATA_DEFAULTS)

    def add(flag: str, kind: Callable, text: str) -> None:
        default = run.by_data(flag[2:].replace("-", "_"), DATA_DEFAULTS)
        recipe.add_argument(flag, type=kind, help=f"{text}; {default}")

    recipe.add_argument("--pixel-decoder", choices=list(PIXEL_DECODERS), help="default fpn_transformer, which the "
                        "paper's counts fit; msdeform is Mask2Former's")  # fmt: skip
    recipe.add_argument("--num-classes", type=at_least(1, most=IGNORE), help="of a folder that does not name its "
                        "classes; default 150")  # fmt: skip
    add("--eval-steps", at_least(1), "optimiser steps of an interval, which the log and --eval-every call an epoch")
    add("--patch-size", at_least(4), "pixels; the pyramid has strides of 1/4, 1/2, 1 and 2 patches")
    add("--width", at_least(32), "channels of pyramid and decoders")
    add("--queries", at_least(1), "masks that are predicted per image")
    add("--layers", at_least(1), "of the masked decoder")
    add("--encoder-layers", at_least(1), "of the pixel decoder")
    add("--points", at_least(4), "places at which masks are compared")
    add("--drop-path", share, "stochastic depth of the backbone")
    add("--weight-decay", at_least(0, float), "of AdamW")
    add("--backbone-lr", at_least(0, float), "factor on the learning rate of ViT and pyramid")
    add("--clip-grad", at_least(0, float), "largest gradient norm over all parameters, 0 for no limit")
    add("--ema-decay", share, "of the averaged weights, 0 for none; a horizon of 4%% of the run where not given")
    return p


def resolve(args: argparse.Namespace, trained: dict | None = None) -> None:
    """Fill in every flag that was not given: from `trained`, a checkpoint's settings, else from the recipe table."""
    run.take_over(args, trained or {})
    run.fill_in(args, dict(pixel_decoder="fpn_transformer") | DATA_DEFAULTS[kind_of(args)])


def main(args: argparse.Namespace) -> None:
    fast.enable()
    with run.session(args, "segment.py") as (task, device):
        if task == "train":
            train(args, device)
        elif task == "eval":
            evaluate_checkpoint(args, device)
        elif task == "image":
            predict(args, device)
        else:
            with run.checked(args):
                model, _ = load(args)
            run.write_export(Scores(model), args)


if __name__ == "__main__":
    main(parser().parse_args())
