"""run.py: what a run survives. Kills, signals, full disks, damaged files, several processes."""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

import convert
import data
import detect
import run
import segment
import train
from conftest import (
    ROOT,
    TINY_DEIT,
    TINY_RUNS,
    Malicious,
    examples,
    in_group,
    outcome,
    records_of,
    refused,
    run_detect,
    run_tiny,
    run_train,
    tiny_segmenter,
)
from models import build_model

# ---- progress ------------------------------------------------------------------------------------


def test_progress_is_a_plain_line_where_there_is_no_terminal(capsys, monkeypatch):
    """Steps done and to do, values, images per second of late steps, the time left; not more often
    than asked, and every 20 seconds if nothing is."""
    clock = iter([0.0, 19.0, 21.0, 40.0, 0.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    bar = run.Progress(10)
    for lines in (0, 1, 0):
        bar.step(8)
        assert capsys.readouterr().out.count("\n") == lines
    bar = run.Progress(10, done=4, seconds=3.0)
    for _ in range(3):
        bar.step(8, loss=1.5)
    assert capsys.readouterr().out == "  step 6/10  loss 1.5  images/s 4  ETA 0:00:08\n"


@pytest.mark.parametrize(("done", "total", "said"), [
    (0, 3600, ["training will take about 4.0 hours on this machine; --epochs, --max-steps or --image-size "
               "make it shorter"]),
    (0, 600, []), (6, 3600, []),
])  # fmt: skip
def test_a_long_run_says_so_at_its_start(capsys, monkeypatch, done, total, said):
    """Steps of 4 s, but for the first, which compiles for an hour: after 20 s of steps a run of more than an
    hour says once how long it will take. A continued run does not: its length cannot be changed."""
    clock = iter([0, *range(3600, 4000, 4)])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    bar = run.Progress(total, done=done)
    for _ in range(50):
        bar.step(8)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  step ")] == said
    assert not said or lines.index(said[0]) == 2  # after the progress lines of the steps 1 and 6


@pytest.mark.parametrize(("densities", "said"), [
    ([0.5, 0, 0.25], "25 to 50% of entries kept in 2 of 3 layers"), ([0, 0.5], "50% of entries kept in 1 of 2 layers"),
    ([0, 0], "0 in every layer: the masks are empty"),
])  # fmt: skip
def test_report_says_what_the_masks_hold(capsys, densities, said):
    """The range over layers whose masks hold entries, and how many layers those are."""
    metric = dict(test_acc1=1.0, test_acc1_castled=1.0, castling_gap=0.0, mask_density=dict(enumerate(densities)))
    args = train.parser().parse_args([])
    train.resolve(args)
    run.print_report(args, metric, train.METRICS)
    assert f"mask density          {said}\n" in capsys.readouterr().out


def test_speed_is_images_by_the_median_time(monkeypatch):
    """Images of a batch, divided by the median seconds of a forward. The first forward, which may compile, is left
    out; models take turns."""
    clock, calls = [0.0], []
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])

    def model(name, seconds):
        def forward(images):
            calls.append(name)
            clock[0] += next(seconds)

        return forward

    models = dict(slow=model("slow", iter([100, 9, 1, 4, 4, 2, 8, 3])), fast=model("fast", itertools.repeat(2.0)))
    assert run.images_per_second(models, torch.zeros(8, 1)) == dict(slow=2.0, fast=4.0)
    assert calls == ["slow", "fast"] * 8


@pytest.mark.parametrize(("cores", "processes", "workers"), [(6, 2, 3), (40, 1, 8), (2, 8, 1)])
def test_loader_processes_share_the_cores(monkeypatch, cores, processes, workers):
    """--workers is by default a process's share of the cores that it may use, from 1 to 8."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    args = train.parser().parse_args([])
    train.resolve(args)
    assert args.workers == workers


@pytest.mark.parametrize("script", TINY_RUNS)
def test_help_is_for_newcomers(script):
    """--help starts with one short line of usage. Every flag of train.py is explained: what it is comes
    first, its default later."""
    parser = TINY_RUNS[script][0].parser()
    assert parser.format_help().startswith(f"usage: python {script}.py [flags]\n\n")
    unclear = [action.option_strings[0] for action in parser._actions
               if not action.help or action.help.startswith(("default", "of "))]  # fmt: skip
    assert not unclear


# ---- faults --------------------------------------------------------------------------------------


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
# A failure is not shrunk: a run a try is too slow for that.
@settings(max_examples=examples(2), phases=[Phase.generate])
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
    assert seen == 2 * ["val"] + 16 * ["train"] + 2 * ["val"] + ["val"]  # the last is example.png
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
        options = ["--eval", "--json", f"--checkpoint={FIRST_VERSION / name}", f"--output={tmp_path}"]
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
@settings(max_examples=examples(3), phases=[Phase.generate])
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


@contextlib.contextmanager
def full_disk(patch):
    """From the third step on, no file may be larger than 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with after(10, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def unreadable_image(patch):
    """An image of the third step cannot be read."""
    draw = data.Shapes.__getitem__
    _, bad = list(data.EpochSampler(16, seed=0))[9]

    def read(shapes, index):
        if index == bad and shapes.split == 0:
            raise data.DataError("cannot read image 9")
        return draw(shapes, index)

    patch.setattr(data.Shapes, "__getitem__", read)
    yield


@contextlib.contextmanager
def lost_weight(patch):
    """A weight is nan after the third step."""
    step, steps = torch.optim.SGD.step, itertools.count(1)

    def lose(optimizer, *given):
        step(optimizer, *given)
        if next(steps) == 3:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = math.nan

    patch.setattr(torch.optim.SGD, "step", lose)
    yield


@pytest.mark.parametrize(("fault", "workers", "message"), [
    (full_disk, 0, "cannot save the checkpoint {}/last.pt: .*; an earlier checkpoint is still there: {}/last.pt"),
    (unreadable_image, 0, "cannot read image 9"), (unreadable_image, 1, "cannot read image 9"),
    (lost_weight, 0, "a weight is not finite at step 3, .*; the last checkpoint before it is {}/last.pt"),
])  # fmt: skip
def test_a_fault_stops_the_run_and_mended_it_goes_on(undisturbed, tmp_path, capsys, fault, workers, message):
    """The run says in one line what has happened, ends with status 1, and leaves the checkpoint of the second step and
    no debris. Mended, it goes on as if nothing had been."""
    with pytest.MonkeyPatch.context() as patch, fault(patch):
        said = refused(capsys, 1, run_tiny, "train", tmp_path, f"--workers={workers}")
    assert re.fullmatch(f"train.py: {message}\n".replace("{}", re.escape(str(tmp_path))), said), said
    assert not list(tmp_path.glob("*.tmp")) and convert.read_checkpoint(tmp_path / "last.pt")["step"] == 2
    run_tiny("train", tmp_path)
    assert outcome(tmp_path) == undisturbed("train")


def test_a_rename_that_fails_says_where_the_old_checkpoint_is(tmp_path, monkeypatch):
    """Between the two renames of a save what was `last` is `previous`: the message names it."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    run.save(last, {"step": 1}, previous)
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: rename(a, b if Path(a) == last else tmp_path / "no" / "x"))
    with pytest.raises(run.RunError, match=f"still there: {previous}"):
        run.save(last, {"step": 2}, previous)
    assert convert.read_checkpoint(previous) == {"step": 1}
    with pytest.raises(run.RunError, match="there is no earlier checkpoint"):
        run.save(tmp_path / "gone" / "x.pt", {})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("script", TINY_RUNS)
def test_half_precision_stays_finite(script, dtype, tmp_path, monkeypatch):
    """Steps under autocast have finite losses, and only float16 scales its loss. Gradients are clipped at their own
    scale. The average is that of the weights after each step, by its recursion, and starts anew after --ema-reset.
    64 pixels, because at 32 LeViT's last down-sampling is a stride-2 convolution of a map one pixel wide, whose
    bfloat16 weight gradient on a CPU is random memory (torch 2.6 to 2.15)."""
    weights, before, norms = [], [], []  # before each step; of gradients, unclipped and as they were taken
    update, step, clip = run.Run.update, torch.amp.GradScaler.step, torch.nn.utils.clip_grad_norm_

    def clipped(*given):
        before.append(clip(*given).item())

    def look(state, *given):
        weights.append({name: x.detach().clone() for name, x in state.model.named_parameters()})
        update(state, *given)

    def measure(scaler, optimizer):
        step(scaler, optimizer)
        grads = [x.grad for group in optimizer.param_groups for x in group["params"] if x.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    monkeypatch.setattr(run.Run, "update", look)
    monkeypatch.setattr(torch.amp.GradScaler, "step", measure)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    lr = {"train": 300, "detect": 160, "segment": 6e-3}[script]  # weights move by more than rounding
    options = ("--clip-grad=0.01", f"--lr={lr}", "--ema-decay=0.4", "--save-minutes=0", "--image-size=64")
    run_tiny(script, tmp_path, "--amp", f"--amp-dtype={dtype}", *options)
    state = convert.read_checkpoint(tmp_path / "last.pt")
    assert bool(state["scaler"]) == (dtype == "float16")
    assert all(math.isfinite(record["train_loss"]) for record in state["records"])
    assert all(value.isfinite().all() for value in state["model"].values())
    taken = [norm for norm in norms if math.isfinite(norm)]  # a step of float16 that overflows is left out
    assert len(norms) == 8 and 0 < len(taken) >= 8 - 7 * bool(state["scaler"])
    # Gradients shorter than the limit stay as they are; on some CPUs one step of the detector has such.
    limits = [min(0.01, own) for own, norm in zip(before, norms, strict=True) if math.isfinite(norm)]
    assert taken == pytest.approx(limits, rel=1e-3) and max(taken) == pytest.approx(0.01, rel=1e-3)
    expected = {}
    for n, after in enumerate([*weights[1:], state["model"]]):
        n = n % 4 if script == "detect" else n  # its tiny run resets the average in each epoch
        decay = min(0.4, (1 + n) / (10 + n)) if n else 0
        expected = {name: decay * expected.get(name, 0) + (1 - decay) * after[name] for name in weights[0]}
    for name, average in expected.items():
        assert_close(state["ema"][name], average, msg=name)


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
    assert "images of one step 4 -> 2" in capfd.readouterr().err


def test_processes_evaluate_one_model(tmp_path, capsys):
    """BatchNorm statistics differ between processes. All of them score their images with those of rank 0, which are
    saved: one process alone finds the same loss."""
    options = ("--batch-size=2", "--shapes-length=80", "--max-steps=3", "--epochs=1")
    assert in_group(2, lambda rank: run_tiny("train", tmp_path / "two", *options)) == [0, 0]
    run_tiny("train", tmp_path / "one", "--eval", "--json", f"--checkpoint={tmp_path}/two/best.pt", *options)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["test_loss"] == pytest.approx(records_of(tmp_path / "two")[0]["test_loss"], rel=1e-6)


def test_processes_continue_from_one_step(tmp_path, capfd):
    """A process that does not see the checkpoint of the others, as it is on no shared disk, is found
    before any of them trains."""
    run_tiny("train", tmp_path / "0", "--max-steps=1", "--batch-size=4")
    options = ("--max-steps=1", "--batch-size=2")
    assert in_group(2, lambda rank: run_tiny("train", tmp_path / str(rank), *options)) == [2, 2]
    assert capfd.readouterr().err.count("processes would continue from different steps") == 2
    assert not (tmp_path / "1").exists()


def test_processes_one_step_apart_do_not_continue(monkeypatch, tmp_path, capfd):
    """However many steps they have done."""
    monkeypatch.setattr(run.Run, "continue_from", lambda self, path: setattr(self, "step", 2400 + run.rank()))
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "last.pt").touch()
    monkeypatch.setattr(run, "newest", lambda folder: folder / "last.pt")
    options = ("--max-steps=5000", "--batch-size=2")
    assert in_group(2, lambda rank: run_tiny("train", tmp_path / str(rank), *options)) == [2, 2]
    assert capfd.readouterr().err.count("processes would continue from different steps") == 2


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
    asked = ("--eval", "--json", f"--checkpoint={tmp_path}/hu\nge.pt")
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


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("script", TINY_RUNS)
def test_evaluation_prints_the_table_of_the_report(script, branch, tmp_path, capsys):
    """--eval prints the rows of the report at the end of a run, but for those that it does not measure:
    MACs and images per second. What was castled has one column."""
    run_tiny(script, tmp_path)
    *_, report = capsys.readouterr().out.partition("castling report: ")
    rows = report[: report.index("written ")].splitlines()
    kept = [row for row in rows if not row.startswith(("MACs", "images/s"))]
    assert len(kept) == len(rows) - 2
    file = tmp_path / ("last.pt" if branch else "castled.pt")
    run_tiny(script, tmp_path / "e", "--eval", f"--checkpoint={file}")
    head, _, table = capsys.readouterr().out.partition("castling report: ")
    assert head == f"{file}, val images\n\n"
    if branch:
        assert table.splitlines() == kept
    else:
        assert [row.split()[-1] for row in table.splitlines()[1:]] == [
            "deployed", *(row.split()[-1] for row in kept[2:-2])]  # fmt: skip


@pytest.mark.parametrize("script", TINY_RUNS)
def test_the_report_ends_with_a_command_that_works(script, tmp_path, capsys):
    """On the built-in shapes --image is given a file that is there: the first validation image. The
    report says what it shows."""
    run_tiny(script, tmp_path / "a run")
    report = capsys.readouterr().out
    python, name, *words = shlex.split(re.search("look at a picture +(.*)", report)[1])
    assert (python, name) == ("python", f"{script}.py")
    picture = Path(words[words.index("--image") + 1])
    module, _, flags = TINY_RUNS[script]
    args = module.parser().parse_args([*flags, *words])
    module.resolve(args)
    scene = module.open_split(args, "val").scene(0)
    assert np.array_equal(np.asarray(Image.open(picture)), scene.image)
    names = ", ".join(list(data.SHAPES)[label] for label in scene.labels)
    assert f"{picture}, which shows: {names}\n" in report
    run_tiny(script, tmp_path / "drawn.png", *words)
    assert f"{picture}: " in capsys.readouterr().out


@pytest.mark.parametrize("both", [False, True])
def test_a_run_outlives_its_reader(tmp_path, both):
    """`train.py | head -1` trains to the end, with its errors in the same pipe or not, and flushes without an error."""
    reader, writer = os.pipe()

    def piped():
        os.dup2(writer, 1)
        os.dup2(writer if both else os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        os.close(reader)
        os.close(writer)
        with open(1, "w", closefd=False) as sys.stdout, open(2, "w", closefd=False) as sys.stderr:
            run_tiny("train", tmp_path / "run")

    process = multiprocessing.get_context("fork").Process(target=piped)
    process.start()
    os.close(writer)
    with open(reader) as output:
        assert "levit128" in output.readline()
    process.join(120)
    assert process.exitcode == 0 and (both or "BrokenPipe" not in (tmp_path / "stderr").read_text())
    assert "castling_report" in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize(("variables", "message"), [
    (dict(WORLD_SIZE="abc"), "WORLD_SIZE=abc"), (dict(WORLD_SIZE="0"), "WORLD_SIZE=0"),
    (dict(RANK="-1"), "RANK=-1"), (dict(LOCAL_RANK="x"), "LOCAL_RANK=x"),
    (dict(RANK="2", WORLD_SIZE="2"), "RANK=2, WORLD_SIZE=2"),
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


@pytest.mark.parametrize(("gpu", "native", "expected"), [
    (False, False, (False, "bfloat16")), (True, False, (False, "float16")),
    (True, True, (True, "bfloat16")),
])  # fmt: skip
def test_autocast_is_on_where_a_gpu_has_bfloat16(monkeypatch, gpu, native, expected):
    """Emulated bfloat16 is slow: a GPU that only emulates it, and a CPU, train in float32; --amp is
    float16 on the one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: native or including_emulation)
    args = train.parser().parse_args([])
    assert (args.amp, args.amp_dtype) == expected


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


# ---- hosts, processes and scripts ----------------------------------------------------------------


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


def test_two_hosts_equal_one_process(tmp_path, monkeypatch):
    """Five steps of DeiT on two machines that meet by c10d, gradients accumulated, one worker killed in the third step
    and all restarted by torchrun: weights within 1e-5 of one process with the whole batch, the same validation metrics
    and mask statistics."""
    common = ["--model=deit_tiny", "--image-size=32", "--shapes-length=60", "--max-steps=5", "--workers=0",
              "--mask-schedule=anneal"]  # fmt: skip
    (tmp_path / "dies_once.py").write_text(f"""
import os, pathlib, signal, sys; sys.path.insert(0, {str(ROOT)!r})
import run, train
from models import build_model
train.make_model = lambda args, *sizes: build_model(
    "deit_tiny", "castling", *sizes, schedule=args.mask_schedule, drop_path=0.0, **{TINY_DEIT!r})
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
    monkeypatch.setattr(train, "make_model", lambda args, *sizes: build_model(
        "deit_tiny", "castling", *sizes, schedule=args.mask_schedule, drop_path=0.0, **TINY_DEIT))  # fmt: skip
    train.main(train.parser().parse_args([*common, "--batch-size=8", f"--output={tmp_path}/one"]))
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
