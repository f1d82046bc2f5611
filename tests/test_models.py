"""models.py: classifiers, backbones, and the options that build them. Oracles: timm, and slow loops."""

import copy
import functools
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import attention
import convert
import models
from attention import AttentionCore, LinearAngularAttention, castle, mask_density, set_threshold
from conftest import FAMILIES, ROOT, TINY_DEIT, TINY_LEVIT, TINY_MVIT, examples, shaken, tiny
from convert import load_pretrained
from models import build_model, list_models
from test_castling import cosines, parameters, randn

# ---- classifiers ---------------------------------------------------------------------------------


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
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = oracle(x)
        difference = (model(x) - expected).abs().max().item()
        print(f"{name} against {theirs}: maximal difference {difference:.2g}")
        assert difference < 1e-5 and expected.std() > 0.05
        if name.startswith("levit"):
            x = torch.randn(2, 3, 224, 224)
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


def test_models_start_as_published():
    """Before training the parameters of DeiT (but the class token) and LeViT have the mean and
    deviation of timm's. MViTv2's linear layers and relative positions have deviation 0.02, their
    biases 0. LCNet's convolutions have He's deviation."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    for name, theirs in (("deit_tiny", "deit_tiny_patch16_224"), ("levit128", "levit_128")):
        oracle = dict(timm.create_model(theirs).named_parameters())
        for key, p in build_model(name, "softmax").named_parameters():
            expected = torch.stack([oracle[key].mean(), oracle[key].std()])
            if key == "cls_token":
                expected = torch.tensor([0, 0.02])
            error = 6 * expected[1].item() / p.numel() ** 0.5  # over 4 deviations of the sampling
            found = torch.stack([p.mean(), p.std()])
            assert_close(found, expected, rtol=0, atol=error, msg=f"{key}: {found}, {expected}")
    model = build_model("mvitv2_tiny", "softmax")
    for key, p in model.named_parameters():
        if "rel_pos" in key or isinstance(model.get_submodule(key.rpartition(".")[0]), nn.Linear):
            std = 0 if key.endswith("bias") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), key
    stem = build_model("lcnet_s").conv_stem.weight
    assert stem.std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.2)


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
@settings(max_examples=examples(15))
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
            if block.attn.stride_q == 2:
                x = F.max_pool2d(x.T.unflatten(1, grid)[None], 3, 2, 1)[0].flatten(1).T
            x, grid = x + y, out_grid
            y = block.mlp.fc1(block.norm2(x))
            if block.mlp.dwconv is not None:
                maps = F.conv2d(y.T.unflatten(1, grid)[None], block.mlp.dwconv.weight, padding=2, groups=y.shape[1])
                y = maps[0].flatten(1).T
            x = x + block.mlp.fc2(F.gelu(y))
    assert_close(model(image), model.head(model.norm(x).mean(0)[None]))


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
    mlp, x = models.Mlp(6, 2**16, 3, batch_norm=True), randn(4, 12, 6, dtype=torch.float32)
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


# ---- detection backbones -------------------------------------------------------------------------


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
