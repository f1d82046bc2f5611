"""The mathematics of this repository as laws: attention, losses, metrics, counts.

    pytest test_castling.py                 this file, in about a minute
    pytest                                  all tests, tests/ too
    pytest --hypothesis-profile=thorough    all, with 20 times the random examples

Oracles, which give the expected values, are the slow, obvious form in float64. Tolerances come from the dtype.
Everything else is tested in tests/, one file per module.

Contents
    1. helpers and oracles
    2. attention.py: the angular kernel and its series
    3. attention.py: attention by kernel
    4. attention.py: the auxiliary branch, and castling
    5. attention.py: the core and the drop-in block
    6. attention.py: precision, transforms, the branch in blocks
    7. train.py: schedules and losses
    8. detect.py: assignment, losses, decoding
    9. segment.py: layers from their definitions
    10. segment.py: matching, losses, metric, inference
    11. counts: parameters and MACs of the paper's tables
"""

import copy
import itertools
import math
import os
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import detect
import fast
import flops
import run
import segment
import train
from attention import (
    KERNELS,
    AttentionCore,
    LinearAngularAttention,
    angular_coefficients,
    angular_series,
    angular_series_bound,
    angular_similarity,
    castle,
    linear_angular_attention,
    mask_density,
    mask_statistics,
    mask_threshold,
    masked_softmax_attention,
    record_masks,
    set_threshold,
)
from conftest import ROOT, examples, flags, shaken, tiny_segmenter
from models import build_model

# ---- 1. helpers and oracles ----------------------------------------------------------------------


@pytest.fixture(params=[attention, fast], ids=["formula", "fast"])
def form(request):
    """The module whose forms of Eq. (9) and (10) every core takes during the test."""
    if request.param is fast:
        fast.enable()
    yield request.param
    fast.disable()


in_both_forms = pytest.mark.usefixtures("form")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class Operations(TorchDispatchMode):
    """Keeps name and shape of every tensor that an operation gives back."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x)]
        self.seen += [(func._schema.name.removeprefix("aten::"), tuple(x.shape)) for x in tensors]
        return out


@st.composite
def qkv(draw, max_tokens=12, max_dim=8, zero_tokens=True):
    """float64 (q, k, v), (B, H, N, D|D|E). Hypothesis picks shapes, scale, seed and zero tokens, torch the numbers."""
    B, H, N, D, E = (draw(st.integers(1, m)) for m in (2, 3, max_tokens, max_dim, max_dim))
    x = 10.0 ** draw(st.integers(-3, 3)) * randn(B, H, N, 2 * D + E, seed=draw(st.integers(0, 2**31 - 1)))
    if zero_tokens and draw(st.booleans()):
        x[:, :, 0] = 0
    return x.split([D, D, E], dim=-1)


def cosines(q, k):
    """<q_i, k_j> / |q_i||k_j| pair by pair, 0 where one is zero."""
    q = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    k = k / k.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("...nd,...md->...nm", q, k)


def explicit(kernel, q, k, v):
    """Attention of each kernel from its (N, M) weights or plain loops; the definitions of Table 5, spelled out."""
    N, M, D = q.shape[-2], k.shape[-2], q.shape[-1]
    if kernel == "linear_angular":
        return (0.5 * torch.eye(N, dtype=q.dtype) + cosines(q, k) / math.pi) @ v
    if kernel == "angular":
        return (1 - torch.arccos(cosines(q, k).clamp(-1, 1)) / math.pi) @ v
    if kernel == "cosine":
        return cosines(q, k) @ v
    if kernel == "mc":  # entry by entry: 1 + the logit, less its row's and its column's mean, plus the mean of all
        logits = torch.einsum("...nd,...md->...nm", q, k) / D**0.5
        both = logits.mean((-1, -2), keepdim=True)
        return (1 + logits - logits.mean(-1, keepdim=True) - logits.mean(-2, keepdim=True) + both) / M @ v
    if kernel == "softmax_linear":
        return torch.einsum("...nd,...md->...nm", q.softmax(-1), k.softmax(-2)) @ v
    if kernel == "identity":
        return torch.eye(N, dtype=q.dtype) @ v
    if kernel.startswith("softmax"):  # after softmax_linear
        return (torch.einsum("...nd,...md->...nm", q, k) / D**0.5).softmax(-1) @ v
    weights = torch.einsum("...nd,...md->...nm", q.relu(), k.relu())
    return weights / M @ v if kernel == "relu_s" else weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


def hybrid(tokens=60, **core):
    core = AttentionCore(2, auxiliary=True, **core)
    return core, randn(3, 2, 2, tokens, 8, dtype=torch.float32) * 2


class Released(nn.Module):
    """The formula of the authors' block, from its equations: divisions without a floor, plain (9, 1) Conv2d."""

    def __init__(self, dim, heads, bias, sparse):
        super().__init__()
        self.heads, self.sparse = heads, sparse
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)
        self.dconv = nn.Conv2d(heads, heads, (9, 1), padding=(4, 0), bias=False, groups=heads)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        P = (q @ k.mT * (C // self.heads) ** -0.5).softmax(-1)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        y = v / 2 + q @ (k.mT @ v) / math.pi
        if self.sparse:
            y = y + P * (P > 0.02) @ v
        y = y / y.norm(dim=-1, keepdim=True) + self.dconv(v)
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


def results(function, inputs, grad):
    """Output and gradients of all tensors among the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]  # detach keeps the layout
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def golden_outputs():
    """The outputs and targets of the specification's golden numbers: maps by level, logits, bins, points, targets."""
    def maps(channels, function):
        shapes = [(2, channels, side, side) for side in (40, 20, 10, 5)]
        axes = [torch.meshgrid(*(torch.arange(n).double() for n in shape), indexing="ij") for shape in shapes]
        return [function(level, *axis).requires_grad_() for level, axis in enumerate(axes)]

    cls = maps(80, lambda l, b, c, y, x: 3 * torch.sin(0.7 * c + 1.3 * y + 2.1 * x + 0.5 * b + l) - 3)
    reg = maps(32, lambda l, b, k, y, x: 2 * torch.cos(0.9 * k + 0.4 * y - 0.6 * x + b + 0.3 * l))
    logits, bins = (torch.cat([m.flatten(2).mT for m in maps], dim=1) for maps in (cls, reg))
    boxes = [[10, 20, 110, 180], [150, 60, 300, 310], [40.5, 200.25, 90.75, 260], [5, 5, 315, 300],
             [200, 200, 212, 214]]  # fmt: skip
    targets = [(torch.tensor(boxes), torch.tensor([0, 17, 42, 79, 3])),
               (torch.tensor([[60.0, 60, 140, 130]]), torch.tensor([5]))]  # fmt: skip
    points = detect.make_points([(side, side) for side in (40, 20, 10, 5)], "cpu")
    return cls, reg, logits, bins.unflatten(-1, (4, 8)), points, targets


def slow_iou(a, b, generalised=False):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    if not generalised:
        return overlap / union
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap / union - (hull - union) / hull


def slow_simota(logits, boxes, points, gt_boxes, gt_labels):
    """SimOTA from its description, one pair and one class at a time."""
    inside = lambda p, g: g[0] < p[0] < g[2] and g[1] < p[1] < g[3]  # noqa: E731
    near = lambda p, g: all(abs(p[i] - (g[i] + g[i + 2]) / 2) < 2.5 * p[2] for i in (0, 1))  # noqa: E731
    matched, cost, iou = [-1] * len(points), {}, {}
    valid = [i for i, p in enumerate(points) if any(inside(p, g) or near(p, g) for g in gt_boxes)]
    for i in valid:
        for j, g in enumerate(gt_boxes):
            u = iou[i, j] = slow_iou(boxes[i], g)
            total = 0.0
            for c, z in enumerate(logits[i]):
                p = 1 / (1 + math.exp(-z))
                q = u if c == gt_labels[j] else 0.0
                weight = q if q > 0 else 0.75 * p * p
                total -= weight * (q * math.log(p) + (1 - q) * math.log(1 - p))
            outside = not (inside(points[i], g) and near(points[i], g))
            cost[i, j] = total + 6 * (1 - slow_iou(boxes[i], g, generalised=True)) + 1e8 * outside
    takers = {i: [] for i in valid}
    for j in range(len(gt_boxes)):
        best = sorted((iou[i, j] for i in valid), reverse=True)[:10]
        for i in sorted(valid, key=lambda i, j=j: cost[i, j])[: max(1, int(sum(best)))] if valid else []:
            takers[i].append(j)
    for i, taken in takers.items():
        if len(taken) == 1:
            matched[i] = taken[0]
        elif taken:
            matched[i] = min(range(len(gt_boxes)), key=lambda j, i=i: cost[i, j])
    return matched


@st.composite
def scenes(draw, classes=4):
    """Outputs of a random network at 64 x 96 px in float64, and 0 to 20 boxes of any kind: crowded, equal, smaller than
    a stride, partly or wholly outside the image; predictions near the truth or far from it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    points = detect.make_points([(8, 12), (4, 6), (2, 3), (1, 2)], "cpu").double()
    count = draw(st.sampled_from([0, 1, 1, 2, 5, 20]))
    corner, size = 120 * rand(count, 2) - 20, draw(st.sampled_from([3.0, 30.0, 90.0])) * rand(count, 2) + 0.5
    gt_boxes = torch.cat([corner, corner + size], dim=1)
    gt_labels = torch.randint(classes, (count,), generator=generator)
    logits = 4 * rand(len(points), classes) - 3
    bins = draw(st.sampled_from([0.1, 3.0])) * torch.randn(len(points), 4, 8, generator=generator, dtype=torch.float64)
    return logits, bins, points, gt_boxes, gt_labels


def attention_macs(kernel, heads, tokens, key_dim, value_dim):
    """Products of q, k and v in closed form: N^2 (D + E) per head, or 2 N D E where k^T v comes first."""
    if kernel in ("softmax", "softmax_normed", "angular"):
        return heads * tokens**2 * (key_dim + value_dim)
    sums = key_dim if kernel == "relu_e" else 0  # its rows' sums
    return 0 if kernel == "identity" else heads * tokens * (2 * key_dim * value_dim + sums)


@pytest.fixture(scope="module")
def table_4_costs():
    """{(attention, pixel decoder, mlp_dwconv or None for the default): (model, Cost)} at 512 x 704."""
    found = {}
    for key in [("softmax", "fpn_transformer", None), ("softmax", "msdeform", None),
                *(("castling", "fpn_transformer", conv) for conv in (None, 0, 5))]:  # fmt: skip
        options = {} if key[2] is None else dict(mlp_dwconv=key[2])
        with torch.device("meta"):
            model = castle(segment.build_segmenter(attention=key[0], pixel_decoder=key[1], **options)).eval()
            found[key] = model, flops.count(model, torch.empty(1, 3, *flops.TABLE_4_SIZE))
    return found


def bilinear(value, x, y):
    """A map (D, H, W) at the point (x, y) in 0..1 of its width and height; 0 beyond its edges."""
    height, width = value.shape[1:]
    x, y, result = x * width - 0.5, y * height - 0.5, 0
    for column in (math.floor(x), math.floor(x) + 1):
        for row in (math.floor(y), math.floor(y) + 1):
            if 0 <= column < width and 0 <= row < height:
                result = result + (1 - abs(x - column)) * (1 - abs(y - row)) * value[:, row, column]
    return result


def slow_attention(layer, query, key, value, blocked=None):
    """Multi-head attention of one image, (N, C), (M, C), (M, C), head by head; `blocked` is (H, N, M)."""
    dim, heads = query.shape[1], layer.num_heads
    weights, biases = layer.in_proj_weight.split(dim), layer.in_proj_bias.split(dim)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    outputs = []
    for h, part in enumerate(torch.arange(dim).split(dim // heads)):
        logits = q[:, part] @ k[:, part].T / math.sqrt(dim // heads)
        if blocked is not None:
            logits = logits.masked_fill(blocked[h], -math.inf)
        outputs.append(logits.softmax(dim=1) @ v[:, part])
    return layer.out_proj(torch.cat(outputs, dim=1))


def slow_mask(masks, grid, heads):
    """(H, Q, N) of one image's mask logits (Q, y, x): blocked where the probability is below 1/2, but never all."""
    resized = F.interpolate(masks[None], size=grid, mode="bilinear", align_corners=False)[0].flatten(1)
    blocked = torch.stack([row.sigmoid() < 0.5 for row in resized])
    for row in blocked:
        if row.all():
            row[:] = False
    return blocked.expand(heads, -1, -1)


def pixel_centres(height, width):
    """A stand-in for random points: all centres of a map, the same for every mask."""
    like = torch.zeros((), dtype=torch.float64)
    return lambda masks, points, device: segment.reference_points([(height, width)], like).expand(masks, -1, 2)


# ---- 2. attention.py: the angular kernel and its series ------------------------------------------


@given(qkv(), st.floats(1e-3, 1e3))
def test_similarity_is_one_minus_angle_over_pi(qkv, scale):
    """Eq. (4), (5): within 0..1, scale-free, symmetric, 1 - Sim where a vector turns round, and cos(pi (1 - Sim)) gives
    the cosine back."""
    q, k, _ = qkv
    sim = angular_similarity(q, k)
    assert sim.min() >= 0 and sim.max() <= 1
    assert_close(angular_similarity(scale * q, k), sim, atol=1e-6, rtol=0)
    assert_close(angular_similarity(k, q), sim.mT, atol=1e-7, rtol=0)
    assert_close(angular_similarity(-q, k), 1 - sim, atol=1e-7, rtol=0)
    assert_close(torch.cos(math.pi * (1 - sim)), cosines(q, k), atol=1e-9, rtol=0)


def test_similarity_at_its_ends():
    """Eq. (5): aligned 1, orthogonal 1/2, opposed 0, zero vector 1/2; at the ends the gradient is 0, never nan."""
    q = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)
    sim = angular_similarity(q, k)
    assert_close(sim, torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.5, 0.5]], dtype=torch.float64))
    sim[0, [0, 2]].sum().backward()
    assert_close(q.grad, torch.zeros_like(q))


@given(st.integers(0, 10**6), st.integers(2, 16), st.integers(2, 6))
def test_similarity_is_an_inner_product(seed, count, dim):
    """Eq. (6), (7): the Gram matrix has unit diagonal and no negative eigenvalue, and 2 (1 - Sim) is a squared
    Euclidean distance, so its root obeys the triangle inequality."""
    x = randn(count, dim, seed=seed)
    gram = angular_similarity(x, x)
    assert_close(gram.diagonal(), torch.ones(count, dtype=torch.float64), atol=1e-7, rtol=0)
    assert torch.linalg.eigvalsh(gram).min() > -1e-6
    distance = (2 * (1 - gram)).sqrt()
    assert (distance[:, None, :] <= distance[:, :, None] + distance[None, :, :] + 1e-6).all()


def test_coefficients_are_those_of_equation_8():
    """a_k = (2k)! / (2^2k (k!)^2 (2k+1)), here in exact fractions; far beyond k = 86 they stay finite and falling."""
    exact = [Fraction(math.factorial(2 * k), 4**k * math.factorial(k) ** 2 * (2 * k + 1)) for k in range(1, 60)]
    exact = torch.tensor([float(a) for a in exact], dtype=torch.float64)
    assert_close(angular_coefficients(59), exact, rtol=1e-13, atol=0)
    far = angular_coefficients(5000)
    assert far.isfinite().all() and (far.diff() < 0).all() and (far > 0).all()
    assert angular_coefficients(0).numel() == 0


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(0, 300))
@example([0.3], 0)
def test_series_converges_within_its_bound(xs, terms):
    """Eq. (8): on all of [-1, 1], ends included, the partial sum is within the stated bound of 1 - arccos(x) / pi, and
    no further term makes it worse. The bound is tight: reached at |x| = 1, where it falls like 1 / sqrt(K), and at most
    1 / (1 - x^2) times the error inside. Catches a bound without its geometric term."""
    x = torch.tensor([*xs, -1.0, 1.0, 0.0], dtype=torch.float64)
    target, slack = 1 - torch.arccos(x) / math.pi, 1e-15 * (terms + 10)
    error = (angular_series(x, terms) - target).abs()
    bound = angular_series_bound(x, terms)
    assert (error <= bound + slack).all() and ((1 - x**2) * bound <= error + slack).all()
    assert_close(error[-3:-1], bound[-3:-1], atol=1e-13, rtol=0)
    assert 1 / math.sqrt(terms + 1) <= math.pi**1.5 * bound[-2] <= 1 / math.sqrt(terms + 0.5)
    assert ((angular_series(x, terms + 1) - target).abs() <= error + slack).all()
    linear = angular_series_bound(torch.ones(1, dtype=torch.float64), 0).item()
    assert linear == pytest.approx(0.5 - 1 / math.pi, abs=1e-12)  # 0.1817, the most that the linear terms are wrong


# ---- 3. attention.py: attention by kernel --------------------------------------------------------


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@given(qkv(), st.integers(1, 12))
def test_kernel_equals_its_definition(kernel, qkv, fewer):
    """Eq. (9) and Table 5: the fast form is the explicit (N, M) matrix times V, also for fewer queries than keys and
    for fewer keys, where the kernel allows it. Catches a sum over the wrong axis, and a mean over N instead of M."""
    N = qkv[0].shape[2]
    allowed = kernel not in ("linear_angular", "identity")
    for queries, keys in ((N, N), (fewer, N), (N, fewer)) if allowed else ((N, N),):
        q, k, v = (x[:, :, :n] for x, n in zip(qkv, (queries, keys, keys), strict=True))
        expected = explicit(kernel, q, k, v)
        # arccos turns a rounding of 1e-16 at |x| = 1 into 1e-8
        y = KERNELS[kernel](q, k, v)
        assert_close(y, expected, rtol=1e-5, atol=1e-7 * v.abs().sum().item())
        one = KERNELS[kernel](q[0, 0], k[0, 0], v[0, 0])  # (N, D): any leading axes will do
        assert_close(one, y[0, 0], rtol=1e-5, atol=1e-7 * v.abs().sum().item())


@pytest.mark.parametrize("kernel", [*sorted(KERNELS), "branch"])
@given(qkv(), st.floats(-9, 9), st.integers(0, 1000))
def test_attention_is_linear_in_v(kernel, qkv, a, seed):
    """f(q, k, a v + w) = a f(q, k, v) + f(q, k, w) for every kernel and the masked branch. Catches weights that depend
    on V, and a constant that is added."""
    q, k, v = qkv
    w = randn(*v.shape, seed=seed) * v.abs().max()
    f = KERNELS.get(kernel, lambda *x: masked_softmax_attention(*x, 0.1)[0])
    y, z = f(q, k, v), f(q, k, w)
    size = (y.abs().max() + z.abs().max() + v.abs().max() * (1 + q.norm() * k.norm())).item()
    assert_close(f(q, k, a * v + w), a * y + z, rtol=0, atol=1e-12 * size)


@given(qkv())
def test_rows_of_normalised_kernels_sum_to_one(qkv):
    """With V = 1 these give 1, ReLU-E less by its eps. Catches a softmax over the wrong axis."""
    q, k, v = qkv
    v = torch.ones_like(v)
    for kernel in ("softmax", "mc", "softmax_linear"):
        assert_close(KERNELS[kernel](q, k, v), v, rtol=0, atol=1e-9)
    total = (q.relu() @ k.relu().sum(2, keepdim=True).mT).expand_as(v)
    assert_close(KERNELS["relu_e"](q, k, v), 1 - 1e-6 / (total + 1e-6), rtol=0, atol=1e-9)


def test_mean_centring_is_a_taylor_softmax_only_where_keys_alone_are_centred():
    """With logits of size eps, the first-order Taylor weights (1 + q (k - mean k) / sqrt(D)) / M are within O(eps^2) of
    the softmax: the argument of ViTALiTy. `mc` centres q too, as the paper says, and is off by O(eps): its error over
    eps tends to what centring q takes away."""
    q, k, v = randn(3, 1, 1, 12, 8)
    over_eps, over_eps2 = [], []
    for eps in (1e-2, 1e-3, 1e-4):
        softmax = (eps * q @ k.mT / 8**0.5).softmax(-1) @ v
        keys_alone = ((1 + eps * q @ (k - k.mean(2, keepdim=True)).mT / 8**0.5) / 12) @ v
        over_eps2.append((softmax - keys_alone).abs().max().item() / eps**2)
        over_eps.append((softmax - KERNELS["mc"](eps * q, k, v)).abs().max().item() / eps)
    taken = (q.mean(2, keepdim=True) @ (k - k.mean(2, keepdim=True)).mT / 8**0.5 / 12 @ v).abs().max().item()
    assert over_eps2[2] < 2 * over_eps2[0] and taken > 0.01
    assert over_eps[2] == pytest.approx(taken, rel=1e-2)


def test_keys_meet_values_first():
    """q (k^T v) in every kernel that allows it: the first product is D x E, never N x N, also for few tokens."""
    for kernel in sorted(set(KERNELS) - {"softmax", "softmax_normed", "angular", "identity"}):
        for tokens in (64, 4):
            with Operations() as operations:
                KERNELS[kernel](*randn(3, 1, 2, tokens, 8))
            products = [shape[-2:] for name, shape in operations.seen if name in ("bmm", "mm")]
            assert products[:2] == [(8, 8), (tokens, 8)]


@given(qkv(), st.integers(0, 9))
def test_equation_9_comes_from_the_linear_terms_of_equation_8(qkv, terms):
    """D1: the linear terms of Eq. (8) give Sim V up to their bound, as any number of terms does. Eq. (9) is these with
    v_i / 2 of the token itself where the constant of Eq. (8) has half the sum over tokens."""
    q, k, v = qkv
    cos = cosines(q, k)
    first = angular_series(cos, 0) @ v - v.sum(2, keepdim=True) / 2 + v / 2
    assert_close(linear_angular_attention(q, k, v), first, rtol=0, atol=1e-12 * v.abs().sum().item())
    error = (KERNELS["angular"](q, k, v) - angular_series(cos, terms) @ v).abs()
    assert (error <= angular_series_bound(cos, terms) @ v.abs() + 1e-7 * v.abs().sum()).all()


@given(qkv(), st.sampled_from(["linear_angular", "angular", "cosine"]), st.integers(0, 1000))
def test_only_angles_of_q_and_k_matter(qkv, kernel, seed):
    """One orthogonal matrix that turns all of q and k, and a positive scale of any single query or key, change nothing.
    Catches norms over tokens, and channels that count unequally."""
    q, k, v = qkv
    turn = torch.linalg.qr(randn(q.shape[-1], q.shape[-1], seed=seed))[0]
    a, b = 10 ** randn(2, *q.shape[:-1], 1, seed=seed).clamp(-1.5, 1.5)
    y = KERNELS[kernel](a * q @ turn, b * k @ turn, v)
    assert_close(y, KERNELS[kernel](q, k, v), rtol=0, atol=1e-7 * v.abs().sum().item())


@given(qkv(), st.sampled_from(sorted(KERNELS)), st.randoms(use_true_random=False))
def test_tokens_have_no_order(qkv, kernel, random):
    """Without the DWConv, permuting the tokens permutes the output."""
    order = list(range(qkv[0].shape[-2]))
    random.shuffle(order)
    permuted = KERNELS[kernel](*(x[..., order, :] for x in qkv))
    assert_close(permuted, KERNELS[kernel](*qkv)[..., order, :], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_kernel_gradients(kernel):
    """Analytic gradients equal finite differences, for more tokens than channels and for fewer."""
    for tokens, dim in ((6, 3), (2, 4)):
        q, k, v = (randn(1, 2, tokens, dim, seed=s).requires_grad_() for s in range(3))
        assert torch.autograd.gradcheck(lambda *x: KERNELS[kernel](*x), (q, k, v))


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_tokens_are_harmless(kernel, dtype):
    """D2: tokens that are exactly zero (one, or all) leave outputs and gradients finite in every precision."""
    for zeros in (slice(0, 1), slice(None)):
        x = randn(3, 1, 2, 9, 8).to(dtype)
        x[..., zeros, :] = 0
        x.requires_grad_()
        y = AttentionCore(2, kernel).to(dtype)(*x)
        y.sum().backward()
        assert y.dtype == dtype and y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_no_tokens_and_no_images(kernel):
    """Empty inputs give empty outputs."""
    for shape in ((2, 3, 0, 4), (0, 3, 5, 4)):
        x = torch.zeros(shape)
        assert KERNELS[kernel](x, x, x).shape == shape


@in_both_forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_4096_tokens(dtype):
    """D3: norms and k^T v accumulate in float32. With aligned keys |k^T v| passes 65504, float16's largest number:
    the castling layer stays finite and within rounding of float64."""
    core = AttentionCore(2).eval()
    q, k = randn(1, 2, 4096, 16, seed=1) + 3, randn(1, 2, 4096, 16, seed=2) + 3
    v = 200 + randn(1, 2, 4096, 16, seed=3)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    assert (torch.einsum("bhnd,bhne->bhde", attention.unit(k.double()), v.double())).abs().max() > 65504
    y = core(q, k, v)
    exact = copy.deepcopy(core).double()(q.double(), k.double(), v.double())
    assert y.dtype == dtype and y.isfinite().all()
    assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def zeros(*shapes):
    return [torch.zeros(shape) for shape in shapes]


X, Y = torch.zeros(1, 2, 5, 4), torch.zeros(2, 5, 8)  # for a core of two heads, a block of 8 channels
BLOCK = LinearAngularAttention(8, 2)
ERRORS = [  # a wrong call, and what its message has to say
    (lambda: angular_coefficients(-1), "-1"),
    (lambda: linear_angular_attention(X, X, *zeros((1, 2, 6, 4))), r"same number of tokens.*\(1, 2, 6, 4\)"),
    (lambda: linear_angular_attention(X, *zeros((1, 2, 5, 3)), X), r"same number of channels.*\(1, 2, 5, 3\)"),
    (lambda: linear_angular_attention(X, *zeros((1, 3, 5, 4)), X), r"leading .*\(1, 3, 5, 4\)"),
    (lambda: linear_angular_attention(*zeros((1, 2, 6, 4)), X, X), r"one value per query.*\(1, 2, 6, 4\)"),
    (lambda: linear_angular_attention(*zeros(4, 4, 4)), r"a token and a channel axis.*\(4,\)"),
    (lambda: AttentionCore(2, "relu-s"), "'relu-s': did you mean .*relu_s"),
    (lambda: AttentionCore(2, schedule="zzz"), "'zzz': choose from .*ramp"),
    (lambda: AttentionCore(2, schedule="a"), "'a': did you mean anneal"),
    (lambda: mask_threshold(0.5, 9, schedule="rampp"), "'rampp': did you mean ramp"),
    (lambda: AttentionCore(2, dconv=4), "dconv .* 4"),
    (lambda: AttentionCore(2, dconv=-1), "dconv .* -1"),
    (lambda: AttentionCore(2, "softmax", auxiliary=True), "auxiliary"),
    (lambda: AttentionCore(2, epsilon=1.1), "epsilon .* 1.1"),
    (lambda: AttentionCore(2, dropout=-0.1), "dropout .* -0.1"),
    (lambda: AttentionCore(0), "heads .* 0"),
    (lambda: set_threshold(AttentionCore(1), -0.1), "-0.1"),
    (lambda: set_threshold(AttentionCore(1), math.nan), "nan"),
    (lambda: AttentionCore(3)(X, X, X), r"expected \(B, 3, N, D\).*\(1, 2, 5, 4\)"),
    (lambda: AttentionCore(2)(*X.expand(3, 2, 5, 4)), r"expected \(B, 2, N, D\).*\(2, 5, 4\)"),
    (lambda: AttentionCore(2)(X[:, :, :3], X, X), "one value per query"),
    (lambda: AttentionCore(2)(X, X, X, bias=torch.zeros(2, 5, 5)), "bias .*'linear_angular'"),
    (lambda: AttentionCore(2, "relu_e")(X, X, X, padding=X[:, 0, :, 0] > 0), "padding .*'relu_e'"),
    (lambda: LinearAngularAttention(7, 2), "dim 7 .* heads, 2"),
    (lambda: LinearAngularAttention(8, 0), "dim 8 .* heads, 0"),
    (lambda: BLOCK(*zeros((2, 5, 7))), r"\(2, 5, 7\)"),
    (lambda: BLOCK(*zeros((2, 7, 3, 3))), r"\(2, 7, 3, 3\)"),
    (lambda: BLOCK(Y, *zeros((3, 1, 8))), r"prefix of \(2, P, 8\).*\(3, 1, 8\)"),
    (lambda: BLOCK(Y, *zeros((2, 1, 8, 1))), r"prefix of \(2, P, 8\).*\(2, 1, 8, 1\)"),
    (lambda: BLOCK(Y, *zeros(8)), r"prefix of \(2, P, 8\).*\(8,\)"),
    (lambda: BLOCK(Y, None, torch.zeros(2, 4, dtype=torch.bool)), r"\(2, 5\), got torch.bool \(2, 4\)"),
    (lambda: BLOCK(Y, None, torch.zeros(2, 5)), r"boolean key_padding_mask .*float32 \(2, 5\)"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_bad_input_is_named(call, message):
    """A ValueError says which value or shape was wrong, and what was expected."""
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kernel", [*sorted(KERNELS), "branch"])
@pytest.mark.parametrize(("place", "shape"), [
    (0, (1, 1, 5, 4)), (1, (1, 1, 5, 4)), (2, (1, 1, 5, 4)), (1, (1, 2, 5, 1)), (2, (1, 2, 1, 4)),
])  # fmt: skip
def test_kernels_do_not_broadcast(kernel, place, shape):
    """One of q, k, v with one head, channel or token, where the others have more, is an error."""
    inputs = [X, X, X]
    inputs[place] = torch.zeros(shape)
    f = KERNELS.get(kernel, lambda *x: masked_softmax_attention(*x, 0.1))
    with pytest.raises(ValueError, match=re.escape(f"{shape}")):
        f(*inputs)


# ---- 4. attention.py: the auxiliary branch, and castling -----------------------------------------


@given(qkv(max_tokens=8, max_dim=5), st.floats(0, 1), st.integers(1, 8))
def test_masked_softmax_equals_a_loop(qkv, threshold, queries):
    """Eq. (10), entry by entry: softmax of un-normalised q, k, kept strictly above the threshold, not renormalised; for
    any number of queries."""
    q, (_, k, v) = qkv[0][:, :, :queries], qkv
    out, kept = masked_softmax_attention(q, k, v, threshold)
    for b, h, i in np.ndindex(q.shape[:3]):
        logits = [sum(a * b for a, b in zip(q[b, h, i].tolist(), x.tolist())) / math.sqrt(len(x)) for x in k[b, h]]
        weights = [math.exp(x - max(logits)) for x in logits]
        row = [x / sum(weights) for x in weights]
        assume(all(abs(p - threshold) > 1e-12 for p in row))
        assert kept[b, h, i].tolist() == [p > threshold for p in row]
        expected = sum(p * v[b, h, j] * (p > threshold) for j, p in enumerate(row))
        assert_close(out[b, h, i], expected, rtol=1e-6, atol=1e-9)


@given(qkv(), st.floats(0, 1), st.floats(0, 1))
def test_masks_thin_out(qkv, a, b):
    """What a higher threshold keeps, a lower one keeps too. Kept entries sum to at most 1, so that fewer than 1/epsilon
    of them fit in a row. Below 1/N every row keeps one: D4, the paper's 0.02 can empty no mask of N < 50. At 1 nothing
    is kept, not even the single token's P = 1 or a P that rounds to above 1. Catches a comparison the wrong way round,
    or with another quantity than P."""
    low, high = sorted((a, b))
    q, k, v = qkv
    mass, kept = masked_softmax_attention(q, k, torch.ones_like(v), low)
    assert not (masked_softmax_attention(q, k, v, high)[1] & ~kept).any()
    assert (low * kept.sum(-1) <= mass[..., 0] + 1e-12).all() and (mass <= 1 + 1e-12).all()
    assert masked_softmax_attention(q, k, v, (1 - 1e-9) / v.shape[2])[1].any(-1).all()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out, kept = masked_softmax_attention(*(x.to(dtype) for x in qkv), 1.0)
        assert not kept.any() and not out.any()
    for one in (1.0, torch.tensor(1.0)):
        assert attention.above(torch.tensor([1 + 1e-6]), one) == 0


def test_threshold_values():
    """D4: eps_N is the paper's own 0.02 at 196 and 197 tokens (.0204, .0203), .0816 at 49, .25 at 16; `fixed` is 0.02
    everywhere; `anneal` starts at 1/(4N) and passes 0.02 at about 0.4 of the way for N = 196."""
    for tokens, expected in ((3136, 0.02), (197, 0.0203), (196, 0.0204), (49, 0.0816), (16, 0.25), (3, 1.0)):
        assert mask_threshold(0.0, tokens) == pytest.approx(expected, abs=5e-5)
        assert mask_threshold(0.7, tokens, schedule="fixed") == pytest.approx(0.02)
        assert mask_threshold(0.0, tokens, schedule="anneal") == pytest.approx(1 / (4 * tokens))
    assert mask_threshold(0.4 * 0.9, 196, schedule="anneal") == pytest.approx(0.02, rel=0.15)
    assert mask_threshold(0.45, 196) == pytest.approx(4 / 196 + (1 - 4 / 196) * 0.25)


@given(st.integers(1, 4000), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["ramp", "anneal"]))
def test_threshold_rises_to_one(tokens, a, b, schedule):
    """From 0.9 of training on the threshold is 1; before, it never falls. Tensors and numbers give the same."""
    low, high = (mask_threshold(u, tokens, schedule=schedule) for u in sorted((a, b)))
    assert 0 < low <= high <= 1 and mask_threshold(0.9, tokens, schedule=schedule) == 1
    as_tensors = mask_threshold(torch.tensor(a), torch.tensor([tokens, 5]), schedule=schedule)
    assert torch.equal(as_tensors[0], mask_threshold(a, tokens, schedule=schedule))


@in_both_forms
@pytest.mark.parametrize("schedule", ["ramp", "anneal"])
def test_hybrid_equals_castled_once_the_threshold_is_one(schedule):
    """Bit for bit, outputs and gradients, train and eval. Before, while the mask holds something, they differ."""
    core, x = hybrid(schedule=schedule)
    castled = castle(copy.deepcopy(core))
    assert not torch.equal(core(*x), castled(*x))
    for progress in (0.9, 1.0):
        set_threshold(core, progress)
        for mode in (True, False):
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            ya, yb = core.train(mode)(*a), castled.train(mode)(*b)
            ya.square().sum().backward()
            yb.square().sum().backward()
            assert torch.equal(ya, yb) and torch.equal(a.grad, b.grad)
    core, x = hybrid(tokens=100, schedule=schedule)
    if schedule == "ramp":  # small logits: the branch is computed, and every entry is below the threshold
        y = core(*0.1 * x)
        assert mask_density(core) == {"": 0.0} and core.active and torch.equal(y, castle(core)(*0.1 * x))


def test_castle_is_in_place_idempotent_and_leaves_no_softmax():
    """castle returns its argument; afterwards no softmax is computed, no layer has a mask to report,
    and the printed model names no branch."""
    model = build_model("levit128", num_classes=5, image_size=64).eval()
    for softmax in (True, False):
        with Operations() as operations, torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        assert any("softmax" in name or "attention" in name for name, _ in operations.seen) == softmax
        assert ("auxiliary, ramp" in repr(model)) == softmax
        assert castle(model) is model and mask_density(model) == {}


@in_both_forms
def test_mask_statistics_are_those_of_the_matrix():
    """Density and mass equal what the dense matrix gives, averaged over forwards, and restart with the threshold."""
    core, x = hybrid(epsilon=0.1)
    densities, masses = [], []
    for scale, images in ((1.0, 2), (0.3, 1)):  # every image counts alike, not every forward
        q, k, v = x[:, :images] * scale
        core(q, k, v)
        P = (q @ k.mT / 8**0.5).softmax(-1)
        kept = P > 0.1
        densities += kept.float().mean((1, 2, 3)).tolist()
        masses += (P * kept).sum(-1).mean((1, 2)).tolist()
    density, mass, tokens = mask_statistics(core)[""]
    assert density == pytest.approx(np.mean(densities), rel=1e-5) and mass == pytest.approx(np.mean(masses), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        set_threshold(core, 0.0)
        core(*x)
        assert mask_density(core)[""] == pytest.approx(np.mean(densities[:2]), rel=1e-5)
    set_threshold(core, 0.0)
    assert math.isnan(mask_density(core)[""])
    record_masks(core, False)
    core(*x)
    assert math.isnan(mask_density(core)[""])
    set_threshold(core, 1.0)
    assert mask_density(core) == {"": 0.0}
    one = AttentionCore(1, auxiliary=True, schedule="fixed")
    one(*torch.ones(3, 1, 1, 1, 4))
    assert mask_statistics(one) == {"": (1, 1, 1)}  # a single row counts


# ---- 5. attention.py: the core and the drop-in block ---------------------------------------------


@in_both_forms
@given(qkv(), st.sampled_from(sorted(set(KERNELS) - {"softmax"})), st.booleans(), st.sampled_from([1, 3, 9]))
def test_core_equals_its_definition(qkv, kernel, auxiliary, taps):
    """Eq. (9) in full: kernel (+ branch), unit vectors, and a convolution along tokens written as a loop."""
    q, k, v = qkv
    core = AttentionCore(q.shape[1], kernel, auxiliary=auxiliary, dconv=taps).double()
    y = KERNELS[kernel](q, k, v)
    if auxiliary:
        y = y + masked_softmax_attention(q, k, v, mask_threshold(0.0, q.shape[2]))[0]
    y = y / y.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    weight = core.dconv.weight[:, 0, :, 0]
    for i in range(v.shape[2]):
        for tap in range(taps):
            j = i + tap - taps // 2
            if 0 <= j < v.shape[2]:
                y[:, :, i] += weight[:, tap, None] * v[:, :, j]
    assert_close(core(q, k, v), y, rtol=1e-6, atol=1e-6)


@in_both_forms
def test_attention_dropout_acts_in_training_only():
    for core in (AttentionCore(2, auxiliary=True, dropout=0.5), AttentionCore(2, "softmax", dropout=0.5)):
        x = randn(3, 1, 2, 20, 4, dtype=torch.float32) * 3
        assert not torch.equal(core.train()(*x), core(*x))
        assert torch.equal(core.eval()(*x), core(*x))


@in_both_forms
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("tokens", "dim", "heads"), [(197, 96, 3), (16, 64, 2), (49, 48, 4), (1, 8, 1)])
def test_block_equals_the_released_formula(sparse, tokens, dim, heads):
    """Same state dict in both directions, same output, at ViT and LeViT sizes. With the branch in float64: an entry
    beside the threshold could fall on either side by float32's rounding."""
    dtype = torch.float64 if sparse else torch.float32
    released = Released(dim, heads, bias=sparse, sparse=sparse).to(dtype)
    block = LinearAngularAttention(dim, heads, qkv_bias=sparse, sparse_reg=sparse, schedule="fixed").to(dtype)
    block.load_state_dict(released.state_dict())
    assert set(released.state_dict()) == set(castle(copy.deepcopy(block)).state_dict())
    x = randn(2, tokens, dim, dtype=dtype)
    assert_close(block(x), released(x), atol=1e-6, rtol=0)


@in_both_forms
def test_block_is_finite_where_the_released_formula_is_not():
    """D2: one all-zero token makes every output of the image nan there; here it is finite, and so are gradients."""
    released = Released(16, 2, bias=False, sparse=True)
    block = LinearAngularAttention(16, 2, sparse_reg=True)
    block.load_state_dict(released.state_dict())
    x = randn(1, 10, 16, dtype=torch.float32)
    x[:, 3] = 0
    assert released(x).isnan().all()
    x.requires_grad_()
    y = block(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@in_both_forms
def test_block_takes_maps_and_prefix_tokens():
    """A map is its tokens read row by row, on a non-square map too. A separate prefix equals tokens put in front."""
    block = LinearAngularAttention(12, 3, sparse_reg=True)
    prefix, x = randn(2, 2, 12, dtype=torch.float32), randn(2, 12, 4, 7, dtype=torch.float32)
    tokens = x.flatten(2).mT
    assert torch.equal(block(x), block(tokens).mT.unflatten(2, (4, 7)))
    joined = block(torch.cat([prefix, tokens], 1))
    y, prefix_out = block(x, prefix)
    assert torch.equal(prefix_out, joined[:, :2]) and torch.equal(y, joined[:, 2:].mT.unflatten(2, (4, 7)))


@in_both_forms
@given(st.integers(1, 9), st.integers(0, 6), st.booleans(), st.booleans(), st.integers(0, 100))
def test_padding_changes_nothing(tokens, padded, auxiliary, with_prefix, seed):
    """A sequence padded at its end, by NaN even, gives what it gives alone: outputs, mask statistics, gradients of the
    weights; the core too. Catches padding that is multiplied by 0 instead of being left out."""
    block = LinearAngularAttention(8, 2, qkv_bias=True, sparse_reg=auxiliary).double()
    x = randn(1, tokens + padded, 8, seed=seed)
    prefix = randn(1, 2, 8, seed=seed + 1) if with_prefix else None
    mask = (torch.arange(tokens + padded) >= tokens)[None]
    x[mask] = math.nan
    outputs, statistics, gradients = [], [], []
    for sequence, padding in ((x[:, :tokens], None), (x, mask)):
        set_threshold(block, 0.0)
        y = block(sequence, prefix, key_padding_mask=padding)
        y, before = y if with_prefix else (y, y[:, :0])
        outputs.append(torch.cat([before, y[:, :tokens]], 1))
        statistics += mask_statistics(block).values()
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), list(block.parameters())))
    assert_close(outputs[1], outputs[0])
    assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)
    assert len(statistics) == 2 * auxiliary
    np.testing.assert_allclose(statistics[auxiliary:], statistics[:auxiliary], rtol=1e-5)
    q = x.unflatten(2, (2, 4)).transpose(1, 2).requires_grad_()
    y = block.attend(q, q, q, padding=mask)[:, :, :tokens]
    assert_close(y, block.attend(*3 * [q[:, :, :tokens]]))
    assert torch.autograd.grad(y.sum(), q)[0].isfinite().all()


@in_both_forms
def test_padded_batch_and_fully_padded_image_are_finite():
    """Maps take (B, H, W) masks; an image that is padding throughout gives finite outputs and gradients."""
    block = LinearAngularAttention(8, 2, sparse_reg=True)
    x = randn(2, 8, 3, 4, dtype=torch.float32).requires_grad_()
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[1] = True
    y = block(x, key_padding_mask=mask)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert_close(y[:1], block(x[:1]))


@in_both_forms
def test_block_survives_copying_halves_and_compiling():
    """deepcopy, .half(), and torch.compile without a graph break over a moving threshold."""
    block = LinearAngularAttention(16, 2, sparse_reg=True)
    x = randn(2, 30, 16, dtype=torch.float32) * 4
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    assert copy.deepcopy(block).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for progress in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        set_threshold(compiled, progress)
        assert_close(compiled(x), block(x))
        assert set(mask_density(compiled)) == {""}


def test_attention_file_works_alone(tmp_path):
    """attention.py pasted into an empty folder imports nothing but torch and einops, runs its docstring's example, and
    as a script its own check, series and speed included."""
    (tmp_path / "attention.py").write_text((ROOT / "attention.py").read_text())
    code = """import runpy, sys, textwrap, torch
runpy.run_path("attention.py", run_name="__main__")
print("end of the check")
import attention
lines = attention.__doc__.split("remove the branch:")[1].split("`python")[0]
names = dict(vars(attention), x=torch.randn(2, 49, 192), step=5, total_steps=10)
exec(textwrap.dedent(lines), names)
assert names["y"].shape == (2, 49, 192) and names["block"](torch.randn(2, 192, 7, 7)).shape == (2, 192, 7, 7)
assert not names["block"].auxiliary and not {"models", "train", "torchvision", "timm", "scipy"} & set(sys.modules)"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *table, linear, castled, end = done.stdout.splitlines()
    assert len(table) == 7 and "equals the definition" in linear and "castling changes no bit" in castled
    assert end == "end of the check"  # importing the file prints nothing


# ---- 6. attention.py: precision, transforms, the branch in blocks --------------------------------


@in_both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 49, 197])
def test_core_is_accurate_in_every_precision(dtype, tokens):
    """Against float64 the core errs by 5e-7 in float32, else by the rounding of its result; nothing is nan
    where q, k or v is zero."""
    core = AttentionCore(3).eval()
    q, k, v = randn(3, 2, 3, tokens, 16, seed=tokens).to(dtype)
    q[:, :, -1], k[:, 0, 0], v[0, 1] = 0, 0, 0
    exact = copy.deepcopy(core).double()(q.double(), k.double(), v.double())
    y = core(q, k, v)
    bound = max(5e-7, torch.finfo(dtype).eps)
    assert (y.double() - exact).norm() <= bound * exact.norm() and y.isfinite().all()


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(-30, 30), st.integers(0, 1000))
def test_scale_of_any_input_does_not_matter(form, a, b, c, seed):
    """Eq. (9) has directions only: q, k and v times 1e-30 to 1e30 in float32 give the unit vectors of float64. Squares
    of such numbers are 0 or infinite there: the sum of squares alone would be off by 0.9 without a word."""
    q, k, v = randn(3, 1, 2, 9, 8, seed=seed)
    expected = form.castling_attention(q, k, v)
    scaled = [(x * 10.0**power).float().requires_grad_() for x, power in ((q, a), (k, b), (v, c))]
    y = form.castling_attention(*scaled)
    assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y[..., 0].sum() * 1e-8, scaled))


def test_infinite_or_missing_numbers_are_not_hidden():
    """A token that holds inf or nan becomes nan as a direction, not a finite guess."""
    x = torch.ones(3, 4)
    x[0, 1], x[1, 2] = math.inf, math.nan
    assert attention.unit(x).isnan().all(1).tolist() == [True, True, False]


@given(qkv(), st.integers(0, 3), st.sampled_from([1, 3, 9]), st.booleans(), st.integers(0, 1000))
def test_gradients_by_hand_are_those_of_the_formula(qkv, zeros, taps, branch, seed):
    """fast.py's Eq. (9) is the formula's bit for bit, and its gradients are autograd's within 1e-10 in float64: scales
    of 1e-3 to 1e3, zero tokens, and more of them at the end, as padding leaves them."""
    B, H, N, E = qkv[2].shape
    inputs = [x.clone() for x in qkv] + [randn(H, 1, taps, 1, seed=seed)]
    for x in inputs[:3]:
        x[:, :, N - min(zeros, N) :] = 0
    inputs += [0.1 * qkv[2].abs().max() * randn(B, H, N, E, seed=seed + 1)] * branch
    forms = (attention.castling_attention, fast.castling_attention)
    formula, by_hand = (results(f, inputs, randn(B, H, N, E, seed=seed + 2)) for f in forms)
    assert torch.equal(by_hand[0], formula[0])
    scale = 1 / torch.cat(qkv, -1).abs().max().clamp_min(1e-3).item()  # of a unit vector's gradient
    for a, b in zip(by_hand, formula, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10 * (scale + b.abs().max().item()))


def test_core_can_be_differentiated_twice_and_transformed(form):
    """Second derivatives with and without branch; torch.func's and forward-mode ones are the plain ones, and nothing of
    a transform stays in the mask statistics, where it would break the next forward, copy or checkpoint."""
    q, k, v = randn(3, 1, 2, 4, 3).unbind()
    weight, branch = randn(2, 1, 3, 1, seed=1), randn(1, 2, 4, 3, seed=2)
    for inputs in ((q, k, v, weight), (q, k, v, weight, branch)):
        inputs = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(form.castling_attention, inputs)
        assert torch.autograd.gradgradcheck(form.castling_attention, inputs)
    threshold = torch.tensor(0.2).double()
    inputs = [(2 * x.detach()).requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradgradcheck(lambda *x: form.auxiliary_branch(*x, threshold)[0], inputs)
    core = AttentionCore(2, auxiliary=True, epsilon=0.3).double()
    assert torch.autograd.gradcheck(lambda *x: core(*x[:3]), (*inputs, core.dconv.weight))
    x, direction = (2 * randn(3, 2, 2, 4, 3, seed=seed) for seed in (3, 4))

    def loss(x):
        return core(*x).square().sum()

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    once = x.detach()
    assert_close(torch.func.grad(loss)(once), expected)
    for jvp in (torch.func.jvp, torch.autograd.functional.jvp):
        assert_close(jvp(loss, (once,), (direction,))[1], (expected * direction).sum())
    each = torch.func.vmap(torch.func.grad(lambda x: loss(x[:, None])), in_dims=1, out_dims=1)
    assert_close(each(once), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(once, direction))
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, (expected * direction).sum())
    copy.deepcopy(core)
    rows = torch.func.jacrev(lambda x: core(*x).sum((0, 1, 2)))(once)
    for row, weight in zip(rows, torch.eye(3).double(), strict=True):
        leaf = once.clone().requires_grad_()
        assert_close(row, torch.autograd.grad((core(*leaf).sum((0, 1, 2)) * weight).sum(), leaf)[0])
    assert type(core.tally) is torch.Tensor and core.tally.isfinite().all()
    assert mask_density(core)[""] == pytest.approx(mask_density(core)[""])
    core(*once)


@in_both_forms
@pytest.mark.parametrize("auxiliary", [False, True])
def test_first_gradients_do_not_depend_on_create_graph(auxiliary):
    """Also where q, k and v are one tensor, or one is a function of another, as the branch is of v."""
    core = AttentionCore(2, auxiliary=auxiliary, epsilon=0.3).double()
    z = 2 * randn(2, 2, 5, 3).requires_grad_()
    for q, k, v in ((z, z, z), (z, 2 * z, z.sin())):
        loss = core(q, k, v).square().sum() + core(q, k, v)[0].sum()
        (plain,) = torch.autograd.grad(loss, z, retain_graph=True)
        (twice,) = torch.autograd.grad(loss, z, create_graph=True)
        assert plain.abs().max() > 1e-3
        assert_close(twice, plain)


@in_both_forms
def test_core_compiles_for_any_number_of_tokens():
    """One graph, without breaks, serves every N, forward and backward."""
    core = AttentionCore(2)
    torch._dynamo.reset()
    compiled = torch.compile(core, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (50, 64, 197):
        x = randn(3, 2, 2, tokens, 8, dtype=torch.float32).unbind()
        grad = torch.ones_like(x[0])
        with torch.compiler.set_stance("default" if tokens == 50 else "fail_on_recompile"):
            actual = results(compiled, x, grad)
        for a, b in zip(actual, results(core, x, grad), strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-4)


@given(qkv(), st.floats(0, 1), st.integers(0, 2), st.integers(0, 1000))
def test_branch_in_blocks_equals_its_formula(form, qkv, threshold, padded, seed):
    """Output, statistics and gradients of the branch in blocks are those of the whole matrix, for blocks of one row,
    of some heads and of everything, with padding and with one threshold per image."""
    B, _, N, D = qkv[0].shape
    hidden = torch.arange(N) >= N - min(padded, N - 1)
    real = ~(hidden[:, None] | hidden)
    padding = hidden.expand(B, -1) if padded else None
    limits = torch.tensor(threshold).double().expand(B if padded else ()).clone()

    def matrix(q, k):
        P = (torch.einsum("bhnd,bhmd->bhnm", q, k) / D**0.5).masked_fill(hidden, -math.inf).softmax(-1)
        return P, (P - threshold > 0) & real & (threshold < 1)

    def plain(q, k, v):
        P, kept = matrix(q, k)
        return P.masked_fill(~kept, 0) @ v

    def blocked(*x):
        out = form.auxiliary_branch(*x, limits, padding, 0.0)[0]
        return 0 * sum(x_.sum() for x_ in x) + (torch.zeros_like(x[2]) if out is None else out)

    P, kept = matrix(*qkv[:2])
    assume((threshold - P).abs().min() > 1e-9)  # the mask jumps there
    grad = randn(*qkv[2].shape, seed=seed)
    expected = results(plain, qkv, grad)
    for size in (1, 8 * N * N, 2**22) if form is fast else (1,):
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(fast.BLOCK_BYTES, "cpu", size)
            for a, b in zip(results(blocked, qkv, grad), expected, strict=True):
                assert_close(a, b, rtol=1e-6, atol=1e-7 * (1 + b.abs().max().item()))
            _, totals = form.auxiliary_branch(*qkv, limits, padding, 0.0)
            assert_close(totals, torch.stack([kept.sum().double(), P[kept].sum()]), rtol=1e-6, atol=1e-9)


@given(qkv(max_tokens=40), st.floats(-3, 1), st.floats(1e-4, 1))
def test_certified_masks_are_empty(qkv, scale, threshold):
    """A head that the bound passes has no entry above the threshold; at a threshold of infinity it always passes."""
    q, k, v = (10**scale * (x / (x.abs().max() + 1e-9)).flatten(0, 1) for x in qkv)
    limits = torch.full((len(q),), threshold).double()
    kept = masked_softmax_attention(q, k, v, threshold)[1]
    assert not kept[fast.certainly_empty(q, k, limits)].any()
    assert fast.certainly_empty(q, k, math.inf * limits).all()


@given(st.integers(1, 5), st.floats(0.5, 1.5), st.integers(0, 1000))
def test_certificate_is_tight(dim, reach, seed):
    """Where one key is far from 3999 equal ones, the largest entry is the bound within 0.05%. Just below it nothing is
    certified, 0.3% above it the mask is. Catches a larger slack, none, and norms or means over the wrong axis."""
    far = F.normalize(randn(2, 1, dim, seed=seed), dim=-1)
    k = randn(2, 1, dim, seed=seed + 1).repeat(1, 4000, 1)  # where all keys lie does not matter
    k[:, 7] += far[:, 0]
    q = reach * math.sqrt(dim) * far * torch.tensor([[0.1], [1.0], [-0.5]], dtype=torch.float64)
    q[1] *= 0.9
    largest = (q @ k.mT / math.sqrt(dim)).softmax(-1).amax((1, 2))
    assert not fast.certainly_empty(q, k, largest * math.exp(-1e-4)).any()
    assert fast.certainly_empty(q, k, largest * math.exp(3e-3)).all()


def test_certified_branch_computes_no_matrix():
    """Where every mask is certain to be empty no N x N matrix exists and there is no branch to add."""
    q, k, v = randn(3, 1, 2, 300, 4).unbind()
    for scale, matrix in ((0.01, False), (1.0, True)):
        with Operations() as operations:
            out, totals = fast.auxiliary_branch(scale * q, scale * k, v, torch.tensor(0.02).double())
        largest = max(math.prod(shape) for _, shape in operations.seen)
        assert (largest >= 300 * 300) == matrix == (out is not None) == bool(totals[0] > 0)


def test_branch_keeps_a_few_blocks_alive():
    """With every row live, forward and backward together never hold more than twelve blocks of 4 MiB, however many the
    heads; the plain form keeps four N x N matrices, 64 MiB, per head for backward."""
    q, k, v = (x.requires_grad_() for x in (3 * randn(3, 1, 4, 2048, 8, dtype=torch.float32)).unbind())
    with flops.Storages() as storages:
        out, totals = fast.auxiliary_branch(q, k, v, torch.tensor(0.02))
        forward = storages.peak
        out.sum().backward()
    assert totals[0] > 4 * 2048
    assert forward < 7 * 2**22 and storages.peak < 12 * 2**22


def test_branch_gradcheck_checkpoint_autocast_and_compile(form):
    """The branch passes gradcheck where it keeps some entries; under gradient checkpointing and compilation it gives
    the same gradients, and under the caller's bfloat16 autocast the same bits (D3)."""
    q, k, v = (randn(1, 2, 6, 3, seed=s).requires_grad_() for s in range(3))
    threshold = torch.tensor(0.15).double()
    assert 0 < form.auxiliary_branch(q, k, v, threshold)[1][0] < 2 * 6 * 6
    assert torch.autograd.gradcheck(lambda *x: form.auxiliary_branch(*x, threshold)[0], (q, k, v))
    core, x = hybrid(epsilon=0.1)
    grad, x = randn(2, 2, 60, 8, dtype=torch.float32), x.unbind()
    expected = results(core, x, grad)
    torch._dynamo.reset()

    def autocast(*x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return core(*x)

    assert all(map(torch.equal, results(autocast, x, grad), expected))
    for form in (
        lambda *x: torch.utils.checkpoint.checkpoint(core, *x, use_reentrant=False),
        torch.compile(core, fullgraph=True, backend="aot_eager"),
    ):
        for a, b in zip(results(form, x, grad), expected, strict=True):
            assert_close(a, b)


def test_dropout_of_the_branch_is_drawn_once(form):
    """Backward sees the same dropped entries as forward: finite differences with the generator set back agree."""
    q, k, v = (2 * randn(1, 2, 5, 3, seed=s).requires_grad_() for s in range(3))

    def branch(*x):
        torch.manual_seed(3)
        return form.auxiliary_branch(*x, torch.tensor(0.1).double(), None, 0.4)[0]

    assert torch.autograd.gradcheck(branch, (q, k, v))


@in_both_forms
@pytest.mark.parametrize(("make", "shape"), [
    (lambda: LinearAngularAttention(16, 2, sparse_reg=True), (1, 2, 30, 16)),
    (lambda: AttentionCore(2, auxiliary=True), (3, 2, 2, 30, 8)),
])  # fmt: skip
def test_saved_threshold_is_loaded(make, shape):
    """A layer that is saved at some progress, and loaded into a fresh one, is the same function. Castled, its state
    dict is weights only; the authors', which has no progress, leaves the threshold as it is."""
    x, trained, fresh = 4 * randn(*shape, dtype=torch.float32), make(), make()
    for progress in (0.5, 0.95):
        set_threshold(trained, progress)
        fresh.load_state_dict(trained.state_dict())
        assert torch.equal(fresh(*x), trained(*x)) and fresh.active == (progress < 0.9)
    weights = castle(trained).state_dict()
    assert set(weights) == {name for name, _ in trained.named_parameters()}
    set_threshold(fresh, 0.25)
    fresh.load_state_dict(weights)
    assert fresh.progress == 0.25 and fresh.active


# ---- 7. train.py: schedules and losses -----------------------------------------------------------


def test_paper_learning_rates():
    """Section 4.1: 0.01 to 2.0 in 11 epochs, then x 0.9875 per epoch; a shorter run ends at the same value."""
    at = lambda epoch, epochs=1000: train.exponential_lr(  # noqa: E731
        epoch, epochs=epochs, peak=2.0, start=0.01, warmup=train.warmup_for(epochs, 11.0)
    )
    assert at(0) == 0.01 and at(11) == 2.0 and at(5.5) == pytest.approx(1.005)
    for epoch, expected in ((100, 0.653), (200, 0.186), (300, 0.0528), (500, 4.26e-3), (999, 8.0e-6)):
        assert at(epoch) == pytest.approx(expected, rel=0.01)
    assert at(201) / at(200) == pytest.approx(0.9875)
    for epochs, factor in ((100, 0.870), (300, 0.958), (600, 0.979)):
        assert at(51, epochs) / at(50, epochs) == pytest.approx(factor, abs=5e-4)
        assert at(epochs, epochs) == pytest.approx(at(1000))


def test_cosine_is_warmed_up():
    """Linear from start to peak, half a cosine to the end; shapes' default warms up so, from 0.01 to 3.2 at 4096."""
    shape = dict(epochs=10, peak=1.0, start=0.1, warmup=2, end=0.01)
    for epoch, expected in ((0, 0.1), (1, 0.55), (2, 1.0), (6, 0.505), (10, 0.01)):
        assert train.cosine_lr(epoch, **shape) == pytest.approx(expected)
    args = flags()
    args.global_batch, args.warmup_epochs = 4096, 0.4
    rates = [train.learning_rate(args, step, 10, 40) for step in range(5)]
    assert rates == pytest.approx([0.01, 0.8075, 1.605, 2.4025, 3.2])


@given(st.floats(0, 1), st.floats(0.5, 1000), st.floats(0, 11))
def test_schedules_stay_between_their_ends(u, epochs, full):
    """Every learning rate lies within [end, peak]; warm-up takes at most 11% of the run; the cosine ends at its end."""
    warmup = train.warmup_for(epochs, full)
    assert warmup <= 0.11 * epochs + 1e-9
    shape = dict(epochs=epochs, peak=1.0, start=0.1, warmup=warmup)
    assert 0 < train.exponential_lr(u * epochs, **shape) <= 1 + 1e-12
    assert 0.01 <= train.cosine_lr(u * epochs, **shape, end=0.01) <= 1 + 1e-12
    assert train.cosine_lr(epochs, **shape, end=0.01) == pytest.approx(0.01)


def test_losses():
    """Cross entropy on one or two heads; hard and soft distillation, DeiT's Eq. (2) and (3), from their definitions."""
    a, b, teacher = randn(3, 4, 5)
    y = torch.tensor([0, 2, 4, 1])
    ce = lambda logits: -logits.log_softmax(1)[torch.arange(4), y].mean()  # noqa: E731
    loss = train.classification_loss
    assert_close(loss(a, y), ce(a))
    assert_close(loss((a, b), y), (ce(a) + ce(b)) / 2)
    hard = -b.log_softmax(1)[torch.arange(4), teacher.argmax(1)].mean()
    assert_close(loss((a, b), y, teacher=teacher, distillation="hard", alpha=0.3), 0.7 * ce(a) + 0.3 * hard)
    p, q = (teacher / 2).softmax(1), (a / 2).softmax(1)
    soft = 4 * (p * (p / q).log()).sum(1).mean()
    assert_close(loss(a, y, teacher=teacher, distillation="soft", alpha=0.5, tau=2.0), 0.5 * ce(a) + 0.5 * soft)
    smoothed = 0.9 * ce(a) + 0.1 * -a.log_softmax(1).mean()
    assert_close(loss(a, y, smoothing=0.1), smoothed)


# ---- 8. detect.py: assignment, losses, decoding --------------------------------------------------


def test_golden_losses():
    """Losses, gradients, positives of two images, as an independent implementation of PicoDet computes them."""
    cls, reg, logits, bins, points, targets = golden_outputs()
    losses = detect.detection_losses(logits, bins, points, targets)
    values = {name: loss.item() for name, loss in losses.items()}
    assert values == pytest.approx(dict(cls=277.2382, box=0.881964, dfl=0.680967), rel=1e-6)
    sum(losses.values()).backward()
    assert [m.grad.abs().sum().item() for m in cls] == pytest.approx([390.5032, 97.6147, 24.4582, 6.1001], rel=1e-5)
    assert [m.grad.abs().sum().item() for m in reg] == pytest.approx([0.505047, 0.197729, 0.613869, 0], rel=3e-6)
    expected = [
        {1065: 4, 1128: 2, 1129: 2, 1167: 2, 1168: 2, 1207: 2, 1684: 0, 1703: 0, 1723: 0, 1745: 0, 1764: 0, 2025: 3,
         2034: 3, 2035: 3, 2037: 1, 2044: 3, 2046: 1, 2047: 1, 2053: 3, 2054: 3, 2056: 1, 2065: 1},
        dict.fromkeys([410, 411, 450, 490, 531], 0),
    ]  # fmt: skip
    boxes = detect.decode(bins, points)
    for i in range(2):
        matched = detect.simota(logits[i], boxes[i], points, *targets[i])
        assert {int(p): int(matched[p]) for p in (matched >= 0).nonzero()[:, 0]} == expected[i]


def test_iou_equals_its_definition():
    """Of every pair of boxes between the lines of a small grid: apart along one axis or both, touching, nested, equal,
    without area."""
    sides = [(low, high) for low in range(3) for high in range(low, 3)]
    boxes = [(x1, y1, x2, y2) for (x1, x2), (y1, y2) in itertools.product(sides, sides)]
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    pairs = [(a, b) for a, b in itertools.product(boxes, boxes) if area(a) + area(b) > 0]
    a, b = torch.tensor(pairs).double().unbind(1)
    assert_close(detect.paired_iou(a, b), torch.tensor([slow_iou(*pair) for pair in pairs]).double())


@given(scenes())
def test_simota_equals_a_slow_loop(scene):
    """The assignment is the description's, pair by pair; no box, boxes without a point inside, boxes far outside."""
    logits, bins, points, gt_boxes, gt_labels = scene
    boxes = detect.decode(bins[None], points)[0]
    matched = detect.simota(logits, boxes, points, gt_boxes, gt_labels)
    assert matched.tolist() == slow_simota(*(x.tolist() for x in (logits, boxes, points, gt_boxes, gt_labels)))


def test_far_boxes_have_no_point():
    """A box that no point is in or near leaves everything background: a centre 2.5 strides away is not near."""
    points = detect.make_points([(8, 8), (0, 0), (0, 0), (0, 0)], "cpu")  # the first is (4, 4)
    boxes, logits = torch.rand(len(points), 4), torch.rand(len(points), 3)
    for x, found in ((900.0, False), (-16.0, False), (-15.9, True)):
        far = torch.tensor([[x - 2, 2.0, x + 2, 6]])
        assert (detect.simota(logits, boxes, points, far, torch.tensor([1])) >= 0).any() == found


def test_saturated_logits_have_finite_costs():
    """Certain scores, +-1e4, neither overflow the cost nor lose the only box."""
    points = detect.make_points([(8, 8), (4, 4), (2, 2), (1, 1)], "cpu")
    logits = 1e4 * torch.randn(len(points), 3, generator=torch.Generator().manual_seed(0)).sign()
    boxes = detect.decode(torch.zeros(1, len(points), 4, 8), points)[0]
    matched = detect.simota(logits, boxes, points, torch.tensor([[10.0, 10, 50, 50]]), torch.tensor([1]))
    assert (matched == 0).any()


@given(scenes(), st.randoms())
@settings(max_examples=examples(20))
def test_order_of_boxes_does_not_matter(scene, random):
    """Permuting the boxes of an image changes no loss."""
    logits, bins, points, boxes, labels = scene
    order = list(range(len(boxes)))
    random.shuffle(order)
    losses = [detect.detection_losses(logits[None], bins[None], points, [target])
              for target in ((boxes, labels), (boxes[order], labels[order]))]  # fmt: skip
    assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@given(scenes())
@settings(max_examples=examples(20))
def test_losses_equal_a_slow_loop(scene):
    """The three losses of one image, point by point and class by class from their equations."""
    logits, bins, points, gt_boxes, gt_labels = (x.float() for x in scene)
    losses = detect.detection_losses(logits[None], bins[None], points, [(gt_boxes, gt_labels.long())])
    boxes = detect.decode(bins[None], points)[0]
    matched = detect.simota(logits, boxes, points, gt_boxes, gt_labels.long()).tolist()
    logits, bins, points, gt_boxes, boxes = (x.double().tolist() for x in (logits, bins, points, gt_boxes, boxes))
    cls = box = dfl = omega_sum = 0.0
    for i, j in enumerate(matched):
        u = max(slow_iou(boxes[i], gt_boxes[j]), 1e-6) if j >= 0 else 0.0
        for c, z in enumerate(logits[i]):
            p = 1 / (1 + math.exp(-z))
            q = u if j >= 0 and c == int(gt_labels[j]) else 0.0
            cls -= (q if q > 0 else 0.75 * p * p) * (q * math.log(p) + (1 - q) * math.log(1 - p))
        if j >= 0:
            omega = 1 / (1 + math.exp(-max(logits[i])))
            omega_sum += omega
            box += omega * (1 - slow_iou(boxes[i], gt_boxes[j], generalised=True))
            (x, y, stride), (x1, y1, x2, y2) = points[i], gt_boxes[j]
            for side, row in zip((x - x1, y - y1, x2 - x, y2 - y), bins[i], strict=True):
                t = min(max(side / stride, 0.0), 6.9)
                k, norm = int(t), math.log(sum(math.exp(b) for b in row))
                dfl -= omega * ((k + 1 - t) * (row[k] - norm) + (t - k) * (row[k + 1] - norm)) / 4
    positives = sum(j >= 0 for j in matched)
    expected = dict(cls=cls / max(1, positives), box=2 * box / max(1, omega_sum), dfl=0.25 * dfl / max(1, omega_sum))
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("boxes", [(0, 0), (0, 3), (2, 1)])
def test_images_without_boxes_train(boxes):
    """Losses are finite and every parameter has a gradient, also if no image of the batch has a box."""
    torch.manual_seed(0)
    model = detect.build_detector("lcnet_vit_s", num_classes=3, width=0.25, heads=(2, 4)).train()
    targets = [(20 * torch.rand(n, 4).cumsum(1), torch.zeros(n, dtype=torch.long)) for n in boxes]
    losses = detect.detection_losses(*model(torch.randn(2, 3, 64, 96)), targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_losses_are_float32_under_autocast():
    """bfloat16 outputs are widened before assignment and losses; autocast around them changes no bit."""
    _, _, logits, bins, points, targets = golden_outputs()
    widened = detect.detection_losses(logits.bfloat16().float(), bins.bfloat16().float(), points, targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detect.detection_losses(logits.bfloat16(), bins.bfloat16(), points, targets)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert_close(losses, widened, rtol=0, atol=0)


@given(st.integers(0, 10**6), st.sampled_from([8, 16, 32, 64]))
def test_decode_inverts_encoding(seed, stride):
    """A side of t strides, as the two bins around t have it, is decoded to t strides; distances of 0..7 strides."""
    sides = 7 * torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lower = sides.floor().clamp(max=6).long()
    share = torch.zeros(1, 5, 4, 8, dtype=torch.float64).scatter_(-1, lower[..., None], (lower + 1 - sides)[..., None])
    share.scatter_(-1, lower[..., None] + 1, (sides - lower)[..., None])
    points = torch.tensor([[100.0, 50.0, stride]] * 5, dtype=torch.float64)
    boxes = detect.decode(share.log(), points)
    expected = torch.tensor([100.0, 50.0, 100.0, 50.0]) + stride * sides * torch.tensor([-1, -1, 1, 1])
    assert_close(boxes, expected.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "sides"), [(320, [40, 20, 10, 5]), (416, [52, 26, 13, 7]), (352, [44, 22, 11, 6])])
def test_points_are_the_cells_centres(size, sides):
    """Level sizes round up (416: the last is 7); points follow the maps row by row, and are those of the outputs."""
    model = detect.build_detector("lcnet_s", num_classes=2).eval()
    with torch.no_grad():
        logits, bins, points = model(torch.zeros(1, 3, size, size + 32))
    widths = [-(-(size + 32) // stride) for stride in detect.STRIDES]
    expected = [((x + 0.5) * stride, (y + 0.5) * stride, stride)
                for stride, height, width in zip(detect.STRIDES, sides, widths, strict=True)
                for y in range(height) for x in range(width)]  # fmt: skip
    assert points.tolist() == [list(map(float, point)) for point in expected]
    assert logits.shape == (1, len(expected), 2) and bins.shape == (1, len(expected), 4, 8)


# ---- 9. segment.py: layers from their definitions ------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([4, 8, 12]))
@settings(max_examples=examples(15))
def test_sine_positions(rows, columns, dim):
    """Channel by channel: y first, positions from 1 to n as shares of n, sine in even and cosine in odd channels."""
    table = segment.sine_positions((rows, columns), dim)
    for y in range(rows):
        for x in range(columns):
            for c in range(dim):
                j, place = c % (dim // 2), (y + 1) / rows if c < dim // 2 else (x + 1) / columns
                angle = 2 * math.pi * place / 10000 ** (2 * (j // 2) / (dim // 2))
                expected = math.cos(angle) if j % 2 else math.sin(angle)
                assert table[y * columns + x, c].item() == pytest.approx(expected, abs=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=examples(15))
def test_deformable_sampling_is_its_definition(seed, batch, heads, points):
    """Maps of several non-square sizes, points on and off them, sample by sample. Catches x for y, a wrong edge rule,
    swapped levels and heads."""
    grids, dim, queries = [(2, 3), (5, 2), (1, 4)], 2, 3
    value = randn(batch, sum(y * x for y, x in grids), heads, dim, seed=seed)
    locations = 0.5 + 0.6 * randn(batch, queries, heads, len(grids), points, 2, seed=seed + 1)
    weights = randn(batch, queries, heads, len(grids), points, seed=seed + 2)
    result = segment.sample_levels(value, grids, locations, weights)
    expected = torch.zeros(batch, queries, heads, dim, dtype=torch.float64)
    for b, n, h in np.ndindex(batch, queries, heads):
        first = 0
        for level, (rows, columns) in enumerate(grids):
            tokens = value[b, first : first + rows * columns, h].view(rows, columns, dim).permute(2, 0, 1)
            first += rows * columns
            for p in range(points):
                x, y = locations[b, n, h, level, p].tolist()
                expected[b, n, h] += weights[b, n, h, level, p] * bilinear(tokens, x, y)
    assert_close(result, expected.flatten(2))


def test_masked_decoder_is_its_definition():
    """float64, two images, three levels of different non-square grids, level after level, attention head by head: cross
    before self, positions on queries and keys but not on values, each mask from the prediction before it, norms of the
    heads not fed back. Some queries are masked everywhere, in one image only."""
    torch.manual_seed(0)
    decoder = shaken(segment.MaskedDecoder(16, 3, heads=2, queries=5, layers=4).double(), 0.3)
    features = randn(2, 16, 8, 12)
    features[1] -= 3 * decoder.mask_head(decoder.norm(decoder.query_feat.weight))[0][:, None, None].detach()
    levels = [randn(2, 16, *grid, seed=i) for i, grid in enumerate([(2, 3), (4, 6), (8, 12)])]
    outputs = decoder(features, levels)
    assert len(outputs) == 5 and torch.isfinite(outputs[-1][0]).all()
    whole = 0
    for b in range(2):
        x, place = decoder.query_feat.weight, decoder.query_embed.weight
        for i in range(5):
            y = decoder.norm(x)
            masks = torch.einsum("qc,cyx->qyx", decoder.mask_head(y), features[b])
            assert_close(outputs[i][0][b], decoder.class_head(y))
            assert_close(outputs[i][1][b], masks)
            if i == 4:
                break
            level, layer = levels[i % 3][b], decoder.layers[i]
            value = level.flatten(1).T + decoder.level_embed.weight[i % 3]
            key = value + segment.sine_positions(level.shape[1:], 16)
            blocked = slow_mask(masks, level.shape[1:], 2)
            resized = F.interpolate(masks[None], size=level.shape[1:], mode="bilinear", align_corners=False)
            whole += (resized < 0).flatten(2).all(-1).sum().item()
            x = layer.norm1(x + slow_attention(layer.cross, x + place, key, value, blocked))
            x = layer.norm2(x + slow_attention(layer.attn, x + place, x + place, x))
            x = layer.norm3(x + layer.ffn(x))
    assert whole > 0  # the case that would be nan did occur


# ---- 10. segment.py: matching, losses, metric, inference -----------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=examples(30))
def test_matching_is_the_best_of_all(seed, queries, count):
    """Brute force over assignments: none costs less. The cost is 2 class + 5 mask + 5 dice, of each pair by itself, at
    the points drawn; more targets than queries, and none at all, work."""
    torch.manual_seed(seed)
    classes, masks = randn(queries, 4, seed=seed), 3 * randn(queries, 6, 5, seed=seed + 1)
    labels, targets = torch.randint(3, (count,)), torch.rand(count, 12, 9) < 0.5
    state = torch.get_rng_state()
    rows, columns = segment.match(classes, masks, labels, targets, 40)
    assert len(rows) == len(columns) == len(set(rows.tolist())) == len(set(columns.tolist())) == min(queries, count)
    torch.set_rng_state(state)
    places = segment.random_points(1, 40, torch.device("cpu"))
    x = segment.sample(masks[None], places)[0]
    t = segment.sample(targets[None].double(), places)[0]
    unlike = torch.zeros(queries, count, dtype=torch.float64)
    for q, n in np.ndindex(queries, count):
        s = x[q].sigmoid()
        bce = -(t[n] * s.log() + (1 - t[n]) * (1 - s).log()).mean()
        unlike[q, n] = bce + 1 - (2 * (s * t[n]).sum() + 1) / (s.sum() + t[n].sum() + 1)
    assert_close(sum(segment.pairwise_costs(x, t)), unlike)
    cost = 5 * unlike - 2 * classes.softmax(1)[:, labels]
    best = 0.0
    if count and queries <= count:
        best = min(sum(cost[q, n] for q, n in enumerate(p)) for p in itertools.permutations(range(count), queries))
    elif count:
        best = min(sum(cost[q, n] for n, q in enumerate(p)) for p in itertools.permutations(range(queries), count))
    assert cost[rows, columns].sum().item() == pytest.approx(float(best), abs=1e-6)


def test_matching_survives_overflow():
    """Infinite or undefined costs do not stop the matcher: the loss, which is checked, shall say so."""
    classes, masks = torch.full((3, 4), math.nan), torch.full((3, 5, 5), math.inf)
    rows, _ = segment.match(classes, masks, torch.tensor([0, 1]), torch.ones(2, 10, 10, dtype=torch.bool), 10)
    assert len(rows) == 2


def test_point_losses_are_dense_ones_at_all_points(monkeypatch):
    """With every pixel's centre sampled once, a prediction's loss is the loss over all pixels, pair by pair: class with
    weight 2 and 0.1 for unmatched queries, normalised by the weights; masks and dice with 5, over the number of masks.
    Pixels to be ignored count as background."""
    monkeypatch.setattr(segment, "random_points", pixel_centres(6, 9))
    monkeypatch.setattr(segment, "uncertain_points", lambda x, p: segment.random_points(len(x), p, x.device))
    label = torch.randint(0, 3, (2, 6, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    label[:, 4:] = segment.IGNORE
    label[1][label[1] == 2] = 0
    targets = segment.targets_of(label, label.shape[1:])
    assert [labels.tolist() for labels, _ in targets] == [[0, 1, 2], [0, 1]]
    classes, masks = randn(2, 4, 5), randn(2, 4, 6, 9, seed=1)
    loss = segment.prediction_loss(classes, masks, targets, 7.0, 54)
    ce = weight = mask = dice = 0
    for b, (labels, truth) in enumerate(targets):
        order = dict(zip(*(i.tolist() for i in segment.match(classes[b], masks[b], labels, truth, 54)), strict=True))
        for q in range(4):
            wanted, w = (labels[order[q]], 1.0) if q in order else (4, 0.1)
            ce, weight = ce - w * classes[b, q].log_softmax(0)[wanted], weight + w
            if q in order:
                t, s = (label[b] == labels[order[q]]).double(), masks[b, q].sigmoid()
                mask = mask - (t * s.log() + (1 - t) * (1 - s).log()).mean()
                dice = dice + 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)
    assert_close(loss, 2 * ce / weight + 5 * (mask + dice) / 7)


def test_points_are_the_uncertain_ones():
    """Three quarters of the points are the least certain of three times as many, by |logit| sampled there, for each
    mask by itself; the rest are uniform."""
    ramp = torch.linspace(-4, 4, 33).expand(33, 33)
    torch.manual_seed(0)
    places = segment.uncertain_points(torch.stack([ramp, ramp.T]), 4000)
    assert places.shape == (2, 4000, 2) and places.min() >= 0 and places.max() < 1
    for i, mask in enumerate((ramp, ramp.T)):
        certainty = segment.sample(mask[None, None], places[i : i + 1])[0, 0].abs()
        assert 0.95 < certainty[:3000].max() < 1.1  # a quarter of 0..4, and 1/32 for the borders
        assert certainty[3000:].max() > 3 and (certainty[3000:] > 2).float().mean() > 0.3


def test_every_prediction_is_supervised(monkeypatch):
    """The loss is the sum over all predictions, each with its own matching and with points where its matched masks are
    uncertain."""
    monkeypatch.setattr(segment, "random_points", pixel_centres(6, 6))
    model = tiny_segmenter(drop_path=0.0).train()
    labels = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    outputs, targets = model(randn(2, 3, 32, 32, dtype=torch.float32)), segment.targets_of(labels, (32, 32))
    parts = [segment.prediction_loss(*output, targets, 6.0, 36) for output in outputs]
    assert len({round(part.item(), 6) for part in parts}) == 5  # 4 layers + 1
    assert_close(segment.set_loss(outputs, targets, 6.0, 36), sum(parts))
    assert_close(segment.set_loss(outputs[:1], targets, 6.0, 36), parts[0])


def test_targets_lie_where_predictions_do(monkeypatch):
    """An image whose sides are no multiple of the stride has the loss of the same image padded by hand: masks and
    targets are compared at the same places of the padded frame."""
    monkeypatch.setattr(segment, "random_points", pixel_centres(8, 8))
    monkeypatch.setattr(segment, "uncertain_points", lambda x, p: segment.random_points(len(x), p, x.device))
    masks, classes = randn(1, 6, 16, 24), randn(1, 6, 5)
    labels = torch.randint(0, 5, (1, 45, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    padded = F.pad(labels, (0, 96 - 70, 0, 64 - 45), value=segment.IGNORE)
    targets = [segment.targets_of(x, (64, 96)) for x in (labels, padded)]
    losses = [segment.prediction_loss(classes, masks, target, 5.0, 64) for target in targets]
    assert_close(*losses, rtol=0, atol=0)
    assert all(truth.shape[1:] == (64, 96) for _, truth in segment.targets_of(labels, (64, 96)))
    model, size = tiny_segmenter(), (45, 70)
    assert model.padded(size) == (48, 80)
    perfect = F.one_hot(F.pad(labels[:, :, :], (0, 10, 0, 3), value=0).long(), 5).permute(0, 3, 1, 2)
    sure = 40 * F.interpolate(perfect.double(), size=(12, 20)) - 20
    identity = 40 * torch.eye(5, 6, dtype=torch.float64)[None]
    loss = segment.prediction_loss(identity, sure, segment.targets_of(labels, (48, 80)), 5.0, 64)
    shifted = segment.prediction_loss(identity, sure, segment.targets_of(labels, size), 5.0, 64)
    assert loss < shifted  # the unpadded frame is another one


@given(st.integers(0, 10**6))
@settings(max_examples=examples(10))
def test_order_of_targets_does_not_matter(seed):
    """Permuting an image's targets leaves the loss as it is, for the same points."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (2, 16, 16), generator=generator, dtype=torch.uint8)
    targets = segment.targets_of(labels, labels.shape[1:])
    outputs = [(randn(2, 6, 5, seed=seed + i), randn(2, 6, 4, 4, seed=seed - i)) for i in range(2)]

    def loss(targets):
        torch.manual_seed(seed)
        return segment.set_loss(outputs, targets, 3.0, 64)

    orders = [torch.randperm(len(classes), generator=generator) for classes, _ in targets]
    shuffled = [(classes[o], masks[o]) for (classes, masks), o in zip(targets, orders, strict=True)]
    # places of the points follow the masks' order only where they are chosen: fix them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "uncertain_points", lambda x, p: pixel_centres(5, 5)(len(x), p, None))
        assert_close(loss(targets), loss(shuffled))


@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
@settings(max_examples=examples(25))
def test_metric_is_a_count_of_pixels(seed, num_classes, some_ignored):
    """mIoU, mAcc and pAcc from sets of pixels, over all images at once: ignored pixels are nowhere, not even in the
    union; classes without ground truth are in no mean."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, (3, 4, 5)).astype(np.uint8)
    labels[labels == 1] = 0  # class 1 has no ground truth
    if some_ignored:
        labels[rng.random(labels.shape) < 0.3] = segment.IGNORE
    labels[0, 0, 0] = 0
    predicted = rng.integers(0, num_classes, labels.shape)
    matrix = sum(segment.confusion(torch.from_numpy(p), torch.from_numpy(t), num_classes)
                 for p, t in zip(predicted, labels, strict=True))  # fmt: skip
    found = segment.metrics_of(matrix, [str(i) for i in range(num_classes)])
    pixels = [(p, t) for p, t in zip(predicted.flat, labels.flat, strict=True) if t != segment.IGNORE]
    ious, accuracies = {}, []
    for c in {t for _, t in pixels}:
        hit = sum(p == c and t == c for p, t in pixels)
        ious[str(c)] = 100 * hit / sum(c in (p, t) for p, t in pixels)
        accuracies.append(100 * hit / sum(t == c for _, t in pixels))
    assert found["mIoU"] == pytest.approx(np.mean(list(ious.values())))
    assert found["mAcc"] == pytest.approx(np.mean(accuracies))
    assert found["pAcc"] == pytest.approx(100 * np.mean([p == t for p, t in pixels]))
    assert {name: value for name, value in found["iou"].items() if value is not None} == pytest.approx(ious)


def test_background_is_apart_from_the_rest():
    """With a class "background" its IoU and the mean over the other classes that occur are given
    too, by hand: everything called background leaves it 60% and nothing to the others."""
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
    matrix = segment.confusion(torch.zeros_like(labels), labels, 4)
    found = segment.metrics_of(matrix, ["background", "a", "b", "c"])
    assert found["iou_background"] == pytest.approx(60) and found["mIoU_foreground"] == 0
    assert found["mIoU"] == pytest.approx(20)
    half = segment.confusion(torch.tensor([0, 0, 0, 0, 0, 0, 1, 0, 2, 2]), labels, 4)
    found = segment.metrics_of(half, ["background", "a", "b", "c"])
    assert found["iou_background"] == pytest.approx(600 / 7)
    assert found["mIoU_foreground"] == pytest.approx(75)
    alone = segment.metrics_of(segment.confusion(labels[:6], labels[:6], 2), ["background", "a"])
    assert alone["iou_background"] == 100 and alone["mIoU_foreground"] is None
    assert segment.metrics_of(matrix, list("abcd")).keys() == {"mIoU", "mAcc", "pAcc", "iou"}


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=examples(20))
def test_inference_is_its_definition(seed, num_classes, height, width):
    """Scores: masks enlarged to the padded image, then sigmoid, summed over queries with their class probabilities, cut
    to the image, enlarged to the original, largest class; a few classes at a time changes nothing."""
    classes, masks = 2 * randn(2, 3, num_classes + 1, seed=seed), 3 * randn(2, 3, 3, 4, seed=seed + 1)
    scores = segment.class_scores((classes, masks), (12, 16), (height, width))
    enlarged = F.interpolate(masks, size=(12, 16), mode="bilinear", align_corners=False).sigmoid()
    expected = torch.zeros(2, num_classes, height, width, dtype=torch.float64)
    for b, q, k in np.ndindex(2, 3, num_classes):
        expected[b, k] += classes[b, q].softmax(0)[k] * enlarged[b, q, :height, :width]
    assert_close(scores, expected)
    size = (height + 3, 2 * width)
    whole = F.interpolate(scores, size=size, mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(segment.resized_argmax(scores, size), whole)


# ---- 11. counts: parameters and MACs of the paper's tables ---------------------------------------


COUNTS = [  # the rows of Table 2: model, options, parameters that the paper counts, all, MACs with k^T v first
    ("deit_tiny", dict(attention="softmax"), 5_647_872, 5_717_416, 1_253_683_200),
    ("deit_tiny", dict(), 5_878_596, 5_948_140, 1_182_192_384),
    ("deit_base", dict(attention="softmax"), 86_292_480, 86_567_656, 17_563_828_224),
    ("deit_base", dict(), 87_215_376, 87_490_552, 17_277_864_960),
    ("mvitv2_tiny", dict(attention="softmax"), 24_032_352, 24_173_320, 4_676_957_952),
    ("mvitv2_tiny", dict(castle_downsample=False), 24_291_795, 24_369_595, 4_493_313_792),
    ("mvitv2_tiny", dict(), 24_291_921, 24_351_481, 4_265_978_880),
    ("mvitv2_small", dict(attention="softmax"), 34_664_736, 34_870_216, 6_959_715_072),
    ("mvitv2_small", dict(castle_downsample=False), 35_154_795, 35_266_003, 6_722_332_416),
    ("mvitv2_small", dict(), 35_154_921, 35_247_889, 6_494_997_504),
    ("mvitv2_base", dict(attention="softmax"), 51_163_680, 51_472_744, 10_102_438_656),
    ("mvitv2_base", dict(castle_downsample=False), 51_951_618, 52_106_122, 9_780_760_320),
    ("mvitv2_base", dict(), 51_951_744, 52_088_008, 9_553_425_408),
    ("levit128", dict(attention="softmax"), 9_213_936, 9_213_936, 405_321_728),
    ("levit128", dict(castle_downsample=False), 10_479_888, 10_546_184, 494_267_904),
    ("levit128", dict(), 10_480_104, 10_544_048, 486_546_432),
    ("levit192", dict(attention="softmax"), 10_947_069, 10_947_069, 657_022_080),
    ("levit192", dict(castle_downsample=False), 12_691_968, 12_769_609, 816_755_968),
    ("levit192", dict(), 12_692_103, 12_768_127, 812_338_432),
    ("levit256", dict(attention="softmax"), 18_893_876, 18_893_876, 1_127_257_344),
    ("levit256", dict(castle_downsample=False), 22_031_848, 22_131_964, 1_402_291_200),
    ("levit256", dict(), 22_032_028, 22_129_988, 1_396_401_152),
    ("levit384", dict(attention="softmax"), 39_128_836, 39_128_836, 2_351_786_880),
    ("levit384", dict(castle_downsample=False), 45_779_676, 45_921_956, 2_921_738_752),
    ("levit384", dict(), 45_779_928, 45_919_072, 2_912_371_712),
]


def test_counts_of_table_2(table_2):
    """The integers behind Table 2, row by row. One head, but for the published LeViT's two, whose parameters the paper
    counts in full. castle_downsample=False leaves softmax in the blocks between stages."""
    found = []
    for row, (name, options, *_) in zip(table_2, COUNTS, strict=True):
        with torch.device("meta"):
            full = parameters(build_model(name, **options))
        counted = round(1e6 * row["params_m"]), full, round(1e9 * row["macs_g"])
        found.append((row["model"], options, *counted))
    assert found == COUNTS


@pytest.mark.parametrize(("design", "macs"), [
    (None, 657.60 - 0.55), (1, 684.8), (2, 660.9), (3, 735.9), (4, 770.9), (5, 763.0), (6, 838.0),
])  # fmt: skip
def test_designs_of_table_1(design, macs):
    """The six attention designs of Table 1 cost the MACs that the paper prints (685, 661, 736, 771, 763, 838 M), to the
    recovered digit; LeViT-192 itself its official count less the softmax (0.55 M) which that one adds. Queries are
    added in the last three rows only, those of "Residual Q"."""
    model = flops.levit_of_design(design) if design else build_model("levit192", "softmax")
    model.eval()
    assert any(getattr(core, "residual", False) for core in attention.cores(model).values()) == (design in (4, 5, 6))
    assert run.count_macs(model, torch.zeros(1, 3, 224, 224)) / 1e6 == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize(("name", "options", "backbone", "neck", "head", "macs"), [
    ("lcnet_s", {}, [1072 - 464, 4440, 15792, 232032, 331152], 378048, 139456, None),
    ("lcnet_m", {}, [2208 - 696, 15792, 59232, 869568, 1288992], 704768, 379328, None),
    ("lcnet_l", {}, [3456 - 928, 27200, 103552, 1519872, 2275712], 1096000, 555968, None),
    ("lcnet_vit_s", dict(mlp_dwconv=0), [1072 - 464, 4440, 15792, 317760, 1283160], 378048, 139456, None),
    ("lcnet_vit_m", dict(mlp_dwconv=0), [2208 - 696, 15792, 59232, 1262136, 5109792], 704768, 379328, None),
    ("lcnet_vit_l", dict(mlp_dwconv=0), [3456 - 928, 27200, 103552, 2239880, 9074000], 1096000, 555968, None),
    ("esnet_s", {}, [27683 - 696, 189744, 386232], 249600, 139456, (320, 366_654_666)),
    ("esnet_m", {}, [58510 - 696, 372108, 907408], 435200, 379328, (416, 1_251_956_924)),
    ("esnet_l", {}, [88966 - 696, 576695, 1411380], 672000, 555968, (416, 1_883_331_078)),
    ("esnet_vit_s", {}, [27683 - 696, 189744, 2646120], 249600, 139456, None),
    ("esnet_vit_m", {}, [58510 - 696, 372108, 4768928], 435200, 379328, None),
    ("esnet_vit_l", {}, [88966 - 696, 576695, 7425408], 672000, 555968, None),
])  # fmt: skip
def test_counts_of_detectors(name, options, backbone, neck, head, macs):
    """Parameters of each stage (without the stem), neck and head; of PicoDet as published, MACs at a size in pixels to
    the last digit of mmcv's counter."""
    with torch.device("meta"):
        model = detect.build_detector(name, **options)
    if name.startswith("lcnet"):
        one, two, three, four, five, six = (parameters(stage) for stage in model.backbone.blocks)
        stages = [one, two, three, four + five, six]
    else:
        stages = [parameters(stage) for stage in model.backbone.stages]
    assert stages == backbone and parameters(model.neck) == neck and parameters(model.head) == head
    if macs:
        image = torch.empty(1, 3, macs[0], macs[0], device="meta")
        assert flops.count(model, image, convention="paper-det").macs == macs[1]


@pytest.mark.parametrize(("attention_name", "conv", "params", "macs", "backbone"), [
    ("softmax", None, 117_595_479, 229_029_574_656, 181_596_585_984),
    ("castling", 0, 117_596_775, 194_266_527_744, 146_833_539_072),
    ("castling", None, 117_965_415, 194_733_668_352, 147_300_679_680),
    ("castling", 5, 118_555_239, 195_564_140_544, 148_131_151_872),
])  # fmt: skip
def test_counts_of_table_4(table_4_costs, attention_name, conv, params, macs, backbone):
    """The integers that fit the paper's 118 M, 229 / 195 G and 182 / 147 G: softmax; DWConv on V only; with the MLPs'
    3x3, the default; with a 5x5 instead."""
    _, cost = table_4_costs[attention_name, "fpn_transformer", conv]
    assert (cost.params, cost.macs, cost.by_module["backbone"]) == (params, macs, backbone)


def test_parts_of_table_4(table_4_costs):
    """Each part by itself, so that no two mistakes cancel. The deformable decoder's samples are 4 MACs a value."""
    model, cost = table_4_costs["softmax", "fpn_transformer", None]
    parts = {
        "backbone.vit.patch_embed": 830_472_192, "backbone.vit.blocks.0": 13_010_731_008,
        "backbone.vit.blocks.0.attn": 6_366_953_472, "backbone.pyramid.0": 17_716_740_096,
        "backbone.pyramid.1": 5_536_481_280, "backbone.pyramid.2": 1_107_296_256, "backbone.pyramid.3": 276_824_064,
        "pixel_decoder": 36_044_800_000, "pixel_decoder.encoder.5": 524_812_288,
        "pixel_decoder.mask_features": 13_287_555_072, "decoder": 11_388_188_672,
    }  # fmt: skip
    assert {name: cost.by_module[name] for name in parts} == parts
    sizes = [parameters(part) for part in (model.backbone, model.pixel_decoder, model.decoder, *model.backbone.pyramid)]
    assert sizes == [91_992_256, 11_105_792, 14_497_431, 2_115_904, 1_869_184, 787_456, 787_456]
    assert table_4_costs["castling", "fpn_transformer", 0][1].by_module["backbone.vit.blocks.0"] == 10_113_810_432
    assert table_4_costs["castling", "fpn_transformer", None][1].by_module["backbone.vit.blocks.0"] == 10_152_738_816
    model, cost = table_4_costs["softmax", "msdeform", None]
    tokens = 22 * 16 + 44 * 32 + 88 * 64
    assert parameters(model.pixel_decoder) == 5_315_008
    assert (cost.macs - 6 * 4 * tokens * 8 * 12 * 32) / 1e9 == pytest.approx(242.05, abs=0.005)


@given(st.sampled_from(sorted(KERNELS)), st.integers(1, 3), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24))
@example("softmax", 2, 5, 8, 8)  # a CPU has a fused kernel for D = E only
def test_counted_attention_equals_its_formula(kernel, heads, tokens, key_dim, value_dim):
    """Each kernel's products, as counted on the running core, are the closed formula; with them the DWConv; on the CPU,
    whose fused softmax torch counts as 0, as on the meta device. The paper's convention counts the same."""
    core = AttentionCore(heads, kernel).eval()
    shapes = [(2, heads, tokens, d) for d in (key_dim, key_dim, value_dim)]
    conv = 0 if kernel == "softmax" else 2 * 9 * heads * value_dim * tokens
    for convention in ("macs", "paper-cls"):
        expected = 2 * attention_macs(kernel, heads, tokens, key_dim, value_dim)
        for device in ("cpu", "meta"):
            cost = flops.count(core.to(device) if device == "cpu" else copy.deepcopy(core).to(device),
                               *(torch.zeros(s, device=device) for s in shapes), convention=convention)  # fmt: skip
            assert cost.macs == expected + conv and cost.attention == expected


def test_formulations_count_alike():
    """einsum, matmul, bmm, baddbmm and linear of one product have one count; grid_sample has 4 MACs per value."""
    a, b = torch.zeros(3, 4, 5), torch.zeros(3, 5, 6)
    for function in (
        lambda a, b: a @ b,
        lambda a, b: torch.einsum("bij,bjk->bik", a, b),
        lambda a, b: torch.bmm(a, b),
        lambda a, b: torch.baddbmm(torch.zeros(3, 4, 6), a, b),
        lambda a, b: torch.stack([x @ y for x, y in zip(a, b, strict=True)]),
        lambda a, b: torch.stack([F.linear(x, y.T) for x, y in zip(a, b, strict=True)]),
    ):
        assert flops.count(Calls(function), a, b).macs == 3 * 4 * 5 * 6
    sample = Calls(lambda x, grid: F.grid_sample(x, grid, align_corners=False))
    assert flops.count(sample, torch.zeros(2, 7, 9, 9), torch.zeros(2, 4, 5, 2)).macs == 4 * 2 * 7 * 4 * 5
    bicubic = Calls(lambda x, grid: F.grid_sample(x, grid, mode="bicubic", align_corners=False))
    assert flops.count(bicubic, torch.zeros(2, 7, 9, 9), torch.zeros(2, 4, 5, 2)).macs == 16 * 2 * 7 * 4 * 5
