"""Train a semantic segmenter: Mask2Former with a dense Castling-ViT backbone.

    python segment.py                                              built-in rendered scenes
    torchrun --nproc-per-node=8 segment.py --data ADEChallengeData2016 --batch-size 2 \\
        --checkpoint mae_pretrain_vit_base.pth                     on eight GPUs
    python segment.py --eval --checkpoint runs/X/best.pt           prints mIoU
    python segment.py --checkpoint runs/X/best.pt --image photo.jpg --output overlay.png

The backbone trains with a softmax branch in its attention. Castling removes the branch after
training. Evaluation is done with and without it. The same command again continues a stopped run.
The training loop is the function `train`. The file run.py has what it calls.
"""

# Mask2Former  Cheng et al., arXiv:2112.01527;  facebookresearch/Mask2Former @ 161be51, mask2former/.
#              Recipe: configs/ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml
# Pyramid      ViTDet, Li et al., arXiv:2203.16527, section 3;  detectron2, modeling/backbone/vit.py
# Castling     arXiv:2211.10526v4, section 4.2. Where its text is silent, the parameters and MACs of
#              its Table 4 decide (D8).
#
# A pyramid gives the decoders maps at several strides, in pixels of the image: 4, 8, 16 and 32 for
# patches of 16 pixels, and p/4, p/2, p, 2p for patches of p pixels. Comments in the code have
# p = 16.
# A query predicts a mask and its class. A target is a true mask and its class.
# Shapes: B images, K classes, Q queries, C channels, N tokens. Maps are (B, C, y, x). Token grids
# are row-major.
# Labels: 0..K-1, and 255 for pixels without a label.

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
from torchvision.models.convnext import LayerNorm2d
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
from models import VIT_DENSE, DenseViT, build_model
from run import all_sum, at_least, autocast, mean_over_ranks, rank, say, share, world_size

METRICS = {"mIoU": "mIoU", "mAcc": "mAcc", "pAcc": "pAcc"}  # printed; the first one chooses best.pt

SEGMENTERS = {name.removesuffix("_dense"): name for name in VIT_DENSE}  # name: its backbone

IGNORE = 255  # label of pixels that belong to no class
WEIGHTS = dict(label=2.0, bce=5.0, dice=5.0)  # of the three losses, and of the three matching costs
NO_OBJECT = 0.1  # weight, in the class loss, of queries without a target
GREY = 128  # pads training crops, before normalisation

# Defaults by kind of data. Folders have Mask2Former's recipe for ADE20K. The rendered scenes have a
# narrow model and a short recipe of our own, made for two CPU cores.
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
STEPS = {"folder": 160_000, "shapes": 2000}  # of a run without --epochs and --max-steps
LR_BATCH = 16  # `lr` is the first rate for this many images per step. It scales with that number.


def widened(x: Tensor) -> Tensor:
    """x in float32 or wider. Sampling positions, mask products and losses need that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- backbone: dense ViT and simple feature pyramid ----------------------------------------------


class PyramidBackbone(nn.Module):
    """Pixels (B, 3, H, W) -> four maps of `width` channels, at strides 4, 8, 16, 32.

    All are made from the last map of the ViT. H and W are multiples of twice the patch size.
    Source: ViTDet, arXiv:2203.16527, section 3, "simple feature pyramid".
    """

    def __init__(self, vit: DenseViT, width: int):
        super().__init__()
        half, quarter = vit.dim // 2, vit.dim // 4
        norm = partial(LayerNorm2d, eps=1e-6)  # over the channels of each pixel

        def level(channels: int, *resize: nn.Module) -> nn.Sequential:
            convolutions = nn.Conv2d(channels, width, 1, bias=False), nn.Conv2d(width, width, 3, padding=1, bias=False)
            return nn.Sequential(*resize, *(layer for conv in convolutions for layer in (conv, norm(width))))

        def twice(channels: int, out: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(channels, out, 2, stride=2)

        self.vit = vit
        self.pyramid = nn.ModuleList([
            level(quarter, twice(vit.dim, half), norm(half), nn.GELU(), twice(half, quarter)),
            level(half, twice(vit.dim, half)),
            level(vit.dim),
            level(vit.dim, nn.MaxPool2d(2)),
        ])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.vit(x)
        return [level(x) for level in self.pyramid]


# ---- parts of both decoders ----------------------------------------------------------------------


def sine_positions(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """Positions of a token grid as sines and cosines, (N, dim) float32.

    The first dim / 2 channels are for y, the others for x. Token i = 1..n on an axis of n tokens has
    the phase 2 pi i / n. Channel j of an axis has the sine (j even) or cosine (j odd) of
    phase / 10000^(2 floor(j / 2) / (dim / 2)).
    Source: Mask2Former, transformer_decoder/position_encoding.py.
    """
    channel = torch.arange(dim // 2, device=device)
    wavelength = 10000 ** ((channel - channel % 2) / (dim // 2))

    def axis(n: int) -> Tensor:
        phase = torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi
        angle = phase[:, None] / wavelength
        return torch.where(channel % 2 == 0, angle.sin(), angle.cos())                # (n, dim / 2)

    y, x = axis(grid[0])[:, None], axis(grid[1])[None]
    return torch.cat([y.expand(*grid, -1), x.expand(*grid, -1)], dim=-1).flatten(0, 1)


def init_xavier(module: nn.Module) -> None:
    """Initialise matrices as Xavier-uniform, and leave vectors as they are, as in Mask2Former."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


def init_convs(module: nn.Module) -> None:
    """Initialise convolutions: Kaiming-uniform filters with a = 1, and biases 0.

    Source: detectron2, c2_xavier_fill, as Mask2Former's pixel decoders use it.
    """
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
    """Softmax attention: query (B, N, C), key and value (B, M, C) -> (B, N, C).

    blocked: (B H, N, M), True where a query may not look at a key.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
        return super().forward(query, key, value, attn_mask=blocked, need_weights=False)[0]


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward layer on (B, N, C), each followed by LayerNorm.

    `position`, (N, C), is added to queries and keys, but not to values.
    """

    def __init__(self, attn: nn.Module, dim: int, hidden: int):
        super().__init__()
        self.attn, self.norm1 = attn, nn.LayerNorm(dim)
        self.ffn, self.norm2 = FeedForward(dim, hidden), nn.LayerNorm(dim)

    def attend(self, x: Tensor, position: Tensor) -> Tensor:
        return self.attn(x + position, x + position, x)

    def forward(self, x: Tensor, *where) -> Tensor:
        x = self.norm1(x + self.attend(x, *where))
        return self.norm2(x + self.ffn(x))


# ---- pixel decoder A: FPN and transformer encoder ------------------------------------------------


class FPNTransformer(nn.Module):
    """Pixel decoder: four maps, finest first -> mask features at stride 4, [maps at 32, 16, 8].

    A transformer encoder runs on the coarsest map. Then finer maps are added to it one by one (FPN).
    The counts in the paper's Table 4 fit this pixel decoder, not Mask2Former's default (D8).
    Source: Mask2Former, pixel_decoder/fpn.py, TransformerEncoderPixelDecoder.
    """

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.input = nn.Conv2d(width, width, 1)
        self.encoder = nn.ModuleList(EncoderLayer(Attention(width, heads), width, 8 * width) for _ in range(layers))
        self.lateral = nn.ModuleList(conv_group_norm(width, 1) for _ in range(3))  # coarse to fine
        self.output = nn.ModuleList(conv_group_norm(width, 3) for _ in range(4))
        self.mask_features = nn.Conv2d(width, width, 3, padding=1)
        init_convs(self)
        init_xavier(self.encoder)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        # Encoder on the tokens of the coarsest map
        *finer, coarsest = maps
        grid = tuple(coarsest.shape[2:])
        x = rearrange(self.input(coarsest), "b c y x -> b (y x) c")
        position = sine_positions(grid, x.shape[2], x.device).to(x.dtype)
        for layer in self.encoder:
            x = layer(x, position)
        # Back to a map, then one finer map after the other
        y = F.relu(self.output[0](rearrange(x, "b (y x) c -> b c y x", y=grid[0])))
        levels = [y]
        for lateral, output, fine in zip(self.lateral, self.output[1:], reversed(finer), strict=True):
            y = F.relu(output(lateral(fine) + F.interpolate(y, size=fine.shape[2:], mode="nearest")))
            levels.append(y)
        return self.mask_features(y), levels[:3]


# ---- pixel decoder B: multi-scale deformable attention -------------------------------------------


def sample_levels(value: Tensor, grids: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of samples from several maps.  Deformable DETR, arXiv:2010.04159, Eq. (3)

    Samples are bilinear, and 0 outside a map. H heads, L maps, P points per head and map.

    Args:
        value: (B, T, H, D), the T tokens of all maps, map after map.
        grids: the size (y, x) of each map, in tokens.
        locations: (B, N, H, L, P, 2), the points (x, y) in each map. 0 and 1 are its outer edges.
        weights: (B, N, H, L, P).
    Returns: (B, N, H D), the channels of one head after those of the other.
    """
    heads, sampled = value.shape[2], []
    for level, tokens in enumerate(value.split([y * x for y, x in grids], dim=1)):
        maps = rearrange(tokens, "b (y x) h d -> (b h) d y x", y=grids[level][0])
        points = rearrange(2 * locations[:, :, :, level] - 1, "b n h p s -> (b h) n p s")
        sampled.append(F.grid_sample(maps, points, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = rearrange(weights, "b n h l p -> (b h) 1 n (l p)")
    return rearrange((torch.cat(sampled, dim=-1) * weights).sum(dim=-1), "(b h) d n -> b n (h d)", h=heads)


class DeformableAttention(nn.Module):
    """Each token attends to `points` places on each map, (B, T, C) -> (B, T, C).

    The token predicts the weights of the places, and their offsets from itself in pixels of the map.
    At first each head looks in one direction: at 1, 2, 3, ... pixels, with equal weights.
    Source: Deformable DETR, arXiv:2010.04159, section 4.1.
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
        way = torch.stack([angle.cos(), angle.sin()], dim=-1)                 # (H, 2), x and y
        way = way / way.abs().amax(dim=-1, keepdim=True)
        bias = torch.arange(1, points + 1)[:, None] * way[:, None, None]              # (H, 1, P, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, levels, -1, -1).flatten())

    def forward(self, query: Tensor, x: Tensor, references: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """Args:
            query, x: (B, T, C); x holds the tokens of all maps.
            references: (T, 2), the place (x, y) of each token on its own map, in 0..1.
            grids: as in `sample_levels`.
        """
        heads, levels, points = self.split
        offsets = self.offsets(query).unflatten(-1, (heads, levels, points, 2))
        weights = self.weights(query).unflatten(-1, (heads, levels * points)).softmax(dim=-1)
        sizes = torch.stack([offsets.new_full((), side) for y, x in grids for side in (x, y)]).view(levels, 2)
        locations = references[:, None, None, None] + offsets / sizes[:, None]  # (B, T, H, L, P, 2)
        value = self.value(x).unflatten(-1, (heads, -1))
        return self.out(sample_levels(value, grids, locations, weights.unflatten(-1, (levels, points))))


class DeformableLayer(EncoderLayer):
    """EncoderLayer with deformable attention, x: (B, T, C). Only queries get `position`."""

    def attend(self, x: Tensor, position: Tensor, references: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        return self.attn(x + position, x, references, grids)


def reference_points(grids: list[tuple[int, int]], like: Tensor) -> Tensor:
    """(T, 2): the centre (x, y) of each token of all maps; 0 and 1 are the edges of its map."""
    points = []
    for rows, columns in grids:
        y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (rows, columns))
        points.append(torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1).flatten(0, 1))
    return torch.cat(points)


class DeformableEncoder(nn.Module):
    """Pixel decoder: four maps, finest first -> mask features at stride 4, [maps at 32, 16, 8].

    This is Mask2Former's default: deformable attention on three maps. It runs in float32, because
    bfloat16 cannot tell neighbouring places of a large map apart.
    Source: Mask2Former, pixel_decoder/msdeformattn.py, MSDeformAttnPixelDecoder.
    """

    def __init__(self, width: int, heads: int, layers: int):
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
            # The tokens of three maps in one sequence, coarsest map first
            finest, *coarser = (widened(x) for x in maps)
            levels = [conv(x) for conv, x in zip(self.input, reversed(coarser), strict=True)]
            grids = [tuple(x.shape[2:]) for x in levels]
            x = torch.cat([rearrange(level, "b c y x -> b (y x) c") for level in levels], dim=1)  # (B, T, C)
            # Their positions, and a learned vector for each map
            position = torch.cat([
                sine_positions(grid, x.shape[2], x.device) + embed
                for grid, embed in zip(grids, self.level_embed, strict=True)
            ]).to(x.dtype)
            # Encoder
            references = reference_points(grids, x)
            for layer in self.encoder:
                x = layer(x, position, references, grids)
            # Back to maps; the finest of them, enlarged, joins the finest input
            parts = x.split([rows * columns for rows, columns in grids], dim=1)
            levels = [rearrange(t, "b (y x) c -> b c y x", y=g[0]) for t, g in zip(parts, grids, strict=True)]
            up = F.interpolate(levels[-1], size=finest.shape[2:], mode="bilinear", align_corners=False)
            return self.mask_features(F.relu(self.output(self.lateral(finest) + up))), levels


PIXEL_DECODERS = {"fpn_transformer": FPNTransformer, "msdeform": DeformableEncoder}


# ---- masked-attention decoder --------------------------------------------------------------------


def attention_mask(masks: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """Where queries may not look.  Mask2Former, arXiv:2112.01527, Eq. (2) and (3)

    The masks are resized to a map of size `grid`. A token is blocked if its probability in the mask
    is below one half. A query whose tokens are all blocked sees all: its softmax would be 0 / 0.

    Args: masks: (B, Q, y, x), logits.
    Returns: (B H, Q, N), True at blocked tokens.
    """
    resized = F.interpolate(widened(masks.detach()), size=grid, mode="bilinear", align_corners=False)
    blocked = resized.flatten(2) < 0                                          # sigmoid < 0.5
    blocked = blocked & ~blocked.all(dim=-1, keepdim=True)
    return blocked.repeat_interleave(heads, dim=0)


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and feed-forward layer, each followed by LayerNorm."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.cross, self.norm1 = Attention(dim, heads), nn.LayerNorm(dim)
        self.attn, self.norm2 = Attention(dim, heads), nn.LayerNorm(dim)
        self.ffn, self.norm3 = FeedForward(dim, hidden), nn.LayerNorm(dim)
        init_xavier(self)

    def forward(self, x: Tensor, position: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
        """Args:
            x: (B, Q, C), the queries.
            position: (Q, C), added to queries, and to the keys of self-attention.
            key, value: (B, N, C), the tokens of one map.
            blocked: (B H, Q, N), from `attention_mask`.
        """
        x = self.norm1(x + self.cross(x + position, key, value, blocked))
        x = self.norm2(x + self.attn(x + position, x + position, x))
        return self.norm3(x + self.ffn(x))


class MaskedDecoder(nn.Module):
    """Queries look at one map after the other.  Mask2Former, arXiv:2112.01527, section 3.2

    A query sees only the tokens in its latest mask. Returns one prediction of the first queries,
    and one after each layer. A prediction is a pair: class logits (B, Q, K + 1), where the last
    class is "no object", and mask logits (B, Q, y, x) at stride 4.
    """

    def __init__(self, width: int, num_classes: int, heads: int, queries: int, layers: int):
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
        """Class and mask logits of queries (B, Q, C). The next layer gets x, not the normed y."""
        y = self.norm(x)
        embed = self.mask_head(y)
        with without_autocast(x.device):
            masks = torch.einsum("bqc,bcyx->bqyx", widened(embed), widened(mask_features))
        return self.class_head(y), masks

    def forward(self, mask_features: Tensor, levels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        # Keys and values of each map. Keys have positions, values have none.
        memories = []
        for level, embed in zip(levels, self.level_embed.weight, strict=True):
            grid, value = tuple(level.shape[2:]), rearrange(level, "b c y x -> b (y x) c") + embed
            memories.append((grid, value + sine_positions(grid, value.shape[2], value.device).to(value.dtype), value))
        # Layer by layer, one map each, within the masks predicted before
        x = self.query_feat.weight.repeat(len(mask_features), 1, 1)                    # (B, Q, C)
        outputs = [self.predict(x, mask_features)]
        for i, layer in enumerate(self.layers):
            grid, key, value = memories[i % len(memories)]
            blocked = attention_mask(outputs[-1][1], grid, self.heads)
            x = layer(x, self.query_embed.weight, key, value, blocked)
            outputs.append(self.predict(x, mask_features))
        return outputs


class Segmenter(nn.Module):
    """Normalised pixels (B, 3, H, W) -> the predictions of `MaskedDecoder`. Any H x W.

    Images are padded with zeros at the bottom and right, to multiples of `stride`, the coarsest.
    """

    def __init__(self, vit: DenseViT, num_classes: int, pixel_decoder: str, width: int, heads: int, queries: int,
                 layers: int, encoder_layers: int):  # fmt: skip
        super().__init__()
        self.stride = 2 * vit.patch_size
        self.backbone = PyramidBackbone(vit, width)
        self.pixel_decoder = look_up(PIXEL_DECODERS, pixel_decoder, "pixel decoder")(width, heads, encoder_layers)
        self.decoder = MaskedDecoder(width, num_classes, heads, queries, layers)

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size to which images of `size` are padded. Both are (height, width)."""
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
        name: a key of SEGMENTERS.
        attention: of the backbone, as in `build_model`. The decoders have softmax attention.
        pixel_decoder: a key of PIXEL_DECODERS (D8).
        image_size: pixels; the position embeddings are made for it.
        width: C of the pyramid and the decoders. heads: of the decoders. queries: Q.
        layers: how many the masked decoder has. encoder_layers: how many the pixel decoder has.
        overrides: options of the backbone: patch_size, depth, drop_path, epsilon, schedule, ...
    Raises: ValueError for unknown names, with similar ones, and for sizes that do not fit together.
    """
    backbone = look_up(SEGMENTERS, name, "segmenter")
    if num_classes < 1 or num_classes > IGNORE:
        raise ValueError(f"num_classes must be within 1..{IGNORE}, got {num_classes}")
    for what, value in dict(heads=heads, queries=queries, layers=layers, encoder_layers=encoder_layers).items():
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    if width < 32 or width % 32 or width % heads:
        raise ValueError(f"width must be a multiple of 32 (the groups of GroupNorm) and of heads={heads}, got {width}")
    patch_size = overrides.get("patch_size", 16)
    if patch_size < 4 or patch_size % 4:
        raise ValueError(f"patch_size must be a multiple of 4, got {patch_size}")
    vit = build_model(backbone, attention, image_size=image_size, **overrides)
    return Segmenter(vit, num_classes, pixel_decoder, width, heads, queries, layers, encoder_layers)


def load_start(model: Segmenter, path: str | Path) -> LoadReport:
    """`load_pretrained` of a segmenter, or of a ViT (MAE, DeiT, timm) into the backbone.

    A class layer of another number of classes keeps its initial values.
    """
    if any(name.startswith("backbone.") for name in weights_in(read_checkpoint(path))):
        return load_pretrained(model, path, class_layers=("decoder.class_head.",))
    prefix = "backbone.vit."
    report = load_pretrained(model.backbone.vit, path)
    for group in (report.loaded, report.resized, report.partly, report.new):
        group[:] = [prefix + name for name in group]
    report.new += [name for name in model.state_dict() if not name.startswith(prefix)]
    return report


# ---- matching and losses -------------------------------------------------------------------------

# For each image, the n classes in it: their labels (n,) and their masks (n, H, W), boolean
Targets = list[tuple[Tensor, Tensor]]


def targets_of(labels: Tensor, padded: tuple[int, int]) -> Targets:
    """The targets of label maps (B, H, W): one for each class in an image.

    Masks have the size `padded`, (height, width), which the model sees. Pixels without a label, and
    padding, are in no mask.
    """
    padding = (0, padded[1] - labels.shape[2], 0, padded[0] - labels.shape[1])
    targets = []
    for label in F.pad(labels, padding, value=IGNORE):
        present = label.unique()
        present = present[present != IGNORE]
        targets.append((present.long(), label[None] == present[:, None, None]))
    return targets


def random_points(masks: int, points: int, device: torch.device) -> Tensor:
    """(masks, points, 2): random places (x, y), uniform in 0..1."""
    return torch.rand(masks, points, 2, device=device)


def sample(maps: Tensor, places: Tensor) -> Tensor:
    """Bilinear samples of maps (N, C, y, x) at places (N, P, 2), (x, y) in 0..1 -> (N, C, P)."""
    return F.grid_sample(maps, 2 * places[:, :, None].to(maps.dtype) - 1, align_corners=False)[..., 0]


@torch.no_grad()
def uncertain_points(logits: Tensor, points: int, oversample: int = 3, uncertain: float = 0.75) -> Tensor:
    """Places at which masks (M, y, x) are compared with their targets, (M, points, 2).

    `oversample` times `points` random places are drawn. Those of least |logit| are taken, until they
    make up the share `uncertain` of the result. The rest of the result are new random places.
    Source: PointRend, arXiv:1912.08193, section 3.1.
    """
    candidates = random_points(len(logits), oversample * points, logits.device)
    certainty = sample(logits[:, None], candidates)[:, 0].abs()
    kept = certainty.topk(int(uncertain * points), largest=False).indices
    chosen = candidates.gather(1, kept[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, random_points(len(logits), points - kept.shape[1], logits.device)], dim=1)


def bce_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of M masks and their targets, both (M, P): mean over P points, (M,)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)


def dice_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss of M masks and their targets t, both (M, P) -> (M,), with s = sigmoid(logits):

    1 - (2 sum s t + 1) / (sum s + sum t + 1), where the sums run over P points.
    """
    s = logits.sigmoid()
    return 1 - (2 * (s * targets).sum(dim=1) + 1) / (s.sum(dim=1) + targets.sum(dim=1) + 1)


def pairwise_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`bce_losses` and `dice_losses` of each mask (Q, P) with each target (n, P): two of (Q, n)."""
    bce = (F.softplus(-logits) @ targets.T + F.softplus(logits) @ (1 - targets).T) / logits.shape[1]
    s = logits.sigmoid()
    return bce, 1 - (2 * s @ targets.T + 1) / (s.sum(dim=1)[:, None] + targets.sum(dim=1) + 1)


@torch.no_grad()
def match(class_logits: Tensor, masks: Tensor, labels: Tensor, truths: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Pair queries with targets of one image, at the least total cost.  Mask2Former, section 3.3

    Masks are compared at `points` random places, the same for all.

    Args:
        class_logits: (Q, K + 1). masks: (Q, y, x), logits.
        labels: (n,). truths: (n, H, W), the masks of the targets.
    Returns: the indices of the paired queries and of their targets, both (min(Q, n),).
    """
    from scipy.optimize import linear_sum_assignment

    places = random_points(1, points, masks.device)
    bce, dice = pairwise_costs(sample(masks[None], places)[0], sample(truths[None].to(masks.dtype), places)[0])
    label = -class_logits.softmax(dim=-1)[:, labels]
    cost = WEIGHTS["bce"] * bce + WEIGHTS["label"] * label + WEIGHTS["dice"] * dice
    rows, columns = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
    return tuple(torch.as_tensor(indices, device=masks.device) for indices in (rows, columns))


def prediction_loss(class_logits: Tensor, masks: Tensor, targets: Targets, num_masks: float, points: int) -> Tensor:
    """Loss of one prediction. `match` first pairs its queries with the targets.

    The mask losses are summed over pairs and divided by `num_masks`. Without targets they are 0, but
    still have a gradient. The class loss is a weighted mean over all queries. Its sum of weights is
    averaged over processes. So DistributedDataParallel's mean of gradients is the gradient of one
    process with the whole batch. In Mask2Former each process divides by its own sum.

    Args:
        class_logits: (B, Q, K + 1). masks: (B, Q, y, x), logits.
        num_masks: see `mean_masks`. points: how many places of a mask are compared.
    """
    class_logits, masks = widened(class_logits), widened(masks)
    # The M pairs: their images, queries, labels, true masks and predicted masks
    pairs = [match(class_logits[i], masks[i], *target, points) for i, target in enumerate(targets)]
    image = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
    query = torch.cat([queries for queries, _ in pairs])
    labels, truths = (
        torch.cat([target[kind][order] for target, (_, order) in zip(targets, pairs, strict=True)]) for kind in (0, 1)
    )
    # Class loss of all queries. Those without a target should say "no object".
    wanted = torch.full(class_logits.shape[:2], class_logits.shape[2] - 1, device=class_logits.device)
    wanted[image, query] = labels
    logits = masks[image, query]                                                      # (M, y, x)
    weight = class_logits.new_ones(class_logits.shape[2])
    weight[-1] = NO_OBJECT
    label = F.cross_entropy(class_logits.flatten(0, 1), wanted.flatten(), weight, reduction="sum")
    label = label * world_size() / all_sum(weight[wanted].sum()[None])[0]
    # Mask losses of the M pairs, at points
    places = uncertain_points(logits, points)
    logits, truths = (sample(maps[:, None].to(masks.dtype), places)[:, 0] for maps in (logits, truths))
    bce, dice = (losses(logits, truths).sum() / num_masks for losses in (bce_losses, dice_losses))
    return WEIGHTS["label"] * label + WEIGHTS["bce"] * bce + WEIGHTS["dice"] * dice


def mean_masks(targets: Targets, device: torch.device) -> float:
    """How many targets a batch has: the mean over processes, but at least 1.

    DistributedDataParallel's mean of gradients is then a mean over all masks.
    """
    return max(1.0, mean_over_ranks(device, sum(len(labels) for labels, _ in targets))[0])


def set_loss(outputs: list[tuple[Tensor, Tensor]], targets: Targets, num_masks: float, points: int) -> Tensor:
    """The sum of the losses of all predictions: those of every layer are trained."""
    with without_autocast(outputs[0][0].device):
        return sum(prediction_loss(*output, targets, num_masks, points) for output in outputs)


# ---- inference and metric ------------------------------------------------------------------------


def class_scores(output: tuple[Tensor, Tensor], padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Class scores of each pixel, (B, K, *size): the sum over queries of p(class) sigmoid(mask).

    Args:
        output: one prediction of `MaskedDecoder`. "No object" gets no scores.
        padded, size: (height, width) of the image, with and without padding.
    """
    class_logits, masks = (widened(x) for x in output)
    masks = F.interpolate(masks, size=padded, mode="bilinear", align_corners=False).sigmoid()
    masks = masks[:, :, : size[0], : size[1]]
    return torch.einsum("bqk,bqyx->bkyx", class_logits.softmax(dim=-1)[..., :-1], masks)


def resized_argmax(scores: Tensor, size: tuple[int, int], at_once: int = 16) -> Tensor:
    """The class with the highest score after bilinear resizing, (B, K, y, x) -> (B, *size).

    `at_once` classes are resized at a time. At the size of a photograph, all 150 would not fit into
    memory.
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
    """Labels (B, *size) of images (B, 3, h, w) uint8, which the model sees at their own size."""
    with autocast(args, device):
        outputs = model(to_model_input(images, device))
    with without_autocast(device):
        seen = tuple(images.shape[2:])
        return resized_argmax(class_scores(outputs[-1], model.padded(seen), seen), size)


class Scores(nn.Module):
    """The graph that `--export` writes: normalised pixels (1, 3, H, W) -> scores (1, K, H, W).

    H and W must be multiples of `multiple`, the segmenter's stride. Pad images yourself.
    """

    # The batch size. In torch.export, torch's multi-head attention has one graph for one image and
    # another graph for more.
    images = 1

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter, self.multiple = segmenter, segmenter.stride

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        return class_scores(self.segmenter(x)[-1], self.segmenter.padded(size), size)


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64: number of pixels by predicted class (row) and true class (column).

    Pixels without a label are left out.
    """
    known = labels != IGNORE
    pairs = predicted[known].long() * num_classes + labels[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def metrics_of(matrix: Tensor, classes: list[str]) -> dict:
    """Metrics in percent, from a `confusion` matrix.

    Returns:
        mIoU, mAcc: means of IoU and accuracy over the classes that occur in the ground truth.
        pAcc: the share of pixels that are right.
        iou: {class: IoU}, None for a class that does not occur.
        iou_background, mIoU_foreground, if a class is named "background": its IoU, and the mean
            over the other classes. Each is None if there are no such pixels.
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
    """`metrics_of` the whole set, at the original size of its images. All processes call this.

    The processes share the images, and each image is counted once.
    Raises: DataError if no pixel has a label.
    """
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


# ---- data ----------------------------------------------------------------------------------------


class ShapeScenes(Shapes):
    """Rendered scenes of one shape each: image (3, S, S) and labels (S, S), both uint8."""

    classes = ["background", *SHAPES]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.scene(index)
        return torch.from_numpy(scene.image).permute(2, 0, 1), torch.from_numpy(scene.mask)


@contextlib.contextmanager
def annotation_file(path: Path) -> Iterator[Image.Image]:
    """Open a PNG file of one 8-bit number per pixel. Pixels are not read yet.

    Raises: DataError that names a file of another kind.
    """
    try:
        with Image.open(path) as image:
            if image.format != "PNG":
                raise DataError(f"annotation {path} is a {image.format} file: expected PNG, which is exact")
            # Pillow would stretch the numbers of a grey image with fewer bits to 0..255.
            if image.mode not in ("L", "P") or (image.mode == "L" and image.tile[0][3] != "L"):
                what = image.tile[0][3] if image.mode == "L" else image.mode
                raise DataError(f"annotation {path} has mode {what}: expected one number of 8 bits per pixel")
            yield image
    except DataError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataError(f"cannot read annotation {path}: {error}") from None


class SegmentationFolder(Dataset):
    """A folder in ADE20K's layout: pairs of image (3, H, W) and labels (H, W), both uint8.

    The image is in images/SPLIT, and a PNG file of the same stem in annotations/SPLIT. In that file
    0 is "no label" and 1..K are classes. Here they are 255 and 0..K-1.
    Raises: ValueError for a missing folder or annotation. Reading an item, and `check`, raise
        DataError for a file that does not fit.
    """

    def __init__(self, root: Path, split: str, classes: list[str]):
        self.classes = classes
        folders = [root / kind / split for kind in ("images", "annotations")]
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"no folder {folder}: images/ and annotations/ need training/ and validation/ each")
        images = sorted(path for path in folders[0].iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
        if not images:
            raise ValueError(f"no images in {folders[0]}")
        known = {path.name for path in folders[1].iterdir()}
        self.pairs = [(path, folders[1] / f"{path.stem}.png") for path in images]
        for image, annotation in self.pairs:
            if annotation.name not in known:
                raise ValueError(f"image {image} has no annotation {annotation}")

    def check(self, whole: int = 8) -> None:
        """Raise DataError for a bad file: reads all headers, and up to `whole` items fully."""
        for index, (image_path, annotation_path) in enumerate(self.pairs):
            with annotation_file(annotation_path) as annotation:
                size = annotation.size
            try:
                with Image.open(image_path) as image:
                    suspect = sorted(size) != sorted(image.size)  # EXIF may turn the image
            except Exception:  # a damaged file can raise nearly anything
                suspect = True
            if suspect or index % -(-len(self) // whole) == 0:
                self[index]  # raises what is wrong

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, annotation_path = self.pairs[index]
        image = read_image(image_path, upright=True)
        with annotation_file(annotation_path) as annotation:
            numbers = np.array(annotation)  # of an image with a palette: indices, not colours
        if numbers.shape != (image.height, image.width):
            raise DataError(
                f"annotation {annotation_path} has {numbers.shape[1]} x {numbers.shape[0]} pixels, but its image "
                f"{image_path} has {image.width} x {image.height}"
            )
        if numbers.max(initial=0) > len(self.classes):
            raise DataError(f"annotation {annotation_path} has label {numbers.max()}, but there are "
                            f"{len(self.classes)} classes")  # fmt: skip
        labels = torch.from_numpy(numbers - np.uint8(1))  # 0 becomes 255
        return v2.functional.pil_to_tensor(image), labels


def class_names(root: Path, num_classes: int | None) -> list[str]:
    """Names of a folder's classes: in classes.txt, one a line, or in ADE20K's objectInfo*.txt.

    Without such a file they are "class 0", "class 1" and so on: `num_classes`, by default 150.
    Raises: ValueError for a name twice, no names, more than 255, or not `num_classes`.
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
        raise ValueError(f"{source} {what}: expected 1..{IGNORE} different names, one a line")
    if num_classes not in (None, len(names)):
        raise ValueError(f"--num-classes {num_classes}, but {source} names {len(names)} classes")
    return names


def open_split(args: argparse.Namespace, split: str) -> Dataset:
    """The split "train" or "val" of the data that flags name: ShapeScenes or SegmentationFolder.

    Raises: ValueError for unknown data, or an error in the files.
    """
    if args.data == "shapes":
        if args.num_classes not in (None, len(ShapeScenes.classes)):
            raise ValueError(f"--num-classes {args.num_classes}, but shapes has {len(ShapeScenes.classes)} classes")
        length = args.shapes_length if split == "train" else max(1, args.shapes_length // 64)
        return ShapeScenes(split, length, args.image_size, args.seed)
    root = Path(args.data)
    if not root.is_dir():
        raise ValueError(f"unknown data {args.data!r}: expected shapes, or a folder with images/ and "
                         "annotations/, which have training/ and validation/ each")  # fmt: skip
    folder = {"train": "training", "val": "validation"}[split]
    dataset = SegmentationFolder(root, folder, class_names(root, args.num_classes))
    if split == "val":  # not a training set, which may be large
        try:
            dataset.check()
        except DataError as error:
            raise ValueError(error) from None
    return dataset


def fitted(size: tuple[int, int], short: int, long: int) -> list[int]:
    """`size`, (height, width), scaled to a short edge of `short`, or to a long edge of `long`.

    The smaller scale of the two is taken.
    """
    scale = min(short / min(size), long / max(size))
    return [max(1, int(side * scale + 0.5)) for side in size]


def random_resize(image: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Resize to a random short edge: 0.5, 0.6, ... or 2.0 times `size`; long edge up to 4 times."""
    edges = [int(0.1 * k * size) for k in range(5, 21)]
    shape = fitted(tuple(labels.shape), edges[torch.randint(len(edges), ())], 4 * size)
    # torchvision's resize moves a Mask, on average by half an output pixel to the right and down.
    plain, exact = labels.as_subclass(Tensor)[None], v2.InterpolationMode.NEAREST_EXACT
    resized = v2.functional.resize(plain, shape, interpolation=exact)[0]
    return v2.functional.resize(image, shape), tv_tensors.Mask(resized)


def random_crop(image: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A random window of `size` x `size`, or less where the image is smaller."""
    kept = [min(size, side) for side in labels.shape]
    corner = [int(torch.randint(side - k + 1, ())) for side, k in zip(labels.shape, kept, strict=True)]
    return v2.functional.crop(image, *corner, *kept), v2.functional.crop(labels, *corner, *kept)


def pad_to(image: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pad at the bottom and right to `size` x `size`: the image with grey, labels with IGNORE."""
    padding = [0, 0, size - labels.shape[1], size - labels.shape[0]]
    return v2.functional.pad(image, padding, fill=GREY), v2.functional.pad(labels, padding, fill=IGNORE)


def shift_brightness(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Make half of the images lighter or darker, by up to 32 of 255."""
    if torch.rand(()) < 0.5:
        shift = int(torch.randint(-32, 33, ()))
        image = tv_tensors.Image((image.int() + shift).clamp(0, 255).to(torch.uint8))
    return image, labels


def colour_jitter() -> v2.Transform:
    """SSD's changes of colour, arXiv:1512.02325, section 2.2.

    Contrast, saturation and hue each change in half of the images. Contrast comes first or last.
    SSD's contrast is torchvision's brightness: a factor on pixel values. Our saturation blends with
    grey. Mask2Former's scales S of HSV instead. Hue moves by up to 36 degrees.
    """

    def half(**ranges) -> v2.Transform:
        return v2.RandomApply([v2.ColorJitter(**ranges)], p=0.5)

    contrast, saturation, hue = half(brightness=(0.5, 1.5)), half(saturation=(0.5, 1.5)), half(hue=0.1)
    return v2.RandomChoice([v2.Compose([contrast, saturation, hue]), v2.Compose([saturation, hue, contrast])])


def train_transform(args: argparse.Namespace) -> Callable:
    """The augmentation: image (3, H, W) uint8, labels (H, W) -> (3, S, S), (S, S)."""
    flip = v2.RandomHorizontalFlip()
    steps = [flip]
    if args.data != "shapes":  # rendered scenes have the wanted size already
        resize, crop, pad = (partial(step, size=args.image_size) for step in (random_resize, random_crop, pad_to))
        steps = [resize, crop, shift_brightness, colour_jitter(), flip, pad]
    return v2.Compose(steps)


def resized_whole(image: Tensor, labels: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """For evaluation: resize the image to a short edge of `size`. Labels stay as they are.

    If the long edge would be longer than 4 times `size`, it gets that length instead.
    """
    return v2.functional.resize(image, fitted(tuple(image.shape[1:]), size, 4 * size)), labels


class Pairs(Augmented):
    """`Augmented`, where the transform changes image and labels together. Gives plain tensors."""

    def apply(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        pair = self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return tuple(x.as_subclass(Tensor) for x in pair)


class IntervalSampler(EpochSampler):
    """Gives this process's items of one interval of training, as (pass, index).

    Training order is an endless sequence of permutations of the data set, one for each pass. It is
    cut into intervals of the same length, and `epoch` is the number of the interval. So nothing is
    left out, and a data set may be smaller than a batch.
    """

    def __init__(self, length: int, interval: int, *, rank: int = 0, world: int = 1, seed: int = 0):
        """interval: items per interval over all processes, a multiple of the images per step."""
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


# ---- recipe --------------------------------------------------------------------------------------


def kind_of(args: argparse.Namespace) -> str:
    """The key of DATA_DEFAULTS: "shapes" or "folder"."""
    return "shapes" if args.data in (None, "shapes") else "folder"


def interval_and_run(args: argparse.Namespace, images: int) -> tuple[int, int]:
    """The number of steps between two log records, and that of the whole run."""
    bounds = [args.max_steps] if args.max_steps else []
    if args.epochs:
        bounds.append(max(1, args.epochs * images // args.global_batch))
    total_steps = min(bounds, default=STEPS[kind_of(args)])
    return min(args.eval_steps, total_steps), total_steps


def make_model(args: argparse.Namespace, num_classes: int, image_size: int) -> Segmenter:
    """The model that the flags describe.

    Raises: ValueError as `build_segmenter` does, and if a GroupNorm would normalise single numbers.
    """
    coarsest = 2 * args.patch_size  # stride of the coarsest map, pixels
    if args.width == 32 and args.image_size <= coarsest:
        raise ValueError(
            f"--width 32 with --patch-size {args.patch_size} needs an --image-size above "
            f"{coarsest}, got {args.image_size}: a GroupNorm would normalise single numbers"
        )
    named = ("width", "queries", "layers", "encoder_layers", "patch_size", "drop_path")
    options = {name: getattr(args, name) for name in named} | run.core_options(args)
    return build_segmenter(args.model, args.attention, num_classes, args.pixel_decoder, image_size, **options)


def parameter_groups(model: nn.Module, weight_decay: float, backbone_lr: float) -> list[dict]:
    """The optimiser's groups of parameters, by learning rate and weight decay.

    The learning rate of a group is multiplied by its `lr_scale`: `backbone_lr` for the backbone and
    its pyramid, else 1. Norms, embeddings and position tables do not decay. Biases do, and the level
    vectors of msdeform, as in Mask2Former.
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
    """Learning rate of step `step` (0-based): falls to 0 as (1 - share done)^0.9, no warm-up."""
    return args.lr * args.global_batch / LR_BATCH * (1 - step / total_steps) ** 0.9


# ---- training ------------------------------------------------------------------------------------


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train, then print the castling report.

    Every --eval-steps steps, which the log calls an epoch, there is a checkpoint and a log line.
    """
    with run.checked(args):  # a mistake in flags or files ends the script here, with one line
        # Data
        resolve(args)
        train_set, val_set = open_split(args, "train"), open_split(args, "val")
        run.same_classes(train_set.classes, val_set.classes, f"train and val of {args.data}")
        interval, total_steps = interval_and_run(args, len(train_set))
        if args.ema_decay is None:
            args.ema_decay = run.ema_decay_for(total_steps)

        # Model, averaged weights and optimiser
        torch.manual_seed(args.seed)  # the same first weights on every process
        model = make_model(args, len(train_set.classes), args.image_size)
        run.start_from(model, args, load_start)
        model.to(device)
        ema = run.averaged(model, args.ema_decay)
        optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, args.backbone_lr))

        # Batches, and the state of the run
        sampler = IntervalSampler(
            len(train_set), interval * args.global_batch, seed=args.seed, rank=rank(), world=world_size()
        )
        augmented = Pairs(train_set, train_transform(args), args.seed)
        train_loader = make_loader(augmented, sampler, args.batch_size, args.workers)
        val_loader = validation_loader(args, val_set)
        state = run.Run(
            args, train_set.classes, model, ema, optimizer, train_loader, device,
            steps_per_epoch=interval, total_steps=total_steps, metrics=METRICS,
        )  # fmt: skip

    net = run.parallel(model, args, device)
    with state:
        state.bar.say(run.describe(state, describe_recipe(args), val_set))
        for _ in state.epochs():  # each is --eval-steps steps
            net.train()
            for batches in state.steps(train_loader):
                # Gradients, summed over the batches of the step
                set_threshold(model, state.progress)                                  # Eq. (10), D4
                lr = run.set_lr(optimizer, learning_rate(args, state.step, total_steps))
                loss = torch.zeros((), device=device)
                for i, (images, labels) in enumerate(batches):
                    net.require_backward_grad_sync = i == len(batches) - 1    # DDP: once a step
                    images, labels = to_model_input(images, device), labels.to(device)
                    targets = targets_of(labels, model.padded(labels.shape[1:]))
                    num_masks = mean_masks(targets, device)
                    with autocast(args, device):
                        outputs = net(images)
                    part = set_loss(outputs, targets, num_masks, args.points) / len(batches)
                    state.scaler.scale(part).backward()
                    loss += part.detach()

                # Weights and averaged weights; NaN stops every process before that
                state.update(loss, lr)

            metrics = {}
            if state.evaluation_due():                                     # with and without branch
                metrics = run.evaluate_castling(lambda m: evaluate(m, val_loader, args, device), ema.module, "mIoU")
            state.log(metrics)
        state.report()


def validation_loader(args: argparse.Namespace, val_set: Dataset) -> DataLoader:
    """This process's share of the validation set."""
    sampler = EpochSampler(len(val_set), rank=rank(), world=world_size())
    batch_size = args.batch_size if args.data == "shapes" else 1  # else their sizes differ
    pairs = Pairs(val_set, partial(resized_whole, size=args.image_size), args.seed)
    return make_loader(pairs, sampler, batch_size, args.workers)


def describe_recipe(args: argparse.Namespace) -> str:
    """Optimiser, learning rate and decoder, as a run prints them."""
    a = args
    limit = f", gradient norm at most {a.clip_grad}" if a.clip_grad else ""
    return f"""optimiser: AdamW, weight decay {a.weight_decay}{limit}
learning rate: falls to 0 from {a.lr * a.global_batch / LR_BATCH:.4g} (--lr {a.lr} x {a.global_batch} / {LR_BATCH} \
images); the backbone has {a.backbone_lr} times that
decoder: {a.pixel_decoder}, {a.queries} queries, {a.layers} layers, losses at {a.points} points of each mask"""


# ---- drawing -------------------------------------------------------------------------------------


def colour_of(index: int) -> tuple[int, int, int]:
    """The colour of a class, one of 180: 30 hues, in three brightnesses and two saturations."""
    hue, shade = index * 7 % 30 / 30, index // 30  # hues of neighbouring classes are far apart
    saturation, value = (1.0, 0.5)[shade % 2], (1.0, 0.75, 0.5)[shade % 3]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def shares_of(labels: np.ndarray, classes: list[str]) -> dict[str, float]:
    """{class: share of pixels} for the classes in a label map (H, W), largest share first."""
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    return {classes[i]: counts[i] / labels.size for i in np.argsort(-counts, kind="stable") if counts[i]}


def overlay(image: Image.Image, labels: np.ndarray, classes: list[str]) -> Image.Image:
    """The image, tinted with the colours of its labels (H, W), and a legend of the classes below.

    A class named "background" is not tinted. A small image is enlarged.
    """
    tints = np.array([colour_of(i) for i in range(len(classes))], np.uint8)[labels]
    if "background" in classes:
        bare = labels == classes.index("background")
        tints[bare] = np.asarray(image)[bare]
    image, _ = run.magnified(Image.blend(image, Image.fromarray(tints), 0.5))

    # The legend has a row for each class found: its colour, its name and its share of the pixels.
    shares, line = shares_of(labels, classes), max(18, min(image.size) // 24)
    font = ImageFont.load_default(2 * line // 3)
    texts = [f"{name} {share:.1%}" for name, share in shares.items()]
    width = max(image.width, *(math.ceil(font.getlength(text)) + 2 * line for text in texts))
    canvas = Image.new("RGB", (width, image.height + line * len(shares)), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (name, text) in enumerate(zip(shares, texts, strict=True)):
        top = image.height + line * row
        colour = "white" if name == "background" else colour_of(classes.index(name))
        draw.rectangle((4, top + 4, line, top + line), colour, "black")
        draw.text((line + 6, top + 4), text, "black", font)
    return canvas


# ---- what is done with a checkpoint --------------------------------------------------------------


def load(args: argparse.Namespace, classes: list | None = None) -> tuple[Segmenter, list]:
    """The model in --checkpoint, in eval mode, and the names of its classes.

    If the file does not name its classes, they are `classes`, or else "class 0", "class 1" and so
    on.
    """
    trained = run.settings_for(args)
    resolve(args, trained)
    classes = trained.get("classes") or classes
    if not classes:
        rows = run.count_classes(args.checkpoint, ["decoder.class_head.weight"])
        classes = [f"class {i}" for i in range(rows - 1)]  # the last row is "no object"
    model = make_model(args, len(classes), trained.get("image_size") or args.image_size)
    return run.load_trained(model, args), classes


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """--eval: print the metrics of --checkpoint, with and without the auxiliary branch."""
    with run.checked(args):
        resolve(args, run.settings_for(args))
        val_set = open_split(args, args.split)
        model, classes = load(args, val_set.classes)
        run.same_classes(classes, val_set.classes, f"{args.checkpoint} and {args.data}")
        loader = validation_loader(args, val_set)
    record = run.evaluate_castling(lambda m: evaluate(m, loader, args, device), model.to(device), "mIoU")
    run.print_evaluation(args, record, METRICS)


@torch.inference_mode()
def predict(args: argparse.Namespace, device: torch.device) -> None:
    """--image: draw the classes of each file over it, and print their shares of its pixels.

    With --json the output is one list of {"image": file, "shares": {class: 0..1}}, and files are
    drawn only if --output is given.
    """
    with run.checked(args):
        drawings = run.drawing_paths(args, "overlay")
        if args.data is None and not run.settings_for(args):
            args.data = "folder"  # not our checkpoint: the image size of photographs
        model, classes = load(args)
    model.to(device)
    with run.json_list(args) as printed:
        for path, image in run.read_each(args.image):
            pixels, _ = resized_whole(v2.functional.pil_to_tensor(image), None, args.image_size)
            labels = segment(model, pixels[None], (image.height, image.width), args, device)[0].cpu().numpy()
            shares = shares_of(labels, classes)
            printed.append(dict(image=str(path), shares=shares))
            if drawings:
                run.write_image(overlay(image, labels, classes), drawings[path])
            if not args.json:
                text = ", ".join(f"{name} {part:.1%}" for name, part in shares.items())
                say(f"{path}: {text}, drawn to {drawings[path]}")


# ---- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of segment.py. `resolve` fills in the flags that are None."""
    p = run.Parser(
        "segment.py", __doc__,
        epilog=f"""--model is one of {', '.join(SEGMENTERS)}
--data is shapes, or a folder. The folder has images/ and annotations/, each with training/ and validation/.
Its class names are in classes.txt or objectInfo*.txt.
--shapes-length: for validation there are 1/64 as many scenes
without --epochs and --max-steps a run has {', '.join(f'{steps} steps for {data}' for data, steps in STEPS.items())}
Eq. is an equation of the paper. D4, D7 and so on are explained in docs/departures.md.""",
    )  # fmt: skip
    recipe = run.shared_flags(p, DATA_DEFAULTS)

    def add(flag: str, kind: Callable, text: str) -> None:
        default = run.by_data(flag[2:].replace("-", "_"), DATA_DEFAULTS)
        recipe.add_argument(flag, type=kind, help=f"{text}; {default}")

    recipe.add_argument("--pixel-decoder", choices=list(PIXEL_DECODERS), help="network from the backbone's maps to the "
                        "masked decoder: fpn_transformer fits the paper's counts, msdeform is Mask2Former's (D8); "
                        "default fpn_transformer")  # fmt: skip
    recipe.add_argument("--num-classes", type=at_least(1, most=IGNORE), help="number of classes, for a folder that "
                        "does not name them; default 150")  # fmt: skip
    add("--eval-steps", at_least(1), "optimiser steps from one log line to the next; --eval-every and the log call "
        "them an epoch")  # fmt: skip
    add("--patch-size", at_least(4), "side of the backbone's patches in pixels, a multiple of 4; the decoders get maps "
        "at strides of 1/4, 1/2, 1 and 2 patches")  # fmt: skip
    add("--width", at_least(32), "number of channels in pyramid and decoders, a multiple of 32")
    add("--queries", at_least(1), "number of masks predicted per image")
    add("--layers", at_least(1), "number of layers in the masked decoder")
    add("--encoder-layers", at_least(1), "number of layers in the pixel decoder's transformer encoder")
    add("--points", at_least(4), "number of points of each mask that the loss compares with the target")
    add("--drop-path", share, "stochastic depth of the backbone: probability, 0..1, that training skips the layers of "
        "the last block; it rises linearly from 0 in the first block")  # fmt: skip
    add("--weight-decay", at_least(0, float), "weight decay of AdamW; most norms and embeddings do not decay")
    add("--backbone-lr", at_least(0, float), "factor on the learning rate of the backbone and its pyramid")
    add("--clip-grad", at_least(0, float), "largest norm of the gradient over all parameters, 0 for no limit")
    add("--ema-decay", share, "decay per step of the averaged weights, which are the ones evaluated, 0 for no "
        "averaging; for shapes the average covers by default about the last 4%% of the steps")  # fmt: skip
    return p


def resolve(args: argparse.Namespace, trained: dict | None = None) -> None:
    """Fill in flags not given: from `trained`, a checkpoint's settings, else from the tables."""
    run.take_over(args, trained or {})
    run.fill_in(args, dict(pixel_decoder="fpn_transformer") | DATA_DEFAULTS[kind_of(args)])


def main(args: argparse.Namespace) -> None:
    fast.enable()
    with run.session(args) as (task, device):
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
