"""convert.py: checkpoints of others, folded norms, converted models, export."""

import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import attention
import convert
import detect
import figures
import flops
import models
import segment
import train
from attention import AttentionCore, castle, masked_softmax_attention, set_threshold
from conftest import FAMILIES, TINY_DEIT, TINY_LCNET, TINY_LEVIT, Malicious, refused, shaken, tiny, tiny_segmenter
from convert import load_pretrained
from models import build_model
from test_castling import randn

# ---- checkpoints ---------------------------------------------------------------------------------


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
    places = [f"stages.{i}.blocks.{j}." for i, stage in enumerate(model.stages) for j in range(len(stage["blocks"]))]
    weights = {}
    for name, value in model.state_dict().items():
        for number, place in enumerate(places):
            name = name.replace(place, f"blocks.{number}.")
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


def test_official_files_evaluate_and_start_runs(tmp_path, photos, capsys, monkeypatch):
    """--eval and --image take a released file with --model and --attention softmax, and refuse to judge a castling
    model by one; --checkpoint starts a castling run from it and says what carried over."""
    monkeypatch.setattr(train.run, "count_macs", lambda model, images: 1)  # of the report, which is not looked at
    model = shaken(build_model("levit128", "softmax", num_classes=2, image_size=32))
    torch.save(official_levit(model), tmp_path / "levit.pth")
    common = ["--model=levit128", "--image-size=32", f"--checkpoint={tmp_path}/levit.pth", "--workers=0"]
    train.main(train.parser().parse_args([*common, "--attention=softmax", "--eval", "--json", f"--data={photos}"]))
    assert json.loads(capsys.readouterr().out)["test_acc1"] >= 0
    train.main(train.parser().parse_args([*common, "--attention=softmax", f"--image={photos}/test/dark/0.jpg"]))
    assert "class 1" in capsys.readouterr().out
    judged = train.parser().parse_args([*common, "--eval", f"--data={photos}"])
    assert "--attention softmax" in refused(capsys, 2, train.main, judged)
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
                 levit="missing cls_token", numbered="by name", odd="head.weight is no dense tensor", flipped="damaged",
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
        (head.to_sparse(), "no dense"), (head.to("meta"), "no dense"), (quantised, "qint8"),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_other_classes_gives_all_but_its_class_layers(tmp_path, family):
    """Weights to start from: class layers keep their initial values where the classes are not as many, and are loaded
    where they are."""
    torch.save(official(family, tiny(family, "softmax")), tmp_path / "five.pth")
    layers = ("head", "classifier.")
    for count in (5, 7):
        model = tiny(family, "softmax", seed=1, num_classes=count)
        report = load_pretrained(model, tmp_path / "five.pth", class_layers=layers)
        assert all(name.startswith(layers) for name in report.new) and bool(report.new) == (count == 7)
        assert len(report.loaded) + len(report.new) == len(model.state_dict())


@pytest.mark.parametrize(
    ("family", "name", "attention", "into"),
    [
        ("levit", "levit128", "softmax", "deit_tiny"),
        ("mvit", "mvitv2_tiny", "softmax", "levit128"),
        ("deit", "deit_tiny", "castling", "deit_small"),
    ],
)
def test_the_checkpoint_of_another_model_is_recognised(tmp_path, family, name, attention, into):
    """The error names the model that the file is of, whether its authors or this project wrote it."""
    torch.save(official(family, build_model(name, attention)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt does not fit the model. It looks like a checkpoint of {name}"):
        load_pretrained(build_model(into), tmp_path / "x.pt")


def test_hints_do_not_mislead(tmp_path):
    """A file of the right model with other classes, or integers for positions, is not said to be of another model, or
    of another image size."""
    torch.save(build_model("levit128", "softmax", 5).state_dict(), tmp_path / "five.pth")
    with pytest.raises(ValueError, match="does not fit the model. 5 classes in the file, 7 in the model"):
        load_pretrained(build_model("levit128", num_classes=7), tmp_path / "five.pth")
    deit = tiny("deit", "softmax")
    torch.save(deit.state_dict() | {"pos_embed": deit.pos_embed.long()}, tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="does not fit the model. pos_embed is torch.int64"):
        load_pretrained(tiny("deit"), tmp_path / "whole.pth")


# ---- folding norms, converting other models ------------------------------------------------------


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
    assert all(layer["new"] == ["dconv.weight"] and len(layer["kept"]) >= 3 for layer in report.layers.values())
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


@pytest.mark.parametrize("name", ["attn_drop", "attention_dropout", "dropout", "dropout_prob"])
@pytest.mark.parametrize("kind", [float, nn.Dropout])
def test_conversion_keeps_attention_dropout(name, kind):
    """By any of the names that libraries give it, as a number or a module."""
    block = OlderBlock()
    del block[0].dropout
    setattr(block[0], name, kind(0.1))
    convert.convert(block)
    assert block[0].dropout == 0.1


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
    (lambda: nn.Sequential(nn.MultiheadAttention(24, 2, add_bias_kv=True)), r"0 \(Multihead.*no place for bias_k"),
    (lambda: nn.Sequential(nn.MultiheadAttention(24, 2, add_zero_attn=True)), r"0 \(Multihead.*something else than"),
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


# ---- export --------------------------------------------------------------------------------------


def deployed(name):
    """What --export writes of a small model."""
    if name == "detector":
        torch.manual_seed(0)
        return detect.Boxes(detect.build_detector("lcnet_vit_s", num_classes=5, channels=16, convs=1, **TINY_LCNET))
    if name == "converted":
        model, _ = foreign("timm norms")
        convert.convert(model)
        return shaken(model)
    if name == "mvit, softmax":
        return tiny("mvit", "softmax", image_size=96)
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


@pytest.mark.parametrize("name", ["deit", "mvit, softmax", "detector"])
def test_onnx_files_equal_the_model(tmp_path, name):
    """The file's outputs in ONNX Runtime at three sizes; the model is left as it was."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = deployed(name).eval()
    shapes, difference = convert.export(model, tmp_path / "model.onnx", 96)
    assert shapes == [(1, 3, 96, 96), (2, 3, 128, 160), (3, 3, 192, 128)] and difference < 1e-5
    assert (tmp_path / "model.onnx").stat().st_size > 10_000
    assert all(core.auxiliary == (core.kernel != "softmax") for core in attention.cores(model).values())


def test_a_graph_takes_the_size_of_its_model(tmp_path):
    """Also where a grid of one token lets torch.export free no side: then it takes that size alone."""
    model = deployed("levit").eval()
    shapes, difference = convert.export(model, tmp_path / "model.pt2", 32)
    assert shapes == [(1, 3, 32, 32)] and difference < 1e-5


def test_a_segmenter_is_exported_for_whole_patches(tmp_path):
    """Sides are multiples of its coarsest stride, two patches: wanted and tried sizes are rounded up to them."""
    model = segment.Scores(tiny_segmenter(patch_size=12))
    shapes, difference = convert.export(model, tmp_path / "model.pt2", 100)
    assert shapes == [(1, 3, 120, 120), (1, 3, 168, 192), (1, 3, 240, 168)] and difference < 1e-5


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
