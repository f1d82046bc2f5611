"""figures.py: rows of an attention map, the figures drawn, tables of runs."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import data
import detect
import figures
import flops
import train
from attention import AttentionCore, angular_similarity, castle
from conftest import flags, refused, tiny
from test_castling import cosines, qkv, randn

# ---- looking inside a layer ----------------------------------------------------------------------


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


def test_mask_of_a_half_precision_core_has_its_threshold_in_float32():
    """As the core itself takes it: in bfloat16 it would be up to 0.4% off, on the other side of some entries."""
    q, k = 2 * randn(2, 1, 1, 150, 8, dtype=torch.bfloat16)
    core = AttentionCore(1, auxiliary=True).bfloat16()
    for progress in (0.05, 0.1, 0.15, 0.2, 0.25):
        attention.set_threshold(core, progress)
        threshold = attention.mask_threshold(float(core.progress), 150, core.epsilon, core.schedule)
        found = figures.auxiliary_mask_rows(core, q, k, range(150))
        assert found.any() and torch.equal(found, attention.masked_softmax(q.float(), k.float(), threshold))


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


# ---- figures and tables --------------------------------------------------------------------------


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
    return dict(run=f"{attention}-{seed}", config=common | config, log=[dict(epoch=0), dict(castling_report=report)])


def test_table_of_runs(tmp_path, capsys):
    """The castled model's score over seeds, the differences from the reference of the same seeds, and what castling
    lost, however the runs are ordered; runs of different flags are not put into one column, nor one seed twice into a
    cell; a folder of runs and its collected file agree."""
    runs = [run_of(50, seed=0), run_of(53, seed=1), run_of(56, seed=2), run_of(40, "softmax", seed=1), run_of(9, "mc"),
            run_of(7, dwconv=False), run_of(60, model="levit_mini")]  # fmt: skip
    heads = "| attention | deit_mini, 32 px, 65 tokens: top-1, % | against softmax | gap | M MACs |"
    heads += " levit_mini, 32 px, 4 / 1 tokens: top-1, % | against softmax | gap | M MACs |"
    table = figures.results_table(runs).splitlines()
    assert table[:1] + table[2:] == [
        heads,
        "| softmax | 40.0 | – | – | 3.0 | – | – | – | – |",
        "| castling, ramp | 53.0 ± 3.0 | +13.0 (1) | 0.50 | 2.0 | 60.0 | – | 0.50 | 2.0 |",
        "| castling, ramp, no DWConv | 7.0 | – | 0.50 | 2.0 | – | – | – | – |",
        "| mc | 9.0 | – | – | 3.0 | – | – | – | – |",
    ]
    several = [*runs, run_of(41.5, "softmax", seed=0), run_of(48, "mc", seed=2), run_of(20, patch_size=8)]
    table = figures.results_table(several, "castling, ramp").splitlines()
    assert "deit_mini, 32 px, 17 tokens: top-1, % | against castling, ramp |" in table[0]
    # softmax: 40 - 53 and 41.5 - 50, mean -10.75, deviation 3.18; mc: 9 - 50 and 48 - 56, mean -24.5, deviation 23.33
    assert "| 40.8 ± 1.1 | -10.8 ± 3.2 (2) | – | 3.0 |" in table[2]
    assert "| 28.5 ± 27.6 | -24.5 ± 23.3 (2) | – | 3.0 |" in table[5]
    again = [*runs[5:3:-1], *runs[3::-1], runs[6]]
    assert figures.results_table(again) == figures.results_table(runs)
    with pytest.raises(ValueError, match="deit_mini, 32 px, 65 tokens are not comparable: they differ in lr"):
        figures.results_table([*runs, run_of(50, "relu_s", seed=3, workers=2, lr=1)])
    with pytest.raises(ValueError, match="65 tokens, castling, ramp are not comparable: they differ in dconv, lr"):
        figures.results_table([*runs, run_of(50, seed=3, workers=2, lr=1, dconv=5)])
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
    assert "| +41.0 (1) |" in both[0] and "| 1.0 | – | 0.50 | 2.0 |" in both[1]  # 50 - 9; a table without the row
    assert "unknown row 'ramp'" in refused(capsys, 2, printed, kept, "--against=ramp")
    (tmp_path / "twice.jsonl").write_text(2 * (json.dumps(run_of(1)) + "\n"))
    assert "more than one run" in refused(capsys, 2, printed, tmp_path / "twice.jsonl", f"--collect={tmp_path}/none")
    assert not (tmp_path / "none").exists()
    (folder / "log.jsonl").write_text('{"epoch": 0, "step": 1}\n')
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "log.jsonl").write_text('{"epoch": 0}\n')
    for wrong, message in (
        (tmp_path / "runs", f"run {folder.name} is not complete"), (tmp_path, "no runs in"),
        (tmp_path / "log.jsonl", "log.jsonl: damaged"), (tmp_path / "a.png", "a.png: damaged"),
    ):  # fmt: skip
        assert message in refused(capsys, 2, printed, wrong)
    (folder / "log.jsonl").write_text('{"epoch": 0, "st')
    assert f"{folder}: damaged" in refused(capsys, 2, printed, tmp_path / "runs")
    kept.write_text(json.dumps(dict(run="one", config={}, log=[])))
    assert "the config of one is not that of a run" in refused(capsys, 2, printed, kept)


@pytest.mark.parametrize(("words", "message"), [
    (["--runs", "x", "table"], "--runs is for table"), (["kernel", "--collect=x"], "--collect is for table"),
    (["kernel", "--progress=0"], "--progress is for attention"), (["all", "table"], "all is given alone"),
    (["attention", "--checkpoint=x"], "--checkpoint and --image"),
])  # fmt: skip
def test_flags_without_their_figure_are_refused(words, message, tmp_path, capsys):
    """A flag of another figure than those named, or a name that a flag swallowed, draws nothing."""
    output = [f"--output={tmp_path}/new"]
    assert message in refused(capsys, 2, lambda: figures.main(figures.parser().parse_args([*output, *words])))
    assert not (tmp_path / "new").exists()


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
    model.blocks[0].attn.qkv.weight.data *= 3  # so that some softmax entries are above the threshold
    transform = train.eval_transform(flags(image_size=64))
    monkeypatch.setattr(train, "load_predictor", lambda args: (model, [], transform))
    Image.fromarray(data.Shapes("val", 12, 64).scene(3).image).save(tmp_path / "one.png")

    def draw(*options):
        words = ["attention", "--checkpoint=x", f"--image={tmp_path}/one.png", *options]
        figures.main(figures.parser().parse_args(words))
        return capsys.readouterr().out

    out = draw(f"--output={tmp_path}", "--progress=0", "--layer=blocks.0.attn")
    ranks = r"blocks.1.attn: [\d.]+, at most 17; without the term v/2 [\d.]+, at most 12\n"
    assert re.search(ranks, out)
    pixels = np.asarray(Image.open(tmp_path / "attention.png").convert("RGB"))
    assert pixels.shape[0] > 800 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000
    with figures.captured(model) as seen, torch.no_grad():
        pixels = transform(Image.open(tmp_path / "one.png").convert("RGB"))
        model(data.to_model_input(pixels[None], torch.device("cpu")))
    q, k, _ = seen["blocks.0.attn"]
    rows = (q[..., [0, 6, 11, 16], :] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # class token and the diagonal of 4 x 4
    kept = f"{100 * (rows > 4 / 17).float().mean():.2f}"
    assert f"softmax, {kept}% of entries." in out and 0 < float(kept) < 100 * (rows > 4 / 17).any(1).float().mean()
    draw(f"--output={tmp_path}", "--tokens", "0", "16")
    for options, message in [
        (["--layer=blocks.9.attn"], "blocks.0.attn"), (["--tokens", "17"], "0..16"),
        (["--checkpoint="], "empty value"), (["--image=/no/such.png"], "/no/such.png"),
    ]:  # fmt: skip
        assert message in refused(capsys, 2, draw, *options)
    model = tiny("deit", "softmax")
    assert "no linear-angular attention" in refused(capsys, 2, draw)
