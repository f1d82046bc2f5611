"""Time and memory of Castling-ViT, as ratios to its alternatives: they depend less on the machine.

    python bench.py                              three tables, in under five minutes on two cores
    python bench.py --table core --compile       one table, with torch.compile
    python bench.py --device cuda --dtype bfloat16 --json gpu.json

Tables: `core` is the attention from q, k, v to its output. `models` is inference of whole networks.
`training` is forward and backward, with the softmax branch off, empty or alive (keeping entries).
Each table compares several forms: `castling` is this project's. `released` is the formula of the
authors' block. `softmax` is torch's fused attention, or the network as published.

Protocol: every form is first checked against float64. Each round then runs all forms in random
order, each repeated for about 4 ms. A ratio is the median over rounds, with its quartiles. One CPU
thread is timed by its CPU clock, which other processes disturb least. More threads, and a GPU, are
timed by wall clock. Memory is the peak of torch's allocations.
Page faults of glibc's allocator slow `released` most. To avoid them, set in the environment
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
"""

import argparse
import copy
import functools
import importlib.util
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fast
from attention import AttentionCore, castle, cores, record_masks, set_threshold
from convert import fuse
from models import build_model
from run import Parser, at_least, environment

CORE_SHAPES = [  # B, H, N, D
    (1, 3, 196, 64), (8, 3, 49, 64), (8, 3, 100, 64), (8, 3, 144, 64), (8, 3, 196, 64), (8, 12, 196, 64),
    (8, 3, 784, 64), (1, 12, 784, 64), (4, 3, 1600, 64), (1, 3, 3136, 64), (8, 6, 49, 32), (8, 6, 100, 32),
    (8, 6, 196, 32), (8, 12, 16, 16), (8, 12, 49, 16), (8, 12, 100, 16), (8, 12, 196, 16),
]  # fmt: skip
MODEL_ROWS = [  # name, B, pixels, the softmax network to compare with, mlp_dwconv: 0, or None for the default
    ("deit_tiny", 1, 224, "deit_tiny", None), ("deit_tiny", 8, 224, "deit_tiny", None),
    ("deit_tiny", 1, 224, "deit_tiny", 0), ("deit_tiny", 8, 224, "deit_tiny", 0),
    ("deit_tiny", 2, 448, "deit_tiny", None), ("deit_tiny", 1, 896, "deit_tiny", None),
    ("levit128", 8, 224, "levit128", None), ("levit128", 2, 512, "levit128", None),
    ("mvitv2_tiny", 1, 224, "mvitv2_tiny", None), ("levit256", 8, 224, "levit384", None),
]  # fmt: skip
TRAINING_ROWS = [("deit_tiny", 4, 224, None), ("deit_tiny", 4, 224, 0), ("deit_tiny", 1, 448, None)]


# ---- measuring -----------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Time in seconds, read after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


def interleaved(forms: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """{form: seconds per call, one entry per round}; every round runs all forms, in random order,
    and repeats each for about 4 ms.
    """
    repeats, times = {}, {name: [] for name in forms}
    for name, form in forms.items():
        form()
        start = clock(device)
        form()
        repeats[name] = max(1, math.ceil(4e-3 / max(clock(device) - start, 1e-6)))
    for _ in range(rounds):
        for name in random.sample(list(forms), len(forms)):
            start = clock(device)
            for _ in range(repeats[name]):
                forms[name]()
            times[name].append((clock(device) - start) / repeats[name])
    return times


def peak_bytes(form: Callable, device: torch.device) -> int:
    """The most bytes that torch allocates during one call, beyond those allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        form()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        form()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def measured(row: dict, forms: dict[str, Callable], args: argparse.Namespace) -> dict:
    """Add each form's ms, MiB and ratio (its time / the first form's), with quartiles, to `row`."""
    times = interleaved(forms, args.device, args.rounds)
    base = next(iter(forms))
    for name, form in forms.items():
        ratios = [other / own for own, other in zip(times[base], times[name], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        row[name] = dict(ms=1e3 * statistics.median(times[name]), mib=peak_bytes(form, args.device) / 2**20)
        row[name] |= dict(ratio=quartiles[1], quartiles=[quartiles[0], quartiles[2]])
    return row


def check(name: str, actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Raise RuntimeError if a form differs from float64 by more than rounding in its dtype."""
    error = ((actual.double() - exact).norm() / exact.norm()).item()
    if not error < 40 * torch.finfo(dtype).eps:
        raise RuntimeError(f"{name} differs from float64 by {error:.1e}, too much for {dtype}: nothing was timed")


# ---- the released formula ------------------------------------------------------------------------


def released_attention(core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, *unused, **unused_too) -> Tensor:
    """AttentionCore.attend with the order of operations of the authors' block, Eq. (9) and (10).

    Source: GATECH-EIC/Castling-ViT @ c7b75c1, attention.py.
    """
    unit_q, unit_k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    y = 0.5 * v + unit_q @ (unit_k.mT @ v) / math.pi
    if core.auxiliary:
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        y = y + (attention * (attention > core.epsilon)) @ v
    y = y / y.norm(dim=-1, keepdim=True)
    return y + core.dconv(v.to(core.dconv.weight.dtype))


def released(model: nn.Module) -> nn.Module:
    """Let every core of a model compute as the authors' block does, in place. Returns the model."""
    for core in cores(model).values():
        core.attend = functools.partial(released_attention, core)
    return model


# ---- tables --------------------------------------------------------------------------------------


def compiled(form: Callable, args: argparse.Namespace) -> Callable:
    """The form, compiled if --compile is given."""
    return torch.compile(form) if args.compile else form


@torch.no_grad()
def core_row(B: int, H: int, N: int, D: int, args: argparse.Namespace) -> dict:
    """The core alone: from a qkv layer's output, (B, N, 3 H D), to the next input, (B, N, H D)."""
    ours, softmax = AttentionCore(H).double().eval(), AttentionCore(H, "softmax").eval()
    qkv, forms = torch.randn(B, N, 3 * H * D), {}

    def attend(core: AttentionCore, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4)
        return core(q, k, v).transpose(1, 2).flatten(2)

    exact, exact_softmax = (attend(core, qkv.double()) for core in (ours, softmax))
    for name, core, expected in (
        ("castling", ours, exact), ("released", released(copy.deepcopy(ours)), exact),
        ("softmax", softmax, exact_softmax),
    ):  # fmt: skip
        x = qkv.to(args.device, args.dtype)
        forms[name] = functools.partial(compiled(attend, args), core.float().to(x.device, x.dtype), x)
        rounded = expected if args.dtype == torch.float32 else expected.to(args.dtype).double()
        check(name, forms[name]().cpu(), rounded, args.dtype)
    return measured(dict(shape=f"B{B} H{H} N{N} D{D}"), forms, args)


@torch.no_grad()
def model_row(
    name: str, B: int, pixels: int, baseline: str, mlp_dwconv: int | None, args: argparse.Namespace
) -> dict:
    """A castled network, the same with the released formula, and a softmax network; norms fused.

    LeViT-256 is compared with softmax LeViT-384: both have 82.6% top-1 in the paper's Table 2.
    """
    images, forms = torch.randn(B, 3, pixels, pixels), {}
    for form, network, kernel in (
        ("castling", name, "castling"), ("released", name, "castling"), ("softmax", baseline, "softmax"),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = castle(build_model(network, kernel, image_size=pixels, mlp_dwconv=mlp_dwconv)).eval()
        exact = model.double()(images[:1].double())
        model = fuse(model).float()
        if form == "released":
            released(model)
        check(f"{network} {form}", model(images[:1]), exact, torch.float32)
        net = compiled(model.to(args.device, args.dtype), args)
        forms[form] = functools.partial(net, images.to(args.device, args.dtype))
    shape = name if baseline == name else f"{name} / {baseline}"
    shape += f" {pixels} px, batch {B}" + (", no MLP DWConv" if mlp_dwconv == 0 else "")
    return measured(dict(shape=shape), forms, args)


def training_row(name: str, B: int, pixels: int, mlp_dwconv: int | None, args: argparse.Namespace) -> dict:
    """Forward and backward: our forms, the released formula without and with branch, and softmax.

    Branch: off; empty (a new network at threshold 0.02); alive (threshold 0: all entries are kept).
    """
    images, forms = torch.randn(B, 3, pixels, pixels, device=args.device), {}

    def step(net: nn.Module) -> None:
        with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
            net(images).float().square().mean().backward()
        net.zero_grad(set_to_none=True)

    for form, kernel, epsilon in (
        ("off", "castling", None), ("empty", "castling", 0.02), ("alive", "castling", 0.0),
        ("released off", "castling", None), ("released on", "castling", 0.02), ("softmax", "softmax", None),
    ):  # fmt: skip
        torch.manual_seed(0)
        options = {} if kernel == "softmax" else dict(epsilon=epsilon or 0.0, schedule="fixed")
        options |= dict(image_size=pixels, drop_path=0.0, mlp_dwconv=mlp_dwconv)
        model = build_model(name, kernel, **options).to(args.device).train()
        set_threshold(model, 0.0)
        record_masks(model, False)
        if epsilon is None:
            castle(model)
        if form.startswith("released"):
            released(model)
        exact = model.double()(images[:1].double()).detach()
        check(f"{name} {form}", model.float()(images[:1]).detach(), exact, torch.float32)
        forms[form] = functools.partial(step, compiled(model, args))
    shape = f"{name} {pixels} px, batch {B}" + (", no MLP DWConv" if mlp_dwconv == 0 else "")
    return measured(dict(shape=shape), forms, args)


TABLES = {  # name: function of a row, rows, title
    "core": (core_row, CORE_SHAPES, "attention core, inference"),
    "models": (model_row, MODEL_ROWS, "whole network, inference"),
    "training": (training_row, TRAINING_ROWS, "forward and backward, by softmax branch"),
}


def print_row(row: dict, first: bool) -> None:
    """Print a line: time and MiB of the first form; time ratio and MiB of the others."""
    base, *others = [name for name in row if name != "shape"]
    if first:
        heads = "".join(f"{name + ' / ' + base:>28}{'MiB':>8}" for name in others)
        print(f"{'':44}{base + ', ms':>14}{'MiB':>8}{heads}")
    line = f"{row['shape']:44}{row[base]['ms']:14.2f}{row[base]['mib']:8.1f}"
    for name in others:
        low, high = row[name]["quartiles"]
        line += f"{row[name]['ratio']:16.2f} ({low:.2f}-{high:.2f}){row[name]['mib']:8.1f}"
    print(line, flush=True)


# ---- command line --------------------------------------------------------------------------------


def usable_device(text: str) -> torch.device:
    """argparse type: the CPU, or a GPU that is there."""
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text}")
    return device


def new_file(text: str) -> Path:
    """argparse type: a file in an existing folder; no .png, which is the name of the plot."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {Path(text).parent} for {text}")
    if Path(text).is_dir() or Path(text).suffix == ".png":
        raise argparse.ArgumentTypeError(f"must be a JSON file, got {text}")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    """The command line of bench.py."""
    p = Parser("bench.py", __doc__)
    add = p.add_argument
    add("--table", choices=[*TABLES, "all"], default="all", help="which table; default all")
    add("--device", type=usable_device, default="cpu", help="cpu, cuda or cuda:1; default cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default float32")
    add("--compile", action="store_true", help="torch.compile every form")
    add("--formulas", action="store_true", help="time the formulas of attention.py, without fast.py")
    add("--threads", type=at_least(1), default=1, help="CPU threads; default 1")
    add("--rounds", type=at_least(1), default=5, help="times that each form is timed; default 5")
    add("--rows", type=at_least(1), help="only the first ROWS rows of each table; default all")
    add("--json", type=new_file, metavar="FILE", help="file for the rows; a plot goes beside it")
    return p


def main(args: argparse.Namespace) -> None:
    if not args.formulas:
        fast.enable()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    args.dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    about = environment(args.device) | dict(
        dtype=str(args.dtype).removeprefix("torch."), rounds=args.rounds, compiled=args.compile,
        clock="CPU time" if args.device.type == "cpu" and torch.get_num_threads() == 1 else "wall clock",
        load_average=os.getloadavg()[0], tuned_malloc="MALLOC_MMAP_MAX_" in os.environ,
    )  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    result = dict(environment=about)
    for name in TABLES if args.table == "all" else [args.table]:
        function, rows, title = TABLES[name]
        print(f"\n{name}: {title}; ratios are medians with quartiles")
        result[name] = []
        for row in rows[: args.rows]:
            torch.compiler.reset()  # forget what was compiled for the shapes of other rows
            result[name].append(function(*row, args))
            print_row(result[name][-1], first=len(result[name]) == 1)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        if "core" in result and importlib.util.find_spec("matplotlib"):
            import figures

            figures.crossover(args.json.with_suffix(".png"), args.json)


if __name__ == "__main__":
    main(parser().parse_args())
