"""flops.py: conventions of counting, and the tables as printed."""

import copy
import json
import re

import pytest
import torch
from torch import nn

import attention
import figures
import flops
from attention import AttentionCore, castle
from conftest import FAMILIES, tiny
from models import build_model
from test_castling import Calls, attention_macs, parameters


def weights_only(model):
    """Parameters that the paper counts: weights of convolutions and linear layers."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def worst_deviation(rows):
    """The largest relative difference to a number that the paper prints, of MACs or parameters."""
    pairs = [(row[key], row[f"paper_{key}"]) for row in rows for key in ("params_m", "macs_g")]
    return max(abs(ours / paper - 1) for ours, paper in pairs if paper is not None)


def test_detection_tables(capsys):
    """Tables 3, 6 and 7 as recovered: the paper's convention and pure MACs, in G to four digits; every row is within
    4% of what the paper prints."""

    def table(number):
        flops.main(flops.parser().parse_args([f"--table={number}", "--json"]))
        rows = json.loads(capsys.readouterr().out)
        assert worst_deviation(rows) < 0.04
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
    wrapped = torch.optim.swa_utils.AveragedModel(model)
    assert flops.count(wrapped, x).attention == flops.count(model, x).attention > 0
    whole, castled = flops.count(model, x), flops.count(castle(copy.deepcopy(model)), x)
    flops.peak_activation_bytes(model, x)
    assert model.training and not frozen.training and attention.mask_statistics(model) == before
    sizes = [(*q.shape[1:], v.shape[-1]) for q, _, v in seen.values()]
    branch = sum(attention_macs("softmax", h, n, d, e) for h, n, d, e in sizes)
    assert whole.macs - castled.macs == branch == whole.attention - castled.attention
    assert castled.by_module[""] == castled.macs
    assert castled.params == parameters(model) and castled.params_weights == weights_only(model)


def test_pooling_counts_what_it_reads():
    """Under mmcv's rules global pooling costs the elements of the map. Another mean costs nothing."""
    x = torch.zeros(1, 4, 8, 8, device="meta")
    count = lambda f: flops.count(Calls(f), x, convention="paper-det").macs  # noqa: E731
    assert count(torch.nn.AdaptiveAvgPool2d(1)) == 4 * 8 * 8 and count(lambda x: x.mean((1, 2))) == 0


def test_peak_memory_is_the_live_maximum():
    """Two (8, 8) float64 results alive at once, a third made after one is dropped; a change in place adds nothing;
    a softmax's N x N matrix counts."""
    def three(x):
        y = (x + 1).mul_(3)
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
        assert worst_deviation(printed) < worst
    levit = [r for r in printed if (r["model"], r["attention"]) == ("levit128", "castling")]
    notes = {r["note"]: round(r["macs_g"], 3) for r in levit}
    assert notes == {"C1: softmax down-sampling": 0.494, "C2: all castled": 0.487}
    flops.main(flops.parser().parse_args(["--table=2"]))
    printed = capsys.readouterr().out  # a row: both counts, both printed numbers, both deviations
    assert re.search(r"deit_base +castling +87\.215 +87\.22 +-0\.01% +17\.2779 +17\.28 +-0\.01%", printed)
    compared = ["--image-size=64", "--attention=castling,softmax,cosine"]
    flops.main(flops.parser().parse_args([*compared, "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert [r["note"] for r in rows] == ["castled", "", ""]
    assert rows[1]["params_m"] == pytest.approx(parameters(build_model("levit128", "softmax", image_size=64)) / 1e6)
    assert all(sum(r["by_module_g"].values()) == pytest.approx(r["macs_g"]) for r in rows)
    for name in ("mvitv2_tiny", "esnet_vit_s", "lcnet_vit_s", "deit_tiny", "vit_mini_dense"):
        parts = flops.compare(name, ["castling", "softmax"], 64, "macs")
        assert all(sum(r["by_module_g"].values()) == pytest.approx(r["macs_g"]) for r in parts)
    with monkeypatch.context() as patched:  # counted once
        patched.setattr(flops, "compare", lambda *given: rows)
        flops.main(flops.parser().parse_args(compared))
    printed = capsys.readouterr().out
    assert "auxiliary branch" in printed and re.search(" castling +softmax +cosine\n", printed)
    assert len({len(line) for line in printed.splitlines()[1:]}) == 1  # columns stand below their names
    assert re.search("\n  head_dist +0.0000 +0.0004 +0.0000\n", printed)  # softmax: 384 x 1000 weights
    monkeypatch.setattr(flops, "CURVE_PIXELS", (64, 1024))
    flops.main(flops.parser().parse_args(["--curve", "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["softmax_macs_g"] == flops.count(*flops.meta_model("deit_tiny", "softmax", 64)).macs / 1e9
    assert rows[0]["castling_macs_g"] > rows[0]["softmax_macs_g"]  # 4 x 4 tokens: the DWConvs cost more than they save
    assert rows[-1]["castling_macs_g"] < 0.3 * rows[-1]["softmax_macs_g"]
    flops.main(flops.parser().parse_args(["--curve"]))
    first, last = (f"{r['image_size']:6}{r['softmax_macs_g']:12.3f}" for r in rows)
    printed = capsys.readouterr().out
    assert first in printed and last in printed and "cheaper from 1024 px" in printed
    assert re.search("px +softmax +castled +ratio", printed)
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
