"""Count the parameters and multiply-adds (MACs) of a model, and compare with the paper's tables.

    python flops.py --table 2                           a table of the paper beside our counts
    python flops.py --model levit128 --attention castling,softmax --image-size 512
    python flops.py --curve --model deit_tiny           MACs of softmax and castled by image size

One MAC is one multiplication and one addition, so 2 FLOPs. All counts are MACs of one inference.
The softmax branch is counted separately. Conventions: `macs` counts convolutions, linear layers
and matrix products. `paper-cls` and `paper-det` count as the paper does for classifiers and for
detectors. `fvcore-like` adds norms, as fvcore does, but not its pooling and resampling. "weights
only" are the weights of convolutions and linear layers, as the paper counts parameters. Models are
on the meta device: no values are computed.
"""

import argparse
import contextlib
import functools
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import attention
from attention import castle
from detect import build_detector
from models import (
    ATTENTIONS,
    LEVIT,
    Grid,
    LinearNorm,
    TokenConv,
    activated_projection,
    build_model,
    pool_heads,
    subsample,
)
from run import Parser, at_least
from segment import PIXEL_DECODERS, build_segmenter

aten = torch.ops.aten


# ---- counting ------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What one forward costs, for the inputs that `count` was given.

    params: all parameters.
    params_weights: only the weights of convolutions and linear layers, as the paper counts.
    macs: under the convention. attention: those of the products of q, k and v in all cores.
    by_module: {module: MACs of matrix products and convolutions in it and its children}.
    """

    params: int
    params_weights: int
    macs: int
    attention: int
    by_module: dict[str, int]


def fused_attention(query, key, value, *args, **kwargs) -> int:
    """FLOPs of a fused softmax attention, (..., N, D), (..., M, D), (..., M, E)."""
    batch = query[:-2].numel()
    return 2 * batch * query[-2] * key[-2] * (query[-1] + value[-1])


def samples(input, grid, mode=0, *args, out_val=None, **kwargs) -> int:
    """FLOPs of grid_sample: an output sums 4 or 16 weighted values; with mode nearest, 0."""
    return 2 * {0: 4, 1: 0, 2: 16}[mode] * input[0] * input[1] * grid[1] * grid[2]


# Operations that torch's counter takes as 0. Each function is given the shapes of the arguments.
FORMULAS = {aten._scaled_dot_product_flash_attention_for_cpu: fused_attention, aten.grid_sampler_2d: samples}

NORMS = {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
         "_batch_norm_with_update", "_batch_norm_no_update"}  # fmt: skip

# Operations without a sum of products. Strict counting raises an error for any operation that is
# neither counted nor listed here, unless it is pointwise or a view.
FREE = NORMS | {
    # softmax, norms, reductions
    "_softmax", "_log_softmax", "_safe_softmax", "native_layer_norm", "native_group_norm", "linalg_vector_norm",
    "all", "amax", "amin", "any", "argmax", "cumsum", "max", "mean", "min", "norm", "prod", "sort", "sum", "topk",
    # activations that torch does not tag as pointwise
    "gelu", "hardsigmoid", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "leaky_relu", "relu", "relu_", "silu",
    "threshold", "native_dropout", "dropout", "bernoulli", "bernoulli_",
    # pooling and resampling by fixed weights
    "_adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d_with_indices", "upsample_bicubic2d",
    "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest2d",
    # copies, indexing, creation
    "_to_copy", "_unsafe_index", "_unsafe_view", "arange", "cat", "clone", "constant_pad_nd", "contiguous", "copy_",
    "detach", "embedding", "empty", "empty_like", "eye", "fill_", "full", "full_like", "gather", "index", "index_copy",
    "lift_fresh", "masked_fill_", "new_empty", "nonzero", "new_full", "new_ones", "new_zeros", "one_hot", "ones",
    "ones_like", "rand", "rand_like",
    "randn", "repeat", "roll", "scalar_tensor", "scatter", "stack", "tril", "triu", "zero_", "zeros",
    "zeros_like", "_fused_sdp_choice", "_local_scalar_dense",
}  # fmt: skip


def norm_terms(batch_norm: int, layer_norm: int) -> dict[str, Callable]:
    """MACs of each normalising operation: the number of elements times the factor given."""
    terms = dict.fromkeys(NORMS, lambda a, o: batch_norm * a[0].numel())
    return terms | dict.fromkeys(("native_layer_norm", "native_group_norm"), lambda a, o: layer_norm * a[0].numel())


def global_pool(args: tuple, out) -> int:
    """Elements that adaptive_avg_pool2d(x, 1) reads. It arrives here as a mean over two axes."""
    return args[0].numel() if args[0].ndim == 4 and sorted(args[1]) == [-2, -1] else 0


# {convention: {operation: function of its arguments and result}}. The function gives what the
# convention adds to the MACs of convolutions, linear layers and matrix products.
CONVENTIONS: dict[str, dict[str, Callable]] = {
    # This project's convention: nothing is added.
    "macs": {},
    # That of mobile-vision, which fits the paper's classifiers. It counts the same.
    "paper-cls": {},
    # That of mmcv 1.4, get_flops.py, which fits the paper's detectors. It adds biases of
    # convolutions, norms, some activations (its Hardswish holds a ReLU6) and pooling. mmcv counts
    # only modules. The paper's matrix products are modules (MatMul), so all products count here.
    "paper-det": norm_terms(2, 2) | {
        "convolution": lambda a, o: o.numel() if a[2] is not None else 0,
        # _unsafe_index: nearest-neighbour upsampling arrives here as this operation
        **dict.fromkeys(("relu", "relu_", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "upsample_nearest2d",
                         "upsample_bilinear2d", "_unsafe_index"), lambda a, o: o.numel()),
        **dict.fromkeys(("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d"), lambda a, o: a[0].numel()),
        "mean": global_pool,
    },
    # It adds norms, as fvcore's FlopCountAnalysis does. fvcore omits fused attention, which counts
    # here. It counts pooling and resampling, which are free here.
    "fvcore-like": norm_terms(2, 5),
}  # fmt: skip


class Auditor(TorchDispatchMode):
    """Sees every operation and sums the convention's terms in `extra`. Strict: see FREE."""

    def __init__(self, terms: dict[str, Callable], strict: bool):
        super().__init__()
        self.terms, self.strict, self.extra = terms, strict, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        if name in self.terms:
            self.extra += self.terms[name](args, out)
        known = packet in flop_registry or packet in FORMULAS or (func.namespace == "aten" and name in FREE)
        if self.strict and not known and torch.Tag.pointwise not in func.tags and not func.is_view:
            raise ValueError(f"cannot count {func}: give it a formula in FORMULAS, or list it as free in FREE")
        return out


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context: eval mode without gradients or mask statistics. Afterwards all is restored."""
    modes = {module: module.training for module in model.modules()}
    recording = {core: core.record for core in attention.cores(model).values()}
    try:
        with torch.no_grad():
            model.eval()
            attention.record_masks(model, False)
            yield
    finally:
        for core, record in recording.items():
            core.record = record
        for module, training in modes.items():
            module.training = training


def count(model: nn.Module, *inputs: Tensor, convention: str = "macs", strict: bool = True) -> Cost:
    """Parameters and MACs of one forward in eval mode. The model is left as it was.

    Args:
        inputs: of the model, on its device; the meta device is enough.
        convention: a key of CONVENTIONS.
        strict: raise for an operation that has no count, instead of taking it as 0.
    Raises: ValueError for an unknown convention, or if `strict` for an operation without a count.
    """
    terms = attention.look_up(CONVENTIONS, convention, "convention")
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    auditor = Auditor(terms, strict)
    # Count the formulas of attention.py: fast.py would skip a branch whose mask is empty.
    formulas = dict(
        form=staticmethod(attention.castling_attention), branch_form=staticmethod(attention.auxiliary_branch)
    )
    with evaluating(model), patch.multiple(attention.AttentionCore, **formulas), auditor, counter:
        model(*inputs)
    root = type(model).__name__
    flops = counter.get_flop_counts()
    modules = {name.removeprefix(root).removeprefix("."): ops for name, ops in flops.items() if name != "Global"}
    layers = {aten.mm, aten.addmm, aten.convolution}  # other products in a core are of q, k and v
    within = [modules.get(name, {}) for name, m in model.named_modules() if isinstance(m, attention.AttentionCore)]
    between = sum(value // 2 for ops in within for op, value in ops.items() if op not in layers)
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        params_weights=sum(
            m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
        ),
        macs=counter.get_total_flops() // 2 + auditor.extra,
        attention=between,
        by_module={name: sum(ops.values()) // 2 for name, ops in modules.items()},
    )


class Storages(TorchDispatchMode):
    """Bytes of the results of operations that are still referenced, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def peak_activation_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """The most bytes that intermediate results take at one time, in one forward without gradients.

    This is an estimate: it omits the allocator's overhead and the memory used inside an operation.
    Softmax attention counts as the fused kernel, which allocates only its output.
    """

    def fused(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    attention_fused = patch.object(F, "scaled_dot_product_attention", fused)
    with evaluating(model), attention_fused, Storages() as storages:
        model(*inputs)
    return storages.peak


# ---- the paper's tables --------------------------------------------------------------------------

TABLE_1 = {1: 685, 2: 661, 3: 736, 4: 771, 5: 763, 6: 838}  # design: M MACs of LeViT-192

# Table 1's attention designs by row. token_pooled: stages that pool keys and values by 2.
# bottleneck: queries have fewer channels than values (D < E) in stage blocks.
# post_q: down-sampling blocks subsample after the projection to queries, not before it. Queries are
# added to the output where D = E.
DESIGNS = {
    1: dict(token_pooled=(0, 1), bottleneck=False, post_q=False),
    2: dict(token_pooled=(), bottleneck=True, post_q=False),
    3: dict(token_pooled=(), bottleneck=False, post_q=False),
    4: dict(token_pooled=(0, 1, 2), bottleneck=False, post_q=True),
    5: dict(token_pooled=(), bottleneck=True, post_q=True),
    6: dict(token_pooled=(), bottleneck=False, post_q=True),
}

TABLE_2 = {  # model: (parameters in M, MACs in G) as the paper prints them, softmax and castling
    "deit_tiny": ((5.6, 1.25), (5.64, 1.18)),
    "deit_base": ((86.3, 17.56), (87.22, 17.28)),
    "mvitv2_tiny": ((24.0, 4.68), (24.1, 4.50)),
    "mvitv2_small": ((34.7, 6.95), (34.7, 6.95)),
    "mvitv2_base": ((51.2, 10.07), (51.9, 9.82)),
    "levit128": ((9.2, 0.41), (10.5, 0.49)),
    "levit192": ((10.9, 0.66), (12.7, 0.82)),
    "levit256": ((18.9, 1.12), (22.0, 1.40)),
    "levit384": ((39.1, 2.35), (45.8, 2.90)),
}

TABLE_3 = [  # model, pixels: parameters in M, MACs in G
    ("esnet_vit_s", 320, 3.25, 0.62),
    ("esnet_vit_s", 416, 3.25, 1.06),
    ("esnet_vit_m", 416, 6.01, 2.00),
    ("esnet_vit_l", 416, 9.32, 3.03),
    ("lcnet_vit_l", 416, 13.10, 5.31),
]

TABLES_6_AND_7 = {  # table: size, pixels, and the (parameters in M, MACs in G) of its rows
    6: ("s", 320, (1.10, 0.48), (2.14, 0.69), (2.14, 0.62)),
    7: ("m", 416, (3.32, 2.15), (7.53, 3.51), (7.53, 3.15)),
}
# M parameters, G MACs, G MACs of the backbone; height and width of the image.
TABLE_4 = {"softmax": (118, 229, 182), "castling": (118, 195, 147)}
TABLE_4_SIZE = (512, 704)


class DesignAttention(attention.AttentionCore):
    """LeViT's softmax attention in a design of Table 1, with convolved q, k, v instead of a bias.

    (B, N, C), grid -> (B, N', C'), grid'. The convolutions are 3x3 and depthwise.

    Args:
        key_dim, value_dim: D and E.
        stride: with 2, queries are every second one of every second row, and are not convolved.
        stride_kv: of the convolutions of keys and values.
        residual: add the queries to the output if D = E.
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
    ):
        super().__init__(heads, kernel="softmax")
        self.split, self.stride = [key_dim, key_dim, value_dim], stride
        self.residual = residual and key_dim == value_dim
        self.qkv = LinearNorm(dim, heads * sum(self.split))
        self.proj = activated_projection(heads * value_dim, out_dim)
        for name, dim, step in zip("qkv", self.split, (stride, stride_kv, stride_kv), strict=True):
            if name != "q" or stride == 1:
                self.add_module(f"pool_{name}", TokenConv(dim, 3, step))
                self.add_module(f"norm_{name}", nn.LayerNorm(dim, eps=1e-6))

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        qkv = rearrange(self.qkv(x), "b n (h c) -> b h n c", h=self.heads)
        q, k, v = qkv.split(self.split, dim=-1)
        k, _ = pool_heads(k, grid, self.pool_k, self.norm_k)
        v, _ = pool_heads(v, grid, self.pool_v, self.norm_v)
        if self.stride == 1:
            q, grid = pool_heads(q, grid, self.pool_q, self.norm_q)
        else:
            q, grid = subsample(q, grid)
        y = self.attend(q, k, v)
        y = y + q if self.residual else y
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), grid


def levit_of_design(design: int) -> nn.Module:
    """LeViT-192 with one head and the attention of a row of Table 1 (1..6) instead of its own."""
    row, size = DESIGNS[design], LEVIT["levit192"]
    dims, D = size["dims"], size["key_dim"]
    model = build_model("levit192", "softmax", distilled=False)
    for i, (stage, dim, heads) in enumerate(zip(model.stages, dims, size["heads"], strict=True)):
        stride_kv = 2 if i in row["token_pooled"] else 1
        if row["post_q"] and i > 0:
            before, down = dims[i - 1], stage.downsample
            down.attn_downsample = DesignAttention(
                before, dim, before // D, 4 * D, 4 * D, stride=2, stride_kv=stride_kv, residual=True
            )
            down.skip = LinearNorm(before, dim)
        key_dim = D if row["bottleneck"] else 2 * D
        for block in stage.blocks:
            block.attn = DesignAttention(
                dim, dim, heads, key_dim, 2 * D, 1, stride_kv=stride_kv, residual=row["post_q"]
            )
    return model


def meta_model(
    name: str, attention_name: str = "castling", image_size: int = 224, **options
) -> tuple[nn.Module, Tensor]:
    """A castled model and one image for it, on the meta device."""
    with torch.device("meta"):
        model = build_model(name, attention_name, image_size=image_size, **options)
        return castle(model).eval(), torch.empty(1, 3, image_size, image_size)


def table_row(
    name: str, attention_name: str, params: int, macs: int, paper_params: float | None, paper_macs: float, note: str
) -> dict:
    """A table's row as --json prints it: parameters in M, MACs in G, None if the paper has none."""
    return dict(
        model=name,
        attention=attention_name,
        params_m=params / 1e6,
        macs_g=macs / 1e9,
        paper_params_m=paper_params,
        paper_macs_g=paper_macs,
        note=note,
    )


def table_1() -> list[dict]:
    """LeViT-192, one head, in the six attention designs that the paper compares by MACs."""
    rows = []
    for design, paper in TABLE_1.items():
        with torch.device("meta"):
            model, image = levit_of_design(design), torch.empty(1, 3, 224, 224)
        cost = count(model, image, convention="paper-cls")
        note = f"row {design}: " + ", ".join(f"{key} {value}" for key, value in DESIGNS[design].items())
        rows.append(table_row("levit192", "softmax", cost.params_weights, cost.macs, None, paper / 1000, note))
    return rows


def table_2() -> list[dict]:
    """ImageNet classification models, as the paper counted them.

    Parameters are weights only, with one head. But the rows of softmax LeViTs are copied from their
    paper: all parameters, two heads.
    """
    rows = []
    for name, (softmax, castling) in TABLE_2.items():
        levit = name.startswith("levit")
        model, image = meta_model(name, "softmax")
        cost = count(model, image, convention="paper-cls")
        params, note = (cost.params, "all parameters, two heads") if levit else (cost.params_weights, "")
        rows.append(table_row(name, "softmax", params, cost.macs, *softmax, note))
        downsamples = not name.startswith("deit")
        for castle_downsample in (False, True) if downsamples else (True,):
            model, image = meta_model(name, "castling", castle_downsample=castle_downsample)
            cost = count(model, image, convention="paper-cls")
            note = "" if not downsamples else "C2: all castled" if castle_downsample else "C1: softmax down-sampling"
            rows.append(table_row(name, "castling", cost.params_weights, cost.macs, *castling, note))
    return rows


def detector_row(
    name: str,
    attention_name: str,
    image_size: int,
    paper: tuple[float, float],
    note: str,
    branch: bool = False,
    **options,
) -> dict:
    """A detector's row, castled unless `branch`. Convention "paper-det"; pure_macs_g without it."""
    with torch.device("meta"):
        model = build_detector(name, attention_name, image_size=image_size, **options)
        image = torch.empty(1, 3, image_size, image_size)
    model = model if branch else castle(model)
    cost = count(model, image, convention="paper-det")
    pure = cost.by_module[""] / 1e9
    note = f"{image_size} px, {note}; pure MACs {pure:.4f} G"
    return table_row(name, attention_name, cost.params, cost.macs, *paper, note) | dict(pure_macs_g=pure)


def table_3() -> list[dict]:
    """COCO detectors. The paper's ESNet-ViT rows fit models that still have the auxiliary branch.

    Its LCNet-ViT row fits a model without the branch and without the DWConv of the MLPs.
    """
    rows = []
    for name, size, *paper in TABLE_3:
        if name.startswith("esnet"):
            rows.append(detector_row(name, "castling", size, paper, "with auxiliary branch, as printed", branch=True))
        else:
            note = "castled, no DWConv in MLPs, as printed"
            rows.append(detector_row(name, "castling", size, paper, note, mlp_dwconv=0))
        rows.append(detector_row(name, "castling", size, paper, "castled: what inference costs"))
    return rows


def table_6_or_7(table: int) -> list[dict]:
    """Ablation of LCNet-ViT. The last row is the model of this project, with the MLPs' DWConv.

    The paper prints the same parameters with and without "DW.". So "DW." is the DWConv on V: that
    of the MLPs would change the number.
    """
    size, pixels, lcnet, softmax, linear = TABLES_6_AND_7[table]
    vit = f"lcnet_vit_{size}"
    return [
        detector_row(f"lcnet_{size}", "softmax", pixels, lcnet, "LCNet, no attention"),
        detector_row(vit, "softmax", pixels, softmax, "LCNet-ViT"),
        detector_row(vit, "linear_angular", pixels, linear, "+ Lin.", dconv=0, mlp_dwconv=0),
        detector_row(vit, "linear_angular", pixels, linear, "+ Lin. + DW. on V", mlp_dwconv=0),
        detector_row(vit, "castling", pixels, linear, "+ Lin. + DW. on V + SparseAttn., castled", mlp_dwconv=0),
        detector_row(vit, "castling", pixels, linear, "the same + DW. 5x5 in MLPs, castled"),
    ]


def table_4() -> list[dict]:
    """ViT-B with Mask2Former on ADE20K: the whole model, and its backbone with the pyramid.

    The paper names no input size. Its six numbers fit 512 x 704 (height x width). That is the first
    validation image, 512 x 683, padded to multiples of 32; this size is also the most common one.
    Mask2Former's own counts include the sum over queries that turns masks into class scores. The
    paper's counts do not.
    """
    rows, (height, width) = [], TABLE_4_SIZE
    for decoder in PIXEL_DECODERS:
        for attention_name, (paper_params, paper_macs, paper_backbone) in TABLE_4.items():
            with torch.device("meta"):
                model = castle(build_segmenter(attention=attention_name, pixel_decoder=decoder)).eval()
                image = torch.empty(1, 3, height, width)
            cost = count(model, image)
            note = f"{decoder}, input {height} x {width}: ADE20K's first validation image, padded"
            rows.append(table_row("vit_base", attention_name, cost.params, cost.macs, paper_params, paper_macs, note))
            params = sum(p.numel() for p in model.backbone.parameters())
            macs, note = cost.by_module["backbone"], f"{decoder}, backbone and pyramid"
            rows.append(table_row("vit_base backbone", attention_name, params, macs, None, paper_backbone, note))
    return rows


TABLES = {
    1: table_1,
    2: table_2,
    3: table_3,
    4: table_4,
    6: functools.partial(table_6_or_7, 6),
    7: functools.partial(table_6_or_7, 7),
}


def deviation(ours: float, paper: float | None) -> str:
    return "" if paper is None else f"{100 * (ours / paper - 1):+.2f}%"


def print_rows(rows: list[dict]) -> None:
    """A table of the paper: our count, the paper's, and the deviation in percent."""
    print(f"{'model':18}{'attention':12}{'params, M':>10}{'paper':>8}{'':>9}{'MACs, G':>10}{'paper':>8}{'':>9}  note")
    for r in rows:
        paper_params = "" if r["paper_params_m"] is None else f"{r['paper_params_m']:g}"
        print(
            f"{r['model']:18}{r['attention']:12}{r['params_m']:10.3f}{paper_params:>8}"
            f"{deviation(r['params_m'], r['paper_params_m']):>9}{r['macs_g']:10.4f}{r['paper_macs_g']:>8g}"
            f"{deviation(r['macs_g'], r['paper_macs_g']):>9}  {r['note']}"
        )


# ---- one model, and resolution -------------------------------------------------------------------


def compare(name: str, attentions: list[str], image_size: int, convention: str) -> list[dict]:
    """Costs of one model with several attentions, by part; and of its branch in training."""
    rows = []
    for attention_name in attentions:
        with torch.device("meta"):
            model = build_model(name, attention_name, image_size=image_size)
            image = torch.empty(1, 3, image_size, image_size)
        with_branch = count(model, image, convention=convention)
        cost = count(castle(model), image, convention=convention)
        parts = Counter()  # of modules in no other module that was called: blocks.3, stages.0, head
        for module, macs in cost.by_module.items():
            if module and not any(module.startswith(f"{other}.") for other in cost.by_module if other):
                parts[re.match(r"\w+(\.\d+)?", module)[0]] += macs
        rows.append(dict(
            model=name,
            attention=attention_name,
            image_size=image_size,
            convention=convention,
            params_m=cost.params / 1e6,
            params_weights_m=cost.params_weights / 1e6,
            macs_g=cost.macs / 1e9,
            paper_params_m=None,
            paper_macs_g=None,
            note="castled" if attention_name == "castling" else "",
            attention_share=cost.attention / cost.macs,
            branch_macs_g=(with_branch.macs - cost.macs) / 1e9,
            peak_activation_mib=peak_activation_bytes(model, image) / 2**20,
            by_module_g={part: macs / 1e9 for part, macs in parts.items()},
        ))  # fmt: skip
    return rows


def print_comparison(rows: list[dict]) -> None:
    """The rows of `compare`, one column per attention."""
    first = rows[0]
    print(f"{first['model']} at {first['image_size']} px, one image, convention {first['convention']}; 1 MAC = 2 FLOPs")
    lines = [
        ("parameters, M", "params_m", "{:.3f}"), ("weights only, M", "params_weights_m", "{:.3f}"),
        ("MACs, G", "macs_g", "{:.4f}"), ("  of which q, k, v products", "attention_share", "{:.1%}"),
        ("auxiliary branch, training, G", "branch_macs_g", "{:.4f}"),
        ("peak activations, MiB", "peak_activation_mib", "{:.1f}"),
    ]  # fmt: skip
    print(" " * 32 + "".join(f"{r['attention']:>16}" for r in rows))
    for title, key, form in lines:
        print(f"{title:32}" + "".join(f"{form.format(r[key]):>16}" for r in rows))
    for part in dict.fromkeys(part for r in rows for part in r["by_module_g"]):
        print(f"  {part:30}" + "".join(f"{r['by_module_g'].get(part, 0):16.4f}" for r in rows))


CURVE_PIXELS = range(64, 1025, 64)  # of --curve


def curve(name: str, sizes: Iterable[int]) -> list[dict]:
    """MACs of the softmax model and of the castled model at several image sizes."""
    rows = []
    for size in sizes:
        softmax, castling = (count(*meta_model(name, a, size)).macs / 1e9 for a in ("softmax", "castling"))
        rows.append(dict(model=name, image_size=size, softmax_macs_g=softmax, castling_macs_g=castling))
    return rows


def print_curve(rows: list[dict]) -> None:
    """The rows of `curve`, and the smallest size at which the castled model costs less."""
    print(f"{rows[0]['model']}: MACs per image, G, over image size")
    print(f"{'px':>6}{'softmax':>12}{'castled':>12}{'ratio':>8}")
    for r in rows:
        ratio = r["castling_macs_g"] / r["softmax_macs_g"]
        print(f"{r['image_size']:6}{r['softmax_macs_g']:12.3f}{r['castling_macs_g']:12.3f}{ratio:8.3f}")
    cheaper = [r["image_size"] for r in rows if r["castling_macs_g"] < r["softmax_macs_g"]]
    print(f"castled is cheaper from {min(cheaper)} px" if cheaper else "castled is never cheaper at these sizes")


# ---- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of flops.py."""
    p = Parser("flops.py", __doc__)
    add = p.add_argument
    add("--table", type=int, choices=list(TABLES), help="a table of the paper, beside our counts")
    add("--model", help="name of a model; default levit128, with --curve deit_tiny")
    add("--attention", default="castling,softmax", help=f"with commas between: {', '.join(ATTENTIONS)}")
    add("--image-size", type=at_least(1), default=224, help="pixels per side; default 224")
    add("--convention", default="macs", help=f"what counts: {', '.join(CONVENTIONS)}; default macs")
    add("--curve", action="store_true", help="MACs of softmax and castled at 64 to 1024 pixels")
    add("--json", action="store_true", help="print JSON instead of a table")
    return p


def main(args: argparse.Namespace) -> None:
    try:
        known = {"table", "json"} if args.table else {"curve", "model", "json"} if args.curve else set(vars(args))
        given = {name for name, value in vars(args).items() if value != parser().get_default(name)}
        if foreign := sorted(name.replace("_", "-") for name in given - known):
            raise ValueError(f"--table takes only --json, --curve only --model and --json; got --{foreign[0]}")
        if args.table:
            rows, show = TABLES[args.table](), print_rows
        elif args.curve:
            rows, show = curve(args.model or "deit_tiny", CURVE_PIXELS), print_curve
        else:
            rows = compare(args.model or "levit128", args.attention.split(","), args.image_size, args.convention)
            show = print_comparison
    except ValueError as error:
        parser().exit(2, f"flops.py: error: {error}\n")
    print(json.dumps(rows, indent=1)) if args.json else show(rows)


if __name__ == "__main__":
    main(parser().parse_args())
