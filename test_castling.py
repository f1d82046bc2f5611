"""Laws that hold here, one section per file in import order. Run with `pytest`; timm, where installed, is an oracle.

Oracles are the slow, obvious form in float64. Tolerances come from the dtype.
"""

import colorsys
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attention
import bench
import convert
import data
import detect
import figures
import flops
import models
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
from convert import load_pretrained
from data import SHAPES, DataError
from models import build_model, list_models

ROOT = Path(__file__).parent
torch.set_num_threads(1)  # what is tested is small: more threads wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in processes that tests start, too
settings.register_profile("castling", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("castling")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


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


# ---- attention.py: the angular kernel --------------------------------------------------------------------------------


@given(qkv(), st.floats(1e-3, 1e3))
def test_similarity_is_one_minus_angle_over_pi(qkv, scale):
    """Eq. (4), (5): within 0..1, scale-free, symmetric, and cos(pi (1 - Sim)) gives the cosine back."""
    q, k, _ = qkv
    assume((q.norm(dim=-1) > 1e-2).all())  # the norm's floor is 1e-6: keep well above it
    sim = angular_similarity(q, k)
    assert sim.min() >= 0 and sim.max() <= 1
    assert_close(angular_similarity(scale * q, k), sim, atol=1e-6, rtol=0)
    assert_close(angular_similarity(k, q), sim.mT, atol=1e-7, rtol=0)
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
    with pytest.raises(ValueError, match="-1"):
        angular_coefficients(-1)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(0, 300))
def test_series_converges_within_its_bound(xs, terms):
    """Eq. (8): on all of [-1, 1], ends included, the partial sum is within the stated bound of 1 - arccos(x) / pi,
    the bound is reached at |x| = 1, and no further term makes it worse."""
    x = torch.tensor([*xs, -1.0, 1.0, 0.0], dtype=torch.float64)
    target = 1 - torch.arccos(x) / math.pi
    error = (angular_series(x, terms) - target).abs()
    bound = angular_series_bound(x, terms)
    assert (error <= bound + 1e-15 * (terms + 10)).all()
    assert_close(error[-3:-1], bound[-3:-1], atol=1e-13, rtol=0)
    assert ((angular_series(x, terms + 1) - target).abs() <= error + 1e-15 * (terms + 10)).all()
    linear = angular_series_bound(torch.ones(1, dtype=torch.float64), 0).item()
    assert linear == pytest.approx(0.5 - 1 / math.pi, abs=1e-12)  # 0.1817, the most that the linear terms are wrong


# ---- attention.py: attention by kernel -------------------------------------------------------------------------------


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
    if kernel == "softmax":
        return (torch.einsum("...nd,...md->...nm", q, k) / D**0.5).softmax(-1) @ v
    weights = torch.einsum("...nd,...md->...nm", q.relu(), k.relu())
    return weights / M @ v if kernel == "relu_s" else weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


@given(qkv(), st.sampled_from(sorted(KERNELS)))
def test_kernel_equals_its_definition(qkv, kernel):
    """Eq. (9) and Table 5: the fast form is the explicit (N, M) matrix times V. Catches a sum over the wrong axis."""
    q, k, v = qkv
    expected = explicit(kernel, q, k, v)
    # arccos turns a rounding of 1e-16 at |x| = 1 into 1e-8
    assert_close(KERNELS[kernel](q, k, v), expected, rtol=1e-5, atol=1e-7 * v.abs().sum().item())


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
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._schema.name in ("aten::bmm", "aten::mm"):
                seen.append(tuple(out.shape[-2:]))
            return out

    for kernel in sorted(set(KERNELS) - {"softmax", "angular", "identity"}):
        for tokens in (64, 4):
            seen.clear()
            with Products():
                KERNELS[kernel](*randn(3, 1, 2, tokens, 8))
            assert seen[:2] == [(8, 8), (tokens, 8)]


@given(qkv())
def test_half_term_is_per_token(qkv):
    """D1: the constant term is v_i / 2 of the token itself, not half the sum over tokens as Eq. (8) would have it."""
    q, k, v = qkv
    assert_close(linear_angular_attention(q, torch.zeros_like(k), v), 0.5 * v)


@given(qkv(zero_tokens=False), st.integers(0, 2**31 - 1))
def test_only_directions_of_q_and_k_matter(qkv, seed):
    """Scaling any single query or key by a positive number changes nothing."""
    q, k, v = qkv
    assume(min(q.norm(dim=-1).min(), k.norm(dim=-1).min()) > 1e-4)
    a, b = 10 ** randn(2, *q.shape[:-1], 1, seed=seed).clamp(-1.5, 1.5)
    assert_close(linear_angular_attention(a * q, b * k, v), linear_angular_attention(q, k, v))


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


def test_autocast_does_not_touch_the_core():
    """D3: under bfloat16 autocast a float32 core computes in float32, bit for bit, both branches."""
    core = AttentionCore(2, auxiliary=True)
    q, k, v = randn(3, 2, 2, 60, 8, dtype=torch.float32)
    expected = core(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(core(q, k, v), expected)


@pytest.mark.parametrize("shapes", [
    ((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 6, 4)),
    ((1, 2, 5, 4), (1, 2, 5, 3), (1, 2, 5, 4)),
    ((1, 2, 5, 4), (1, 3, 5, 4), (1, 2, 5, 4)),
    ((1, 2, 6, 4), (1, 2, 5, 4), (1, 2, 5, 4)),
    ((4,), (4,), (4,)),
])  # fmt: skip
def test_wrong_shapes_are_named(shapes):
    """A shape that does not fit raises ValueError with the shape in it."""
    with pytest.raises(ValueError, match=re.escape(str(shapes[2]))):
        linear_angular_attention(*(torch.zeros(s) for s in shapes))


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match="relu_s"):
        AttentionCore(2, "relu-s")
    with pytest.raises(ValueError, match="choose from .*ramp"):
        AttentionCore(2, schedule="zzz")
    for wrong in (dict(dconv=4), dict(kernel="softmax", auxiliary=True), dict(epsilon=2.0), dict(heads=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AttentionCore(**(dict(heads=2) | wrong))
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"dim 8 .* heads, {heads}"):
            LinearAngularAttention(8, heads)


# ---- attention.py: the auxiliary branch ------------------------------------------------------------------------------


@given(qkv(max_tokens=8, max_dim=5), st.floats(0, 1))
def test_masked_softmax_equals_a_loop(qkv, threshold):
    """Eq. (10), entry by entry: softmax of un-normalised q, k, kept strictly above the threshold, not renormalised."""
    q, k, v = qkv
    out, kept = masked_softmax_attention(q, k, v, threshold)
    B, H, N, D = q.shape
    for b in range(B):
        for h in range(H):
            for i in range(N):
                logits = [sum(q[b, h, i, d] * k[b, h, j, d] for d in range(D)).item() / math.sqrt(D) for j in range(N)]
                top = max(logits)
                total = sum(math.exp(x - top) for x in logits)
                row = [math.exp(x - top) / total for x in logits]
                assume(all(abs(p - threshold) > 1e-12 for p in row))
                assert kept[b, h, i].tolist() == [p > threshold for p in row]
                expected = sum(p * v[b, h, j] * (p > threshold) for j, p in enumerate(row))
                assert_close(out[b, h, i], expected, rtol=1e-6, atol=1e-9)


def test_masked_softmax_gradients():
    """Kept entries carry the softmax's gradient, the comparison none: equals finite differences off the threshold."""
    q, k, v = (randn(1, 1, 5, 3, seed=s).requires_grad_() for s in range(3))
    out, kept = masked_softmax_attention(q, k, v, 0.15)
    assert kept.any() and not kept.all()
    assert torch.autograd.gradcheck(lambda *x: masked_softmax_attention(*x, 0.15)[0], (q, k, v))


@given(st.integers(1, 49), st.floats(0, 5), st.integers(0, 1000))
def test_fixed_mask_cannot_empty_below_50_tokens(tokens, scale, seed):
    """A softmax row has an entry >= 1/N, so 0.02 always keeps one where N < 50: the reason for departure D4."""
    q, k, v = scale * randn(3, 1, 2, tokens, 4, seed=seed)
    _, kept = masked_softmax_attention(q, k, v, 0.02)
    assert kept.any(dim=-1).all()


@given(qkv(max_tokens=6))
def test_threshold_one_keeps_nothing(qkv):
    """P > 1 is false everywhere, also for the single token whose P is 1 and for P that rounds to above 1."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out, kept = masked_softmax_attention(*(x.to(dtype) for x in qkv), 1.0)
        assert not kept.any() and not out.any()


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


def hybrid(tokens=60, **core):
    core = AttentionCore(2, auxiliary=True, **core)
    return core, randn(3, 2, 2, tokens, 8, dtype=torch.float32) * 2


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


def test_castling_where_the_mask_happens_to_be_empty_changes_no_bit():
    """Small logits: the branch is computed, every entry is below the threshold, the output is the castled one."""
    core, x = hybrid(tokens=100)
    x = 0.1 * x
    y = core(*x)
    assert mask_density(core) == {"": 0.0} and core.active
    assert torch.equal(y, castle(core)(*x))


def test_castle_is_in_place_idempotent_and_leaves_no_softmax():
    """castle returns its argument; afterwards no softmax is computed and no layer has a mask to report."""

    class NoSoftmax(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "softmax" not in func._schema.name and "attention" not in func._schema.name
            return func(*args, **(kwargs or {}))

    model = build_model("levit128", num_classes=5, image_size=64).eval()
    assert castle(model) is model and castle(model) is model and mask_density(model) == {}
    with NoSoftmax(), torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(AssertionError), NoSoftmax(), torch.no_grad():
        build_model("levit128", num_classes=5, image_size=64).eval()(torch.zeros(1, 3, 64, 64))


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


def test_threshold_takes_a_share_of_training():
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=str(wrong)):
            set_threshold(AttentionCore(1), wrong)


# ---- attention.py: the core and the drop-in block --------------------------------------------------------------------


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


@pytest.mark.parametrize("auxiliary", [False, True])
def test_core_gradients(auxiliary):
    """Analytic gradients of the whole layer, DWConv included, equal finite differences."""
    core = AttentionCore(2, auxiliary=auxiliary, dconv=3).double()
    q, k, v = (randn(1, 2, 6, 3, seed=s).requires_grad_() for s in range(3))
    assert torch.autograd.gradcheck(lambda *x: core(*x[:3]), (q, k, v, core.dconv.weight))


def test_core_rejects_what_it_has_no_use_for():
    x = torch.zeros(1, 2, 5, 4)
    cases = [
        (AttentionCore(3), dict(), "expected \\(B, 3, N, D\\)"),
        (AttentionCore(2), dict(bias=torch.zeros(2, 5, 5)), "bias"),
        (AttentionCore(2, "relu_e"), dict(padding=torch.zeros(1, 5, dtype=torch.bool)), "relu_e"),
    ]
    for core, options, message in cases:
        with pytest.raises(ValueError, match=message):
            core(x, x, x, **options)
    with pytest.raises(ValueError, match="one value per query"):
        AttentionCore(2)(x[:, :, :3], x, x)


def test_attention_dropout_acts_in_training_only():
    for core in (AttentionCore(2, auxiliary=True, dropout=0.5), AttentionCore(2, "softmax", dropout=0.5)):
        x = randn(3, 1, 2, 20, 4, dtype=torch.float32) * 3
        assert not torch.equal(core.train()(*x), core(*x))
        assert torch.equal(core.eval()(*x), core(*x))


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


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("tokens", "dim", "heads"), [(197, 96, 3), (16, 64, 2), (49, 48, 4), (1, 8, 1)])
def test_block_equals_the_released_formula(sparse, tokens, dim, heads):
    """Same state dict in both directions, same output within 1e-6 in float32, at ViT and LeViT sizes."""
    released = Released(dim, heads, bias=sparse, sparse=sparse)
    block = LinearAngularAttention(dim, heads, qkv_bias=sparse, sparse_reg=sparse, schedule="fixed")
    block.load_state_dict(released.state_dict())
    assert set(released.state_dict()) == set(castle(copy.deepcopy(block)).state_dict())
    x = randn(2, tokens, dim, dtype=torch.float32)
    assert_close(block(x), released(x), atol=1e-6, rtol=0)


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


def test_block_takes_maps_row_by_row():
    """(B, C, H, W) in is (B, C, H, W) out and equals the tokens read row by row, on a non-square map too."""
    block = LinearAngularAttention(12, 3, sparse_reg=True)
    x = randn(2, 12, 4, 7, dtype=torch.float32)
    assert torch.equal(block(x), block(x.flatten(2).mT).mT.unflatten(2, (4, 7)))


def test_block_keeps_prefix_tokens_apart():
    """A separate prefix is the same as tokens put in front, for sequences and maps."""
    block = LinearAngularAttention(12, 3)
    prefix, x = randn(2, 2, 12, dtype=torch.float32), randn(2, 12, 3, 5, dtype=torch.float32)
    joined = block(torch.cat([prefix, x.flatten(2).mT], 1))
    y, prefix_out = block(x, prefix)
    assert torch.equal(prefix_out, joined[:, :2]) and torch.equal(y, joined[:, 2:].mT.unflatten(2, (3, 5)))


@given(st.integers(1, 9), st.integers(0, 6), st.booleans(), st.booleans(), st.integers(0, 100))
def test_padding_changes_nothing(tokens, padded, auxiliary, with_prefix, seed):
    """A sequence padded at its end, whatever the padding holds, gives what it gives alone: statistics too."""
    block = LinearAngularAttention(8, 2, qkv_bias=True, sparse_reg=auxiliary).double()
    x = randn(1, tokens + padded, 8, seed=seed)
    prefix = randn(1, 2, 8, seed=seed + 1) if with_prefix else None
    mask = (torch.arange(tokens + padded) >= tokens)[None]
    alone = block(x[:, :tokens], prefix)
    statistics = mask_statistics(block)
    set_threshold(block, 0.0)
    together = block(x, prefix, key_padding_mask=mask)
    if with_prefix:
        assert_close(together[1], alone[1])
        alone, together = alone[0], together[0]
    assert_close(together[:, :tokens], alone)
    for layer, pair in mask_statistics(block).items():
        assert pair == pytest.approx(statistics[layer], rel=1e-5)


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


def test_block_names_bad_input():
    block = LinearAngularAttention(8, 2)
    for shape in ((2, 8), (2, 5, 7), (2, 7, 3, 3)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            block(torch.zeros(shape))
    x = torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match=re.escape("(3, 1, 8)")):
        block(x, torch.zeros(3, 1, 8))
    for mask in (torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match="key_padding_mask"):
            block(x, key_padding_mask=mask)
    with pytest.raises(ValueError, match="7.*2"):
        LinearAngularAttention(7, 2)


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
    *table, last = done.stdout.splitlines()
    assert len(table) == 7 and "castling an empty mask changes no bit" in last


# ---- attention.py: what the core computes with, and holds ------------------------------------------------------------


def results(function, inputs, grad):
    """Output and gradients of all tensors among the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]  # detach keeps the layout
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


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
def test_scale_of_any_input_does_not_matter(a, b, c, seed):
    """Eq. (9) has directions only: q, k and v times 1e-30 to 1e30 in float32 give the unit vectors of float64. Squares
    of such numbers are 0 or infinite there: the sum of squares alone would be off by 0.9 without a word."""
    q, k, v = randn(3, 1, 2, 9, 8, seed=seed)
    expected = attention.castling_attention(q, k, v)
    scaled = [(x * 10.0**power).float().requires_grad_() for x, power in ((q, a), (k, b), (v, c))]
    y = attention.castling_attention(*scaled)
    assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y[..., 0].sum() * 1e-8, scaled))


def test_infinite_or_missing_numbers_are_not_hidden():
    """A token that holds inf or nan becomes nan as a direction, not a finite guess."""
    x = torch.ones(3, 4)
    x[0, 1], x[1, 2] = math.inf, math.nan
    assert attention.unit(x).isnan().all(1).tolist() == [True, True, False]


def test_core_can_be_differentiated_twice_and_transformed():
    """Second derivatives with and without branch; torch.func's and forward-mode ones are the plain ones, and nothing of
    a transform stays in the mask statistics, where it would break the next forward, copy or checkpoint."""
    q, k, v = randn(3, 1, 2, 4, 3).unbind()
    weight, branch = randn(2, 1, 3, 1, seed=1), randn(1, 2, 4, 3, seed=2)
    for inputs in ((q, k, v, weight), (q, k, v, weight, branch)):
        inputs = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(attention.castling_attention, inputs)
        assert torch.autograd.gradgradcheck(attention.castling_attention, inputs)
    threshold = torch.tensor(0.2).double()
    inputs = [(2 * x.detach()).requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradgradcheck(lambda *x: attention.auxiliary_branch(*x, threshold, None, 0.0)[0], inputs)
    core = AttentionCore(2, auxiliary=True, epsilon=0.3).double()
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
def test_branch_in_blocks_equals_its_formula(qkv, threshold, padded, seed):
    """Output, statistics and gradients of the branch in blocks are those of the whole matrix, for blocks of one row,
    of some heads and of everything, with padding and with one threshold per image."""
    q, k, v = qkv
    B, H, N, D = q.shape
    P = (torch.einsum("bhnd,bhmd->bhnm", q, k) / D**0.5).softmax(-1)
    hidden = torch.arange(N) >= N - min(padded, N - 1)
    threshold = torch.tensor(threshold).double()
    if padded:
        P = (torch.einsum("bhnd,bhmd->bhnm", q, k) / D**0.5).masked_fill(hidden, -math.inf).softmax(-1)
        threshold = threshold * torch.ones(B).double()
    real = ~(hidden[:, None] | hidden) if padded else torch.ones(N, N, dtype=torch.bool)
    assume((threshold.mean() - P).abs().min() > 1e-9 and P.isfinite().all())  # the mask jumps there
    padding = hidden.expand(B, -1) if padded else None

    def plain(q, k, v):
        logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / D**0.5
        p = (logits.masked_fill(hidden, -math.inf) if padded else logits).softmax(-1)
        return p.masked_fill(~((p > threshold.mean()) & (p <= 1) & real & (threshold.mean() < 1)), 0) @ v

    grad = randn(*v.shape, seed=seed)
    expected = results(plain, qkv, grad)
    kept = (threshold.mean() < P) & real & (threshold.mean() < 1)
    for size in (1, 8 * N * N, 2**22):
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(attention.BLOCK_BYTES, "cpu", size)

            def blocked(*x):
                out = attention.auxiliary_branch(*x, threshold, padding, 0.0)[0]
                return 0 * sum(x_.sum() for x_ in x) + (torch.zeros_like(v) if out is None else out)

            for a, b in zip(results(blocked, qkv, grad), expected, strict=True):
                assert_close(a, b, rtol=1e-6, atol=1e-7 * (1 + b.abs().max().item()))
            _, totals = attention.auxiliary_branch(q, k, v, threshold, padding, 0.0)
            assert_close(totals, torch.stack([kept.sum().double(), (P * kept).sum()]), rtol=1e-6, atol=1e-9)


@given(qkv(max_tokens=40), st.floats(-3, 1), st.floats(1e-4, 1))
def test_certified_masks_are_empty(qkv, scale, threshold):
    """A head that the bound passes has no entry above the threshold. It does fire: always at
    a threshold of infinity, and on small logits at twice 1/N."""
    q, k, v = (10**scale * x / (x.abs().max() + 1e-9) for x in qkv)
    N, heads = q.shape[2], [x.flatten(0, 1) for x in (q, k)]

    def certain(threshold, q=heads[0], k=heads[1]):
        return attention.certainly_empty(q, k, torch.full((len(q),), threshold).double())

    kept = masked_softmax_attention(*heads, v.flatten(0, 1), threshold)[1]
    assert not kept[certain(threshold)].any()
    assert certain(math.inf).all()
    assert certain(2 / N, *(1e-3 * x / (x.abs().max() + 1e-9) for x in heads)).all()


def test_certified_branch_computes_no_matrix():
    """Where every mask is certain to be empty no N x N matrix exists and there is no branch to add."""
    seen = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x))
            return out

    q, k, v = randn(3, 1, 2, 300, 4).unbind()
    threshold = torch.tensor(0.02).double()
    for scale, matrix in ((0.01, False), (1.0, True)):
        seen.clear()
        with Largest():
            out, totals = attention.auxiliary_branch(scale * q, scale * k, v, threshold, None, 0.0)
        assert (max(seen) >= 300 * 300) == matrix == (out is not None) == bool(totals[0] > 0)


def test_branch_keeps_a_few_blocks_alive():
    """At N = 3136 with every row live, forward and backward together never hold more than twelve blocks of 4 MiB; one
    head's N x N matrix alone has 39 MB, and the plain form holds four of them per head for backward."""
    q, k, v = (x.requires_grad_() for x in (3 * randn(3, 1, 2, 3136, 8, dtype=torch.float32)).unbind())
    with flops.Storages() as storages:
        out, totals = attention.auxiliary_branch(q, k, v, torch.tensor(0.02), None, 0.0)
        forward = storages.peak
        out.sum().backward()
    assert totals[0] > 3136 * 2
    assert forward < 7 * 2**22 and storages.peak < 12 * 2**22 < 4 * 2 * 4 * 3136**2 / 4


def test_branch_gradcheck_checkpoint_autocast_and_compile():
    """The branch passes gradcheck; under gradient checkpointing, compilation and bfloat16 autocast of the caller it
    gives the same gradients."""
    q, k, v = (randn(1, 2, 6, 3, seed=s).requires_grad_() for s in range(3))
    threshold = torch.tensor(0.15).double()
    assert torch.autograd.gradcheck(lambda *x: attention.auxiliary_branch(*x, threshold, None, 0.0)[0], (q, k, v))
    core, x = hybrid(epsilon=0.1)
    grad, x = randn(2, 2, 60, 8, dtype=torch.float32), x.unbind()
    expected = results(core, x, grad)
    torch._dynamo.reset()

    def autocast(*x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return core(*x)

    for form in (
        lambda *x: torch.utils.checkpoint.checkpoint(core, *x, use_reentrant=False),
        torch.compile(core, fullgraph=True, backend="aot_eager"),
        autocast,
    ):
        for a, b in zip(results(form, x, grad), expected, strict=True):
            assert_close(a, b)


def test_dropout_of_the_branch_is_drawn_once():
    """Backward sees the same dropped entries as forward: finite differences with the generator set back agree."""
    q, k, v = (2 * randn(1, 2, 5, 3, seed=s).requires_grad_() for s in range(3))

    def branch(*x):
        torch.manual_seed(3)
        return attention.auxiliary_branch(*x, torch.tensor(0.1).double(), None, 0.4)[0]

    assert torch.autograd.gradcheck(branch, (q, k, v))


@pytest.mark.parametrize("block", [False, True])
def test_saved_threshold_is_loaded(block):
    """A layer that is saved at some progress, and loaded into a fresh one, is the same function. Castled, its state
    dict is weights only; the authors', which has no progress, leaves the threshold as it is."""
    def make():
        return LinearAngularAttention(16, 2, sparse_reg=True) if block else AttentionCore(2, auxiliary=True)

    x = (4 * randn(2, 30, 16, dtype=torch.float32),)
    if not block:
        x = (3 * randn(3, 2, 2, 30, 8, dtype=torch.float32)).unbind()
    trained, fresh = make(), make()
    set_threshold(trained, 0.5)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(*x), trained(*x))
    set_threshold(trained, 0.95)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(*x), trained(*x)) and not fresh.active
    weights = castle(trained).state_dict()
    assert set(weights) == {name for name, _ in trained.named_parameters()}
    set_threshold(fresh, 0.25)
    fresh.load_state_dict(weights)
    assert fresh.progress == 0.25 and fresh.active


# ---- figures.py: looking inside a layer ------------------------------------------------------------------------------


@given(qkv(), st.booleans(), st.sampled_from([0, 3, 9]), st.data())
def test_rows_are_those_of_the_map(qkv, auxiliary, taps, data):
    """attention_rows @ v is the core's output at the chosen queries: kernel, mask, normalisation and DWConv."""
    q, k, v = qkv
    core = AttentionCore(q.shape[1], auxiliary=auxiliary, dconv=taps, epsilon=0.1, schedule="fixed").double()
    queries = data.draw(st.lists(st.integers(0, q.shape[2] - 1), min_size=1, max_size=4))
    rows = figures.attention_rows(core, q, k, v, queries)
    assert rows.shape == (*q.shape[:2], len(queries), q.shape[2])
    assert_close(rows @ v, core(q, k, v)[:, :, queries], atol=1e-9, rtol=1e-7)
    masks = figures.auxiliary_mask_rows(core, q, k, queries)
    assert_close(masks, attention.masked_softmax(q, k, 0.1)[:, :, queries] if auxiliary else torch.zeros_like(masks))
    assert not figures.auxiliary_mask_rows(castle(core), q, k, queries).any()


def test_rows_are_computed_without_the_matrix():
    """At 4096 tokens no operation makes more than Q N numbers per head: 4096^2 would be 500 times as many."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    q, k, v = randn(3, 1, 2, 4096, 4, dtype=torch.float32)
    core = AttentionCore(2, auxiliary=True)
    with Watch():
        figures.attention_rows(core, q, k, v, [0, 9, 4095])
        figures.effective_rank(q, k)
    assert largest <= 2 * 4096 * 8


def test_rows_and_rank_are_in_float32_under_autocast():
    """D3: as the core itself is, so that the rows remain those of its map."""
    q, k, v = 2 * randn(3, 2, 2, 30, 8, dtype=torch.float32)
    core = AttentionCore(2, auxiliary=True, epsilon=0.1)
    expected = figures.attention_rows(core, q, k, v, [0, 7]), figures.effective_rank(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = figures.attention_rows(core, q, k, v, [0, 7]), figures.effective_rank(q, k)
    assert_close(found, expected)


@given(qkv(), st.sampled_from([0.0, 0.5]))
def test_effective_rank_is_that_of_the_matrix(qkv, diagonal):
    """exp(entropy) of the singular values of the N x N matrix, here formed: 1 for equal tokens, N for I / 2 alone."""
    q, k, _ = qkv
    matrix = diagonal * torch.eye(q.shape[2], dtype=q.dtype) + cosines(q, k) / math.pi
    share = torch.linalg.svdvals(matrix)
    share = share / share.sum(-1, keepdim=True).clamp_min(1e-12)
    assume((q.norm(dim=-1) > 1e-9).any() and share.max() > 0)
    expected = torch.exp(-(share * share.clamp_min(1e-300).log()).sum(-1))
    assert_close(figures.effective_rank(q, k, diagonal), expected, atol=1e-6, rtol=1e-6)
    assert_close(figures.effective_rank(0 * q, k), torch.full_like(expected, q.shape[2]), atol=1e-9, rtol=1e-9)
    same = torch.ones_like(q)
    assert_close(figures.effective_rank(same, same, 0.0), torch.ones_like(expected), atol=1e-5, rtol=0)


def test_captured_shows_what_each_layer_saw():
    """q, k, v of every layer by name, with which its rows can be had; afterwards nothing is kept any more."""
    model = tiny("deit")
    with figures.captured(model) as seen, torch.no_grad():
        model(randn(2, 3, 64, 64, dtype=torch.float32))
    assert [*seen] == ["blocks.0.attn", "blocks.1.attn"]
    assert {x.shape for x in seen["blocks.1.attn"]} == {(2, 2, 17, 12)}
    before = seen["blocks.0.attn"][0]
    model(torch.zeros(2, 3, 64, 64))
    assert seen["blocks.0.attn"][0] is before
    core, (q, k, v) = attention.cores(model)["blocks.0.attn"], seen["blocks.0.attn"]
    for queries in ([17], [0, -1]):
        with pytest.raises(ValueError, match="within 0..16"):
            figures.attention_rows(core, q, k, v, queries)
    with pytest.raises(ValueError, match="cosine"):
        figures.attention_rows(AttentionCore(2, "cosine"), q, k, v, [0])


# ---- models.py -------------------------------------------------------------------------------------------------------

TINY_LEVIT = dict(dims=(32, 48, 64), heads=(2, 3, 4), key_dim=8, depths=(1, 1, 1))
TINY_DEIT = dict(dim=24, heads=2, depth=2)
TINY_MVIT = dict(dim=8, depths=(1, 2, 1))
TINY_LCNET = dict(width=0.25, heads=(2, 4))
TINY_ESNET = dict(width=0.25, ratios=((0.875, 0.5), (0.5, 0.75), (0.5, 0.5)), heads=4)
FAMILIES = ["levit", "deit", "mvit", "lcnet", "esnet"]


def tiny(family, attention="castling", image_size=64, seed=0, **options):
    """A small model with 5 classes; norms and other constants shaken, so that nothing is zero by accident."""
    name, row = {
        "levit": ("levit128", TINY_LEVIT), "deit": ("deit_tiny", TINY_DEIT), "mvit": ("mvitv2_tiny", TINY_MVIT),
        "lcnet": ("lcnet_vit_s", TINY_LCNET), "esnet": ("esnet_vit_s", TINY_ESNET),
    }[family]  # fmt: skip
    torch.manual_seed(seed)
    return shaken(build_model(name, attention, 5, image_size, **(row | options))).eval()


def shaken(model, std=0.1):
    """Random parameters and BatchNorm statistics: zero-initialised ones would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if name.endswith("attention_biases") else std) * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def weights_only(model):
    """Parameters that the paper counts: weights of convolutions and linear layers."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "options", "weights", "full"), [
    ("deit_tiny", dict(attention="softmax"), 5_647_872, 5_717_416),
    ("deit_tiny", dict(), 5_878_596, 5_948_140),
    ("deit_base", dict(attention="softmax"), 86_292_480, 86_567_656),
    ("deit_base", dict(), 87_215_376, 87_490_552),
    ("levit128", dict(castle_downsample=False), 10_479_888, 10_546_184),
    ("levit128", dict(), 10_480_104, 10_544_048),
    ("levit192", dict(castle_downsample=False), 12_691_968, 12_769_609),
    ("levit192", dict(), 12_692_103, 12_768_127),
    ("levit256", dict(castle_downsample=False), 22_031_848, 22_131_964),
    ("levit256", dict(), 22_032_028, 22_129_988),
    ("levit384", dict(castle_downsample=False), 45_779_676, 45_921_956),
    ("levit384", dict(), 45_779_928, 45_919_072),
    ("mvitv2_tiny", dict(attention="softmax"), 24_032_352, 24_173_320),
    ("mvitv2_tiny", dict(castle_downsample=False), 24_291_795, 24_369_595),
    ("mvitv2_tiny", dict(), 24_291_921, 24_351_481),
    ("mvitv2_small", dict(attention="softmax"), 34_664_736, 34_870_216),
    ("mvitv2_small", dict(castle_downsample=False), 35_154_795, 35_266_003),
    ("mvitv2_small", dict(), 35_154_921, 35_247_889),
    ("mvitv2_base", dict(attention="softmax"), 51_163_680, 51_472_744),
    ("mvitv2_base", dict(castle_downsample=False), 51_951_618, 52_106_122),
    ("mvitv2_base", dict(), 51_951_744, 52_088_008),
    ("levit128", dict(attention="softmax"), None, 9_213_936),
    ("levit192", dict(attention="softmax"), None, 10_947_069),
    ("levit256", dict(attention="softmax"), None, 18_893_876),
    ("levit384", dict(attention="softmax"), None, 39_128_836),
])  # fmt: skip
def test_parameter_counts(name, options, weights, full):
    """The integers behind Table 2: weights as the paper counts them, and all parameters. One head, but for the
    published LeViT's two."""
    with torch.device("meta"):
        model = build_model(name, **options)
    assert parameters(model) == full
    assert weights is None or weights_only(model) == weights


@pytest.mark.parametrize(("name", "theirs"), [
    ("deit_tiny", "deit_tiny_patch16_224"), ("deit_small", "deit_small_patch16_224"),
    ("deit_base", "deit_base_patch16_224"), ("levit128", "levit_128"), ("levit192", "levit_192"),
    ("levit256", "levit_256"), ("levit384", "levit_384"), ("mvitv2_tiny", "mvitv2_tiny"),
    ("mvitv2_small", "mvitv2_small"), ("mvitv2_base", "mvitv2_base"),
])  # fmt: skip
def test_softmax_models_equal_timm(name, theirs):
    """Same state dict, name by name and in order; same logits within 1e-5, in eval and (both heads) in training."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    oracle = shaken(timm.create_model(theirs, drop_path_rate=0.0), std=0.02).eval()
    model = build_model(name, attention="softmax", drop_path=0.0).eval()
    assert list(model.state_dict()) == list(oracle.state_dict())
    model.load_state_dict(oracle.state_dict())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        difference = (model(x) - oracle(x)).abs().max().item()
        print(f"{name} against {theirs}: maximal difference {difference:.2g}")
        assert difference < 1e-5 and oracle(x).std() > 0.05
        if name.startswith("levit"):
            oracle.distilled_training = True
            for ours, one in zip(model.train()(x), oracle.train()(x), strict=True):
                assert_close(ours, one, atol=1e-4, rtol=1e-4)


def test_distilled_deit_equals_timm():
    """Second token and head: order cls, dist, patches; a pair in training, its mean in eval."""
    timm = pytest.importorskip("timm")
    oracle = shaken(timm.create_model("deit_tiny_distilled_patch16_224"), std=0.02).eval()
    model = build_model("deit_tiny", "softmax", distilled=True, drop_path=0.0).eval()
    model.load_state_dict(oracle.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert_close(model(x), oracle(x), atol=1e-5, rtol=1e-5)
        head, head_dist = model.train()(x)
        assert_close((head + head_dist) / 2, model.eval()(x))


@pytest.mark.parametrize("attention_name", sorted(models.ATTENTIONS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_trains_in_every_family(family, attention_name):
    """Forward, finite gradients for every parameter, an exact state-dict round trip and a faithful deepcopy."""
    model = tiny(family, attention_name).train()
    out = model(torch.randn(3, 3, 64, 64))
    sum(o.square().sum() for o in (out if isinstance(out, tuple) else [out])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval()
    other = tiny(family, attention_name)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(other(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("attention_name", ["castling", "softmax"])
@pytest.mark.parametrize("family", FAMILIES)
@given(size=st.tuples(st.integers(1, 100), st.integers(1, 100)), built=st.sampled_from([16, 64, (48, 80)]))
@settings(max_examples=15)
def test_any_image_size(family, attention_name, size, built):
    """Models run at any height and width, whatever size they were built for; a batch equals its images one by one."""
    model = tiny(family, attention_name, image_size=built)
    x = randn(2, 3, *size, dtype=torch.float32)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 5) and y.isfinite().all()
        assert_close(torch.cat([model(x[:1]), model(x[1:])]), y, atol=1e-4, rtol=1e-4)


def oracle_head(core, q, k, v):
    """Castling attention of one head, all (N, D): Eq. (9) with an explicit (N, N) matrix."""
    y = (0.5 * torch.eye(len(q), dtype=q.dtype) + cosines(q, k) / math.pi) @ v
    return y / y.norm(dim=-1, keepdim=True)


def oracle_pool(x, grid, conv, norm):
    """(N, D) of one head through its 3x3 convolution and norm."""
    x = conv(x.T.unflatten(1, grid)[None])
    return norm(x[0].flatten(1).T), tuple(x.shape[2:])


def oracle_pooled_attention(attn, x, grid, head_major, bias=None):
    """The attention of section 5 and 6 of the architecture, head by head, for one image of (N, C)."""
    qkv, outputs = attn.qkv(x[None])[0], []
    for head in range(attn.heads):
        D = attn.norm_q.normalized_shape[0]
        if head_major:  # LeViT: (H, q|k|v)
            q, k, v = qkv[:, head * 3 * D : (head + 1) * 3 * D].split(D, dim=1)
        else:  # MViTv2: (q|k|v, H)
            q, k, v = (qkv[:, (i * attn.heads + head) * D :][:, :D] for i in range(3))
        q, out_grid = oracle_pool(q, grid, attn.pool_q, attn.norm_q)
        k, k_grid = oracle_pool(k, grid, attn.pool_k, attn.norm_k)
        v, _ = oracle_pool(v, grid, attn.pool_v, attn.norm_v)
        if attn.kernel == "softmax":
            logits = q @ k.T / math.sqrt(D)
            y = (logits + (0 if bias is None else bias(head, q, out_grid, k_grid))).softmax(-1) @ v
        else:
            kernel = attn.dconv.weight[head, 0, :, 0]
            padded = F.pad(v, (0, 0, 4, 4))
            y = oracle_head(attn, q, k, v) + sum(kernel[t] * padded[t : t + len(v)] for t in range(9))
        outputs.append(y + q)
    return attn.proj(torch.cat(outputs, dim=1)[None])[0], out_grid


@pytest.mark.parametrize("downsample", [True, False])
def test_castling_levit_is_what_section_5_says(downsample):
    """Stem, stage and down-sampling blocks written out for one image: head-major qkv, pooled q, k, v, Eq. (9), + q,
    Hardswish before proj, DWConv before the MLP's Hardswish, the linear way round attention at full resolution and then
    subsampled, softmax with offset biases in C1's down-sampling."""
    model = castle(tiny("levit", image_size=80, castle_downsample=downsample)).double()
    image = randn(1, 3, 80, 80)

    def mlp(m, x, grid):
        y = m.ln1(x[None])[0]
        if m.dwconv is not None:
            maps = F.conv2d(y.T.unflatten(1, grid)[None], m.dwconv.weight, padding=2, groups=y.shape[1])
            y = maps[0].flatten(1).T
        return m.ln2(F.hardswish(y)[None])[0]

    def offsets(attn):
        def bias(head, q, q_grid, k_grid):
            table = attn.attention_biases[head]
            return torch.stack([
                torch.stack([table[abs(2 * i - y) * k_grid[1] + abs(2 * j - x)]
                             for y in range(k_grid[0]) for x in range(k_grid[1])])
                for i in range(q_grid[0]) for j in range(q_grid[1])
            ])  # fmt: skip
        return bias

    x = model.stem(image)[0]
    grid, x = tuple(x.shape[1:]), x.flatten(1).T
    for stage in model.stages:
        if stage.downsample is not None:
            d = stage.downsample
            bias = None if downsample else offsets(d.attn_downsample)
            y, out_grid = oracle_pooled_attention(d.attn_downsample, x, grid, True, bias)
            skip = d.skip(x[None])[0].unflatten(0, grid)[::2, ::2].flatten(0, 1)
            x, grid = y + skip, out_grid
            x = x + mlp(d.mlp, x, grid)
        for block in stage.blocks:
            x = x + oracle_pooled_attention(block.attn, x, grid, True)[0]
            x = x + mlp(block.mlp, x, grid)
    assert_close(model(image), model.head(x.mean(0)[None]))


@pytest.mark.parametrize("downsample", [True, False])
def test_castling_mvit_is_what_section_6_says(downsample):
    """The same for MViTv2: (3, H, D) qkv, no pooling of k and v at stride 1, the max-pooled linear way round of the
    normed input, decomposed relative positions of the unscaled query in C1's down-sampling blocks."""
    model = castle(tiny("mvit", image_size=(28, 20), castle_downsample=downsample)).double()
    image = randn(1, 3, 28, 20)

    def relative(attn):
        def bias(head, q, q_grid, k_grid):
            rows = [[[attn.rel_pos_h[i - y + k_grid[0] - 1] @ q[i * q_grid[1] + j] +
                      attn.rel_pos_w[j - x + k_grid[1] - 1] @ q[i * q_grid[1] + j]
                      for y in range(k_grid[0]) for x in range(k_grid[1])]] for i in range(q_grid[0])
                    for j in range(q_grid[1])]  # fmt: skip
            return torch.stack([torch.stack(row[0]) for row in rows])
        return bias

    x = model.patch_embed(image)[0]
    grid, x = tuple(x.shape[1:]), x.flatten(1).T
    for stage in model.stages:
        for block in stage["blocks"]:
            normed = block.norm1(x)
            bias = relative(block.attn) if block.attn.kernel == "softmax" else None
            y, out_grid = oracle_pooled_attention(block.attn, normed, grid, False, bias)
            if block.shortcut_proj_attn is not None:
                x = block.shortcut_proj_attn(normed)
            if block.stride == 2:
                x = F.max_pool2d(x.T.unflatten(1, grid)[None], 3, 2, 1)[0].flatten(1).T
            x, grid = x + y, out_grid
            y = block.mlp.fc1(block.norm2(x))
            if block.mlp.dwconv is not None:
                maps = F.conv2d(y.T.unflatten(1, grid)[None], block.mlp.dwconv.weight, padding=2, groups=y.shape[1])
                y = maps[0].flatten(1).T
            x = x + block.mlp.fc2(F.gelu(y))
    assert_close(model(image), model.head(model.norm(x).mean(0)[None]))


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


def test_stochastic_depth_rates():
    """DeiT's and MViTv2's rise linearly from 0 to the given rate, LeViT's is the same in every block."""
    deit = build_model("deit_tiny", **(TINY_DEIT | dict(depth=5)), drop_path=0.2)
    assert [block.drop_path.p for block in deit.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    mvit = build_model("mvitv2_tiny", **TINY_MVIT, drop_path=0.3)
    assert [b.drop_path.p for s in mvit.stages for b in s["blocks"]] == pytest.approx([0, 0.1, 0.2, 0.3])
    levit = build_model("levit384", **TINY_LEVIT)
    assert {b.drop_path.p for s in levit.stages for b in s.blocks} == {0.1}


def test_core_options_reach_every_core():
    """epsilon, schedule, dconv and dropout arrive in each attention core, C1's softmax ones included."""
    for family in FAMILIES:
        model = tiny(family, epsilon=0.3, schedule="fixed", dconv=5, dropout=0.1, castle_downsample=False)
        for core in attention.cores(model).values():
            assert (core.epsilon, core.schedule, core.dropout) == (0.3, "fixed", 0.1)
            assert core.dconv is None or core.dconv.weight.shape[2] == 5
    block = LinearAngularAttention(8, 2, attn_drop=0.1, proj_drop=0.2, res_kernel_size=5, epsilon=0.4)
    assert (block.dropout, block.proj_drop.p, block.dconv.weight.shape[2], block.epsilon) == (0.1, 0.2, 5, 0.4)
    x = randn(1, 4, 8, dtype=torch.float32)
    assert not torch.equal(block.train()(x), block(x)) and torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_exempt_parameters_exist(family):
    """Position embeddings, tokens and bias tables carry no weight decay; LCNet and ESNet have none."""
    model = tiny(family, "softmax", **(dict(distilled=True) if family == "deit" else {}))
    names = {name for name, _ in model.named_parameters()}
    wanted = {n for n in names if n.rsplit(".", 1)[-1] in (
        "cls_token", "dist_token", "pos_embed", "attention_biases", "rel_pos_h", "rel_pos_w",
    )}  # fmt: skip
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    assert bool(wanted) == (family not in ("lcnet", "esnet")) and exempt & names == wanted


def test_relative_rows_equal_a_loop():
    """MViTv2's relative positions: the longer axis in unit steps, the shorter in steps of the ratio."""
    for queries, keys in ((7, 7), (8, 4), (4, 8), (1, 3)):
        table = randn(2 * max(queries, keys) - 1, 3)
        rows = models.relative_rows(table, queries, keys)
        for i in range(queries):
            for j in range(keys):
                q, k = i * max(1, keys // queries), j * max(1, queries // keys)
                assert torch.equal(rows[i, j], table[q - k + (keys - 1) * max(1, queries // keys)])
    assert_close(models.relative_rows(torch.ones(5, 2), 4, 4), torch.ones(4, 4, 2))


def test_c1_keeps_softmax_in_downsampling_only():
    """D5: `castle_downsample=False` leaves LeViT's softmax, with its bias table, in the two down-sampling blocks."""
    kinds = {name: core.kernel for name, core in attention.cores(tiny("levit", castle_downsample=False)).items()}
    assert {name for name, kernel in kinds.items() if kernel == "softmax"} == {
        "stages.1.downsample.attn_downsample", "stages.2.downsample.attn_downsample",
    }  # fmt: skip
    assert set(kinds.values()) == {"softmax", "linear_angular"}
    assert {core.kernel for core in attention.cores(tiny("levit")).values()} == {"linear_angular"}
    assert len(mask_density(tiny("levit", castle_downsample=False))) == 3 and len(mask_density(tiny("levit"))) == 5
    assert len(mask_density(tiny("mvit", castle_downsample=False))) == 2 and len(mask_density(tiny("mvit"))) == 4


@given(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.sampled_from([1, 2]))
def test_offset_bias_equals_a_loop(grid, stride):
    """LeViT: query (i, j) of the strided grid and key (y, x) share entry |stride i - y| * columns + |stride j - x|."""
    Y, X = grid
    table = randn(2, Y * X)
    bias = models.offset_bias(table, grid, grid, stride)
    queries = [(i, j) for i in range(0, Y, stride) for j in range(0, X, stride)]
    expected = torch.stack([
        torch.stack([table[:, abs(i - y) * X + abs(j - x)] for y in range(Y) for x in range(X)], -1) for i, j in queries
    ], -2)  # fmt: skip
    assert torch.equal(bias, expected)


def test_resized_bias_keeps_the_zero_offset():
    """A table made for one grid serves another: offset 0 keeps its entry, a constant table stays constant."""
    table = randn(3, 7 * 5)
    assert_close(models.offset_bias(table, (7, 5), (4, 9), 1)[:, 0, 0], table[:, 0])
    assert_close(models.offset_bias(torch.ones(3, 35), (7, 5), (4, 9), 2), torch.ones(3, 10, 36))


def test_resized_positions():
    """Position embeddings keep their own grid bit for bit; for another they are resampled as a map, y before x."""
    table = randn(1, 12, 4)
    assert torch.equal(models.resize_positions(table, (3, 4), (3, 4)), table)
    maps = table.mT.unflatten(2, (3, 4))
    expected = F.interpolate(maps, size=(5, 2), mode="bicubic", align_corners=False).flatten(2).mT
    assert_close(models.resize_positions(table, (3, 4), (5, 2)).double(), expected, atol=1e-5, rtol=1e-5)


def test_mlp_convolution_starts_as_the_identity():
    """D7: a fresh MLP DWConv passes its tokens through; otherwise it is the 2-D convolution of the token map."""
    conv = models.MlpDWConv(6, 5)
    x = randn(2, 12, 6, dtype=torch.float32)
    assert_close(conv(x, (3, 4)), x)
    nn.init.normal_(conv.weight)
    expected = F.conv2d(x.mT.unflatten(2, (3, 4)), conv.weight, padding=2, groups=6).flatten(2).mT
    assert_close(conv(x, (3, 4)), expected)


@pytest.mark.parametrize("conv", [0, 3])
def test_mlp_passes_prefix_tokens_by_and_may_take_parts_of_the_batch(conv, monkeypatch):
    """D6: prefix tokens see the two linear layers only, patches their neighbours too; how many images inference takes
    at a time changes nothing, and every form is that of one image alone."""
    mlp = shaken(models.Mlp(6, 8, conv))
    x = randn(5, 2 + 12, 6, dtype=torch.float32)
    y = mlp(x, (3, 4))
    assert_close(y[:, :2], mlp.fc2(F.gelu(mlp.fc1(x[:, :2]))))
    assert torch.allclose(y[:, 2:], mlp.fc2(F.gelu(mlp.fc1(x[:, 2:]))), atol=1e-5) == (conv == 0)
    for size in (1, 2 * 4 * 14 * 8, models.HIDDEN_BYTES):
        monkeypatch.setattr(models, "HIDDEN_BYTES", size)
        with torch.no_grad():
            assert_close(mlp.eval()(x, (3, 4)), y)


def test_mlp_in_training_takes_the_batch_whole():
    """BatchNorm sees the batch in training, without gradients too (update_bn); a trace has no parts to count."""
    mlp, x = models.Mlp(6, 2**16, 3, conv_norm=True), randn(4, 12, 6, dtype=torch.float32)
    expected = mlp.dwconv.norm(F.conv2d(mlp.fc1(x).mT.unflatten(2, (3, 4)), mlp.dwconv.weight, padding=1, groups=2**16))
    mlp.dwconv.norm.reset_running_stats()
    with torch.no_grad():
        assert_close(mlp(x, (3, 4)), mlp.fc2(F.gelu(expected.flatten(2).mT)), atol=1e-4, rtol=1e-4)
    assert mlp.dwconv.norm.num_batches_tracked == 1
    mlp.eval().requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: mlp(x, (3, 4)), x)
        assert_close(traced(x[:1]), mlp(x[:1], (3, 4)))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_small_maps_need_fewer_taps(kernel, stride):
    """On maps of 1 x 1 to 6 x 6 tokens the convolution and its gradients are those of all taps, of which
    no more are computed than can touch the map: 1 x 1 takes a multiplication."""
    ours = models.TokenConv(3, kernel, stride, bias=True).double()
    for y, x in itertools.product(range(1, 7), repeat=2):
        tokens = randn(2, 3, y, x, seed=6 * y + x).requires_grad_()
        leaves = (tokens, ours.weight, ours.bias)
        whole = F.conv2d(tokens, ours.weight, ours.bias, stride, kernel // 2, groups=3)
        with FlopCounterMode(display=False) as counter:
            found = ours(tokens)
        assert_close(found, whole, atol=1e-13, rtol=0)
        weights = randn(*whole.shape, seed=1)
        grads = (torch.autograd.grad(out, leaves, weights) for out in (found, whole))
        for own, expected in zip(*grads, strict=True):
            assert_close(own, expected, atol=1e-12, rtol=0)
        taps = counter.get_total_flops() / 2 / whole.numel()
        reach = kernel // 2
        cropped = math.prod(2 * min(reach, side - 1) + 1 for side in (y, x))
        assert taps == (kernel**2 if min(y, x) > reach else cropped)


def test_head_pool_shares_weights_over_heads():
    """Pooling all heads at once equals pooling each alone; stride 2 takes 5 x 4 to 3 x 2."""
    conv, norm = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False), shaken(nn.LayerNorm(4))
    x = randn(2, 3, 20, 4, dtype=torch.float32)
    y, grid = models.pool_heads(x, (5, 4), conv, norm)
    assert grid == (3, 2) and y.shape == (2, 3, 6, 4)
    for head in range(3):
        pooled = conv(x[:, head].mT.unflatten(2, (5, 4)))
        assert_close(y[:, head], norm(pooled.flatten(2).mT))


@pytest.mark.parametrize(("family", "attention_name"), [
    *((family, "castling") for family in FAMILIES), ("levit", "softmax"), ("deit", "softmax"),
])  # fmt: skip
def test_models_compile_without_graph_breaks(family, attention_name):
    """torch.compile(fullgraph=True) gives the eager output: castling models in training, published ones in eval."""
    model = tiny(family, attention_name, drop_path=0.0).train(attention_name == "castling")
    x, twin = randn(2, 3, 64, 64, dtype=torch.float32), copy.deepcopy(model)
    torch._dynamo.reset()
    outputs = torch.compile(model, fullgraph=True, backend="eager")(x), twin(x)
    for ours, expected in zip(*((o if isinstance(o, tuple) else (o,)) for o in outputs), strict=True):
        assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_castles_bit_for_bit(family):
    """Once the threshold is 1 a model equals its castled self exactly, train and eval; before, it does not."""
    model = tiny(family, drop_path=0.0, image_size=96)
    x = 3 * randn(2, 3, 96, 96, dtype=torch.float32)
    with torch.no_grad():
        for core in attention.cores(model).values():  # logits far enough apart for masks that hold something
            next(core.qkv.parameters()).mul_(5)
    set_threshold(model, 0.0)
    castled = castle(copy.deepcopy(model))
    assert not torch.equal(model(x), castled(x)) and max(mask_density(model).values()) > 0
    set_threshold(model, 1.0)
    assert torch.equal(model(x), castled(x)) and torch.equal(model.train()(x), castled.train()(x))


def test_names_and_options_are_checked():
    """Unknown names and options, and impossible ones, are ValueErrors that name what is known."""
    tables = (models.DEIT, models.LEVIT, models.MVITV2, models.VIT_DENSE, models.LCNET, models.ESNET)
    assert set(list_models()) == {name for table in tables for name in table}
    cases = [
        (dict(name="levit_128"), "levit128"),
        (dict(name="deit_tiny", attention="softmx"), "softmax"),
        (dict(name="deit_tiny", depht=3), "depth"),
        (dict(name="deit_tiny", num_classes=0), "num_classes"),
        (dict(name="deit_tiny", image_size=0), "image size"),
        (dict(name="deit_tiny", image_size=(1, 2, 3)), "image size"),
        (dict(name="deit_tiny", image_size=None), "image size"),
        (dict(name="deit_tiny", image_size=224.0), "image size"),
        (dict(name="deit_tiny", mlp_dwconv=4), "mlp_dwconv"),
        (dict(name="deit_tiny", core={}), "core"),
        (dict(name="levit128", heads=(4, 8)), "heads"),
        (dict(name="deit_tiny", attention="softmax", auxiliary=True), "auxiliary"),
        (dict(name="deit_tiny", dim=10), "heads"),
        (dict(name="vit_base_dense", heads=0), "heads"),
        (dict(name="mvitv2_tiny", heads=5), "heads"),
        (dict(name="lcnet_vit_s", heads=(7, 16)), "heads"),
        (dict(name="esnet_vit_s", heads=0), "heads"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            build_model(**options)
    assert mask_density(build_model("deit_tiny", "cosine", auxiliary=True, **TINY_DEIT)).keys() == {
        "blocks.0.attn", "blocks.1.attn",
    }  # fmt: skip


def test_convert_is_loaded_by_models_only_when_asked():
    """models.py needs nothing of convert.py, and still has its four functions for those who look for them there."""
    names = ("load_pretrained", "convert", "fuse", "export")
    code = f"""import sys, models
assert "convert" not in sys.modules and not hasattr(models, "no_such_name") and "convert" not in sys.modules
from models import {", ".join(names)}
assert {names[0]} is sys.modules["convert"].load_pretrained"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert all(getattr(models, name) is getattr(convert, name) for name in names)


# ---- convert.py: checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda w: w,
    lambda w: {"model": w},
    lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}},
    lambda w: {"model": {k: v * 0 for k, v in w.items()}, "ema": {f"_orig_mod.module.{k}": v for k, v in w.items()}},
])  # fmt: skip
def test_checkpoints_load_from_every_container(tmp_path, wrap):
    """Bare, {"model"}, {"state_dict"}, with prefixes of DDP and torch.compile; averaged weights are preferred."""
    model, other = tiny("deit"), build_model("deit_tiny", num_classes=5, image_size=64, **TINY_DEIT)
    torch.save(wrap(model.state_dict()), tmp_path / "x.pt")
    load_pretrained(other, tmp_path / "x.pt")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def numbered_norm(*parts):
    return [f"{'.'.join(parts)}.{leaf}" for leaf in (
        "c.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
    )]  # fmt: skip


def official_levit(model):
    """A published LeViT's state dict under its authors' names, in their order, index buffers included."""
    names, i = [], 0
    for conv in (0, 2, 4, 6):
        names += numbered_norm("patch_embed", str(conv))
    for stage, depth in enumerate(len(stage.blocks) for stage in model.stages):
        if stage:
            names += [f"blocks.{i}.attention_biases"]
            names += [n for part in ("kv", "q.1", "proj.1") for n in numbered_norm("blocks", str(i), part)]
            names += [n for part in ("0", "2") for n in numbered_norm("blocks", str(i + 1), "m", part)]
            i += 2
        for _ in range(depth):
            names += [f"blocks.{i}.m.attention_biases"]
            names += [n for part in ("qkv", "proj.1") for n in numbered_norm("blocks", str(i), "m", part)]
            names += [n for part in ("0", "2") for n in numbered_norm("blocks", str(i + 1), "m", part)]
            i += 2
    for head in ("head", "head_dist"):
        names += [n for n in numbered_norm(head) if ".c." not in n] + [f"{head}.l.weight", f"{head}.l.bias"]
    weights = dict(zip(names, model.state_dict().values(), strict=True))
    tables = [name for name in names if name.endswith("attention_biases")]
    return {"model": weights | {name[:-2] + "_idxs": torch.zeros(2, 2, dtype=torch.long) for name in tables}}


def official_mvit(model):
    """A published MViTv2's state dict under its authors' names."""
    weights, i = {}, 0
    flat = {}
    for stage, blocks in enumerate(model.stages):
        for block in range(len(blocks["blocks"])):
            flat[f"stages.{stage}.blocks.{block}."], i = f"blocks.{i}.", i + 1
    for name, value in model.state_dict().items():
        for place, number in flat.items():
            name = name.replace(place, number) if name.startswith(place) else name
        weights[name.replace("shortcut_proj_attn", "proj").replace("head.fc", "head.projection")] = value
    return {"model_state": weights, "epoch": 3}


def official(family, model):
    return {"levit": official_levit, "mvit": official_mvit}.get(family, lambda m: {"model": m.state_dict()})(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_official_files_load_into_softmax_models(tmp_path, family):
    """The released containers and names give the same logits; nothing is new."""
    published, model = tiny(family, "softmax"), tiny(family, "softmax", seed=1)
    torch.save(official(family, published), tmp_path / "official.pth")
    report = load_pretrained(model, tmp_path / "official.pth")
    x = randn(2, 3, 64, 64, dtype=torch.float32)
    assert torch.equal(model(x), published(x)) and not report.new and not report.resized and not report.partly
    assert len(report.loaded) == len(model.state_dict())
    assert all("attention_bias_idxs" in name for name in report.ignored)


@pytest.mark.parametrize("family", FAMILIES)
def test_castling_models_take_over_what_carries_over(tmp_path, family):
    """Each tensor of a castling model is either the file's, or named as new; LeViT's values keep their rows, head by
    head; what the model cannot use is listed."""
    published, model = tiny(family, "softmax"), tiny(family, seed=1)
    before = copy.deepcopy(model.state_dict())
    torch.save(official(family, published), tmp_path / "official.pth")
    report = load_pretrained(model, tmp_path / "official.pth")
    source = published.state_dict()
    for name, value in castle(model).state_dict().items():
        if name in report.loaded:
            assert torch.equal(value, source[name])
        elif name in report.new:
            assert torch.equal(value, before[name])
            assert re.search(r"dconv|dwconv|pool_|norm_[qkv]|skip|num_batches_tracked", name)
        else:
            assert name in report.partly and family == "levit"
    assert any("dconv" in name for name in report.new) and "dconv" in str(report)
    if family == "levit":
        attn, theirs = model.stages[0].blocks[0].attn, published.stages[0].blocks[0].attn
        D = TINY_LEVIT["key_dim"]
        ours = attn.qkv.linear.weight.unflatten(0, (attn.heads, 6 * D))[:, 4 * D :]
        assert torch.equal(ours, theirs.qkv.linear.weight.unflatten(0, (attn.heads, 4 * D))[:, 2 * D :])
        down, theirs = (m.stages[1].downsample.attn_downsample for m in (model, published))
        ours = down.qkv.bn.running_var.unflatten(0, (down.heads, 12 * D))[:, 8 * D :]
        assert torch.equal(ours, theirs.kv.bn.running_var.unflatten(0, (down.heads, 5 * D))[:, D:])
    if family == "deit":
        assert report.ignored == []


@pytest.mark.parametrize("family", ["levit", "deit", "mvit"])
def test_tables_are_resized_on_loading(tmp_path, family):
    """A file made at 64 pixels loads into a model made for 96: tables are resized, and at 64 pixels, where they are
    resampled back, the logits stay close; a second loading of the resized model changes no bit."""
    small, large = tiny(family, "softmax"), tiny(family, "softmax", image_size=96, seed=1)
    torch.save(official(family, small), tmp_path / "x.pth")
    report = load_pretrained(large, tmp_path / "x.pth")
    assert report.resized and all(re.search("pos_embed|attention_biases|rel_pos", name) for name in report.resized)
    same = tiny(family, "softmax", image_size=96, seed=2)
    torch.save(large.state_dict(), tmp_path / "y.pth")
    assert not load_pretrained(same, tmp_path / "y.pth").resized
    x = randn(1, 3, 96, 96, dtype=torch.float32)
    assert torch.equal(same(x), large(x))


def test_official_files_evaluate_and_start_runs(tmp_path, photos, capsys):
    """--eval and --image take a released file with --model and --attention softmax, and refuse to judge a castling
    model by one; --checkpoint starts a castling run from it and says what carried over."""
    model = shaken(build_model("levit128", "softmax", num_classes=2, image_size=32))
    torch.save(official_levit(model), tmp_path / "levit.pth")
    common = ["--model=levit128", "--image-size=32", f"--checkpoint={tmp_path}/levit.pth", "--workers=0"]
    train.main(train.parser().parse_args([*common, "--attention=softmax", "--eval", f"--data={photos}"]))
    assert json.loads(capsys.readouterr().out)["test_acc1"] >= 0
    train.main(train.parser().parse_args([*common, "--attention=softmax", f"--image={photos}/test/dark/0.jpg"]))
    assert "class 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        train.main(train.parser().parse_args([*common, "--eval", f"--data={photos}"]))
    assert stopped.value.code == 2 and "--attention softmax" in capsys.readouterr().err
    run = ["--max-steps=1", "--batch-size=4", f"--output={tmp_path}/run", f"--data={photos}"]
    train.main(train.parser().parse_args([*common, *run]))
    printed = capsys.readouterr().out
    assert "partly: " in printed and "stages.*.blocks.*.attn.qkv.linear.weight x 12" in printed
    assert "attention_bias_idxs" in printed.split("ignored:")[1]


@pytest.mark.parametrize(("name", "official_macs"), [
    ("levit128", 406.11), ("levit192", 657.60), ("levit256", 1128.02), ("levit384", 2352.94),
])  # fmt: skip
def test_published_levit_macs(name, official_macs):
    """LeViT's own counter adds one MAC per softmax entry; with that the published models match its figures, in M."""
    model, image = flops.meta_model(name, "softmax")
    heads, D = models.LEVIT[name]["heads"], models.LEVIT[name]["key_dim"]
    down = [dim // D for dim in models.LEVIT[name]["dims"]]
    entries = sum(4 * h * n**2 for h, n in zip(heads, (196, 49, 16), strict=True))
    entries += down[0] * 49 * 196 + down[1] * 16 * 49
    assert (flops.count(model, image).macs + entries) / 1e6 == pytest.approx(official_macs, abs=0.006)


def test_distilled_and_mae_files_load(tmp_path):
    """A distilled DeiT loads into a plain one (token and head dropped) and back (both new); an MAE encoder has no head,
    and its decoder is ignored."""
    plain, distilled = tiny("deit", "softmax"), tiny("deit", "softmax", distilled=True, seed=1)
    torch.save({"model": distilled.state_dict()}, tmp_path / "distilled.pth")
    report = load_pretrained(plain, tmp_path / "distilled.pth")
    assert report.resized == ["pos_embed"] and set(report.ignored) == {
        "dist_token", "head_dist.weight", "head_dist.bias",
    }  # fmt: skip
    assert torch.equal(plain.pos_embed[:, 0], distilled.pos_embed[:, 0])
    assert torch.equal(plain.pos_embed[:, 1:], distilled.pos_embed[:, 2:])
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    report = load_pretrained(distilled, tmp_path / "plain.pth")
    assert set(report.new) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    encoder = {name: value for name, value in plain.state_dict().items() if not name.startswith("head")}
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    for extra in ({}, decoder):  # the released encoders, and those with their decoder
        torch.save({"model": encoder | extra}, tmp_path / "mae.pth")
        report = load_pretrained(tiny("deit"), tmp_path / "mae.pth")
        assert {"head.weight", "head.bias"} <= set(report.new) and report.ignored == list(extra)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_bad_checkpoints_are_named(tmp_path):
    """Missing, truncated, foreign, wrong-class and wrong-model files, and weights that are no finite
    real numbers, are ValueErrors naming the file; nothing is half loaded, no code in a pickle runs.
    """
    model = tiny("deit")
    before = copy.deepcopy(model.state_dict())
    good = tmp_path / "good.pt"
    torch.save(model.state_dict(), good)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:1000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "flipped.pt").write_bytes(good.read_bytes().replace(b"storage", b"st\xffrage"))
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pt")
    torch.save(model.state_dict() | {"head.weight": 3}, tmp_path / "odd.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": Malicious(tmp_path / "owned")}, tmp_path / "evil.pt")
    torch.save(tiny("levit").state_dict(), tmp_path / "levit.pt")
    torch.save(build_model("deit_tiny", num_classes=7, image_size=64, **TINY_DEIT).state_dict(), tmp_path / "seven.pt")
    cases = dict(none="none", cut="cut", empty="empty", text="text", list="list", evil="evil",
                 levit="missing cls_token", numbered="by name", odd="head.weight is no tensor", flipped="damaged",
                 seven="7 classes in the file, 5 in the model")  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            load_pretrained(model, tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(error.value)
    head = model.state_dict()["head.weight"]
    nan = head.clone()
    nan[0, 0] = math.nan
    quantised = torch.quantize_per_tensor(head, 0.1, 0, torch.qint8)
    for wrong, message in (
        (nan, "holds nan or inf"), (nan.to(torch.float8_e4m3fn), "holds nan or inf"),
        (head.to(torch.complex64), "complex64"), (head.long(), "int64"), (head > 0, "bool"),
        (head.to_sparse(), "sparse"), (head.to("meta"), "meta"), (quantised, "quantised"),
    ):  # fmt: skip
        torch.save({"model": model.state_dict() | {"head.weight": wrong}}, tmp_path / "kind.pt")
        with pytest.raises(ValueError, match=message) as error:
            load_pretrained(model, tmp_path / "kind.pt")
        assert "kind.pt" in str(error.value) and "head.weight" in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for family, kind in (("deit", "pos_embed"), ("levit", "attention_biases"), ("mvit", "rel_pos_h")):
        model = tiny(family, "softmax")
        name, table = next((name, x) for name, x in model.state_dict().items() if name.endswith(kind))
        for wrong in (table[:0], table[:, :0], torch.cat([table, table])[:, 1:]):
            torch.save(model.state_dict() | {name: wrong}, tmp_path / "table.pt")
            with pytest.raises(ValueError, match=rf"table.pt .*{name} is {re.escape(str(tuple(wrong.shape)))}"):
                load_pretrained(model, tmp_path / "table.pt")


# ---- models.py: detection backbones ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "oracle"), [("lcnet_s", "lcnet_075"), ("lcnet_m", "lcnet_150")])
def test_lcnet_is_timms(name, oracle):
    """timm's LCNet loads as it is, name by name: equal feature maps of strides 8, 16, 32, and equal logits."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = shaken(timm.create_model(oracle, num_classes=7)).eval()
    model, x = build_model(name, num_classes=7).eval(), randn(2, 3, 97, 130, dtype=torch.float32)
    model.load_state_dict(reference.state_dict())
    features = timm.create_model(oracle, features_only=True, out_indices=(2, 3, 4)).eval()
    features.load_state_dict(reference.state_dict(), strict=False)
    with torch.no_grad():
        assert_close(model(x), reference(x), rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(model.features(x), features(x), strict=True):
            assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_squeeze_excitation_is_torchvisions():
    """The gate is hard: 0..1, not 0..6 as in one public port."""
    from torchvision.ops import SqueezeExcitation

    ours, theirs = models.SqueezeExcitation(16), SqueezeExcitation(16, 4, scale_activation=nn.Hardsigmoid)
    shaken(ours, std=3.0)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = randn(2, 16, 5, 3, dtype=torch.float32)
    assert_close(ours(x), theirs(x))


def test_shuffle_alternates_the_halves():
    """ESNet's stride-1 block: output channels 0, 2, 4, ... are the untouched first half, 1, 3, 5, ... the computed."""
    block, x = shaken(models.ESBlock(8, 8)).eval(), randn(1, 8, 4, 6, dtype=torch.float32)
    y = block(x)
    assert torch.equal(y[:, ::2], x[:, :4])
    assert not torch.equal(y[:, 1::2], x[:, 4:])


def test_map_block_equals_timms_pooled_attention():
    """The softmax T-block's attention is MViTv2's without relative positions, residual pooling included."""
    mvitv2 = pytest.importorskip("timm.models.mvitv2")
    block = shaken(models.MapBlock(24, 3, 0, 0.0, models.ATTENTIONS["softmax"])).eval()
    reference = mvitv2.MultiScaleAttention(
        24, 24, (5, 4), num_heads=3, mode="conv", kernel_q=(3, 3), kernel_kv=(3, 3), has_cls_token=False,
        rel_pos_type="none", residual_pooling=True, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    reference.load_state_dict(block.attn.state_dict())
    x = randn(2, 20, 24, dtype=torch.float32)
    assert_close(block.attn(x, (5, 4))[0], reference(x, (5, 4))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lcnet_s", "lcnet_vit_s", "esnet_s", "esnet_vit_s"])
def test_feature_maps(name):
    """Without num_classes, C3, C4, C5 of strides 8, 16, 32, each step rounding up; gradients reach every parameter."""
    model = build_model(name).train()
    maps = model(torch.randn(2, 3, 70, 100))
    shapes = [(c, -(-70 // s), -(-100 // s)) for c, s in zip(model.channels, (8, 16, 32), strict=True)]
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_ablation_switches():
    """mlp_dwconv is the MLPs' DWConv and its BatchNorm; dconv=0 is attention without DWConv: y / |y| alone."""
    counts = {key: parameters(build_model("lcnet_vit_s", **options)) for key, options in {
        "both": {}, "no mlp": dict(mlp_dwconv=0), "none": dict(mlp_dwconv=0, dconv=0),
    }.items()}  # fmt: skip
    hidden = 2 * 192 + 2 * 384
    assert counts["both"] - counts["no mlp"] == 25 * hidden + 2 * hidden
    assert counts["no mlp"] - counts["none"] == 9 * 8 + 9 * 16
    core, (q, k, v) = AttentionCore(2, dconv=0), randn(3, 1, 2, 6, 4)
    assert_close(core(q, k, v).norm(dim=-1), torch.ones(1, 2, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="mlp_dwconv must be odd"):
        build_model("lcnet_vit_s", mlp_dwconv=4)


def test_backbone_starts_from_its_classifier(tmp_path):
    """A detector's backbone takes a classifier's file; the classifier is ignored by name, all else must fit."""
    classifier, backbone = build_model("lcnet_vit_s", num_classes=5), build_model("lcnet_vit_s")
    torch.save(classifier.state_dict(), tmp_path / "c.pt")
    report = load_pretrained(backbone, tmp_path / "c.pt")
    assert sorted(report.ignored) == ["classifier.bias", "classifier.weight", "conv_head.bias", "conv_head.weight"]
    assert not report.new and all(torch.equal(v, classifier.state_dict()[k]) for k, v in backbone.state_dict().items())
    with pytest.raises(ValueError, match="conv_stem"):
        load_pretrained(build_model("lcnet_m"), tmp_path / "c.pt")


# ---- convert.py: folding norms, converting other models --------------------------------------------------------------


@pytest.mark.parametrize("build", [*FAMILIES, "detector"])
def test_fusing_changes_nothing_but_the_number_of_layers(build):
    """No BatchNorm is left, outputs are equal up to rounding; twice is once, and norms in training are refused."""
    if build == "detector":
        model = shaken(castle(detect.build_detector("esnet_vit_s", num_classes=5))).eval()
    else:
        model = castle(tiny(build))
    x = randn(2, 3, 64, 96, dtype=torch.float32)
    fused = convert.fuse(copy.deepcopy(model))
    assert not any(isinstance(module, convert.BatchNorm) for module in fused.modules())
    assert convert.fuse(fused) is fused
    with torch.no_grad():
        for ours, expected in zip(*(y if isinstance(y, tuple) else (y,) for y in (fused(x), model(x))), strict=True):
            assert_close(ours, expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=0)
    if build not in ("deit", "mvit"):  # they have no BatchNorm
        with pytest.raises(ValueError, match="eval"):
            convert.fuse(model.train())


def test_norms_that_cannot_be_folded_stay():
    """Without a layer before them, or with more to do than a BatchNorm, or after a layer that serves twice, or where
    nobody knows what the forward does."""

    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x) + x)

    shared = nn.Conv2d(3, 3, 1)
    for model in (
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4)),
        nn.Sequential(shared, nn.BatchNorm2d(3), shared, nn.BatchNorm2d(3)),
        Residual(),
    ):
        shaken(model).eval()
        x, before = randn(2, 3, 4, 4, dtype=torch.float32), [type(m) for m in model.modules()]
        y = model(x)
        assert torch.equal(convert.fuse(model)(x), y) and [type(m) for m in model.modules()] == before
    folded = convert.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).eval())
    assert type(folded[1]) is nn.Identity


class OlderAttention(nn.Module):
    """Self-attention as older versions of transformers have it: the output layer is the parent's."""

    def __init__(self, key_dim=24):
        super().__init__()
        self.num_attention_heads, self.dropout = 3, nn.Dropout(0.1)
        self.query, self.key, self.value = nn.Linear(24, key_dim), nn.Linear(24, key_dim), nn.Linear(24, 24)

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        q, k, v = (
            layer(hidden_states).unflatten(2, (3, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),)


class OlderBlock(nn.Sequential):
    def __init__(self):
        super().__init__(OlderAttention(), nn.Linear(24, 24))

    def forward(self, x):
        return self[1](self[0](x, None, False)[0])


def foreign(name):
    """A small model of another library, and an input for it."""
    images, tokens = randn(2, 3, 32, 32, dtype=torch.float32), randn(2, 9, 24, dtype=torch.float32)
    small = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    if name == "torchvision":
        from torchvision.models import VisionTransformer

        return VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5), images
    if name == "torch":  # its other defaults: batch second, heads of another number, no padding
        layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), tokens
    if name == "torch fast path":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True), 2), tokens
    if name == "older transformers":
        return OlderBlock(), tokens
    if name.startswith("timm"):
        timm = pytest.importorskip("timm.models")
        if name == "timm DeiT":
            return timm.deit_tiny_distilled_patch16_224(**small), images
        return timm.VisionTransformer(**small, qk_norm=True, scale_attn_norm=True, reg_tokens=2), images
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8)
    if name == "transformers ViT":
        config = transformers.ViTConfig(**size, intermediate_size=48, attention_probs_dropout_prob=0.1)
        return transformers.ViTForImageClassification(config), images
    return transformers.Dinov2Model(transformers.Dinov2Config(**size)), images


def output_of(model, x):
    """The first tensor that a model gives."""
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y[0]


@pytest.mark.parametrize("name", [
    "torchvision", "torch", "torch fast path", "older transformers", "timm DeiT", "timm norms", "transformers ViT",
    "transformers DINOv2",
])  # fmt: skip
def test_converted_models_are_wired_like_the_original(name, monkeypatch):
    """Threshold 0, without linear part, norm and DWConv: the original's output. As it is, it trains and castles. The
    state dict keeps every name and value and gains the DWConv's."""
    torch.manual_seed(0)
    model, x = foreign(name)
    model = shaken(model).eval()
    converted = copy.deepcopy(model)
    report = convert.convert(converted, epsilon=0.0, schedule="fixed")
    before, after = model.state_dict(), converted.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    added = {f"{layer}.{name}" for layer in report.layers for name in ("dconv.weight", "progress")}
    assert after.keys() - before.keys() == added
    assert report.layers.keys() == attention.cores(converted).keys() and "fine-tune" in str(report)
    assert all(layer.new == ["dconv.weight"] and len(layer.kept) >= 3 for layer in report.layers.values())
    dropout = 0.1 if name in ("older transformers", "transformers ViT") else 0.0
    assert {core.dropout for core in attention.cores(converted).values()} == {dropout}
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(
            AttentionCore, "attend", lambda core, q, k, v, **_: masked_softmax_attention(q, k, v, core.epsilon)[0]
        )
        assert_close(output_of(converted, x), output_of(model, x), atol=1e-5, rtol=1e-5)

    with torch.no_grad():  # eval mode, where torch's own layer would go past our forward
        assert not torch.allclose(output_of(converted, x), output_of(model, x), atol=1e-3)
    optimizer = torch.optim.SGD(converted.train().parameters(), lr=1e-3)
    for progress in (0.0, 0.5):
        set_threshold(converted, progress)
        output_of(converted, x).square().mean().backward()
        optimizer.step()
    assert all(core.dconv.weight.grad.any() for core in attention.cores(converted).values())
    for core in attention.cores(converted).values():
        core.schedule = "ramp"
    set_threshold(converted.eval(), 1.0)
    with torch.no_grad():
        assert torch.equal(output_of(converted, x), output_of(castle(copy.deepcopy(converted)), x))


def test_converted_encoder_leaves_padding_out():
    """src_key_padding_mask: real tokens come out as if the padded ones were not there, in eval mode too."""
    model, x = foreign("torch fast path")
    convert.convert(shaken(model).eval())
    padding = torch.arange(9).expand(2, 9) >= torch.tensor([[9], [6]])
    with torch.no_grad():
        assert_close(model(x, src_key_padding_mask=padding)[1, :6], model(x[1:, :6])[0], atol=1e-5, rtol=1e-5)


def test_converted_layers_refuse_what_they_cannot_honour():
    """Masks of pairs, cross-attention, weights on keys and feature maps are ValueErrors that name them."""
    encoder, x = foreign("torch fast path")
    convert.convert(encoder)
    layer = encoder.layers[0].self_attn
    older, _ = foreign("older transformers")
    convert.convert(older)
    assert older[0](x, output_hidden_states=True, return_dict=True)[1] is None  # asked of the model, passed to all
    for call, message in [
        (lambda: layer(x, x, x, attn_mask=torch.zeros(9, 9)), "attn_mask"),
        (lambda: layer(x, x, x, is_causal=True), "is_causal"),
        (lambda: layer(x, x + 1, x), "self-attention"),
        (lambda: layer(x, x, x, key_padding_mask=torch.full((2, 9), 0.5)), "key_padding_mask"),
        (lambda: older[0](x, torch.ones(3)), "head_mask"),
        (lambda: older[0](x, output_attentions=True), "output_attentions"),
        (lambda: older[0](x, position_embeddings=x), "position_embeddings"),
        (lambda: older[0](x[None]), "axes"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


class Rescaled(OlderAttention):
    scaling = 1.0


class Causal(OlderAttention):
    is_causal = True


class Rotary(OlderAttention):
    def forward(self, hidden_states, position_embeddings=None):
        return super().forward(hidden_states)


class Biased(OlderAttention):
    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(5, 3))


class OverChannels(nn.Module):
    """Has the layers, but attends from channel to channel."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(v @ (k.mT @ q).softmax(-1))


class Flat(OverChannels):
    def forward(self, x):
        batch, height, width, channels = x.shape
        return x


class Headless(OverChannels):
    def __init__(self):
        super().__init__()
        del self.num_heads


class Bare(OlderAttention):
    def forward(self, hidden_states):
        return super().forward(hidden_states)[0]


class PooledAttentions(nn.Linear):
    """An attention by name only."""


@pytest.mark.parametrize(("model", "message"), [
    (lambda: nn.Sequential(OlderAttention(), Biased(), Biased()),
     r"Sequential\n1, 2 \(Biased\): linear-angular attention has no place for relative_position_bias_table"),
    (lambda: nn.Sequential(Rescaled()), r"0 \(Rescaled\).*1 / sqrt\(8\)"),
    (lambda: nn.Sequential(Causal()), r"0 \(Causal\).*causal"),
    (lambda: nn.Sequential(Rotary()), r"0 \(Rotary\).*position_embeddings"),
    (lambda: nn.Sequential(OlderAttention(key_dim=12)), r"\[12, 12, 24\] channels"),
    (lambda: nn.Sequential(OlderAttention(), PooledAttentions(2, 2)), r"1 \(PooledAttentions\).*layout"),
    (lambda: nn.Sequential(OverChannels()), r"0 \(OverChannels\).*something else than softmax"),
    (lambda: nn.Sequential(Flat()), r"0 \(Flat\).*tokens \(B, N, C\) alone"),
    (lambda: nn.Sequential(Headless()), r"0 \(Headless\).*num_heads"),
    (lambda: nn.Sequential(Bare()), r"0 \(Bare\).*returns a Tensor"),
    (lambda: nn.ModuleDict(dict(one=OlderAttention(), attn=nn.Bilinear(2, 2, 2))), r"attn \(Bilinear\).*layout"),
    (lambda: nn.Transformer(24, 2, 1, 1, 24, batch_first=True), "decoder.layers.0.multihead_attn.*another sequence"),
    (lambda: nn.Sequential(nn.MultiheadAttention(24, 2, add_bias_kv=True, add_zero_attn=True)), "add_zero.*bias_k"),
    (lambda: nn.MultiheadAttention(24, 2), "put it into a module"),
    (lambda: nn.Linear(2, 2), "Linear has no self-attention.*looked for"),
    (lambda: tiny("deit"), "already"),
])  # fmt: skip
def test_models_that_cannot_be_converted_are_named_and_unchanged(model, message):
    """All offending layers by name with the reason; not one layer has been changed."""
    model = model()
    layers = [*map(type, model.modules())]
    with pytest.raises(ValueError, match=message):
        convert.convert(model)
    assert [*map(type, model.modules())] == layers


# ---- convert.py: export ----------------------------------------------------------------------------------------------


def deployed(name):
    """What --export writes of a small model."""
    if name == "detector":
        torch.manual_seed(0)
        return detect.Boxes(detect.build_detector("lcnet_vit_s", num_classes=5, channels=16, convs=1, **TINY_LCNET))
    if name == "converted":
        model, _ = foreign("timm norms")
        convert.convert(model)
        return shaken(model)
    if name in FAMILIES:
        return tiny(name, image_size=96)
    return segment.Scores(tiny_segmenter(pixel_decoder=name, layers=1))


def token_counts(model, x):
    """N of every attention core in one forward."""
    with figures.captured(model) as seen, torch.no_grad():
        model(x)
    return {q.shape[2] for q, _, _ in seen.values()}


@pytest.mark.parametrize("name", ["levit", "deit", "mvit", "detector", "fpn_transformer", "converted"])
def test_exported_graphs_take_any_size_and_hold_no_softmax(name):
    """torch.export with free batch, height and width equals the castled model at sizes it was not traced at; no node of
    a castled classifier's graph is a softmax or has two axes of N tokens. timm's models have one size, the segmenter
    one image at a time, of whole patches, and softmax in its decoder."""
    model = deployed(name).eval()
    program = convert.traced(model, 32 if name == "converted" else 96)
    castle(model)
    example = program.example_inputs[0][0]
    counts = token_counts(model, example)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    if name == "fpn_transformer":  # up to its decoders
        nodes = [node for node in nodes if "backbone" in str(node.meta["nn_module_stack"])]
    values = [value for node in nodes for value in pytree.tree_leaves(node.meta["val"])]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    assert len(shapes) > 20 and counts
    for shape in shapes:
        free = [str(side) for side in shape if isinstance(side, torch.SymInt) or name == "converted"]
        assert not [side for side in shape if free.count(str(side)) > 1 and int(side) in counts]
    assert name == "detector" or not any("softmax" in str(node.target) for node in nodes)  # it decodes boxes with one
    run, images = program.module(), 1 if name == "fpn_transformer" else 3
    sizes = [(32, 32)] if name == "converted" else [(96, 96), (128, 80), (160, 352)]
    for size in sizes:
        x = randn(images, 3, *size, dtype=torch.float32)
        with torch.no_grad():
            for ours, expected in zip(convert.flattened(run(x)), convert.flattened(model(x)), strict=True):
                assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["deit", "detector"])
def test_onnx_files_equal_the_model(tmp_path, name):
    """The file's outputs in ONNX Runtime at three sizes; the model is left as it was."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = deployed(name).eval()
    shapes, difference = convert.export(model, tmp_path / "model.onnx", 96)
    assert shapes == [(1, 3, 96, 96), (2, 3, 128, 160), (3, 3, 192, 128)] and difference < 1e-5
    assert (tmp_path / "model.onnx").stat().st_size > 10_000
    assert all(core.auxiliary for core in attention.cores(model).values())


def test_outputs_of_any_structure_are_compared():
    """Other libraries' models return dictionaries, with None in them: the tensors in order, as the file has them."""
    x, y, z = randn(3, 1)
    assert convert.flattened({"logits": x, "states": (y, None, [z])}) == [x, y, z] and convert.flattened(x) == [x]


def test_a_file_that_gives_no_numbers_is_not_exact(tmp_path):
    """One NaN among the outputs is the difference, whatever the other outputs and sizes say."""
    model = nn.Conv2d(3, 2, 1).eval()
    assert convert.export(model, tmp_path / "model.pt2", 96)[1] < 1e-6
    model.bias.data[1] = math.nan
    assert math.isnan(convert.export(model, tmp_path / "model.pt2", 96)[1])


def test_export_files_are_checked(tmp_path, monkeypatch):
    """Kind, folder and missing packages are ValueErrors before work starts."""
    for path, message in [(tmp_path / "x.pt", ".onnx or .pt2"), (tmp_path / "no" / "x.pt2", "existing folder")]:
        with pytest.raises(ValueError, match=message):
            convert.check_export(path)
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxruntime onnxscript"):
        convert.check_export(tmp_path / "x.onnx")


# ---- train.py: schedules, data, losses -------------------------------------------------------------------------------


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


def test_recipe_of_the_optimizer():
    """A data set's own learning rate belongs to its own optimiser: another brings its recipe's; flags win over both."""
    assert (flags().optimizer, flags().schedule, flags().lr) == ("sgd", "cosine", 3.2)
    adamw, own = flags("--optimizer=adamw"), flags("--optimizer=adamw", "--lr=1e-3", "--schedule=exponential")
    assert (adamw.lr, adamw.schedule, adamw.weight_decay) == (5e-4, "cosine", 0.025)
    assert (own.lr, own.schedule) == (1e-3, "exponential")
    folder = flags("--data=.")
    assert (folder.lr, folder.schedule, folder.epochs, folder.image_size) == (2.0, "exponential", 1000, 224)
    folder.warmup_epochs, folder.global_batch = 11.0, 4096
    assert train.learning_rate(folder, 11 * 313, 313, 313_000) == 2.0
    assert train.learning_rate(folder, 999 * 313, 313, 313_000) == pytest.approx(8.0e-6, rel=0.01)
    folder.global_batch = 512
    assert train.learning_rate(folder, 0, 2502, 2_502_000) == pytest.approx(0.01 / 8)
    folder.lr = 0.001  # below where warm-up starts: it does not run backwards
    rates = [train.learning_rate(folder, step, 10, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(0.001 / 8)


@pytest.mark.parametrize(("model", "images"), [
    ("levit128", 64), ("levit384", 64), ("esnet_vit_m", 64),
    ("deit_tiny", 32), ("deit_base", 32), ("mvitv2_small", 32),
])  # fmt: skip
def test_peak_learning_rate_is_the_papers(model, images):
    """Section 4.1 on a folder: 2.0, warmed up from 0.01, on 64 GPUs of 64 images for LeViT and of 32
    for DeiT and MViTv2; linear from there. shapes and cifar have one batch for every model: 3.2 and
    2.0 at 4096."""
    folder = flags("--data=.", model=model, warmup_epochs=11)
    assert folder.batch_size == images
    for gpus, times in ((64, 1.0), (8, 1 / 8)):
        folder.global_batch = gpus * folder.batch_size
        assert train.learning_rate(folder, 0, 100, 100_000) == 0.01 * times
        assert train.learning_rate(folder, 1100, 100, 100_000) == 2.0 * times
    for name, peak in (("shapes", 3.2), ("cifar10", 2.0), ("cifar100", 2.0)):
        args = flags(model=model, data=name, warmup_epochs=11)
        assert args.batch_size == 128
        assert train.learning_rate(args, 1100, 100, 100_000) == peak * 128 / 4096


@given(st.floats(0, 1), st.floats(0.5, 1000), st.floats(0, 11))
def test_schedules_stay_between_their_ends(u, epochs, full):
    """Every learning rate lies within [end, peak]; warm-up takes at most 11% of the run; the cosine ends at its end."""
    warmup = train.warmup_for(epochs, full)
    assert warmup <= 0.11 * epochs + 1e-9
    shape = dict(epochs=epochs, peak=1.0, start=0.1, warmup=warmup)
    assert 0 < train.exponential_lr(u * epochs, **shape) <= 1 + 1e-12
    assert 0.01 <= train.cosine_lr(u * epochs, **shape, end=0.01) <= 1 + 1e-12
    assert train.cosine_lr(epochs, **shape, end=0.01) == pytest.approx(0.01)


def test_averaged_weights():
    """The horizon is 4% of the run: LeViT's and DeiT's 0.99996 at 626,000 steps. The average follows its recursion, and
    integer buffers survive it."""
    assert train.ema_decay_for(626_000) == pytest.approx(0.99996, abs=1e-6) and 0 <= train.ema_decay_for(1) < 1
    model = nn.BatchNorm1d(2)
    ema, expected = run.averaged(model, 0.5), None
    for n, value in enumerate((1.0, 3.0, -2.0, 7.0)):
        nn.init.constant_(model.weight, value)
        model.num_batches_tracked.fill_(n)
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert ema.module.weight[0].item() == pytest.approx(expected)


def test_weight_decay_skips_norms_biases_and_tables():
    model = tiny("levit", "softmax")
    decayed, others = train.parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    tables = [p for name, p in model.named_parameters() if name.endswith("attention_biases")]
    assert tables and all(any(p is q for q in others["params"]) for p in tables)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([32, 64, 97]))
@settings(max_examples=30)
def test_scene_truth_matches_its_pixels(seed, count, size):
    """Boxes are the exact extent of each shape in the mask where a class occurs once; labels, boxes and mask agree; the
    scene follows from its generator alone."""
    labels = np.random.default_rng(seed).integers(0, len(data.SHAPES), count).tolist()
    scene, again = (data.render_scene(np.random.default_rng(seed), size, labels) for _ in range(2))
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    for name in ("image", "labels", "boxes", "mask"):
        assert np.array_equal(getattr(scene, name), getattr(again, name))
    assert len(scene.labels) == len(scene.boxes) <= count and len(scene.labels) >= 1
    assert set(scene.mask.flat) - {0} == {label + 1 for label in scene.labels}
    for label, (x0, y0, x1, y1) in zip(scene.labels, scene.boxes, strict=True):
        assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
        if (scene.labels == label).sum() == 1:
            rows, columns = np.nonzero(scene.mask == label + 1)
            assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_shapes_are_deterministic_balanced_and_split():
    """An item is a function of (seed, split, index); classes take turns; training and validation differ."""
    a, b = data.Shapes("train", 50, 32, seed=3), data.Shapes("train", 10, 32, seed=3)
    assert len(data.SHAPES) >= 10 and len(a) == 50 and a.classes == list(data.SHAPES)
    assert torch.equal(a[7][0], b[7][0]) and a[7][1] == 7 and a[19][1] == 7
    for other in (data.Shapes("val", 50, 32, seed=3), data.Shapes("train", 50, 32, seed=4)):
        assert not torch.equal(a[7][0], other[7][0])


def test_shapes_are_hard_for_a_linear_classifier():
    """Ridge regression on the pixels, at its best penalty, stays far under 50% on held-out shapes."""
    def pixels(split, count):
        items = [data.Shapes(split, count, 24)[i] for i in range(count)]
        x = torch.stack([image.flatten() for image, _ in items]).double() / 255 - 0.5
        return x, torch.tensor([label for _, label in items])

    (x, y), (x_val, y_val) = pixels("train", 2400), pixels("val", 600)
    gram, target = x.T @ x, x.T @ F.one_hot(y).double()
    accuracies = []
    for penalty in (1.0, 10.0, 100.0, 1000.0):
        weights = torch.linalg.solve(gram + penalty * torch.eye(x.shape[1], dtype=x.dtype), target)
        accuracies.append(((x_val @ weights).argmax(1) == y_val).double().mean().item())
    assert max(accuracies) < 0.3


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_ranks_see_what_one_process_would(length, world, batch, epoch):
    """Training: global batch t over all ranks is batch t of a single process, and no index repeats. Evaluation: every
    index exactly once over all ranks, in any number of them."""
    samplers = [data.EpochSampler(length, rank=r, world=world, seed=1, multiple=world * batch) for r in range(world)]
    single = data.EpochSampler(length, seed=1, multiple=world * batch)
    for sampler in (*samplers, single):
        sampler.epoch = epoch
    shares, whole = [list(s) for s in samplers], list(single)
    assert len({len(s) for s in shares}) == 1 and len(whole) == length // (world * batch) * world * batch
    assert [len(s) for s in samplers] == [len(s) for s in shares]
    for t in range(len(whole) // (world * batch)):
        together = [key for share in shares for key in share[t * batch : (t + 1) * batch]]
        assert sorted(together) == sorted(whole[t * world * batch : (t + 1) * world * batch])
    assert len(set(whole)) == len(whole) and all(e == epoch for e, _ in whole)
    val = [key for r in range(world) for key in data.EpochSampler(length, rank=r, world=world)]
    assert sorted(val) == [(0, i) for i in range(length)]


def flags(*options, **extra):
    """Resolved arguments, as a run would have them."""
    args = train.parser().parse_args([*options, *(f"--{k.replace('_', '-')}={v}" for k, v in extra.items())])
    train.resolve(args)
    args.script = "train.py"
    return args


def test_number_of_workers_changes_nothing(photos):
    """Augmentation is a function of (seed, epoch, index): 0 and 2 workers give the same batches, epochs differ."""
    args = flags(data=photos, image_size=24, erasing=0.5)
    base = train.open_split(args, "train")

    def images(workers, epoch, seed=0):
        sampler = data.EpochSampler(len(base), seed=seed, multiple=4)
        sampler.epoch = epoch
        loader = data.make_loader(data.Augmented(base, train.train_transform(args), seed), sampler, 4, workers)
        before = torch.get_rng_state()
        batches = torch.cat([x for x, _ in loader])
        assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
        return batches

    assert torch.equal(images(0, 1), images(2, 1))
    assert not torch.equal(images(0, 1), images(0, 2)) and not torch.equal(images(0, 1), images(0, 1, seed=5))


def test_data_sets_can_be_sent_to_loader_processes():
    """Data sets of all scripts, transforms included, can be pickled and act as before: so Python 3.14, and any on
    macOS, starts loader processes."""
    args = flags("--data=.", "--image-size=32", "--randaugment=9", "--erasing=0.5")
    image, labels = torch.arange(3 * 40 * 50, dtype=torch.uint8).view(3, 40, 50), torch.zeros(40, 50, dtype=torch.uint8)
    for dataset, key in (
        (data.Augmented([(image, 0)], train.train_transform(args), 0), (0, 0)),
        (data.Augmented([(train.v2.functional.to_pil_image(image), 0)], train.eval_transform(args), 0), (0, 0)),
        (detect.Resized([detect.make_item(image, [[0, 0, 9, 9]], [0], 1)], detect.augmentation(True), 0), (0, 0, 32)),
        (segment.Pairs([(image, labels)], segment.train_transform(args), 0), (0, 0)),
        (segment.Pairs([(image, labels)], functools.partial(segment.resized_whole, size=32), 0), (0, 0)),
    ):
        sent = pickle.loads(pickle.dumps((dataset, data.leave_group, detect.collate)))[0]
        for before, after in zip(*(pytree.tree_leaves(one[key]) for one in (dataset, sent)), strict=True):
            assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))


@pytest.fixture
def photos(tmp_path):
    """An ImageNet-style folder: two classes, train/ and test/, JPEG and PNG, grey, palette and alpha among them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name, shade in (("bright", 170), ("dark", 60)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(shade - 40, shade + 40, (40, 30 + 5 * i, 3), dtype=np.uint8)
                mode = ("RGB", "L", "RGBA", "P")[i % 4]
                Image.fromarray(pixels).convert(mode).save(folder / f"{i}.{'jpg' if mode == 'RGB' else 'png'}")
    return tmp_path / "photos"


@pytest.mark.parametrize("workers", [0, 1])
def test_small_folders_are_read_once(photos, monkeypatch, workers):
    """Images of the first one's size are read once, by any process; their pixels are those of the file,
    whatever was done to an image that was given out. Bad images and others are read each time, and
    nothing is kept of a set too large for memory or of one whose first image is bad."""
    def kept(folder):
        there = [] if folder.kept is None else folder.kept[:, 0].nonzero()[0]
        return [Path(folder.samples[i][0]).name for i in there]

    def pixels(folder, index):
        return np.asarray(folder[index][0]).tolist()

    small = photos / "train" / "dark"
    files = [path for path, _ in data.open_folder(photos, "train").samples]
    for i, path in enumerate(files):
        if i % 6 in (0, 2, 5):
            Image.open(path).resize((30, 40)).save(path)
    (small / "5.png").write_bytes(b"none")
    whole = [np.asarray(data.read_image(path)).tolist() for path in files[:11]]
    folder = data.open_folder(photos, "train")
    loader = data.make_loader(folder, range(11), 1, workers, collate=lambda batch: batch)
    for _, label in (item for batch in loader for item in batch):
        assert label in (0, 1)
    assert kept(folder) == ["0.jpg", "2.png", "5.png", "0.jpg", "2.png"]
    for index in (0, 2, 5, 6, 8):
        Path(files[index]).write_bytes(b"no longer needed")
    for turn in range(2):
        for one in (folder, pickle.loads(pickle.dumps(folder))):
            assert [pixels(one, i) for i in range(11)] == whole, turn
        folder[0][0].paste((1, 2, 3), (0, 0, 30, 40))
        with pytest.raises(data.DataError, match="dark/5.png"):
            folder[11]
    assert data.open_folder(photos, "train").kept is None  # its first image is bad by now
    rows = 6 * (1 + 3 * 30 * 40)
    for most in (rows, rows - 1):
        monkeypatch.setattr(data, "KEPT_BYTES", most)
        folder = data.open_folder(photos, "val")
        assert folder[0][1] == 0 and kept(folder) == (["0.jpg"] if most == rows else [])


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


# ---- train.py: the script --------------------------------------------------------------------------------------------

SMALL = ("--image-size=32", "--shapes-length=40", "--batch-size=8", "--workers=0", "--epochs=2", "--max-steps=4")


def run_train(folder, *options):
    """train.py in this process, into `folder`; the log's records."""
    train.main(train.parser().parse_args([f"--output={folder}", *SMALL, *options]))
    return records_of(folder)


def records_of(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_script_trains_castles_and_evaluates(tmp_path, capsys):
    """A whole run: files, log, report with gap 0.0 and empty masks; then --eval of each checkpoint gives the logged
    metrics, and --image names classes."""
    *epochs, report = run_train(tmp_path / "run")
    printed = capsys.readouterr().out
    assert "castling gap          0.00" in printed and "the masks are empty" in printed
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "lock", "log.jsonl", "last.pt", "best.pt", "castled.pt",
    }  # fmt: skip
    assert [r["step"] for r in epochs] == [4] and epochs[0]["epoch"] == 0
    keys = {"epoch", "train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "n_parameters"}
    assert keys <= epochs[0].keys()  # as DeiT's logs call them
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["seed"] == 0 and config["environment"].items() >= {"torch": torch.__version__, "processes": 1}.items()
    assert re.fullmatch("None|[0-9a-f]{40}(-dirty)?", str(config["environment"]["commit"]))
    curve = epochs[0]["mask_curve"]  # at every step of so short a run, per layer
    assert curve.pop("step") == [0, 1, 2, 3] and curve.keys() == epochs[0]["mask_density"].keys()
    assert all(len(densities) == 4 and densities[0] >= densities[3] for densities in curve.values())
    report = report["castling_report"]
    assert report["castling_gap"] == 0 and not any(report["mask_density"].values())
    assert report["macs"]["castled"] < report["macs"]["with branch"]
    assert report["test_acc1"] == epochs[0]["test_acc1"] == epochs[0]["test_acc1_castled"]
    for name in ("last.pt", "best.pt", "castled.pt"):
        train.main(train.parser().parse_args(["--eval", f"--checkpoint={tmp_path / 'run' / name}", "--workers=0"]))
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["test_loss"] == pytest.approx(epochs[0]["test_loss"], rel=1e-5)
        assert record.get("castling_gap") == (None if name == "castled.pt" else 0)  # castled: nothing left to lose
    Image.fromarray(data.Shapes("val", 12, 50).scene(3).image).save(tmp_path / "one.png")
    train.main(train.parser().parse_args([f"--image={tmp_path}/one.png", f"--checkpoint={tmp_path}/run/best.pt"]))
    named = capsys.readouterr().out
    assert sum(name in named for name in data.SHAPES) >= 5 and named.startswith(str(tmp_path / "one.png"))


def test_log_follows_the_masks(tmp_path):
    """`mask_curve` is the density at each step's own threshold: a fixed threshold of 0 keeps every entry."""
    epoch, _ = run_train(tmp_path, "--max-steps=2", "--epsilon=0", "--mask-schedule=fixed")
    assert epoch["mask_curve"].pop("step") == [0, 1]
    assert all(densities == [1, 1] for densities in epoch["mask_curve"].values())


@pytest.mark.parametrize(("options", "lines"), [
    (["--mask-schedule=anneal", "--image-size=64"], [  # levit128 at 64 px: stages of 4 x 4, 2 x 2 and 1 x 1 tokens
        r"14 of 14 masks hold entries", r"4 layers of 16 tokens, threshold 0\.0156: .*% of entries kept",
    ]),
    (["--image-size=64"], [r" of 14 masks hold", r"of 4 tokens, threshold 1: 0 to 0%",
          r"of 1 tokens, threshold 1: 0 to 0%", r"never any.*stages\.1\.downsample\.attn_downsample \(4 tokens\)"]),
    (["--model=deit_mini"], [r": 0 of 6 masks hold", r"6 layers of 65 tokens, threshold 0\.0615: 0 to 0%"]),
    (["--attention=linear_angular"], []),
])  # fmt: skip
def test_a_run_says_once_what_its_masks_hold(tmp_path, capsys, options, lines):
    """The first step's masks by token count; layers of at most 4 tokens, whose ramp starts at 1, can never hold any."""
    run_train(tmp_path, "--max-steps=2", *options)
    out = capsys.readouterr().out
    assert out.count("auxiliary branch:") == bool(lines)
    for line in lines:
        assert re.search(line, out), line


@pytest.mark.parametrize(("attention_name", "dconv", "mlp_dwconv"), [
    ("castling", 9, 5), ("castling", 0, 5), ("castling", 9, 0), ("castling", 0, 0), ("softmax", 9, 5),
])  # fmt: skip
@pytest.mark.parametrize("name", ["deit_mini", "levit_mini", "lcnet_vit_s"])
def test_the_two_dwconvs_are_switched_apart(name, attention_name, dconv, mlp_dwconv):
    """--dconv is the one on V, --mlp-dwconv the ones in the MLPs, which softmax models can have too."""
    args = flags(f"--model={name}", f"--attention={attention_name}", f"--dconv={dconv}", f"--mlp-dwconv={mlp_dwconv}")
    names = [n for n, _ in train.make_model(args, 3, 64).named_parameters()]
    assert any(".dconv." in n for n in names) == (dconv > 0 and attention_name == "castling")
    assert any("mlp.dwconv." in n for n in names) == (mlp_dwconv > 0)


def test_softmax_weights_start_a_castling_run_without_its_dconv(tmp_path):
    """--zero-dconv: a run from a softmax checkpoint starts with DWConv(V) = 0; without the flag it starts at random.
    What the checkpoint holds is taken."""
    run_train(tmp_path / "softmax", "--model=deit_mini", "--image-size=32", "--attention=softmax", "--max-steps=1")
    start = f"--checkpoint={tmp_path / 'softmax' / 'best.pt'}"
    for zero in (True, False):
        folder = tmp_path / str(zero)
        options = ["--model=deit_mini", "--image-size=32", start, "--max-steps=1", "--lr=0", *["--zero-dconv"] * zero]
        run_train(folder, *options)
        weights = torch.load(folder / "last.pt")["model"]
        assert (weights["blocks.0.attn.dconv.weight"].abs().max() == 0) == zero
        theirs = torch.load(tmp_path / "softmax" / "best.pt")["ema"]
        assert_close(weights["blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"])


def test_settings_of_the_first_version_are_understood():
    """Its DWConvs had other names in each script: checkpoints with those settings build the same model."""
    for then, now in [
        (dict(dwconv=False), dict(dconv=0, mlp_dwconv=0)), (dict(dwconv=None), {}), (dict(dwconv=True), {}),
        (dict(mlp_dw=None, v_dconv=True), {}), (dict(mlp_dw=0, v_dconv=False), dict(dconv=0, mlp_dwconv=0)),
        (dict(mlp_conv=5), dict(mlp_dwconv=5)), (dict(dconv=3, mlp_dwconv=0), dict(dconv=3, mlp_dwconv=0)),
    ]:  # fmt: skip
        assert run.renamed(dict(model="deit_tiny") | then) == dict(model="deit_tiny") | now


def test_evaluation_can_be_rarer(tmp_path):
    """--eval-every N: every N-th epoch and the last are evaluated, every epoch is logged and can be resumed."""
    *epochs, report = run_train(tmp_path, "--epochs=3", "--max-steps=15", "--eval-every=2")
    assert ["test_acc1" in record for record in epochs] == [False, True, True]
    assert report["castling_report"]["test_acc1"] == epochs[-1]["test_acc1"]


@pytest.mark.parametrize("options", [
    ("--attention=softmax", "--amp"),
    ("--attention=relu_e", "--optimizer=adamw", "--clip-grad=1", "--accumulate=2", "--batch-size=4"),
    ("--model=deit_tiny", "--mixup=0.8", "--cutmix=1", "--smoothing=0.1", "--erasing=0.5", "--channels-last"),
    ("--mask-schedule=fixed", "--no-castle-downsample", "--drop-path=0.1", "--schedule=exponential"),
    ("--amp", "--mask-schedule=anneal", "--image-size=64"),  # see test_half_precision_stays_finite
    ("--model=lcnet_vit_s", "--drop-path=0.1"),
    ("--model=esnet_vit_s", "--dconv=0", "--mlp-dwconv=0"),
])  # fmt: skip
def test_every_option_trains(tmp_path, capsys, options):
    """Each combination runs to its report; a model without a branch has no threshold and reports no gap."""
    *_, report = run_train(tmp_path, "--max-steps=2", *options)
    branch = all("attention=" not in o for o in options)
    assert ("castling_gap" in report["castling_report"]) == branch
    assert ("mask: threshold" in capsys.readouterr().out) == branch


def teacher_of(*source):
    """The teacher that these flags of distillation name."""
    return train.load_teacher(flags(*SMALL, *source), list(data.SHAPES), torch.device("cpu"))


def test_patches_of_any_size_train(tmp_path, capsys):
    """--patch-size P makes a DeiT of ceil(S / P)^2 tokens and the class token. The checkpoint answers for it where
    weights are evaluated or taught from; another size is another run; other models refuse it by name."""
    for patch, tokens in ((2, 257), (8, 17)):
        folder, small = tmp_path / str(patch), ("--max-steps=1", "--model=deit_mini", f"--patch-size={patch}")
        epoch, _ = run_train(folder, *small)
        kept = convert.read_checkpoint(folder / "best.pt")
        assert kept["ema"]["pos_embed"].shape == (1, tokens, 96) and kept["args"]["patch_size"] == patch
        capsys.readouterr()
        train.main(train.parser().parse_args(["--eval", f"--checkpoint={folder}/best.pt", "--workers=0"]))
        assert json.loads(capsys.readouterr().out)["test_loss"] == pytest.approx(epoch["test_loss"], rel=1e-5)
    source = ("--distillation=hard", "--teacher=deit_mini", f"--teacher-checkpoint={folder}/best.pt")
    assert teacher_of(*source).patch_size == 8
    said = refused(capsys, 2, run_train, folder, "--max-steps=1", "--model=deit_mini", "--patch-size=4")
    assert "patch_size 8 -> 4" in said
    for model in ("levit128", "timm:vit_tiny_patch16_224"):
        said = refused(capsys, 2, run_train, tmp_path / "x", f"--model={model}", "--patch-size=4")
        assert "--patch-size is for deit_mini, deit_tiny, deit_small, deit_base, not " + model in said


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_trains(tmp_path, kind):
    """From a torchvision model, and from a run of this script, each loaded from a local file."""
    import torchvision

    teacher = torchvision.models.get_model("mobilenet_v3_small", weights=None, num_classes=len(data.SHAPES))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    source = (f"--distillation={kind}", "--teacher=mobilenet_v3_small", f"--teacher-checkpoint={tmp_path}/teacher.pt")
    run_train(tmp_path / "a", "--max-steps=1", *source, "--distilled")
    own = (f"--distillation={kind}", "--teacher=levit128", f"--teacher-checkpoint={tmp_path}/a/best.pt")
    run_train(tmp_path / "b", "--max-steps=1", *own)  # a teacher with two heads, as its checkpoint says
    teacher = teacher_of(*own)
    assert teacher.head_dist is not None and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_folder_trains_and_names_what_is_wrong(tmp_path, photos, capsys):
    """Folders train and predict; missing splits, empty classes, differing classes and unreadable images are named."""
    run_train(tmp_path / "run", f"--data={photos}", "--batch-size=4", "--max-steps=2")
    images = ["--image", *map(str, (photos / "test" / "dark").iterdir())]
    train.main(train.parser().parse_args([*images, f"--checkpoint={tmp_path}/run/best.pt"]))
    assert capsys.readouterr().out.count("bright") == 3

    def refused(code, *options):
        with pytest.raises(SystemExit) as stopped:
            run_train(tmp_path / "refused", "--batch-size=4", "--max-steps=2", *options)
        assert stopped.value.code == code
        return capsys.readouterr().err

    assert "classes" in refused(2, "--eval", f"--checkpoint={tmp_path}/run/best.pt", "--data=shapes")
    (photos / "test" / "dark").rename(photos / "test" / "dusk")
    assert "dark, dusk" in refused(2, f"--data={photos}")
    (photos / "test" / "dusk").rename(photos / "test" / "dark")
    (photos / "train" / "hollow").mkdir()
    assert "hollow" in refused(2, f"--data={photos}")
    (photos / "train" / "hollow").rmdir()
    bad = photos / "train" / "dark" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    for workers in (0, 1):
        assert str(bad) in refused(1, f"--data={photos}", f"--workers={workers}", "--max-steps=3")
    (photos / "test").rename(photos / "elsewhere")
    assert f"{photos}/test" in refused(2, f"--data={photos}")
    assert "no-such-folder" in refused(2, "--data=no-such-folder")


def test_bad_arguments_exit_with_2(tmp_path, capsys):
    """Every wrong value stops before work starts, with status 2 and the value in the message."""
    cases = [
        (["--model=levit_128"], "levit128"), (["--attention=softmx"], "softmax"), (["--epochs=0"], "at least 1"),
        (["--lr=x"], "'x'"), (["--epsilon=2"], "0..1"), (["--mask-schedule=up"], "up"), (["--batch-size=41"], "40"),
        (["--eval"], "--checkpoint"), (["--checkpoint=none.pt"], "none.pt"),
        (["--distillation=hard"], "--teacher"), (["--teacher=deit_tiny"], "--distillation"),
        (["--batch-size=1"], "BatchNorm"), (["--model=lcnet_s", "--batch-size=1"], "BatchNorm"),
        (["--randaugment=31"], "0..30"), (["--seed=99999999999999999999"], "seed"),
        (["--eval", "--image=x", "--checkpoint=y"], "different things"), (["--output=/dev/null/x"], "/dev/null/x"),
        (["--distillation=hard", "--teacher=vgg99", "--teacher-checkpoint=x"], "vgg99"),
        (["--frobnicate"], "frobnicate"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises(SystemExit) as stopped:
            run_train(tmp_path / "x", *options)
        assert stopped.value.code == 2 and message in capsys.readouterr().err, options
    assert not (tmp_path / "x" / "last.pt").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--image", "", "--checkpoint=x"], "--image has an empty value"),
    (["--output="], "--output has an empty value"), (["--data", ""], "--data has an empty value"),
    (["--lr=1e308"], "--lr: must be within 0..1e+30, got 1e308"), (["--lr=inf"], "got inf"),
    (["--lr=nan"], "got nan"), (["--weight-decay=inf"], "got inf"),
    (["--mixup=1e-300"], "must be 0 or at least 0.001, got 1e-300"), (["--cutmix=1e-9"], "got 1e-9"),
    (["--image-size=1000000"], "--image-size: must be within 1..4096, got 1000000"),
    (["--workers=100000"], "--workers: must be within 0..128, got 100000"),
])  # fmt: skip
def test_values_out_of_bounds_are_named(capsys, options, message):
    """The parser refuses a value that is empty, or that no run could use, and names flag and value."""
    with pytest.raises(SystemExit) as stopped:
        train.parser().parse_args(options)
    assert stopped.value.code == 2 and message in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.parametrize(("option", "message"), [
    ("--batchsize=4", "unrecognized arguments: --batchsize=4 (did you mean --batch-size?)"),
    ("--resume", "unrecognized arguments: --resume"),
    ("--epochs=0", "argument --epochs: must be at least 1, got 0"),
])  # fmt: skip
def test_a_mistake_is_answered_in_two_lines(capsys, option, message):
    """What is wrong, with the nearest flag if there is one, and where to read more; no usage."""
    said = refused(capsys, 2, train.parser().parse_args, [option])
    assert said == f"train.py: error: {message}\ntrain.py --help lists all flags\n"


def test_a_value_may_end_in_an_equals_sign():
    """Only what a flag is given is looked at: a folder named a= is one."""
    assert train.parser().parse_args(["--data", "a=", "--output=b="]).data == "a="


def test_non_finite_loss_stops(tmp_path, capsys):
    """The message has step, learning rate and the last good checkpoint, and that checkpoint still loads."""
    with pytest.raises(SystemExit) as stopped:
        run_train(tmp_path, "--lr=1e30", "--max-steps=10")
    assert stopped.value.code == 1
    message = r"loss is (nan|inf) at step \d+, learning rate .*there is no checkpoint before it"
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "last.pt").exists()
    with pytest.raises(SystemExit) as stopped:  # diverges in the last step: seen by the evaluation
        run_train(tmp_path, "--lr=1e30", "--max-steps=2")
    assert stopped.value.code == 1 and not (tmp_path / "castled.pt").exists()


def test_lost_weights_are_not_saved(undisturbed, tmp_path, capsys, monkeypatch):
    """A checkpoint with nan in it would be the last good one for ever: the one before it stays, and
    the run goes on from there."""
    step, steps = torch.optim.SGD.step, itertools.count(1)

    def lose(optimizer, *given):
        step(optimizer, *given)
        if next(steps) == 3:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = math.nan

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lose)
        said = refused(capsys, 1, run_tiny, "train", tmp_path)
    assert "a weight is not finite at step 3, " in said
    assert f"the last checkpoint before it is {tmp_path}/last.pt" in said
    assert convert.read_checkpoint(tmp_path / "last.pt")["step"] == 2
    run_tiny("train", tmp_path)
    assert outcome(tmp_path) == undisturbed("train")


def start(*command):
    """A command in the repository's folder, on the CPU, as a running process."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # After a restart gloo would else find, now and then, the addresses of before it: torchrun keeps them in one store.
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(*processes):
    """What processes have printed once all have come to their end, which must be a good one."""
    printed = ""
    try:
        for process in processes:
            printed += process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.terminate()  # torchrun ends its workers
            printed += process.communicate()[0]
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed


def in_group(world, function):
    """Exit codes of `world` forked processes that call function(rank) as torchrun would have them, on one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(rank):
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        function(rank)

    processes = [multiprocessing.get_context("fork").Process(target=call, args=(r,)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


@contextlib.contextmanager
def two_hosts():
    """(command prefix of each, address of the first): network namespaces with a cable between them, where the platform
    lets us make them; else this machine twice."""
    names = [f"castling{os.getpid()}{end}" for end in "ab"]
    setup = [f"ip netns add {names[0]}", f"ip netns add {names[1]}",
             f"ip -n {names[0]} link add eth0 type veth peer name eth0 netns {names[1]}"]  # fmt: skip
    for name, address in zip(names, ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
        setup += [f"ip -n {name} address add {address} dev eth0", f"ip -n {name} link set lo up",
                  f"ip -n {name} link set eth0 addrgenmode none up"]  # fmt: skip
    try:
        made = all(subprocess.run(command.split(), capture_output=True).returncode == 0 for command in setup)
    except OSError:
        made = False
    try:
        inside = [["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"] for name in names]
        yield (inside, "10.77.0.1") if made else ([[], []], "127.0.0.1")
    finally:
        for name in names if made else ():
            subprocess.run(["ip", "netns", "delete", name], check=True)


def test_two_hosts_equal_one_process(tmp_path):
    """Five steps of DeiT on two machines that meet by c10d, gradients accumulated, one worker killed in the third step
    and all restarted by torchrun: weights within 1e-5 of one process with the whole batch, the same validation metrics
    and mask statistics."""
    common = ["--model=deit_tiny", "--image-size=32", "--shapes-length=60", "--max-steps=5", "--workers=0",
              "--mask-schedule=anneal"]  # fmt: skip
    (tmp_path / "dies_once.py").write_text(f"""
import os, pathlib, signal, sys; sys.path.insert(0, {str(ROOT)!r})
import run, train
step, mark = run.Progress.step, pathlib.Path({str(tmp_path / "killed")!r})
def dies(self, *args, **values):
    if self.done == 2 and run.rank() == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *args, **values)
run.Progress.step = dies
train.main(train.parser().parse_args())
""")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with two_hosts() as (prefixes, address):
        agents = []
        for number, prefix in enumerate(prefixes):
            launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
                      "--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}", f"--rdzv-conf=is_host={1 - number}",
                      f"--local-addr=10.77.0.{1 + number}" if prefix else "--local-addr=127.0.0.1"]  # fmt: skip
            two = ["--batch-size=2", "--accumulate=2", "--save-minutes=1e-9", f"--output={tmp_path}/two"]
            agents.append(start(*prefix, sys.executable, *launch, str(tmp_path / "dies_once.py"), *common, *two))
        printed = finished(*agents)
    assert (tmp_path / "killed").exists() and re.search("resumed from .* at step [23] of 5", printed)
    run_alone = train.parser().parse_args([*common, "--batch-size=8", f"--output={tmp_path}/one"])
    train.main(run_alone)
    one, two = (convert.read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    for key in ("model", "ema"):
        assert max((one[key][name] - two[key][name]).abs().max().item() for name in one[key]) < 1e-5
    one, two = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("one", "two"))
    for key in ("train_loss", "test_loss", "test_acc1", "test_acc5", "test_loss_castled"):
        assert one[key] == pytest.approx(two[key], abs=1e-4)
    assert one["mask_density"] == pytest.approx(two["mask_density"], abs=1e-4)


def test_mask_statistics_add_up_over_processes(tmp_path):
    """Two ranks with different images report the mean over all, as one process with all images would."""
    script = tmp_path / "masks.py"
    script.write_text(f"""
import gc, sys, torch; sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from attention import AttentionCore, mask_density
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(0)
core, x = AttentionCore(2, auxiliary=True), torch.randn(3, 4, 2, 20, 8) * 2
whole = AttentionCore(2, auxiliary=True); whole(*x); expected = whole.tally[0] / whole.tally[3]
ddp = DistributedDataParallel(core)
for part in (0, 1):
    ddp(*x[:, [2 * dist.get_rank() + part]])
assert abs(mask_density(ddp)[""] - expected) < 1e-6, (mask_density(ddp), expected)
dist.barrier(); del ddp; gc.collect()
dist.destroy_process_group()
""")
    assert in_group(2, lambda rank: exec(script.read_text(), {})) == [0, 0]


def test_train_export(tmp_path, capsys):
    """--export writes a checkpoint castled and runs the file; timm's models train, resume, evaluate and export by
    name."""
    pytest.importorskip("timm")
    name, kept = "--model=timm:test_vit", f"--checkpoint={tmp_path / 'best.pt'}"
    run_train(tmp_path, name, "--max-steps=2")
    run_train(tmp_path, name, "--max-steps=2")
    assert "resumed" in capsys.readouterr().out
    train.main(train.parser().parse_args(["--eval", "--workers=0", kept]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["castling_gap"] == 0
    train.main(train.parser().parse_args([kept, f"--export={tmp_path / 'model.pt2'}"]))
    assert "run on 1x3x96x96, 2x3x128x160, 3x3x192x128; largest difference" in capsys.readouterr().out
    model = torch.export.load(tmp_path / "model.pt2").module()
    assert model(torch.zeros(2, 3, 96, 128)).shape == (2, 12)


def test_every_script_exports_what_is_deployed(tmp_path, capsys, monkeypatch):
    """Boxes and scores of a detector, class scores of a segmenter; a file that is not the model is a failure."""
    detector, segmenter = detect.build_detector("lcnet_vit_s"), tiny_segmenter()
    written = []
    for script, model in ((detect, detector), (segment, segmenter)):
        monkeypatch.setattr(script, "load", lambda args, model=model: (model, []))
        monkeypatch.setattr(run, "export", lambda graph, *_: written.append(graph) or ([(1, 3, 64, 64)], 1e-6))
        args = ["--checkpoint=x", f"--export={tmp_path / 'model.pt2'}"]
        script.main(script.parser().parse_args(args))
        assert "run on 1x3x64x64; largest difference 1.0e-06" in capsys.readouterr().out
    with torch.no_grad():
        boxes, scores = written[0].eval()(torch.zeros(1, 3, 64, 64))
        assert boxes.shape == (1, 85, 4) and scores.shape == (1, 85, 80) and 0 <= scores.min() <= scores.max() <= 1
        assert written[1].eval()(torch.zeros(1, 3, 48, 64)).shape == (1, 5, 48, 64)
    monkeypatch.setattr(run, "export", lambda *_: ([(1, 3, 64, 64)], math.nan))
    with pytest.raises(SystemExit) as stopped:
        segment.main(segment.parser().parse_args(args))
    assert stopped.value.code == 1 and "not the model" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (["--model=timm:vit_tiny_patch17_224"], "vit_tiny_patch16_224"),
    (["--model=timm:swin_tiny_patch4_window7_224"], "relative_position_bias_table"),
    (["--model=timm:vit_tiny_patch16_224", "--attention=cosine"], "castling, not cosine"),
    (["--model=timm:vit_tiny_patch16_224", "--distilled"], "--distilled"),
    (["--export=x.pt2"], "need --checkpoint"),
    (["--export=x.pth", "--checkpoint=y"], "x.pth"),
    (["--export=x.pt2", "--checkpoint=y", "--eval"], "different things"),
])  # fmt: skip
def test_timm_and_export_arguments_are_checked(tmp_path, capsys, options, message):
    pytest.importorskip("timm")
    with pytest.raises(SystemExit) as stopped:
        run_train(tmp_path, *options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# ---- detect.py: neck, head, assignment, losses -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "backbone", "neck", "head"), [
    ("lcnet_s", {}, [1072 - 464, 4440, 15792, 232032, 331152], 378048, 139456),
    ("lcnet_m", {}, [2208 - 696, 15792, 59232, 869568, 1288992], 704768, 379328),
    ("lcnet_l", {}, [3456 - 928, 27200, 103552, 1519872, 2275712], 1096000, 555968),
    ("lcnet_vit_s", dict(mlp_dwconv=0), [1072 - 464, 4440, 15792, 317760, 1283160], 378048, 139456),
    ("lcnet_vit_m", dict(mlp_dwconv=0), [2208 - 696, 15792, 59232, 1262136, 5109792], 704768, 379328),
    ("lcnet_vit_l", dict(mlp_dwconv=0), [3456 - 928, 27200, 103552, 2239880, 9074000], 1096000, 555968),
    ("esnet_s", {}, [27683 - 696, 189744, 386232], 249600, 139456),
    ("esnet_m", {}, [58510 - 696, 372108, 907408], 435200, 379328),
    ("esnet_l", {}, [88966 - 696, 576695, 1411380], 672000, 555968),
    ("esnet_vit_s", {}, [27683 - 696, 189744, 2646120], 249600, 139456),
    ("esnet_vit_m", {}, [58510 - 696, 372108, 4768928], 435200, 379328),
    ("esnet_vit_l", {}, [88966 - 696, 576695, 7425408], 672000, 555968),
])  # fmt: skip
def test_detector_parameters(name, options, backbone, neck, head):
    """Parameters of each stage (without the stem), neck and head."""
    with torch.device("meta"):
        model = detect.build_detector(name, **options)
    if name.startswith("lcnet"):
        one, two, three, four, five, six = (parameters(stage) for stage in model.backbone.blocks)
        stages = [one, two, three, four + five, six]
    else:
        stages = [parameters(stage) for stage in model.backbone.stages]
    assert stages == backbone and parameters(model.neck) == neck and parameters(model.head) == head


@pytest.mark.parametrize("sizes", [((8, 10), (4, 5), (2, 3)), ((7, 9), (4, 5), (2, 3))])
def test_neck_is_wired_as_published(sizes):
    """Each map reaches the others on the published ways, told apart by factors: upsampled or down-sampled map first in
    every concatenation, P5 from C5 as reduced, P6 from both C5 and P5; also where a side is odd."""
    neck = detect.PAN((2, 2, 2), 2, lambda channels: Calls(lambda x: x[:, :channels] + 10 * x[:, channels:]))
    halve = lambda factor: Calls(lambda x: factor * x[..., ::2, ::2])  # noqa: E731
    neck.reduce = nn.ModuleList(Calls(lambda x, factor=factor: factor * x) for factor in (1, 100, 10_000))
    neck.down, neck.extra_in, neck.extra_out = nn.ModuleList([halve(3), halve(5)]), halve(7), halve(11)
    c3, c4, c5 = (randn(1, 2, *size, seed=size[0]) for size in sizes)
    p3, p4, p5, p6 = neck([c3, c4, c5])
    up = lambda x, like: F.interpolate(x, size=like.shape[2:])  # noqa: E731
    t4, t5 = 100 * c4, 10_000 * c5
    m4 = up(t5, t4) + 10 * t4
    assert_close(p3, up(m4, c3) + 10 * c3)
    assert_close(p4, 3 * p3[..., ::2, ::2] + 10 * m4)
    assert_close(p5, 5 * p4[..., ::2, ::2] + 10 * t5)
    assert_close(p6, 7 * t5[..., ::2, ::2] + 11 * p5[..., ::2, ::2])


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


@given(scenes())
def test_simota_equals_a_slow_loop(scene):
    """The assignment is the description's, pair by pair; no box, boxes without a point inside, boxes far outside."""
    logits, bins, points, gt_boxes, gt_labels = scene
    boxes = detect.decode(bins[None], points)[0]
    matched = detect.simota(logits, boxes, points, gt_boxes, gt_labels)
    assert matched.tolist() == slow_simota(*(x.tolist() for x in (logits, boxes, points, gt_boxes, gt_labels)))


def test_far_boxes_have_no_point():
    """A box that no point is in or near leaves everything background."""
    points = detect.make_points([(8, 8), (4, 4), (2, 2), (1, 1)], "cpu")
    boxes, logits = torch.rand(len(points), 4), torch.rand(len(points), 3)
    far = torch.tensor([[900.0, 900, 950, 950]])
    assert (detect.simota(logits, boxes, points, far, torch.tensor([1])) == -1).all()


def test_saturated_logits_have_finite_costs():
    """Certain scores, +-1e4, neither overflow the cost nor lose the only box."""
    points = detect.make_points([(8, 8), (4, 4), (2, 2), (1, 1)], "cpu")
    logits = 1e4 * torch.randn(len(points), 3, generator=torch.Generator().manual_seed(0)).sign()
    boxes = detect.decode(torch.zeros(1, len(points), 4, 8), points)[0]
    matched = detect.simota(logits, boxes, points, torch.tensor([[10.0, 10, 50, 50]]), torch.tensor([1]))
    assert (matched == 0).any()


@given(scenes(), st.randoms())
@settings(max_examples=20)
def test_order_of_boxes_does_not_matter(scene, random):
    """Permuting the boxes of an image changes no loss."""
    logits, bins, points, boxes, labels = scene
    order = list(range(len(boxes)))
    random.shuffle(order)
    losses = [detect.detection_losses(logits[None], bins[None], points, [target])
              for target in ((boxes, labels), (boxes[order], labels[order]))]  # fmt: skip
    assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@given(scenes())
@settings(max_examples=20)
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


def test_detections_keep_the_best():
    """Scores above the least, a point may have two classes, overlaps of a class go, boxes end at the image's border."""
    points = torch.tensor([[20.0, 20, 8], [21.0, 20, 8], [60.0, 60, 16]])
    logits = torch.tensor([[4.0, -9], [3.0, 2.0], [-1.0, -9]])
    bins = torch.full((3, 4, 8), -50.0)
    bins[..., 4] = 50.0  # every side 4 strides
    boxes, scores, labels = detect.detections(logits, bins, points, (64, 90))
    assert labels.tolist() == [0, 1, 0]
    assert_close(scores, torch.tensor([4.0, 2.0, -1.0]).sigmoid())
    assert_close(boxes, torch.tensor([[0.0, 0, 52, 52], [0.0, 0, 53, 52], [0.0, 0, 90, 64]]))
    many = detect.make_points([(32, 32), (0, 0), (0, 0), (0, 0)], "cpu")
    bins = torch.full((len(many), 4, 8), -50.0)
    bins[..., 0] = 50.0
    bins[..., 1] = 49.0
    assert len(detect.detections(torch.full((len(many), 2), 2.0), bins, many, (256, 256))[0]) == 100
    assert len(detect.detections(torch.full((len(many), 2), -5.0), bins, many, (256, 256))[0]) == 0


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    """Normalisers are averaged over ranks: the mean of two ranks' gradients is that of one process with all images,
    though one rank has many boxes and the other none."""
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import sys, torch; sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from detect import detection_losses, make_points
g = torch.Generator().manual_seed(0)
points = make_points([(8, 8), (4, 4), (2, 2), (1, 1)], "cpu")
logits = torch.randn(4, len(points), 3, generator=g).requires_grad_()
bins = torch.randn(4, len(points), 4, 8, generator=g).requires_grad_()
box = torch.tensor([[5., 5, 40, 40], [20., 10, 60, 60], [1, 30, 20, 60]])
none = (box[:0], torch.zeros(0).long())
targets = [(box, torch.tensor([0, 1, 2])), (box[:2], torch.tensor([2, 2])), none, none]
def gradients(part):
    losses = detection_losses(logits[part], bins[part], points, targets[part])
    return torch.autograd.grad(sum(losses.values()), (logits, bins))
whole = gradients(slice(0, 4))
dist.init_process_group("gloo")
for a, b in zip(whole, gradients(slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))):
    dist.all_reduce(b)
    assert (a - b / 2).abs().max() < 1e-6, (a - b / 2).abs().max()
dist.barrier(); dist.destroy_process_group()
""")
    assert in_group(2, lambda rank: exec(script.read_text(), {})) == [0, 0]


# ---- detect.py: data, evaluation, the script -------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path):
    """A COCO folder: 6 + 4 images of several sizes, classes 3 and 7, a crowd, an empty image; a function edits it."""
    root, rng = tmp_path / "coco", np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        (root / f"{split}2017").mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            width, height = 60 + 7 * i, 80 - 5 * i
            pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
            pixels[10:40, 20:50] = (250, 240, 60)
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{i}.jpg")
            images.append(dict(id=100 + i, file_name=f"{i}.jpg", width=width, height=height))
            if i > 0:  # the first image is empty
                row = dict(id=10 * i, image_id=100 + i, category_id=(3, 7)[i % 2], iscrowd=0)
                annotations.append(row | dict(bbox=[20, 10, 30, 30], area=800))
        annotations.append(dict(id=999, image_id=101, category_id=3, bbox=[0, 0, 50, 20], area=900, iscrowd=1))
        content = dict(images=images, annotations=annotations,
                       categories=[dict(id=7, name="kite"), dict(id=3, name="owl")])  # fmt: skip
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))

    def edit(change, split="train"):
        path = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    edit.root = root
    return edit


def detect_flags(*options):
    args = detect.parser().parse_args(list(options))
    detect.resolve(args)
    return args


def test_coco_folder_is_read(coco, capsys):
    """Labels are indices of classes by id; boxes are xyxy, clipped; crowds are no targets but known to evaluation;
    images without a target are left out of training only; what has no area is dropped and counted once."""
    coco(lambda c: c["annotations"].extend([
        dict(id=1, image_id=102, category_id=3, bbox=[50, 60, 500, 500]),     # partly outside
        dict(id=2, image_id=102, category_id=3, bbox=[500, 60, 5, 5]),        # wholly
        dict(id=3, image_id=102, category_id=3, bbox=[5, 6, 0, 5]),           # no area
    ]))  # fmt: skip
    args = detect_flags(f"--data={coco.root}")
    train_set, val_set = detect.open_split(args, "train"), detect.open_split(args, "val")
    assert capsys.readouterr().err.count("2 boxes outside their image or of zero area dropped") == 1
    assert train_set.classes == [dict(id=3, name="owl"), dict(id=7, name="kite")] == val_set.classes
    assert len(train_set) == 5 and len(val_set) == 4
    item = train_set[1]
    assert item["image"].shape == (3, 70, 74) and item["size"] == (70, 74) and item["image_id"] == 102
    assert item["boxes"].tolist() == [[20, 10, 50, 40], [50, 60, 74, 70]] and item["labels"].tolist() == [0, 0]
    truth = val_set.ground_truth()
    assert len(truth["images"]) == 4 and sum(row["iscrowd"] for row in truth["annotations"]) == 1
    assert len(val_set[0]["boxes"]) == 0 and len(val_set[1]["boxes"]) == 1


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.pop("categories"), "no list of records 'categories'"),
    (lambda c: c["images"][2].pop("file_name"), r"images\[2\] has no 'file_name'"),
    (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] has no 'bbox'"),
    (lambda c: c["annotations"][1].update(segmentation=[c["annotations"][1].pop("bbox")]), "only a segmentation"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "expected four numbers"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), "expected four numbers"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 10**400, 4]), r"annotations\[1\] has 'bbox'"),
    (lambda c: c["annotations"][1].update(area=10**400), r"annotations\[1\] has 'area'"),
    (lambda c: c["images"][1].update(width=10**400), r"images\[1\] has 'width'"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 1e300, 1e300]), "expected four numbers"),
    (lambda c: c["annotations"][1].update(id=10**400), "expected an integer of 64 bits"),
    (lambda c: c["annotations"][1].update(category_id=55), "annotation 20 has 'category_id' 55"),
    (lambda c: c["annotations"][1].update(image_id=9), "annotation 20 has 'image_id' 9"),
    (lambda c: c["annotations"][1].update(id=10), "annotations has 2 records of 'id' 10"),
    (lambda c: c["images"][1].update(id=100), "images has 2 records of 'id' 100"),
    (lambda c: c["images"][1].update(file_name="gone.jpg"), "gone.jpg"),
    (lambda c: c["images"][1].update(width="wide"), "expected a number of pixels"),
    (lambda c: c["annotations"].clear(), "has no boxes to find"),
    (lambda c: [row.update(iscrowd=1) for row in c["annotations"]], "has no boxes to find"),
    (lambda c: c["annotations"][1].update(iscrowd="0"), "'iscrowd' '0', expected 0 or 1"),
    (lambda c: c["annotations"][1].update(area=-1), "'area' -1, expected a number within 0..1e10"),
    (lambda c: c["annotations"][1].update(area=None), "'area' None, expected a number"),
    (lambda c: c["categories"][0].update(name="cat"), "different classes: .*'cat'"),
])  # fmt: skip
def test_annotation_errors_name_file_and_field(coco, capsys, change, message):
    """What is wrong in an annotation file is found before work starts, and named."""
    coco(change)
    said = refused(capsys, 2, run_detect_with, f"--data={coco.root}")
    assert re.search(message, said) and str(coco.root) in said and len(said) < 400


def test_other_data_errors(coco, tmp_path, capsys):
    """No annotations, several, no JSON, a picture of another size than its annotations say, an unreadable picture."""
    for folder in (tmp_path, tmp_path / "nothing"):
        assert "instances_train" in refused(capsys, 2, run_detect_with, f"--data={folder}")
    Image.new("RGB", (9, 9)).save(coco.root / "train2017" / "2.jpg")
    train_set = detect.open_split(detect_flags(f"--data={coco.root}"), "train")
    with pytest.raises(DataError, match="2.jpg is 9 x 9 pixels as stored, its annotations say 74 x 70"):
        train_set[1]
    (coco.root / "train2017" / "3.jpg").write_text("no picture")
    with pytest.raises(DataError, match="3.jpg"):
        train_set[2]
    path = coco.root / "annotations" / "instances_train2017.json"
    path.write_text("{")
    assert "no JSON" in refused(capsys, 2, run_detect_with, f"--data={coco.root}")
    path.write_text("[" * 200_000 + "]" * 200_000)
    assert f"{path} is no JSON" in refused(capsys, 2, run_detect_with, f"--data={coco.root}")
    path.rename(path.with_name("instances_train_a.json"))
    path.with_name("instances_train_b.json").write_text("{}")
    assert "several files" in refused(capsys, 2, run_detect_with, f"--data={coco.root}")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_scene_stops_the_training(coco, tmp_path, capsys, workers):
    """The first training image that cannot be read ends the run with status 1 and one line that names it: none takes
    its place."""
    (coco.root / "train2017" / "3.jpg").write_text("no picture")
    options = (f"--data={coco.root}", "--batch-size=5", "--multi-scale=0", f"--workers={workers}")
    said = refused(capsys, 1, run_detect, tmp_path / "run", *options)
    assert said.count("\n") == 1 and f"cannot read image '{coco.root}/train2017/3.jpg'" in said


def test_augmentation_keeps_boxes_on_their_objects(coco):
    """The bright square stays in its box through crops, flips, colours and resizing; items follow from their keys."""
    train_set = detect.open_split(detect_flags(f"--data={coco.root}"), "train")
    data, kept = detect.Resized(train_set, detect.augmentation(True), seed=0), 0
    for epoch in range(10):
        item, again, other = data[epoch, 0, 64], data[epoch, 0, 64], data[epoch + 1, 0, 64]
        assert torch.equal(item["image"], again["image"]) and torch.equal(item["boxes"], again["boxes"])
        assert not torch.equal(item["image"], other["image"])
        assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.uint8
        for x1, y1, x2, y2 in item["boxes"].round().int().tolist():
            inside = item["image"][:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().amax(0)
            outside = item["image"].float().amax(0)
            outside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = 0
            if min(inside.shape) > 3:
                kept += 1
                assert inside.mean() > outside.max() - 60
    assert kept > 5
    empty = detect.make_item(torch.zeros(3, 9, 9, dtype=torch.uint8), [], [], 1)
    assert len(detect.augmentation(True)(empty)["boxes"]) == 0


def test_colours_change_as_cited():
    """RandomDistort: each of four changes in half of the images, hue by at most 18 of 255; channels
    are never exchanged. On (200, 40, 40) only a change of hue can make green and blue differ."""
    red = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    hues, unchanged, count = [], 0, 400
    torch.manual_seed(0)
    for _ in range(count):
        pixel = detect.augmentation(True)(detect.make_item(red, [], [], 1))["image"][:, 0, 0]
        unchanged += pixel.tolist() == [200, 40, 40]
        hue = colorsys.rgb_to_hsv(*(pixel / 255).tolist())[0]
        hues.append(min(hue, 1 - hue) * 255)
    assert 15 < max(hues) < 20
    assert 0.4 < sum(hue > 0 for hue in hues) / count < 0.55  # some changes are too small to see
    assert 1 / 40 < unchanged / count < 1 / 10  # 1 / 16


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=20)
def test_a_step_has_one_size_on_all_ranks(length, world, per_step, epoch):
    """Every rank draws the same side for the same step, from those allowed; and sides do vary."""
    order = dict(sides=[64, 96, 128], per_step=per_step, seed=3, multiple=world * per_step)
    steps = []
    for rank in range(world):
        sampler = detect.ScaleSampler(length, rank=rank, world=world, **order)
        sampler.epoch = epoch
        sides = [side for _, _, side in sampler]
        steps.append([sides[i : i + per_step] for i in range(0, len(sides), per_step)])
        assert all(len(set(step)) == 1 and step[0] in (64, 96, 128) for step in steps[-1])
    assert all(step == steps[0] for step in steps)


def test_sides_vary():
    """Over an epoch's steps, every allowed side is drawn."""
    sampler = detect.ScaleSampler(400, sides=[64, 96, 128], per_step=4, seed=0)
    assert {side for _, _, side in sampler} == {64, 96, 128}


def random_results(seed, images=12, classes=4):
    """A COCO ground truth with crowds, and results for it of every quality."""
    rng = np.random.default_rng(seed)
    truth, results = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 8)):
            x, y, w, h = rng.uniform(0, 200, 2).tolist() + np.exp(rng.uniform(1, 5.3, 2)).tolist()
            kind = int(rng.integers(1, classes + 1))
            truth.append(dict(id=len(truth) + 1, image_id=image, category_id=kind, bbox=[x, y, w, h], area=w * h * 0.8,
                              iscrowd=int(rng.random() < 0.1)))  # fmt: skip
            for _ in range(rng.integers(0, 3)):
                noise = rng.normal(0, 0.15, 4) * [w, h, w, h]
                box = [x + noise[0], y + noise[1], max(1, w + noise[2]), max(1, h + noise[3])]
                results.append(dict(image_id=image, category_id=kind, bbox=[float(v) for v in box], score=rng.random()))
    categories = [dict(id=i + 1, name=str(i)) for i in range(classes)]
    return dict(images=[dict(id=i) for i in range(images)], annotations=truth, categories=categories), results


@pytest.mark.parametrize("first", [0, -7, 2**70])
def test_annotation_ids_do_not_matter(first):
    """Any numbering of annotations gives the same metrics: the evaluators would take an id of 0 for "not matched"."""
    truth, results = random_results(1)
    renumbered = [row | dict(id=first + i) for i, row in enumerate(truth["annotations"])]
    assert detect.coco_metrics(truth | dict(annotations=renumbered), results) == detect.coco_metrics(truth, results)


@pytest.mark.parametrize("seed", range(5))
def test_both_coco_libraries_agree(seed):
    """faster-coco-eval and pycocotools give the same numbers."""
    faster, reference = pytest.importorskip("faster_coco_eval"), pytest.importorskip("pycocotools.cocoeval")
    from pycocotools.coco import COCO

    truth, results = random_results(seed)
    ours = detect.coco_metrics(truth, results, (faster.COCO, faster.COCOeval_faster))
    assert ours == pytest.approx(detect.coco_metrics(truth, results, (COCO, reference.COCOeval)), abs=1e-9)
    assert 0 < ours["AP"] < ours["AP50"] < 100


def test_evaluation_keeps_the_truth_of_the_file(coco, tmp_path):
    """A box without width, outside its image or of negative size is truth all the same: our numbers
    are those that pycocotools gives for the file as it is."""
    reference = pytest.importorskip("pycocotools.cocoeval")
    from pycocotools.coco import COCO

    coco(lambda c: c["annotations"].extend([
        dict(id=1, image_id=102, category_id=3, bbox=[5, 6, 0, 5], area=0, iscrowd=0),
        dict(id=2, image_id=103, category_id=7, bbox=[500, 60, 5, 5], area=25, iscrowd=0),
        dict(id=3, image_id=103, category_id=7, bbox=[9, 9, -5, 5], area=25, iscrowd=0),
    ]), "val")  # fmt: skip
    val_set = detect.open_split(detect_flags(f"--data={coco.root}"), "val")
    found = [dict(image_id=image, category_id=kind, bbox=[20, 10, 30, 30], score=0.9)
             for image, kind in ((101, 7), (102, 3), (103, 7))]  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(found))
    truth = COCO(coco.root / "annotations" / "instances_val2017.json")
    theirs = reference.COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    ours = detect.coco_metrics(val_set.ground_truth(), found)
    assert ours["AP"] == pytest.approx(100 * theirs.stats[0]) and 0 < ours["AP"] < 90
    assert ours["AP50"] == pytest.approx(100 * theirs.stats[1])


def test_metrics_at_their_ends():
    """The truth itself scores 100; nothing found scores 0; sizes of which there is none have no score."""
    truth, _ = random_results(1)
    perfect = [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=1.0)
               for a in truth["annotations"] if not a["iscrowd"]]  # fmt: skip
    assert detect.coco_metrics(truth, perfect)["AP"] == pytest.approx(100)
    assert detect.coco_metrics(truth, [])["AP"] == 0
    small = dict(truth, annotations=[dict(truth["annotations"][0], iscrowd=0, area=9.0)])
    assert detect.coco_metrics(small, [])["APl"] is None


def test_evaluation_restores_boxes(tmp_path):
    """A detector that answers with the truth, in the resized image's pixels, scores 100 on images of any shape."""

    class Oracle(nn.Module):
        def forward(self, images):
            i = round(float(images[0, 0, 0, 0] * 0.229 + 0.485) * 25.5) - 1
            boxes = torch.tensor([[3.0, 4, 20, 30], [30, 2, 60, 33]])
            boxes = boxes * torch.tensor([64 / (90 - 7 * i), 64 / (40 + 10 * i)] * 2)
            # A point in the middle of each box; a side is `far` strides of 8 px away, between two of the 8 bins.
            points = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, torch.full((2, 1), 8.0)], dim=1)
            far = torch.cat([points[:, :2] - boxes[:, :2], boxes[:, 2:] - points[:, :2]], dim=1) / 8
            bins = (1 - (far[..., None] - torch.arange(8)).abs()).clamp_min(0).log()
            return torch.tensor([[[3.0, -9], [-9, 3]]]), bins[None], points

    class Data(torch.utils.data.Dataset):
        classes = [dict(id=5, name="a"), dict(id=9, name="b")]

        def __len__(self):
            return 3

        def __getitem__(self, i):
            image = torch.full((3, 40 + 10 * i, 90 - 7 * i), 10 * i + 10, dtype=torch.uint8)
            return detect.make_item(image, [[3, 4, 20, 30], [30, 2, 60, 33]], [0, 1], 70 + i)

        def ground_truth(self):
            rows = [dict(id=2 * i + j + 1, image_id=70 + i, category_id=(5, 9)[j], bbox=b, area=b[2] * b[3], iscrowd=0)
                    for i in range(3) for j, b in enumerate(([3, 4, 17, 26], [30, 2, 30, 31]))]  # fmt: skip
            return dict(images=[dict(id=70 + i) for i in range(3)], annotations=rows, categories=self.classes)

    args = detect_flags("--image-size=64", "--batch-size=1", "--workers=0", f"--output={tmp_path}/out")
    metrics = detect.evaluate(Oracle(), detect.validation_loader(args, Data()), args, torch.device("cpu"))
    assert metrics["AP"] == pytest.approx(100)
    rows = json.loads((tmp_path / "out" / "coco_results_castled.json").read_text())
    found = sorted((row["image_id"], row["category_id"]) for row in rows)
    assert found == [(image, category) for image in (70, 71, 72) for category in (5, 9)]
    assert rows[0].keys() == {"image_id", "category_id", "bbox", "score"}


def test_detection_learning_rate():
    """Warm-up from a tenth, the peak scaled by the batch, a cosine to 0 over the whole run, step by step."""
    args = detect_flags("--data=somewhere")
    args.global_batch, args.warmup_steps = 1280, 300
    rate = lambda step: detect.learning_rate(args, step, 300_000)  # noqa: E731
    assert rate(0) == pytest.approx(0.08) and rate(150) == pytest.approx(0.44)
    assert rate(300) == pytest.approx(0.8, rel=1e-4)
    assert rate(150_000) == pytest.approx(0.4) and rate(299_999) == pytest.approx(0, abs=1e-9)
    assert (args.epochs, args.batch_size, args.ema_decay, args.ema_reset) == (300, 80, 0.9998, 40)


DETECT_SMALL = ("--image-size=64", "--shapes-length=40", "--batch-size=4", "--workers=0", "--epochs=2", "--max-steps=4")


def run_detect(folder, *options):
    """detect.py in this process, into `folder`; the log's records."""
    detect.main(detect.parser().parse_args([f"--output={folder}", *DETECT_SMALL, *options]))
    return records_of(folder)


def confident(checkpoint, path):
    """A detector's checkpoint, trained to be sure of anything: with few steps nothing else would be found at all."""
    state = convert.read_checkpoint(checkpoint)
    for level in range(4):
        state["ema"][f"head.predict.{level}.bias"] += 3
    torch.save(state, path)
    return path


def run_detect_with(*options):
    detect.main(detect.parser().parse_args(list(options)))


def test_detection_script(tmp_path, capsys):
    """A whole run on rendered scenes: its files, its log, its report; --eval finds what its model finds."""
    *epochs, report = run_detect(tmp_path / "run", "--ema-reset=1")
    printed = capsys.readouterr().out
    assert "castling gap          0.00 points of AP" in printed and "learning rate of 0.01 (1.6 per 640" in printed
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "lock", "log.jsonl", "last.pt", "best.pt", "castled.pt",
        "coco_results.json", "coco_results_castled.json",
    }  # fmt: skip
    (group,) = convert.read_checkpoint(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 4e-5 and group["momentum"] == 0.9  # of all parameters
    record = epochs[-1]
    assert {f"test_{name}" for name in detect.STATISTICS} <= record.keys() and "test_AP_castled" in record
    assert record["mask_curve"].keys() - {"step"} == record["mask_density"].keys() == {
        "backbone.blocks.3.1.attn", "backbone.blocks.5.1.attn",
    }  # fmt: skip
    assert report["castling_report"]["macs"]["castled"] < report["castling_report"]["macs"]["with branch"]
    sure = confident(tmp_path / "run" / "best.pt", tmp_path / "sure.pt")
    found = {}
    for split, images in (("val", 2), ("train", 40)):
        run_detect_with("--eval", f"--split={split}", f"--checkpoint={sure}", "--workers=0")
        folder = tmp_path / f"eval-shapes-{split}"
        found[split] = [json.loads((folder / f"coco_results{x}.json").read_text()) for x in ("", "_castled")]
        assert {row["image_id"] for row in found[split][0]} == set(range(images))
        assert found[split][0] == found[split][1] and len(found[split][0]) > images  # the masks are empty: no gap
        assert json.loads(capsys.readouterr().out)["castling_gap"] == 0
    # the castled weights alone, in another folder, and a branch that still holds something
    weights, names = convert.read_checkpoint(sure)["ema"], torch.load(tmp_path / "run" / "castled.pt").keys()
    torch.save({name: weights[name] for name in names}, tmp_path / "castled.pt")
    shape = ("--data=shapes", "--image-size=64", "--shapes-length=40", "--workers=0")
    run_detect_with("--eval", f"--checkpoint={tmp_path}/castled.pt", f"--output={tmp_path}/alone", *shape)
    assert json.loads((tmp_path / "alone" / "coco_results_castled.json").read_text()) == found["val"][0]
    whole = ("--epsilon=0", "--mask-schedule=fixed")  # a mask that keeps everything
    run_detect_with("--eval", f"--checkpoint={sure}", f"--output={tmp_path}/branch", "--workers=0", *whole)
    hybrid, castled = ((tmp_path / "branch" / f"coco_results{x}.json").read_text() for x in ("", "_castled"))
    assert hybrid != castled


def test_detection_draws_and_prints(tmp_path, capsys):
    """--image draws images, upright, each in its size; --json prints classes, scores and boxes."""
    run_detect(tmp_path / "run", "--max-steps=1")
    sure = confident(tmp_path / "run" / "best.pt", tmp_path / "sure.pt")
    photos = [tmp_path / name for name in ("a.png", "b.jpg", "c.png")]
    for i, path in enumerate(photos):
        image = Image.fromarray(detect.SceneBoxes("val", 5, 90).scene(i).image[: 90 - 20 * i])
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 1 else 1  # turned by a quarter
        image.save(path, exif=exif)
    a, b, c = map(str, photos)
    common = [f"--checkpoint={sure}", "--min-score=0.1", "--image"]
    capsys.readouterr()
    run_detect_with(*common, a, b, c, f"--output={tmp_path}/drawn")
    assert capsys.readouterr().out.count("drawn to") == 3
    drawn = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "drawn").iterdir()}
    assert {name: image.shape for name, image in drawn.items()} == {
        "a.png": (90, 90, 3), "b.png": (90, 70, 3), "c.png": (50, 90, 3),
    }  # fmt: skip
    assert (drawn["a.png"] != np.asarray(Image.open(a))).any()
    run_detect_with(*common, c, f"{tmp_path}/drawn/c.png", "--json")  # of one name, but nothing is drawn
    found = json.loads(capsys.readouterr().out)
    assert [one["image"] for one in found] == [c, f"{tmp_path}/drawn/c.png"]
    assert found[0]["boxes"][0].keys() == {"label", "score", "box"}
    assert all(box["label"] in SHAPES and box["box"][3] <= 50 for box in found[0]["boxes"])
    run_detect_with(*common, a, "--min-score=1", f"--output={tmp_path}/none.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "none.png")), np.asarray(Image.open(a)))
    (tmp_path / "d.png").write_text("no picture")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:  # the rest is printed, the failure too
        run_detect_with(*common, a, f"{tmp_path}/d.png", b, "--json")
    streams = capsys.readouterr()
    assert stopped.value.code == 1 and len(json.loads(streams.out)) == 2 and "d.png" in streams.err
    for images, output, message in (
        ((a, c), "", "would overwrite"),
        ((a, c), "d.png", "is a file"),
        ((a,), "drawn", "no image file in an existing folder"),
        ((a,), "nowhere/x.png", "no image file in an existing folder"),
        ((str(tmp_path),), "x.png", "no image file"),
    ):
        assert message in refused(capsys, 2, run_detect_with, *common, *images, f"--output={tmp_path}/{output}")


def test_average_starts_anew(tmp_path):
    """Every --ema-reset epochs the average of weights is set to the current ones: it is over the steps since then.
    Where each epoch has a single step and starts anew, the average is the weights themselves."""
    run_detect(tmp_path / "run", "--max-steps=8", "--epochs=4", "--shapes-length=8", "--eval-every=9", "--ema-reset=2")
    assert convert.read_checkpoint(tmp_path / "run" / "last.pt")["ema_updates"] == 4
    for reset in (1, 0):
        run_detect(tmp_path / str(reset), "--shapes-length=4", "--eval-every=9", f"--ema-reset={reset}")
        state = convert.read_checkpoint(tmp_path / str(reset) / "last.pt")
        same = [torch.equal(state["model"][name], x) for name, x in state["ema"].items() if name.endswith("weight")]
        assert all(same) == (reset == 1) and len(same) > 100


@pytest.mark.parametrize("options", [
    ("--model=esnet_vit_s", "--amp", "--accumulate=2", "--multi-scale=1"),
    ("--attention=softmax", "--no-channels-last", "--augment"),
    ("--attention=relu_e", "--dconv=0", "--mlp-dwconv=0", "--clip-grad=1"),
    ("--model=lcnet_s",),
])  # fmt: skip
def test_every_detection_option_trains(tmp_path, options):
    """Each combination runs to its report; a model without a branch reports no gap."""
    *_, report = run_detect(tmp_path, "--max-steps=2", *options)
    assert ("castling_gap" in report["castling_report"]) == any("esnet" in option for option in options)


def test_detection_on_coco_files(coco, tmp_path, capsys):
    """A COCO folder with classes of its own, from a classification checkpoint; its classes are in the checkpoint."""
    torch.save(build_model("lcnet_vit_s", num_classes=5).state_dict(), tmp_path / "backbone.pt")
    run = (f"--data={coco.root}", "--batch-size=2", f"--backbone={tmp_path}/backbone.pt", "--multi-scale=0")
    *_, report = run_detect(tmp_path / "run", *run)
    assert "ignored: classifier.bias" in capsys.readouterr().out and report["castling_report"]["castling_gap"] == 0
    (tmp_path / "backbone.pt").unlink()
    run_detect(tmp_path / "run", *run)  # complete: its first weights are no longer asked for
    assert "resumed" in capsys.readouterr().out
    run_detect(tmp_path / "shapes", f"--checkpoint={tmp_path}/run/best.pt", "--max-steps=1")  # other classes
    assert "new: head.predict.*.bias x 4, head.predict.*.weight x 4" in capsys.readouterr().out
    classes = [dict(id=3, name="owl"), dict(id=7, name="kite")]
    assert convert.read_checkpoint(tmp_path / "run" / "best.pt")["classes"] == classes
    common = (f"--checkpoint={tmp_path}/run/best.pt", "--eval", f"--output={tmp_path}/e")
    assert "knows 2 classes" in refused(capsys, 2, run_detect_with, *common, "--data=shapes")


@pytest.mark.parametrize(("options", "message"), [
    (("--model=lcnet_vit_x",), "lcnet_vit_s"),
    (("--data=nowhere",), "unknown data 'nowhere'"),
    (("--image-size=64", "--multi-scale=2"), "at least 96 with --multi-scale 2, got 64"),
    (("--batch-size=1",), "--batch-size 2 or more"),
    (("--image=x.png",), "need --checkpoint"),
    (("--eval", "--checkpoint=gone.pt"), "no checkpoint file gone.pt"),
])  # fmt: skip
def test_detection_arguments_are_checked(tmp_path, capsys, options, message):
    """Wrong arguments end with status 2 and say what is wrong, before work starts."""
    with pytest.raises(SystemExit) as stopped:
        run_detect(tmp_path / "x", *options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_detection_trains_on_two_processes(tmp_path, capsys):
    """Two processes share data and metrics: one log, one gradient; every image is evaluated once over both."""
    common = [*DETECT_SMALL, "--batch-size=2", f"--output={tmp_path}/two"]
    assert in_group(2, lambda rank: run_detect_with(*common)) == [0, 0]
    records = records_of(tmp_path / "two")
    assert len(records) == 2 and records[0]["step"] == 4
    sure = confident(tmp_path / "two" / "best.pt", tmp_path / "sure.pt")
    common = ["--eval", f"--checkpoint={sure}", "--workers=0"]
    assert in_group(2, lambda rank: run_detect_with(*common, f"--output={tmp_path}/by-two")) == [0, 0]
    run_detect_with(*common, f"--output={tmp_path}/by-one")
    one, two = (json.loads((tmp_path / name / "coco_results.json").read_text()) for name in ("by-one", "by-two"))
    assert len(one) == len(two) > 2
    for a, b in zip(one, two, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])


def test_checkpoints_know_their_script(tmp_path, capsys):
    """A classifier's checkpoint is no detector's, and the other way round; a classifier's backbone is."""
    run_train(tmp_path / "c", "--model=lcnet_vit_s", "--max-steps=1")
    *_, report = run_detect(tmp_path / "d", "--max-steps=1", f"--backbone={tmp_path}/c/best.pt")
    assert "castling_report" in report
    for module, folder, other in ((detect, "c", "train.py"), (train, "d", "detect.py")):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            module.main(module.parser().parse_args(["--eval", f"--checkpoint={tmp_path}/{folder}/best.pt"]))
        assert f"is a checkpoint of {other}" in capsys.readouterr().err


# ---- flops.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table_2():
    """The rows of `flops.py --table 2`: the models are built and counted once."""
    return flops.table_2()


def test_macs_of_table_2(table_2):
    """The integers behind Table 2, counted on the built model in the paper's convention (k^T v first): softmax, and
    castling with softmax (C1) and with linear-angular (C2) down-sampling blocks."""
    counted = {}
    for row in table_2:
        counted.setdefault(row["model"], {})[row["note"][:2] or row["attention"]] = round(1e9 * row["macs_g"])
    softmax = {name: counted[name].pop("softmax") for name in counted if not name.startswith("levit")}
    assert softmax == {
        "deit_tiny": 1_253_683_200, "deit_base": 17_563_828_224, "mvitv2_tiny": 4_676_957_952,
        "mvitv2_small": 6_959_715_072, "mvitv2_base": 10_102_438_656,
    }  # fmt: skip
    assert {name: [row[kind] for kind in ("castling", "C1", "C2") if kind in row] for name, row in counted.items()} == {
        "deit_tiny": [1_182_192_384], "deit_base": [17_277_864_960],
        "levit128": [494_267_904, 486_546_432], "levit192": [816_755_968, 812_338_432],
        "levit256": [1_402_291_200, 1_396_401_152], "levit384": [2_921_738_752, 2_912_371_712],
        "mvitv2_tiny": [4_493_313_792, 4_265_978_880], "mvitv2_small": [6_722_332_416, 6_494_997_504],
        "mvitv2_base": [9_780_760_320, 9_553_425_408],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "size", "macs"), [
    ("esnet_s", 320, 366_654_666), ("esnet_m", 416, 1_251_956_924), ("esnet_l", 416, 1_883_331_078),
])  # fmt: skip
def test_macs_of_picodet(name, size, macs):
    """PicoDet as published, to the last digit of mmcv's counter."""
    with torch.device("meta"):
        model, image = detect.build_detector(name), torch.empty(1, 3, size, size)
    assert flops.count(model, image, convention="paper-det").macs == macs


def test_detection_tables(capsys):
    """Tables 3, 6 and 7 as recovered: the paper's convention and pure MACs, in G to four digits; every row is within
    4% of what the paper prints."""

    def table(number):
        flops.main(flops.parser().parse_args([f"--table={number}", "--json"]))
        rows = json.loads(capsys.readouterr().out)
        assert all(abs(r["macs_g"] / r["paper_macs_g"] - 1) < 0.04 for r in rows)
        return [(round(r["params_m"], 4), round(r["macs_g"], 4), round(r["pure_macs_g"], 4)) for r in rows]

    assert table(3) == [
        (3.2526, 0.6178, 0.6013), (3.2526, 0.6024, 0.5859), (3.2526, 1.0624, 1.0344), (3.2526, 1.0185, 0.9906),
        (6.0141, 2.0006, 1.9582), (6.0141, 1.9422, 1.8997), (9.3190, 3.0298, 2.9779), (9.3190, 2.9567, 2.9048),
        (13.1001, 5.3060, 5.2284), (13.1830, 5.3341, 5.2544),
    ]  # fmt: skip
    lin, dw = (2.1395, 0.6215, 0.6018), (2.1397, 0.6225, 0.6029)
    assert table(6) == [(1.1020, 0.4775, 0.4564), (2.1395, 0.6851, 0.6654), lin, dw, dw, (2.1708, 0.6288, 0.6086)]
    lin, dw = (7.5330, 3.1501, 3.0902), (7.5333, 3.1536, 3.0937)
    assert table(7) == [(3.3199, 2.1462, 2.0815), (7.5330, 3.5075, 3.4477), lin, dw, dw, (7.5955, 3.1746, 3.1132)]


def attention_macs(kernel, heads, tokens, key_dim, value_dim):
    """Products of q, k and v in closed form: N^2 (D + E) per head, or 2 N D E where k^T v comes first."""
    if kernel in ("softmax", "angular"):
        return heads * tokens**2 * (key_dim + value_dim)
    sums = key_dim if kernel == "relu_e" else 0  # its rows' sums
    return 0 if kernel == "identity" else heads * tokens * (2 * key_dim * value_dim + sums)


@given(st.sampled_from(sorted(KERNELS)), st.integers(1, 3), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24))
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
    assert run.count_macs(build_model("deit_tiny", "softmax").eval(), torch.zeros(1, 3, 224, 224)) == 1_253_683_200


def test_strict_counting_refuses_the_unknown():
    """An operation without a count is an error that names it, never a silent 0; unless asked for."""
    fourier = Calls(lambda x: torch.fft.fft(x).real)
    with pytest.raises(ValueError, match="fft"):
        flops.count(fourier, torch.zeros(8))
    assert flops.count(fourier, torch.zeros(8), strict=False).macs == 0
    from torchvision.ops import deform_conv2d

    deformed = Calls(lambda x: deform_conv2d(x, torch.zeros(1, 18, 4, 4), torch.zeros(2, 2, 3, 3), padding=1))
    with pytest.raises(ValueError, match="deform_conv2d"):
        flops.count(deformed, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="paper-cls"):
        flops.count(fourier, torch.zeros(8), convention="paper_cls")


def test_conventions_add_their_terms():
    """paper-det: conv bias, 2 per normalised element, 1 per ReLU, the input of a pool; fvcore-like: norms only."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.LayerNorm(4))
    x = torch.zeros(1, 2, 8, 8)
    conv, elements, pooled = 4 * 64 * 18, 4 * 64, 4 * 16
    assert flops.count(model, x).macs == flops.count(model, x, convention="paper-cls").macs == conv
    extra = elements + 2 * elements + elements + elements + 2 * pooled
    assert flops.count(model, x, convention="paper-det").macs == conv + extra
    assert flops.count(model, x, convention="fvcore-like").macs == conv + 2 * elements + 5 * pooled


@pytest.mark.parametrize("family", FAMILIES)
def test_branch_and_parts_are_counted(family):
    """Hybrid less castled is the branch's softmax attention in every layer; modules add up; the mode of each module
    and the mask statistics are left alone."""
    model = tiny(family, image_size=96).train()
    x = torch.zeros(1, 3, 96, 96)
    with figures.captured(model) as seen:  # shapes as the cores see them
        model.eval()(x)
    frozen = list(model.train().modules())[-1].eval()
    before = attention.mask_statistics(model)
    whole, castled = flops.count(model, x), flops.count(castle(copy.deepcopy(model)), x)
    flops.peak_activation_bytes(model, x)
    assert model.training and not frozen.training and attention.mask_statistics(model) == before
    sizes = [(*q.shape[1:], v.shape[-1]) for q, _, v in seen.values()]
    branch = sum(attention_macs("softmax", h, n, d, e) for h, n, d, e in sizes)
    assert whole.macs - castled.macs == branch == whole.attention - castled.attention
    assert castled.by_module[""] == castled.macs
    assert castled.params == parameters(model) and castled.params_weights == weights_only(model)


def test_peak_memory_is_the_live_maximum():
    """Two (8, 8) float64 results alive at once, a third made after one is dropped; a softmax's N x N matrix counts."""
    def three(x):
        y = x + 1
        z = y * 2
        del y
        return z - 1

    assert flops.peak_activation_bytes(Calls(three), torch.zeros(8, 8, dtype=torch.float64)) == 2 * 8 * 8 * 8
    x = torch.zeros(1, 2, 512, 8, device="meta")
    with torch.device("meta"):
        small, large, fused = AttentionCore(2), AttentionCore(2, "angular"), AttentionCore(2, "softmax")
    assert flops.peak_activation_bytes(fused, x, x, x) == 4 * x.numel()  # fused: its output alone
    assert flops.peak_activation_bytes(large, x, x, x) > 2 * 512 * 512 * 4 > flops.peak_activation_bytes(small, x, x, x)


def test_tables_are_printed(table_2, capsys, monkeypatch):
    """--table and --json give every row with the promised keys, within its known deviation; bad names, and flags that
    would have no effect, exit with 2."""
    monkeypatch.setitem(flops.TABLES, 2, lambda: table_2)
    keys = {"model", "attention", "params_m", "macs_g", "paper_params_m", "paper_macs_g", "note"}
    for table, rows, worst in ((1, 6, 0.001), (2, 25, 0.067)):
        flops.main(flops.parser().parse_args([f"--table={table}", "--json"]))
        printed = json.loads(capsys.readouterr().out)
        assert len(printed) == rows and all(set(r) == keys for r in printed)
        assert all(abs(r["macs_g"] / r["paper_macs_g"] - 1) < worst for r in printed)
    flops.main(flops.parser().parse_args(["--table=2"]))
    assert "17.2779" in capsys.readouterr().out
    flops.main(flops.parser().parse_args(["--image-size=64", "--attention=castling,softmax,cosine"]))
    assert "auxiliary branch" in capsys.readouterr().out
    monkeypatch.setattr(flops, "CURVE_PIXELS", (64, 1024))
    flops.main(flops.parser().parse_args(["--curve", "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["castling_macs_g"] > rows[0]["softmax_macs_g"]  # 4 x 4 tokens: the DWConvs cost more than they save
    assert rows[-1]["castling_macs_g"] < 0.3 * rows[-1]["softmax_macs_g"]
    for flags, named in (
        ("--model=levit_128", "levit128"),
        ("--table=2 --model=levit128", "--model"),
        ("--table=2 --curve", "--curve"),
        ("--curve --image-size=64", "--image-size"),
        ("--model=lcnet_s --image-size=0", "0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            flops.main(flops.parser().parse_args(flags.split()))
        assert stopped.value.code == 2 and named in capsys.readouterr().err.split("got")[-1]


# ---- segment.py ------------------------------------------------------------------------------------------------------

DECODERS = list(segment.PIXEL_DECODERS)


def tiny_segmenter(attention="castling", pixel_decoder="fpn_transformer", num_classes=5, seed=0, **options):
    """A small segmenter for 5 classes, in eval mode; constants shaken, so that nothing is zero by accident."""
    torch.manual_seed(seed)
    small = dict(dim=32, depth=2, patch_size=8, width=64, heads=4, queries=6, layers=4, encoder_layers=1, image_size=32)
    model = segment.build_segmenter("vit_mini", attention, num_classes, pixel_decoder, **(small | options))
    return shaken(model).eval()


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


def test_table_4_is_printed(capsys):
    """Whole model and backbone, both attentions and pixel decoders; the default decoder's rows are within 0.35%."""
    flops.main(flops.parser().parse_args(["--table=4", "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8 and all("512 x 704" in r["note"] or "backbone" in r["model"] for r in rows)
    for r in rows[:4]:
        assert abs(r["macs_g"] / r["paper_macs_g"] - 1) < 0.0023
        assert r["paper_params_m"] is None or abs(r["params_m"] / r["paper_params_m"] - 1) < 0.0035
    flops.print_rows(rows)
    assert "194.7337" in capsys.readouterr().out


def test_dense_vit_equals_timm(tmp_path):
    """Softmax: the last block's features of timm's ViT without class token, from a file with one, at another size."""
    timm = pytest.importorskip("timm")
    shape = dict(patch_size=8, embed_dim=32, depth=2, num_heads=4, img_size=(40, 56), num_classes=0)
    theirs = timm.models.vision_transformer.VisionTransformer(**shape, class_token=False, global_pool="avg").eval()
    shaken(theirs)
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc_norm")}
    weights["pos_embed"] = torch.cat([torch.randn(1, 1, 32), weights["pos_embed"]], dim=1)
    torch.save(weights | {"cls_token": torch.zeros(1, 1, 32)}, tmp_path / "vit.pth")
    ours = build_model("vit_mini_dense", "softmax", image_size=(40, 56), dim=32, depth=2, patch_size=8).eval()
    report = load_pretrained(ours, tmp_path / "vit.pth")
    assert not report.new and "cls_token" in report.ignored
    x = randn(2, 3, 40, 56, dtype=torch.float32)
    expected = theirs.forward_intermediates(x, norm=False, intermediates_only=True)[-1]
    assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", sorted(models.ATTENTIONS))
def test_dense_vit_takes_any_size_and_attention(kernel):
    """(B, C, ceil(H / p), ceil(W / p)) for any image; the MLP's DWConv has a bias and starts as the identity."""
    torch.manual_seed(0)
    model = build_model("vit_mini_dense", kernel, image_size=32, dim=16, depth=1, patch_size=8).eval()
    assert model(torch.zeros(2, 3, 30, 65)).shape == (2, 16, 4, 9)
    conv = model.blocks[0].mlp.dwconv
    assert (conv is None) == (kernel == "softmax")
    if conv is not None:
        x = randn(1, 15, 64, dtype=torch.float32)
        assert conv.bias.shape == (64,) and conv.kernel_size == (3, 3) and torch.equal(conv(x, (3, 5)), x)
    with pytest.raises(SystemExit):
        train.main(train.parser().parse_args(["--model=vit_tiny_dense"]))


def test_mae_files_load_into_the_backbone(tmp_path):
    """Encoder files and files with decoder: class token, final norm and decoder are left out, positions resampled by
    plain bicubic, pyramid, decoders and DWConvs new; anything else is an error. A segmenter's file loads whole."""
    donor = build_model("vit_mini_dense", "softmax", image_size=56, dim=32, depth=2, patch_size=8)
    weights = shaken(donor).state_dict() | {"cls_token": torch.zeros(1, 1, 32)}
    weights |= {f"norm.{name}": torch.ones(32) for name in ("weight", "bias")}
    full = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 50, 8),
            "decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pred.bias": torch.ones(3)}  # fmt: skip
    for extra in ({}, full):
        torch.save({"model": weights | extra}, tmp_path / "mae.pth")
        model = tiny_segmenter(image_size=(40, 64))
        report = segment.load_start(model, tmp_path / "mae.pth")
        assert set(report.ignored) == {"cls_token", "norm.weight", "norm.bias", *extra}
        assert report.resized == ["backbone.vit.pos_embed"]
        old = donor.pos_embed[:, 1:].unflatten(1, (7, 7)).permute(0, 3, 1, 2)
        new = F.interpolate(old, size=(5, 8), mode="bicubic", align_corners=False).flatten(2).mT
        assert_close(model.backbone.vit.pos_embed[:, 1:], new)
        assert torch.equal(model.backbone.vit.blocks[1].attn.qkv.weight, donor.blocks[1].attn.qkv.weight)
        kinds = {re.sub(r"\.\d+\.", ".", name) for name in report.new if name.startswith("backbone.vit.")}
        assert kinds == {f"backbone.vit.blocks.{part}" for part in ("attn.dconv.weight", "mlp.dwconv.weight",
                                                                   "mlp.dwconv.bias")}  # fmt: skip
        rest = {name for name in model.state_dict() if not name.startswith("backbone.vit.")}
        assert rest <= set(report.new)
        assert len(report.loaded + report.resized + report.new) == len(castle(model).state_dict())
    torch.save({"model": weights | {"surprise.weight": torch.zeros(1)}}, tmp_path / "odd.pth")
    del weights["blocks.1.norm2.bias"]
    torch.save({"model": weights}, tmp_path / "short.pth")
    for name, message in (("odd", "unknown surprise.weight"), ("short", "missing blocks.1.norm2.bias")):
        with pytest.raises(ValueError, match=message):
            segment.load_start(tiny_segmenter(), tmp_path / f"{name}.pth")
    deit = tiny("deit", dim=32, heads=4, patch_size=8)  # castling, its DWConvs are 5x5 and have no bias
    torch.save(deit.state_dict(), tmp_path / "deit.pt")
    report = segment.load_start(tiny_segmenter(mlp_dwconv=5), tmp_path / "deit.pt")
    assert {name for name in report.new if ".vit." in name} == {
        f"backbone.vit.blocks.{i}.mlp.dwconv.bias" for i in range(2)
    }  # fmt: skip
    other = tiny_segmenter(image_size=64, seed=1)
    torch.save(other.state_dict(), tmp_path / "whole.pt")
    report = segment.load_start(model, tmp_path / "whole.pt")
    assert report.resized == ["backbone.vit.pos_embed"] and not report.new
    assert torch.equal(model.decoder.class_head.weight, other.decoder.class_head.weight)


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([4, 8, 12]))
@settings(max_examples=15)
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


def bilinear(value, x, y):
    """A map (D, H, W) at the point (x, y) in 0..1 of its width and height; 0 beyond its edges."""
    height, width = value.shape[1:]
    x, y, result = x * width - 0.5, y * height - 0.5, 0
    for column in (math.floor(x), math.floor(x) + 1):
        for row in (math.floor(y), math.floor(y) + 1):
            if 0 <= column < width and 0 <= row < height:
                result = result + (1 - abs(x - column)) * (1 - abs(y - row)) * value[:, row, column]
    return result


@given(st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=15)
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


def test_deformable_attention_looks_where_it_says():
    """Offsets are pixels of their map, softmax runs over all levels and points, tokens refer to their own centres;
    initially head m looks 1, 2, 3, 4 pixels along its own of 8 directions, with equal weights."""
    grids = [(2, 3), (4, 5)]
    layer = segment.DeformableAttention(16, heads=8, levels=2, points=4).double()
    start = layer.offsets.bias.view(8, 2, 4, 2)
    for m, way in enumerate([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]):
        for p in range(4):
            expected = torch.tensor(way).expand(2, 2).double() * (p + 1)
            assert_close(start[m, :, p], expected, atol=1e-5, rtol=0)
    references = segment.reference_points(grids, torch.zeros((), dtype=torch.float64))
    tokens = [(rows, columns, y, x) for rows, columns in grids for y in range(rows) for x in range(columns)]
    assert_close(references, torch.tensor([((x + 0.5) / w, (y + 0.5) / h) for h, w, y, x in tokens]).double())
    layer = shaken(layer, std=0.3)
    query, x = randn(2, 2, 26, 16)
    result = layer(query, x, references, grids)
    offsets = layer.offsets(query).view(2, 26, 8, 2, 4, 2)
    weights = layer.weights(query).view(2, 26, 8, 8).softmax(-1).view(2, 26, 8, 2, 4)
    places = torch.stack([
        references[None, :, None, None] + offsets[..., level, :, :] / torch.tensor([w, h])
        for level, (h, w) in enumerate(grids)
    ], dim=3)  # fmt: skip
    sampled = segment.sample_levels(layer.value(x).view(2, 26, 8, 2), grids, places, weights)
    assert_close(result, layer.out(sampled))


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


def pyramid_maps(width=64, seed=0):
    """Maps of two images, finest first, float64, not square."""
    return [randn(2, width, 3 * s, 2 * s, seed=seed + s) for s in (8, 4, 2, 1)]


def test_fpn_transformer_is_its_definition():
    """float64: the encoder's queries and keys have positions, its values none; every finer map is added to the nearest
    neighbour of the coarser; levels come out coarsest first."""
    decoder = shaken(segment.FPNTransformer(64, heads=4, layers=2).double())
    maps = pyramid_maps()
    mask_features, levels = decoder(maps)
    x = decoder.input(maps[3]).flatten(2).mT
    place = segment.sine_positions((3, 2), 64).double()
    for layer in decoder.encoder:
        x = torch.stack([layer.norm1(t + slow_attention(layer.attn, t + place, t + place, t)) for t in x])
        x = layer.norm2(x + layer.ffn[2](layer.ffn[0](x).relu()))
    y = decoder.output[0](x.mT.unflatten(2, (3, 2))).relu()
    expected = [y]
    for i in range(3):
        y = y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        y = decoder.output[i + 1](decoder.lateral[i](maps[2 - i]) + y).relu()
        expected.append(y)
    for ours, theirs in zip([*levels, mask_features], [*expected[:3], decoder.mask_features(y)], strict=True):
        assert_close(ours, theirs)


def test_deformable_encoder_is_its_definition():
    """float64: strides 32, 16, 8 in this order, positions and level embeddings on queries only, the finest map added to
    the bilinear enlargement of the encoder's finest; levels are the encoder's outputs."""
    decoder = shaken(segment.DeformableEncoder(64, heads=4, layers=2).double())
    maps = pyramid_maps()
    mask_features, levels = decoder(maps)
    inputs = [conv(x) for conv, x in zip(decoder.input, maps[:0:-1], strict=True)]
    grids = [tuple(x.shape[2:]) for x in inputs]
    assert grids == [(3, 2), (6, 4), (12, 8)] == [tuple(level.shape[2:]) for level in levels]
    x = torch.cat([level.flatten(2).mT for level in inputs], dim=1)
    place = torch.cat([segment.sine_positions(g, 64) + e for g, e in zip(grids, decoder.level_embed, strict=True)])
    for layer in decoder.encoder:
        x = layer.norm1(x + layer.attn(x + place, x, segment.reference_points(grids, x), grids))
        x = layer.norm2(x + layer.ffn[2](layer.ffn[0](x).relu()))
    assert_close(torch.cat([level.flatten(2).mT for level in levels], dim=1), x)
    up = F.interpolate(levels[2], scale_factor=2, mode="bilinear", align_corners=False)
    assert_close(mask_features, decoder.mask_features(decoder.output(decoder.lateral(maps[0]) + up).relu()))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=30)
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
    cost = torch.zeros(queries, count, dtype=torch.float64)
    for q, n in np.ndindex(queries, count):
        s = x[q].sigmoid()
        bce = -(t[n] * s.log() + (1 - t[n]) * (1 - s).log()).mean()
        dice = 1 - (2 * (s * t[n]).sum() + 1) / (s.sum() + t[n].sum() + 1)
        cost[q, n] = 5 * bce + 5 * dice - 2 * classes[q].softmax(0)[labels[n]]
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


def pixel_centres(height, width):
    """A stand-in for random points: all centres of a map, the same for every mask."""
    like = torch.zeros((), dtype=torch.float64)
    return lambda masks, points, device: segment.reference_points([(height, width)], like).expand(masks, -1, 2)


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
    places = segment.uncertain_points(torch.stack([ramp, ramp.T]), 400)
    assert places.shape == (2, 400, 2) and places.min() >= 0 and places.max() < 1
    for i, mask in enumerate((ramp, ramp.T)):
        certainty = segment.sample(mask[None, None], places[i : i + 1])[0, 0].abs()
        assert certainty[:300].max() < 1.3  # a quarter of the range 0..4, and some
        assert certainty[300:].max() > 3 and (certainty[300:] > 2).float().mean() > 0.3


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


@pytest.mark.parametrize("pixel_decoder", DECODERS)
@pytest.mark.parametrize("empty", [(1,), (0, 1)])
def test_images_without_labels_train(pixel_decoder, empty):
    """One image, or all, with nothing but ignored pixels: the loss is finite and every parameter has a finite gradient,
    as DistributedDataParallel requires."""
    model = tiny_segmenter(pixel_decoder=pixel_decoder).train()
    labels = torch.randint(0, 5, (2, 40, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels[list(empty)] = segment.IGNORE
    targets = segment.targets_of(labels, labels.shape[1:])
    images = randn(2, 3, 40, 64, dtype=torch.float32)
    num_masks = segment.mean_masks(targets, torch.device("cpu"))
    assert num_masks == (5 if empty == (1,) else 1)
    loss = segment.set_loss(model(images), targets, num_masks, 50)
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


@given(st.integers(0, 10**6))
@settings(max_examples=10)
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
@settings(max_examples=25)
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
@settings(max_examples=20)
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


@pytest.mark.parametrize("pixel_decoder", DECODERS)
@pytest.mark.parametrize("amp", [False, True])
def test_any_size_trains_and_infers(pixel_decoder, amp):
    """Sizes that are no multiple of the pyramid's stride are padded, in training too; an image alone is segmented as in
    a batch; bfloat16 autocast stays finite, with masks in float32."""
    args = segment.parser().parse_args(["--amp" if amp else "--no-amp"])
    model = tiny_segmenter(pixel_decoder=pixel_decoder, width=96)
    labels = torch.randint(0, 5, (2, 45, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = torch.randint(0, 256, (2, 3, 45, 70), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    device = torch.device("cpu")
    with segment.autocast(args, device):
        outputs = model.train()(segment.to_model_input(images, device))
    assert all(masks.shape == (2, 6, 24, 40) and masks.dtype == torch.float32 for _, masks in outputs)
    loss = segment.set_loss(outputs, segment.targets_of(labels, labels.shape[1:]), 5.0, 64)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    with torch.inference_mode():
        both = segment.segment(model, images, (90, 33), args, device)
        alone = segment.segment(model, images[1:], (90, 33), args, device)
    assert both.shape == (2, 90, 33) and both.min() >= 0 and both.max() < 5
    assert (both[1] != alone[0]).float().mean() < (0.05 if amp else 0.001)


def test_segmenter_names_and_options_are_checked():
    """Unknown names and sizes that do not fit are ValueErrors that name what is known."""
    cases = [
        (dict(name="vit_bse"), "vit_base"), (dict(pixel_decoder="msdeformable"), "msdeform"), (dict(width=48), "width"),
        (dict(attention="softmx"), "softmax"), (dict(num_classes=256), "num_classes"), (dict(layers=0), "layers"),
        (dict(patch_size=6), "patch_size"), (dict(patch_size=0), "patch_size"), (dict(heads=0), "heads"),
        (dict(depht=3), "depth"), (dict(queries=0), "queries"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises(ValueError, match=message), torch.device("meta"):
            segment.build_segmenter(**options)


@pytest.mark.parametrize("pixel_decoder", DECODERS)
def test_a_norm_has_more_than_one_number(tmp_path, capsys, pixel_decoder):
    """GroupNorm of one channel a group (width 32) on a coarsest map of one pixel (image as large as
    two patches) fails in evaluation: refused at the start. A larger image or width runs."""
    options = (f"--pixel-decoder={pixel_decoder}", "--width=32", "--patch-size=16", "--max-steps=1")
    with pytest.raises(SystemExit) as stopped:
        run_segment(tmp_path / "no", *options, "--image-size=32")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and not (tmp_path / "no").exists()
    assert "--width 32 with --patch-size 16 needs an --image-size above 32" in said
    run_segment(tmp_path / "yes", *options, "--image-size=48")
    run_segment(tmp_path / "wider", *options, "--image-size=32", "--width=64")


def test_segmentation_recipe():
    """Norms, embeddings and positions do not decay, everything else does; the pyramid belongs to the backbone; the rate
    falls as (1 - t) ** 0.9 without warm-up and scales with the batch."""
    model = tiny_segmenter(pixel_decoder="msdeform")
    groups = segment.parameter_groups(model, 0.05, 0.1)
    of = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(of) == len(named) == sum(len(group["params"]) for group in groups)
    for name, expected in {
        "backbone.vit.pos_embed": (0.1, 0), "backbone.vit.blocks.0.norm1.weight": (0.1, 0),
        "backbone.vit.blocks.0.attn.qkv.bias": (0.1, 0.05), "backbone.pyramid.0.0.weight": (0.1, 0.05),
        "backbone.pyramid.0.1.bias": (0.1, 0), "pixel_decoder.lateral.1.weight": (1, 0),
        "pixel_decoder.level_embed": (1, 0.05), "decoder.query_embed.weight": (1, 0), "decoder.norm.weight": (1, 0),
        "decoder.layers.0.cross.in_proj_weight": (1, 0.05), "decoder.class_head.bias": (1, 0.05),
    }.items():  # fmt: skip
        assert of[id(named[name])] == expected, name
    args = segment.parser().parse_args(["--data=."])
    segment.resolve(args)
    assert (args.lr, args.batch_size, args.clip_grad, args.ema_decay, args.eval_steps) == (1e-4, 16, 0.01, 0.0, 5000)
    assert segment.interval_and_run(args, 20210) == (5000, 160_000)
    args.global_batch = 32
    assert segment.learning_rate(args, 0, 160_000) == 2e-4
    assert segment.learning_rate(args, 80_000, 160_000) == pytest.approx(2e-4 * 0.5**0.9)
    args.epochs, args.max_steps = 2, None
    assert segment.interval_and_run(args, 20210) == (1263, 1263)
    args.max_steps = 100
    assert segment.interval_and_run(args, 20210) == (100, 100)


def test_a_step_of_segmentation_is_its_definition(tmp_path):
    """The loss that a run logs for its only step, by hand: the batches that the sampler's order and the seed give,
    normalised, the mask threshold of the start, random points by (seed, step, rank); the parts of --accumulate are
    averaged, each over its own number of masks. The threshold and the rate move with the steps; the backbone has its
    own rate."""
    options = ("--accumulate=2", "--seed=3", "--mask-schedule=anneal")
    record, _ = run_segment(tmp_path / "run", *options, "--max-steps=1", "--lr=0")
    args = segment.parser().parse_args([f"--checkpoint={tmp_path}/run/last.pt"])
    args.script = "segment.py"
    model, classes = segment.load(args)
    set_threshold(model, 0.0)
    assert classes == segment.ShapeScenes.classes and min(record["mask_curve"]["backbone.vit.blocks.0.attn"]) > 0
    data = segment.Pairs(segment.ShapeScenes("train", 40, 32, 3), segment.train_transform(args), 3)
    items = [data[key] for key in segment.IntervalSampler(40, 8, seed=3)]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    torch.manual_seed(segment.mixed_seed(3, 0, 0))
    losses = []
    for part in (items[:4], items[4:]):
        images, labels = (torch.stack(parts) for parts in zip(*part, strict=True))
        targets = segment.targets_of(labels, (32, 32))
        masks = sum(len(label.unique()) for label in labels)
        with torch.no_grad():
            outputs = model.train()((images / 255 - mean) / std)
        losses.append(segment.set_loss(outputs, targets, masks, 64).item())
    assert record["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    moving = ("--max-steps=2", "--lr=1e-3", "--backbone-lr=0.5", "--weight-decay=0.2")
    record, _ = run_segment(tmp_path / "rates", *options, *moving)
    first, second = record["mask_curve"]["backbone.vit.blocks.0.attn"]
    assert first > 0.5 and second < 0.1
    groups = convert.read_checkpoint(tmp_path / "rates" / "last.pt")["optimizer"]["param_groups"]
    rate = 1e-3 * 8 / 16 * 0.5**0.9  # a step has 8 images
    expected = {(lr, decay) for lr in (rate, rate / 2) for decay in (0.0, 0.2)}
    assert {(group["lr"], group["weight_decay"]) for group in groups} == expected


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=30)
def test_intervals_cut_one_endless_order(length, world, batch, steps):
    """Intervals between evaluations, all ranks' batches put together, are one sequence of permutations, one per pass:
    nothing is left out at their borders, and global batch t is what a single process would have."""
    interval, order = steps * batch * world, []
    for epoch in range(3):
        shares = []
        for r in range(world):
            sampler = segment.IntervalSampler(length, interval, rank=r, world=world, seed=1)
            sampler.epoch = epoch
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler) == steps * batch
        order += [key for keys in zip(*shares, strict=True) for key in keys]
    assert [key[0] for key in order] == [i // length for i in range(3 * interval)]
    for first in range(0, 3 * interval - length + 1, length):
        assert sorted(index for _, index in order[first : first + length]) == list(range(length))


def test_augmentation_moves_labels_with_pixels():
    """An image that shows its labels still does after scaling, cropping, flipping and padding: 128 with label 255
    beyond its edges, sizes always those of the crop; colours vary where they are meant to; all of it by the seed."""
    args = segment.parser().parse_args(["--data=.", "--image-size=32"])
    segment.resolve(args)
    labels = (torch.arange(60)[:, None] // 20 + 3 * (torch.arange(90) // 30)).to(torch.uint8)
    image = (20 * labels + 30).expand(3, -1, -1).contiguous()

    def results(count):
        """Per seed: is there padding, and the share of the other pixels that still show their label."""
        pairs = segment.Pairs([(image, labels)], segment.train_transform(args), 0)
        for epoch in range(count):
            (pixels, truth), (again, _) = (pairs[epoch, 0] for _ in range(2))
            assert type(pixels) is type(truth) is torch.Tensor and torch.equal(pixels, again)
            assert pixels.shape == (3, 32, 32) and truth.shape == (32, 32)
            assert pixels.dtype == truth.dtype == torch.uint8 and (pixels[:, truth == 255] == 128).all()
            shown = (pixels[0].int() - 20 * truth.int() - 30)[truth != 255].abs() <= 5
            yield (truth == 255).any().item(), shown.float().mean().item()

    assert sum(shown < 0.5 for _, shown in results(10)) > 3
    plain, shift = torch.full((3, 8, 8), 120, dtype=torch.uint8), []
    for seed in range(60):
        torch.manual_seed(seed)
        shift.append(int(segment.shift_brightness(plain, labels)[0][0, 0, 0]) - 120)
    assert 20 < shift.count(0) < 45 and 25 < max(map(abs, shift)) <= 32
    flips, corners, position = 0, set(), torch.arange(64 * 64).view(64, 64)
    for seed in range(40):
        torch.manual_seed(seed)
        flips += segment.v2.RandomHorizontalFlip()(position)[0, 0] != 0
        corners.add(segment.random_crop(position[None], segment.tv_tensors.Mask(position), 32)[1].min().item())
    assert 10 < flips < 30 and len(corners) > 30
    red, hues = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 8, 8), []
    for seed in range(60):
        torch.manual_seed(seed)
        r, g, b = (v / 255 for v in segment.colour_jitter()(segment.tv_tensors.Image(red))[:, 0, 0].tolist())
        hues.append(180 - abs(180 - 360 * colorsys.rgb_to_hsv(r, g, b)[0]))
    assert 15 < sum(hue < 1 for hue in hues) < 45 and 20 < max(hues) < 38
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "colour_jitter", segment.v2.Identity)
        patch.setattr(segment, "shift_brightness", lambda image, labels: (image, labels))
        padded, shown = zip(*results(30), strict=True)
    assert 0 < sum(padded) < 30 and min(shown) > 0.7  # all but the soft borders between labels
    assert segment.fitted((512, 683), 512, 2048) == [512, 683] and segment.fitted((100, 1000), 512, 2048) == [205, 2048]


def test_labels_scale_as_their_image():
    """At each of the 16 scales a label comes from where its pixel does: a ramp and its labels keep no offset.
    torchvision takes the nearest pixel of a Mask half a pixel too far left and up."""
    side = 256
    ramp = torch.arange(side, dtype=torch.float32).expand(side, side).contiguous()
    image, labels = ramp[None].expand(3, -1, -1), segment.tv_tensors.Mask(ramp)
    sizes = set()
    for seed in range(80):
        torch.manual_seed(seed)
        pixels, truth = segment.random_resize(segment.tv_tensors.Image(image), labels, 96)
        step = side / truth.shape[1]
        offset = (truth.as_subclass(torch.Tensor) - pixels[0]).mean() / step
        assert abs(offset) < 0.15, (truth.shape, offset)
        sizes.add(truth.shape[1])
    assert len(sizes) == 16


@pytest.fixture
def streets(tmp_path):
    """ADE20K's layout: six training and three validation images of different sizes, grey and palette annotations of
    four classes, 0 for pixels without."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 3)):
        for kind in ("images", "annotations"):
            (tmp_path / "streets" / kind / split).mkdir(parents=True)
        for i in range(count):
            numbers = np.kron(rng.integers(0, 5, (3, 4)), np.ones((10, 9 + i))).astype(np.uint8)
            image = np.stack([40 * numbers + 20] * 3, axis=-1)
            Image.fromarray(image).save(tmp_path / "streets" / "images" / split / f"{i}.jpg")
            annotation = Image.fromarray(numbers)
            if i % 2:
                annotation.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())  # makes it a palette image
            annotation.save(tmp_path / "streets" / "annotations" / split / f"{i}.png")
    (tmp_path / "streets" / "classes.txt").write_text("road\nsky\ntree\nhouse\n")
    return tmp_path / "streets"


def test_annotations_are_read_as_numbers(streets):
    """0 becomes 255 and k becomes k - 1, once; palettes are never turned into colours; names come from the folder."""
    data = segment.SegmentationFolder(streets, "training", segment.class_names(streets, None))
    assert data.classes == ["road", "sky", "tree", "house"] and len(data) == 6
    for i, (image, labels) in enumerate(data):
        numbers = np.array(Image.open(streets / "annotations" / "training" / f"{i}.png"))
        assert image.shape[1:] == labels.shape == numbers.shape and image.dtype == labels.dtype == torch.uint8
        assert np.array_equal(labels.numpy(), np.where(numbers == 0, 255, numbers.astype(int) - 1))
    (streets / "classes.txt").rename(streets / "names.txt")
    assert len(segment.class_names(streets, None)) == 150 and len(segment.class_names(streets, 7)) == 7
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1\t9\t1\t1\twall", "2\t0.1\t9\t1\t1\tsky, air"]
    (streets / "objectInfo150.txt").write_text("\n".join(rows))
    assert segment.class_names(streets, None) == ["wall", "sky, air"]


def test_bad_validation_files_are_found_before_work(tmp_path, streets, capsys):
    """Validation masks of another size or mode, damaged images and, where an item is sampled, wrong
    labels: one line that names the file, status 2, no folder. An image that EXIF turns is good."""
    folder = streets / "annotations" / "validation"
    image, good = streets / "images" / "validation" / "1.jpg", Image.open(folder / "1.png").copy()
    options = (f"--data={streets}", "--model=vit_mini", "--patch-size=8", "--encoder-layers=1")
    for wrong, message in (
        (good.crop((0, 0, 9, 9)), "9 x 9"), (good.convert("RGB"), "mode RGB"),
        (Image.fromarray(np.full((good.height, good.width), 5, np.uint8)), "label 5 of 4"),
    ):  # fmt: skip
        wrong.save(folder / "1.png")
        with pytest.raises(SystemExit) as stopped:
            run_segment(tmp_path / "run", *options)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and not (tmp_path / "run").exists()
        assert message in said and str(folder / "1.png") in said and said.count("\n") == 1
    good.save(folder / "1.png")
    data = segment.SegmentationFolder(streets, "validation", ["a"] * 4)
    exif, pixels = Image.Exif(), Image.open(image).convert("RGB")
    exif[0x0112] = 6  # a quarter
    pixels.transpose(Image.Transpose.ROTATE_90).save(image, exif=exif)
    data.check()
    image.write_bytes(image.read_bytes()[:20])
    with pytest.raises(segment.DataError, match=f"cannot read image '{image}'"):
        data.check(whole=1)


def test_evaluation_is_its_definition(streets):
    """Image by image: the short edge scaled to the model's size, padded, segmented, scaled back to the annotation's
    size, counted where there is a label."""
    args = segment.parser().parse_args([f"--data={streets}", "--image-size=40", "--workers=0", "--no-amp"])
    segment.resolve(args)
    model, data = tiny_segmenter(num_classes=4), segment.open_split(args, "val")
    found = segment.evaluate(model, segment.validation_loader(args, data), args, torch.device("cpu"))
    hits, truth, guesses = (np.zeros(4) for _ in range(3))
    for image, labels in data:
        height, width = image.shape[1:]
        scale = 40 / min(height, width)
        seen = [round(height * scale), round(width * scale)]
        pixels = segment.v2.functional.resize(image, seen)[None]
        with torch.no_grad():
            classes, masks = model(segment.to_model_input(pixels, torch.device("cpu")))[-1]
        masks = F.interpolate(masks, size=model.padded(seen), mode="bilinear").sigmoid()[:, :, : seen[0], : seen[1]]
        scores = torch.einsum("bqk,bqyx->bkyx", classes.softmax(-1)[..., :-1], masks)
        guess = F.interpolate(scores, size=(height, width), mode="bilinear").argmax(1)[0].numpy()
        for c in range(4):
            known = labels.numpy() != 255
            hits[c] += (known & (guess == c) & (labels.numpy() == c)).sum()
            truth[c] += (labels.numpy() == c).sum()
            guesses[c] += (known & (guess == c)).sum()
    assert found["mIoU"] == pytest.approx(100 * np.mean(hits / (truth + guesses - hits)))
    assert found["mAcc"] == pytest.approx(100 * np.mean(hits / truth))
    assert found["pAcc"] == pytest.approx(100 * hits.sum() / truth.sum())


def test_overlay_shows_labels_and_names():
    """Half image, half the label's colour; a legend row in the same colour for each class found, largest first; 150
    classes have colours that can be told apart."""
    image, labels = Image.new("RGB", (40, 30), (100, 100, 100)), np.zeros((30, 40), np.uint8)
    labels[:, :15] = 2
    drawn = np.asarray(segment.overlay(image, labels, ["a", "b", "c"])).astype(int)
    for x, label in ((5, 2), (30, 0)):
        assert np.abs(drawn[10, x] - (100 + np.array(segment.colour_of(label))) / 2).max() <= 1
    for row, label in ((0, 0), (1, 2)):
        assert (drawn[30 + 4 + 16 * row + 5, 8] == segment.colour_of(label)).all()
    assert list(segment.shares_of(labels, ["a", "b", "c"]).items()) == [("a", 0.625), ("c", 0.375)]
    colours = np.array([segment.colour_of(i) for i in range(150)])
    distance = np.abs(colours[:, None] - colours[None]).max(-1) + 255 * np.eye(150, dtype=int)
    assert distance.min() >= 16


SMALL_SEGMENT = ("--image-size=32", "--shapes-length=40", "--batch-size=4", "--workers=0", "--max-steps=4",
                 "--eval-steps=2", "--width=64", "--layers=2", "--queries=6", "--points=64")  # fmt: skip


def run_segment(folder, *options):
    """segment.py in this process, into `folder`; the log's records."""
    segment.main(segment.parser().parse_args([f"--output={folder}", *SMALL_SEGMENT, *options]))
    return records_of(folder)


def test_segmentation_script_trains_castles_and_evaluates(tmp_path, capsys, monkeypatch):
    """A whole run on rendered scenes: log with IoU per class, report with gap 0.0; --eval of each checkpoint gives the
    logged metrics; --image writes an overlay and its legend for each file, and prints shares; a file that cannot be
    read is named, and what the others hold is printed all the same."""
    *epochs, report = run_segment(tmp_path / "run")
    assert "castling gap          0.00" in capsys.readouterr().out
    assert [r["step"] for r in epochs] == [2, 4]
    assert set(epochs[-1]["test_iou"]) == {"background", *segment.SHAPES}
    assert epochs[-1]["test_iou_background"] == epochs[-1]["test_iou"]["background"]
    assert "test_mIoU_foreground_castled" in epochs[-1]
    assert report["castling_report"]["test_mIoU"] == epochs[-1]["test_mIoU"] == epochs[-1]["test_mIoU_castled"]
    before = convert.read_checkpoint(tmp_path / "run" / "best.pt")["ema"]
    before = {name: x for name, x in before.items() if not name.endswith("progress")}  # no weight
    run_segment(tmp_path / "lr0", "--lr=0", "--weight-decay=0", "--ema-decay=0", f"--checkpoint={tmp_path}/run/best.pt")
    still = convert.read_checkpoint(tmp_path / "lr0" / "last.pt")["model"]
    assert all(torch.equal(before[name], still[name]) for name in before)  # --checkpoint starts from all of it
    capsys.readouterr()
    for name in ("last.pt", "best.pt", "castled.pt"):
        segment.main(segment.parser().parse_args(["--eval", f"--checkpoint={tmp_path}/run/{name}", "--workers=0"]))
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        if name != "best.pt":
            for key in ("test_mIoU", "test_mAcc", "test_pAcc"):
                assert record[key] == pytest.approx(epochs[-1][key], abs=1e-3)
    (tmp_path / "photos").mkdir()
    scene = segment.ShapeScenes("val", 5, 50).scene(3).image
    for name in ("a.png", "b.jpg"):
        Image.fromarray(scene[:40]).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    predict = (f"--checkpoint={tmp_path}/run/best.pt", "--json")
    photos = ("--image", "photos/a.png", "photos/b.jpg")
    segment.main(segment.parser().parse_args([*photos, *predict, "--output=drawn"]))
    found = json.loads(capsys.readouterr().out)
    assert [Path(r["image"]).name for r in found] == ["a.png", "b.jpg"]
    assert all(sum(r["shares"].values()) == pytest.approx(1) for r in found)
    drawn = Image.open(tmp_path / "drawn" / "a.png")
    assert drawn.width >= 50 and drawn.height == 40 + 4 + 16 * len(found[0]["shares"])
    segment.main(segment.parser().parse_args(["--image=photos/b.jpg", predict[0], "--output=over.png"]))
    assert "%" in capsys.readouterr().out and (tmp_path / "over.png").is_file()
    with pytest.raises(SystemExit) as stopped:
        segment.main(segment.parser().parse_args(["--image=photos/b.jpg", *predict, "--output=none/x.png"]))
    assert stopped.value.code == 2 and "none/x.png" in capsys.readouterr().err
    (tmp_path / "photos" / "a.png").write_bytes(b"cut")
    with pytest.raises(SystemExit) as stopped:
        segment.main(segment.parser().parse_args([*photos, *predict]))
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and "cannot read image 'photos/a.png'" in printed.err
    assert [Path(r["image"]).name for r in json.loads(printed.out)] == ["b.jpg"]
    assert not (tmp_path / "b_overlay.png").exists()  # --json alone draws nothing


def test_segmenter_is_exported_as_scores(tmp_path, monkeypatch, capsys):
    """--export of a checkpoint writes a graph of its class scores: (1, 3, H, W) -> (1, K, H, W) of its weights."""
    run_segment(tmp_path / "run", "--max-steps=1", "--layers=1")
    written = []
    monkeypatch.setattr(segment.run, "export", lambda graph, *_: written.append(graph) or ([(1, 3, 64, 64)], 1e-6))
    options = (f"--checkpoint={tmp_path}/run/best.pt", f"--export={tmp_path}/model.pt2")
    segment.main(segment.parser().parse_args(options))
    assert "run on 1x3x64x64; largest difference 1.0e-06" in capsys.readouterr().out
    args = segment.parser().parse_args(options)
    args.script = "segment.py"
    model, x = segment.load(args)[0], randn(1, 3, 48, 64, dtype=torch.float32)
    with torch.no_grad():
        found, expected = written[0](x), segment.class_scores(model(x)[-1], (48, 64), (48, 64))
    assert found.shape == (1, 13, 48, 64)
    assert_close(found, expected)


@pytest.mark.parametrize("options", [
    ("--attention=softmax", "--pixel-decoder=msdeform", "--amp"),
    ("--attention=relu_e", "--accumulate=2", "--ema-decay=0", "--epochs=1"),
    ("--mask-schedule=fixed", "--drop-path=0.1", "--patch-size=16", "--clip-grad=0", "--eval-every=2"),
])  # fmt: skip
def test_every_segmentation_option_trains(tmp_path, options):
    """Each combination runs to its report; a model without a branch reports no gap."""
    *_, report = run_segment(tmp_path, "--max-steps=2", "--eval-steps=1", *options)
    assert ("castling_gap" in report["castling_report"]) == all("attention=" not in o for o in options)


def test_segmentation_learns(tmp_path):
    """Sixty steps on one scene, over and over: the loss falls to a third, mIoU rises above that of background alone."""
    options = ("--shapes-length=1", "--max-steps=60", "--eval-steps=30", "--split=train", "--lr=3e-3", "--ema-decay=0")
    run_segment(tmp_path / "run", *options, "--batch-size=4")
    first, second, _ = records_of(tmp_path / "run")
    assert second["train_loss"] < 0.6 * first["train_loss"]
    args = segment.parser().parse_args([f"--checkpoint={tmp_path}/run/last.pt", "--workers=0"])
    args.script = "segment.py"
    model, _ = segment.load(args)
    data = segment.open_split(args, "train")
    found = segment.evaluate(model, segment.validation_loader(args, data), args, torch.device("cpu"))
    assert found["mIoU"] > 60 and found["mAcc"] > 70


def test_segmenter_starts_from_one_of_other_classes(tmp_path, streets, capsys):
    """--checkpoint of a segmenter: all its weights, but for the class layer where the number of classes differs."""
    run_segment(tmp_path / "a", "--max-steps=1", "--model=vit_mini", "--patch-size=8", "--encoder-layers=1")
    start = (f"--data={streets}", f"--checkpoint={tmp_path}/a/best.pt", "--model=vit_mini", "--patch-size=8",
             "--encoder-layers=1", "--max-steps=1")  # fmt: skip
    capsys.readouterr()
    run_segment(tmp_path / "b", *start)
    assert "new: decoder.class_head.bias, decoder.class_head.weight" in capsys.readouterr().out


def test_segmentation_folder_trains_and_names_what_is_wrong(tmp_path, streets, capsys):
    """Folders train, evaluate image by image and predict; missing, unreadable and unfitting files are named: before
    work starts where names show it, while loading where only the contents do."""
    folder = (f"--data={streets}", "--model=vit_mini", "--max-steps=2", "--patch-size=8", "--encoder-layers=1")
    *epochs, _ = run_segment(tmp_path / "run", *folder)
    assert set(epochs[-1]["test_iou"]) == {"road", "sky", "tree", "house"}
    image, annotation = (streets / kind / "training" for kind in ("images", "annotations"))
    capsys.readouterr()

    def refused(code, *options):
        with pytest.raises(SystemExit) as stopped:
            run_segment(tmp_path / "refused", *folder, "--overwrite", *options)
        assert stopped.value.code == code
        return capsys.readouterr().err

    assert "--num-classes 7" in refused(2, "--num-classes=7")
    (annotation / "2.png").rename(annotation / "spare.png")
    assert str(image / "2.jpg") in refused(2) and not (tmp_path / "refused").exists()
    good = Image.open(annotation / "spare.png").copy()
    for workers, (wrong, message) in enumerate((
        (good.convert("RGB"), "mode RGB"), (good.crop((0, 0, 9, 9)), "9 x 9"),
        (Image.fromarray(np.full((good.height, good.width), 5, np.uint8)), "label 5 of 4"),
        (good.convert("I;16"), "mode I;16"), (good.convert("1"), "mode 1"),
    )):  # fmt: skip
        wrong.save(annotation / "2.png")
        said = refused(1, f"--workers={workers % 2}")
        assert str(annotation / "2.png") in said and message in said
    good.convert("L").save(annotation / "2.png", format="JPEG")
    assert "is a JPEG file" in refused(1)
    grey = Image.fromarray(np.zeros((good.height, good.width), np.uint8)).convert("P", palette=0, colors=4)
    grey.save(annotation / "2.png", bits=4)  # few bits with a palette are numbers all the same
    with segment.annotation_file(annotation / "2.png") as numbers:
        assert numbers.size == good.size
    row = b"\0" + bytes((good.width + 1) // 2)  # grey of 4 bits, which Pillow would stretch
    chunk = lambda kind, data: (  # noqa: E731
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big"))
    header = good.width.to_bytes(4, "big") + good.height.to_bytes(4, "big") + bytes([4, 0, 0, 0, 0])
    (annotation / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                                       + chunk(b"IDAT", zlib.compress(row * good.height)) + chunk(b"IEND", b""))
    assert "mode L;4" in refused(1)
    good.save(annotation / "2.png")
    whole = (image / "2.jpg").read_bytes()
    (image / "2.jpg").write_bytes(whole[:20])
    assert f"cannot read image '{image}/2.jpg'" in refused(1)
    (image / "2.jpg").write_bytes(whole)
    for path in (streets / "annotations" / "validation").iterdir():
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    Image.fromarray(np.zeros_like(np.array(good))).save(annotation / "2.png")
    assert "has a label" in refused(1)
    (annotation / "2.png").write_bytes(b"cut")
    assert str(annotation / "2.png") in refused(1)
    (streets / "classes.txt").write_text("road\nroad\n")
    assert "names 'road' twice" in refused(2)
    (streets / "classes.txt").write_bytes("straße".encode("latin1"))
    assert f"cannot read {streets}/classes.txt" in refused(2)
    (streets / "images" / "validation").rename(streets / "images" / "val")
    (streets / "classes.txt").unlink()
    assert f"{streets}/images/validation" in refused(2)
    assert "no-such" in refused(2, "--data=no-such")
    assert "but shapes has 13" in refused(2, "--data=shapes", "--num-classes=4")


def test_two_processes_segment_like_one(tmp_path):
    """One step's gradients of two ranks, averaged by DistributedDataParallel, are those of one process with both their
    images: mask losses are divided by the mean number of masks over ranks, class losses by the mean
    sum of weights, though one image has five classes and the other two. Points are fixed, and there
    is no BatchNorm. Metrics add up over ranks."""
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import gc, sys, torch; sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist, segment
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
rank = dist.get_rank()
y, x = torch.meshgrid(torch.arange(8) / 8 + 0.06, torch.arange(8) / 8 + 0.06, indexing="ij")
places = torch.stack([x, y], dim=-1).flatten(0, 1)
segment.random_points = lambda masks, points, device: places[:points].expand(masks, -1, 2)
segment.uncertain_points = lambda logits, points: segment.random_points(len(logits), points, None)
def build():
    torch.manual_seed(0)
    return segment.build_segmenter("vit_mini", num_classes=5, image_size=32, dim=32, depth=1, patch_size=8, width=64,
                                   heads=4, queries=6, layers=3, encoder_layers=1, drop_path=0.0)
torch.manual_seed(1)
images = torch.randn(2, 3, 32, 32)
labels = torch.zeros(2, 32, 32, dtype=torch.uint8)
labels[0, :9], labels[0, 9:12], labels[0, 12:20], labels[0, 20:25] = 1, 2, 3, 4
labels[1, :, 5:] = 3
whole, ddp = build(), DistributedDataParallel(build())
everything, mine = (segment.targets_of(x, x.shape[1:]) for x in (labels, labels[rank : rank + 1]))
def grads(model, images, targets, count):
    segment.set_loss(model(images), targets, count, 64).backward()
    return {{name: p.grad for name, p in (model.module if model is ddp else model).named_parameters()}}
count = segment.mean_masks(mine, torch.device("cpu"))
assert count == 3.5, count
uneven = mine if rank else []
assert segment.mean_masks(uneven, torch.device("cpu")) == 1.0
expected = grads(whole, images, everything, 7.0)
found = grads(ddp, images[rank : rank + 1], mine, count)
scale = max(value.abs().max() for value in expected.values())
worst = max((expected[name] - found[name]).abs().max() for name in expected)
assert worst < 1e-4 * scale, (worst, scale)
predicted = torch.full((1, 32, 32), rank)
matrix = torch.tensor(segment.all_sum(segment.confusion(predicted, labels[rank : rank + 1], 5)))
both = segment.confusion(torch.tensor([0, 1])[:, None, None].expand(2, 32, 32), labels, 5)
assert torch.equal(matrix, both)
dist.barrier(); del ddp; gc.collect()
dist.destroy_process_group()
""")
    assert in_group(2, lambda rank: exec(script.read_text(), {})) == [0, 0]


# ---- bench.py --------------------------------------------------------------------------------------------------------


def test_bench_prints_its_tables(tmp_path, capsys, monkeypatch):
    """Every table has a row with time, memory and quartiles around its ratio for each form; the file says on what."""
    small = {"core": [(2, 2, 30, 8)], "models": [("levit128", 1, 64, "levit128")], "training": [("deit_tiny", 1, 32)]}
    tables = {name: (f, small[name], title) for name, (f, _, title) in bench.TABLES.items()}
    monkeypatch.setattr(bench, "TABLES", tables)
    path, threads = tmp_path / "bench.json", torch.get_num_threads()
    try:
        bench.main(bench.parser().parse_args(["--rounds=2", f"--json={path}"]))
    finally:
        torch.set_num_threads(threads)
    written = json.loads(path.read_text())
    assert {"threads", "torch", "device", "dtype"} <= set(written["environment"])
    assert Image.open(tmp_path / "bench.png").size == (900, 525)
    printed = capsys.readouterr().out
    for name in small:
        (row,) = written[name]
        assert row["shape"] in printed
        for form in set(row) - {"shape"}:
            low, high = row[form]["quartiles"]
            assert low <= row[form]["ratio"] <= high and row[form]["ms"] > 0 and row[form]["mib"] > 0


def test_bench_names_bad_arguments(capsys):
    """Numbers, devices and files that cannot be used are named before anything is timed."""
    wrong = {
        "--threads=0": "at least 1, got 0", "--rounds=x": "'x'", "--device=gpu": "cannot use 'gpu'",
        "--device=meta": "cpu or cuda, got meta", "--json=/none/x.json": "no folder /none",
    }  # fmt: skip
    for flag, said in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            bench.parser().parse_args([flag])
        assert said in capsys.readouterr().err
    assert bench.parser().parse_args([]).device == torch.device("cpu")


def test_bench_times_nothing_that_is_wrong():
    """A form that strays from float64 stops the run."""
    exact = randn(4, 4)
    bench.check("right", exact.float(), exact, torch.float32)
    for wrong in (exact.float() * 1.001, exact.float() * math.nan):
        with pytest.raises(RuntimeError, match="wrong"):
            bench.check("wrong", wrong, exact, torch.float32)


def test_released_formula_of_the_benchmark():
    """What `released` times is the authors' block: equal to this file's Released, branch included."""
    block = LinearAngularAttention(16, 2, sparse_reg=True, schedule="fixed")
    theirs = Released(16, 2, bias=False, sparse=True)
    theirs.load_state_dict(castle(copy.deepcopy(block)).state_dict())
    x = randn(2, 60, 16, dtype=torch.float32)
    assert_close(bench.released(block)(x), theirs(x), atol=1e-6, rtol=1e-6)


# ---- figures.py ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(2, 20), st.integers(2, 4))
def test_embedding_keeps_the_kernels_distances(seed, count, dim):
    """Eq. (7): with all axes kept, squared distances are 2 theta / pi, whatever the lengths; the first vary most."""
    x = randn(count, dim, seed=seed)
    features, share = figures.kernel_embedding(x, count)
    assert_close(torch.cdist(features, features) ** 2, 2 * (1 - angular_similarity(x, x)), atol=1e-6, rtol=0)
    assert (share.diff() <= 1e-12).all()
    assert_close(share, features.square().sum(0) / features.square().sum(), atol=1e-12, rtol=0)


def test_circle_becomes_odd_harmonics():
    """Fig. 3: of the circle's variance harmonic k has 8 / (pi k)^2, even ones nothing; on the drawn axes the first
    point lies at (+, 0), however the solver has turned or mirrored them."""
    angle = torch.arange(360, dtype=torch.float64) * math.pi / 180
    features, share = figures.kernel_embedding(figures.circle(angle), 6)
    assert_close(share, torch.tensor([4 / (math.pi * k) ** 2 for k in (1, 1, 3, 3, 5, 5)]).double(), rtol=3e-3, atol=0)
    for pair, k in ((features[:, :2], 1), (features[:, 2:4], 3)):
        radius = pair.norm(dim=1)
        turn = figures.circle(torch.tensor([1, 1 + math.pi / 2], dtype=torch.float64))
        for seen in (pair, pair @ turn, pair.flip(1)):
            assert_close(figures.turned(seen), radius[:, None] * figures.circle(k * angle), atol=1e-9, rtol=0)


def test_feature_distances_rise_with_the_angle():
    """Fig. 3: every kernel's distance rises from 0 to 2, the angular one as 2 theta / pi; the exponential's is the
    Gaussian RBF's, Eq. (2)."""
    angle = torch.linspace(0, math.pi, 91, dtype=torch.float64)
    distances = figures.feature_distances(angle)
    for d in distances.values():
        assert d[0] == 0 and d[-1] == 2 and (d.diff() > -1e-12).all()
    assert_close(distances["angular"], 2 * angle / math.pi, atol=1e-7, rtol=0)
    x = figures.circle(angle)
    rbf = 1 - torch.exp(-(x - x[0]).square().sum(1) / 2)
    assert_close(distances["exponential; RBF"], 2 * rbf / rbf[-1])


def test_series_errors_fall_below_their_bound():
    """Eq. (8): errors stay below the bound, fall with every term, and are worst where the vectors are parallel."""
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    error, bound = figures.series_errors(range(8), x)
    assert error.shape == bound.shape == (8, 101)
    assert (error <= bound + 1e-15).all() and (error.diff(dim=0) <= 1e-15).all()
    assert (error.max(dim=1).values == error[:, [0, -1]].max(dim=1).values).all()


def test_points_are_the_counted_macs(monkeypatch):
    """Fig. 1, 5: a row for every model of Table 2, at `count`'s MACs; MViTv2 with softmax down-sampling. A detector has
    its multiply-adds as executed; all are rows of the paper's tables."""
    assert {model for _, model in figures.TOP_1} == set(flops.TABLE_2)
    printed = {(name, pixels) for name, pixels, *_ in flops.TABLE_3}
    printed |= {(f"lcnet_vit_{size}", pixels) for size, pixels, *_ in flops.TABLES_6_AND_7.values()}
    assert {(model, pixels) for _, model, pixels, *_ in figures.AP} == printed
    monkeypatch.setattr(figures, "TOP_1", {("DeiT", "deit_tiny"): (1, 2), ("MViTv2", "mvitv2_tiny"): (3, 4)})
    monkeypatch.setattr(figures, "AP", [("LCNet-ViT", "lcnet_vit_s", 64, "softmax", 5)])
    deit = [flops.count(*flops.meta_model("deit_tiny", a)).macs / 1e9 for a in ("softmax", "castling")]
    rows = figures.classifier_points()
    assert [r["macs_g"] for r in rows[:2]] == deit and [r["accuracy"] for r in rows] == [1, 2, 3, 4]
    c2 = flops.count(*flops.meta_model("mvitv2_tiny")).macs / 1e9
    assert c2 < rows[3]["macs_g"] < rows[2]["macs_g"]
    (row,) = figures.detector_points()
    with torch.device("meta"):
        model, image = detect.build_detector("lcnet_vit_s", "softmax", image_size=64), torch.empty(1, 3, 64, 64)
    assert row == dict(family="LCNet-ViT", model="lcnet_vit_s", attention="softmax",
                       macs_g=flops.count(model, image).macs / 1e9, accuracy=5)  # fmt: skip


def test_mask_figure_reads_every_layer(monkeypatch, tmp_path):
    """Fig. 6: all epochs of a log joined, every layer in one panel. Ramped masks end empty; fixed ones stay above 1/N,
    where N, the keys of each stage, is below 50. A log without curves is an error that names it."""
    model, image = flops.meta_model("levit128", image_size=128)
    with figures.captured(model) as seen:
        model(image)
    tokens = {layer: k.shape[-2] for layer, (_, k, _) in seen.items()}
    for schedule, log in figures.MASK_LOGS.items():
        run = figures.mask_trajectories(log)
        step = run.pop("step")
        assert step == list(range(186)) and run.keys() == tokens.keys()
        for layer, densities in run.items():
            (N,) = [n for stage, n in figures.MASK_TOKENS.items() if layer.startswith(stage)]
            assert len(densities) == len(step) and tokens[layer] == N
            assert densities[-1] == 0 if schedule == "ramp" else N >= 50 or min(densities) >= 1 / N
    (tmp_path / "log.jsonl").write_text('{"epoch": 0}\n')
    with pytest.raises(ValueError, match="log.jsonl holds no mask_curve"):
        figures.mask_trajectories(tmp_path / "log.jsonl")


def test_network_learns_low_frequencies_first():
    """Fig. 7: the linear terms have 4 pi / 16 of frequency 1 and nothing of the others; the network gets below any
    half of a frequency before it does at the next; seeded apart from the caller's random numbers."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    study = figures.frequency_study(steps=1500)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(study["linear_residual"], torch.tensor([1 - math.pi / 4] + [1.0] * 5).double(), atol=1e-3, rtol=0)
    first, third, fifth = ((study["residual"][:, i] < 0.5).nonzero().flatten().tolist() for i in range(3))
    assert first[0] < third[0] and not fifth
    assert study["loss"][-1] < study["loss"][0] / 1000 and study["step"][-1] <= 1500
    assert (study["fit"] - study["target"]).abs().max() < (study["linear"] - study["target"]).abs().max()
    again, other = (figures.frequency_study(steps=3, seed=seed)["loss"] for seed in (0, 1))
    assert again == figures.frequency_study(steps=3)["loss"] != other


def test_ratios_are_read_from_the_benchmark():
    """Every row of bench.py's tables is read: one ratio per D and N, the median over the rest; per model all rows."""

    def table(ratios):
        return [dict(shape=shape, softmax=dict(ratio=ratio)) for shape, ratio in ratios.items()]

    core = table({"B1 H3 N196 D64": 1, "B8 H3 N196 D64": 3, "B8 H3 N49 D64": 0.5, "B8 H4 N49 D16": 4})
    lines = figures.core_ratios(dict(core=core[::-1]))
    assert list(lines.items()) == [(64, [(49, 0.5), (196, 2)]), (16, [(49, 4)])]
    nets = table({"deit_tiny 224 px, batch 1": 1, "levit128 512 px, batch 2": 2, "deit_tiny 448 px, batch 8": 3})
    assert figures.model_ratios(dict(models=nets)) == {"deit_tiny": [(224, 1), (448, 3)], "levit128": [(512, 2)]}
    committed = json.loads(figures.BENCH.read_text())
    assert {"deit_tiny", "levit128"} <= set(figures.model_ratios(committed)) and 64 in figures.core_ratios(committed)


def test_figures_draws_every_file(tmp_path, monkeypatch, capsys):
    """The script writes all figures, or those that are named, and says where; counts and training cut short here."""
    study = figures.frequency_study
    monkeypatch.setattr(figures, "frequency_study", lambda: study(steps=5))
    monkeypatch.setattr(figures, "TOP_1", dict(list(figures.TOP_1.items())[:1]))
    monkeypatch.setattr(figures, "AP", figures.AP[:1])
    monkeypatch.setattr(figures, "PIXELS", (64,))
    figures.main(figures.parser().parse_args([f"--output={tmp_path / 'all'}"]))
    paths = [tmp_path / "all" / f"{name}.png" for name in figures.FIGURES]
    assert capsys.readouterr().out.split() == [str(p) for p in paths]
    for path in paths:
        with Image.open(path) as image:
            assert image.width >= 800 and len(image.convert("L").getcolors()) > 2
    figures.main(figures.parser().parse_args(["crossover", f"--output={tmp_path / 'one'}"]))
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["crossover.png"]
    with pytest.raises(SystemExit):
        figures.parser().parse_args(["kernels"])


def run_of(score, attention="castling", seed=0, model="deit_mini", **config):
    """What `figures.read_runs` gives for a run that ended with this score; castling lost 0.5 points of it."""
    report = {"test_acc1": score, "macs": {"as deployed": 3e6}}
    if attention == "castling":
        report |= {"test_acc1": score + 0.5, "test_acc1_castled": score, "castling_gap": 0.5}
        report["macs"] = {"with branch": 4e6, "castled": 2e6}
    common = dict(script="train.py", model=model, image_size=32, mask_schedule="ramp", attention=attention, seed=seed)
    epochs = [dict(epoch=n, step=n, step_seconds=seconds) for n, seconds in enumerate((3, 1 + seed, 1))]
    return dict(run=f"{attention}-{seed}", config=common | config, log=[*epochs, dict(castling_report=report, step=3)])


def test_table_of_runs(tmp_path, capsys):
    """The castled model's score over seeds, the differences from the reference of the same seeds, what castling lost,
    and the first seed's step over the reference's, however the runs are ordered; runs of different flags are not put
    into one column, nor one seed twice into a cell; a folder of runs and its collected file agree."""
    runs = [run_of(50, seed=0), run_of(53, seed=1), run_of(56, seed=2), run_of(40, "softmax", seed=1), run_of(9, "mc"),
            run_of(7, dwconv=False), run_of(60, model="levit_mini")]  # fmt: skip
    heads = "| attention | deit_mini, 32 px, 65 tokens: top-1, % | against softmax | gap | step | M MACs |"
    heads += " levit_mini, 32 px, 4 / 1 tokens: top-1, % | against softmax | gap | step | M MACs |"
    table = figures.results_table(runs).splitlines()
    assert table[:1] + table[2:] == [
        heads,
        "| softmax | 40.0 | – | – | 1.00 | 3.0 | – | – | – | – | – |",
        "| castling, ramp | 53.0 ± 3.0 | +13.0 (1) | 0.50 | 0.50 | 2.0 | 60.0 | – | 0.50 | – | 2.0 |",
        "| castling, ramp, no DWConv | 7.0 | – | 0.50 | 0.50 | 2.0 | – | – | – | – | – |",
        "| mc | 9.0 | – | – | 0.50 | 3.0 | – | – | – | – | – |",
    ]
    several = [*runs, run_of(41.5, "softmax", seed=0), run_of(48, "mc", seed=2), run_of(20, patch_size=8)]
    table = figures.results_table(several, "castling, ramp").splitlines()
    assert "deit_mini, 32 px, 17 tokens: top-1, % | against castling, ramp |" in table[0]
    # softmax: 40 - 53 and 41.5 - 50, mean -10.75, deviation 3.18; mc: 9 - 50 and 48 - 56, mean -24.5, deviation 23.33
    assert "| 40.8 ± 1.1 | -10.8 ± 3.2 (2) | – | 1.00 |" in table[2]
    assert "| 28.5 ± 27.6 | -24.5 ± 23.3 (2) | – | 1.00 |" in table[5]
    again = [*runs[5:3:-1], *runs[3::-1], runs[6]]
    assert figures.results_table(again) == figures.results_table(runs)
    with pytest.raises(ValueError, match="deit_mini, 32 px, 65 tokens are not comparable: they differ in lr"):
        figures.results_table([*runs, run_of(50, seed=3, workers=2, lr=1)])
    with pytest.raises(ValueError, match="deit_mini, 32 px, 65 tokens, castling, ramp: more than one run of seed 1"):
        figures.results_table([*runs, run_of(51, seed=1)])

    def printed(*options):
        figures.main(figures.parser().parse_args(["table", f"--output={tmp_path}/x", "--runs", *map(str, options)]))
        assert not (tmp_path / "x").exists()  # a table is no drawing
        return capsys.readouterr().out.rstrip("\n")

    for one in runs:
        folder = tmp_path / "runs" / f"{one['run']}-{len(list(tmp_path.glob('runs/*')))}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(one["config"]))
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in one["log"]))
    kept = tmp_path / "kept.jsonl"
    assert printed(tmp_path / "runs", f"--collect={kept}") == printed(kept) and len(kept.read_text().splitlines()) == 7
    assert printed(kept, kept) == "\n\n".join(2 * [printed(kept)])
    (tmp_path / "other.jsonl").write_text(json.dumps(run_of(1)) + "\n")
    both = printed(kept, tmp_path / "other.jsonl", "--against=mc").split("\n\n")
    assert "| +41.0 (1) |" in both[0] and "| 1.0 | – | 0.50 | – | 2.0 |" in both[1]  # 50 - 9; a table without the row
    with pytest.raises(SystemExit):
        printed(kept, "--against=ramp")
    assert "unknown row 'ramp'" in capsys.readouterr().err
    (folder / "log.jsonl").write_text('{"epoch": 0, "step": 1}\n')
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "log.jsonl").write_text('{"epoch": 0}\n')
    for wrong, message in (
        (tmp_path / "runs", f"run {folder.name} is not complete"), (tmp_path, "no runs in"),
        (tmp_path / "log.jsonl", "log.jsonl is no file of runs"), (tmp_path / "a.png", "a.png is no file of runs"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            printed(wrong)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("config", "tokens"), [
    (dict(model="deit_mini", patch_size=2), "257 tokens"), (dict(model="deit_mini", distilled=True), "66 tokens"),
    (dict(model="levit_mini", image_size=64), "16 / 4 / 1 tokens"), (dict(model="lcnet_s"), "32 px"),
    (dict(model="levit128", image_size=224), "196 / 49 / 16 tokens"), (dict(model="timm:test_vit"), "32 px"),
    (dict(model="vit_mini", patch_size=8, script="segment.py"), "16 tokens"),
])  # fmt: skip
def test_columns_name_their_tokens(config, tokens):
    """The head of a column has the tokens of the model's attention layers at the run's image size, with what its flags
    make of it; nothing where there is no attention, or a model that is not this project's."""
    assert figures.column_of(run_of(1, **config))[0].endswith(tokens)


def test_attention_figure(tmp_path, capsys, monkeypatch):
    """Image, maps and masks of a layer for chosen tokens are drawn; every layer's effective rank is printed; layers,
    tokens and files that do not exist are named."""
    pytest.importorskip("matplotlib")
    model = tiny("deit")
    transform = train.eval_transform(flags(image_size=64))
    monkeypatch.setattr(train, "load_predictor", lambda args: (model, [], transform))
    Image.fromarray(data.Shapes("val", 12, 64).scene(3).image).save(tmp_path / "one.png")

    def draw(*options):
        words = ["attention", "--checkpoint=x", f"--image={tmp_path}/one.png", *options]
        figures.main(figures.parser().parse_args(words))
        return capsys.readouterr().out

    out = draw(f"--output={tmp_path}", "--progress=0", "--layer=blocks.0.attn")
    assert re.search(r"blocks.1.attn: 17 tokens, effective rank [\d.]+; of q k\^T alone [\d.]+ of 12", out)
    pixels = np.asarray(Image.open(tmp_path / "attention.png").convert("RGB"))
    assert pixels.shape[0] > 800 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    draw(f"--output={tmp_path}", "--tokens", "0", "16")
    for options, message in [
        (["--layer=blocks.9.attn"], "blocks.0.attn"), (["--tokens", "17"], "0..16"),
        (["--checkpoint="], "empty value"), (["--image=/no/such.png"], "/no/such.png"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            draw(*options)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    model = tiny("deit", "softmax")
    with pytest.raises(SystemExit):
        draw()
    assert "no linear-angular attention" in capsys.readouterr().err


# ---- faults: what a run survives -------------------------------------------------------------------------------------

# Of each script: its module, a tiny model for its `make_model`, the flags of a short run of two epochs.
TINY_RUNS = {
    "train": (
        train,
        lambda args, classes, size: build_model(
            "levit128", "castling", classes, size, drop_path=0.1, epsilon=args.epsilon,
            schedule=args.mask_schedule, **TINY_LEVIT),
        ("--image-size=32", "--batch-size=4", "--shapes-length=16", "--epochs=2", "--mixup=0.8", "--erasing=0.5",
         "--mask-schedule=anneal"),
    ),
    "detect": (
        detect,
        lambda args, classes, size: detect.build_detector(
            "lcnet_vit_s", "castling", classes, size, channels=16, convs=1, **TINY_LCNET),
        ("--image-size=64", "--batch-size=2", "--shapes-length=8", "--epochs=2", "--multi-scale=1", "--ema-reset=1"),
    ),
    "segment": (
        segment,
        lambda args, classes, size: segment.build_segmenter(
            "vit_mini", "castling", classes, args.pixel_decoder, size, dim=32, depth=2, patch_size=8, width=64, heads=4,
            queries=6, layers=2, encoder_layers=1, drop_path=0.1),
        ("--image-size=32", "--batch-size=2", "--shapes-length=6", "--max-steps=8", "--eval-steps=4", "--points=64"),
    ),
}  # fmt: skip
CLOCK = {"seconds", "images_per_s", "data_wait", "step_seconds", "inference_images_per_s"}  # what the log measures


def run_tiny(script, folder, *options):
    """A short run of a script's tiny model in this process, on one thread: bit for bit the same whenever."""
    module, make_model, flags = TINY_RUNS[script]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        args = [f"--output={folder}", "--workers=0", "--save-minutes=1e-9", *flags, *options]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "make_model", make_model)
            module.main(module.parser().parse_args(args))
    finally:
        torch.set_num_threads(threads)


def without_clock(record):
    """A record of the log but for the times in it."""
    if not isinstance(record, dict):
        return record
    return {key: without_clock(value) for key, value in record.items() if key not in CLOCK}


def outcome(folder):
    """What has to be the same however a run came to its end: SHA-256 of weights and average, and the log."""
    state = convert.read_checkpoint(folder / "last.pt")
    digest = hashlib.sha256()
    for part in ("model", "ema"):
        for name, tensor in state[part].items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return digest.hexdigest(), [without_clock(record) for record in log]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """script -> `outcome` of its tiny run that nothing has happened to."""

    @functools.cache
    def whole(script):
        folder = tmp_path_factory.mktemp(script)
        run_tiny(script, folder)
        return outcome(folder)

    return whole


@contextlib.contextmanager
def after(event, act):
    """Within, act() at the event-th thing that matters: a step done, a file about to be written or
    renamed, the middle of an evaluation."""
    events = itertools.count(1)

    def hooked(function):
        def call(*args, **options):
            if next(events) == event:
                act()
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (run.Progress, "step"), (torch, "save"), (os, "replace"), (run, "castle"):
            patch.setattr(owner, name, hooked(getattr(owner, name)))
        yield events


def killed(script, folder, event, *options):
    """Whether a run in a process of its own, killed with -9 at that event, was."""

    def die():
        with after(event, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            run_tiny(script, folder, *options)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(300)
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("script", TINY_RUNS)
@given(data=st.data())
@settings(max_examples=2, phases=[Phase.generate])  # a failure is not shrunk: a run a try is too slow for that
def test_nothing_is_lost_when_killed(script, undisturbed, tmp_path_factory, data):
    """kill -9 within an epoch, before its first checkpoint or after, then at any moment, a save and
    an evaluation among them; then another number of workers: weights, average and log are those of
    the run that was never disturbed, bit for bit."""
    folder = tmp_path_factory.mktemp("killed")
    assert killed(script, folder, data.draw(st.integers(1, 13), "event"))
    every = data.draw(st.sampled_from(["1e-9", "0"]), "--save-minutes")  # at every step, or at the ends of epochs only
    killed(script, folder, data.draw(st.integers(1, 30), "event"), f"--save-minutes={every}")
    run_tiny(script, folder, f"--workers={data.draw(st.integers(0, 1), 'workers')}", f"--save-minutes={every}")
    assert outcome(folder) == undisturbed(script)


def test_a_kill_during_an_evaluation_repeats_it(undisturbed, tmp_path, monkeypatch):
    """The epoch that was trained is not trained again, the whole evaluation is made again."""
    draw, seen = data.Shapes.scene, []

    def look(shapes, index):
        seen.append("val" if shapes.split else "train")
        if len(seen) == 18 and (tmp_path / "kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(shapes, index)

    monkeypatch.setattr(data.Shapes, "scene", look)
    (tmp_path / "kill").touch()
    # An epoch reads 16 images; its evaluation reads the only other one twice, with and without branch.
    process = multiprocessing.get_context("fork").Process(target=run_tiny, args=("train", tmp_path))
    process.start()
    process.join(300)
    (tmp_path / "kill").unlink()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "log.jsonl").read_text() == ""
    run_tiny("train", tmp_path)
    assert seen == 2 * ["val"] + 16 * ["train"] + 2 * ["val"]
    assert outcome(tmp_path) == undisturbed("train")


@pytest.mark.parametrize(("script", "number"), [
    ("train", signal.SIGTERM), ("train", signal.SIGINT), ("detect", signal.SIGTERM), ("segment", signal.SIGTERM),
])  # fmt: skip
def test_signals_stop_after_the_step(script, number, undisturbed, tmp_path, capsys, monkeypatch):
    """SIGTERM and SIGINT, as preemption sends them, finish the step, save, print how to go on, and end with status 0;
    in an evaluation they wait for its end. The run goes on as if nothing had been."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--output", "a folder", "--overwrite"])
    with after(6, lambda: os.kill(os.getpid(), number)):  # the second step is done
        run_tiny(script, tmp_path, "--overwrite")
    printed = capsys.readouterr().out
    assert convert.read_checkpoint(tmp_path / "last.pt")["step"] == 3
    assert "stopped at step 3 of 8; continue with: python" in printed
    assert "train.py --output 'a folder'\n" in printed
    evaluate = run.evaluate_castling

    def interrupted(*given):
        os.kill(os.getpid(), number)
        return evaluate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_castling", interrupted)
        run_tiny(script, tmp_path)
    printed = capsys.readouterr().out
    assert "last.pt at step 3 of 8" in printed
    assert "stopped at step 4 of 8; continue with: " in printed
    assert len(records_of(tmp_path)) == 1
    run_tiny(script, tmp_path)
    assert outcome(tmp_path) == undisturbed(script)


def test_a_second_ctrl_c_interrupts_at_once(undisturbed, tmp_path, monkeypatch):
    """Who does not want to wait for the end of an evaluation need not, and loses nothing but it."""
    def interrupted(*given):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the evaluation went on")

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_castling", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_tiny("train", tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    run_tiny("train", tmp_path)
    assert outcome(tmp_path) == undisturbed("train")


def refused(capsys, code, function, *arguments):
    """What a run that ends with exit status `code` says on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == code, said
    return said


def test_runs_are_not_mixed_up(undisturbed, tmp_path, capsys, monkeypatch):
    """A complete run is not trained further; other flags, data or scripts are refused with what
    differs, and what is left of a run is not thrown away without --overwrite."""
    folder = tmp_path / "a"
    run_tiny("train", folder)
    run_tiny("train", folder)
    assert "resumed from" in capsys.readouterr().out and outcome(folder) == undisturbed("train")
    again = (capsys, 2, run_tiny, "train", folder)
    said = refused(*again, "--seed=1", "--shapes-length=17")
    assert "seed 0 -> 1" in said and "training images 16 -> 17" in said and "--overwrite" in said
    assert "script 'train.py' -> 'detect.py'" in refused(capsys, 2, run_tiny, "detect", folder)
    assert outcome(folder) == undisturbed("train")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # after a failure torchrun starts the same command again
    run_tiny("train", folder, "--overwrite")
    assert "resumed from" in capsys.readouterr().out and outcome(folder) == undisturbed("train")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    shutil.copytree(folder, tmp_path / "b")
    for name in run.CHECKPOINTS:
        (tmp_path / "b" / name).unlink()
    said = refused(capsys, 2, run_tiny, "train", tmp_path / "b")
    assert "parts of a run (best.pt, castled.pt, log.jsonl) but no checkpoint" in said
    # starting over leaves nothing of the old run to be continued, even if the new one dies at once
    anew = ("--overwrite", "--lr=1e30", "--save-minutes=0")
    assert "no checkpoint before it" in refused(capsys, 1, run_tiny, "train", folder, *anew)
    assert {p.name for p in folder.iterdir()} == {"config.json", "log.jsonl", "lock"}
    run_tiny("train", folder)  # of other flags, but nothing was trained
    assert outcome(folder) == undisturbed("train")


@pytest.mark.parametrize("lost", [Path.unlink, lambda log: log.write_text('{"epoch": 0, "cut o')])
def test_the_log_is_written_anew_from_the_checkpoint(undisturbed, tmp_path, lost):
    """log.jsonl deleted or cut while a run trains is whole at the end of the next epoch; deleted or
    cut later, when the run is started again."""
    log = tmp_path / "log.jsonl"
    with after(25, lambda: lost(log)):  # within the second epoch
        run_tiny("train", tmp_path)
    assert outcome(tmp_path) == undisturbed("train")
    lost(log)
    run_tiny("train", tmp_path)
    assert outcome(tmp_path) == undisturbed("train")


# A run of commit 183af44: train.py --model levit_mini --image-size 32, narrowed to make small files.
FIRST_VERSION = ROOT / "tests" / "first_version"


def test_checkpoints_of_the_first_version_load(tmp_path, capsys, monkeypatch):
    """Each file of a run of the first version gives the metrics that were logged then, and can start
    a run. It cannot be continued, and this is said."""
    narrow = dict(dims=(8, 8, 16), heads=(1, 1, 2), key_dim=4, depths=(1, 1, 1))
    monkeypatch.setattr(train, "make_model", lambda args, classes, size: build_model(
        args.model, args.attention, classes, size, **narrow, **run.core_options(args)))  # fmt: skip
    *_, logged, _ = records_of(FIRST_VERSION)
    for name in ("best.pt", "castled.pt", "last.pt"):
        options = ["--eval", f"--checkpoint={FIRST_VERSION / name}", f"--output={tmp_path}"]
        train.main(train.parser().parse_args([*options, "--workers=0"]))
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["test_loss"] == pytest.approx(logged["test_loss"], rel=1e-5), name
        assert record["test_acc1"] == logged["test_acc1"]
    shutil.copytree(FIRST_VERSION, tmp_path / "run")
    same = ("--epochs=4", "--max-steps=6", "--lr=100", "--mask-schedule=anneal")
    said = refused(capsys, 2, run_train, tmp_path / "run", "--model=levit_mini", *same)
    assert f"{tmp_path}/run/last.pt cannot be continued, only evaluated" in said
    assert "older version" in said
    start = f"--checkpoint={FIRST_VERSION / 'best.pt'}"
    run_train(tmp_path / "new", "--model=levit_mini", "--lr=0", "--max-steps=1", start)
    new, first = (
        convert.read_checkpoint(folder / "best.pt")["ema"] for folder in (tmp_path / "new", FIRST_VERSION)
    )
    assert all(torch.equal(new[name], x) for name, x in first.items() if name.endswith(".weight"))


@given(data=st.data())
@settings(max_examples=3, phases=[Phase.generate])
def test_damaged_checkpoints_fall_back(undisturbed, tmp_path_factory, data):
    """One wrong byte of a tensor, or a cut, in last.pt: said, and the run goes on from previous.pt to the same end. A
    damaged file is not evaluated, and with both damaged nothing goes on."""
    folder, said = tmp_path_factory.mktemp("damaged"), io.StringIO()
    killed("train", folder, data.draw(st.integers(20, 30), "event"))
    last, previous = folder / "last.pt", folder / "previous.pt"
    if not last.exists():  # killed between the two renames
        os.replace(previous, last)
        shutil.copyfile(last, previous)
    with zipfile.ZipFile(last) as file:
        record = max(file.infolist(), key=lambda info: info.file_size)
    content = bytearray(last.read_bytes())
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        content[record.header_offset + 200 + data.draw(st.integers(0, record.file_size - 300), "byte")] ^= 1
    last.write_bytes(content)
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit, match="2"):
        run_tiny("train", folder, "--eval", f"--checkpoint={last}")
    assert f"error: {last} " in said.getvalue()
    with contextlib.redirect_stderr(said):
        run_tiny("train", folder)
    assert f"warning: {last} is damaged" in said.getvalue() and outcome(folder) == undisturbed("train")
    for path in (last, previous):
        path.write_bytes(b"cut")
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit, match="2"):
        run_tiny("train", folder)
    assert "nothing to continue from" in said.getvalue()


def test_two_processes_do_not_train_into_one_folder(tmp_path, capsys):
    """Who does already, such as a worker that outlived its torchrun, is named and loses nothing, nor is its checkpoint
    read, here one of other flags; when it ends, the folder is free at once."""
    holds = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("process 7", file=lock, end="", flush=True)
print(flush=True)
sys.stdin.read()
"""
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    run_tiny("train", full)
    (empty / "log.jsonl").write_text("")
    for folder in empty, full:
        before = sorted(path.name for path in folder.iterdir())
        command = [sys.executable, "-c", holds, folder / "lock"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            assert f"process 7 trains into {folder}" in refused(capsys, 2, run_tiny, "train", folder, "--seed=3")
            assert sorted(path.name for path in folder.iterdir()) == sorted({*before, "lock"})
            other.kill()
    run_tiny("train", empty)
    assert (empty / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_disk_without_locks_will_do(tmp_path, monkeypatch):
    """Where locking is an error of another kind than being locked, training goes on without."""
    monkeypatch.setattr(run.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError("No locks available")))
    assert run.hold(tmp_path / "run").name == str(tmp_path / "run" / "lock")


def test_full_disk_leaves_the_old_checkpoint(undisturbed, tmp_path, capsys):
    """A save that the disk has no place for stops the run, says so, leaves the checkpoint before it and no debris."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # noqa: E731
    try:
        with after(6, limit):
            said = refused(capsys, 1, run_tiny, "train", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot save the checkpoint {tmp_path}/last.pt" in said and "the one before it is still there" in said
    assert not list(tmp_path.glob("*.tmp")) and 0 < convert.read_checkpoint(tmp_path / "last.pt")["step"] < 8
    run_tiny("train", tmp_path)
    assert outcome(tmp_path) == undisturbed("train")
    with pytest.raises(run.SaveError, match="there is none yet"):
        run.save(tmp_path / "gone" / "x.pt", {})


def test_a_rename_that_fails_says_where_the_old_checkpoint_is(tmp_path, monkeypatch):
    """Between the two renames of a save what was `last` is `previous`: the message names it."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    run.save(last, {"step": 1}, previous)
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: rename(a, b if Path(a) == last else tmp_path / "no" / "x"))
    with pytest.raises(run.SaveError, match=f"still there: {previous}"):
        run.save(last, {"step": 2}, previous)
    assert convert.read_checkpoint(previous) == {"step": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_run(undisturbed, tmp_path, capsys, monkeypatch, workers):
    """The first image that cannot be read ends the run in one line that names it, wherever it was
    read. Once mended, the run goes on as if nothing had been."""
    draw = data.Shapes.__getitem__
    _, bad = list(data.EpochSampler(16, seed=0))[9]  # in the third step of four images

    def read(shapes, index):
        if index == bad and shapes.split == 0:
            raise data.DataError(f"cannot read image {bad}")
        return draw(shapes, index)

    with monkeypatch.context() as patch:
        patch.setattr(data.Shapes, "__getitem__", read)
        said = refused(capsys, 1, run_tiny, "train", tmp_path, f"--workers={workers}")
    assert said == f"train.py: cannot read image {bad}\n"
    assert convert.read_checkpoint(tmp_path / "last.pt")["step"] == 2
    run_tiny("train", tmp_path)
    assert outcome(tmp_path) == undisturbed("train")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("script", TINY_RUNS)
def test_half_precision_stays_finite(script, dtype, tmp_path):
    """Steps under autocast have finite losses, and move the weights; only float16 scales its loss. 64 pixels, because
    at 32 LeViT's last down-sampling is a stride-2 convolution of a map one pixel wide, whose bfloat16 weight gradient
    on a CPU is random memory (torch 2.6 to 2.15)."""
    size = "--image-size=64"
    run_tiny(script, tmp_path, "--amp", f"--amp-dtype={dtype}", "--clip-grad=1", "--save-minutes=0", size)
    state = convert.read_checkpoint(tmp_path / "last.pt")
    assert bool(state["scaler"]) == (dtype == "float16")
    assert all(math.isfinite(record["train_loss"]) for record in state["records"])
    assert all(value.isfinite().all() for value in state["model"].values())


def test_gradients_that_always_overflow_stop_the_run(tmp_path, capsys, monkeypatch):
    """Float16 steps whose gradients overflow are left out, so that none may be left: the run says so. One step does not
    end it."""
    scale, steps, overflowing = torch.amp.GradScaler.scale, itertools.count(), set(range(50))

    def overflow(scaler, loss):
        return scale(scaler, loss) * (math.inf if next(steps) in overflowing else 1)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflow)
    options = ("--amp", "--amp-dtype=float16", "--epochs=25", "--eval-every=25", "--save-minutes=0")
    said = refused(capsys, 1, run_tiny, "train", tmp_path / "a", *options)
    assert "gradients overflow at every loss scale of float16 at step 41, learning rate" in said
    steps, overflowing = itertools.count(), {3}
    run_tiny("train", tmp_path / "b", *options, "--max-steps=6")
    state = convert.read_checkpoint(tmp_path / "b" / "last.pt")
    assert 0 < state["scaler"]["scale"] < 2.0**16 and all(value.isfinite().all() for value in state["model"].values())


def test_processes_stop_and_go_on_together(tmp_path, capfd):
    """Two processes: a signal to one stops both after the same step, and they go on bit for bit; one may take over with
    the same global batch, told what is no longer exact; another global batch is refused."""
    half = ("--batch-size=2", "--accumulate=1")
    assert in_group(2, lambda rank: run_tiny("train", tmp_path / "whole", *half)) == [0, 0]

    def stopped(rank):
        with after(3, lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank else contextlib.nullcontext():
            run_tiny("train", tmp_path / "two", *half)

    assert in_group(2, stopped) == [0, 0]
    assert convert.read_checkpoint(tmp_path / "two" / "last.pt")["step"] == 4
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert in_group(2, lambda rank: run_tiny("train", tmp_path / "two", *half)) == [0, 0]
    assert outcome(tmp_path / "two") == outcome(tmp_path / "whole")
    capfd.readouterr()
    run_tiny("train", tmp_path / "one")
    assert "not bit for bit" in (said := capfd.readouterr().out) and "processes 2 -> 1" in said
    losses = [[r["train_loss"] for r in outcome(tmp_path / name)[1] if "epoch" in r] for name in ("one", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    with pytest.raises(SystemExit, match="2"):
        run_tiny("train", tmp_path / "one", "--batch-size=2")
    assert "global_batch 4 -> 2" in capfd.readouterr().err


def test_processes_continue_from_one_step(tmp_path, capfd):
    """A process that does not see the checkpoint of the others, as it is on no shared disk, is found
    before any of them trains."""
    run_tiny("train", tmp_path / "0", "--max-steps=1", "--batch-size=4")
    options = ("--max-steps=1", "--batch-size=2")
    assert in_group(2, lambda rank: run_tiny("train", tmp_path / str(rank), *options)) == [2, 2]
    assert capfd.readouterr().err.count("processes would continue from different steps") == 2
    assert not (tmp_path / "1").exists()


def test_nan_on_one_process_stops_all(tmp_path, capfd, monkeypatch):
    """NaN pixels on one rank stop all of them in the same step, before the weights have changed."""
    prepare, calls = train.to_model_input, itertools.count()

    def spoilt(images, *options):
        x = prepare(images, *options)
        return x * math.nan if os.environ["RANK"] == "1" and next(calls) == 2 else x

    monkeypatch.setattr(train, "to_model_input", spoilt)
    assert in_group(2, lambda rank: run_tiny("train", tmp_path, "--batch-size=2")) == [1, 1]
    assert capfd.readouterr().err.count("loss is nan at step 2") == 2
    state = convert.read_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("script", TINY_RUNS)
@pytest.mark.parametrize("pixels", [math.nan, math.inf])
def test_pixels_that_are_no_numbers_stop(script, pixels, tmp_path, capsys, monkeypatch):
    """NaN and Inf in the input of a step are found in that step."""
    module, *_ = TINY_RUNS[script]
    prepare = data.to_model_input
    monkeypatch.setattr(module, "to_model_input", lambda *given: prepare(*given) * pixels)
    assert "loss is nan at step 0" in refused(capsys, 1, run_tiny, script, tmp_path)


def test_checkpoints_that_do_not_fit_the_run_are_refused(tmp_path, capsys):
    """--eval of lost weights is an error, not a score; a step beyond the end is no complete run."""
    run_tiny("train", tmp_path / "a")
    state = convert.read_checkpoint(tmp_path / "a" / "last.pt")
    for part in ("model", "ema"):
        for x in state[part].values():
            x.fill_(math.nan) if x.is_floating_point() else None
    torch.save(state, tmp_path / "nan.pt")
    asked = ("--eval", f"--checkpoint={tmp_path}/nan.pt")
    said = refused(capsys, 2, run_tiny, "train", tmp_path / "b", *asked)
    assert "nan.pt" in said and "holds nan or inf" in said and "{" not in capsys.readouterr().out
    state = convert.read_checkpoint(tmp_path / "a" / "last.pt")
    torch.save(state | {"step": 9}, tmp_path / "a" / "last.pt")
    said = refused(capsys, 2, run_tiny, "train", tmp_path / "a")
    assert "last.pt is at step 9, the run ends at 8" in said


def test_evaluation_without_a_finite_loss_fails(tmp_path, capsys):
    """Finite weights may still overflow: --eval then names the checkpoint, a line break in its name
    or not, and prints no JSON, which has no NaN."""
    run_tiny("train", tmp_path)
    state = convert.read_checkpoint(tmp_path / "best.pt")
    for x in state["ema"].values():
        x.mul_(1e30) if x.is_floating_point() else None
    torch.save(state, tmp_path / "hu\nge.pt")
    asked = ("--eval", f"--checkpoint={tmp_path}/hu\nge.pt")
    said = refused(capsys, 1, run_tiny, "train", tmp_path / "b", *asked)
    assert "hu\nge.pt: the loss is" in said


def test_names_that_are_not_text(tmp_path, capsys):
    """A file name that is not UTF-8 is predicted as any other, and so is what comes after it; a name
    with a line break is whole in the message about an image that cannot be read."""
    run_train(tmp_path / "run", "--max-steps=1")
    images = tmp_path / "images"
    images.mkdir()
    for name in (b"a\xff.png", b"b.png"):
        Image.new("RGB", (40, 40)).save(images / os.fsdecode(name))
    (images / "c\nd.png").write_text("no picture")
    capsys.readouterr()
    files = ["--image", *map(str, sorted(images.iterdir()))]
    with pytest.raises(SystemExit) as stopped:
        run_train(tmp_path / "x", f"--checkpoint={tmp_path}/run/best.pt", *files)
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and "a\\udcff.png: " in printed.out and "b.png: " in printed.out
    with pytest.raises(data.DataError, match=r"c\\nd\.png") as error:
        data.read_image(images / "c\nd.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("both", [False, True])
def test_a_run_outlives_its_reader(tmp_path, both):
    """`train.py | head -1` trains to the end, with its errors in the same pipe or not."""
    command = [sys.executable, "train.py", *SMALL, "--max-steps=2", f"--output={tmp_path}/run"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT if both else subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes) as process:
        assert "levit128" in process.stdout.readline()
        process.stdout.close()
        said = "" if both else process.stderr.read()
        assert process.wait(120) == 0 and "BrokenPipe" not in said
    assert "castling_report" in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize(("variables", "message"), [
    (dict(WORLD_SIZE="abc"), "WORLD_SIZE=abc"), (dict(WORLD_SIZE="0"), "WORLD_SIZE=0"),
    (dict(RANK="-1"), "RANK=-1"), (dict(LOCAL_RANK="x"), "LOCAL_RANK=x"),
    (dict(LOCAL_WORLD_SIZE="0"), "LOCAL_WORLD_SIZE=0"),
    (dict(RANK="2", WORLD_SIZE="2"), "RANK=2 in the environment: expected less than WORLD_SIZE=2"),
    (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="abc"), "MASTER_PORT=abc"),
    (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"), "MASTER_PORT=taken"),
])  # fmt: skip
def test_variables_of_processes_are_checked(tmp_path, capsys, monkeypatch, variables, message):
    """What torchrun would have set is refused by name and value where it makes no sense, or the port
    is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"MASTER_PORT": port, **variables}.items():
            monkeypatch.setenv(name, value)
        said = refused(capsys, 2, run_tiny, "train", tmp_path)
    assert message.replace("taken", port) in said and len(said.splitlines()) == 1


def test_each_process_has_a_gpu(monkeypatch):
    """A process takes the GPU of its number on the machine; without one it says so."""
    torchrun, joined = dict(RANK="7", WORLD_SIZE="8", LOCAL_RANK="3"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(run.dist, "init_process_group", lambda kind, device_id: joined.append((kind, device_id)))
    for env, gpus, index in ((torchrun, 4, 3), ({}, 4, 0), (torchrun, 1, None)):
        monkeypatch.setattr(os, "environ", dict(env))
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        if index is None:
            with pytest.raises(ValueError, match="process 3 of this machine has no GPU: there are 1"):
                run.start_processes()
        else:
            assert run.start_processes() == torch.device("cuda", index)
    assert joined == [("nccl", torch.device("cuda", 3))]


def odd_images(folder):
    """{what: path} of images that are unusual, and fine."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    thin = Image.new("RGB", (20_000, 1), "orange")
    far = folder.joinpath(*["sehr langer Pfad " + 100 * "ß"] * 5)
    far.mkdir(parents=True)
    palette = pixels.quantize(16)
    palette.info["transparency"] = 3
    images = {
        "grey.png": pixels.convert("L"), "bits.png": pixels.convert("1"), "palette.png": palette,
        "alpha.png": pixels.convert("RGBA"), "grey alpha.png": pixels.convert("LA"), "cmyk.jpg": pixels.convert("CMYK"),
        "one.png": pixels.crop((0, 0, 1, 1)), "wide.png": thin, "high.png": thin.transpose(Image.Transpose.ROTATE_90),
        "日本語 ñ.png": pixels,
    }  # fmt: skip
    for name, image in images.items():
        image.save(folder / name)
    pixels.save(far / "far.jpg")
    return {name: folder / name for name in images} | {"far": far / "far.jpg"}


def test_odd_images_are_read(tmp_path):
    """Grey, palette, alpha, CMYK, one pixel, 20,000 pixels wide or high, names of any language, paths of 600
    characters: read as RGB, and every transform of the three scripts takes them."""
    classifying, segmenting = flags("--data=.", "--image-size=32", "--randaugment=9"), flags("--image-size=32")
    segmenting.data = "folder"
    for name, path in odd_images(tmp_path).items():
        image = data.read_image(path)
        assert image.mode == "RGB" and image.size == Image.open(path).size, name
        for transform in (train.train_transform(classifying), train.eval_transform(classifying)):
            assert transform(image).shape == (3, 32, 32), name
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        box = [[0, 0, image.width, image.height]]
        for transform in (detect.augmentation(True), None):
            resized = detect.Resized([detect.make_item(tensor, box, [0], 1)], transform, 0)
            assert resized[0, 0, 64]["image"].shape == (3, 64, 64), name
        labels = torch.zeros(tensor.shape[1:], dtype=torch.uint8)
        pairs = segment.Pairs([(tensor, labels)], segment.train_transform(segmenting), 0)
        assert [x.shape[-2:] for x in pairs[0, 0]] == [(32, 32), (32, 32)], name
        seen = segment.resized_whole(tensor, labels, 32)[0]
        assert 1 <= min(seen.shape[1:]) <= 32 and max(seen.shape[1:]) <= 128, name


def test_bad_images_are_named(tmp_path, monkeypatch):
    """16 bits and floats, which would be clipped, bombs, cut and empty files, text, and links in a circle are refused
    by name; of a size that Pillow only warns of, an image is read."""
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(good)
    bad = {name: tmp_path / name for name in ("16.png", "float.tiff", "bomb.png", "cut.jpg", "empty.png", "text.png",
                                              "circle.png", "folder.png", "gone.png", "pipe.png",
                                              "texture.png")}  # fmt: skip
    os.mkfifo(bad["pipe.png"])
    bad["texture.png"].write_bytes(b"DDS " + bytes(200))
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(bad["16.png"])
    Image.fromarray(np.zeros((9, 9), np.float32)).save(bad["float.tiff"])
    Image.new("RGB", (250, 100)).save(bad["bomb.png"])
    bad["cut.jpg"].write_bytes(good.read_bytes()[:800])
    bad["empty.png"].write_bytes(b"")
    bad["text.png"].write_text("no picture")
    bad["circle.png"].symlink_to(bad["circle.png"])
    bad["folder.png"].mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for path in bad.values():
        with pytest.raises(data.DataError, match=re.escape(str(path))):
            data.read_image(path)
    Image.new("RGB", (150, 100)).save(good)
    with pytest.warns(Image.DecompressionBombWarning):
        assert data.read_image(good).size == (150, 100)


def test_folders_of_links_and_long_names(tmp_path, photos, capsys, monkeypatch):
    """Links to other folders are followed. Names that no file system takes are wrong arguments.
    Nothing is written but to --output."""
    monkeypatch.chdir(tmp_path / "photos")
    before = sorted(tmp_path.rglob("*"))
    (photos / "train" / "dark" / "more").symlink_to(photos / "test" / "dark")
    run_tiny("train", tmp_path / "out", f"--data={photos}", "--batch-size=4", "--max-steps=1")
    assert "15 training" in capsys.readouterr().out
    (photos / "train" / "dark" / "more").unlink()
    long = 300 * "x"
    for wrong in (f"--data={long}", f"--output={long}", f"--checkpoint={long}"):
        assert "too long" in refused(capsys, 2, run_tiny, "train", tmp_path / "new", wrong), wrong
    assert "too long" in refused(capsys, 2, run_tiny, "train", tmp_path / "new", f"--image={long}", "--checkpoint=x")
    assert [path for path in sorted(tmp_path.rglob("*")) if path.relative_to(tmp_path).parts[0] != "out"] == before


@pytest.mark.parametrize("script", TINY_RUNS)
def test_no_code_of_a_checkpoint_runs(script, tmp_path, capsys):
    """A pickle that would write a file is refused wherever a checkpoint is read: by its own folder too."""
    evil = tmp_path / "run" / "last.pt"
    evil.parent.mkdir()
    torch.save({"model": Malicious(tmp_path / "owned")}, evil)
    ways = [(), (f"--checkpoint={evil}", "--eval"),
            (f"--checkpoint={evil}", f"--image={evil}", f"--output={tmp_path}/x.png")]  # fmt: skip
    teacher = ("--distillation=hard", "--teacher=levit128", f"--teacher-checkpoint={evil}")
    more = {"train": (*teacher, "--overwrite"), "detect": (f"--backbone={evil}", "--overwrite")}
    ways += [more[script]] if script in more else []
    for options in ways:
        assert "last.pt" in refused(capsys, 2, run_tiny, script, evil.parent, *options)
    assert not (tmp_path / "owned").exists()


# ---- README ----------------------------------------------------------------------------------------------------------


def test_readme_commands_are_sound():
    """Every command line of this repository's scripts in the README has flags and values that its parser takes, and a
    model that can be built with them."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^\s*((?:python|torchrun|srun) .*)$", text, re.MULTILINE)
    commands += re.findall(r"`((?:python|torchrun) [^`]*)`", text)
    scripts = (train, detect, segment)
    modules = {f"{module.__name__}.py": module for module in (*scripts, flops, bench, figures)}
    built, seen = set(), []
    for command in commands:
        words = shlex.split(command.split("&&")[-1], comments=True)
        for script in modules.keys() & set(words):
            module = modules[script]
            args = module.parser().parse_args(words[words.index(script) + 1 :])
            seen.append(script)
            if module in scripts:
                module.resolve(args)
                kind = (script, args.model, args.attention)
                if kind not in built and not args.model.startswith("timm:"):
                    with torch.device("meta"):
                        module.make_model(args, 10, args.image_size)
                built.add(kind)
    assert set(seen) == modules.keys() and len(seen) >= 25 and len(built) >= 8


def test_readme_names_tests_that_exist():
    """Every promise of the table of faults names the tests that hold it to it."""
    faults = (ROOT / "README.md").read_text().split("## Faults and input")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.*)\|$", faults, re.MULTILINE)[2:]
    files = [*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")]
    tests = re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in files), re.MULTILINE)
    for row in rows:
        names = re.findall("`([^`]*)`", row.replace("\\|", "").split("|")[-1])
        assert names and all(any(name in test for test in tests) for name in names), row


def test_readme_tables_are_those_of_the_runs():
    """The README's tables of results are what `figures.py table` makes of the committed logs: no seed of a row is left
    out, all are of one commit without changes, and nothing is typed."""
    text = (ROOT / "README.md").read_text()
    for path in figures.RUNS:
        runs = figures.read_runs(path)
        assert figures.results_table(runs) in text
        seeds = {}
        for one in runs:
            seeds.setdefault((one["config"]["model"], figures.row_of(one)), []).append(one["config"]["seed"])
        assert all(sorted(found) == [0, 1, 2] for found in seeds.values())
        assert re.fullmatch("[0-9a-f]{40}", *{one["config"]["environment"]["commit"] for one in runs})


def test_readme_pictures_exist():
    """Every picture that the README shows is a committed figure of figures.py."""
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    assert pictures and set(pictures) <= {f"figures/{name}.png" for name in figures.FIGURES}
    assert all((ROOT / picture).is_file() for picture in pictures)
