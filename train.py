"""Train a Castling-ViT classifier, and castle it at the end. Plain PyTorch; the same script on any number of processes.

    python train.py                                                built-in rendered shapes, one process, no download
    torchrun train.py --model levit128                             the same, under torchrun
    torchrun --nproc-per-node=8 train.py --data /data/imagenet     the paper's recipe on eight GPUs
    torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py --data /imagenet
    python train.py --eval --checkpoint runs/X/best.pt             accuracy with and without the auxiliary branch
    python train.py --image photo.jpg --checkpoint runs/X/best.pt  the five likeliest classes

Recipe: arXiv:2211.10526v4, section 4.1 (SGD), where it is stated; DeiT's augmentation (arXiv:2012.12877, Table 9) where
it is not.
This file is also the home of what every training loop here shares: process group, schedules, averaged weights,
checkpoints, log, progress, and the rendered shapes.
"""

import argparse
import copy
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from attention import SCHEDULES, castle, cores, mask_statistics, record_masks, set_threshold
from models import ATTENTIONS, MODELS, build_model, load_pretrained, read_checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0..1; used for all data

# Defaults that depend on the data. Folders: the paper's batch per GPU and epochs, DeiT's augmentation. The rendered
# shapes have a small, short recipe of their own, made for two CPU cores.
DATA_DEFAULTS = {
    "folder": dict(
        image_size=224, epochs=1000, batch_size=64, optimizer="sgd",
        randaugment=9, mixup=0.8, cutmix=1.0, erasing=0.25, smoothing=0.1,
    ),
    "cifar": dict(
        image_size=64, epochs=100, batch_size=128, optimizer="sgd",
        randaugment=9, mixup=0.8, cutmix=1.0, erasing=0.25, smoothing=0.1,
    ),
    "shapes": dict(
        image_size=64, epochs=4, batch_size=128, optimizer="sgd", schedule="cosine", lr=3.2,
        randaugment=0, mixup=0.0, cutmix=0.0, erasing=0.0, smoothing=0.0, drop_path=0.0,
    ),
}  # fmt: skip

# `lr` is the peak, reached after a linear warm-up from `lr_start`, at a global batch of `lr_batch`; all scale with it.
OPTIMIZERS = {
    # arXiv:2211.10526v4, section 4.1: momentum 0.9, 0.01 to 2.0 in 11 of 1000 epochs, then x 0.9875 per epoch
    "sgd": dict(
        lr=2.0, lr_start=0.01, lr_end=0.0, lr_batch=4096, weight_decay=2e-5, warmup_epochs=11.0, schedule="exponential"
    ),
    # LeViT's and DeiT's own recipe; weight decay is LeViT's (DeiT: 0.05)
    "adamw": dict(
        lr=5e-4, lr_start=1e-6, lr_end=1e-5, lr_batch=512, weight_decay=0.025, warmup_epochs=5.0, schedule="cosine"
    ),
}


# ---- schedules: pure functions of where training stands --------------------------------------------------------------


def exponential_lr(epoch: float, *, epochs: float, peak: float, start: float, warmup: float) -> float:
    """Learning rate at `epoch` (a real number, 0..epochs): linear warm-up from `start`, then geometric decay.

    The paper multiplies by 0.9875 per epoch for the 989 epochs after warm-up. Shorter runs keep the end point, so
    their factor is 0.9875 ** (989 / (epochs - warmup)): 0.870 for 100 epochs, 0.958 for 300.
    """
    if epoch < warmup:
        return start + (peak - start) * epoch / warmup
    return peak * 0.9875 ** (989 * (epoch - warmup) / max(epochs - warmup, 1e-12))


def cosine_lr(epoch: float, *, epochs: float, peak: float, start: float, warmup: float, end: float) -> float:
    """Learning rate at `epoch`: linear warm-up from `start`, then a half cosine to `end`."""
    if epoch < warmup:
        return start + (peak - start) * epoch / warmup
    t = min(1.0, (epoch - warmup) / max(epochs - warmup, 1e-12))
    return end + (peak - end) * (1 + math.cos(math.pi * t)) / 2


def warmup_for(epochs: float, full: float) -> float:
    """Warm-up epochs: the recipe's, but at most 11% of the run."""
    return min(full, 0.11 * epochs)


def ema_decay_for(steps: int) -> float:
    """Decay of the averaged weights: a horizon of 4% of the run, at most 0.99996.

    That is LeViT's and DeiT's 0.99996 at their 626,000 steps.
    """
    return min(0.99996, 1 - 1 / max(1.0, 0.04 * steps))


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers; near numbers give unrelated seeds."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


# ---- rendered shapes: classes, boxes and per-pixel labels without a download -----------------------------------------


def arc(start: float, stop: float, points: int = 36, radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> list:
    """Points on a circle from one angle to another, in degrees."""
    angles = np.radians(np.linspace(start, stop, points))
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


SHAPES = {  # class: outline, and a hole where there is one; points (x, y), y down, within the unit circle
    "disc": [arc(0, 360)],
    "ring": [arc(0, 360), arc(0, 360, radius=0.55)],
    "half disc": [arc(0, 180, y=-0.4)],
    "crescent": [arc(60, 300) + arc(246, 114, radius=0.95, x=0.89)],
    "triangle": [arc(-90, 150, 3)],
    "square": [arc(45, 315, 4)],
    "star": [[(math.sin(a) * r, -math.cos(a) * r) for i, r in enumerate((1, 0.42) * 5) for a in [i * math.pi / 5]]],
    "cross": [[(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
               (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)]],
    "heart": [[(0.0, 0.9), *arc(150, 330, radius=0.46, x=-0.43, y=-0.35),
               *arc(210, 390, radius=0.46, x=0.43, y=-0.35)]],
    "arrow": [[(0.0, -1.0), (0.75, -0.1), (0.28, -0.1), (0.28, 0.95), (-0.28, 0.95), (-0.28, -0.1), (-0.75, -0.1)]],
    "hourglass": [[(-0.75, -0.8), (0.75, -0.8), (0.12, 0.0), (0.75, 0.8), (-0.75, 0.8), (-0.12, 0.0)]],
    "corner": [[(-0.7, -0.9), (-0.1, -0.9), (-0.1, 0.35), (0.8, 0.35), (0.8, 0.9), (-0.7, 0.9)]],
}  # fmt: skip
SQUARE = [[(-1, -1), (1, -1), (1, 1), (-1, 1)]]


@dataclass
class Scene:
    """A rendered image with its ground truth.

    image: (H, W, 3) uint8. labels: (n,) int64 class indices. boxes: (n, 4) float32 xyxy pixels, the extent of what is
    visible of each shape. mask: (H, W) uint8, 0 for background, 1 + class on a shape.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    mask: np.ndarray


def placed(outlines: list, centre: np.ndarray, half: np.ndarray, angle: float) -> list[np.ndarray]:
    """Unit outlines scaled by `half` (x, y), turned by `angle` in radians, moved to `centre`, all in pixels."""
    cos, sin = math.cos(angle), math.sin(angle)
    return [np.asarray(points) * half @ np.array([[cos, sin], [-sin, cos]]) + centre for points in outlines]


def coverage(outlines: list[np.ndarray], size: int) -> np.ndarray:
    """(size, size) float32, 0..1: the share of each pixel inside the first outline and outside the others."""
    fine = 3
    canvas = Image.new("L", (fine * size, fine * size))
    draw = ImageDraw.Draw(canvas)
    for i, outline in enumerate(outlines):
        draw.polygon([tuple(point) for point in outline * fine], fill=0 if i else 255)
    return np.asarray(canvas.reduce(fine), np.float32) / 255


def texture(rng: np.random.Generator, size: int, colour: np.ndarray) -> np.ndarray:
    """(size, size, 3) float32 around a colour: blotches, stripes or checks of random direction, scale and contrast."""
    kind = rng.integers(3)
    if kind == 0:
        coarse = rng.integers(0, 256, (rng.integers(3, 9),) * 2, dtype=np.uint8)
        pattern = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float32)
        pattern = pattern / 127.5 - 1
    else:
        angle, waves, phase = rng.uniform(0, math.pi), rng.uniform(3, 12), rng.uniform(0, 2 * math.pi, 2)
        step = np.arange(size, dtype=np.float32) * np.float32(2 * math.pi * waves / size)
        x, y = step[None, :], step[:, None]
        pattern = np.sin(x * math.cos(angle) + y * math.sin(angle) + phase[0])
        if kind == 2:
            pattern = np.sign(pattern * np.sin(y * math.cos(angle) - x * math.sin(angle) + phase[1]))
    return colour + pattern[..., None].astype(np.float32) * rng.uniform(-25, 25, 3).astype(np.float32)


def colour_away_from(rng: np.random.Generator, other: np.ndarray, distance: float = 130.0) -> np.ndarray:
    """A random RGB colour at least `distance` (Euclidean, of 0..255) from another."""
    while True:
        colour = rng.uniform(20, 235, 3).astype(np.float32)
        if np.linalg.norm(colour - other) >= distance:
            return colour


def render_scene(rng: np.random.Generator, size: int, labels: list[int]) -> Scene:
    """Draw shapes of the given classes on a textured background with clutter; some shapes lose a part to a bar.

    Scale, rotation, aspect, position, colours, textures, clutter, occlusion and sensor noise are random, from `rng`.
    Shapes lie in the image and at most touch; one that finds no place in 20 tries, or is hidden wholly, is left out.
    """
    background = rng.uniform(20, 235, 3).astype(np.float32)
    image = texture(rng, size, background)
    owner = np.zeros((size, size), np.uint8)  # 1 + position in `drawn`, 0 for background

    def paint(outlines: list[np.ndarray], surface: np.ndarray, owned_by: int) -> None:
        alpha = coverage(outlines, size)
        image[...] += alpha[..., None] * (surface - image)
        owner[alpha > 0.5] = owned_by

    for _ in range(rng.integers(0, 3)):  # clutter
        half = size * np.array([rng.uniform(0.03, 0.3), rng.uniform(0.01, 0.03)])
        bar = placed(SQUARE, rng.uniform(0, size, 2), half, rng.uniform(0, math.pi))
        paint(bar, rng.uniform(20, 235, 3).astype(np.float32), 0)
    smallest, largest = (0.3, 0.48) if len(labels) == 1 else (0.1, 0.24)
    drawn, discs = [], []
    for label in labels:
        for _ in range(20):
            radius = size * rng.uniform(smallest, largest)
            centre = rng.uniform(radius, size - radius, 2)
            if all(np.linalg.norm(centre - other) >= radius + r for other, r in discs):
                break
        else:
            continue
        discs.append((centre, radius))
        drawn.append(label)
        half = radius * np.array([1.0, rng.uniform(0.75, 1.0)])
        outlines = placed(list(SHAPES.values())[label], centre, half, rng.uniform(0, 2 * math.pi))
        paint(outlines, texture(rng, size, colour_away_from(rng, background)), len(drawn))
        if rng.random() < 0.4:  # occlusion: a bar across the shape, off its middle
            turn = rng.uniform(0, 2 * math.pi)
            middle = centre + radius * rng.uniform(0.3, 0.9) * np.array([math.cos(turn), math.sin(turn)])
            half = radius * np.array([rng.uniform(0.06, 0.15), 1.2])
            surface = texture(rng, size, rng.uniform(20, 235, 3).astype(np.float32))
            paint(placed(SQUARE, middle, half, turn), surface, 0)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 12))
    image = (image + noise - 128) * np.float32(rng.uniform(0.7, 1.2)) + np.float32(128 + rng.uniform(-25, 25))

    labels, boxes = [], []
    for i, label in enumerate(drawn):
        rows, columns = np.flatnonzero((owner == i + 1).any(1)), np.flatnonzero((owner == i + 1).any(0))
        if len(rows):
            labels.append(label)
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return Scene(
        image=image.clip(0, 255).astype(np.uint8),
        labels=np.array(labels, np.int64),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        mask=np.array([0, *(1 + label for label in drawn)], np.uint8)[owner],
    )


class Shapes(Dataset):
    """Rendered scenes of one shape each for classification: (uint8 tensor (3, S, S), class).

    A scene is a function of (seed, split, index) alone; classes take turns. `scene` gives boxes and masks too.
    """

    classes = list(SHAPES)

    def __init__(self, split: str, length: int, size: int, seed: int = 0):
        self.split, self.length, self.size, self.seed = ("train", "val").index(split), length, size, seed

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        rng = np.random.default_rng([self.seed, self.split, index])
        return render_scene(rng, self.size, [index % len(SHAPES)])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.scene(index).image).permute(2, 0, 1), index % len(SHAPES)


# ---- data: folders, CIFAR, augmentation, order -----------------------------------------------------------------------


class DataError(RuntimeError):
    """A file of the data set cannot be used; the message names it."""


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB; DataError names the file that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {path}: {error}") from None


class Augmented(Dataset):
    """`base` with its images transformed, by randomness that is a function of (seed, epoch, index) alone.

    Items are asked for as (epoch, index), which is what `EpochSampler` yields: so no worker needs to be told the epoch,
    and their number changes nothing.
    """

    def __init__(self, base: Dataset, transform: Callable, seed: int):
        self.base, self.transform, self.seed = base, transform, seed

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.base[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, index))
            return self.transform(image), label


class EpochSampler(Sampler):
    """This rank's (epoch, index) pairs, in batches that over all ranks are those of a single process.

    Training: a permutation by (seed, epoch), cut to whole global batches. Evaluation: every index exactly once over all
    ranks, in order, nothing padded.
    """

    def __init__(self, length: int, *, rank: int = 0, world: int = 1, seed: int | None = None, multiple: int = 1):
        """`seed` None is evaluation; `multiple` is the global batch that training lengths are cut to."""
        self.length, self.rank, self.world, self.seed = length, rank, world, seed
        self.used = length if seed is None else length // multiple * multiple
        self.epoch = 0

    def __len__(self) -> int:
        return len(range(self.rank, self.used, self.world))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.length)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator)
        for index in order[self.rank : self.used : self.world].tolist():
            yield self.epoch, index


def train_transform(args: argparse.Namespace) -> Callable:
    """Image (PIL, or uint8 tensor) -> augmented uint8 tensor (3, S, S); normalising and mixing follow on the device."""
    if args.data == "shapes":
        return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomErasing(args.erasing, value=0)])
    mean = [255 * m for m in MEAN]
    bicubic = v2.InterpolationMode.BICUBIC
    steps = [v2.RandomResizedCrop(args.image_size, interpolation=bicubic), v2.RandomHorizontalFlip()]
    if args.randaugment:
        steps.append(v2.RandAugment(magnitude=args.randaugment, fill=[round(m) for m in mean]))
    return v2.Compose([*steps, v2.PILToTensor(), v2.RandomErasing(args.erasing, value=mean)])


def eval_transform(args: argparse.Namespace) -> Callable:
    """Image -> uint8 tensor (3, S, S): resize the short side to S / 0.875 and take the centre, as DeiT and LeViT do."""
    if args.data == "shapes":
        return nn.Identity()
    resize = v2.Resize(round(args.image_size / 0.875), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(args.image_size), v2.PILToTensor()])


def open_folder(root: Path) -> tuple[Dataset, Dataset]:
    """ImageNet-style folders train/<class>/ and val/<class>/ (or test/<class>/)."""
    splits = [root / "train", root / "val" if (root / "val").is_dir() else root / "test"]
    sets = []
    for split in splits:
        if not split.is_dir():
            raise ValueError(f"no folder {split}: expected {root}/train/<class>/ and {root}/val/<class>/ (or test/)")
        try:
            sets.append(torchvision.datasets.ImageFolder(str(split), loader=read_image))
        except FileNotFoundError as error:
            raise ValueError(f"no images in {split}: {error}") from None
    if sets[0].classes != sets[1].classes:
        differing = sorted(set(sets[0].classes) ^ set(sets[1].classes))
        raise ValueError(f"{splits[0]} and {splits[1]} have different classes: {', '.join(differing[:5])}")
    return sets[0], sets[1]


def open_data(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Training and validation set of `args.data`, each with `.classes`, neither augmented."""
    if args.data == "shapes":
        train = Shapes("train", args.shapes_length, args.image_size, args.seed)
        return train, Shapes("val", max(1, args.shapes_length // 10), args.image_size, args.seed)
    if args.data in ("cifar10", "cifar100"):
        cifar = getattr(torchvision.datasets, args.data.upper())
        try:
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                cifar("data", download=True)
            barrier()
            return cifar("data", train=True), cifar("data", train=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {args.data} to ./data: {error}") from None
    if not Path(args.data).is_dir():
        raise ValueError(f"unknown data {args.data!r}: shapes, cifar10, cifar100 or an existing folder")
    return open_folder(Path(args.data))


def make_loader(dataset: Dataset, sampler: Sampler, batch_size: int, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # keeps the loader's hands off the global one
    )


def to_model_input(images: Tensor, device: torch.device, channels_last: bool = False) -> Tensor:
    """uint8 (B, 3, H, W) -> normalised float32 on the device."""
    images = images.to(device, non_blocking=True).float().div_(255)
    images = v2.functional.normalize(images, MEAN, STD, inplace=True)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


# ---- processes, log, progress, checkpoints ---------------------------------------------------------------------------


def start_processes() -> torch.device:
    """Join the process group if torchrun started several processes (nccl on GPUs, gloo on CPUs); this one's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_sum(values: Tensor) -> list[float]:
    """Element-wise sum over ranks, as numbers."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def synchronise_buffers(model: nn.Module) -> None:
    """Rank 0's BatchNorm statistics on every rank: each rank has gathered its own since DDP last made them equal."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def save(path: Path, state: dict) -> None:
    """Atomic: written beside `path`, flushed to disk, then renamed, so a run killed mid-save keeps its last checkpoint.

    Tensors and plain data only: torch.load's default (weights_only=True) refuses anything else.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Progress:
    """Where a long loop stands: a tqdm bar on a terminal, a plain line every `seconds` elsewhere; rank 0 only."""

    def __init__(self, total: int, done: int = 0, seconds: float = 20.0):
        self.total, self.done, self.seconds, self.bar = total, done, seconds, None
        self.first, self.images, self.started, self.shown = done, 0, time.monotonic(), time.monotonic()
        if rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def step(self, images: int, **values: float) -> None:
        """One step over `images` images (of all ranks) is done; `values` are shown."""
        self.done, self.images = self.done + 1, self.images + images
        now = time.monotonic()
        spent = max(now - self.started, 1e-9)
        shown = {key: f"{value:.4g}" for key, value in values.items()} | {"images/s": f"{self.images / spent:.0f}"}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        elif now - self.shown >= self.seconds:
            self.shown = now
            left = spent / (self.done - self.first) * (self.total - self.done)
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            self.say(f"  step {self.done}/{self.total}  {text}  ETA {time.strftime('%H:%M:%S', time.gmtime(left))}")

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        elif rank() == 0:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def append_log(folder: Path, record: dict) -> None:
    """One JSON object as a line of log.jsonl, rank 0 only."""
    if rank() == 0:
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and buffers; the decay grows as (1 + n) / (10 + n) until it is `decay`."""

    def average(ema: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(ema, current, updates)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices and filters; none for biases, norms and what the model exempts by name."""
    exempt = model.no_weight_decay()
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]


# ---- loss ------------------------------------------------------------------------------------------------------------


class NonFiniteLoss(RuntimeError):
    """The loss became nan or infinite; the message says where and what is left."""


def classification_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    targets: Tensor,
    *,
    smoothing: float = 0.0,
    teacher: Tensor | None = None,
    distillation: str = "none",
    alpha: float = 0.5,
    tau: float = 1.0,
) -> Tensor:
    """(1 - alpha) cross entropy + alpha distillation.  DeiT, arXiv:2012.12877, Eq. (2) and (3)

    Args:
        outputs: logits (B, classes), or the pair (class head, distillation head). Without a teacher both heads learn
            the targets; with one, the second learns the teacher.
        targets: (B,) classes or (B, classes) probabilities.
        teacher: its logits. "hard": cross entropy to its decision; "soft": tau^2 KL to its probabilities at
            temperature tau, averaged over images.
    """
    label_head, teacher_head = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    loss = F.cross_entropy(label_head, targets, label_smoothing=smoothing)
    if distillation == "none":
        if teacher_head is label_head:
            return loss
        return (loss + F.cross_entropy(teacher_head, targets, label_smoothing=smoothing)) / 2
    if distillation == "hard":
        learned = F.cross_entropy(teacher_head, teacher.argmax(dim=1))
    else:
        student_log, teacher_log = (F.log_softmax(logits / tau, dim=1) for logits in (teacher_head, teacher))
        learned = tau**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
    return (1 - alpha) * loss + alpha * learned


def build_teacher(name: str, path: str, num_classes: int, image_size: int) -> nn.Module:
    """A frozen model of this project or of torchvision in eval mode, with weights from a local checkpoint."""
    if name in MODELS:
        trained = settings_of(path, read_checkpoint(path))
        teacher = build_model(name, trained.get("attention", "softmax"), num_classes, image_size)
    elif name in torchvision.models.list_models(torchvision.models):
        teacher = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    else:
        raise ValueError(f"unknown teacher {name!r}: a model of this project or of torchvision.models")
    load_pretrained(teacher, path)
    return teacher.eval().requires_grad_(False)


# ---- training and evaluation -----------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a training loop works on. `net` is `model` as the loop calls it: in DDP, compiled."""

    args: argparse.Namespace
    device: torch.device
    classes: list[str]
    model: nn.Module
    net: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    teacher: nn.Module | None
    train_loader: DataLoader
    val_loader: DataLoader
    steps_per_epoch: int
    total_steps: int
    step: int = 0
    best: float = -math.inf

    @property
    def folder(self) -> Path:
        return Path(self.args.output)


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based), scaled from the recipe's batch to args.global_batch."""
    recipe = OPTIMIZERS[args.optimizer]
    scale = args.global_batch / recipe["lr_batch"]
    epochs = total_steps / steps_per_epoch
    warmup = warmup_for(epochs, args.warmup_epochs)
    shape = dict(epochs=epochs, peak=args.lr * scale, start=recipe["lr_start"] * scale, warmup=warmup)
    if args.schedule == "exponential":
        return exponential_lr(step / steps_per_epoch, **shape)
    return cosine_lr(step / steps_per_epoch, **shape, end=recipe["lr_end"] * scale)


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp)


def train_one_epoch(run: Run, epoch: int, progress: Progress) -> dict:
    """Optimiser steps to the end of `epoch` or of the run; all randomness of a step follows from (seed, step, rank)."""
    args, device, started, waited, losses = run.args, run.device, time.monotonic(), 0.0, 0.0
    mixes = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    mixes = [mix(alpha=alpha, num_classes=len(run.classes)) for mix, alpha in mixes if alpha > 0]
    mixing = v2.RandomChoice(mixes) if mixes else None
    run.train_loader.sampler.epoch = epoch
    batches, first = iter(run.train_loader), run.step
    run.net.train()
    record_masks(run.model, False)
    for _ in range(min(run.steps_per_epoch * (epoch + 1), run.total_steps) - run.step):
        torch.manual_seed(mixed_seed(args.seed, run.step, rank()))
        set_threshold(run.model, run.step / run.total_steps)
        lr = learning_rate(args, run.step, run.steps_per_epoch, run.total_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        step_loss = 0.0
        for part in range(args.accumulate):
            asked = time.monotonic()
            images, targets = next(batches)
            waited += time.monotonic() - asked
            images, targets = to_model_input(images, device, args.channels_last), targets.to(device)
            if mixing is not None:
                images, targets = mixing(images, targets)
            last = part == args.accumulate - 1
            if isinstance(run.net, DistributedDataParallel):
                run.net.require_backward_grad_sync = last  # what DDP.no_sync() sets
            with autocast(args, device):
                outputs = run.net(images)
                with torch.no_grad():
                    teacher = None if run.teacher is None else run.teacher(images)
                loss = classification_loss(
                    outputs, targets, smoothing=args.smoothing, teacher=teacher,
                    distillation=args.distillation, alpha=args.alpha, tau=args.tau,
                )  # fmt: skip
            step_loss += loss.item() / args.accumulate
            if not math.isfinite(step_loss):
                kept = run.folder / "last.pt"
                kept = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
                raise NonFiniteLoss(f"loss is {step_loss} at step {run.step}, learning rate {lr:.3g}; {kept}")
            (loss / args.accumulate).backward()
        if args.clip_grad > 0:
            nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.ema.update_parameters(run.model)
        run.step += 1
        losses += step_loss
        progress.step(args.global_batch, epoch=epoch, loss=step_loss, lr=lr)
    steps, seconds = run.step - first, time.monotonic() - started
    loss_sum, waited = all_sum(torch.tensor([losses, waited], dtype=torch.float64, device=device))
    return dict(
        train_loss=loss_sum / (steps * world_size()),
        train_lr=lr,
        seconds=seconds,
        images_per_s=steps * args.global_batch / seconds,
        data_wait=waited / seconds / world_size(),  # share of the time that training waited for images
    )


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, args: argparse.Namespace, device: torch.device) -> dict:
    """Top-1 and top-5 in percent and mean cross entropy over the whole set, each image counted once over all ranks."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, loss, top-1, top-5
    for images, labels in loader:
        labels = labels.to(device)
        with autocast(args, device):
            logits = model(to_model_input(images, device, args.channels_last)).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        sums[0] += len(labels)
        sums[1] += F.cross_entropy(logits, labels, reduction="sum")
        sums[2] += ranked[:, 0].sum()
        sums[3] += ranked.sum()
    images, loss, top1, top5 = all_sum(sums)
    return dict(loss=loss / images, acc1=100 * top1 / images, acc5=100 * top5 / images)


def evaluate_castling(model: nn.Module, loader: DataLoader, args: argparse.Namespace, device: torch.device) -> dict:
    """Metrics of the model as trained and of its castled copy, their gap, and what the masks still hold.

    `test_*_castled`, `castling_gap` (points of top-1 lost by castling) and the masks are there for models with an
    auxiliary branch only.
    """
    record_masks(model, True)
    record = {f"test_{key}": value for key, value in evaluate(model, loader, args, device).items()}
    if any(core.auxiliary for core in cores(model).values()):
        masks = mask_statistics(model)
        castled = evaluate(castle(copy.deepcopy(model)), loader, args, device)
        record |= {f"test_{key}_castled": value for key, value in castled.items()}
        record["castling_gap"] = record["test_acc1"] - castled["acc1"]
        record["mask_density"] = {layer: density for layer, (density, _) in masks.items()}
        record["mask_mass"] = {layer: mass for layer, (_, mass) in masks.items()}
    return record


def deployed_acc1(record: dict) -> float:
    """Top-1 of what would be shipped: the castled model where there is one."""
    return record.get("test_acc1_castled", record["test_acc1"])


# ---- castling report -------------------------------------------------------------------------------------------------


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of convolutions, linear layers and attention products (1 MAC = 2 FLOPs) for one batch."""
    # The MATH kernel is matrix products, which the counter sees; it counts the CPU's fused attention as 0.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2


@torch.inference_mode()
def images_per_second(models: dict[str, nn.Module], images: Tensor, rounds: int = 7) -> dict[str, float]:
    """Median throughput of each model on the same batch, measured in turns so that a noisy machine hits all alike."""
    times = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first is warm-up
                times[name].append(time.perf_counter() - started)
    return {name: len(images) / sorted(spent)[rounds // 2] for name, spent in times.items()}


def castling_report(run: Run) -> dict:
    """What castling costs and saves, for the averaged weights; rank 0 prints it and writes castled.pt."""
    args, model = run.args, run.ema.module
    set_threshold(model, run.step / run.total_steps)
    metric = evaluate_castling(model, run.val_loader, args, run.device)
    castled = castle(copy.deepcopy(model))
    if rank() == 0:
        models = {"as deployed": castled.eval()}
        if "castling_gap" in metric:
            branched = copy.deepcopy(model)
            set_threshold(branched, 0.0)  # the branch as computed in training; at the end of the ramp it is skipped
            record_masks(branched, False)
            models = {"with branch": branched.eval(), "castled": castled.eval()}
        batch = torch.randn(min(32, args.batch_size), 3, args.image_size, args.image_size, device=run.device)
        with autocast(args, run.device):
            speed = images_per_second(models, batch)
        metric["macs"] = {name: count_macs(m, batch[:1]) for name, m in models.items()}
        metric["inference_images_per_s"] = speed
        save(run.folder / "castled.pt", castled.state_dict())
        print_report(run, metric)
    barrier()
    return metric


def print_report(run: Run, metric: dict) -> None:
    args, columns, batch = run.args, list(metric["macs"]), min(32, run.args.batch_size)
    rows = [
        ("top-1, %", "{:.2f}", [metric["test_acc1"], metric.get("test_acc1_castled")]),
        ("top-5, %", "{:.2f}", [metric["test_acc5"], metric.get("test_acc5_castled")]),
        ("MACs per image, M", "{:.1f}", [metric["macs"][column] / 1e6 for column in columns]),
        (f"images/s, batch {batch}", "{:.0f}", [metric["inference_images_per_s"][column] for column in columns]),
    ]
    print(f"\ncastling report: {args.model}, {args.attention}, {args.data} at {args.image_size} px")
    print(" " * 22 + "".join(f"{column:>14}" for column in columns))
    for name, form, values in rows:
        print(f"{name:22}" + "".join(f"{form.format(value):>14}" for value in values[: len(columns)]))
    if "castling_gap" in metric:
        print(f"castling gap          {metric['castling_gap']:.2f} points of top-1")
        held = [f"{layer} {density:.4f}" for layer, density in metric["mask_density"].items() if density > 0]
        print(f"mask density          {', '.join(held) or '0 in every layer: the masks are empty'}")
    print(f"written               {run.folder / 'castled.pt'}", flush=True)


# ---- command line ----------------------------------------------------------------------------------------------------


def at_least(minimum: float, kind: type = int) -> Callable[[str], float]:
    """argparse type: a number of that kind, not below `minimum`."""

    def convert(text: str):
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def share(text: str) -> float:
    """argparse type: a number in 0..1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0..1, got {text}")
    return value


def shared_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that train.py, detect.py and segment.py have in common."""
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", help="backbone or task model by name")
    add("--attention", help=f"{', '.join(ATTENTIONS)}; castling unless a checkpoint says otherwise")
    add("--data", help="shapes (rendered on the fly), a data set by name, or a folder; default shapes")
    add("--image-size", type=at_least(1), help="pixels per side; default by data")
    add("--epochs", type=at_least(1), help="default by data")
    add("--max-steps", type=at_least(1), help="stop after this many optimiser steps; schedules are fitted to it")
    add("--batch-size", type=at_least(1), help="images per process and step; default by data")
    add("--lr", type=at_least(0, float), help="peak learning rate at the recipe's own batch, scaled linearly to yours")
    add("--workers", type=at_least(0), help="loader processes; default: cores over processes, at most 8")
    add("--seed", type=at_least(0), help="of first weights, data order, augmentation and rendered shapes; default 0")
    add("--output", help="folder for checkpoints and logs; default runs/MODEL-ATTENTION-DATA")
    add("--resume", default="auto", help="auto (continue the run in --output if there is one), never, or a last.pt")
    add("--checkpoint", help="weights to start from, or to evaluate")
    add("--eval", action="store_true", help="evaluate --checkpoint and stop")
    add("--image", help="an image or a folder of images to predict with --checkpoint")
    add("--amp", action=on_off, default=torch.cuda.is_available(), help="bfloat16 autocast; default on CUDA only")
    add("--compile", action=on_off, default=False, help="torch.compile the training step's model")
    add("--accumulate", type=at_least(1), default=1, help="batches per optimiser step")
    add("--epsilon", type=share, help="mask threshold of Eq. (10); default 0.02")
    add("--mask-schedule", choices=SCHEDULES, help="how the threshold moves in training (D4); default ramp")


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=formatter)
    shared_flags(p)
    add, on_off = p.add_argument, argparse.BooleanOptionalAction
    add("--optimizer", choices=list(OPTIMIZERS), help="sgd: the paper's; adamw: LeViT's and DeiT's; default by data")
    add("--schedule", choices=("exponential", "cosine"), help="of the learning rate; default by data and optimizer")
    add("--weight-decay", type=at_least(0, float), help="default 2e-5 for sgd, 0.025 for adamw")
    add("--warmup-epochs", type=at_least(0, float), help="default 11 for sgd, 5 for adamw; at most 11%% of the run")
    add("--clip-grad", type=at_least(0, float), default=0.0, help="largest gradient norm, 0 for no limit")
    add("--smoothing", type=share, help="label smoothing; default by data")
    add("--mixup", type=at_least(0, float), help="MixUp's alpha, 0 for none; default by data")
    add("--cutmix", type=at_least(0, float), help="CutMix's alpha, 0 for none; default by data")
    add("--randaugment", type=at_least(0), help="RandAugment's magnitude of 30, 0 for none; default by data")
    add("--erasing", type=share, help="probability of random erasing; default by data")
    add("--drop-path", type=share, help="stochastic depth; default 0 for shapes, else the model's")
    add("--ema-decay", type=share, help="of the averaged weights; default: a horizon of 4%% of the run")
    add("--channels-last", action=on_off, default=False, help="memory format of images and convolutions")
    add("--castle-downsample", action=on_off, help="castle down-sampling blocks too (D5); default on")
    add("--distilled", action=on_off, help="a second, distillation head; default as the model was published")
    add("--distillation", default="none", choices=("none", "hard", "soft"))
    add("--teacher", help="model to distil from: one of this project (softmax) or of torchvision.models")
    add("--teacher-checkpoint", help="the teacher's weights, a local file")
    add("--alpha", type=share, default=0.5, help="weight of distillation in the loss")
    add("--tau", type=at_least(1e-6, float), default=1.0, help="temperature of soft distillation")
    add("--shapes-length", type=at_least(1), help="training images of the rendered shapes, default 30000; a tenth validate")
    return p


# Flags that may differ between a run and its continuation.
FREE_ON_RESUME = {"output", "resume", "workers", "eval", "image", "amp", "compile", "channels_last", "checkpoint",
                  "batch_size", "accumulate", "teacher_checkpoint"}  # fmt: skip
# Flags that a checkpoint answers for when they are not given.
TRAINED_FLAGS = ("model", "attention", "image_size", "castle_downsample", "distilled", "epsilon", "mask_schedule",
                 "data", "shapes_length", "seed")  # fmt: skip


def settings_of(path: str, checkpoint: dict) -> dict:
    """The settings a checkpoint was trained with: its own, or those in the config.json beside it."""
    if "args" in checkpoint:
        return checkpoint["args"] | {"classes": checkpoint.get("classes")}
    config = Path(path).with_name("config.json")
    return json.loads(config.read_text()) if config.is_file() else {}


def resolve(args: argparse.Namespace, trained: dict | None = None) -> None:
    """Fill in every flag that was not given: from `trained`, a checkpoint's settings, else from the recipe tables."""
    trained = trained or {}
    for flag in TRAINED_FLAGS:
        if getattr(args, flag) is None:
            setattr(args, flag, trained.get(flag))
    fallback = dict(
        model="levit128", attention="castling", data="shapes", castle_downsample=True,
        epsilon=0.02, mask_schedule="ramp", shapes_length=30000, seed=0,
    )  # fmt: skip
    kinds = {None: "shapes", "shapes": "shapes", "cifar10": "cifar", "cifar100": "cifar"}
    fallback |= DATA_DEFAULTS[kinds.get(args.data, "folder")]
    for flag, value in fallback.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    for flag, value in OPTIMIZERS[args.optimizer].items():
        if getattr(args, flag, 0) is None:
            setattr(args, flag, value)
    if args.workers is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        args.workers = max(1, min(8, (os.cpu_count() or 1) // local))
    if args.output is None:
        short = f"-{args.max_steps}steps" if args.max_steps else ""
        args.output = f"runs/{args.model}-{args.attention}-{Path(args.data).name}{short}"
    args.global_batch = args.batch_size * args.accumulate * world_size()
    if (args.distillation != "none") != (args.teacher is not None and args.teacher_checkpoint is not None):
        raise ValueError("distillation needs all of --distillation hard|soft, --teacher and --teacher-checkpoint")


def make_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    options = dict(epsilon=args.epsilon, schedule=args.mask_schedule)
    options |= {key: getattr(args, key) for key in ("drop_path", "distilled") if getattr(args, key) is not None}
    model = build_model(args.model, args.attention, num_classes, args.image_size, args.castle_downsample, **options)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def prepare_run(args: argparse.Namespace, device: torch.device) -> Run:
    """Everything a training run needs, checked before work starts. Raises ValueError for what the user can mend."""
    resolve(args)
    train_set, val_set = open_data(args)
    steps_per_epoch = len(train_set) // args.global_batch
    if steps_per_epoch == 0:
        raise ValueError(
            f"{args.data} has {len(train_set)} training images, fewer than one global batch of {args.global_batch}: "
            f"lower --batch-size"
        )
    total_steps = min(steps_per_epoch * args.epochs, args.max_steps or math.inf)
    if args.ema_decay is None:
        args.ema_decay = ema_decay_for(total_steps)
    torch.manual_seed(args.seed)  # the same first weights on every rank
    model = make_model(args, len(train_set.classes))
    if args.checkpoint:
        load_pretrained(model, args.checkpoint)
    model.to(device)
    teacher = None
    if args.teacher:
        teacher = build_teacher(args.teacher, args.teacher_checkpoint, len(train_set.classes), args.image_size)
        teacher.to(device)
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=0.9) if args.optimizer == "sgd" else torch.optim.AdamW(groups)
    ema = averaged(model, args.ema_decay)
    samplers = dict(rank=rank(), world=world_size())
    run = Run(
        args=args,
        device=device,
        classes=train_set.classes,
        model=model,
        net=model,
        ema=ema,
        optimizer=optimizer,
        teacher=teacher,
        train_loader=make_loader(
            Augmented(train_set, train_transform(args), args.seed),
            EpochSampler(len(train_set), **samplers, seed=args.seed, multiple=args.global_batch),
            args.batch_size,
            args.workers,
        ),
        val_loader=make_loader(
            Augmented(val_set, eval_transform(args), args.seed),
            EpochSampler(len(val_set), **samplers),
            args.batch_size,
            args.workers,
        ),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    resume(run)
    if args.compile:
        run.net = torch.compile(run.net)
    if world_size() > 1:
        run.net = DistributedDataParallel(run.net, device_ids=[device.index] if device.type == "cuda" else None)
    return run


def resume(run: Run) -> None:
    """Continue from last.pt (or the file named by --resume) if there is one; else begin a new log."""
    args, path = run.args, Path(run.args.output, "last.pt")
    if args.resume not in ("auto", "never"):
        path = Path(args.resume)
    log = run.folder / "log.jsonl"
    if args.resume == "never" or (args.resume == "auto" and not path.exists()):
        if rank() == 0:
            run.folder.mkdir(parents=True, exist_ok=True)
            log.write_text("")
            config = vars(args) | {"classes": run.classes, "total_steps": run.total_steps}
            (run.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return
    state = read_checkpoint(path)
    missing = {"args", "model", "ema", "optimizer", "step"} - state.keys()
    if missing:
        raise ValueError(f"{path} cannot be resumed: it has no {', '.join(sorted(missing))}")
    now, then = vars(args), state["args"]
    differing = [
        f"{key} {then.get(key)!r} -> {value!r}"
        for key, value in now.items()
        if key not in FREE_ON_RESUME and value != then.get(key)
    ]
    if state["classes"] != run.classes:
        differing.append("the classes")
    if differing:
        raise ValueError(
            f"{path} is of another run; differing: {', '.join(differing)}. "
            f"Use the same flags, another --output, or --resume never to start over"
        )
    run.model.load_state_dict(state["model"])
    run.ema.module.load_state_dict(state["ema"])
    run.ema.n_averaged.fill_(state["ema_updates"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.best = state["step"], state["best"]
    if rank() == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        kept = [record for record in records if "epoch" in record and record["step"] <= run.step]
        log.write_text("".join(json.dumps(record) + "\n" for record in kept))
        print(f"resumed from {path} at step {run.step} of {run.total_steps}")


def describe(run: Run) -> str:
    """The settings that shape a run, in a few lines, for the start of the output."""
    a, train_set, val_set = run.args, run.train_loader.dataset, run.val_loader.dataset
    parameters, batch = sum(p.numel() for p in run.model.parameters()), OPTIMIZERS[a.optimizer]["lr_batch"]
    return f"""{a.model}, {a.attention}: {parameters / 1e6:.2f} M parameters, {world_size()} x {run.device.type}
data: {a.data}, {len(train_set)} training and {len(val_set)} validation images of {a.image_size} px, \
{len(run.classes)} classes
length: {a.epochs} epochs, {run.total_steps} steps of {a.global_batch} images
recipe: {a.optimizer}, {a.schedule}, peak learning rate {a.lr * a.global_batch / batch:.4g} \
({a.lr} per {batch} images), weight decay {a.weight_decay}, EMA {a.ema_decay:.5f}
augmentation: mixup {a.mixup}, cutmix {a.cutmix}, randaugment {a.randaugment}, erasing {a.erasing}, \
smoothing {a.smoothing}
mask: threshold {a.epsilon}, {a.mask_schedule}; output: {a.output}"""


def train(run: Run) -> None:
    args = run.args
    progress = Progress(run.total_steps, run.step)
    progress.say(describe(run))
    while run.step < run.total_steps:
        epoch = run.step // run.steps_per_epoch
        record = dict(epoch=epoch, **train_one_epoch(run, epoch, progress), step=run.step)
        synchronise_buffers(run.ema.module)
        set_threshold(run.ema.module, run.step / run.total_steps)
        record |= evaluate_castling(run.ema.module, run.val_loader, args, run.device)
        improved = deployed_acc1(record) > run.best
        run.best = max(run.best, deployed_acc1(record))
        state = dict(
            model=run.model.state_dict(),
            ema=run.ema.module.state_dict(),
            ema_updates=int(run.ema.n_averaged),
            optimizer=run.optimizer.state_dict(),
            step=run.step,
            progress=run.step / run.total_steps,
            best=run.best,
            args=vars(args),
            classes=run.classes,
        )
        append_log(run.folder, record)  # before the checkpoint: resuming drops lines that are ahead of it
        if rank() == 0:
            save(run.folder / "last.pt", state)
            if improved:
                save(run.folder / "best.pt", {k: v for k, v in state.items() if k not in ("model", "optimizer")})
        castled = f", castled {record['test_acc1_castled']:.2f}" if "castling_gap" in record else ""
        progress.say(
            f"epoch {epoch}: train_loss {record['train_loss']:.4f}, lr {record['train_lr']:.3g}, "
            f"* Acc@1 {record['test_acc1']:.2f}{castled} Acc@5 {record['test_acc5']:.2f}, "
            f"{record['images_per_s']:.0f} images/s, {100 * record['data_wait']:.0f}% waiting for data"
        )
    progress.close()
    append_log(run.folder, {"castling_report": castling_report(run), "step": run.step})


def load_checkpoint(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, list[str]]:
    """The model in --checkpoint, in eval mode, at the mask threshold it had reached; and the classes it knows.

    Settings that the flags leave open are those it was trained with. A castled.pt needs the config.json beside it.
    """
    checkpoint = read_checkpoint(args.checkpoint)
    trained = settings_of(args.checkpoint, checkpoint)
    if not trained.get("classes"):
        raise ValueError(f"{args.checkpoint} does not say which classes it knows, and has no config.json beside it")
    resolve(args, trained)
    model = make_model(args, len(trained["classes"]))
    load_pretrained(model, args.checkpoint)
    set_threshold(model, checkpoint.get("progress", 1.0))
    return model.to(device).eval(), trained["classes"]


def prepare_evaluation(args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """--eval: prints one JSON object, the metrics of the checkpoint with and without its auxiliary branch."""
    model, classes = load_checkpoint(args, device)
    _, val_set = open_data(args)
    if classes != val_set.classes:
        raise ValueError(
            f"{args.checkpoint} knows {len(classes)} classes ({', '.join(classes[:3])}, ...), "
            f"{args.data} has {len(val_set.classes)} ({', '.join(val_set.classes[:3])}, ...)"
        )
    sampler = EpochSampler(len(val_set), rank=rank(), world=world_size())
    loader = make_loader(Augmented(val_set, eval_transform(args), args.seed), sampler, args.batch_size, args.workers)

    def work() -> None:
        record = evaluate_castling(model, loader, args, device)
        if rank() == 0:
            print(json.dumps(record))

    return work


def prepare_prediction(args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """--image: prints the five likeliest classes of a file, or of each file of a folder."""
    model, classes = load_checkpoint(args, device)
    source = Path(args.image)
    if not source.exists():
        raise ValueError(f"no image or folder {source}")
    paths = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    transform = eval_transform(args)
    if args.data == "shapes":  # its images are square: fit others whole
        transform = v2.Compose([v2.Resize((args.image_size, args.image_size)), v2.PILToTensor()])

    @torch.inference_mode()
    def work() -> None:
        for path in paths:
            images = to_model_input(transform(read_image(path))[None], device, args.channels_last)
            top = model(images)[0].softmax(0).topk(min(5, len(classes)))
            found = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            print(f"{path}: " + ", ".join(f"{classes[i]} {probability:.1%}" for i, probability in found))

    return work


def prepare(args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """What the arguments ask for, checked and ready to go. Raises ValueError for what the user can mend."""
    if (args.eval or args.image) and not args.checkpoint:
        raise ValueError("--eval and --image need --checkpoint")
    if args.image:
        return prepare_prediction(args, device)
    if args.eval:
        return prepare_evaluation(args, device)
    return functools.partial(train, prepare_run(args, device))


def main(args: argparse.Namespace) -> None:
    """Exit status 2: arguments, checkpoint or data folder are wrong, found before work starts. 1: the work failed."""
    device = start_processes()
    try:
        try:
            work = prepare(args, device)
        except ValueError as error:
            sys.stderr.write(f"train.py: error: {error}\n")
            sys.exit(2)
        work()
    except (DataError, NonFiniteLoss) as error:
        # From a loader process the message is a whole traceback, whose last line is what was raised.
        sys.stderr.write(f"train.py: {str(error).strip().splitlines()[-1]}\n")
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(parser().parse_args())
