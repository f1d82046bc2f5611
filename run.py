"""What a training run needs besides its loop: a library that train.py, detect.py and segment.py call.

Processes and averaged weights; `Run`, which keeps a run's checkpoints, log and progress and continues it, bit for bit,
at any step; evaluation with and without the auxiliary branch; the castling report; the flags that all scripts share;
models from checkpoints; pictures in and out. Nothing here calls back into a script.
"""

import argparse
import contextlib
import copy
import datetime
import difflib
import fcntl
import gc
import json
import math
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from attention import SCHEDULES, castle, cores, mask_statistics, mask_threshold, record_masks, set_threshold
from convert import LoadReport, check_export, damage, export, load_pretrained, read_checkpoint, weights_in
from data import DataError, Scenes, Shapes, mixed_seed, read_image
from models import ATTENTIONS

# ---- processes -------------------------------------------------------------------------------------------------------


def say(text: str, file: IO | None = None) -> None:
    """Print a line to standard output, or to `file`. If its reader has left, as `head` does, this
    and all later lines go nowhere, and the work goes on."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class NonFiniteLoss(RuntimeError):
    """The loss, a weight or every gradient became nan or infinite; the message says where and what is left."""


class SaveError(RuntimeError):
    """A checkpoint or log could not be written; the message says where, why, and what there still is."""


class Stopped(Exception):
    """A signal asked the run to stop. Everything is saved, on every rank after the same step."""


def start_processes() -> torch.device:
    """Join the process group if torchrun started several processes (nccl on GPUs, gloo on CPUs).

    Returns: this process's device.

    Raises: ValueError for environment variables that make no sense, or a group that is not met.
    """
    counts = {}
    for name, least in dict(WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, RANK=0, LOCAL_RANK=0).items():
        text = os.environ.get(name, str(least))
        if not text.isdecimal() or int(text) < least:
            wanted = f"a whole number of at least {least}"
            raise ValueError(f"{name}={text} in the environment: expected {wanted}")
        counts[name] = int(text)
    local_rank, several = counts["LOCAL_RANK"], counts["WORLD_SIZE"] > 1
    if several and counts["RANK"] >= counts["WORLD_SIZE"]:
        wanted = f"less than WORLD_SIZE={counts['WORLD_SIZE']}"
        raise ValueError(f"RANK={counts['RANK']} in the environment: expected {wanted}")
    device, backend, options = torch.device("cpu"), "gloo", {}
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(f"process {local_rank} of this machine has no GPU: there are {gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend, options = "nccl", dict(device_id=device)
    if several:
        try:
            dist.init_process_group(backend, **options)
        except (RuntimeError, ValueError) as error:
            names, reason = ("MASTER_ADDR", "MASTER_PORT"), str(error).splitlines()[0]
            place = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
            raise ValueError(f"cannot meet the other processes at {place}: {reason}") from None
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def checked(args: argparse.Namespace) -> Iterator[None]:
    """Around what comes before the work: what the user can mend ends the script with one line and status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        say(f"{args.script}: error: {error}", sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def session(args: argparse.Namespace, script: str) -> Iterator[tuple[str, torch.device]]:
    """Around a script's work: its processes begin and end here. Gives what is `asked` for,
    and this process's device.

    Work that fails for a reason of its own, such as a damaged image, ends in one line and status 1. A process that
    fails leaves its group without ceremony: the others may be waiting in it, and torchrun ends them.
    """
    args.script = script  # for its checkpoints
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes need not be text
    with checked(args):
        device = start_processes()
        task = asked(args)
    try:
        with contextlib.suppress(Stopped):
            yield task, device
    except (DataError, NonFiniteLoss, SaveError) as error:
        # From a loader process the message is a whole traceback, which ends in what was raised.
        say(f"{script}: {str(error).strip().rpartition('DataError: ')[2]}", sys.stderr)
        sys.exit(1)
    if dist.is_initialized():
        gc.collect()  # a DistributedDataParallel that outlives its group now and then aborts the process at exit
        barrier()
        dist.destroy_process_group()


def environment(device: torch.device) -> dict:
    """What a result depends on beside its flags: code, versions, machine. `commit` ends in -dirty where files differ
    from it, and is None outside a git checkout."""
    git, commit = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"], None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(git, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    cuda = device.type == "cuda"
    return dict(
        commit=commit,
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        device=torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        processes=world_size(),
    )


def all_sum(values: Tensor) -> list[float]:
    """Element-wise sum over ranks, as numbers."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def agreed(device: torch.device, *values: float | Tensor) -> list[float]:
    """The mean over ranks of each value, on every rank. One small collective, none for a single process.

    A flag that is set on any rank is above 0 everywhere, and a nan on any rank is nan everywhere.
    """
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    return [total / world_size() for total in all_sum(values)]


def parallel(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model as a training loop calls it: compiled if --compile says so, and in DistributedDataParallel."""
    net = torch.compile(model) if args.compile else model
    if world_size() > 1:  # no static_graph: torch's does not allow for skipped synchronisation in the first step
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    return net


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Autocast where --amp asks for it."""
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and buffers; the decay grows as (1 + n) / (10 + n) until it is `decay`."""

    def average(means: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = int(ema.n_averaged)  # is on the CPU; `updates`, on the device, would have to be waited for
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(means, current, updates)

    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    return ema


def ema_decay_for(steps: int) -> float:
    """Decay of the averaged weights: a horizon of 4% of the run. LeViT's is 0.99996, at 626,000 steps."""
    return min(0.99996, 1 - 1 / max(1.0, 0.04 * steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the learning rate of every parameter group, times the group's `lr_scale` if it has one; returns `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


# ---- progress and files ----------------------------------------------------------------------------------------------


class Progress:
    """Where a long loop stands: a tqdm bar on a terminal, a plain line every `seconds` elsewhere; rank 0 only."""

    def __init__(self, total: int, done: int = 0, seconds: float = 20.0):
        self.total, self.done, self.first, self.seconds, self.bar = total, done, done, seconds, None
        self.started = self.shown = self.last = time.monotonic()
        self.rate = 0.0
        self.warn = done == 0  # a run that continues has said how long it takes
        self.timed = None  # when the first step ended: that step may compile, so it is not timed
        if rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def step(self, images: int, **values: float) -> None:
        """One step over `images` images (of all ranks) is done; `values` are shown, with the rate of late steps."""
        now = time.monotonic()
        rate, self.last = images / max(now - self.last, 1e-9), now
        self.rate = rate if self.done == self.first else 0.95 * self.rate + 0.05 * rate
        self.done += 1
        shown = {key: f"{value:.4g}" for key, value in values.items()} | {"images/s": f"{self.rate:.0f}"}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        elif now - self.shown >= self.seconds:
            self.shown = now
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            self.say(f"  step {self.done}/{self.total}  {text}  ETA {datetime.timedelta(seconds=round(left))}")
        if self.timed is None:
            self.timed = now
        elif self.warn and self.done >= 5 and now - self.timed >= self.seconds:
            self.warn = False
            hours = (now - self.timed) / (self.done - 1) * (self.total - self.done) / 3600
            if hours > 1:
                self.say(f"training will take about {hours:.1f} hours on this machine; --epochs, "
                         "--max-steps or --image-size make it shorter")  # fmt: skip

    def say(self, text: str) -> None:
        if rank() == 0:
            with contextlib.nullcontext() if self.bar is None else self.bar.external_write_mode():
                say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def save(path: Path, state: dict, previous: Path | None = None) -> None:
    """Atomic: written beside `path`, flushed to disk, read back, then renamed; what `path` was becomes `previous`.

    A run killed at any time leaves one of the two whole. Tensors and plain data only: torch.load's default
    (weights_only=True) refuses anything else. Raises SaveError, with what `path` was there or in `previous`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if reason := damage(temporary):
            raise OSError(reason)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = [str(one) for one in (path, previous) if one is not None and one.exists()]
        left = f"the one before it is still there: {kept[0]}" if kept else "there is none yet"
        raise SaveError(f"cannot save the checkpoint {path}: {str(error).splitlines()[0]}; {left}") from None


def hold(folder: Path) -> IO:
    """The open file `lock`: as long as it is open, no other process can train into this folder.

    For workers that outlive a killed torchrun. A POSIX lock ends with its process, loader processes do not inherit it,
    and most network disks know it; on one that does not, nothing is held. Raises ValueError if another process has it,
    OSError if the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a+")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(f"{file.read()} trains into {folder}: wait for it, or kill it") from None
    except OSError:  # a disk that knows no locks
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def rewrite(path: Path, text: str) -> None:
    """Write a text file that is whole at any time, in a folder that is made if need be. Raises SaveError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}") from None


CHECKPOINTS = ("last.pt", "previous.pt")  # of a folder, newest first
# Flags that may differ between a run and its continuation. INEXACT ones change rounding or random numbers.
INEXACT = ("batch_size", "accumulate", "amp", "amp_dtype", "compile", "channels_last")
FREE = {"output", "overwrite", "save_minutes", "workers", "eval", "image", "export", "checkpoint", "json", "min_score",
        "teacher_checkpoint", "eval_every", "split", "backbone", *INEXACT}  # fmt: skip


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is whole; None if there are none. A damaged one is warned of.

    Raises: ValueError if all are damaged.
    """
    reasons = []
    for path in (folder / name for name in CHECKPOINTS):
        if path.exists():
            reason = damage(path)
            if reason is None:
                return path
            reasons.append(reason)
            if rank() == 0:
                say(f"warning: {reason}", sys.stderr)
    if reasons:
        raise ValueError(f"{'; '.join(reasons)}: nothing to continue from; --overwrite starts anew")
    return None


def begins_anew(args: argparse.Namespace) -> bool:
    """Whether a run starts from its first step: then first weights are loaded from the files that flags name."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # by torchrun, after a failure
    return args.overwrite and not restarted or not any((Path(args.output) / name).exists() for name in CHECKPOINTS)


# ---- a run -----------------------------------------------------------------------------------------------------------


class Run:
    """A training run: where it stands, its folder, its log. The script's loop drives it:

        with Run(...) as state:
            for epoch in state.epochs():
                for batches in state.steps(loader):     # seeds the step; saves when due, stops when asked
                    ...                                 # forward and backward of each batch
                    state.agree(loss, lr)               # before the weights change
                    ...                                 # optimizer, averaged weights
                state.log(metrics)
            state.report()

    It begins in --output, or continues what is there, bit for bit: all randomness of a step follows from (seed, step,
    rank), and the checkpoint holds all else, the log's records included. A kill during an evaluation repeats it.

    Args:
        metrics: {key: title} of what the script's evaluation returns; best.pt is the best by the first of them.
        loader: of the training set; its sampler is an EpochSampler.
    Raises: ValueError if what is in --output is another run's, or damaged; SaveError.
    """

    def __init__(
        self, args: argparse.Namespace, classes: list, model: nn.Module, ema: AveragedModel,
        optimizer: torch.optim.Optimizer, loader: DataLoader, device: torch.device,
        *, steps_per_epoch: int, total_steps: int, metrics: dict[str, str],
    ):  # fmt: skip
        self.args, self.classes, self.model, self.ema, self.optimizer = args, classes, model, ema, optimizer
        self.device, self.images, self.metrics, self.folder = device, len(loader.dataset), metrics, Path(args.output)
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        float16 = args.amp and args.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=float16)  # of the loss
        self.step, self.best, self.records = 0, -math.inf, []
        self.loss_sum, self.curve = 0.0, {"step": []}  # of the present epoch: losses, density of the masks
        self.trained = None  # the record of an epoch that is trained but not yet evaluated and logged
        self.signalled, self.saved = False, time.monotonic()  # asked to stop; when the last checkpoint was written
        self.begin_or_continue()
        self.bar = Progress(total_steps, self.step)

    @property
    def progress(self) -> float:
        """Share of training done, 0..1."""
        return self.step / self.total_steps

    def __enter__(self) -> "Run":
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        if kind is Stopped and rank() == 0:
            launcher = "the same torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else Path(sys.executable).name
            again = f"{launcher} {shlex.join(word for word in sys.argv if word != '--overwrite')}"
            say(f"stopped at step {self.step} of {self.total_steps}; continue with: {again}")

    def note(self, number: int, frame) -> None:
        """Signal handler: the run stops after this step or evaluation. A second Ctrl-C interrupts at once."""
        if self.signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signalled = True
        self.bar.say("stopping after this step")

    # ---- the loop

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left. The first one may be trained in part, or wait for evaluation."""
        yield from range(len(self.records), math.ceil(self.total_steps / self.steps_per_epoch))

    def steps(self, loader: DataLoader) -> Iterator[list]:
        """The steps that are left of an epoch, each as the list of its --accumulate batches; then a checkpoint.

        The masks' density is recorded at 100 to 200 steps of a run: `mask_curve` of the log has those of this epoch.
        Raises: Stopped, after the step in which a signal came; NonFiniteLoss; SaveError.
        """
        if self.trained is not None:  # it is trained, and waits for evaluation
            set_threshold(self.ema.module, self.progress)
            return
        args, started, waited, durations, first = self.args, time.monotonic(), 0.0, [], self.step
        epoch, done = divmod(self.step, self.steps_per_epoch)  # `done` steps of the epoch, before a continuation
        end = min(self.steps_per_epoch * (epoch + 1), self.total_steps)
        between = max(1, self.total_steps // 100)  # steps from one record of the masks to the next
        loader.sampler.epoch, loader.sampler.start = epoch, done * args.batch_size * args.accumulate
        self.bar.last = started  # the time of an evaluation before is not this step's
        batches = iter(loader)
        while self.step < end:
            waiting = time.monotonic()
            step_batches = [next(batches) for _ in range(args.accumulate)]
            begun = time.monotonic()
            torch.manual_seed(mixed_seed(args.seed, self.step, rank()))
            record_masks(self.model, self.step % between == 0)
            yield step_batches  # the script trains on them, and calls `agree`

            # Account for the step: masks, loss, time.
            if self.step % between == 0 and (masks := mask_statistics(self.model)):
                if self.step == 0:
                    self.bar.say(first_masks(self.model, masks))
                self.curve["step"].append(self.step)
                for name, (density, *_) in masks.items():
                    self.curve.setdefault(name, []).append(density)
            self.step += 1
            self.loss_sum += self.loss
            waited += begun - waiting
            durations.append(time.monotonic() - begun)
            self.bar.step(args.global_batch, epoch=epoch, loss=self.loss, lr=self.lr)

            # `agree` has found out whether to save or to stop after this step.
            if (self.stop or self.due) and self.step < end:  # the end of an epoch has a checkpoint of its own
                self.save_last()
                if self.stop:
                    raise Stopped

        # The epoch is trained: its record waits in the checkpoint until `log` adds the metrics.
        steps, seconds = self.step - first, time.monotonic() - started
        self.trained = dict(
            epoch=epoch,
            train_loss=self.loss_sum / (steps + done),
            train_lr=self.lr,
            seconds=seconds,
            images_per_s=steps * args.global_batch / seconds,
            data_wait=agreed(self.device, waited)[0] / seconds,  # share of the time that training waited for images
            step_seconds=statistics.median(durations),  # of a step, without that wait
            **({"mask_curve": self.curve} if self.curve["step"] else {}),
            step=self.step,
            n_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
        )
        self.loss_sum, self.curve = 0.0, {"step": []}
        if dist.is_initialized():
            for buffer in self.ema.module.buffers():  # each rank has averaged its own BatchNorm statistics
                dist.broadcast(buffer, 0)
        self.save_last()
        if any(agreed(self.device, self.signalled)):
            raise Stopped
        set_threshold(self.ema.module, self.progress)

    def agree(self, loss: Tensor, lr: float) -> None:
        """Make known to all ranks, before a step changes the weights: its mean loss, whether to save and to stop.

        Raises: NonFiniteLoss, in the same step on every rank.
        """
        due = rank() == 0 and 0 < 60 * self.args.save_minutes < time.monotonic() - self.saved
        self.loss, self.due, self.stop = agreed(self.device, loss, due, self.signalled)
        self.lr = lr
        if not math.isfinite(self.loss):
            raise self.not_finite(f"loss is {self.loss}")
        if self.scaler.get_scale() < 2**-24:  # float16's smallest number; the same on every rank, as gradients are
            raise self.not_finite("gradients overflow at every loss scale of float16")

    def evaluation_due(self) -> bool:
        """Whether the epoch that was trained last is to be evaluated."""
        return (self.trained["epoch"] + 1) % self.args.eval_every == 0 or self.step == self.total_steps

    def log(self, metrics: dict) -> None:
        """End an epoch: its record, with the metrics if it was evaluated, goes to the log; best.pt is kept.

        Raises: NonFiniteLoss, SaveError; Stopped if a signal came during evaluation.
        """
        record, scores = self.trained | metrics, ""
        if metrics:
            if not math.isfinite(record.get("test_loss", 0.0)):
                raise self.not_finite(f"validation loss is {record['test_loss']}", kept="previous.pt")
            key = next(iter(self.metrics))
            score = record.get(f"test_{key}_castled", record[f"test_{key}"])  # of what would be deployed
            improved, self.best = score > self.best, max(self.best, score)
            if improved and rank() == 0:
                save(self.folder / "best.pt", self.weights_and_settings())
            scores = " ".join(f"{title} {record[f'test_{key}']:.2f}" for key, title in self.metrics.items())
            scores = f"* {scores}{f' (castled: {score:.2f})' if 'castling_gap' in record else ''}, "
        self.records.append(record)
        self.trained = None
        self.write_log()
        self.bar.say(
            f"epoch {record['epoch']}: train_loss {record['train_loss']:.4f}, lr {record['train_lr']:.3g}, {scores}"
            f"{record['images_per_s']:.0f} images/s, {100 * record['data_wait']:.0f}% waiting for data"
        )
        if any(agreed(self.device, self.signalled)):
            raise Stopped

    def report(self) -> None:
        """What castling the averaged weights costs and saves, for the last evaluation: printed, logged, castled.pt."""
        self.bar.close()
        if rank() == 0:
            metric = castling_report(self.args, self.ema.module, self.records[-1], self.device)
            save(self.folder / "castled.pt", castle(copy.deepcopy(self.ema.module)).state_dict())
            print_report(self.args, metric, self.metrics)
            say(f"written               {self.folder / 'castled.pt'}")
            picture = self.example() if self.args.data == "shapes" else "PHOTO"
            best = shlex.join(["--checkpoint", str(self.folder / "best.pt"), "--image", str(picture)])
            say(f"look at a picture     python {self.args.script} {best}")
            if self.args.script == "train.py" and self.args.attention == "castling":
                say(f"look at its masks     python figures.py attention {best} --progress 0")
            self.write_log({"castling_report": metric, "step": self.step})
        barrier()

    def example(self) -> Path:
        """Save the first validation image of the built-in shapes as example.png, and say what it shows."""
        a = self.args
        shapes = (Scenes if a.script == "detect.py" else Shapes)("val", 1, a.image_size, a.seed)
        scene, path = shapes.scene(0), self.folder / "example.png"
        write_image(Image.fromarray(scene.image), path)
        say(f"written               {path}, which shows: "
            + (", ".join(shapes.classes[label] for label in scene.labels) or "nothing"))
        return path

    # ---- its files

    def write_log(self, *more: dict) -> None:
        """log.jsonl anew: a JSON object for each record; by rank 0."""
        if rank() == 0:
            lines = [json.dumps(record) + "\n" for record in (*self.records, *more)]
            rewrite(self.folder / "log.jsonl", "".join(lines))

    def not_finite(self, what: str, kept: str = "last.pt") -> NonFiniteLoss:
        """The error to raise, with what one needs to know to go on; `kept` is the checkpoint before it."""
        path = self.folder / kept
        left = f"the last checkpoint before it is {path}" if path.exists() else "there is no checkpoint before it"
        return NonFiniteLoss(f"{what} at step {self.step}, learning rate {self.lr:.3g}; {left}")

    def weights_and_settings(self) -> dict:
        """What best.pt holds: all that an evaluation needs."""
        return dict(
            ema=self.ema.module.state_dict(),
            ema_updates=int(self.ema.n_averaged),
            step=self.step,
            progress=self.progress,
            best=self.best,
            args=vars(self.args),
            classes=self.classes,
        )

    def save_last(self) -> None:
        """A checkpoint to continue from, by rank 0. Raises NonFiniteLoss for lost weights, SaveError."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self.not_finite("a weight is not finite")
        if rank() == 0:
            state = self.weights_and_settings() | dict(
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                processes=world_size(),
                images=self.images,
                loss_sum=self.loss_sum,
                curve=self.curve,
                trained=self.trained,
                records=self.records,
            )
            save(self.folder / "last.pt", state, previous=self.folder / "previous.pt")
        self.saved = time.monotonic()

    def begin_or_continue(self) -> None:
        """Continue what is in --output if it is this run; begin in an empty folder, or with --overwrite.

        A folder is locked before what is in it is read. But a folder is not made before all is known to be good.
        """
        args, path = self.args, None
        # Read what is there.
        if not begins_anew(args):
            if rank() == 0:
                self.lock = hold(self.folder)
            path = newest(self.folder)
            self.continue_from(path)
        elif not args.overwrite:
            parts = [self.folder / name for name in ("best.pt", "castled.pt", "log.jsonl")]
            # A log is empty until an epoch has ended: then nothing was lost that could be continued.
            kept = [path.name for path in parts if path.exists() and path.stat().st_size]
            if kept:
                raise ValueError(f"--output {self.folder} holds parts of a run ({', '.join(kept)}) but no checkpoint "
                                 "to continue from: choose another, or --overwrite to throw them away")  # fmt: skip
        mean, mean_square = agreed(self.device, self.step, self.step**2)
        if abs(mean_square - mean**2) > 1e-6 * mean_square:  # the variance over ranks is not 0
            raise ValueError(f"processes would continue from different steps: is --output {self.folder} on a shared "
                             "disk?")  # fmt: skip

        # All is good: write.
        if rank() == 0 and path is None:
            self.lock = hold(self.folder)
            config = vars(args) | dict(classes=self.classes, total_steps=self.total_steps)
            config["environment"] = environment(self.device)
            for name in (*CHECKPOINTS, "best.pt", "castled.pt", "example.png"):
                (self.folder / name).unlink(missing_ok=True)
            rewrite(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        self.write_log()
        barrier()
        if path is not None and rank() == 0:
            say(f"resumed from {path} at step {self.step} of {self.total_steps}")

    def continue_from(self, path: Path) -> None:
        """Take everything from a checkpoint of this run. Raises ValueError if it is of another, or cannot be."""
        args, state = self.args, read_checkpoint(path)
        if "records" not in state:
            raise ValueError(f"{path} cannot be continued, only evaluated: it is a best.pt or of an older version; "
                             "--overwrite starts anew")  # fmt: skip

        # The same run? Flags that belong to its identity, classes and number of images must agree.
        then, now = state["args"], vars(args)
        identity = [key for key in now if key not in FREE and now[key] != then.get(key)]
        differing = [f"{key} {then.get(key)!r} -> {now[key]!r}" for key in identity]
        if state["classes"] != self.classes:
            differing.append("the classes")
        if state["images"] != self.images:
            differing.append(f"training images {state['images']} -> {self.images}")
        if differing:
            raise ValueError(f"--output {self.folder} holds another run; differing: {', '.join(differing)}. Use its "
                             "flags to continue it, another --output, or --overwrite to throw it away")  # fmt: skip
        if not 0 <= state["step"] <= self.total_steps:
            raise ValueError(f"{path} is at step {state['step']}, the run ends at {self.total_steps}")

        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.ema.n_averaged.fill_(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.trained = state["step"], state["best"], state["trained"]
        self.loss_sum, self.curve, self.records = state["loss_sum"], state["curve"], state["records"]
        self.lr = self.trained["train_lr"] if self.trained else 0.0

        # The same bits? Not if one of these changed.
        then, now = then | {"processes": state["processes"]}, now | {"processes": world_size()}
        inexact = [key for key in ("processes", *INEXACT) if now.get(key) != then.get(key)]
        changed = [f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in inexact]
        if changed and rank() == 0:
            say(f"not bit for bit what it would have been from here on ({', '.join(changed)}): BatchNorm's statistics, "
                "mixing and dropout belong to each process and batch, and rounding changes")  # fmt: skip


def first_masks(model: nn.Module, masks: dict[str, tuple[float, float, float]]) -> str:
    """What the auxiliary masks hold in the first step of a run, by layer; `masks` as of `mask_statistics`."""
    kinds, never = {}, []  # densities of layers that have tokens and threshold in common
    for name, (density, _, tokens) in masks.items():
        core = cores(model)[name]
        threshold = float(mask_threshold(0.0, round(tokens), core.epsilon, core.schedule))
        kinds.setdefault(f"{tokens:.0f} tokens, threshold {threshold:.3g}", []).append(100 * density)
        if threshold >= 1:
            never.append(f"{name} ({tokens:.0f} tokens)")
    holding = sum(density > 0 for density, *_ in masks.values())
    text = [f"auxiliary branch: {holding} of {len(masks)} masks hold entries in the first step"]
    for kind, percent in kinds.items():
        text.append(f"  {len(percent)} layers of {kind}: {min(percent):.3g} to {max(percent):.3g}% of entries kept")
    if never:
        text.append(f"  never any, as a threshold of 1 keeps nothing: {', '.join(never)}")
    return "\n".join(text)


# ---- evaluation and castling report ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_castling(evaluate: Callable[[nn.Module], dict], model: nn.Module, metric: str) -> dict:
    """Metrics of the model as trained and of its castled copy, their gap, and what the masks still hold.

    Args:
        evaluate: a model -> its metrics over the whole validation set, the same on every rank.
        metric: the key of the first of them.
    Returns: `test_*`; for models with an auxiliary branch also `test_*_castled`, `castling_gap` (of `metric`, lost by
        castling), `mask_density` and `mask_mass` by layer.
    """
    record_masks(model, True)
    metrics = evaluate(model)
    record = {f"test_{key}": value for key, value in metrics.items()}
    if masks := mask_statistics(model):
        castled = evaluate(castle(copy.deepcopy(model)))
        record |= {f"test_{key}_castled": value for key, value in castled.items()}
        record["castling_gap"] = metrics[metric] - castled[metric]
        record["mask_density"] = {layer: density for layer, (density, *_) in masks.items()}
        record["mask_mass"] = {layer: mass for layer, (_, mass, _) in masks.items()}
    return record


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of convolutions, linear layers and attention products (1 MAC = 2 FLOPs) for one batch.

    flops.py also counts deformable sampling: 0.2% of segment.py's `msdeform`, which is left out here.
    """
    model = copy.deepcopy(model).to("meta")  # nothing is computed, and no mask passes for empty
    # The MATH kernel is matrix products, which the counter sees; it counts fused attention as 0 on some devices.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images.to("meta"))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def images_per_second(models: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Median throughput of each model on the same batch, measured in turns so that a noisy machine hits all alike."""
    times = {name: [] for name in models}
    for turn in range(8):
        for name, model in models.items():
            started = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first is warm-up
                times[name].append(time.perf_counter() - started)
    return {name: len(images) / statistics.median(spent) for name, spent in times.items()}


def castling_report(args: argparse.Namespace, model: nn.Module, record: dict, device: torch.device) -> dict:
    """What castling costs and saves: the metrics in `record`, MACs of one image, images/s with and without branch."""
    wanted = ("test_", "castling_", "mask_density", "mask_mass")
    metric = {key: value for key, value in record.items() if key.startswith(wanted)}
    models = {"as deployed": castle(copy.deepcopy(model)).eval()}
    if "castling_gap" in metric:
        branched = copy.deepcopy(model).eval()
        set_threshold(branched, 0.0)  # the branch as computed in training; at the end of the ramp it is skipped
        record_masks(branched, False)
        models = {"with branch": branched, "castled": models["as deployed"]}
    batch = torch.randn(min(32, args.batch_size), 3, args.image_size, args.image_size, device=device)
    with autocast(args, device):
        speed = images_per_second(models, batch)
    macs = {name: count_macs(m, batch[:1]) for name, m in models.items()}
    return metric | dict(macs=macs, inference_images_per_s=speed)


def print_report(args: argparse.Namespace, metric: dict, titles: dict[str, str]) -> None:
    """Print the castling report: one column of numbers, or two if there was a branch to castle.

    metric: as of `castling_report`. Rows of what it does not hold are left out.
    """
    say(f"\ncastling report: {args.model}, {args.attention}, {args.data} at {args.image_size} px")
    branch = "castling_gap" in metric
    rows = {"": ["with branch", "castled"] if branch else ["as deployed"]}
    for key, title in titles.items():
        scores = [metric[name] for name in (f"test_{key}", f"test_{key}_castled") if name in metric]
        rows[title] = [f"{score:.2f}" for score in scores]
    if "macs" in metric:
        rows["MACs per image, M"] = [f"{macs / 1e6:.1f}" for macs in metric["macs"].values()]
        speeds = metric["inference_images_per_s"].values()
        rows[f"images/s, batch {min(32, args.batch_size)}"] = [f"{speed:.0f}" for speed in speeds]
    for name, values in rows.items():
        say(f"{name:22}" + "".join(f"{value:>14}" for value in values))
    if branch:
        say(f"castling gap          {metric['castling_gap']:.2f} points of {next(iter(titles.values()))}")
        held = [f"{layer} {density:.4f}" for layer, density in metric["mask_density"].items() if density > 0]
        say(f"mask density          {', '.join(held) or '0 in every layer: the masks are empty'}")


# ---- command line ----------------------------------------------------------------------------------------------------


def at_least(minimum: float, kind: type = int, most: float = 10**9) -> Callable[[str], float]:
    """argparse type: a number of that kind within minimum..most."""

    def convert(text: str):
        value = kind(text)
        if not minimum <= value <= most:
            low = value < minimum and most == 10**9
            bounds = f"at least {minimum}" if low else f"within {minimum}..{most}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


share = at_least(0, float, most=1)


class Parser(argparse.ArgumentParser):
    """Refuses empty values, and answers a mistake in a line or two, with the nearest flag."""

    def __init__(self, script: str, doc: str, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=script, description=doc, formatter_class=formatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        for before, word in zip(["", *words], words, strict=False):
            flag, equals, value = word.partition("=")
            if not word or (flag.startswith("--") and equals and not value):
                self.error(f"{flag or before} has an empty value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> None:
        for word in message.split():
            near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
            if message.startswith("unrecognized") and word.startswith("--") and near:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all flags\n")


def by_data(flag: str, defaults: dict[str, dict]) -> str:
    """The part of a flag's help that says what its default is for each kind of data."""
    given = [f"{row[flag]} for {data}" for data, row in defaults.items() if flag in row]
    return f"default {', '.join(given) or 'none'}"


def shared_flags(parser: argparse.ArgumentParser, defaults: dict[str, dict]) -> argparse._ArgumentGroup:
    """Flags that train.py, detect.py and segment.py have in common; `defaults` by kind of data.

    Returns: the group "recipe", for a script's own flags. A flag that is not given is None, and filled in later.
    """
    on_off = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--data", help="a built-in set or a folder; default shapes, rendered on the fly")
    add("--image-size", type=at_least(1, most=4096), help=f"pixels per side; {by_data('image_size', defaults)}")
    add("--shapes-length", type=at_least(1), help=f"rendered training images; {by_data('shapes_length', defaults)}")
    recipe = parser.add_argument_group("model and recipe")
    add = recipe.add_argument
    add("--model", help="a model by name")
    add("--attention", help=f"{', '.join(ATTENTIONS)}; default castling")
    add("--epochs", type=at_least(1), help=f"passes over the training images; {by_data('epochs', defaults)}")
    add("--max-steps", type=at_least(1), help="stop after this many optimiser steps; schedules are fitted to it")
    add("--batch-size", type=at_least(1), help=f"images per process; {by_data('batch_size', defaults)}")
    add("--accumulate", type=at_least(1), default=1, help="batches per optimiser step; default 1")
    add("--lr", type=at_least(0, float, most=1e30), help="peak learning rate at the recipe's own batch, scaled "
        "linearly to yours")  # fmt: skip
    add("--seed", type=at_least(0, most=2**62), help="of weights, data order, augmentation and shapes; default 0")
    add("--checkpoint", help="weights to start from, to evaluate or to predict with; a run's own or any state dict")
    add = parser.add_argument_group("castling").add_argument
    add("--epsilon", type=share, help="mask threshold of Eq. (10), 0..1; default 0.02")
    add("--mask-schedule", choices=SCHEDULES, help="how the threshold moves in training (D4); default ramp")
    add("--dconv", type=at_least(0), help="taps of the DWConv on V, 0 for none; default 9")
    add("--mlp-dwconv", type=at_least(0), help="kernel of the DWConv in the MLPs, 0 for none; default the paper's (D7, "
        "D8), 0 for softmax")  # fmt: skip
    add("--zero-dconv", action="store_true", help="start the DWConv on V at zero, not at random: to go on from a "
        "--checkpoint that has none")  # fmt: skip
    add = parser.add_argument_group("run").add_argument
    add("--output", help="folder for checkpoints and log, default runs/MODEL-ATTENTION-DATA; a run that is there is "
        "continued. With --image the file or folder to draw to")  # fmt: skip
    add("--overwrite", action="store_true", help="throw away the run in --output and start anew")
    add("--save-minutes", type=at_least(0, float), default=10.0, help="between checkpoints within an epoch, each of "
        "which ends with one too; 0 for none within; default 10")  # fmt: skip
    add("--eval-every", type=at_least(1), help="epochs from one evaluation to the next; default 1, for COCO 10")
    add("--eval", action="store_true", help="evaluate --checkpoint and stop")
    add("--split", choices=("val", "train"), default="val", help="what --eval evaluates on; default val")
    add("--image", nargs="+", metavar="FILE", help="images to predict with --checkpoint")
    add("--json", action="store_true", help="print what --eval or --image finds as JSON")
    add("--export", help="a .onnx or .pt2 file to write --checkpoint to, castled, for normalised images of any size")
    add = parser.add_argument_group("processes").add_argument
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    add("--workers", type=at_least(0, most=128), help="loader processes; default: a process's share of the cores, at "
        "most 8")  # fmt: skip
    add("--amp", action=on_off, default=bfloat16, help="autocast; default on GPUs that have bfloat16")
    add("--amp-dtype", choices=("bfloat16", "float16"), help="of autocast; float16 scales the loss; default bfloat16 "
        "but on GPUs without", default="bfloat16" if bfloat16 or not torch.cuda.is_available() else "float16")
    add("--compile", action=on_off, default=False, help="torch.compile the training step's model")
    return recipe


def take_over(args: argparse.Namespace, trained: Mapping) -> None:
    """Flags that were not given, from `trained`, the settings of a checkpoint."""
    for flag, value in vars(args).items():
        if value is None and flag not in FREE:
            setattr(args, flag, trained.get(flag))


def fill_in(args: argparse.Namespace, defaults: Mapping) -> None:
    """Flags that are still open, from `defaults` and those that all scripts share; then the output folder, and
    `global_batch`, the images of a step over all processes."""
    shared = dict(attention="castling", data="shapes", epsilon=0.02, mask_schedule="ramp", seed=0, eval_every=1)
    # The cores that this process may use may be a part of the machine's; macOS cannot say.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared["workers"] = max(1, min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    for flag, value in (shared | dict(defaults)).items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.output is None and args.eval:
        args.output = str(Path(args.checkpoint).parent / f"eval-{Path(args.data).resolve().name}-{args.split}")
    if args.output is None and not args.image:
        short = f"-{args.max_steps}steps" if args.max_steps else ""
        args.output = f"runs/{args.model}-{args.attention}-{Path(args.data).resolve().name}{short}".replace(":", "-")
    args.global_batch = args.batch_size * args.accumulate * world_size()


def asked(args: argparse.Namespace) -> str:
    """What a script is to do: "train", "eval", "image" or "export". Raises ValueError for what
    cannot be done."""
    wanted = [flag for flag in ("eval", "image", "export") if getattr(args, flag)]
    if wanted and not args.checkpoint:
        raise ValueError("--eval, --image and --export need --checkpoint")
    if len(wanted) > 1:
        raise ValueError(f"--{' and --'.join(wanted)} are different things to do")
    if args.export:
        check_export(args.export)
    return wanted[0] if wanted else "train"


def epoch_and_run(args: argparse.Namespace, images: int) -> tuple[int, int]:
    """Steps per epoch, and of the run. Raises ValueError if there are fewer images than one global batch."""
    if images < args.global_batch:
        raise ValueError(f"{args.data} has {images} training images, fewer than one global batch of "
                         f"{args.global_batch}: lower --batch-size")  # fmt: skip
    steps_per_epoch = images // args.global_batch
    return steps_per_epoch, min(steps_per_epoch * args.epochs, args.max_steps or math.inf)


def same_classes(args: argparse.Namespace, train_set: Dataset, val_set: Dataset) -> None:
    """Raise ValueError if training and validation set have different classes."""
    one, other = train_set.classes, val_set.classes
    if one != other:
        differing = [c for c in one if c not in other] + [c for c in other if c not in one]
        raise ValueError(f"the training and validation images of {args.data} have different classes: "
                         f"{', '.join(map(str, differing[:5])) or 'the same in another order'}")  # fmt: skip


def describe(state: Run, recipe: str, val_set: Dataset) -> str:
    """The settings that shape any run, in a few lines, for the start of the output; `recipe` is the script's part."""
    a = state.args
    parameters = sum(p.numel() for p in state.model.parameters())
    branch = any(core.auxiliary for core in cores(state.model).values())
    mask = f"mask: threshold {a.epsilon}, {a.mask_schedule}; " if branch else ""
    return f"""{a.model}, {a.attention}: {parameters / 1e6:.2f} M parameters, {world_size()} x {state.device.type}
data: {a.data}, {state.images} training and {len(val_set)} validation images of {a.image_size} px, \
{len(state.classes)} classes
length: {state.total_steps / state.steps_per_epoch:.4g} epochs, {state.total_steps} steps of {a.global_batch} images
{recipe}
{mask}output: {a.output}"""


# ---- models from checkpoints -----------------------------------------------------------------------------------------


def core_options(args: argparse.Namespace) -> dict:
    """What the flags say of a model's attention and of the MLPs' DWConv, as `build_model` takes it."""
    options = dict(epsilon=args.epsilon, schedule=args.mask_schedule)
    return options | {key: getattr(args, key) for key in ("dconv", "mlp_dwconv") if getattr(args, key) is not None}


def settings_for(args: argparse.Namespace) -> dict:
    """The settings that --checkpoint was trained with, `classes` among them: its own, or those of the config.json
    beside it; {} if there are none. Raises ValueError if they are another script's."""
    checkpoint, settings = read_checkpoint(args.checkpoint), {}
    config = Path(args.checkpoint).with_name("config.json")
    if isinstance(checkpoint.get("args"), dict):
        settings = checkpoint["args"] | {"classes": checkpoint.get("classes")}
    elif config.is_file():
        try:
            settings = json.loads(config.read_text())
        except ValueError as error:
            raise ValueError(f"{config} is damaged: {error}") from None
    if not isinstance(settings, dict) or settings.get("attention") not in ATTENTIONS:
        return {}  # others too write args, and files of that name
    if settings.get("script", args.script) != args.script:
        raise ValueError(f"{args.checkpoint} is a checkpoint of {settings['script']}, not of {args.script}")
    return renamed(settings)


def renamed(settings: dict) -> dict:
    """Settings with the DWConvs under today's names, `dconv` and `mlp_dwconv`, whichever version wrote them."""
    settings = dict(settings)
    if settings.pop("dwconv", None) is False:
        settings |= dict(dconv=0, mlp_dwconv=0)
    if settings.pop("v_dconv", None) is False:
        settings["dconv"] = 0
    for old in ("mlp_dw", "mlp_conv"):
        if (kernel := settings.pop(old, None)) is not None:
            settings["mlp_dwconv"] = kernel
    return settings


def count_classes(path: str, heads: Iterable[str]) -> int:
    """Rows of a checkpoint's class head, the first of `heads` that it has. Raises ValueError if it has none."""
    weights = weights_in(read_checkpoint(path))
    for name in heads:
        if name in weights:
            return len(weights[name])
    raise ValueError(f"{path} has none of {', '.join(heads)}: it is no model of this script")


def start_from(model: nn.Module, args: argparse.Namespace, load: Callable = load_pretrained) -> None:
    """A new run's first weights: the DWConv on V at zero with --zero-dconv; then those of --checkpoint."""
    for core in cores(model).values() if args.zero_dconv else ():
        if core.dconv is not None:
            nn.init.zeros_(core.dconv.weight)
    if args.checkpoint and begins_anew(args):
        report = load(model, args.checkpoint)
        if rank() == 0:
            say(f"{args.checkpoint}\n{report}")


def load_trained(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model with all of --checkpoint's weights, in eval mode, at the mask threshold it had reached.

    A plain state dict is taken as castled. Raises ValueError if the file does not hold all of the model.
    """
    checkpoint, report = read_checkpoint(args.checkpoint), load_pretrained(model, args.checkpoint)
    if report.new or report.partly:
        raise ValueError(
            f"{args.checkpoint} does not hold all of {args.model} with {args.attention} attention, only something to "
            f"start from (is it of --attention softmax?)\n{report}"
        )
    if "progress" not in checkpoint:
        castle(model)
    set_threshold(model, checkpoint.get("progress", 1.0))
    return model.eval()


def check_classes(args: argparse.Namespace, known: list, found: list) -> None:
    """Raise ValueError unless a checkpoint's classes are those of the data."""
    if known != found:
        some = [", ".join(map(str, classes[:3])) for classes in (known, found)]
        raise ValueError(f"{args.checkpoint} knows {len(known)} classes ({some[0]}, ...), "
                         f"{args.data} has {len(found)} ({some[1]}, ...)")  # fmt: skip


def print_evaluation(args: argparse.Namespace, record: dict, titles: dict[str, str]) -> None:
    """--eval: rank 0 prints the scores, as a table or with --json as one JSON object.

    Raises: DataError for a loss that is nan or infinite.
    """
    if not math.isfinite(record.get("test_loss", 0.0)):
        raise DataError(f"{args.checkpoint}: the loss is {record['test_loss']}")
    if rank() == 0 and args.json:
        say(json.dumps(record))
    elif rank() == 0:
        say(f"{args.checkpoint}, {args.split} images")
        print_report(args, record, titles)


def write_export(model: nn.Module, args: argparse.Namespace) -> None:
    """--export: write the castled model to a file, and run the file beside it; by rank 0. Raises DataError."""
    if rank() == 0:
        shapes, difference = export(model, args.export, args.image_size)
        shapes = ", ".join("x".join(map(str, shape)) for shape in shapes)
        say(f"{args.export}: run on {shapes}; largest difference {difference:.1e}")
        if not difference < 1e-4:
            raise DataError(f"{args.export} is not the model that it was made from")


def load_start(model: nn.Module, path: str | Path, layers: str) -> LoadReport:
    """Weights to start from; without the class `layers`, named by what their parameters start with, where the file
    knows another number of classes. Raises ValueError as `load_pretrained` does."""
    name = next(name for name in model.state_dict() if name.startswith(layers) and name.endswith("weight"))
    found = weights_in(read_checkpoint(path)).get(name)
    other = found is not None and len(found) != len(model.get_parameter(name))
    return load_pretrained(model, path, fresh=layers if other else None)


# ---- pictures in and out ---------------------------------------------------------------------------------------------


def check_images(paths: list[str]) -> None:
    """Raise ValueError for an image file that is not there."""
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"no image file {path!r}")


def drawing_paths(images: list[str], output: str | None, suffix: str) -> dict[Path, Path]:
    """{image file: file to draw it to}: NAME_suffix.png here; or `output`, of several images a folder of NAME.png.

    Raises: ValueError for images that are not there, an `output` that cannot be drawn to, two images of one name, or
        a drawing that would overwrite an image.
    """
    check_images(images)
    paths = [Path(image) for image in images]
    if output is None:
        targets = [Path(f"{path.stem}_{suffix}.png") for path in paths]
    elif len(paths) == 1:
        targets = [Path(output)]
        if targets[0].suffix.lower() not in Image.registered_extensions() or not targets[0].parent.is_dir():
            raise ValueError(f"--output {output} is no image file in an existing folder")
    else:
        targets = [Path(output) / f"{path.stem}.png" for path in paths]
        if Path(output).exists() and not Path(output).is_dir():
            raise ValueError(f"--output {output} is a file; several images are drawn to a folder")
    if len(set(targets)) < len(targets):
        raise ValueError("--image has two files of one name, whose drawings would be one file")
    if overwritten := {path.resolve() for path in paths} & {path.resolve() for path in targets}:
        raise ValueError(f"--output would overwrite {min(overwritten)}")
    return dict(zip(paths, targets, strict=True))


def read_each(paths: Iterable[str | Path]) -> Iterator[tuple[Path, Image.Image]]:
    """The images of files that can be read, upright, on rank 0; then DataError if there were others, each named."""
    unread = 0
    for path in paths if rank() == 0 else ():
        try:
            image = read_image(path, upright=True)
        except DataError as error:
            say(str(error), sys.stderr)
            unread += 1
            continue
        yield Path(path), image
    if unread:
        raise DataError(f"{unread} images could not be read")


@contextlib.contextmanager
def json_list(args: argparse.Namespace) -> Iterator[list]:
    """A list to fill. With --json rank 0 prints it at the end, also if an error ended the work."""
    found = []
    try:
        yield found
    finally:
        if args.json and rank() == 0:
            say(json.dumps(found, indent=1))


def write_image(image: Image.Image, target: Path) -> None:
    """Save a drawing; DataError names the file that cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {target}: {error}") from None
