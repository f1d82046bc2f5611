"""What a training run needs besides its loop. train.py, detect.py and segment.py share this file.

The sections, in order: processes and averaged weights; progress and files; `Run`, which keeps a
run's checkpoints and log and continues it at any step; evaluation with and without the auxiliary
branch, and the castling report; the command line; models from checkpoints; pictures in and out.
This file imports none of the scripts.

A rank is the number of a process, from 0. Rank 0 alone prints and writes. But each process prints
the error that ends it.
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
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from attention import SCHEDULES, castle, cores, mask_statistics, mask_threshold, record_masks, set_threshold
from convert import check_export, damage, export, load_pretrained, read_checkpoint, weights_in
from data import DataError, Scenes, Shapes, mixed_seed, read_image
from models import ATTENTIONS

# ---- processes -----------------------------------------------------------------------------------


def say(text: str, file: IO | None = None, every_rank: bool = False) -> None:
    """Rank 0, or every rank, prints a line to standard output, or to `file`.

    If the reader of the output has left, as `head` does, this line and all later ones are lost. The
    work goes on.
    """
    if rank() > 0 and not every_rank:
        return
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class RunError(RuntimeError):
    """A run cannot go on: a number is not finite, or a file could not be written.

    The message says which, and names the last checkpoint before it.
    """


class Stopped(Exception):
    """A signal asked the run to stop. All ranks stop after the same step, which is saved."""


def start_processes() -> torch.device:
    """Join the process group if torchrun started several processes: nccl on GPUs, gloo on CPUs.

    Returns: this process's device.
    Raises: ValueError if the variables that torchrun sets make no sense, if a process has no GPU on
        a machine with GPUs, or if the other processes cannot be reached.
    """
    variables = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="", MASTER_PORT="")
    variables = {name: os.environ.get(name, default) for name, default in variables.items()}
    try:
        number, processes = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        local_rank = int(variables["LOCAL_RANK"])
        if not 0 <= number < processes:
            raise ValueError("RANK is not within 0..WORLD_SIZE - 1")
        device, backend, options = torch.device("cpu"), "gloo", {}
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            if local_rank >= gpus:
                raise ValueError(f"process {local_rank} of this machine has no GPU: "
                                 f"there are {gpus}")  # fmt: skip
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            backend, options = "nccl", dict(device_id=device)
        if processes > 1:
            dist.init_process_group(backend, **options)
    except (RuntimeError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in variables.items() if value)
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot join the processes of {given}: {reason}") from None
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
    """Use around the preparation of the work, where errors are mistakes of the user.

    A ValueError or OSError ends the script with one line and status 2.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        say(f"{args.script}: error: {error}", sys.stderr, every_rank=True)
        sys.exit(2)


@contextlib.contextmanager
def session(args: argparse.Namespace) -> Iterator[tuple[str, torch.device]]:
    """Use around all work of a script: joins the process group before it, and leaves it after.

    Yields: the task, as `asked` names it, and this process's device.
    A DataError, such as a damaged image, and a RunError end the script with one line and status 1.
    A process that fails exits at once and does not wait for its group, as the others may be waiting
    for it. torchrun then ends them.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes need not be text
    with checked(args):
        device = start_processes()
        task = asked(args)
    try:
        with contextlib.suppress(Stopped):
            yield task, device
    except (DataError, RunError) as error:
        # The message from a loader process is a whole traceback, and ends with the error itself.
        reason = str(error).strip().rpartition("DataError: ")[2]
        say(f"{args.script}: {reason}", sys.stderr, every_rank=True)
        sys.exit(1)
    if dist.is_initialized():
        gc.collect()  # a DistributedDataParallel that outlives its group may abort the process
        barrier()
        dist.destroy_process_group()


def environment(device: torch.device) -> dict:
    """What a result depends on besides its flags: code, versions, machine.

    `commit` ends in -dirty if files differ from it. It is None outside a git checkout.
    """
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
    """Sum over ranks of each element, as a list of numbers."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def mean_over_ranks(device: torch.device, *values: float | Tensor) -> list[float]:
    """The mean over ranks of each value. Every rank gets the same numbers.

    So a flag that is set on any rank is above 0 on all, and a nan on any rank is nan on all. All
    values go in one exchange between the processes. A single process needs none.
    """
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    return [total / world_size() for total in all_sum(values)]


def parallel(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model as a training loop calls it: with --compile, and with several processes."""
    net = torch.compile(model) if args.compile else model
    if world_size() > 1:  # not with static_graph: its first step must synchronise every batch
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    return net


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Context of mixed precision, --amp and --amp-dtype. Without --amp it does nothing."""
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that holds the exponential moving average (EMA) of weights and buffers.

    After n updates the decay is (1 + n) / (10 + n), but at most `decay`.
    """

    def average(means: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = int(ema.n_averaged)  # on the CPU: reading `updates` would wait for the device
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(means, current, updates)

    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    return ema


def ema_decay_for(steps: int) -> float:
    """Decay of the averaged weights, 1 - 1 / (4% of the steps), and at most 0.99996.

    An average of decay d covers about the last 1 / (1 - d) steps. 0.99996 is LeViT's decay, and 4%
    of LeViT's 626,000 steps give it.
    """
    return min(0.99996, 1 - 1 / max(1.0, 0.04 * steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the learning rate of each parameter group: `lr` times its `lr_scale`. Returns `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


# ---- progress and files --------------------------------------------------------------------------


class Progress:
    """Shows how far a loop is: on a terminal as a tqdm bar, elsewhere as a line every `seconds`.

    Only rank 0 shows it. A new run of more than an hour also says so, once, near its start.
    """

    def __init__(self, total: int, done: int = 0, seconds: float = 20.0):
        self.total, self.done, self.first, self.seconds, self.bar = total, done, done, seconds, None
        self.started = self.shown = self.last = time.monotonic()
        self.rate = 0.0
        self.warn = done == 0  # only a new run can still be made shorter
        self.timed = None  # time at the end of the first step, which is slow: it may compile
        if rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def step(self, images: int, **values: float) -> None:
        """Count a step of `images` images over all ranks. Show `values` and images per second."""
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
        with contextlib.nullcontext() if self.bar is None else self.bar.external_write_mode():
            say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def save(path: Path, state: dict, previous: Path | None = None) -> None:
    """Write a checkpoint. If the run is killed while it is written, the older one stays whole.

    state: tensors and plain data. torch.load refuses anything else (weights_only=True).
    previous: where the file that was at `path` goes.
    Raises: RunError, which names the older checkpoint.
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
        left = f"an earlier checkpoint is still there: {kept[0]}" if kept else "there is no earlier checkpoint"
        raise RunError(f"cannot save the checkpoint {path}: {str(error).splitlines()[0]}; {left}") from None


def hold(folder: Path) -> IO:
    """Lock a folder. While the returned file is open, no other process can train into the folder.

    A worker can go on training after its torchrun was killed. This is a POSIX lock: it ends with
    its process, and loader processes do not inherit it. Most network disks support it. On a disk
    that does not, the folder is not locked.

    Raises: ValueError if another process holds the lock; OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a+")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(f"{file.read()} trains into {folder}: wait until it ends, or kill it") from None
    except OSError:  # a disk that knows no locks
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def rewrite(path: Path, text: str) -> None:
    """Replace a text file, which is whole at any time. Make its folder. Raises: RunError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from None


CHECKPOINTS = ("last.pt", "previous.pt")  # in a run's folder, newest first
# FREE flags may differ between a run and its continuation. Those in INEXACT change rounding or
# random numbers, so that the result is no longer the same bit for bit.
INEXACT = ("batch_size", "accumulate", "amp", "amp_dtype", "compile", "channels_last")
FREE = {"output", "overwrite", "save_minutes", "workers", "eval", "image", "export", "checkpoint", "json", "min_score",
        "teacher_checkpoint", "eval_every", "split", "backbone", *INEXACT}  # fmt: skip


def newest(folder: Path) -> Path:
    """The newest whole checkpoint of a folder. A newer one that is damaged is named in a warning.

    Raises: ValueError if there is none.
    """
    for path in (folder / name for name in CHECKPOINTS):
        if path.exists():
            reason = damage(path)
            if reason is None:
                return path
            say(f"warning: {reason}", sys.stderr)
    raise ValueError(f"{folder} has nothing to continue from; --overwrite starts a new run")


def begins_anew(args: argparse.Namespace) -> bool:
    """Whether a run starts at its first step. Only then are the weights that flags name loaded."""
    # torchrun has restarted this process after a failure:
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return args.overwrite and not restarted or not any((Path(args.output) / name).exists() for name in CHECKPOINTS)


# ---- a run ---------------------------------------------------------------------------------------


class Run:
    """A training run: its state, its folder and its log. The training loop of a script is:

        with Run(...) as state:
            for epoch in state.epochs():
                for batches in state.steps(loader):     # also saves when due, and stops when asked
                    ...                                 # forward and backward of each batch
                    state.update(loss, lr)              # the weights and their average change
                state.log(metrics)
            state.report()

    The run starts in --output, or continues the run that is there. On a CPU the result is then the
    same, bit for bit, as if it had never stopped. For that, the random numbers of a step depend on
    (seed, step, rank) alone, and the checkpoint holds everything else, also the log's records. An
    evaluation that was interrupted is made again.

    Args:
        metrics: {key: title} of the scores that the script's evaluation returns. best.pt is the
            checkpoint with the highest score of the first key.
        loader: batches of the training set. Its sampler is an EpochSampler.
    Raises: ValueError if --output holds another run or only damaged checkpoints; RunError.
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
        self.loss_sum, self.curve = 0.0, {"step": []}  # of this epoch: losses, masks
        self.trained = None  # record of an epoch that is trained, but not yet evaluated and logged
        self.signalled, self.saved = False, time.monotonic()  # stop wanted; time of last checkpoint
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
        if kind is Stopped:
            launcher = "the same torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else Path(sys.executable).name
            again = f"{launcher} {shlex.join(word for word in sys.argv if word != '--overwrite')}"
            say(f"stopped at step {self.step} of {self.total_steps}; continue with: {again}")

    def note(self, number: int, frame) -> None:
        """Signal handler: stop after this step or evaluation. A second Ctrl-C stops at once."""
        if self.signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signalled = True
        self.bar.say("stopping after this step or evaluation; a second Ctrl-C stops at once")

    # ---- the loop

    def epochs(self) -> Iterator[int]:
        """Numbers of the epochs that are left. The first may be trained, in part or whole."""
        yield from range(len(self.records), math.ceil(self.total_steps / self.steps_per_epoch))

    def steps(self, loader: DataLoader) -> Iterator[list]:
        """The steps that are left of an epoch. After them a checkpoint is written.

        The density of the masks is recorded at 100 to 200 steps of a run, evenly spaced; at every
        step of a shorter run. In the log it is the `mask_curve` of each epoch.

        Yields: the batches of each step, a list of --accumulate.
        Raises: Stopped, after the step in which a signal came; RunError.
        """
        if self.trained is not None:  # only the evaluation is left
            set_threshold(self.ema.module, self.progress)
            return
        args, started, waited, durations, first = self.args, time.monotonic(), 0.0, [], self.step
        epoch, done = divmod(self.step, self.steps_per_epoch)  # `done`: steps of this epoch before
        end = min(self.steps_per_epoch * (epoch + 1), self.total_steps)
        between = max(1, self.total_steps // 100)  # the masks are recorded once in so many steps
        loader.sampler.epoch, loader.sampler.start = epoch, done * args.batch_size * args.accumulate
        self.bar.last = started  # an evaluation before this step is not part of its time
        batches = iter(loader)
        while self.step < end:
            waiting = time.monotonic()
            step_batches = [next(batches) for _ in range(args.accumulate)]
            begun = time.monotonic()
            torch.manual_seed(mixed_seed(args.seed, self.step, rank()))
            record_masks(self.model, self.step % between == 0)
            yield step_batches  # the script trains on them, and calls `update`

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

            # `update` has found out whether to save or to stop after this step.
            if (self.stop or self.due) and self.step < end:  # the epoch's last step is saved below
                self.save_last()
                if self.stop:
                    raise Stopped

        # The epoch is trained. The checkpoint keeps its record until `log` adds the scores.
        steps, seconds = self.step - first, time.monotonic() - started
        self.trained = dict(
            epoch=epoch,
            train_loss=self.loss_sum / (steps + done),
            train_lr=self.lr,
            seconds=seconds,
            images_per_s=steps * args.global_batch / seconds,
            data_wait=mean_over_ranks(self.device, waited)[0] / seconds,  # share of time, waiting for images
            step_seconds=statistics.median(durations),  # of one step, without that wait
            **({"mask_curve": self.curve} if self.curve["step"] else {}),
            step=self.step,
            n_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
        )
        self.loss_sum, self.curve = 0.0, {"step": []}
        if dist.is_initialized():
            for buffer in self.ema.module.buffers():  # BatchNorm statistics differ: take rank 0's
                dist.broadcast(buffer, 0)
        self.save_last()
        if any(mean_over_ranks(self.device, self.signalled)):
            raise Stopped
        set_threshold(self.ema.module, self.progress)

    def update(self, loss: Tensor, lr: float) -> None:
        """Change the weights and their average. Gradients longer than --clip-grad are cut to it.

        Raises: RunError, in the same step on every rank, before the weights change.
        """
        # Agree between ranks on three things: the mean loss, whether to save, whether to stop.
        due = rank() == 0 and 0 < 60 * self.args.save_minutes < time.monotonic() - self.saved
        self.loss, self.due, self.stop = mean_over_ranks(self.device, loss, due, self.signalled)
        self.lr = lr
        if not math.isfinite(self.loss):
            raise self.not_finite(f"loss is {self.loss}")
        # 2^-24 is float16's smallest number. All ranks have the same gradients, and so one scale.
        if self.scaler.get_scale() < 2**-24:
            raise self.not_finite("gradients overflow at every loss scale of float16")
        # Change the weights.
        if self.args.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.model)

    def evaluation_due(self) -> bool:
        """Whether to evaluate the epoch that was trained last. Says so, as it may take minutes."""
        due = (self.trained["epoch"] + 1) % self.args.eval_every == 0 or self.step == self.total_steps
        if due:
            self.bar.say(f"epoch {self.trained['epoch']}: evaluating")
        return due

    def log(self, metrics: dict) -> None:
        """End an epoch: write its record to the log, and best.pt if its score is the best so far.

        metrics: as of `evaluate_castling`, or {} if the epoch was not evaluated.
        Raises: RunError; Stopped if a signal came during the evaluation.
        """
        record, scores = self.trained | metrics, ""
        if metrics:
            if not math.isfinite(record.get("test_loss", 0.0)):
                raise self.not_finite(f"validation loss is {record['test_loss']}", kept="previous.pt")
            key = next(iter(self.metrics))
            score = record.get(f"test_{key}_castled", record[f"test_{key}"])  # of what is deployed
            improved, self.best = score > self.best, max(self.best, score)
            if improved and rank() == 0:
                save(self.folder / "best.pt", self.weights_and_settings())
            scores = " ".join(f"{title} {record[f'test_{key}']:.2f}" for key, title in self.metrics.items())
            scores = f"{scores}{f' (castled: {score:.2f})' if 'castling_gap' in record else ''}, "
        self.records.append(record)
        self.trained = None
        self.write_log()
        self.bar.say(
            f"epoch {record['epoch']}: train_loss {record['train_loss']:.4f}, lr {record['train_lr']:.3g}, {scores}"
            f"{record['images_per_s']:.0f} images/s, {100 * record['data_wait']:.0f}% waiting for data"
        )
        if any(mean_over_ranks(self.device, self.signalled)):
            raise Stopped

    def report(self) -> None:
        """Print and log the castling report of the averaged weights, and write castled.pt."""
        self.bar.close()
        if rank() == 0:
            report = castling_report(self.args, self.ema.module, self.records[-1], self.device)
            save(self.folder / "castled.pt", castle(copy.deepcopy(self.ema.module)).state_dict())
            print_report(self.args, report, self.metrics)
            say(f"written               {self.folder / 'castled.pt'}")
            picture = self.example() if self.args.data == "shapes" else "PHOTO"
            best = shlex.join(["--checkpoint", str(self.folder / "best.pt"), "--image", str(picture)])
            say(f"look at a picture     python {self.args.script} {best}")
            if self.args.script == "train.py" and self.args.attention == "castling":
                first = next(iter(cores(self.model)))  # the layer with most tokens: late masks may hold none
                say(f"look at its attention python figures.py attention {best} --progress 0 --layer {first}")
            self.write_log({"castling_report": report, "step": self.step})
        barrier()

    def example(self) -> Path:
        """Save a validation image of the built-in shapes as example.png, and say what it shows."""
        a = self.args
        shapes = (Scenes if a.script == "detect.py" else Shapes)("val", 1, a.image_size, a.seed)
        scene, path = shapes.scene(0), self.folder / "example.png"
        write_image(Image.fromarray(scene.image), path)
        say(f"written               {path}, which shows: "
            + (", ".join(shapes.classes[label] for label in scene.labels) or "nothing"))
        return path

    # ---- its files

    def write_log(self, *more: dict) -> None:
        """Rank 0 writes all of log.jsonl: a JSON object for each record, one a line."""
        if rank() == 0:
            lines = [json.dumps(record) + "\n" for record in (*self.records, *more)]
            rewrite(self.folder / "log.jsonl", "".join(lines))

    def not_finite(self, what: str, kept: str = "last.pt") -> RunError:
        """The error to raise. It names the checkpoint `kept` if that exists."""
        path = self.folder / kept
        left = f"the last checkpoint before it is {path}" if path.exists() else "there is no checkpoint before it"
        return RunError(f"{what} at step {self.step}, learning rate {self.lr:.3g}; {left}")

    def weights_and_settings(self) -> dict:
        """The content of best.pt: all that an evaluation needs."""
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
        """Rank 0 writes a checkpoint. Raises: RunError, also if a weight is not finite."""
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
        """Continue the run in --output. Start a new one if there is none, or with --overwrite.

        A folder that exists is locked before anything in it is read. A new folder is made only when
        all checks have passed.
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
            # The log is empty until the first epoch ends. Then nothing is lost by a new start.
            kept = [path.name for path in parts if path.exists() and path.stat().st_size]
            if kept:
                raise ValueError(f"--output {self.folder} holds parts of a run ({', '.join(kept)}) but no checkpoint "
                                 "to continue from: choose another folder, or --overwrite to delete them")  # fmt: skip
        mean = mean_over_ranks(self.device, self.step)[0]
        if any(mean_over_ranks(self.device, abs(self.step - mean))):  # then every rank knows that one differs
            raise ValueError("processes would continue from different steps: they need one --output on a disk that "
                             f"all of them share, got {self.folder}")  # fmt: skip

        # All checks have passed: write.
        if rank() == 0 and path is None:
            self.lock = hold(self.folder)
            config = vars(args) | dict(classes=self.classes, total_steps=self.total_steps)
            config["environment"] = environment(self.device)
            for name in (*CHECKPOINTS, "best.pt", "castled.pt", "example.png"):
                (self.folder / name).unlink(missing_ok=True)
            rewrite(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        self.write_log()
        barrier()
        if path is not None:
            say(f"resumed from {path} at step {self.step} of {self.total_steps}")

    def continue_from(self, path: Path) -> None:
        """Take the state of this run from a checkpoint.

        Raises: ValueError if it is another run's, or not one that can be continued.
        """
        args, state = self.args, read_checkpoint(path)
        if "records" not in state:
            raise ValueError(f"{path} cannot be continued, only evaluated: it is a best.pt, or an older version wrote "
                             "it; --overwrite starts a new run")  # fmt: skip

        # Is it this run? All flags but FREE ones, the classes and the number of images must agree.
        then, now = state["args"], vars(args)
        identity = [key for key in now if key not in FREE and now[key] != then.get(key)]
        short = lambda value: f"{value:.6g}" if isinstance(value, float) else repr(value)  # noqa: E731
        named = {"global_batch": "images of one step"}
        differing = [f"{named.get(key, key)} {short(then.get(key))} -> {short(now[key])}" for key in identity]
        if state["classes"] != self.classes:
            differing.append("the classes")
        if state["images"] != self.images:
            differing.append(f"training images {state['images']} -> {self.images}")
        if differing:
            raise ValueError(f"--output {self.folder} holds another run (its value -> yours): {', '.join(differing)}. "
                             "Give its flags to continue it, or another --output, or --overwrite to delete it"
                             )  # fmt: skip
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

        # The result stays the same bit for bit unless one of these changed.
        then, now = then | {"processes": state["processes"]}, now | {"processes": world_size()}
        inexact = [key for key in ("processes", *INEXACT) if now.get(key) != then.get(key)]
        changed = [f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in inexact]
        if changed:
            say(f"from here on the run is not bit for bit what it would have been ({', '.join(changed)}): BatchNorm, "
                "mixing and dropout depend on the processes and their batches, and rounding changes")  # fmt: skip
        key = "teacher_checkpoint"  # the file may have moved
        if now.get(key) != then.get(key):
            say(f"the teacher is now in {now.get(key)}, and was in {then.get(key)}: another one changes the result")


def span(shares: list[float]) -> str:
    """The range of some shares, in percent."""
    ends = dict.fromkeys(f"{100 * end:.3g}" for end in (min(shares), max(shares)))  # one if equal
    return f"{' to '.join(ends)}%"


def first_masks(model: nn.Module, masks: dict[str, tuple[float, float, float]]) -> str:
    """What the masks keep in the first step of a run, as text. masks: of `mask_statistics`."""
    kinds = {}  # {number of tokens and threshold: densities of its layers}
    for name, (density, _, tokens) in masks.items():
        core = cores(model)[name]
        threshold = float(mask_threshold(0.0, round(tokens), core.epsilon, core.schedule))
        kinds.setdefault(f"{tokens:.0f} tokens, threshold {threshold:.3g}", []).append(density)
    holding = sum(density > 0 for density, *_ in masks.values())
    text = [f"branch: {holding} of {len(masks)} masks hold entries in the first step"]
    for kind, kept in kinds.items():
        layers = f"{len(kept)} layer{'s' if len(kept) > 1 else ''}"
        text.append(f"  {layers} of {kind}: {span(kept)} of entries kept")
    return "\n".join(text)


# ---- evaluation and castling report --------------------------------------------------------------


@torch.no_grad()
def evaluate_castling(evaluate: Callable[[nn.Module], dict], model: nn.Module, key: str) -> dict:
    """Scores of the model as trained and of its castled copy, and what the masks still hold.

    Args:
        evaluate: takes a model, and returns {key: score} over the whole validation set, the same on
            every rank.
        key: that of the score that decides.
    Returns: {"test_KEY": score}. A model with an auxiliary branch adds "test_KEY_castled";
        "castling_gap", what castling loses in the score `key`; and "mask_density" and "mask_mass", each
        {layer: share}, as in `mask_statistics`.
    """
    record_masks(model, True)
    scores = evaluate(model)
    record = {f"test_{name}": value for name, value in scores.items()}
    if masks := mask_statistics(model):
        castled = evaluate(castle(copy.deepcopy(model)))
        record |= {f"test_{name}_castled": value for name, value in castled.items()}
        record["castling_gap"] = scores[key] - castled[key]
        record["mask_density"] = {layer: density for layer, (density, *_) in masks.items()}
        record["mask_mass"] = {layer: mass for layer, (_, mass, _) in masks.items()}
    return record


def count_macs(model: nn.Module, images: Tensor) -> int:
    """MACs of one batch: those of convolutions, linear layers and attention products.

    A MAC is one multiplication and one addition, so 2 FLOPs. flops.py also counts deformable
    sampling, which is 0.2% of segment.py's `msdeform`. It is left out here.
    """
    model = copy.deepcopy(model).to("meta")  # nothing is computed, and no mask is found to be empty
    # The counter sees the matrix products of the MATH kernel. Fused attention counts as 0 on some
    # devices.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images.to("meta"))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def images_per_second(models: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Median number of images per second of each model, on the same batch."""
    # The models take turns, so that other work on the machine slows all of them alike.
    times = {name: [] for name in models}
    for turn in range(8):
        for name, model in models.items():
            started = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - started)
    return {name: len(images) / statistics.median(spent) for name, spent in times.items()}


def castling_report(args: argparse.Namespace, model: nn.Module, record: dict, device: torch.device) -> dict:
    """Scores, MACs and speed, with the branch and castled.

    A model without a branch has them once, as deployed.
    record: holds what `evaluate_castling` returned.
    Returns: that; "macs" of one image; "inference_images_per_s".
    """
    wanted = ("test_", "castling_", "mask_density", "mask_mass")
    report = {key: value for key, value in record.items() if key.startswith(wanted)}
    models = {"as deployed": castle(copy.deepcopy(model)).eval()}
    if "castling_gap" in report:
        branched = copy.deepcopy(model).eval()
        set_threshold(branched, 0.0)  # at the end of a ramp the branch would be skipped
        record_masks(branched, False)
        models = {"with branch": branched, "castled": models["as deployed"]}
    batch = torch.randn(min(32, args.batch_size), 3, args.image_size, args.image_size, device=device)
    with autocast(args, device):
        speed = images_per_second(models, batch)
    macs = {name: count_macs(m, batch[:1]) for name, m in models.items()}
    return report | dict(macs=macs, inference_images_per_s=speed)


def print_report(args: argparse.Namespace, report: dict, titles: dict[str, str]) -> None:
    """Print a castling report: one column of numbers, or two if there was a branch to castle."""
    say(f"\ncastling report: {args.model}, {args.attention}, {args.data} at {args.image_size} px")
    branch = "castling_gap" in report
    rows = {"": ["with branch", "castled"] if branch else ["as deployed"]}
    for key, title in titles.items():
        scores = [report[name] for name in (f"test_{key}", f"test_{key}_castled") if name in report]
        rows[title] = [f"{score:.2f}" for score in scores]
    if "macs" in report:
        rows["MACs per image, M"] = [f"{macs / 1e6:.1f}" for macs in report["macs"].values()]
        speeds = report["inference_images_per_s"].values()
        rows[f"images/s, batch {min(32, args.batch_size)}"] = [f"{speed:.0f}" for speed in speeds]
    for name, values in rows.items():
        say(f"{name:22}" + "".join(f"{value:>14}" for value in values))
    if branch:
        say(f"castling gap          {report['castling_gap']:.2f} points of {next(iter(titles.values()))}")
        held = [density for density in report["mask_density"].values() if density > 0]
        kept = f"{span(held)} of entries kept in {len(held)} of {len(report['mask_density'])} layers" if held else None
        say(f"mask density          {kept or '0 in every layer: the masks are empty'}")


# ---- command line --------------------------------------------------------------------------------


def at_least(minimum: float, kind: type = int, most: float = 10**9) -> Callable[[str], float]:
    """argparse type: a number of type `kind` from `minimum` to `most`."""

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


HINTS = {  # for flags that other projects have
    "--resume": "the same command again continues a run",
    "--gpus": "torchrun --nproc-per-node=GPUS starts a process for each GPU",
    "--pretrained": "--checkpoint FILE loads weights",
    "--learning-rate": "--lr is the learning rate",
}


class Parser(argparse.ArgumentParser):
    """An argparse parser that refuses empty values. A mistake gets two lines, not all flags.

    The parsed flags have the script's name as `script`, which its checkpoints keep.
    """

    def __init__(self, script: str, doc: str, usage: str = "[flags]", **options):
        options |= dict(prog=script, usage=f"python {script} {usage}", description=doc)
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.set_defaults(script=script)

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        for flag, value in vars(parsed).items():
            if value == "" or isinstance(value, list) and "" in value:
                self.error(f"--{flag.replace('_', '-')} has an empty value")
        return parsed

    def error(self, message: str) -> None:
        for word in message.split():
            flag = word.partition("=")[0]
            if message.startswith("unrecognized") and flag in HINTS:
                message += f" ({HINTS[flag]})"
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.75)
            if message.startswith("unrecognized") and word.startswith("--") and near:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all flags\n")


def by_data(flag: str, defaults: dict[str, dict]) -> str:
    """The part of a flag's help that gives its default for each kind of data."""
    kinds = {}  # {default: kinds of data that have it}
    for data, row in defaults.items():
        if flag in row:
            value = {True: "on", False: "off"}[row[flag]] if isinstance(row[flag], bool) else row[flag]
            kinds.setdefault(value, []).append(data)
    given = [f"{value} for {' and '.join(data)}" for value, data in kinds.items()]
    return f"default {', '.join(given) or 'not set'}"


def shared_flags(parser: argparse.ArgumentParser, defaults: dict[str, dict]) -> argparse._ArgumentGroup:
    """Add the flags that train.py, detect.py and segment.py have in common.

    A flag that is not given and has no default here is None. `fill_in` sets it later.
    Returns: the group of flags "model and recipe", to which a script adds its own.
    """
    on_off = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--data", help="name of a built-in data set, or a folder; see the end of this text. Default shapes: simple "
        "figures, drawn while training")  # fmt: skip
    add("--image-size", type=at_least(1, most=4096),
        help=f"side of the square images, in pixels; {by_data('image_size', defaults)}")
    add("--shapes-length", type=at_least(1),
        help=f"number of training images of --data shapes; {by_data('shapes_length', defaults)}")
    recipe = parser.add_argument_group("model and recipe")
    add = recipe.add_argument
    add("--model", help="name of the network; see the end of this text")
    add("--attention", help=f"kind of attention, one of {', '.join(ATTENTIONS)}. Default castling: linear-angular "
        "attention, with a softmax branch while training")  # fmt: skip
    add("--epochs", type=at_least(1), help=f"passes over the training images; {by_data('epochs', defaults)}")
    add("--max-steps", type=at_least(1), help="end the run after at most this many optimiser steps; all "
        "schedules end there")  # fmt: skip
    add("--batch-size", type=at_least(1),
        help=f"images that one process handles at a time; {by_data('batch_size', defaults)}")
    add("--accumulate", type=at_least(1), default=1, help="batches for each optimiser step; default 1")
    add("--lr", type=at_least(0, float, most=1e30), help="largest learning rate of the run, for the recipe's "
        "number of images per step, which a run prints; it is scaled in proportion to yours. "
        f"{by_data('lr', defaults).capitalize()}")
    add("--seed", type=at_least(0, most=2**62), help="start of all random numbers: first weights, order of the images, "
        "augmentation, drawn shapes; default 0")  # fmt: skip
    add("--checkpoint", help="file of weights to start from, or to use with --eval, --image or --export: a checkpoint "
        "of a run, or any state dict")  # fmt: skip
    add = parser.add_argument_group("castling").add_argument
    add("--epsilon", type=share, help="threshold of Eq. (10), 0..1: the branch keeps the softmax entries above it; "
        "default 0.02")  # fmt: skip
    add("--mask-schedule", choices=SCHEDULES, help="the threshold while training (D4). fixed: always --epsilon. ramp: "
        "from --epsilon or higher up to 1, where the branch keeps nothing. anneal: from a low value up to 1. Default "
        "ramp")  # fmt: skip
    add("--dconv", type=at_least(0), help="odd length of the filters of the DWConv (depthwise convolution) on the "
        "values V; 0 for no such layer; default 9")  # fmt: skip
    add("--mlp-dwconv", type=at_least(0), help="odd size of the filters of the DWConv in the MLPs; 0 for no such "
        "layer; default the paper's (D7, D8), for softmax 0")  # fmt: skip
    add("--zero-dconv", action="store_true", help="start the DWConv on V from zeros, not from random numbers; for a "
        "--checkpoint without DWConv")  # fmt: skip
    group = parser.add_argument_group("run")
    add, add_task = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--output", help="folder for checkpoints and log; a run that is there is continued. Default "
        "runs/MODEL-ATTENTION-DATA. With --image: the file or folder to which detect.py and segment.py draw; default "
        "the checkpoint's folder. With --eval: the folder for detect.py's boxes; default eval-DATA-SPLIT beside the "
        "checkpoint")  # fmt: skip
    add("--overwrite", action="store_true", help="delete the run in --output and start a new one")
    add("--save-minutes", type=at_least(0, float), default=10.0, help="minutes from one checkpoint to the next; "
        "default 10. There is also one after each epoch; 0 for only these")  # fmt: skip
    add("--eval-every", type=at_least(1), help="evaluate once in this many epochs, and after the last one; default 1, "
        "10 for COCO")  # fmt: skip
    add_task("--eval", action="store_true", help="do not train: print the scores of --checkpoint")
    add("--split", choices=("val", "train"), default="val", help="the images that --eval uses, those for validation or "
        "those for training; default val")  # fmt: skip
    add_task("--image", nargs="+", metavar="FILE",
             help="do not train: print or draw what --checkpoint finds in these image files")
    add("--json", action="store_true", help="print the result of --eval or --image as JSON. detect.py and "
        "segment.py then draw only if --output is given")  # fmt: skip
    add_task("--export", help="do not train: write the castled model of --checkpoint to this .onnx "
             "or .pt2 file. It takes images that are normalised as ImageNet's")  # fmt: skip
    add = parser.add_argument_group("processes").add_argument
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    add("--workers", type=at_least(0, most=128), help="number of processes that load images; 0: the training process "
        "loads them. Default: its share of the CPU cores, at most 8")  # fmt: skip
    add("--amp", action=on_off, default=bfloat16, help="mixed precision: compute partly in --amp-dtype; default on for "
        "GPUs with bfloat16, else off")  # fmt: skip
    add("--amp-dtype", choices=("bfloat16", "float16"), help="number format of --amp; with float16 the loss is scaled. "
        "Default bfloat16, or float16 on GPUs without it",
        default="bfloat16" if bfloat16 or not torch.cuda.is_available() else "float16")
    add("--compile", action=on_off, default=False, help="train the model as torch.compile makes it; default off")
    return recipe


def take_over(args: argparse.Namespace, trained: Mapping) -> None:
    """Take flags that were not given from `trained`, a checkpoint's settings. FREE flags stay."""
    for flag, value in vars(args).items():
        if value is None and flag not in FREE:
            setattr(args, flag, trained.get(flag))


def fill_in(args: argparse.Namespace, defaults: Mapping) -> None:
    """Set flags that are still None: to `defaults`, or else to the defaults that all scripts share.

    Also set the output folder, and `global_batch`, the images of one step over all processes.
    """
    shared = dict(attention="castling", data="shapes", epsilon=0.02, mask_schedule="ramp", seed=0, eval_every=1)
    # A process may be limited to some of the machine's cores. macOS cannot say which.
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
    """The task of a script: "train", "eval", "image" or "export".

    Raises: ValueError for a task without --checkpoint, or an --export that cannot be written.
    """
    task = "eval" if args.eval else "image" if args.image else "export" if args.export else "train"
    if task != "train" and not args.checkpoint:
        raise ValueError("--eval, --image and --export need --checkpoint")
    if args.export:
        check_export(args.export)
    return task


def epoch_and_run(args: argparse.Namespace, images: int) -> tuple[int, int]:
    """Optimiser steps of an epoch, and of the run. Raises: ValueError if there is none."""
    if images < args.global_batch:
        raise ValueError(f"{args.data} has {images} training images, but one step over all processes takes "
                         f"{args.global_batch}: lower --batch-size, --accumulate or --nproc-per-node")  # fmt: skip
    steps_per_epoch = images // args.global_batch
    return steps_per_epoch, min(steps_per_epoch * args.epochs, args.max_steps or math.inf)


def same_classes(one: list, other: list, what: str) -> None:
    """Raise ValueError unless both lists of classes are the same. what: whose they are."""
    if one != other:
        own = {"the first": [c for c in one if c not in other], "the second": [c for c in other if c not in one]}
        parts = [f"only {which} has {', '.join(map(str, names[:3]))}{' ...' * (len(names) > 3)}"
                 for which, names in own.items() if names]  # fmt: skip
        raise ValueError(f"{what} have different classes, {len(one)} and {len(other)}: "
                         f"{'; '.join(parts) or 'the same in another order'}")  # fmt: skip


def describe(state: Run, recipe: str, val_set: Dataset) -> str:
    """The settings of a run in a few lines. recipe: lines of the script's own settings."""
    a, device = state.args, state.device.type
    parameters = sum(p.numel() for p in state.model.parameters())
    branch = any(core.auxiliary for core in cores(state.model).values())
    average = f"each step keeps at most {a.ema_decay:.5g} of the average" if a.ema_decay else "none"
    mask = f"masks: schedule {a.mask_schedule}, epsilon {a.epsilon}; " if branch else ""
    return f"""{a.model}, {a.attention}: {parameters / 1e6:.2f} M parameters, processes: {world_size()} ({device})
data: {a.data}, {state.images} training and {len(val_set)} validation images of {a.image_size} px, \
{len(state.classes)} classes
length: {state.total_steps} steps of {a.global_batch} images, \
{state.total_steps * a.global_batch / state.images:.2f} passes over them; in the log an epoch is \
{state.steps_per_epoch} steps
{recipe}
averaged weights: {average}
{mask}output: {a.output}"""


# ---- models from checkpoints ---------------------------------------------------------------------


def core_options(args: argparse.Namespace) -> dict:
    """The flags of attention and of the DWConv in the MLPs, as arguments of `build_model`."""
    options = dict(epsilon=args.epsilon, schedule=args.mask_schedule)
    return options | {key: getattr(args, key) for key in ("dconv", "mlp_dwconv") if getattr(args, key) is not None}


def settings_for(args: argparse.Namespace) -> dict:
    """The settings that --checkpoint was trained with, and its `classes`.

    They are read from the file, or else from the config.json beside it. {} if neither has any.
    Raises: ValueError if another script wrote them, or config.json is damaged.
    """
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
        return {}  # files of other projects may have `args` too, or a config.json beside them
    if settings.get("script", args.script) != args.script:
        raise ValueError(f"{args.checkpoint} is a checkpoint of {settings['script']}, not of {args.script}")
    return renamed(settings)


def renamed(settings: dict) -> dict:
    """Settings of any version under today's names."""
    settings = dict(settings)
    settings.pop("early_drop", None)  # whether to skip a branch that keeps nothing: today always
    if settings.pop("dwconv", None) is False:
        settings |= dict(dconv=0, mlp_dwconv=0)
    if settings.pop("v_dconv", None) is False:
        settings["dconv"] = 0
    for old in ("mlp_dw", "mlp_conv"):
        if (kernel := settings.pop(old, None)) is not None:
            settings["mlp_dwconv"] = kernel
    return settings


def count_classes(path: str, heads: Iterable[str]) -> int:
    """Rows of a checkpoint's class head, one of `heads`. Raises: ValueError if it has none."""
    weights = weights_in(read_checkpoint(path))
    for name in heads:
        if name in weights:
            return len(weights[name])
    raise ValueError(f"{path} is not a model of this script: it has no weight {' or '.join(heads)}")


def start_from(model: nn.Module, args: argparse.Namespace, load: Callable) -> None:
    """Set the first weights of a run: zeros for --zero-dconv, then those of --checkpoint.

    A run that continues takes all weights from its own checkpoint later. Raises: ValueError for
    --zero-dconv if the model has no DWConv on V, and what `load` raises.
    """
    if args.zero_dconv:
        found = [core.dconv.weight for core in cores(model).values() if core.dconv is not None]
        if not found:
            raise ValueError("--zero-dconv, but this model has no DWConv on V")
        for weight in found:
            nn.init.zeros_(weight)
    if args.checkpoint and begins_anew(args):
        say(f"{args.checkpoint}\n{load(model, args.checkpoint)}")


def load_trained(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model with the weights of --checkpoint, in eval mode.

    Its mask threshold is the one that training had reached. A plain state dict is taken as castled.
    Raises: ValueError if the file lacks a weight.
    """
    checkpoint, report = read_checkpoint(args.checkpoint), load_pretrained(model, args.checkpoint)
    if report.new or report.partly:
        raise ValueError(
            f"{args.checkpoint} does not have all weights of {args.model} with {args.attention} attention. A run can "
            f"start from it. If it is a softmax model, give --attention softmax\n{report}"
        )
    if "progress" not in checkpoint:
        castle(model)
    set_threshold(model, checkpoint.get("progress", 1.0))
    return model.eval()


def print_evaluation(args: argparse.Namespace, record: dict, titles: dict[str, str]) -> None:
    """--eval: print the scores. Raises: DataError for a loss that is nan or infinite."""
    if not math.isfinite(record.get("test_loss", 0.0)):
        raise DataError(f"{args.checkpoint}: the loss is {record['test_loss']}")
    if args.json:
        say(json.dumps(record))
    else:
        say(f"{args.checkpoint}, {args.split} images")
        print_report(args, record, titles)


def write_export(model: nn.Module, args: argparse.Namespace) -> None:
    """--export: rank 0 writes the castled model to a file, then runs both on the same images.

    Raises: DataError if their outputs differ by 1e-4 or more.
    """
    if rank() == 0:
        shapes, difference = export(model, args.export, args.image_size)
        shapes = ", ".join("x".join(map(str, shape)) for shape in shapes)
        say(f"{args.export}: run on {shapes}; largest difference {difference:.1e} from the model")
        if not difference < 1e-4:
            raise DataError(f"{args.export} is not the model that it was made from")


# ---- pictures in and out -------------------------------------------------------------------------


def check_images(paths: list[str]) -> None:
    """Raise ValueError for an image file that does not exist."""
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"no image file {path!r}")


def drawing_paths(args: argparse.Namespace, suffix: str) -> dict[Path, Path]:
    """{file of --image: file to draw it to}. It is {} with --json alone, which draws nothing.

    Without --output, image NAME is drawn to NAME_suffix.png beside the checkpoint. With it, one
    image is drawn to that file, and several to NAME.png in that folder.

    Raises: ValueError for an image that does not exist, an --output that cannot be drawn to, two
        images of the same name, or a drawing that would overwrite an image.
    """
    check_images(args.image)
    paths, output = [Path(image) for image in args.image], args.output
    if output is None and args.json:
        return {}
    if output is None:
        targets = [Path(args.checkpoint).with_name(f"{path.stem}_{suffix}.png") for path in paths]
    elif len(paths) == 1:
        targets = [Path(output)]
        written = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
        if targets[0].suffix.lower() not in written or not targets[0].parent.is_dir():
            raise ValueError(f"--output {output} is no image file in an existing folder")
    else:
        targets = [Path(output) / f"{path.stem}.png" for path in paths]
        if Path(output).exists() and not Path(output).is_dir():
            raise ValueError(f"--output {output} is a file, but several images are drawn to a folder")
    if len(set(targets)) < len(targets):
        raise ValueError("--image has two files of the same name: their drawings would be one file")
    if overwritten := {path.resolve() for path in paths} & {path.resolve() for path in targets}:
        raise ValueError(f"--output would overwrite {min(overwritten)}")
    return dict(zip(paths, targets, strict=True))


def read_each(paths: Iterable[str | Path]) -> Iterator[tuple[Path, Image.Image]]:
    """On rank 0: (file, image) of every file that can be read, turned upright.

    The others are named on standard error. Raises: DataError at the end if there were any.
    """
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
        raise DataError(f"images that could not be read: {unread}")


@contextlib.contextmanager
def json_list(args: argparse.Namespace) -> Iterator[list]:
    """A list to fill. With --json it is printed at the end, also if an error ended the work."""
    found = []
    try:
        yield found
    finally:
        if args.json:
            say(json.dumps(found, indent=1))


def magnified(image: Image.Image) -> tuple[Image.Image, int]:
    """A small image, enlarged by a whole number to a short side near 512 px; and that number.

    No side becomes longer than 2048 px by this.
    """
    factor = max(1, min(round(512 / min(image.size)), 2048 // max(image.size)))
    return ImageOps.scale(image, factor, Image.Resampling.NEAREST), factor


def write_image(image: Image.Image, target: Path) -> None:
    """Save a drawing, and make its folder. Raises: DataError, which names the file."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {target}: {error}") from None
