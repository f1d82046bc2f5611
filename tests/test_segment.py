"""segment.py: the backbone, recipe, data, evaluation, and the script."""

import colorsys
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close

import convert
import flops
import models
import segment
import train
from attention import castle, set_threshold
from conftest import ROOT, examples, in_group, records_of, refused, shaken, tiny, tiny_segmenter
from convert import load_pretrained
from models import build_model
from test_castling import randn, slow_attention

DECODERS = list(segment.PIXEL_DECODERS)


@pytest.fixture(autouse=True)
def no_counting(monkeypatch):
    """Reports have no MACs: none is asked for here, and counting takes as long as a short run."""
    monkeypatch.setattr(segment.run, "count_macs", lambda model, images: 1)


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


@pytest.mark.parametrize("pixel_decoder", DECODERS)
def test_first_weights_are_as_published(pixel_decoder):
    """Matrices of attention and feed-forward layers are uniform within sqrt(6 / (in + out)), filters of the pixel
    decoder within sqrt(3 / in), with biases of 0; those of Linear and Conv2d would be within sqrt(1 / in)."""
    model = segment.build_segmenter("vit_mini", pixel_decoder=pixel_decoder, dim=32, depth=1, width=64, layers=2)
    layers, count = [*model.pixel_decoder.encoder, *model.decoder.layers], 0
    for matrix in (p for layer in layers for name, p in layer.named_parameters() if p.ndim == 2 and "ffn" in name):
        assert 0.98 < matrix.abs().max() / math.sqrt(6 / sum(matrix.shape)) <= 1
        count += 1
    assert count == 2 * len(layers)
    for conv in (module for module in model.pixel_decoder.modules() if isinstance(module, nn.Conv2d)):
        assert 0.98 < conv.weight.abs().max() / math.sqrt(3 / conv.weight[0].numel()) <= 1
        assert conv.bias is None or not conv.bias.any()


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
    said = refused(capsys, 2, run_segment, tmp_path / "no", *options, "--image-size=32")
    assert "--width 32 with --patch-size 16 needs an --image-size above 32" in said and not (tmp_path / "no").exists()
    run_segment(tmp_path / "yes", *options, "--image-size=48")
    ask = [f"--checkpoint={tmp_path}/yes/best.pt", f"--image={tmp_path}/yes/example.png", "--image-size=32"]
    asked = segment.parser().parse_args(ask)
    assert "needs an --image-size above 32" in refused(capsys, 2, segment.main, asked)
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
@settings(max_examples=examples(30))
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
        (Image.fromarray(np.full((good.height, good.width), 5, np.uint8)), "label 5, but there are 4 classes"),
    ):  # fmt: skip
        wrong.save(folder / "1.png")
        said = refused(capsys, 2, run_segment, tmp_path / "run", *options)
        assert message in said and str(folder / "1.png") in said and said.count("\n") == 1
        assert not (tmp_path / "run").exists()
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
    found = segment.evaluate(model.train(), segment.validation_loader(args, data), args, torch.device("cpu"))
    assert not model.training
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
    """Half image, half the label's colour, enlarged by a whole number to a short side near 512; below it a legend row
    in the same colour for each class found, largest first; "background" is not tinted. A large picture keeps its size.
    150 classes have colours that can be told apart."""
    image, labels = Image.new("RGB", (40, 30), (100, 100, 100)), np.zeros((30, 40), np.uint8)
    labels[:, :15] = 2
    drawn = np.asarray(segment.overlay(image, labels, ["a", "b", "c"])).astype(int)
    assert drawn.shape == (17 * 30 + 2 * 21, 17 * 40, 3)
    for x, label in ((5, 2), (30, 0)):
        colour = (100 + np.array(segment.colour_of(label))) / 2
        assert np.abs(drawn[17 * 10 : 17 * 11, 17 * x : 17 * (x + 1)] - colour).max() <= 1
    for row, label in ((0, 0), (1, 2)):
        assert (drawn[17 * 30 + 21 * row + 12, 12] == segment.colour_of(label)).all()
    drawn = np.asarray(segment.overlay(image, labels, ["background", "b", "c"]))
    assert (drawn[: 17 * 30, 17 * 15 :] == 100).all() and (drawn[: 17 * 30, : 17 * 15] != 100).any()
    assert (drawn[17 * 30 + 12, 12] == 255).all() and (drawn[17 * 30 + 21 + 12, 12] == segment.colour_of(2)).all()
    large = segment.overlay(image.resize((800, 600)), labels.repeat(20, 0).repeat(20, 1), ["a", "b", "c"])
    assert large.size == (800, 600 + 2 * 25)
    assert segment.overlay(Image.new("RGB", (2, 3000)), np.zeros((3000, 2), np.uint8), ["a"]).height == 3000 + 18
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
        asked = ["--eval", "--json", f"--checkpoint={tmp_path}/run/{name}", "--workers=0"]
        segment.main(segment.parser().parse_args(asked))
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
    assert drawn.width >= 650 and drawn.height == 13 * 40 + 21 * len(found[0]["shares"])
    segment.main(segment.parser().parse_args(["--image=photos/b.jpg", predict[0], "--output=over.png"]))
    assert "%" in capsys.readouterr().out and (tmp_path / "over.png").is_file()
    nowhere = segment.parser().parse_args(["--image=photos/b.jpg", *predict, "--output=none/x.png"])
    assert "none/x.png" in refused(capsys, 2, segment.main, nowhere)
    (tmp_path / "photos" / "a.png").write_bytes(b"cut")
    with pytest.raises(SystemExit) as stopped:
        segment.main(segment.parser().parse_args([*photos, *predict]))
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and "cannot read image 'photos/a.png'" in printed.err
    assert [Path(r["image"]).name for r in json.loads(printed.out)] == ["b.jpg"]
    assert not [*tmp_path.rglob("b_overlay.png")]  # --json alone draws nothing
    segment.main(segment.parser().parse_args(["--image=photos/b.jpg", predict[0]]))
    assert (tmp_path / "run" / "b_overlay.png").is_file()  # beside the checkpoint


def test_segmenter_is_exported_as_scores(tmp_path, monkeypatch, capsys):
    """--export of a checkpoint writes a graph of its class scores: (1, 3, H, W) -> (1, K, H, W) of its weights."""
    run_segment(tmp_path / "run", "--max-steps=1", "--layers=1")
    written = []
    monkeypatch.setattr(segment.run, "export", lambda graph, *_: written.append(graph) or ([(1, 3, 64, 64)], 1e-6))
    options = (f"--checkpoint={tmp_path}/run/best.pt", f"--export={tmp_path}/model.pt2")
    segment.main(segment.parser().parse_args(options))
    assert "run on 1x3x64x64; largest difference 1.0e-06" in capsys.readouterr().out
    args = segment.parser().parse_args(options)
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
def test_every_segmentation_option_trains(tmp_path, capsys, options):
    """Each combination runs to its report; a model without a branch reports no gap; no limit of gradients is printed
    where there is none."""
    *_, report = run_segment(tmp_path, "--max-steps=2", "--eval-steps=1", *options)
    assert ("gradient norm at most" in capsys.readouterr().out) == ("--clip-grad=0" not in options)
    assert ("castling_gap" in report["castling_report"]) == all("attention=" not in o for o in options)


def test_segmentation_learns(tmp_path):
    """Sixty steps on one scene, over and over: the loss falls to a third, mIoU rises above that of background alone."""
    options = ("--shapes-length=1", "--max-steps=60", "--eval-steps=30", "--split=train", "--lr=3e-3", "--ema-decay=0")
    run_segment(tmp_path / "run", *options, "--batch-size=4")
    first, second, _ = records_of(tmp_path / "run")
    assert second["train_loss"] < 0.6 * first["train_loss"]
    args = segment.parser().parse_args([f"--checkpoint={tmp_path}/run/last.pt", "--workers=0"])
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

    def ends(code, *options):
        return refused(capsys, code, run_segment, tmp_path / "refused", *folder, "--overwrite", *options)

    assert "--num-classes 7" in ends(2, "--num-classes=7")
    (annotation / "2.png").rename(annotation / "spare.png")
    assert str(image / "2.jpg") in ends(2) and not (tmp_path / "refused").exists()
    good = Image.open(annotation / "spare.png").copy()
    for workers, (wrong, message) in enumerate((
        (good.convert("RGB"), "mode RGB"), (good.crop((0, 0, 9, 9)), "9 x 9"),
        (Image.fromarray(np.full((good.height, good.width), 5, np.uint8)), "label 5, but there are 4 classes"),
        (good.convert("I;16"), "mode I;16"), (good.convert("1"), "mode 1"),
    )):  # fmt: skip
        wrong.save(annotation / "2.png")
        said = ends(1, f"--workers={int(workers == 1)}")
        assert str(annotation / "2.png") in said and message in said
    good.convert("L").save(annotation / "2.png", format="JPEG")
    assert "is a JPEG file" in ends(1)
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
    assert "mode L;4" in ends(1)
    good.save(annotation / "2.png")
    whole = (image / "2.jpg").read_bytes()
    (image / "2.jpg").write_bytes(whole[:20])
    assert f"cannot read image '{image}/2.jpg'" in ends(1)
    (image / "2.jpg").write_bytes(whole)
    for path in (streets / "annotations" / "validation").iterdir():
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    Image.fromarray(np.zeros_like(np.array(good))).save(annotation / "2.png")
    assert "has a label" in ends(1)
    (annotation / "2.png").write_bytes(b"cut")
    assert str(annotation / "2.png") in ends(1)
    (streets / "classes.txt").write_text("road\nroad\n")
    assert "names 'road' twice" in ends(2)
    (streets / "classes.txt").write_bytes("straße".encode("latin1"))
    assert f"cannot read {streets}/classes.txt" in ends(2)
    (streets / "images" / "validation").rename(streets / "images" / "val")
    (streets / "classes.txt").unlink()
    assert f"{streets}/images/validation" in ends(2)
    assert "no-such" in ends(2, "--data=no-such")
    assert "but shapes has 13" in ends(2, "--data=shapes", "--num-classes=4")


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
def grads(model, images, labels, count):
    segment.set_loss(model(images), segment.targets_of(labels, labels.shape[1:]), count, 64).backward()
    return {{name.removeprefix("module."): p.grad for name, p in model.named_parameters()}}
expected = grads(build(), images, labels, 7.0)
dist.init_process_group("gloo")
rank, ddp = dist.get_rank(), DistributedDataParallel(build())
images, mine = images[rank : rank + 1], labels[rank : rank + 1]
targets = segment.targets_of(mine, mine.shape[1:])
count = segment.mean_masks(targets, torch.device("cpu"))
assert count == 3.5, count
uneven = targets if rank else []
assert segment.mean_masks(uneven, torch.device("cpu")) == 1.0
found = grads(ddp, images, mine, count)
scale = max(value.abs().max() for value in expected.values())
worst = max((expected[name] - found[name]).abs().max() for name in expected)
assert worst < 1e-4 * scale, (worst, scale)
predicted = torch.full((1, 32, 32), rank)
matrix = torch.tensor(segment.all_sum(segment.confusion(predicted, mine, 5)))
both = segment.confusion(torch.tensor([0, 1])[:, None, None].expand(2, 32, 32), labels, 5)
assert torch.equal(matrix, both)
dist.barrier(); del ddp; gc.collect()
dist.destroy_process_group()
""")
    assert in_group(2, lambda rank: exec(script.read_text(), {})) == [0, 0]
