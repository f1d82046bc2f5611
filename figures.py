"""The paper's analyses, redrawn from this code and from committed logs.

    python figures.py                    all but attention and table, to figures/; takes 30 seconds
    python figures.py kernel masks       only these
    python figures.py --output /elsewhere
    python figures.py attention --checkpoint runs/deit_tiny-castling-shapes/best.pt --image one.jpg

    figure        paper           from
    idea          -               a drawing of the method
    kernel        Fig. 3, Eq. (7) attention.angular_similarity
    series        Eq. (8)         attention.angular_series and its bound
    accuracy      Fig. 1, Fig. 5  the paper's accuracies (Tables 2, 3, 6, 7); MACs from flops.py
    masks         Fig. 6          results/levit128_mask_ramp.jsonl and levit128_mask_fixed.jsonl
    frequency     Fig. 7          a two-layer network, trained here in seconds
    resolution    -               flops.curve; results/bench_cpu.json
    crossover     -               results/bench_cpu.json
    learning      -               results/scratch.jsonl, conversion.jsonl, conversion_start.jsonl
    attention     -               a checkpoint of train.py and an image

    python figures.py table              Markdown tables of results/cifar10.jsonl and scenes.jsonl
    python figures.py table --runs runs/cifar --collect mine.jsonl      of the runs in a folder

Each figure is drawn by the function of that name. This needs matplotlib.
"""

import argparse
import contextlib
import functools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import flops
import train
from attention import (
    AttentionCore,
    angular_series,
    angular_series_bound,
    angular_similarity,
    check_qkv,
    cores,
    look_up,
    mask_threshold,
    masked_softmax,
    set_threshold,
    unit,
    without_autocast,
)
from data import DataError, read_image, to_model_input
from run import Parser, renamed, share

RESULTS = Path(__file__).parent / "results"
BENCH = RESULTS / "bench_cpu.json"

# A thing looks the same in every figure. Line styles and markers differ, not only colours.
CASTLING = dict(color="#1f4e9c", linestyle="-", marker="o")
SOFTMAX = dict(color="#e08214", linestyle="--", marker="o", markerfacecolor="white")
LINES = [  # for everything else
    dict(color="#111111", linestyle="-"),
    dict(color="#1f4e9c", linestyle="--"),
    dict(color="#e08214", linestyle="-."),
    dict(color="#2a8a57", linestyle=":"),
    dict(color="#8c8c8c", linestyle=(0, (6, 1, 1, 1, 1, 1))),
    dict(color="#8c8c8c", linestyle=(0, (1, 2))),
]
MARKERS = "os^Dv"


@contextlib.contextmanager
def drawing(path: Path, width: float = 8.4, height: float = 3.5) -> Iterator:
    """Context with a matplotlib figure, width x height inches. Lines are written in 256 colours."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 10, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True, "legend.fontsize": 8.5,
             "axes.titlesize": 10.5, "lines.markersize": 5, "legend.framealpha": 0.9}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure((width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=150)
    if not any(plot.images for plot in figure.axes):
        Image.open(path).convert("RGB").quantize().save(path, optimize=True)


# ---- the method ------------------------------------------------------------------------------------


def idea(path: Path) -> None:
    """The method as a diagram: what the attention of a layer adds up while it trains, and after castling."""
    terms = [  # height, text, colour
        (2, "linear-angular attention\nlinear in the tokens", CASTLING["color"]),
        (1, "masked softmax branch\nquadratic in the tokens", SOFTMAX["color"]),
        (0, "DWConv of the values\nlinear in the tokens", "0.4"),
    ]
    arrow = dict(arrowstyle="-|>", color="0.3", shrinkA=0, shrinkB=0)
    box = dict(boxstyle="round,pad=0.5", facecolor="white")
    with drawing(path, height=2.9) as figure:
        plot = figure.subplots()
        plot.set(xlim=(-0.4, 10.9), ylim=(-0.5, 2.9))
        plot.axis("off")
        for left, title, castled in ((0, "train", False), (6.2, "infer", True)):
            plot.text(left + 2, 2.75, title, ha="center", va="center", weight="bold")
            for end, name in ((left, "q, k, v"), (left + 4, "sum")):
                plot.text(end, 1, name, ha="center", va="center", bbox=box)
            for height, text, color in terms:
                gone = castled and "branch" in text
                look = dict(box, edgecolor=color, linestyle=":" if gone else "-")
                plot.text(left + 2, height, "branch removed" if gone else text, ha="center", va="center",
                          fontsize=8.5, color=color, bbox=look)  # fmt: skip
                if not gone:
                    plot.annotate("", (left + 0.9, height), (left + 0.38, 1), arrowprops=arrow)
                    plot.annotate("", (left + 3.7, 1), (left + 3.1, height), arrowprops=arrow)
        plot.annotate("", (5.7, 1), (4.5, 1), arrowprops=dict(arrow, linewidth=2))
        plot.text(5.1, 1.3, "castle", ha="center", va="center", weight="bold")


# ---- Fig. 3: the feature space of the angular kernel ---------------------------------------------


def circle(angle: Tensor) -> Tensor:
    """Unit vectors (N, 2) at angles (N,) in radians."""
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def kernel_embedding(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Features of points, whose distances are those of Eq. (7): classical multidimensional scaling.

    Args:
        x: (N, D) points.
        dims: axes to keep, at most N.
    Returns: (N, dims) centred coordinates, the axis of largest variance first, and (dims,) their
        shares of the total variance. Signs are arbitrary, as are rotations at equal variance.
    """
    gram = angular_similarity(x, x)
    gram = gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()
    values, vectors = torch.linalg.eigh(gram)
    values = values.flip(0).clamp_min(0)
    return (vectors.flip(1) * values.sqrt())[:, :dims], (values / values.sum())[:dims]


def feature_distances(angle: Tensor) -> dict[str, Tensor]:
    """{kernel: squared distance in its feature space} of two unit vectors with this angle between.

    It is K(x, x) + K(y, y) - 2 K(x, y), which is 2 theta / pi for the angular kernel, Eq. (7). All
    are scaled to be 2 for opposed vectors. On unit vectors the exponential and the RBF kernel
    (sigma = 1) are proportional, Eq. (2). angle: radians, rising from 0 to pi.
    """
    x = circle(angle) @ circle(angle[:1])[0]
    kernels = {
        "angular": angular_similarity(circle(angle), circle(angle[:1]))[:, 0],
        "linear terms; cosine": angular_series(x, 0),
        "exponential; RBF": x.exp(),
        "polynomial (1 + x)²": (1 + x) ** 2,
    }
    return {name: 2 * (value[0] - value) / (value[0] - value[-1]) for name, value in kernels.items()}


def turned(axes: Tensor) -> Tensor:
    """Rotate and mirror (N, 2) coordinates: first point at y = 0, x > 0, second at y > 0."""
    z = torch.view_as_complex(axes.contiguous())
    z = z * z[0].conj() / z[0].abs()
    return torch.view_as_real(z if z[1].imag > 0 else z.conj().resolve_conj())


def kernel(path: Path) -> None:
    """Fig. 3: points around a circle, their features under the angular kernel, and distances.

    Only directions count, so the features form a closed curve on a unit sphere. Axes are the
    harmonics k = 1, 3, 5, ... of the angle, each with 8 / (pi k)^2 of the variance. The last panel
    shows distance against angle for this kernel and others.
    """
    angle = torch.arange(72, dtype=torch.float64) * 2 * math.pi / 72
    x = (1 + 0.2 * (3 * angle).sin())[:, None] * circle(angle)  # only directions matter
    axes, share = kernel_embedding(x, 4)
    xyz = torch.cat([turned(axes[:, :2]), turned(axes[:, 2:])[:, :1]], dim=1)
    with drawing(path) as figure:
        grid = figure.add_gridspec(1, 3, width_ratios=(1, 1.25, 1))
        flat, plot = figure.add_subplot(grid[0]), figure.add_subplot(grid[2])
        space = figure.add_subplot(grid[1], projection="3d")
        look = dict(c=angle, cmap="twilight_shifted", s=16, edgecolors="0.25", linewidths=0.3)
        flat.scatter(*x.T, **look)
        flat.set(title="(a) input", aspect="equal", xlim=(-1.9, 1.9), ylim=(-1.9, 1.9))
        space.plot(*torch.cat([xyz, xyz[:1]]).T, color="0.5", linewidth=0.8)
        space.scatter(*xyz.T, depthshade=False, **look)
        space.set(title=f"(b) features, {share[:3].sum():.0%} of the variance", zlim=(-0.5, 0.5))
        space.set_box_aspect((1, 1, 0.7), zoom=1.1)
        space.tick_params(labelbottom=False, labelleft=False, labelright=False)
        for i in range(0, 72, 18):
            flat.text(*(1.5 * circle(angle)[i]), f"{5 * i}°", ha="center", va="center")
            space.text(*(1.5 * xyz[i]), f"{5 * i}°", ha="center", va="center")
        half = torch.linspace(0, math.pi, 181, dtype=torch.float64)
        for (name, distance), line in zip(feature_distances(half).items(), LINES, strict=False):
            plot.plot(half.rad2deg(), distance, label=name, **line)
        plot.set(title="(c) squared feature distance", xlabel="angle, degrees", xticks=[0, 45, 90, 135, 180])
        plot.legend(loc="lower right", fontsize=7)


# ---- Eq. (8): the series -------------------------------------------------------------------------


def series_errors(terms: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
    """Error of angular_series(x, K) for every K of `terms`, and its bound: both (K, len(x))."""
    exact = 1 - x.arccos() / math.pi
    errors = [(angular_series(x, K) - exact).abs() for K in terms]
    return torch.stack(errors), torch.stack([angular_series_bound(x, K) for K in terms])


def series(path: Path) -> None:
    """Eq. (8): the error of the truncated series over the cosine, and over the number of terms.

    K = 0 is what Eq. (9) keeps. Its error is at most 0.18, reached for aligned and opposed vectors.
    There the error falls slowly, as 1 / sqrt(K). For other vectors it falls geometrically.
    """
    few, x = (0, 1, 3, 10, 30), torch.linspace(-1, 1, 401, dtype=torch.float64)
    error, bound = series_errors(few, x)
    many, at = sorted({round(1.3**i) for i in range(30)} | {0}), (1.0, 0.99, 0.9, 0.5)
    by_terms, bounds = series_errors(many, torch.tensor(at, dtype=torch.float64))
    floor = 1e-9
    with drawing(path) as figure:
        left, right = figure.subplots(1, 2)
        for K, e, b, line in zip(few, error, bound, LINES, strict=False):
            left.plot(x, e.clamp_min(floor / 10), label=f"K = {K}" if K else "K = 0: linear", **line)
            left.plot(x, b.clamp_min(floor / 10), color=line["color"], linewidth=0.6)
        left.set(title="error of the series (thin: its bound)", xlabel="cosine of the angle")
        left.set_xticks([-1, -0.5, 0, 0.5, 1])
        for i, (cosine, line) in enumerate(zip(at, LINES, strict=False)):
            look = line | dict(marker=MARKERS[i], markerfacecolor="white", markersize=3.5)
            right.plot(many, by_terms[:, i].clamp_min(floor / 10), label=f"cosine ±{cosine:g}", **look)
            right.plot(many, bounds[:, i].clamp_min(floor / 10), color=line["color"], linewidth=0.6)
        right.set(title="error against terms", xlabel="residual terms K of Eq. (8)")
        right.set_xscale("symlog", linthresh=1)
        right.set_xlim(0, many[-1])
        for plot in (left, right):
            plot.set_yscale("log")
            plot.set_ylim(floor, 10)
        left.legend(loc="upper center", ncols=3)
        right.legend(loc="lower left")


# ---- Fig. 1 and 5: accuracy against MACs ---------------------------------------------------------

TOP_1 = {  # ImageNet top-1 in %, softmax and castling, Table 2
    ("DeiT", "deit_tiny"): (74.5, 76.0), ("DeiT", "deit_base"): (83.4, 84.2),
    ("LeViT", "levit128"): (78.6, 79.6), ("LeViT", "levit192"): (80.0, 81.3),
    ("LeViT", "levit256"): (81.6, 82.6), ("LeViT", "levit384"): (82.6, 83.7),
    ("MViTv2", "mvitv2_tiny"): (82.3, 84.1), ("MViTv2", "mvitv2_small"): (83.6, 84.6),
    ("MViTv2", "mvitv2_base"): (84.4, 85.0),
}  # fmt: skip
AP = [  # COCO AP in %, the last entry; Table 3, and (without pre-training) Tables 6 and 7
    ("ESNet-ViT", "esnet_vit_s", 320, "castling", 28.1), ("ESNet-ViT", "esnet_vit_s", 416, "castling", 31.3),
    ("ESNet-ViT", "esnet_vit_m", 416, "castling", 34.0), ("ESNet-ViT", "esnet_vit_l", 416, "castling", 35.0),
    ("LCNet-ViT-L", "lcnet_vit_l", 416, "castling", 37.3),
    ("LCNet-ViT, from scratch", "lcnet_vit_s", 320, "softmax", 25.9),
    ("LCNet-ViT, from scratch", "lcnet_vit_m", 416, "softmax", 34.9),
    ("LCNet-ViT, from scratch", "lcnet_vit_s", 320, "castling", 27.0),
    ("LCNet-ViT, from scratch", "lcnet_vit_m", 416, "castling", 35.3),
]  # fmt: skip


def classifier_points() -> list[dict]:
    """Rows of family, model, attention, accuracy (Table 2's top-1, %) and macs_g of a 224 px image.

    The castled MViTv2 has softmax in its down-sampling blocks: the paper's MACs fit that design.
    """
    rows = []
    for (family, model), accuracies in TOP_1.items():
        for attention, accuracy in zip(("softmax", "castling"), accuracies, strict=True):
            options = dict(castle_downsample=False) if (family, attention) == ("MViTv2", "castling") else {}
            macs_g = flops.count(*flops.meta_model(model, attention, **options)).macs / 1e9
            rows.append(dict(family=family, model=model, attention=attention, macs_g=macs_g, accuracy=accuracy))
    return rows


def detector_points() -> list[dict]:
    """Rows as in `classifier_points`: AP in %, and MACs of the castled detector for one image."""
    rows = []
    for family, model, pixels, attention, ap in AP:
        macs_g = flops.detector_row(model, attention, pixels, (None, None), "")["pure_macs_g"]
        rows.append(dict(family=family, model=model, attention=attention, macs_g=macs_g, accuracy=ap))
    return rows


def accuracy(path: Path) -> None:
    """Fig. 1 and Fig. 5: the paper's accuracies at the MACs counted here, softmax beside castling."""
    with drawing(path, height=4.0) as figure:
        plots = figure.subplots(1, 2)
        for plot, rows in zip(plots, (classifier_points(), detector_points()), strict=True):
            markers = dict(zip(dict.fromkeys(r["family"] for r in rows), MARKERS, strict=False))
            for family, attention in dict.fromkeys((r["family"], r["attention"]) for r in rows):
                line = [r for r in rows if (r["family"], r["attention"]) == (family, attention)]
                look = {"softmax": SOFTMAX, "castling": CASTLING}[attention] | dict(marker=markers[family])
                x, y = [r["macs_g"] for r in line], [r["accuracy"] for r in line]
                plot.plot(x, y, label=f"{family}, {attention}", **look)
            plot.set_xscale("log")
            plot.set_xticks([0.5, 1, 2, 5, 10, 20] if plot is plots[0] else [0.5, 1, 2, 4], minor=False)
            plot.minorticks_off()
            plot.xaxis.set_major_formatter("{x:g}")
            plot.set(xlabel="MACs per image as counted here, G")
            plot.legend(loc="lower right", fontsize=7.5)
        plots[0].set(title="ImageNet, accuracies of the paper", ylabel="top-1, %")
        plots[1].set(title="COCO, accuracies of the paper", ylabel="AP, %")


# ---- Fig. 6: masks -------------------------------------------------------------------------------

MASK_TOKENS = {"stages.0": 64, "stages.1": 16, "stages.2": 4}  # N in LeViT's stages at 128 pixels
MASK_LOGS = {schedule: RESULTS / f"levit128_mask_{schedule}.jsonl" for schedule in ("ramp", "fixed")}


def mask_trajectories(log: Path) -> dict[str, list]:
    """{"step": steps, layer: density of its mask at those steps}, from a run's log.jsonl.

    Raises: ValueError if no epoch of the log has a `mask_curve`.
    """
    joined: dict[str, list] = {}
    for record in map(json.loads, log.read_text().splitlines()):
        for key, values in record.get("mask_curve", {}).items():
            joined.setdefault(key, []).extend(values)
    if not joined:
        raise ValueError(f"{log} holds no mask_curve: expected the log of a run with the auxiliary branch")
    return joined


def masks(path: Path) -> None:
    """Fig. 6: density of every layer's mask in a run; threshold ramped (above), fixed 0.02 (below).

    The largest entry of a softmax row over N keys is at least 1/N. If N < 50, a threshold of 0.02
    therefore keeps at least one entry per row. The density cannot fall below 1/N (hatched), and
    castling such a layer changes the model. The ramp starts at 4/N, so the mask of a layer with
    four tokens is empty from the first step. The logs are of

        python train.py --model levit128 --image-size 128 --shapes-length 4000 --epochs 3 --batch-size 64 \\
            --mask-schedule ramp            # and the same with fixed
    """
    runs = {schedule: mask_trajectories(log) for schedule, log in MASK_LOGS.items()}
    with drawing(path, height=4.6) as figure:
        plots = figure.subplots(len(runs), len(MASK_TOKENS), sharex=True, sharey="col")
        for row, (schedule, run) in zip(plots, runs.items(), strict=True):
            for plot, (stage, N) in zip(row, MASK_TOKENS.items(), strict=True):
                layers = [layer for layer in run if layer.startswith(stage)]
                for layer, line in zip(layers, LINES, strict=False):
                    label = "down-sampling" if "downsample" in layer else f"block {layer.split('.')[3]}"
                    plot.plot(run["step"], [100 * d for d in run[layer]], label=label, **line)
                if schedule == "fixed" and N < 50:
                    plot.axhspan(0, 100 / N, facecolor="0.93", edgecolor="0.7", hatch="///", zorder=0)
                    box = dict(facecolor="white", edgecolor="none")
                    where = dict(ha="center", va="center", transform=plot.get_yaxis_transform(), bbox=box)
                    plot.text(0.5, 0.1, "out of reach", **where)
                plot.set_title(f"{stage}, N = {N}, {'ramped' if schedule == 'ramp' else 'fixed 0.02'}")
                plot.set_yscale("symlog", linthresh=0.01)
                plot.set_ylim(-0.0005, 150)
                plot.set_yticks([0, 0.01, 0.1, 1, 10, 100], ["0", "0.01", "0.1", "1", "10", "100"])
            row[0].set_ylabel("non-zeros of the mask, %")
        for above, below in plots.T:
            above.legend(fontsize=7)
            below.set_xlabel("step")


# ---- Fig. 7: which frequencies a network learns first --------------------------------------------

FREQUENCIES = (1, 3, 5, 7, 9, 11)  # of the angle; Sim has no even ones


def frequency_study(steps: int = 4000, seed: int = 0) -> dict:
    """Train a two-layer network on Sim of a fixed query and a key at the angle theta to it.

    Sim is a triangle wave, 1/2 + (4 / pi^2) sum_(k odd) cos(k theta) / k^2. The linear terms of
    Eq. (8), 1/2 + cos(theta) / pi, hold 79% of frequency 1 and nothing of the others.

    Network: (cos theta, sin theta) -> 256 tanh units -> 1. Adam, rate 1e-3, all 256 angles a step.
    Returns: a dict. angle, target, linear, fit (256,): the angles and three functions of them.
        step, loss: the steps measured, and the squared errors. residual (steps, frequencies):
        |F[fit] - F[target]| / |F[target]|. linear_residual (frequencies,): of the linear terms.
    Source: the residual is that of the F-principle, the paper's [67]. The paper names no network,
        optimiser or target range.
    """
    angle = torch.arange(-128, 128, dtype=torch.float64) * math.pi / 128
    keys = circle(angle)
    target, linear = angular_similarity(keys, keys[128:129])[:, 0], angular_series(angle.cos(), 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 256), nn.Tanh(), nn.Linear(256, 1)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    wanted = torch.fft.rfft(target)[list(FREQUENCIES)]

    def residual(values: Tensor) -> Tensor:
        return (torch.fft.rfft(values)[list(FREQUENCIES)] - wanted).abs() / wanted.abs()

    step, losses, residuals = [], [], []
    for i in range(steps + 1):
        fit = net(keys)[:, 0]
        loss = (fit - target).square().mean()
        if i % max(1, steps // 200) == 0:
            step.append(i), losses.append(loss.item()), residuals.append(residual(fit.detach()))
        if i < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return dict(
        angle=angle, target=target, linear=linear, fit=fit.detach(), step=step, loss=losses,
        residual=torch.stack(residuals), linear_residual=residual(linear),
    )  # fmt: skip


def frequency(path: Path) -> None:
    """Fig. 7: Sim, its linear terms and a network's fit; the loss; the residual by frequency."""
    study, names = frequency_study(), dict(target="Sim", linear="linear terms", fit="network")
    with drawing(path) as figure:
        left, middle, right = figure.subplots(1, 3)
        degrees = study["angle"].rad2deg()
        for (key, name), line in zip(names.items(), LINES, strict=False):
            left.plot(degrees, study[key], label=name, **line)
        left.set(title="functions of the angle", xlabel="angle, degrees", xticks=[-180, -90, 0, 90, 180])
        left.legend(loc="lower center")
        middle.semilogy(study["step"], study["loss"], **LINES[0])
        middle.set(title="the network's loss", xlabel="step", ylabel="mean squared error")
        image = right.imshow(
            study["residual"].T.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower",
            extent=(0, study["step"][-1], -0.5, len(FREQUENCIES) - 0.5), interpolation="nearest",
        )  # fmt: skip
        right.set(title="the network's residual", xlabel="step", ylabel="frequency of the angle")
        right.set_yticks(range(len(FREQUENCIES)), [str(k) for k in FREQUENCIES])
        right.grid(False)
        figure.colorbar(image, ax=right, label="0: learned, 1: missing")


# ---- MACs and latency ----------------------------------------------------------------------------

PIXELS = (128, 224, 320, 448, 512, 640, 768, 896, 1024)


def model_ratios(result: dict) -> dict[str, list[tuple[int, float]]]:
    """{model: [(pixels, time of softmax / time of castled)]} from bench.py's `models` rows.

    Rows that compare two models, and those without the DWConv in the MLPs, are left out.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["models"]:
        if one := re.fullmatch(r"(\w+) (\d+) px, batch \d+", row["shape"]):
            lines.setdefault(one[1], []).append((int(one[2]), row["softmax"]["ratio"]))
    return lines


def resolution(path: Path) -> None:
    """MACs of softmax and castled models by image size; their ratio, and the ratio of times."""
    times = model_ratios(json.loads(BENCH.read_text()))
    with drawing(path) as figure:
        left, right = figure.subplots(1, 2)
        for name, marker, line in (("deit_tiny", "o", LINES[1]), ("levit128", "s", LINES[2])):
            rows = flops.curve(name, PIXELS)
            for attention, look in (("softmax", SOFTMAX), ("castling", CASTLING)):
                macs = [r[f"{attention}_macs_g"] for r in rows]
                left.plot(PIXELS, macs, label=f"{name}, {attention}", **look | dict(marker=marker))
            ratio = [r["softmax_macs_g"] / r["castling_macs_g"] for r in rows]
            right.plot(PIXELS, ratio, label=f"{name}, MACs", **line)
            dots = dict(color=line["color"], linestyle="none", marker=marker, markerfacecolor="white", markersize=7)
            right.plot(*zip(*times[name], strict=True), label=f"{name}, time on a CPU", **dots)
        left.set(title="MACs per image", xlabel="pixels per side", ylabel="G", yscale="log")
        right.set(title="softmax / castled", xlabel="pixels per side", ylabel="ratio")
        right.axhline(1, color="0.4", linewidth=1)
        left.legend()
        right.legend()


def core_ratios(result: dict) -> dict[int, list[tuple[int, float]]]:
    """{D: [(N, time of softmax / time of castling)]} from bench.py's `core` rows, largest D first.

    Each ratio is the median over rows that differ only in batch and heads.
    """
    lines: dict[int, dict[int, list[float]]] = {}
    for row in result["core"]:
        N, D = map(int, re.search(r"N(\d+) D(\d+)", row["shape"]).groups())
        lines.setdefault(D, {}).setdefault(N, []).append(row["softmax"]["ratio"])
    return {D: [(N, statistics.median(lines[D][N])) for N in sorted(lines[D])] for D in sorted(lines, reverse=True)}


def crossover(path: Path, bench: Path = BENCH) -> None:
    """Time of the softmax core / time of the castling core, over N, a line per D.

    Above 1, castling is faster. bench: a file of bench.py --json with a `core` table.
    """
    result = json.loads(bench.read_text())
    with drawing(path, width=6.0) as figure:
        plot = figure.subplots()
        for i, (D, points) in enumerate(core_ratios(result).items()):
            look = LINES[i % len(LINES)] | dict(marker=MARKERS[i % len(MARKERS)], markerfacecolor="white")
            plot.plot(*zip(*points, strict=True), label=f"D = {D}", **look)
        plot.axhline(1, color="0.4", linewidth=1)
        environment = result["environment"]
        plot.set(title=f"attention core, {environment['device']}, {environment['dtype']}; medians over batch and heads",
                 xlabel="tokens N",
                 ylabel="time of softmax / castling")  # fmt: skip
        plot.set_xscale("log", base=2)
        plot.set_yscale("log", base=2)
        plot.xaxis.set_major_formatter("{x:g}")
        plot.yaxis.set_major_formatter("{x:g}")
        plot.legend()


# ---- looking inside a layer ----------------------------------------------------------------------


@contextlib.contextmanager
def captured(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Context that gives {layer: (q, k, v)}, the last inputs of each core, each (B, H, N, D).

    with captured(model) as seen:
        model(images)
    """
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(name: str, attend: Callable, q: Tensor, k: Tensor, v: Tensor, *rest, **options) -> Tensor:
        seen[name] = q, k, v
        return attend(q, k, v, *rest, **options)

    watched = cores(model)
    for name, core in watched.items():
        core.attend = functools.partial(watch, name, core.attend)
    try:
        yield seen
    finally:
        for core in watched.values():
            del core.attend


@torch.no_grad()
def auxiliary_mask_rows(core: AttentionCore, q: Tensor, k: Tensor, queries: Sequence[int] | Tensor) -> Tensor:
    """Rows of M_sparse for Q queries, (B, H, Q, N), at the core's threshold; 0 if castled. Eq. (10)

    Args: q, k: (B, H, N, D), as `captured` gives them; queries: Q token indices.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q[..., queries, :].to(dtype), k.to(dtype)
    if not (core.auxiliary and core.active):
        return q.new_zeros(*q.shape[:-1], k.shape[-2])
    threshold = mask_threshold(core.progress.float(), k.shape[-2], core.epsilon, core.schedule)
    with without_autocast(q.device):
        return masked_softmax(q, k, threshold)


@torch.no_grad()
def attention_rows(
    core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], band: bool = True
) -> Tensor:
    """Rows of the attention map of a linear-angular core for Q queries, (B, H, Q, N), in O(Q N D).

    The core itself never computes this map. Row i is r_i / |r_i V| plus the DWConv's taps around i,
    with r_i = 1/2 e_i + q_i K^T / pi [+ row i of M_sparse]. Entries may be negative. In eval mode
    attention_rows(core, q, k, v, queries) @ v = core(q, k, v)[..., queries, :].

    Args:
        q, k: (B, H, N, D); v: (B, H, N, E), as `captured` gives them.
        queries: Q token indices, at least one. band: False omits the DWConv.
    Raises: ValueError for another kernel, for q, k, v that do not fit, or an index outside 0..N-1.
    """
    check_qkv(q, k, v, per_token=True)
    if core.kernel != "linear_angular":
        raise ValueError(f"expected a core with the linear_angular kernel, got {core.kernel!r}")
    index, dtype = torch.as_tensor(queries, device=q.device), torch.promote_types(v.dtype, torch.float32)
    if index.min() < 0 or index.max() >= q.shape[-2]:
        raise ValueError(f"tokens must be within 0..{q.shape[-2] - 1}, got {queries}")
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    own = (index[:, None] == torch.arange(k.shape[-2], device=q.device)).to(dtype)                # (Q, N)
    with without_autocast(q.device):                                                              # D3
        rows = 0.5 * own + unit(q)[..., index, :] @ unit(k).mT / math.pi                          # Eq. (9)
        rows = rows + auxiliary_mask_rows(core, q, k, index)                                      # Eq. (10)
        norm = (rows @ v).norm(dim=-1, keepdim=True)
        rows = rows / norm.masked_fill(norm == 0, math.inf)                                       # D2
    if band and core.dconv is not None:
        taps = core.dconv.weight[:, 0, :, 0].to(dtype)                                            # (H, taps)
        offset = torch.arange(k.shape[-2], device=q.device) - index[:, None] + taps.shape[1] // 2
        inside = (offset >= 0) & (offset < taps.shape[1])
        rows = rows + torch.where(inside, taps[:, offset.clamp(0, taps.shape[1] - 1)], 0)
    return rows


@torch.no_grad()
def effective_rank(q: Tensor, k: Tensor, diagonal: float = 0.5) -> Tensor:
    """Effective rank, 1..N, of `diagonal` I + Q K^T / pi with unit rows: (..., N, D) -> (...).

    It is exp(entropy of (singular values / their sum)). With `diagonal` 1/2 the matrix is the map
    of Eq. (9) before its normalisation; with 0, its low-rank part. The cost is O(N D^2): outside
    the span of Q and K, which has at most 2 D dimensions, the matrix is `diagonal` I.
    Args: diagonal: at least 0. Raises: ValueError if the shapes do not fit.
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    check_qkv(q, k, k, per_token=True)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = unit(q.to(dtype)), unit(k.to(dtype))
    basis = torch.linalg.qr(torch.cat([q, k], dim=-1)).Q                                          # (..., N, r)
    N, r = basis.shape[-2:]
    with without_autocast(q.device):
        inner = diagonal * torch.eye(r, dtype=dtype, device=q.device) + (basis.mT @ q) @ (basis.mT @ k).mT / math.pi
    values = torch.linalg.svdvals(inner)
    total = (values.sum(-1) + (N - r) * diagonal).clamp_min(1e-12)
    outside = torch.special.entr(torch.as_tensor(diagonal, dtype=dtype, device=q.device) / total)
    return (torch.special.entr(values / total[..., None]).sum(-1) + (N - r) * outside).exp()


# ---- attention maps of a trained model -----------------------------------------------------------


def attention(path: Path, args: argparse.Namespace) -> None:
    """What chosen tokens attend to in one layer: a column of pictures for each token.

    From top to bottom: the image, the token's row of the linear-angular map, the same with the
    DWConv, and its row of the auxiliary mask. Rows are means over heads and show only patches. The
    colour scale ignores the token itself, because its 1/2 is far above the other entries. The
    effective rank of every layer's map is printed, a mean over heads.
    Raises: ValueError for an unknown checkpoint, layer or token; DataError for the image.
    """
    options = train.parser().parse_args([f"--checkpoint={args.checkpoint}"])
    model, _, transform = train.load_predictor(options)
    pixels = transform(read_image(args.image, upright=True))                            # (3, size, size) uint8
    if args.progress is not None:
        set_threshold(model, args.progress)
    layers = {name: core for name, core in cores(model).items() if core.kernel == "linear_angular"}
    if not layers:
        raise ValueError(f"{args.checkpoint} has no linear-angular attention to show")
    layer = args.layer or list(layers)[len(layers) // 2]
    core = look_up(layers, layer, "layer")
    with captured(model) as seen, torch.no_grad():
        model(to_model_input(pixels[None], torch.device("cpu")))
    print("effective rank of each layer's map: about how many independent directions its output has")
    for name in layers:
        q, k, _ = seen[name]
        full, low = (effective_rank(q, k, diagonal).mean().item() for diagonal in (0.5, 0.0))
        print(f"  {name}: {full:.1f}, at most {q.shape[2]}; without the term v/2 {low:.1f}, at most {min(q.shape[2:])}")
    q, k, v = seen[layer]
    side = math.isqrt(q.shape[2])
    prefix = q.shape[2] - side**2  # 197 tokens are a class token and 14 x 14 patches
    diagonal = dict.fromkeys(prefix + place * side + place for place in (side // 4, side // 2, 3 * side // 4))
    tokens = args.tokens or [*range(min(prefix, 1)), *diagonal]
    maps, banded = (attention_rows(core, q, k, v, tokens, band)[0].mean(0) for band in (False, True))  # (Q, N)
    masks = auxiliary_mask_rows(core, q, k, tokens)[0]                                               # (H, Q, N)
    kept = f"{100 * (masks > 0).float().mean():.2f}% of entries" if core.auxiliary else "nothing: it is castled"
    print("picture, from above: the image; what the marked patch takes from each other patch by linear-angular\n"
          f"attention; the same with the DWConv; what the mask keeps of its softmax, {kept}.\n"
          "The patch's own entry may be off the colour scale: the scale is that of the other entries.")  # fmt: skip

    with drawing(path, width=2.5 * len(tokens), height=8.6) as figure:
        axes = figure.subplots(4, len(tokens), squeeze=False)
        for column, token, *rows in zip(axes.T, tokens, maps, banded, masks.mean(0), strict=True):
            patch = token - prefix
            column[0].imshow(pixels.permute(1, 2, 0).numpy())
            place = f"row {patch // side + 1}, column {patch % side + 1}"
            column[0].set_title(f"patch in {place}" if patch >= 0 else f"prefix token {token}")
            if patch >= 0:
                cell = pixels.shape[-1] / side
                left, top = patch % side * cell - 0.5, patch // side * cell - 0.5
                x, y = (left, left + cell, left + cell, left, left), (top, top, top + cell, top + cell, top)
                column[0].plot(x, y, color="red", linewidth=2)
            for axis, row, colours in zip(column[1:], rows, ("RdBu_r", "RdBu_r", "magma"), strict=True):
                others = row.index_fill(0, torch.tensor(token), 0)[prefix:].abs().max().item() or 1.0
                least = 0 if colours == "magma" else -others
                shown = axis.imshow(row[prefix:].reshape(side, side).numpy(), cmap=colours, vmin=least, vmax=others)
                figure.colorbar(shown, ax=axis, shrink=0.8)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        labels = "image", "linear-angular", "with DWConv", "masked softmax"
        for axis, label in zip(axes[:, 0], labels, strict=True):
            axis.set_ylabel(label)
        figure.suptitle(f"{options.model}, {layer}, mean over {q.shape[1]} heads")


# ---- results of runs -----------------------------------------------------------------------------

RUNS = [RESULTS / "cifar10.jsonl", RESULTS / "scenes.jsonl"]
METRICS = {"train.py": ("acc1", "top-1, %"), "detect.py": ("AP", "AP"), "segment.py": ("mIoU", "mIoU")}
FREE = {  # settings that may differ between the runs of a row
    "seed", "output", "environment", "workers", "save_minutes", "eval_every", "log_wandb", "resume", "overwrite",
    "checkpoint", "json",
}  # fmt: skip
VARIED = {"attention", "mask_schedule", "dconv", "mlp_dwconv", "zero_dconv", "backbone_lr"}  # between rows


def read_runs(path: Path) -> list[dict]:
    """[{"run": name, "config": config.json, "log": [records of log.jsonl]}] of every run.

    path: a folder with one folder for each run, or a file that --collect wrote.
    Raises: ValueError for another file, an incomplete run, or no run.
    """
    runs, place = [], path
    try:
        if path.is_dir():
            for config in sorted(path.glob("*/config.json")):
                place = config.parent
                log = list(map(json.loads, (place / "log.jsonl").read_text().splitlines()))
                runs.append(dict(run=place.name, config=json.loads(config.read_text()), log=log))
        else:
            runs = [{key: run[key] for key in ("run", "config", "log")}
                    for run in map(json.loads, path.read_text().splitlines())]  # fmt: skip
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"cannot read runs in {place}: damaged, or not written by a script or --collect") from None
    for run in runs:
        if not {"script", "model", "attention", "seed"} <= run["config"].keys():
            raise ValueError(f"{path}: the config of {run['run']} is not that of a run")
        if not any("castling_report" in record for record in run["log"]):
            raise ValueError(f"{path}: run {run['run']} is not complete")
    if not runs:
        raise ValueError(f"no runs in {path}: expected folders with config.json and log.jsonl")
    return runs


def row_of(run: dict) -> str:
    """Name of a run's row in the table: its attention, and settings that tell it from others."""
    config = renamed(run["config"])
    mlp = config.get("mlp_dwconv")
    name = config["attention"]
    if name == "castling":
        name += f", {config['mask_schedule']}"
    if config.get("dconv") == 0:
        name += ", no DWConv" if mlp == 0 else ", no DWConv on V"
    elif mlp == 0:
        name += ", no DWConv in MLPs"
    elif mlp and config["attention"] == "softmax":
        name += ", DWConv in MLPs"
    if config.get("checkpoint"):
        name += ", converted"
    if config.get("zero_dconv"):
        name += ", DWConv from 0"
    factor = config.get("backbone_lr", 1)
    return name if factor == 1 else f"{name}, backbone lr x {factor:g}"


@functools.cache
def token_counts(model: str, pixels: int, **options) -> tuple[int, ...]:
    """Numbers of query tokens in a model's layers for a square image, without repetitions."""
    network, image = flops.meta_model(model, image_size=pixels, **options)
    with captured(network) as seen, torch.no_grad():
        network(image)
    return tuple(dict.fromkeys(q.shape[2] for q, _, _ in seen.values()))


def column_of(run: dict) -> tuple[str, str]:
    """A run's column: ("model, pixels, tokens", metric). For timm's models tokens are left out."""
    config, tokens = run["config"], ""
    if not config["model"].startswith("timm:"):
        name = config["model"] + ("_dense" if config["script"] == "segment.py" else "")
        flags = ("patch_size", "distilled")
        options = {key: config[key] for key in flags if config.get(key) is not None}
        counts = token_counts(name, config["image_size"], **options)
        tokens = f", {' / '.join(map(str, counts))} tokens" if counts else ""
    return f"{config['model']}, {config['image_size']} px{tokens}", METRICS[config["script"]][1]


def outcome(run: dict) -> dict[str, float | None]:
    """Score and MACs (M) of the castled model; gap: points lost by castling, or None."""
    (report,) = (record["castling_report"] for record in run["log"] if "castling_report" in record)
    metric = METRICS[run["config"]["script"]][0]
    return dict(
        score=report.get(f"test_{metric}_castled", report[f"test_{metric}"]),
        gap=report.get("castling_gap"),
        macs=min(report["macs"].values()) / 1e6,
    )


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """The mean in the number format `form`; for two or more values also the standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def results_table(runs: list[dict], against: str = "softmax") -> str:
    """A Markdown table with a row for each attention and four columns for each model.

    score: mean and standard deviation over seeds. against: the score minus that of row `against`
    with the same seed, and in brackets the number of such pairs. gap: points lost by castling.
    M MACs: of the castled model.

    Raises: ValueError if runs of one row differ in settings that are not in FREE, or runs of one
        model in others than FREE and VARIED, or if two runs of one row have the same seed.
    """

    def comparable(runs: list[dict], name: str, allowed: set[str]) -> None:
        first, *others = (renamed(run["config"]) for run in runs)
        differing = {key for one in others for key in first.keys() | one if first.get(key) != one.get(key)} - allowed
        if differing:
            raise ValueError(f"runs of {name} are not comparable: they differ in {', '.join(sorted(differing))}")

    columns: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for run in sorted(runs, key=lambda run: run["config"]["seed"]):
        columns.setdefault(column_of(run), {}).setdefault(row_of(run), []).append(run)
    for (model, _), rows in columns.items():
        for row, seeds in rows.items():
            if twice := [seed for seed, n in Counter(run["config"]["seed"] for run in seeds).items() if n > 1]:
                raise ValueError(f"{model}, {row}: more than one run of seed {twice[0]}")
            comparable(seeds, f"{model}, {row}", FREE)
        comparable([run for seeds in rows.values() for run in seeds], model, FREE | VARIED)
    names = {row for rows in columns.values() for row in rows}
    names = sorted(names, key=lambda name: (name != "softmax", not name.startswith("castling"), name))
    heads, lines = ["attention"], {name: [name] for name in names}
    for (model, metric), rows in columns.items():
        results = {row: {run["config"]["seed"]: outcome(run) for run in runs} for row, runs in rows.items()}
        reference = results.get(against, {})
        heads += [f"{model}: {metric}", f"against {against}", "gap", "M MACs"]
        for row, line in lines.items():
            if row not in results:
                line += ["–"] * 4
                continue
            seeds = results[row]
            both = seeds.keys() & reference.keys() if row != against else ()
            pairs = [seeds[seed]["score"] - reference[seed]["score"] for seed in both]
            paired = f"{mean_and_spread(pairs, '+.1f')} ({len(pairs)})" if pairs else "–"
            scores, (first, *_) = [seed["score"] for seed in seeds.values()], seeds.values()
            gaps = [seed["gap"] for seed in seeds.values()]
            gap = "–" if first["gap"] is None else f"{statistics.mean(gaps):.2f}"
            line += [mean_and_spread(scores, ".1f"), paired, gap, f"{first['macs']:.1f}"]
    rows = [heads, ["---"] * len(heads), *lines.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tables(args: argparse.Namespace) -> None:
    """Print a table for each of --runs, write all to --collect. ValueError if no row --against."""
    every = [read_runs(path) for path in args.runs]
    if args.against != "softmax":
        look_up(dict.fromkeys(row_of(run) for runs in every for run in runs), args.against, "row")
    printed = [results_table(runs, args.against) for runs in every]
    if args.collect:
        args.collect.write_text("".join(json.dumps(run) + "\n" for runs in every for run in runs))
    print(*printed, sep="\n\n")


def learning(path: Path) -> None:
    """Top-1 of a DeiT-mini on CIFAR-10 over the training images that it has seen, by attention.

    Converted networks begin at the softmax network that they were converted from. Points are scores
    of the castled networks.
    """
    (start,) = read_runs(RESULTS / "conversion_start.jsonl")
    thousands = lambda run: run["log"][-1]["step"] * run["config"]["global_batch"] / 1000  # noqa: E731
    looks = {"softmax": SOFTMAX, "castling, anneal": CASTLING, "linear_angular": dict(LINES[3], marker="^"),
             "softmax_normed": dict(LINES[5], marker="v")}  # fmt: skip
    with drawing(path) as figure:
        plot = figure.subplots()
        for run in read_runs(RESULTS / "scratch.jsonl"):
            epochs = [record for record in run["log"] if "test_acc1" in record]
            images = [record["step"] * run["config"]["global_batch"] / 1000 for record in epochs]
            scores = [record.get("test_acc1_castled", record["test_acc1"]) for record in epochs]
            name, seed = row_of(run), run["config"]["seed"]
            plot.plot(images, scores, label=None if seed else name, **looks[name])
        for run, line in zip(read_runs(RESULTS / "conversion.jsonl"), LINES, strict=False):
            images = [thousands(start), thousands(start) + thousands(run)]
            plot.plot(images, [outcome(one)["score"] for one in (start, run)], label=row_of(run), **line)
        plot.set(xlabel="training images, thousands", ylabel="top-1 after castling, %")
        figure.legend(loc="outside right upper")


FIGURES: dict[str, Callable[[Path], None]] = {
    draw.__name__: draw for draw in (idea, kernel, series, accuracy, masks, frequency, resolution, crossover, learning)
}


# ---- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of figures.py."""
    p = Parser("figures.py", __doc__, usage="[NAME ...] [flags]")
    add, figures = p.add_argument, [*FIGURES, "attention", "table"]
    add("names", nargs="*", metavar="NAME", choices=[*figures, "all"], default="all",
        help=f"{', '.join(figures)}; default: all but the last two")  # fmt: skip
    add("--output", type=Path, help="folder for the PNGs; default figures, for attention the checkpoint's")
    add("--checkpoint", help="for attention: a checkpoint of train.py")
    add("--image", help="for attention: an image file")
    add("--layer", help="for attention: a layer's name, as printed; default: the middle layer")
    add("--tokens", type=int, nargs="+", help="for attention: token numbers; the class token, if "
        "there is one, is 0; default: class token and three patches on the diagonal")  # fmt: skip
    add("--progress", type=share, help="for attention: draw the mask for this share of training, "
        "0..1; default: the checkpoint's own")  # fmt: skip
    add("--runs", type=Path, nargs="+", default=RUNS, help="for table: folders that hold a folder "
        "for each run, or files that --collect wrote; default: this project's runs")
    add("--against", default="softmax", metavar="ROW", help="for table: the row with which the "
        "others are compared, seed by seed, such as 'castling, ramp'; default softmax")  # fmt: skip
    add("--collect", type=Path, help="for table: write settings and logs of --runs to this file")
    return p


def main(args: argparse.Namespace) -> None:
    try:
        names = [*FIGURES] if args.names in ("all", ["all"]) else args.names
        if "attention" in names and not (args.checkpoint and args.image):
            raise ValueError("attention needs --checkpoint and --image")
        flags = dict.fromkeys(("runs", "against", "collect"), "table")
        flags |= dict.fromkeys(("checkpoint", "image", "layer", "tokens", "progress"), "attention")
        for flag, name in flags.items():
            if name not in names and getattr(args, flag) != parser().get_default(flag):
                raise ValueError(f"--{flag} is for {name}: give that name before the flags")
        if "all" in names:
            raise ValueError("all is given alone")
        for name in names:
            if name == "table":
                tables(args)
                continue
            folder = args.output or (Path(args.checkpoint).parent if name == "attention" else Path("figures"))
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}.png"
            if name == "attention":
                attention(path, args)
            else:
                FIGURES[name](path)
            print(path)
    except (OSError, ValueError, DataError) as error:
        parser().exit(2, f"figures.py: error: {error}\n")


if __name__ == "__main__":
    main(parser().parse_args())
