"""Backbones of Castling-ViT. `attention=` chooses the kernel, and with it the architecture.

    build_model("levit128")                       the paper's: linear-angular and auxiliary branch
    build_model("levit128", attention="softmax")  LeViT as published, for the official weights
    build_model("deit_tiny", attention="cosine")  a kernel of Table 5 in the castling architecture

DeiT    Touvron et al., arXiv:2012.12877;  timm 1.0.31, vision_transformer.py
LeViT   Graham et al., arXiv:2104.01136;   github.com/facebookresearch/LeViT @ 3772b8e, levit.py
MViTv2  Li et al., arXiv:2112.01526;       timm 1.0.31, mvitv2.py
LCNet   Cui et al., arXiv:2109.15099;      timm 1.0.31, mobilenetv3.py
ESNet   Yu et al., arXiv:2111.00902;       PaddlePaddle/PaddleDetection @ v2.6.0, ppdet/.../esnet.py
ViT     He et al., arXiv:2111.06377 (MAE); for segment.py: feature maps instead of logits
The castling architecture: arXiv:2211.10526v4, section 4. Its text leaves out details. We chose them
to fit the parameters and MACs in its tables: a depthwise convolution inside the MLPs (D7, D8) and,
in LeViT and MViTv2, 3x3 depthwise pooling of q, k, v, and queries added to the output.

Parameter names are timm's. New are `attn.dconv`, `mlp.dwconv`, `skip`, LeViT's pooling and
down-sampling attention, the transformer blocks of LCNet-ViT, and ESNet, which timm does not have.
B images, N tokens, C channels, H heads, D channels per head; `grid`: token grid (y, x), row-major.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from attention import KERNELS, AttentionCore, look_up

ATTENTIONS = {  # name: options of AttentionCore
    "castling": dict(kernel="linear_angular", auxiliary=True),
    **{kernel: dict(kernel=kernel) for kernel in KERNELS},
}

BASELINE = dict(kernel="softmax", auxiliary=False)

DEIT = {  # arXiv:2012.12877, Table 1; drop path as released. deit_mini is our own, for 32 pixels.
    "deit_mini": dict(dim=96, heads=3, depth=6, patch_size=4, drop_path=0.0),
    "deit_tiny": dict(dim=192, heads=3, depth=12),
    "deit_small": dict(dim=384, heads=6, depth=12),
    "deit_base": dict(dim=768, heads=12, depth=12),
}

VIT_DENSE = {  # no class token or final norm; drop path of MAE's fine-tuning. The last is our own.
    "vit_base_dense": dict(dim=768, heads=12, depth=12),
    "vit_small_dense": dict(dim=384, heads=6, depth=12),
    "vit_tiny_dense": dict(dim=192, heads=3, depth=12),
    "vit_mini_dense": dict(dim=128, heads=4, depth=4),
}

LEVIT = {  # arXiv:2104.01136, Table 1 and released specification. levit_mini is our own.
    "levit_mini": dict(dims=(64, 96, 128), heads=(2, 3, 4), key_dim=16, drop_path=0.0),
    "levit128": dict(dims=(128, 256, 384), heads=(4, 8, 12), key_dim=16),
    "levit192": dict(dims=(192, 288, 384), heads=(3, 5, 6), key_dim=32),
    "levit256": dict(dims=(256, 384, 512), heads=(4, 6, 8), key_dim=32),
    "levit384": dict(dims=(384, 512, 768), heads=(6, 9, 12), key_dim=32, drop_path=0.1),
}

MVITV2 = {  # arXiv:2112.01526, Table 1 and released configurations
    "mvitv2_tiny": dict(depths=(1, 2, 5, 2)),
    "mvitv2_small": dict(depths=(1, 2, 11, 2)),
    "mvitv2_base": dict(depths=(2, 3, 16, 3), drop_path=0.3),
}

# (kernel, stride, squeeze and excitation) of each depthwise separable convolution; timm's stages.
LCNET_STAGES = (
    ((3, 1, False),),
    ((3, 2, False), (3, 1, False)),
    ((3, 2, False), (3, 1, False)),
    ((3, 2, False), (5, 1, False)),
    ((5, 1, False),) * 4,
    ((5, 2, True), (5, 1, True)),
)
LCNET_DIMS = (32, 64, 128, 256, 256, 512)  # channels at width 1

# At strides 16 and 32, LCNet-ViT has LCNet's stride-2 convolution and then one transformer block.
LCNET = {
    "lcnet_s": dict(width=0.75),
    "lcnet_m": dict(width=1.5),
    "lcnet_l": dict(width=2.0),
    "lcnet_vit_s": dict(width=0.75, heads=(8, 16)),
    "lcnet_vit_m": dict(width=1.5, heads=(8, 16)),
    "lcnet_vit_l": dict(width=2.0, heads=(8, 16)),
}

# Inner channels of each block, divided by the channels of its stage (128, 256, 512 times `width`).
ESNET_RATIOS_S = ((0.875, 0.5, 0.5), (0.5, 0.625, 0.5, 0.625, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ESNET_RATIOS_ML = ((0.875, 0.5, 1.0), (0.625, 0.5, 0.75, 0.625, 0.625, 0.5, 0.625), (1.0, 0.625, 0.75))

ESNET = {  # at stride 32, ESNet-ViT has ESNet's stride-2 block and then two transformer blocks
    "esnet_s": dict(width=0.75, ratios=ESNET_RATIOS_S),
    "esnet_m": dict(width=1.0, ratios=ESNET_RATIOS_ML),
    "esnet_l": dict(width=1.25, ratios=ESNET_RATIOS_ML),
    "esnet_vit_s": dict(width=0.75, ratios=ESNET_RATIOS_S, heads=16),
    "esnet_vit_m": dict(width=1.0, ratios=ESNET_RATIOS_ML, heads=16),
    "esnet_vit_l": dict(width=1.25, ratios=ESNET_RATIOS_ML, heads=16),
}

HIDDEN_BYTES = 3 * 2**19  # of an MLP's hidden layer computed at a time, in inference on a CPU

Grid = tuple[int, int]


# ---- shared parts --------------------------------------------------------------------------------


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Image size as (height, width) in pixels."""
    sides = tuple(size) if isinstance(size, Iterable) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"image size must be a number of whole pixels above 0, or a pair of them, got {size!r}")
    return sides


def symbolic(sizes: Iterable[int]) -> bool:
    """Whether an exported graph leaves one of these sizes open. It cannot branch on such a size."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def channels_per_head(dim: int, heads: int) -> int:
    """dim / heads. Raises ValueError if heads does not divide dim."""
    if heads < 1 or dim % heads:
        raise ValueError(f"dim {dim} must be divisible by the number of heads, {heads}")
    return dim // heads


def halved(grid: Grid) -> Grid:
    """Token grid after a stride-2 step: 14 -> 7 -> 4."""
    return (grid[0] - 1) // 2 + 1, (grid[1] - 1) // 2 + 1


def init_linear(module: nn.Module) -> None:
    """DeiT's and MViTv2's initialisation: weights normal with deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def resample(table: Tensor, size: tuple[int, ...], mode: str, align_corners: bool | None = None) -> Tensor:
    """A learned table (1, C, *old size), interpolated in float32 to `size`, unless it has this size."""
    if not symbolic(size) and tuple(table.shape[2:]) == tuple(size):
        return table
    return F.interpolate(table.float(), size=size, mode=mode, align_corners=align_corners).to(table.dtype)


class TokenConv(nn.Conv2d):
    """Depthwise convolution on token maps, (B, C, y, x) -> (B, C, y', x'), padded by kernel // 2.

    On a small map the outer taps meet only padding. They are left out, which changes no result:
    their gradient is 0. On a CPU, training on a map of one token is up to 4 times faster.
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
    """Depthwise convolution on the token grid, between the two layers of an MLP.  D7

    (B, N, C), grid -> same. It is initialised as the identity. With `norm` a BatchNorm follows.
    The paper says only "DWConv in the middle of MLP layers".
    """

    def __init__(self, channels: int, kernel: int, bias: bool = False, norm: bool = False):
        super().__init__(channels, kernel, bias=bias)
        nn.init.dirac_(self.weight, groups=channels)
        if bias:
            nn.init.zeros_(self.bias)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        # Contiguous tokens are already a channels-last map, for which this convolution is fast.
        x = self.norm(super().forward(rearrange(x.contiguous(), "b (y x) c -> b c y x", y=grid[0])))
        return rearrange(x, "b c y x -> b (y x) c")


def subsample(x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Every second token of every second row, (..., N, C) -> (..., N', C). No averaging."""
    x = x.unflatten(-2, grid)[..., ::2, ::2, :]
    return x.flatten(-3, -2), (x.shape[-3], x.shape[-2])


def pool_heads(x: Tensor, grid: Grid, conv: nn.Conv2d, norm: nn.LayerNorm) -> tuple[Tensor, Grid]:
    """Depthwise convolution on the token grid, the same for all heads, then LayerNorm over D.

    (B, H, N, D), grid -> (B, H, N', D), grid'.
    """
    heads = x.shape[1]
    x = conv(rearrange(x.contiguous(), "b h (y x) d -> (b h) d y x", y=grid[0]))
    grid = (x.shape[2], x.shape[3])
    return norm(rearrange(x, "(b h) d y x -> b h (y x) d", h=heads)), grid


class PooledAttention(AttentionCore):
    """Self-attention on pooled q, k, v: each passes a 3x3 depthwise convolution and a LayerNorm.

    (B, N, C), grid -> (B, N', C'), grid'. All heads share the weights of these layers. The pooled query is added
    to the attention's output.

    Args:
        qkv: the layer C -> 3 H D. Its output is (q|k|v, H, D) or, if `head_major`, (H, q|k|v, D).
        proj: the layer H D -> C'.
        head_dim: D.
        stride_q, stride_kv: strides of the convolutions of q, and of k and v.
        core_options: options of AttentionCore.
    Source: MViTv2, arXiv:2112.01526, section 4.1 (residual pooling connection).
    """

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        heads: int,
        head_dim: int,
        *,
        stride_q: int = 1,
        stride_kv: int = 1,
        head_major: bool = False,
        core_options: Mapping,
    ):
        super().__init__(heads, **core_options)
        self.head_dim, self.stride_q = head_dim, stride_q
        self.layout = "(h s d)" if head_major else "(s h d)"
        self.qkv, self.proj = qkv, proj
        for name, stride in zip("qkv", (stride_q, stride_kv, stride_kv), strict=True):
            self.add_module(f"pool_{name}", TokenConv(head_dim, 3, stride))
            self.add_module(f"norm_{name}", nn.LayerNorm(head_dim, eps=1e-6))

    def logit_bias(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor | None:
        """What to add to the logits of the softmax kernel, (H, N', M) or (B, H, N', M)."""
        return None

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        q, k, v = rearrange(self.qkv(x), f"b n {self.layout} -> s b h n d", s=3, h=self.heads)
        q, q_grid = pool_heads(q, grid, self.pool_q, self.norm_q)
        k, k_grid = pool_heads(k, grid, self.pool_k, self.norm_k)
        v, _ = pool_heads(v, grid, self.pool_v, self.norm_v)
        y = q + self.attend(q, k, v, self.logit_bias(q, q_grid, k_grid))             # (B, H, N', D)
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), q_grid


# ---- DeiT ----------------------------------------------------------------------------------------


def resize_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Position embeddings (1, y x, C) of grid `old`, resampled to grid `new` (bicubic)."""
    maps = resample(rearrange(table, "1 (y x) c -> 1 c y x", y=old[0]), new, "bicubic", align_corners=False)
    return rearrange(maps, "1 c y x -> 1 (y x) c")


class SelfAttention(AttentionCore):
    """Tokens (B, N, C) -> same: linear layer to q, k, v (3, H, D), attention, linear layer.

    N counts all tokens, class tokens too.
    """

    def __init__(self, dim: int, heads: int, **core_options):
        channels_per_head(dim, heads)  # only checks
        super().__init__(heads, **core_options)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        return self.proj(rearrange(self.attend(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Linear, [DWConv, [BatchNorm,]] GELU, linear on (B, P + N, C); no DWConv if mlp_dwconv is 0.

    The P prefix tokens do not enter the DWConv (D6). In inference, a CPU computes a few images at a
    time, so that the hidden layer (HIDDEN_BYTES) stays in its cache. Hooks then see parts of the
    batch.
    """

    def __init__(self, dim: int, hidden: int, mlp_dwconv: int = 0, bias: bool = False, batch_norm: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = MlpDWConv(hidden, mlp_dwconv, bias, batch_norm) if mlp_dwconv else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        whole = self.training or torch.is_grad_enabled()
        whole = whole or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if x.device.type != "cpu" or whole:  # an exported graph cannot branch on a size
            return self.layers(x, grid)
        together = max(1, HIDDEN_BYTES // (4 * x.shape[1] * self.fc1.out_features))
        return torch.cat([self.layers(part, grid) for part in x.split(together)])

    def layers(self, x: Tensor, grid: Grid) -> Tensor:
        """The MLP of one part of the batch."""
        x = self.fc1(x)
        if self.dwconv is not None:
            before = x.shape[1] - grid[0] * grid[1]
            patches = self.dwconv(x[:, before:], grid)
            x = torch.cat([x[:, :before], patches], dim=1) if before else patches                            # D6
        return self.fc2(F.gelu(x))


class ViTBlock(nn.Module):
    """Pre-norm transformer block on (B, N, C)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: int,
        mlp_dwconv: int,
        drop_path: float,
        core_options: Mapping,
        dwconv_bias: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads, **core_options)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim, mlp_dwconv, dwconv_bias)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class ViT(nn.Module):
    """What DeiT and DenseViT share: an image's patches as tokens, position embeddings, blocks.

    Images of any H x W are padded to whole patches. Position embeddings are resampled to the grid.

    Args:
        tokens: names of the learned tokens that come before the patches.
        dim, heads, depth: C, H and the number of blocks.
        mlp_ratio: hidden channels of the MLPs, divided by C.
        patch_size: pixels.
        image_size: pixels; the position embeddings are made for it.
        drop_path: stochastic depth; rises linearly from 0 in the first block to this in the last.
        mlp_dwconv: kernel of the MLPs' DWConv, 0 for none; dwconv_bias: whether it has a bias.
        core_options: options of AttentionCore.
    Raises: ValueError if dim is not divisible by heads.
    """

    def __init__(self, tokens: tuple[str, ...], dim: int, heads: int, depth: int, mlp_ratio: int,
                 patch_size: int, image_size: int | tuple[int, int], drop_path: float,
                 mlp_dwconv: int, dwconv_bias: bool, core_options: Mapping):  # fmt: skip
        super().__init__()
        self.tokens, self.dim, self.patch_size = tokens, dim, patch_size
        self.grid = tuple(-(-side // patch_size) for side in pair(image_size))
        # Rows of pos_embed before those of the patches. The files of ViT and MAE have one for the
        # class token. A model without that token keeps the row too, but does not use it.
        self.position_rows = max(1, len(tokens))
        for name in tokens:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, dim)))
        rows = self.position_rows + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            ViTBlock(dim, heads, mlp_ratio, mlp_dwconv, rate, core_options, dwconv_bias) for rate in rates
        )

    def initialise(self) -> None:
        """DeiT's initialisation. Call it after all layers are made."""
        self.apply(init_linear)
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the published recipe exempts, beyond biases and norms."""
        return {*self.tokens, "pos_embed"}

    def features(self, x: Tensor) -> tuple[Tensor, Grid]:
        """(B, 3, H, W) pixels -> last block's output (B, P + N, C), P = len(tokens); grid."""
        x = F.pad(x, (0, -x.shape[-1] % self.patch_size, 0, -x.shape[-2] % self.patch_size))
        x = self.patch_embed(x)                                                      # (B, C, y, x)
        grid = (x.shape[2], x.shape[3])
        prefix_pos, patch_pos = self.pos_embed.tensor_split([self.position_rows], dim=1)
        x = rearrange(x, "b c y x -> b (y x) c") + resize_positions(patch_pos, self.grid, grid)
        if self.tokens:                                                              # (B, P + N, C)
            tokens = torch.cat([getattr(self, name) for name in self.tokens], dim=1)
            x = torch.cat([(tokens + prefix_pos).expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, grid)
        return x, grid


class DeiT(ViT):
    """(B, 3, H, W) pixels -> (B, num_classes) logits; any H x W.

    Args:
        distilled: add a second class token and head. In training the model then returns a pair of
            logits (class, distillation), in eval their mean.
        Others as in `ViT`.
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
        mlp_dwconv: int = 0,
        core_options: Mapping = ATTENTIONS["castling"],
    ):
        tokens = ("cls_token", "dist_token") if distilled else ("cls_token",)
        super().__init__(tokens, dim, heads, depth, mlp_ratio, patch_size, image_size, drop_path,
                         mlp_dwconv, dwconv_bias=False, core_options=core_options)  # fmt: skip
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.head_dist = nn.Linear(dim, num_classes) if distilled else None
        self.initialise()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x, _ = self.features(x)
        x = self.norm(x)
        if self.head_dist is None:
            return self.head(x[:, 0])
        logits = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return logits if self.training else (logits[0] + logits[1]) / 2


# ---- dense ViT -----------------------------------------------------------------------------------


class DenseViT(ViT):
    """(B, 3, H, W) pixels -> (B, C, y, x), the last block's features; any H x W.

    A plain ViT for dense prediction, without class token, final norm or head. The MLPs' DWConv has
    a bias. Args as in `ViT`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        mlp_ratio: int = 4,
        patch_size: int = 16,
        image_size: int | tuple[int, int] = 224,
        drop_path: float = 0.1,
        mlp_dwconv: int = 0,
        core_options: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__((), dim, heads, depth, mlp_ratio, patch_size, image_size, drop_path,
                         mlp_dwconv, dwconv_bias=True, core_options=core_options)  # fmt: skip
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        x, grid = self.features(x)
        return rearrange(x, "b (y x) c -> b c y x", y=grid[0])


# ---- LeViT ---------------------------------------------------------------------------------------


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


class NormLinear(nn.Sequential):
    """BatchNorm and linear layer, (B, C) -> (B, classes)."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, num_classes)
        init_linear(self.linear)


def activated_projection(dim: int, out_dim: int, bn_weight: float = 1.0) -> nn.Sequential:
    """Hardswish and the output projection, the end of every LeViT attention."""
    return nn.Sequential(OrderedDict(act=nn.Hardswish(), ln=LinearNorm(dim, out_dim, bn_weight)))


def resize_offsets(table: Tensor, grid: Grid) -> Tensor:
    """Resample a table of absolute offsets, (H, y, x), to another grid: bilinear, corners kept."""
    return resample(table[None], grid, "bilinear", align_corners=True)[0]


def offset_bias(table: Tensor, built: Grid, grid: Grid, stride: int) -> Tensor:
    """LeViT's attention bias, (H, N, M): one learned entry per head and absolute offset.

    Args:
        table: (H, y x), learned for the key grid `built` and resampled to `grid`. The entry of the
            offset (dy, dx) has the index |dy| x + |dx|.
        grid: key grid (y, x); stride: query (i, j) is at the place of key (stride i, stride j).
    """
    table = resize_offsets(rearrange(table, "h (y x) -> h y x", y=built[0]), grid)
    y, x = (torch.arange(side, device=table.device) for side in grid)
    dy, dx = (y[::stride, None] - y).abs(), (x[::stride, None] - x).abs()  # (queries, keys)
    return table[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3, 4).flatten(1, 2)


class LeViTAttention(AttentionCore):
    """LeViT's softmax attention as published, with a bias per head and absolute offset.

    (B, N, C), grid -> (B, N', C'), grid'. Queries and keys have D channels, values 2 D, or 4 D with
    stride 2. With stride 2 the queries are every second token of every second row.

    Args: key_dim: D; heads: H; grid: the key grid for which the bias table is made.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        heads: int,
        key_dim: int,
        grid: Grid,
        stride: int,
        core_options: Mapping,
    ):
        super().__init__(heads, **core_options)
        self.stride, self.grid = stride, grid
        self.attention_biases = nn.Parameter(torch.zeros(heads, grid[0] * grid[1]))
        self.split = [key_dim, 2 * stride * key_dim]
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
        bias = offset_bias(self.attention_biases, self.grid, grid, self.stride)      # (H, N', N)
        y = self.attend(q, k, v, bias)                                               # (B, H, N', E)
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), out_grid


class CastlingLeViTAttention(PooledAttention):
    """LeViT's attention in the castling architecture: `PooledAttention` between LeViT's layers.

    (B, N, C), grid -> (B, N', C'), grid'. Arguments as in `LeViTAttention`, but queries and keys
    have as many channels as values. `stride` is that of the pooling of q, and of k and v too unless
    the kernel is softmax. The softmax kernel keeps LeViT's bias (D5).
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        heads: int,
        key_dim: int,
        grid: Grid,
        stride: int,
        core_options: Mapping,
    ):
        softmax, head_dim = core_options["kernel"] == "softmax", 2 * stride * key_dim
        super().__init__(
            LinearNorm(dim, 3 * heads * head_dim),
            activated_projection(heads * head_dim, out_dim, bn_weight=0.0 if stride == 1 else 1.0),
            heads,
            head_dim,
            stride_q=stride,
            stride_kv=1 if softmax else stride,
            head_major=True,
            core_options=core_options,
        )
        self.grid = grid
        self.attention_biases = nn.Parameter(torch.zeros(heads, grid[0] * grid[1])) if softmax else None

    def logit_bias(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor | None:
        if self.attention_biases is None:
            return None
        return offset_bias(self.attention_biases, self.grid, k_grid, self.stride_q)


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
    """Attention that halves the grid, then a residual MLP: (B, N, C), grid -> (B, N', C'), grid'.

    The published attention has no residual. The castling one has a linear layer, `skip`, applied to
    all tokens and then subsampled. Only this order gives the MACs of Tables 1 and 2.
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

    With the softmax kernel this is LeViT as published. With any other kernel it has the castling
    architecture.

    Args:
        dims, heads, depths: C, H and the number of blocks of each stage.
        key_dim: D as published; see `CastlingLeViTAttention` for the castling architecture. The
            down-sampling block after stage i has dims[i] // key_dim heads.
        image_size: pixels; tables of attention biases are made for it, and resampled for others.
        distilled: add a second head. In training the model then returns a pair of logits (class,
            distillation), in eval their mean. None means two heads with the softmax kernel, as
            published, and one with all others, as the paper's parameter counts say.
        drop_path: stochastic depth, the same in all blocks.
        castle_downsample: True ("C2"): the down-sampling blocks of the castling architecture use
            `core_options` too, and keys and values are pooled to the queries' grid (D5). False
            ("C1"): they keep softmax.
        mlp_dwconv: kernel of the DWConv in the MLPs of stage blocks, 0 for none.
        core_options: options of AttentionCore.
    Raises: ValueError if dims, heads and depths differ in length.
    Source: LeViT's paper, and levit.py @ 3772b8e (above); arXiv:2211.10526v4, Table 2.
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
        mlp_dwconv: int = 0,
        core_options: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
        if not len(dims) == len(heads) == len(depths):
            raise ValueError(f"dims, heads and depths must have one entry per stage: {dims}, {heads}, {depths}")
        published = core_options["kernel"] == "softmax"
        widths = [3, dims[0] // 8, dims[0] // 4, dims[0] // 2, dims[0]]
        grid = pair(image_size)
        self.stem = nn.Sequential()
        for i in range(4):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False)
            layers = OrderedDict(linear=conv, bn=nn.BatchNorm2d(widths[i + 1]))
            self.stem.add_module(f"conv{i + 1}", nn.Sequential(layers))
            if i < 3:
                self.stem.add_module(f"act{i + 1}", nn.Hardswish())
            grid = halved(grid)

        attention = LeViTAttention if published else CastlingLeViTAttention
        down_core = core_options if castle_downsample else {**core_options, **BASELINE}              # D5
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            downsample = None
            if i > 0:
                before = dims[i - 1]
                mlp = LeViTMlp(dim, mlp_ratio * dim)
                skip = None if published else LinearNorm(before, dim)
                attn = attention(before, dim, before // key_dim, key_dim, grid, 2, down_core)
                downsample, grid = LeViTDownsample(attn, mlp, skip, drop_path), halved(grid)
            blocks = []
            for _ in range(depth):
                attn = attention(dim, dim, heads[i], key_dim, grid, 1, core_options)
                mlp = LeViTMlp(dim, mlp_ratio * dim, mlp_dwconv)
                blocks.append(LeViTBlock(attn, mlp, drop_path))
            stages.append(LeViTStage(downsample, blocks))
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


# ---- MViTv2 --------------------------------------------------------------------------------------


def resize_relative(table: Tensor, length: int) -> Tensor:
    """Resample a table of relative positions along one axis, (length', D), to another length."""
    return resample(table.T[None], (length,), "linear")[0].T


def relative_rows(table: Tensor, queries: int, keys: int) -> Tensor:
    """The row of a relative position table for each query and key along one axis.

    (length, D) -> (queries, keys, D). The shorter of the two axes is stretched to the length of the
    longer one. A table of another length is resampled.
    Source: MViTv2, arXiv:2112.01526, section 4.1; timm 1.0.31, mvitv2.py, cal_rel_pos_type.
    """
    table = resize_relative(table, 2 * max(queries, keys) - 1)
    per_query, per_key = max(keys / queries, 1.0), max(queries / keys, 1.0)
    tensor = lambda number: torch.full((), number, device=table.device)  # noqa: E731 (ONNX wants one)
    q = torch.arange(queries, device=table.device)[:, None] * tensor(per_query)
    k = torch.arange(keys, device=table.device)[None, :] * tensor(per_key)
    return table[(q - k + tensor((keys - 1) * per_key)).long()]


class MViTAttention(PooledAttention):
    """MViTv2's pooling attention, (B, N, C), grid -> (B, N', C'), grid'.

    With the softmax kernel, MViTv2's relative positions are added to the logits, a term for rows
    and one for columns. Args: grid: the grid of x for which their tables are made.
    """

    def __init__(
        self, dim: int, out_dim: int, heads: int, grid: Grid, stride_q: int, stride_kv: int, core_options: Mapping
    ):
        head_dim = channels_per_head(out_dim, heads)
        super().__init__(
            nn.Linear(dim, 3 * out_dim),
            nn.Linear(out_dim, out_dim),
            heads,
            head_dim,
            stride_q=stride_q,
            stride_kv=stride_kv,
            core_options=core_options,
        )
        self.rel_pos_h = self.rel_pos_w = None
        if core_options["kernel"] == "softmax":
            lengths = [2 * -(-side // min(stride_q, stride_kv)) - 1 for side in grid]
            self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(length, head_dim)) for length in lengths)

    def logit_bias(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor | None:
        if self.rel_pos_h is None:
            return None
        q = rearrange(q, "b h (y x) d -> b h y x d", y=q_grid[0])  # not divided by sqrt(D)
        rows = torch.einsum("bhyxd,ykd->bhyxk", q, relative_rows(self.rel_pos_h, q_grid[0], k_grid[0]))
        columns = torch.einsum("bhyxd,xkd->bhyxk", q, relative_rows(self.rel_pos_w, q_grid[1], k_grid[1]))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


class MViTBlock(nn.Module):
    """Pre-norm block, (B, N, C), grid -> (B, N', C'), grid'.

    The residual of the attention is x. If C changes, a linear layer of the normed x takes its
    place. If the grid changes, the residual is max-pooled.
    """

    def __init__(self, dim: int, attn: PooledAttention, out_dim: int, mlp: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.shortcut_proj_attn = nn.Linear(dim, out_dim) if dim != out_dim else None
        self.attn = attn
        self.norm2 = nn.LayerNorm(out_dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        normed = self.norm1(x)
        y, out_grid = self.attn(normed, grid)
        if self.shortcut_proj_attn is not None:
            x = self.shortcut_proj_attn(normed)
        if self.attn.stride_q > 1:
            x = F.max_pool2d(rearrange(x, "b (y x) c -> b c y x", y=grid[0]), 3, self.attn.stride_q, padding=1)
            x = rearrange(x, "b c y x -> b (y x) c")
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x), out_grid)), out_grid


class MViTv2(nn.Module):
    """(B, 3, H, W) pixels -> (B, num_classes) logits; any H x W.

    With the softmax kernel this is MViTv2 as published: keys and values are pooled by 4, 2, 1, 1 in
    stages 1 to 4, and logits have relative positions. With any other kernel it has the castling
    architecture. There, keys and values keep the queries' grid, because Eq. (9) needs a value per
    query. The MLPs have a DWConv, except in down-sampling blocks (D7).

    Args:
        depths: blocks per stage; dim, heads: C and H of the first stage. Each stage doubles both.
        castle_downsample: as in `LeViT`. Both settings pool q, k and v by 2 in those blocks.
        drop_path: stochastic depth; rises linearly from 0 in the first block to this in the last.
        image_size, num_classes, mlp_dwconv, core_options: as in `LeViT`.
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
        mlp_dwconv: int = 0,
        core_options: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
        published = core_options["kernel"] == "softmax"
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
                keep_softmax = down and not castle_downsample                                        # D5
                chosen = {**core_options, **BASELINE} if keep_softmax else core_options
                attn = MViTAttention(in_dim, dim, heads, grid, stride, stride_kv if published else stride, chosen)
                mlp = Mlp(dim, mlp_ratio * dim, 0 if down else mlp_dwconv)
                blocks.append(MViTBlock(in_dim, attn, dim, mlp, rates.pop(0)))
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


# ---- LCNet, ESNet, and their ViT variants --------------------------------------------------------


def make_divisible(value: float, divisor: int) -> int:
    """`value` rounded to a multiple of `divisor`: at least `divisor`, at least 90% of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def conv_norm(
    channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution, BatchNorm and, if `act`, Hardswish: (B, C, y, x) -> (B, C', y', x')."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), *([nn.Hardswish()] if act else []))


class SqueezeExcitation(nn.Module):
    """Multiply each channel by a gate in 0..1, computed from the means of all. timm's names."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels // 4, 1)
        self.conv_expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.conv_expand(F.relu(self.conv_reduce(mean))))


class DepthSeparable(nn.Sequential):
    """Depthwise and pointwise convolution, each with BatchNorm and Hardswish. timm's names."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, squeeze: bool = False):
        super().__init__()
        self.conv_dw, self.bn1, self.act1 = conv_norm(channels_in, channels_in, kernel, stride, groups=channels_in)
        self.se = SqueezeExcitation(channels_in) if squeeze else nn.Identity()
        self.conv_pw, self.bn2, self.act2 = conv_norm(channels_in, channels_out)


class MapBlock(MViTBlock):
    """Transformer block on a feature map, (B, C, y, x) -> same: pooled attention, MLP ratio 2.

    It has no position embeddings, so y and x are free. The MLP's DWConv has a BatchNorm. The paper
    does not describe this block. It is chosen to fit the counts of Tables 3, 6 and 7.
    """

    def __init__(self, dim: int, heads: int, mlp_dwconv: int, drop_path: float, core_options: Mapping):
        qkv, proj, head_dim = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), channels_per_head(dim, heads)
        attn = PooledAttention(qkv, proj, heads, head_dim, core_options=core_options)
        super().__init__(dim, attn, dim, Mlp(dim, 2 * dim, mlp_dwconv, batch_norm=True), drop_path)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        tokens, _ = super().forward(rearrange(x, "b c y x -> b (y x) c"), grid)
        return rearrange(tokens, "b (y x) c -> b c y x", y=grid[0])


class ConvBackbone(nn.Module):
    """(B, 3, H, W) pixels -> logits or, without `num_classes`, feature maps [C3, C4, C5].

    The maps have strides 8, 16, 32; each stride-2 step rounds up, so any H x W will do. A subclass
    defines `channels` of the three maps, and `features(x)`, which returns the maps.
    """

    channels: tuple[int, int, int]

    def make_classifier(self, num_classes: int | None) -> None:
        """Make the published classifier: 1x1 convolution to 1280 channels, Hardswish, linear."""
        self.conv_head = nn.Conv2d(self.channels[-1], 1280, 1) if num_classes else None
        self.classifier = nn.Linear(1280, num_classes) if num_classes else None

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        maps = self.features(x)
        if self.classifier is None:
            return maps
        pooled = F.hardswish(self.conv_head(F.adaptive_avg_pool2d(maps[-1], 1)))
        return self.classifier(pooled.flatten(1))


class LCNet(ConvBackbone):
    """LCNet; with `heads`, LCNet-ViT.

    Args:
        width: factor on all channels.
        heads: H of the transformer block at stride 16, and of that at stride 32.
        mlp_dwconv: kernel of the MLPs' DWConv, 0 for none.
        drop_path: stochastic depth of the transformer blocks.
    """

    def __init__(
        self,
        width: float,
        heads: tuple[int, int] | None = None,
        num_classes: int | None = None,
        mlp_dwconv: int = 0,
        drop_path: float = 0.0,
        core_options: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
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
                elif stage != 4:  # stages 3 and 4, both of stride 16, share one transformer block
                    blocks.append(MapBlock(dim, heads[stage == 5], mlp_dwconv, drop_path, core_options))
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
    """Stride-2 block of ESNet: two branches, concatenated and mixed by two convolutions.

    (B, C, y, x) -> (B, C', y/2, x/2), rounded up. Args: inner: twice the second branch's channels.
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
    """Stride-1 block of ESNet: half of the channels pass, the other half is transformed. Then both
    halves are interleaved."""

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
    """ESNet; with `heads`, ESNet-ViT.

    Args:
        width: factor on all channels but the stem's 24.
        ratios: of each stage and block: inner channels, divided by the channels of the stage.
        heads: H of the two transformer blocks at stride 32.
        mlp_dwconv, drop_path: see `LCNet`.
    """

    def __init__(
        self,
        width: float,
        ratios: tuple[tuple[float, ...], ...],
        heads: int | None = None,
        num_classes: int | None = None,
        mlp_dwconv: int = 0,
        drop_path: float = 0.0,
        core_options: Mapping = ATTENTIONS["castling"],
    ):
        super().__init__()
        self.channels = tuple(make_divisible(dim * width, 16) for dim in (128, 256, 512))
        self.stem = nn.Sequential(conv_norm(3, 24, 3, stride=2), nn.MaxPool2d(3, stride=2, padding=1))
        self.stages, dim = nn.ModuleList(), 24
        for stage, (out_dim, row) in enumerate(zip(self.channels, ratios, strict=True)):
            inner = [make_divisible(int(out_dim * ratio), 8) for ratio in row]
            blocks = [ESBlockDown(dim, out_dim, inner[0])]
            if heads is not None and stage == 2:
                blocks += [MapBlock(out_dim, heads, mlp_dwconv, drop_path, core_options) for _ in inner[1:]]
            else:
                blocks += [ESBlock(out_dim, channels) for channels in inner[1:]]
            self.stages.append(nn.Sequential(*blocks))
            dim = out_dim
        self.make_classifier(num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for blocks in self.stages:
            maps.append(blocks(maps[-1]))
        return maps[1:]


# ---- builders ------------------------------------------------------------------------------------

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
        attention: "castling": linear-angular attention with the auxiliary branch. "softmax": the
            architecture without castling, as published where it is. Another of KERNELS: the
            castling architecture with it, without the branch unless auxiliary=True.
        num_classes: number of logits. None means 1000, but LCNet and ESNet then have no classifier
            and return feature maps [C3, C4, C5]. It has no effect on dense models.
        image_size: pixels, one number or (height, width). The model accepts other sizes too.
        castle_downsample: see `LeViT`. It has no effect on models without down-sampling blocks.
        overrides: other arguments of the model (dims, depth, drop_path, distilled, mlp_dwconv, ...)
            or of its AttentionCore (auxiliary, epsilon, schedule, dconv, dropout). The MLPs' DWConv,
            `mlp_dwconv`, is 5x5 by default, and absent with softmax (D7). In dense models it is 3x3:
            with 5x5 there are more parameters and MACs than in the paper's Castling-ViT-B (D8).
            Models without attention ignore the options of attention and MLPs.
    Raises: ValueError for an unknown name, attention or override. It lists known or similar ones.
    """
    family, row = look_up(MODELS, name, "model")
    core_options = dict(look_up(ATTENTIONS, attention, "attention"))
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    known_core = set(inspect.signature(AttentionCore).parameters) - {"heads", "kernel"}
    core_options |= {key: overrides.pop(key) for key in known_core & set(overrides)}
    known = set(inspect.signature(family).parameters) - {"core_options"}
    for key in set(overrides) - known:
        raise ValueError(f"{name} has no option {key!r}: choose from {', '.join(sorted(known_core | known))}")
    mlp_dwconv = overrides.get("mlp_dwconv")
    if mlp_dwconv and (mlp_dwconv < 0 or mlp_dwconv % 2 == 0):
        raise ValueError(f"mlp_dwconv must be odd, or 0 for none, got {mlp_dwconv}")
    if mlp_dwconv is None:
        castling = 3 if family is DenseViT else 5                                                    # D7, D8
        overrides["mlp_dwconv"] = 0 if core_options["kernel"] == "softmax" else castling
    common = dict(image_size=image_size, castle_downsample=castle_downsample)
    if num_classes is not None:
        common["num_classes"] = num_classes
    options = {key: value for key, value in common.items() if key in known} | row | overrides
    return family(core_options=core_options, **options)


def __getattr__(name: str):
    """Functions of convert.py can be imported from here too. The first use loads convert.py."""
    if name not in ("load_pretrained", "convert", "fuse", "export"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import convert

    return getattr(convert, name)
