"""Train a Castling-ViT classifier, and castle it at the end. Plain PyTorch; the same script on any number of processes.

    python train.py                                                built-in rendered shapes, one process, no download
    torchrun train.py --model levit128                             the same, under torchrun
    torchrun --nproc-per-node=8 train.py --data /data/imagenet     the paper's recipe on eight GPUs
    torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py --data /imagenet
    srun -K --nodes=8 --ntasks-per-node=8 python train.py --data /data/imagenet    the same; -K: all end if one fails
    python train.py --eval --checkpoint runs/X/best.pt             accuracy with and without the auxiliary branch
    python train.py --image photo.jpg --checkpoint runs/X/best.pt  the five likeliest classes

Recipe: arXiv:2211.10526v4, section 4.1 (SGD), where it is stated; DeiT's augmentation (arXiv:2012.12877, Table 9) where
it is not.
This file is also the home of what every training loop here shares: process group, schedules, averaged weights,
checkpoints, log, progress, and the rendered shapes.
"""

import argparse
import contextlib
import copy
import datetime
import fcntl
import functools
import gc
import hashlib
import json
import math
import mmap
import multiprocessing.util
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from attention import (
    SCHEDULES,
    castle,
    cores,
    look_up,
    mask_statistics,
    mask_threshold,
    record_masks,
    set_threshold,
)
from convert import (
    HEADS,
    check_export,
    convert,
    damage,
    export,
    load_pretrained,
    read_checkpoint,
    weights_in,
)
from models import ATTENTIONS, DEIT, ESNET, LCNET, LEVIT, MODELS, VIT_DENSE, build_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0..1; used for all data

# Defaults that depend on the data. Folders: the paper's epochs, and `batch_per_gpu`; DeiT's
# augmentation, whose RandAugment m9 (of 10) is torchvision's 27 (of 30), without its repeated augmentation. The
# rendered shapes have a small, short recipe of their own, made for two CPU cores.
DATA_DEFAULTS = {
    "folder": dict(
        image_size=224, epochs=1000, optimizer="sgd",
        randaugment=27, mixup=0.8, cutmix=1.0, erasing=0.25, smoothing=0.1,
    ),
    "cifar": dict(
        image_size=64, epochs=100, batch_size=128, optimizer="sgd",
        randaugment=27, mixup=0.8, cutmix=1.0, erasing=0.25, smoothing=0.1,
    ),
    "shapes": dict(
        image_size=64, epochs=4, batch_size=128, optimizer="sgd", schedule="cosine", lr=3.2,
        randaugment=0, mixup=0.0, cutmix=0.0, erasing=0.0, smoothing=0.0, drop_path=0.0,
    ),
}  # fmt: skip

OPTIMIZERS = {
    # arXiv:2211.10526v4, section 4.1: momentum 0.9, 0.01 to 2.0 in 11 of 1000 epochs, then x 0.9875 per epoch
    "sgd": dict(lr=2.0, weight_decay=2e-5, warmup_epochs=11.0, schedule="exponential"),
    # LeViT's and DeiT's own recipe; weight decay is LeViT's (DeiT: 0.05)
    "adamw": dict(lr=5e-4, weight_decay=0.025, warmup_epochs=5.0, schedule="cosine"),
}
# At a global batch of `lr_batch`, as `lr` is: where warm-up starts, where a cosine ends.
LR_ENDS = {"sgd": (0.01, 0.0), "adamw": (1e-6, 1e-5)}


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

    That is LeViT's 0.99996 at its 626,000 steps.
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


OUTLINES = {  # class: outline, and a hole where there is one; points (x, y), y down
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
SHAPES = {  # the same, each scaled to touch the unit circle
    name: [np.array(points) / np.linalg.norm(outlines[0], axis=1).max() for points in outlines]
    for name, outlines in OUTLINES.items()
}
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
        angle, waves = rng.uniform(0, math.pi), rng.uniform(3, 12)
        phase = rng.uniform(0, 2 * math.pi, 2).astype(np.float32)
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

    A scene is a function of (seed, split, index), for one NumPy and Pillow; classes take turns. `scene` gives boxes and
    masks too.
    """

    classes = list(SHAPES)

    def __init__(self, split: str, length: int, size: int, seed: int = 0):
        self.split, self.length, self.size, self.seed = ("train", "val").index(split), length, size, seed

    def __len__(self) -> int:
        return self.length

    def generator(self, index: int) -> np.random.Generator:
        """The random numbers that a scene is drawn with. Raises IndexError beyond the set's length."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return np.random.default_rng([self.seed, self.split, index])

    def scene(self, index: int) -> Scene:
        return render_scene(self.generator(index), self.size, [index % len(SHAPES)])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        scene = self.scene(index)
        return torch.from_numpy(scene.image).permute(2, 0, 1), index % len(SHAPES)


class Scenes(Shapes):
    """Rendered scenes of one to four shapes of random classes, for tasks that say where things are."""

    def scene(self, index: int) -> Scene:
        rng = self.generator(index)
        return render_scene(rng, self.size, rng.integers(0, len(SHAPES), rng.integers(1, 5)).tolist())


# ---- data: folders, CIFAR, augmentation, order -----------------------------------------------------------------------


def say(text: str, file: IO | None = None) -> None:
    """Print a line to standard output, or to `file`. If its reader has left, as `head` does, this
    and all later lines go nowhere, and the work goes on."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class DataError(RuntimeError):
    """A file of the data set cannot be used; the message names it."""


def read_image(path: str | Path, upright: bool = False) -> Image.Image:
    """An image file as RGB, `upright` as its EXIF orientation says; DataError names the file that cannot be read."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is no file")
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel, which would be clipped")
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except Exception as error:  # a damaged file can raise nearly anything
        # repr, because a name may have line breaks
        raise DataError(f"cannot read image {str(path)!r}: {error}") from None


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within, torch's random numbers on the CPU are a function of the numbers alone; outside, nothing has changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(*numbers))  # torch.manual_seed would seed GPUs as well
        yield


class Augmented(Dataset):
    """`base` with its images transformed, by randomness that is a function of (seed, epoch, index) alone.

    Items are asked for as (epoch, index), which is what `EpochSampler` yields: so no worker needs to be told the epoch,
    and their number changes nothing. In a set for training, the next item stands in for one that cannot be read, until
    more than 1% of the images were bad; an evaluation of other images would be of something else.

    bad: (images,) uint8, in memory shared with loader processes, 1 where an image could not be read in this epoch.
    """

    def __init__(self, base: Dataset, transform: Callable | None, seed: int, training: bool = False):
        self.base, self.transform, self.seed, self.training = base, transform, seed, training
        self.bad = torch.zeros(len(base), dtype=torch.uint8).share_memory_()
        self.share = len(base) / world_size()  # of this process; its loader processes may not know of the others

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        item = self.read(key[1])
        with seeded(self.seed, *key):
            return self.apply(*item)

    def read(self, index: int):
        """Item `index` of `base`, or the next that is good. Raises DataError."""
        while True:
            try:
                return self.base[index]
            except DataError as error:
                if not self.training:
                    raise
                if not self.bad[index]:
                    say(f"{error}; the next image takes its place", sys.stderr)
                    self.bad[index] = 1
                bad = int(self.bad.sum())
                if bad > self.share / 100:
                    raise DataError(f"{bad} of {self.share:.0f} images are bad, over 1%; the last: {error}") from None
                index = (index + 1) % len(self)

    def apply(self, image, label: int) -> tuple[Tensor, int]:
        """One item of `base`, transformed; where more than the image changes, a subclass says how."""
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
        self.epoch = self.start = 0  # `start`: how many of this rank's items have been had already

    def __len__(self) -> int:
        return len(range(self.rank, self.used, self.world)[self.start :])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.length)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator)
        for index in order[self.rank : self.used : self.world][self.start :].tolist():
            yield self.epoch, index


def train_transform(args: argparse.Namespace) -> Callable:
    """Image (PIL, or uint8 tensor) -> augmented uint8 tensor (3, S, S); normalising and mixing follow on the device."""
    mean = [round(255 * m) for m in MEAN]
    steps = [v2.RandomHorizontalFlip()]
    if args.data != "shapes":  # rendered at the size they are wanted
        steps.insert(0, v2.RandomResizedCrop(args.image_size, interpolation=v2.InterpolationMode.BICUBIC))
    if args.randaugment:
        steps.append(v2.RandAugment(magnitude=args.randaugment, fill=mean))
    return v2.Compose([*steps, v2.PILToTensor(), v2.RandomErasing(args.erasing, value=mean)])


def eval_transform(args: argparse.Namespace) -> Callable:
    """Image -> uint8 tensor (3, S, S): resize the short side to S / 0.875 and take the centre, as DeiT and LeViT do."""
    if args.data == "shapes":
        return v2.PILToTensor()  # leaves rendered tensors as they are
    resize = v2.Resize(round(args.image_size / 0.875), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([without_far_ends, resize, v2.CenterCrop(args.image_size), v2.PILToTensor()])


def without_far_ends(image: Image.Image) -> Image.Image:
    """At most 8 times as long as wide, about the middle: resizing a thin image whole could take gigabytes."""
    width, height = image.size
    return v2.functional.center_crop(image, [min(height, 8 * width), min(width, 8 * height)])


def refuse_loops(root: Path) -> None:
    """Raise ValueError if a link below `root` leads back to a folder it is in: its images would be read 40 times."""
    for path, folders, _ in os.walk(root, followlinks=True):
        for link in (Path(path, name) for name in folders if Path(path, name).is_symlink()):
            if os.path.realpath(link) in map(os.path.realpath, link.parents):
                raise ValueError(f"{link} is a link back to {os.path.realpath(link)}, which it lies in")


KEPT_BYTES = 2**30  # of a split's decoded images, at most, that a process keeps with its loaders


class Folder(torchvision.datasets.ImageFolder):
    """ImageNet-style folders: (RGB image, class). Images of a small set are read once.

    A set is small if its images fit in KEPT_BYTES, were all of the first one's size. Pixels of images
    of that size are then kept; others are read every time.

    kept: (images, 1 + H W 3) uint8, in memory shared with forked loader processes: 1 where an image is
    there, and its pixels. None for a large set, or where the first image cannot be read.
    """

    def __init__(self, root: str):
        super().__init__(root, loader=read_image)
        self.kept = self.shape = None
        with contextlib.suppress(Exception), Image.open(self.samples[0][0]) as first:
            self.shape = (first.height, first.width, 3)  # if it is bad, `read_image` will say so
        if self.shape and len(self) * (row := 1 + math.prod(self.shape)) <= KEPT_BYTES:
            # Not torch's shared memory, of which containers may have 64 MB. Pages are taken when written.
            self.kept = np.frombuffer(mmap.mmap(-1, len(self) * row), np.uint8).reshape(-1, row)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.kept is None:
            return super().__getitem__(index)
        row, pixels = self.kept[index], self.kept[index, 1:].reshape(self.shape)
        if row[0]:
            return Image.fromarray(pixels), self.targets[index]
        image, label = super().__getitem__(index)
        if image.size == self.shape[1::-1]:
            pixels[...] = image
            row[0] = 1  # last: other processes may be looking
        return image, label


def open_folder(root: Path, split: str) -> Dataset:
    """One split of ImageNet-style folders train/<class>/ and val/<class>/ (or test/<class>/)."""
    folder = root / split
    if split == "val" and not folder.is_dir():
        folder = root / "test"
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: expected {root}/train/<class>/ and {root}/val/<class>/ (or test/)")
    refuse_loops(folder)
    try:
        return Folder(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"no images in {folder}: {error}") from None


def open_split(args: argparse.Namespace, split: str) -> Dataset:
    """"train" or "val" of `args.data`, with `.classes`, not augmented."""
    if args.data == "shapes":
        length = args.shapes_length if split == "train" else max(1, args.shapes_length // 10)
        return Shapes(split, length, args.image_size, args.seed)
    if args.data in ("cifar10", "cifar100"):
        cifar = getattr(torchvision.datasets, args.data.upper())
        try:
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                cifar("data", download=True)
            barrier()
            return cifar("data", train=split == "train")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {args.data} to ./data: {error}") from None
    if not Path(args.data).is_dir():
        raise ValueError(f"unknown data {args.data!r}: shapes, cifar10, cifar100 or an existing folder of "
                         "train/CLASS/ and val/CLASS/ or test/CLASS/")  # fmt: skip
    return open_folder(Path(args.data), split)


def make_loader(
    dataset: Dataset, sampler: Sampler, batch_size: int, workers: int, collate: Callable | None = None
) -> DataLoader:
    """Batches (B, ...) in the sampler's order. Draws nothing from the global random generator."""
    # Processes of multiprocessing do not run atexit's handlers, but these; priority 0: before children are waited for.
    multiprocessing.util.Finalize(None, end_loaders, exitpriority=0)
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=leave_group,
    )


def leave_group(worker: int) -> None:
    """Signals to the group, or to all processes, of a training run are not this loader process's: the run ends it."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_loaders() -> None:
    """Kill the loader processes an exception left: they ignore the SIGTERM after which multiprocessing awaits them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed loader process for an error
    # What torch sets at exit, though not in a process of multiprocessing: no iterator is to ask the killed to stop,
    # which takes a lock that one of them may have held.
    torch.utils.data._utils.python_exit_status = True
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def to_model_input(images: Tensor, device: torch.device, channels_last: bool = False) -> Tensor:
    """uint8 (B, 3, H, W) -> normalised float32 on the device."""
    images = images.to(device, non_blocking=True).float().div_(255)
    images = v2.functional.normalize(images, MEAN, STD, inplace=True)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


# ---- processes, log, progress, checkpoints ---------------------------------------------------------------------------


def slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, from what srun sets for each of several tasks; {} elsewhere.

    The first host of the list is the one to meet at: "gpu[07-09,12],login" begins with gpu07.
    """
    of_srun = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= env.keys()  # a batch script has the first, too
    if "RANK" in env or not of_srun or int(env.get("SLURM_NTASKS", "1")) < 2:
        return {}
    hosts = env["SLURM_STEP_NODELIST"]
    per_node = env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 4(x2)
    return dict(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_NTASKS"],
        LOCAL_RANK=env.get("SLURM_LOCALID", "0"),
        LOCAL_WORLD_SIZE=re.match(r"\d+", per_node)[0],
        MASTER_ADDR=env.get("MASTER_ADDR") or re.sub(r"\[([^],-]*)[^]]*\]", r"\1", hosts + ",").split(",")[0],
        MASTER_PORT=env.get("MASTER_PORT") or str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000),
    )


def start_processes() -> torch.device:
    """Join the process group if torchrun or srun started several processes (nccl on GPUs, gloo on
    CPUs); the device.

    Raises: ValueError for environment variables that make no sense, or a group that is not met.
    """
    of_srun = slurm_variables(os.environ)
    os.environ.update(of_srun)
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
        index = 0 if of_srun and gpus == 1 else local_rank  # with --gpus-per-task=1 a task sees its own GPU only
        if index >= gpus:
            raise ValueError(f"process {local_rank} of this machine has no GPU: there are {gpus}")
        device = torch.device("cuda", index)
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


def refuse_differing_ranks(args: argparse.Namespace) -> None:
    """Raise ValueError on every rank unless all have the same flags, code and torch."""
    if not dist.is_initialized():
        return
    names = ("attention.py", "models.py", "convert.py", "train.py", args.script)
    files = [Path(__file__).with_name(name) for name in names]
    mine = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()} | {"torch": torch.__version__}
    mine |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    for number, theirs in enumerate(everyone):
        for key, first in everyone[0].items():
            if (other := theirs.get(key)) != first:
                raise ValueError(f"processes differ: {key} is {first!r} on rank 0, {other!r} on rank {number}")


def environment(device: torch.device) -> dict:
    """What a result depends on beside its flags: code, versions, machine. `commit` ends in -dirty where files differ
    from it, and is None outside a git checkout."""
    git, commit = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"], None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        commit = done.stdout.strip()
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


def cores_available() -> int:
    """CPU cores that this process may use, on a machine of which it may own a part."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def all_sum(values: Tensor) -> list[float]:
    """Element-wise sum over ranks, as numbers."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def any_rank(device: torch.device, *flags: bool | Tensor) -> list[bool]:
    """For each flag, whether it is set on any rank. One small collective, none for a single process."""
    flags = torch.stack([torch.as_tensor(flag, dtype=torch.uint8, device=device) for flag in flags])
    if dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def from_rank_0(value):
    """Rank 0's plain value, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def synchronise_buffers(model: nn.Module) -> None:
    """Rank 0's BatchNorm statistics on every rank: each rank has gathered its own since DDP last made them equal."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message says where, why, and what there still is."""


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


class Stopped(BaseException):
    """A signal asked the run to stop, and everything is saved. `together`: on every rank, after the same step. No
    Exception: what a signal interrupts, such as the reading of an image, must not take it for an error of its own."""

    def __init__(self, together: bool):
        self.together = together


class StopRequests:
    """SIGTERM and SIGINT within its context: noted in `asked` during training steps, which are to be finished; at other
    times, when everything is saved, Stopped at once. A second SIGINT interrupts in any case."""

    def __init__(self):
        self.asked = self.stepping = False

    def __enter__(self) -> "StopRequests":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if not self.stepping:
            raise Stopped(together=False)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Around training steps and their saving."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False
        if self.asked:
            raise Stopped(together=False)


class Progress:
    """Where a long loop stands: a tqdm bar on a terminal, a plain line every `seconds` elsewhere; rank 0 only."""

    def __init__(self, total: int, done: int = 0, seconds: float = 20.0):
        self.total, self.done, self.first, self.seconds, self.bar = total, done, done, seconds, None
        self.started = self.shown = self.last = time.monotonic()
        self.rate = 0.0
        if rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def resume(self) -> None:
        """Steps begin again after something else, such as an evaluation, whose time is not theirs."""
        self.last = time.monotonic()

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

    def say(self, text: str) -> None:
        if rank() == 0:
            aside = contextlib.nullcontext() if self.bar is None else self.bar.external_write_mode()
            with aside:
                say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def append_log(run: "Run", *records: dict) -> None:
    """JSON objects as lines of log.jsonl, and to Weights & Biases with --log-wandb; rank 0 only."""
    if rank() != 0:
        return
    path = run.folder / "log.jsonl"
    try:
        with open(path, "a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error}") from None
    if run.args.log_wandb:
        import wandb

        if wandb.run is None:
            wandb.init(project="castling-vit", name=run.folder.name, dir=str(run.folder), config=vars(run.args))
        for record in records:
            wandb.log(record, step=record["step"])


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and buffers; the decay grows as (1 + n) / (10 + n) until it is `decay`."""

    def average(ema: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(ema, current, updates)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices and filters; none for biases, norms and what the model exempts by name."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # not all of timm's
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]


# ---- loss ------------------------------------------------------------------------------------------------------------


class NonFiniteLoss(RuntimeError):
    """The loss, a weight or every gradient became nan or infinite; the message says where and what is left."""


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


# ---- training and evaluation -----------------------------------------------------------------------------------------


@dataclass
class Gathered:
    """What the steps of an epoch have gathered for its record. Checkpoints hold it, so a stop leaves no trace there.

    loss: sum over this rank's steps. curve: `mask_curve` of the log. occupied: {layer: sum over this rank's steps of
    what the auxiliary mask held}.
    """

    loss: float = 0.0
    curve: dict[str, list[float]] = field(default_factory=lambda: {"step": []})
    occupied: dict[str, Tensor | float] = field(default_factory=dict)


@dataclass
class Run:
    """What a training loop works on. `net` is `model` as the loop calls it: in DDP, compiled.

    gathered: of the epoch that is under way. trained: the record of an epoch whose evaluation is to follow. held:
    layers whose auxiliary mask has held something. dropped: {layer without its branch: step since when}; before_drop:
    seconds of a step with the last of them. saved: when the last checkpoint was. lock: see `hold`.
    """

    task: "Task"
    args: argparse.Namespace
    device: torch.device
    classes: list
    model: nn.Module
    net: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    train_loader: DataLoader
    val_loader: DataLoader
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    total_steps: int
    step: int = 0
    best: float = -math.inf
    teacher: nn.Module | None = None
    gathered: Gathered = field(default_factory=Gathered)
    trained: dict | None = None
    held: set[str] = field(default_factory=set)
    dropped: dict[str, int] = field(default_factory=dict)
    before_drop: float | None = None
    saved: float = field(default_factory=time.monotonic)
    signals: StopRequests = field(default_factory=StopRequests)
    lock: IO | None = None

    @property
    def folder(self) -> Path:
        return Path(self.args.output)


@dataclass(frozen=True)
class Task:
    """What a script brings to the loops of this file: classification's own are at its end.

    script: file name. metrics: {key: title} of what `evaluate` returns, the one to be maximised first.
    resolve(args, trained=None): fill in the flags that were not given.
    open_split(args, "train" or "val") -> data set with `.classes`, plain data, not augmented.
    length(args, training set) -> (steps per epoch, steps of the run).
    make_model(args, num_classes, image_size); make_optimizer(args, model): its groups' `lr_scale` is a factor, or 1.
    train_loader, val_loader(args, dataset): their data sets are Augmented, their samplers EpochSamplers.
    learning_rate(args, step, steps_per_epoch, total_steps).
    loss(run, batch) -> scalar for one batch of the training loader.
    evaluate(model, loader, args, device) -> metrics over the whole set, the same on every rank.
    describe(run) -> the recipe in a line or more, for the start of the output.
    unnamed(path, weights) -> numbered classes, as many as a plain state dict has; ValueError if it is no such model.
    predict(args, device) -> what --image does, checked and ready to go.
    graph(model) -> the module that --export writes.
    load(model, path) -> LoadReport: weights to start from.
    setup(run): what else has to be made, or checked, before a run starts. begin_epoch(run, epoch).
    """

    script: str
    metrics: dict[str, str]
    resolve: Callable
    open_split: Callable
    length: Callable
    make_model: Callable
    make_optimizer: Callable
    train_loader: Callable
    val_loader: Callable
    learning_rate: Callable
    loss: Callable
    evaluate: Callable
    describe: Callable
    unnamed: Callable
    predict: Callable
    graph: Callable = lambda model: model
    load: Callable = load_pretrained
    setup: Callable = lambda run: None
    begin_epoch: Callable = lambda run, epoch: None

    @property
    def metric(self) -> str:
        """The key of what best.pt is best in."""
        return next(iter(self.metrics))


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based), scaled from the recipe's batch to args.global_batch."""
    scale = args.global_batch / lr_batch(args)
    start, end = (min(args.lr, lr) * scale for lr in LR_ENDS[args.optimizer])
    epoch, epochs = step / steps_per_epoch, total_steps / steps_per_epoch
    shape = dict(epochs=epochs, peak=args.lr * scale, start=start, warmup=min(args.warmup_epochs, epochs))
    return exponential_lr(epoch, **shape) if args.schedule == "exponential" else cosine_lr(epoch, **shape, end=end)


def kind_of(data: str | None) -> str:
    """The row of DATA_DEFAULTS for --data: "shapes", "cifar" or "folder"."""
    kinds = {None: "shapes", "shapes": "shapes", "cifar10": "cifar", "cifar100": "cifar"}
    return kinds.get(data, "folder")


def batch_per_gpu(model: str) -> int:
    """Section 4.1: 64 images for LeViT and, pretrained by LeViT's recipe, LCNet and ESNet; 32 for
    DeiT and MViTv2. timm's models, which the paper does not have, go with DeiT."""
    return 64 if model in {*LEVIT, *LCNET, *ESNET} else 32


def lr_batch(args: argparse.Namespace) -> int:
    """The global batch at which --lr is the peak learning rate. With sgd on a folder it is the
    paper's, 64 GPUs of `batch_per_gpu`: 4096 or 2048. shapes and cifar have 4096 for every model.
    """
    if args.optimizer == "adamw":
        return 512
    return 64 * batch_per_gpu(args.model) if kind_of(args.data) == "folder" else 4096


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Autocast where --amp asks for it."""
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def not_finite(run: Run, what: str, lr: float, kept: str = "last.pt") -> NonFiniteLoss:
    """The error to raise, with what one needs to know to go on; `kept` is the checkpoint before it,
    if there is one."""
    path = run.folder / kept
    found = f"the last checkpoint before it is {path}"
    kept = found if path.exists() else "there is no checkpoint before it"
    return NonFiniteLoss(f"{what} at step {run.step}, learning rate {lr:.3g}; {kept}")


def loss_of_batch(run: Run, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Classification loss of one batch, mixed if the recipe says so."""
    args, device = run.args, run.device
    images, targets = to_model_input(batch[0], device, args.channels_last), batch[1].to(device)
    mixes = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    mixes = [mix(alpha=alpha, num_classes=len(run.classes)) for mix, alpha in mixes if alpha > 0]
    if mixes:
        images, targets = v2.RandomChoice(mixes)(images, targets)
    with autocast(args, device):
        outputs = run.net(images)
        with torch.no_grad():
            teacher = None if run.teacher is None else run.teacher(images)
        return classification_loss(
            outputs, targets, smoothing=args.smoothing, teacher=teacher,
            distillation=args.distillation, alpha=args.alpha, tau=args.tau,
        )  # fmt: skip


def branch_statistics(model: nn.Module, dropped: Iterable[str]) -> dict[str, tuple[float, float, float]]:
    """`mask_statistics`, with zeros for layers whose branch was dropped in training."""
    live = mask_statistics(model)
    return {name: live.get(name, (0.0, 0.0, math.nan)) for name in cores(model) if name in live or name in dropped}


def first_masks(model: nn.Module, masks: dict[str, tuple[float, float, float]]) -> str:
    """What the auxiliary masks hold in the first step of a run, by layer; `masks` as of `mask_statistics`."""
    lines, never = {}, []
    for name, (density, _, tokens) in masks.items():
        core = cores(model)[name]
        threshold = float(mask_threshold(0.0, round(tokens), core.epsilon, core.schedule))
        if threshold >= 1:
            never.append(f"{name} ({tokens:.0f} tokens)")
        kind = f"{tokens:.0f} tokens, threshold {threshold:.3g}"
        lines.setdefault(kind, []).append(density)
    text = [f"auxiliary branch: {sum(d > 0 for d, *_ in masks.values())} of {len(masks)} masks hold entries in the "
            "first step"]  # fmt: skip
    for kind, densities in lines.items():
        held = f"{100 * min(densities):.3g} to {100 * max(densities):.3g}% of entries kept"
        text.append(f"  {len(densities)} layers of {kind}: {held}")
    if never:
        text.append(f"  never any, as a threshold of 1 keeps nothing: {', '.join(never)}")
    return "\n".join(text)


def fetch(run: Run, batches: Iterator) -> list:
    """The batches of one step, before any of its work is done: if a loader process died, nothing else has happened."""
    try:
        return [next(batches) for _ in range(run.args.accumulate)]
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker") and world_size() == 1:
            save_last(run)
        raise


def train_step(run: Run, batches: list, lr: float) -> Tensor:
    """Forward and backward of one optimiser step, and its mean loss (), detached; gradients are left in `run.model`."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    total = torch.zeros((), device=run.device)
    for part, batch in enumerate(batches):
        alone = isinstance(run.net, DistributedDataParallel) and part < len(batches) - 1
        with run.net.no_sync() if alone else contextlib.nullcontext():
            loss = run.task.loss(run, batch) / len(batches)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def update(run: Run) -> None:
    """Weights and their average, by the gradients of a step. A float16 step that overflowed is left out."""
    if run.args.clip_grad > 0:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update_parameters(run.model)


def train_one_epoch(run: Run, epoch: int, progress: Progress) -> dict:
    """Optimiser steps to the end of `epoch` or of the run; all randomness of a step follows from (seed, step, rank).

    The masks' density is logged at 100 to 200 steps of a run: `mask_curve` has those of this epoch. With
    --early-drop every step records what the masks held. Checkpoints are saved when they are due, and when a signal asks
    to stop: Stopped. Raises NonFiniteLoss, in the same step on every rank, before that step changes the weights.
    """
    args, device, gathered = run.args, run.device, run.gathered
    started, waited, durations, first = time.monotonic(), 0.0, [], run.step
    branches = {name: core for name, core in cores(run.model).items() if core.auxiliary}
    between, done = max(1, run.total_steps // 100), run.step - epoch * run.steps_per_epoch
    sampler, dataset = run.train_loader.sampler, run.train_loader.dataset
    sampler.epoch, sampler.start = epoch, done * args.batch_size * args.accumulate
    if not done:
        dataset.bad.zero_()
    run.task.begin_epoch(run, epoch)
    progress.resume()
    batches = iter(run.train_loader)
    run.net.train()
    end = min(run.steps_per_epoch * (epoch + 1), run.total_steps)
    while run.step < end:
        asked = time.monotonic()
        step_batches = fetch(run, batches)
        begun = time.monotonic()
        torch.manual_seed(mixed_seed(args.seed, run.step, rank()))
        set_threshold(run.model, run.step / run.total_steps)
        measured = run.step % between == 0
        record_masks(run.model, args.early_drop or measured)
        lr = run.task.learning_rate(args, run.step, run.steps_per_epoch, run.total_steps)
        loss = train_step(run, step_batches, lr)
        due = rank() == 0 and 0 < 60 * args.save_minutes < time.monotonic() - run.saved
        broken, stop, due = any_rank(device, ~loss.isfinite(), run.signals.asked, due)
        loss = loss.item()
        if broken:
            raise not_finite(run, f"loss is {'nan or inf on another process' if math.isfinite(loss) else loss}", lr)
        if run.scaler.get_scale() < 2**-24:  # float16's smallest number; the same on every rank, as gradients are
            raise not_finite(run, "gradients overflow at every loss scale of float16", lr)
        update(run)
        if measured and (branches or run.dropped):
            masks = branch_statistics(run.model, run.dropped)
            if run.step == 0:
                progress.say(first_masks(run.model, masks))
            densities = {name: density for name, (density, *_) in masks.items()}
            for key, value in {"step": run.step, **densities}.items():
                gathered.curve.setdefault(key, []).append(value)
        for name, core in branches.items() if args.early_drop else ():
            gathered.occupied[name] = gathered.occupied.get(name, 0.0) + core.tally[0]
        run.step += 1
        gathered.loss += loss
        waited += begun - asked
        durations.append(time.monotonic() - begun)
        progress.step(args.global_batch, epoch=epoch, loss=loss, lr=lr)
        if (stop or due) and run.step < end:  # the end of an epoch has a checkpoint of its own
            save_last(run)
            if stop:
                raise Stopped(together=True)
    steps, seconds = run.step - first, time.monotonic() - started
    loss_sum, waited = all_sum(torch.tensor([gathered.loss, waited], dtype=torch.float64, device=device))
    record = dict(
        train_loss=loss_sum / (steps + done) / world_size(),
        train_lr=lr,
        seconds=seconds,
        images_per_s=steps * args.global_batch / seconds,
        data_wait=waited / seconds / world_size(),  # share of the time that training waited for images
        step_seconds=statistics.median(durations),  # of a step, without that wait
        bad_images=len(bad_images(run)),
    )
    return record | ({"mask_curve": gathered.curve} if branches or run.dropped else {})


def bad_images(run: Run) -> list[int]:
    """Indices of training images that could not be read in this epoch, on any rank."""
    bad = run.train_loader.dataset.bad.to(run.device, copy=True)
    if dist.is_initialized():
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bad.nonzero()[:, 0].tolist()


def drop_empty_branches(run: Run, record: dict, progress: Progress) -> None:
    """At the end of an epoch, stop computing auxiliary branches whose masks held nothing in any of its steps.

    The masks of a fresh network are empty, and may fill: before half of the run is over, a layer's mask must have held
    something in an earlier epoch.
    """
    occupied = run.gathered.occupied
    sums = all_sum(torch.stack([torch.as_tensor(x, device=run.device) for x in occupied.values()])) if occupied else []
    empty = {name for name, held in zip(occupied, sums, strict=True) if held == 0}
    late = 2 * run.step >= run.total_steps
    layers = [name for name in occupied if name in empty and (name in run.held or late)]
    run.held |= occupied.keys() - empty
    if layers:
        remove_branches(run, dict.fromkeys(layers, run.step))
        run.before_drop = record["step_seconds"]
        progress.say(f"empty masks: {len(layers)} layers go on without their auxiliary branch")


def remove_branches(run: Run, layers: dict[str, int]) -> None:
    """Take the auxiliary branch from {layer: step}, in the model and in its average."""
    run.dropped |= layers
    for model in (run.model, run.ema.module):
        for name in layers:
            cores(model)[name].auxiliary = False


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


def evaluate_castling(
    task: Task,
    model: nn.Module,
    loader: DataLoader,
    args: argparse.Namespace,
    device: torch.device,
    dropped: Iterable[str] = (),
) -> dict:
    """Metrics of the model as trained and of its castled copy, their gap, and what the masks still hold.

    `test_*_castled`, `castling_gap` (of the task's first metric, lost by castling) and the masks are there for models
    with an auxiliary branch only, `dropped` ones counting as empty. Where all are, the model is its castled copy.
    """
    record_masks(model, True)
    metrics = task.evaluate(model, loader, args, device)
    record = {f"test_{key}": value for key, value in metrics.items()}
    masks = branch_statistics(model, dropped)
    if masks:
        branches = any(core.auxiliary for core in cores(model).values())
        castled = task.evaluate(castle(copy.deepcopy(model)), loader, args, device) if branches else metrics
        record |= {f"test_{key}_castled": value for key, value in castled.items()}
        record["castling_gap"] = record[f"test_{task.metric}"] - castled[task.metric]
        record["mask_density"] = {layer: density for layer, (density, *_) in masks.items()}
        record["mask_mass"] = {layer: mass for layer, (_, mass, _) in masks.items()}
    return record


def deployed(task: Task, record: dict) -> float:
    """The first metric of what would be shipped: the castled model where there is one."""
    return record.get(f"test_{task.metric}_castled", record[f"test_{task.metric}"])


# ---- castling report -------------------------------------------------------------------------------------------------


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of convolutions, linear layers and attention products (1 MAC = 2 FLOPs) for one batch.

    flops.py also counts deformable sampling: 0.2% of segment.py's `msdeform`, which is left out here.
    """
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


def castling_report(run: Run, record: dict) -> dict:
    """What castling costs and saves, for the averaged weights, whose metrics are in `record`.

    Rank 0 prints it and writes castled.pt.
    """
    args, model = run.args, run.ema.module
    wanted = ("test_", "castling_", "mask_density", "mask_mass")
    metric = {key: value for key, value in record.items() if key.startswith(wanted)}
    castled = castle(copy.deepcopy(model))
    if rank() == 0:
        models = {"as deployed": castled.eval()}
        if "castling_gap" in metric:
            branched = copy.deepcopy(model)
            for name in run.dropped:
                cores(branched)[name].auxiliary = True
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
    """The castling report as a table: one column, or two where there was a branch to castle."""
    args, columns, batch = run.args, list(metric["macs"]), min(32, run.args.batch_size)
    rows = [
        (title, "{:.2f}", [metric[f"test_{key}"], metric.get(f"test_{key}_castled")])
        for key, title in run.task.metrics.items()
    ]
    rows += [
        ("MACs per image, M", "{:.1f}", [metric["macs"][column] / 1e6 for column in columns]),
        (f"images/s, batch {batch}", "{:.0f}", [metric["inference_images_per_s"][column] for column in columns]),
    ]
    say(f"\ncastling report: {args.model}, {args.attention}, {args.data} at {args.image_size} px")
    say(" " * 22 + "".join(f"{column:>14}" for column in columns))
    for name, form, values in rows:
        say(f"{name:22}" + "".join(f"{form.format(value):>14}" for value in values[: len(columns)]))
    if "castling_gap" in metric:
        say(f"castling gap          {metric['castling_gap']:.2f} points of {run.task.metrics[run.task.metric]}")
        held = [f"{layer} {density:.4f}" for layer, density in metric["mask_density"].items() if density > 0]
        say(f"mask density          {', '.join(held) or '0 in every layer: the masks are empty'}")
    say(f"written               {run.folder / 'castled.pt'}")


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


def mixing(text: str) -> float:
    """argparse type: alpha of a Beta distribution, or 0 for none. Far below 1e-3 torch draws only
    0.5, or fails."""
    value = at_least(0, float)(text)
    if 0 < value < 1e-3:
        raise argparse.ArgumentTypeError(f"must be 0 or at least 0.001, got {text}")
    return value


ALIASES = {  # what the scripts of DeiT, LeViT, timm and torchvision call our flags
    "--data": ("--data-path", "--data-dir"), "--image-size": ("--input-size", "--img-size"), "--batch-size": ("-b",),
    "--workers": ("--num-workers", "-j"), "--output": ("--output-dir",), "--optimizer": ("--opt",),
    "--checkpoint": ("--finetune", "--initial-checkpoint"), "--eval": ("--test-only",), "--weight-decay": ("--wd",),
    "--schedule": ("--sched", "--lr-scheduler"), "--compile": ("--torchcompile",), "--clip-grad": ("--clip-grad-norm",),
    "--smoothing": ("--label-smoothing",), "--mixup": ("--mixup-alpha",), "--cutmix": ("--cutmix-alpha",),
    "--erasing": ("--reprob", "--random-erase"), "--ema-decay": ("--model-ema-decay",),
    "--accumulate": ("--grad-accum-steps",), "--teacher": ("--teacher-model",),
    "--teacher-checkpoint": ("--teacher-path",), "--distillation": ("--distillation-type",),
    "--alpha": ("--distillation-alpha",), "--tau": ("--distillation-tau",),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Takes flags with hyphens or underscores, and under their ALIASES; leaves out the --local-rank=N that
    torch.distributed.launch adds to what is in the environment."""

    def add_argument(self, *flags, **options) -> argparse.Action:
        return super().add_argument(*flags, *ALIASES.get(flags[0], ()), **options)

    def parse_known_args(self, args=None, namespace=None):
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                flag = flag.replace("_", "-")
            if not word or (flag.startswith("--") and equals and not value):
                self.error(f"{flag or ''.join(words[-1:])} has an empty value")
            if flag != "--local-rank":
                words.append(flag + equals + value)
        return super().parse_known_args(words, namespace)


def by_data(flag: str, defaults: dict[str, dict] = DATA_DEFAULTS) -> str:
    """The part of a flag's help that says what its default is for each kind of data."""
    given = [f"{row[flag]} for {data}" for data, row in defaults.items() if flag in row]
    return f"default {', '.join(given) or 'none'}"


def shared_flags(parser: argparse.ArgumentParser, defaults: dict[str, dict] = DATA_DEFAULTS) -> None:
    """Flags that train.py, detect.py and segment.py have in common; `defaults` by kind of data."""
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", help="a model by name")
    add("--attention", help=f"{', '.join(ATTENTIONS)}; default castling")
    add("--data", help="a built-in set or a folder; default shapes, rendered on the fly")
    add("--image-size", type=at_least(1, most=4096),
        help=f"pixels per side; {by_data('image_size', defaults)}")  # fmt: skip
    add("--epochs", type=at_least(1), help=f"passes over the training images; {by_data('epochs', defaults)}")
    add("--eval-every", type=at_least(1), help="epochs from one evaluation to the next; default 1, for COCO 10")
    add("--max-steps", type=at_least(1), help="stop after this many optimiser steps; schedules are fitted to it")
    add("--batch-size", type=at_least(1), help=f"images per process; {by_data('batch_size', defaults)}")
    add("--lr", type=at_least(0, float, most=1e30),
        help="peak learning rate at the recipe's own batch, scaled linearly to yours")  # fmt: skip
    add("--workers", type=at_least(0, most=128),
        help="loader processes; default: a process's share of the cores, at most 8")  # fmt: skip
    add("--seed", type=at_least(0, most=2**62), help="of weights, data order, augmentation and shapes; default 0")
    add("--output", help="folder for checkpoints and logs; default runs/MODEL-ATTENTION-DATA")
    add("--resume", default="auto", help="auto (continue the run in --output if there is one), never, or a last.pt")
    add("--overwrite", action="store_true", help="with --resume never: throw away the run in --output")
    add("--save-minutes", type=at_least(0, float), default=10.0, help="between checkpoints within an epoch, each of "
        "which ends with one too; 0 for none within; default 10")  # fmt: skip
    add("--checkpoint", help="weights to start from, to evaluate or to predict with; a run's own or any state dict")
    add("--eval", action="store_true", help="evaluate --checkpoint and stop")
    add("--split", choices=("val", "train"), default="val", help="what --eval evaluates on; default val")
    add("--image", help="an image or a folder of images to predict with --checkpoint")
    add("--export", help="a .onnx or .pt2 file to write --checkpoint to, castled, for normalised images of any size")
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    add("--amp", action=on_off, default=bfloat16, help="autocast; default on GPUs that have bfloat16")
    add("--amp-dtype", choices=("bfloat16", "float16"), help="of autocast; float16 scales the loss; default bfloat16 "
        "but on GPUs without", default="bfloat16" if bfloat16 or not torch.cuda.is_available() else "float16")
    add("--compile", action=on_off, default=False, help="torch.compile the training step's model")
    add("--accumulate", type=at_least(1), default=1, help="batches per optimiser step")
    add("--dconv", type=at_least(0), help="taps of the DWConv on V, 0 for none; default 9")
    add("--mlp-dwconv", type=at_least(0), help="kernel of the DWConv in the MLPs, 0 for none; default the paper's (D7, "
        "D8), 0 for softmax")  # fmt: skip
    add("--zero-dconv", action="store_true", help="start the DWConv on V at zero, not at random: to go on from a "
        "--checkpoint that has none")  # fmt: skip
    add("--epsilon", type=share, help="mask threshold of Eq. (10); default 0.02")
    add("--mask-schedule", choices=SCHEDULES, help="how the threshold moves in training (D4); default ramp")
    add("--early-drop", action=on_off, default=True, help="stop computing auxiliary branches whose masks were empty "
        "for an epoch; default on")  # fmt: skip
    add("--log-wandb", action="store_true", help="send every line of the log to Weights & Biases as well")


def parser() -> argparse.ArgumentParser:
    """The command line of train.py; what is left None is filled in by `resolve`."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser(
        prog="train.py", description=__doc__, formatter_class=formatter,
        epilog=f"models: {', '.join(name for name in MODELS if name not in VIT_DENSE)}; default levit128\n"
        "timm:NAME is any vision transformer of timm that can be converted, with --attention castling or softmax\n"
        "data: shapes, cifar10, cifar100 (downloaded to ./data), or a folder with train/<class>/ and val/<class>/ "
        "(or test/)\n"
        "learning rate: --lr is for a global batch of 512 with adamw; with sgd of 4096, but on a "
        "folder of 2048 for deit, mvitv2\nand timm. Default --batch-size on a folder: 32 for these, "
        "64 for levit, lcnet and esnet",
    )  # fmt: skip
    shared_flags(p)
    add, on_off = p.add_argument, argparse.BooleanOptionalAction
    add("--optimizer", choices=list(OPTIMIZERS), help="sgd: the paper's, and the default; adamw: LeViT's and DeiT's")
    add("--schedule", choices=("exponential", "cosine"), help="of the learning rate; default by data and optimizer")
    add("--weight-decay", type=at_least(0, float), help="default 2e-5 for sgd, 0.025 for adamw")
    add("--warmup-epochs", type=at_least(0, float), help="default 11 for sgd, 5 for adamw, at most 11%% of the run")
    add("--clip-grad", type=at_least(0, float), default=0.0, help="largest gradient norm, 0 for no limit")
    add("--smoothing", type=share, help=f"label smoothing; {by_data('smoothing')}")
    add("--mixup", type=mixing, help=f"MixUp's alpha, 0 for none; {by_data('mixup')}")
    add("--cutmix", type=mixing, help=f"CutMix's alpha, 0 for none; {by_data('cutmix')}")
    add("--randaugment", type=at_least(0, most=30), help=f"magnitude of 30, 0 for none; {by_data('randaugment')}")
    add("--erasing", type=share, help=f"probability of random erasing; {by_data('erasing')}")
    add("--drop-path", type=share, help="stochastic depth; default 0 for shapes, else the model's")
    add("--ema-decay", type=share, help="of the averaged weights; default: a horizon of 4%% of the run")
    add("--channels-last", action=on_off, default=False, help="memory format of images and convolutions")
    add("--castle-downsample", action=on_off, help="castle down-sampling blocks too (D5); default on")
    add("--patch-size", type=at_least(1), help="pixels per side of DeiT's patches; default 4 for deit_mini, else 16")
    add("--distilled", action=on_off, help="a second, distillation head; default as the model was published")
    add("--distillation", default="none", choices=("none", "hard", "soft"), help="DeiT's; the paper names no kind")
    add("--teacher", help="model to distil from: one of this project or of torchvision.models")
    add("--teacher-checkpoint", help="the teacher's weights, a local file")
    add("--alpha", type=share, default=0.5, help="weight of distillation in the loss")
    add("--tau", type=at_least(1e-6, float), default=1.0, help="temperature of soft distillation")
    add("--shapes-length", type=at_least(1), help="rendered training images, default 30000; a tenth as many validate")
    return p


# Flags that may differ between a run and its continuation: those that change rounding or random numbers, and others.
INEXACT_ON_RESUME = ("batch_size", "accumulate", "amp", "amp_dtype", "compile", "channels_last")
FREE_ON_RESUME = {"output", "resume", "overwrite", "save_minutes", "workers", "eval", "image", "export", "checkpoint",
                  "teacher_checkpoint", "eval_every", "split", "backbone", "log_wandb",
                  *INEXACT_ON_RESUME}  # fmt: skip
# Flags that a checkpoint answers for when they are not given.
TRAINED_FLAGS = ("model", "attention", "image_size", "castle_downsample", "dconv", "mlp_dwconv", "distilled",
                 "patch_size", "epsilon", "mask_schedule", "data", "shapes_length", "seed")  # fmt: skip


def take_over(args: argparse.Namespace, trained: Mapping, flags: tuple[str, ...]) -> None:
    """Flags that were not given, from `trained`, the settings of a checkpoint."""
    for flag in flags:
        if getattr(args, flag) is None:
            setattr(args, flag, trained.get(flag))


def fill_in(args: argparse.Namespace, defaults: Mapping) -> None:
    """Flags that are still open, from `defaults` and those that all scripts share; the output folder; global_batch."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shared = dict(attention="castling", data="shapes", epsilon=0.02, mask_schedule="ramp", seed=0, eval_every=1)
    shared["workers"] = max(1, min(8, cores_available() // local_world))
    for flag, value in (shared | dict(defaults)).items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.output is None and args.eval:
        args.output = str(Path(args.checkpoint).parent / f"eval-{Path(args.data).resolve().name}-{args.split}")
    if args.output is None:
        short = f"-{args.max_steps}steps" if args.max_steps else ""
        args.output = f"runs/{args.model}-{args.attention}-{Path(args.data).resolve().name}{short}".replace(":", "-")
    args.global_batch = args.batch_size * args.accumulate * world_size()


def resolve(args: argparse.Namespace, trained: dict | None = None) -> None:
    """Fill in every flag that was not given: from `trained`, a checkpoint's settings, else from the recipe tables."""
    take_over(args, trained or {}, TRAINED_FLAGS)
    args.model = args.model or "levit128"
    row = {"batch_size": batch_per_gpu(args.model)} | DATA_DEFAULTS[kind_of(args.data)]
    args.optimizer = args.optimizer or row["optimizer"]
    if args.optimizer != row["optimizer"]:  # its learning rate is no other's
        row = {flag: value for flag, value in row.items() if flag not in ("lr", "schedule")}
    recipe = {flag: value for flag, value in OPTIMIZERS[args.optimizer].items() if flag != "warmup_epochs"}
    fill_in(args, dict(castle_downsample=True, shapes_length=30000) | recipe | row)


def core_options(args: argparse.Namespace) -> dict:
    """What the flags say of a model's attention and of the MLPs' DWConv, as `build_model` takes it."""
    options = dict(epsilon=args.epsilon, schedule=args.mask_schedule)
    return options | {key: getattr(args, key) for key in ("dconv", "mlp_dwconv") if getattr(args, key) is not None}


def timm_model(args: argparse.Namespace, num_classes: int, image_size: int) -> nn.Module:
    """--model timm:NAME: timm's model as it is with --attention softmax, converted with castling.

    Raises: ValueError for a model that timm does not have or `convert` refuses, other attention, missing timm.
    """
    name = args.model.removeprefix("timm:")
    try:
        import timm
    except ImportError:
        raise ValueError(f"--model {args.model} needs timm: pip install timm") from None
    look_up(dict.fromkeys(timm.list_models()), name, "model of timm")
    if args.attention not in ("castling", "softmax"):
        raise ValueError(f"timm's models have --attention softmax or castling, not {args.attention}")
    if args.distilled is not None:
        raise ValueError("--distilled is for this project's models: timm's are chosen by name")
    options = dict(num_classes=num_classes, drop_path_rate=args.drop_path or 0.0)
    try:
        model = timm.create_model(name, img_size=image_size, **options)
    except TypeError:  # it has no fixed image size
        model = timm.create_model(name, **options)
    if args.mlp_dwconv:
        raise ValueError("--mlp-dwconv is for this project's models: timm's MLPs have none")
    if args.attention == "castling":
        taps = 9 if args.dconv is None else args.dconv
        convert(model, epsilon=args.epsilon, schedule=args.mask_schedule, dconv=taps)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def make_model(args: argparse.Namespace, num_classes: int, image_size: int) -> nn.Module:
    """The model that resolved flags describe. Raises ValueError as `build_model` does, and for one without classes."""
    if args.patch_size is not None and args.model not in DEIT:
        raise ValueError(f"--patch-size is for {', '.join(DEIT)}, not {args.model}")
    if args.model.startswith("timm:"):
        return timm_model(args, num_classes, image_size)
    if args.model in VIT_DENSE:
        raise ValueError(f"{args.model} gives feature maps, not classes: it is a backbone of segment.py")
    given = ("drop_path", "distilled", "patch_size")
    options = core_options(args) | {key: getattr(args, key) for key in given if getattr(args, key) is not None}
    model = build_model(args.model, args.attention, num_classes, image_size, args.castle_downsample, **options)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


# ---- starting from files ---------------------------------------------------------------------------------------------


def settings_of(path: str, checkpoint: dict) -> dict:
    """The settings that a checkpoint was trained with, `classes` among them: its own, or those of the config.json
    beside it; {} if there are none."""
    settings, config = {}, Path(path).with_name("config.json")
    if isinstance(checkpoint.get("args"), dict):
        settings = checkpoint["args"] | {"classes": checkpoint.get("classes")}
    elif config.is_file():
        try:
            settings = json.loads(config.read_text())
        except ValueError as error:
            raise ValueError(f"{config} is damaged: {error}") from None
    ours = isinstance(settings, dict) and isinstance(settings.get("model"), str)
    ours = ours and settings.get("attention") in ATTENTIONS
    return renamed(settings) if ours else {}  # others too write args, and files of that name


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


def settings_for(task: Task, path: str) -> dict:
    """`settings_of` a file. Raises ValueError if it is another script's."""
    settings = settings_of(path, read_checkpoint(path))
    if settings.get("script", task.script) != task.script:
        raise ValueError(f"{path} is a checkpoint of {settings['script']}, not of {task.script}")
    return settings


def load_model(task: Task, args: argparse.Namespace, classes: list | None = None) -> tuple[nn.Module, list]:
    """The model in --checkpoint, in eval mode, at the mask threshold it had reached; and the classes it knows.

    Settings that the flags leave open are those it was trained with. A plain state dict is taken as castled.

    Args: classes: what to assume where the file does not say; None numbers them.
    """
    checkpoint = read_checkpoint(args.checkpoint)
    trained = settings_for(task, args.checkpoint)
    task.resolve(args, trained)
    classes = trained.get("classes") or classes or task.unnamed(args.checkpoint, weights_in(checkpoint))
    model = task.make_model(args, len(classes), trained.get("image_size") or args.image_size)
    report = load_pretrained(model, args.checkpoint)
    if report.new or report.partly:
        raise ValueError(
            f"{args.checkpoint} does not hold all of {args.model} with {args.attention} attention, only something to "
            f"start from (is it of --attention softmax?)\n{report}"
        )
    if "progress" not in checkpoint:
        castle(model)
    set_threshold(model, checkpoint.get("progress", 1.0))
    for name in checkpoint.get("dropped", {}):
        cores(model)[name].auxiliary = False
    return model.eval(), classes


def unnamed_classes(path: str, weights: dict[str, Tensor]) -> list[str]:
    """"class 0", "class 1", ...: as many as the class head among `weights`, from file `path`, has."""
    head = next((weights[name] for name in HEADS if name in weights), None)
    if head is None:
        raise ValueError(f"{path} has none of {', '.join(HEADS)}: it is no classifier")
    return [f"class {i}" for i in range(len(head))]


def load_teacher(args: argparse.Namespace, classes: list[str]) -> nn.Module | None:
    """The frozen teacher that the flags ask for: a checkpoint of this project, or of a torchvision model."""
    given = [args.distillation != "none", args.teacher is not None, args.teacher_checkpoint is not None]
    if not any(given):
        return None
    if not all(given):
        raise ValueError("distillation needs all of --distillation hard|soft, --teacher and --teacher-checkpoint")
    if args.teacher in MODELS:
        size = f"--image-size={args.image_size}"
        own = parser().parse_args([f"--model={args.teacher}", f"--checkpoint={args.teacher_checkpoint}", size])
        if not settings_of(args.teacher_checkpoint, read_checkpoint(args.teacher_checkpoint)):
            own.attention = "softmax"
        teacher, known = load_model(CLASSIFICATION, own, classes)
        if known != classes:
            raise ValueError(f"{args.teacher_checkpoint} knows other classes than {args.data}")
    elif args.teacher in torchvision.models.list_models(torchvision.models):
        teacher = torchvision.models.get_model(args.teacher, weights=None, num_classes=len(classes))
        load_pretrained(teacher, args.teacher_checkpoint)
    else:
        raise ValueError(f"unknown teacher {args.teacher!r}: a model of this project or of torchvision.models")
    return teacher.eval().requires_grad_(False)


CHECKPOINTS = ("last.pt", "previous.pt")  # of a folder, newest first


def differences(then: Mapping, args: argparse.Namespace) -> list[str]:
    """Flags, as text, that differ from the settings of a run and may not."""
    return [
        f"{key} {then.get(key)!r} -> {value!r}"
        for key, value in vars(args).items()
        if key not in FREE_ON_RESUME and value != then.get(key)
    ]


def in_output(args: argparse.Namespace) -> bool:
    """Whether there is a checkpoint to continue from in --output."""
    return any((Path(args.output) / name).exists() for name in CHECKPOINTS)


def starts_fresh(args: argparse.Namespace) -> bool:
    """Whether --resume leads to a new run: then first weights are loaded from the files that flags name."""
    return args.resume == "never" or (args.resume == "auto" and not in_output(args))


def newest(folder: Path) -> Path:
    """The newest checkpoint of a folder that is whole. Raises ValueError if none is; says which one is not."""
    reasons = []
    for path in (folder / name for name in CHECKPOINTS):
        if path.exists():
            reason = damage(path)
            if reason is None:
                return path
            reasons.append(reason)
            if rank() == 0:
                say(f"warning: {reason}", sys.stderr)
    raise ValueError(f"{'; '.join(reasons)}: nothing to continue from; --resume never --overwrite starts over")


def refuse_to_overwrite(run: Run) -> None:
    """Raise ValueError if a new run would throw away one that is in its folder, unless --overwrite says so."""
    log, config = run.folder / "log.jsonl", run.folder / "config.json"
    kept = [name for name in (*CHECKPOINTS, "best.pt", "castled.pt") if (run.folder / name).exists()]
    kept += ["log.jsonl"] if log.exists() and log.stat().st_size else []
    if not kept or run.args.overwrite:
        return
    then = {}
    with contextlib.suppress(OSError, ValueError):
        then = json.loads(config.read_text())
    differing = differences(then, run.args)
    raise ValueError(
        f"--output {run.folder} holds a run ({', '.join(kept)}), {'differing: ' if differing else 'of the same flags'}"
        f"{', '.join(differing)}; choose another --output, or --overwrite to throw it away"
    )


def hold(folder: Path) -> IO:
    """The open file `lock`: as long as it is open, no other process can train into this folder.

    For workers that outlive a killed torchrun. A POSIX lock ends with its process, loader processes do not inherit it,
    and most network disks know it; on one that does not, nothing is held. Raises ValueError if another process has it,
    or if the folder cannot be written to.
    """
    try:
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
    except OSError as error:
        raise ValueError(f"cannot write to --output {folder}: {error}") from None
    return file


def begin(run: Run) -> None:
    """An empty log and the settings, in a folder that no longer holds another run's checkpoints."""
    config = vars(run.args) | {"classes": run.classes, "total_steps": run.total_steps}
    config["environment"] = environment(run.device)
    try:
        for name in (*CHECKPOINTS, "best.pt", "castled.pt"):
            (run.folder / name).unlink(missing_ok=True)
        (run.folder / "log.jsonl").write_text("")
        (run.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write to --output {run.folder}: {error}") from None


def weights_and_settings(run: Run) -> dict:
    """What best.pt holds: all that an evaluation needs."""
    return dict(
        ema=run.ema.module.state_dict(),
        ema_updates=int(run.ema.n_averaged),
        step=run.step,
        progress=run.step / run.total_steps,
        best=run.best,
        args=vars(run.args),
        classes=run.classes,
        dropped=run.dropped,
    )


def state_of(run: Run) -> dict:
    """What a run continues from; every rank must call this. All else follows from the flags and the step."""
    losses = [0.0] * world_size()
    losses[rank()] = run.gathered.loss
    occupied = torch.tensor([float(held) for held in run.gathered.occupied.values()], device=run.device)
    return weights_and_settings(run) | dict(
        model=run.model.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
        world_size=world_size(),
        images=len(run.train_loader.dataset),
        losses=all_sum(torch.tensor(losses, dtype=torch.float64, device=run.device)),
        curve=run.gathered.curve,
        occupied=dict(zip(run.gathered.occupied, all_sum(occupied), strict=True)),
        bad_images=bad_images(run),
        trained=run.trained,
        held=sorted(run.held),
    )


def save_last(run: Run) -> None:
    """A checkpoint to continue from, by rank 0; every rank must call this. Raises NonFiniteLoss for lost weights."""
    if not all(bool(parameter.isfinite().all()) for parameter in run.model.parameters()):
        raise not_finite(run, "a weight is not finite", run.optimizer.param_groups[0]["lr"])
    state = state_of(run)
    if rank() == 0:
        save(run.folder / "last.pt", state, previous=run.folder / "previous.pt")
    run.saved = time.monotonic()


def resume(run: Run, path: Path) -> None:
    """Continue from `path`, a checkpoint of a run with the same settings."""
    state = read_checkpoint(path)
    needed = {"args", "classes", "ema", "ema_updates", "step", "best", "dropped", "model", "optimizer", "scaler",
              "world_size", "images", "losses", "curve", "occupied", "bad_images", "trained", "held"}  # fmt: skip
    if missing := needed - state.keys():
        raise ValueError(f"{path} cannot be resumed: it has no {', '.join(sorted(missing))}")
    differing = differences(state["args"], run.args)
    if state["classes"] != run.classes:
        differing.append("the classes")
    if state["images"] != (images := len(run.train_loader.dataset)):
        differing.append(f"training images {state['images']} -> {images}")
    if differing:
        raise ValueError(
            f"{path} is of another run; differing: {', '.join(differing)}. "
            f"Use the same flags, another --output, or --resume never --overwrite to start over"
        )
    if state["step"] not in range(run.total_steps + 1):
        wanted = f"one of 0..{run.total_steps}, the run's end"
        raise ValueError(f"{path} is at step {state['step']}, expected {wanted}")
    run.model.load_state_dict(state["model"])
    run.ema.module.load_state_dict(state["ema"])
    run.ema.n_averaged.fill_(state["ema_updates"])
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.best, run.trained, run.held = state["step"], state["best"], state["trained"], set(state["held"])
    remove_branches(run, state["dropped"])
    same, first = state["world_size"] == world_size(), rank() == 0
    run.gathered = Gathered(
        loss=state["losses"][rank()] if same else sum(state["losses"]) / state["world_size"],
        curve=state["curve"],
        occupied={name: held * first for name, held in state["occupied"].items()},
    )
    run.train_loader.dataset.bad[state["bad_images"][rank() :: world_size()]] = 1  # each rank bears its share of them
    then = {"processes": state["world_size"], **{key: state["args"].get(key) for key in INEXACT_ON_RESUME}}
    now = vars(run.args) | {"processes": world_size()}
    changed = [f"{key} {value!r} -> {now.get(key)!r}" for key, value in then.items() if value != now.get(key)]
    if changed and first:
        say(f"not bit for bit what it would have been from here on ({', '.join(changed)}): BatchNorm's statistics, "
              f"mixing and dropout belong to each process and batch, and rounding changes")  # fmt: skip


def whole_records(log: Path) -> Iterator[dict]:
    """The lines of a log, but for one that was cut off when its run was killed."""
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def rewrite_log(log: Path, records: list[dict]) -> None:
    """The log with these lines only; whole at any time. Raises ValueError."""
    temporary = log.with_name(log.name + ".tmp")
    try:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(temporary, log)
    except OSError as error:
        raise ValueError(f"cannot write {log}: {error}") from None


def begin_or_resume(run: Run) -> None:
    """What --resume says. Lines of the log that are ahead of the checkpoint are dropped; an epoch whose line is there
    is evaluated already."""
    args, last, log = run.args, run.folder / "last.pt", run.folder / "log.jsonl"
    path = None
    if not starts_fresh(args):
        path = newest(run.folder) if args.resume == "auto" else Path(args.resume)
        if not path.exists():
            raise ValueError(f"--resume {path}: there is no such file")
    ours = path is not None and path.parent.resolve() == run.folder.resolve()
    if not ours:
        refuse_to_overwrite(run)
    barrier()  # every rank has looked before rank 0 writes
    if rank() == 0 and ours and path.exists():
        run.lock = hold(run.folder)  # before what is in it is read; a new folder is not made before all is known good
    if path is not None:
        resume(run, path)
    steps = torch.tensor([run.step, -run.step], device=run.device)
    if dist.is_initialized():
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    if steps.sum() != 0:
        raise ValueError(f"processes would resume from different steps: is --output {run.folder} on a shared disk?")
    if rank() == 0:
        run.lock = run.lock or hold(run.folder)
        records = list(whole_records(log)) if ours and log.exists() else []
        if not ours:
            begin(run)
            run.best = -math.inf  # of this folder
        if path is not None and path.resolve() != last.resolve():
            shutil.copyfile(path, last)
        records = [record for record in records if "castling_report" not in record and record["step"] <= run.step]
        if run.trained is not None:
            if any("epoch" in record and record["step"] == run.step for record in records):
                run.trained = None
                if f"test_{run.task.metric}" in records[-1]:
                    run.best = max(run.best, deployed(run.task, records[-1]))
            else:
                records = [record for record in records if record["step"] < run.step]
        rewrite_log(log, records)
        if path is not None:
            say(f"resumed from {path} at step {run.step} of {run.total_steps}")
    run.trained, run.best = from_rank_0((run.trained, run.best))


def open_data(task: Task, args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Training and validation set. Raises ValueError, as `open_split`, and if their classes differ."""
    train_set, val_set = (task.open_split(args, split) for split in ("train", "val"))
    one, other = train_set.classes, val_set.classes
    if one != other:
        differing = [c for c in one if c not in other] + [c for c in other if c not in one]
        raise ValueError(
            f"the training and validation images of {args.data} have different classes: "
            f"{', '.join(map(str, differing[:5])) or 'the same in another order'}"
        )
    return train_set, val_set


def prepare_run(task: Task, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Everything a training run needs, checked before work starts. Raises ValueError for what the user can mend."""
    task.resolve(args)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and in_output(args):
        args.resume = "auto"  # whatever it said at first: torchrun has started this again after a failure
    if args.log_wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ValueError("--log-wandb needs wandb: pip install wandb") from None
    train_set, val_set = open_data(task, args)
    steps_per_epoch, total_steps = task.length(args, train_set)
    if args.ema_decay is None:
        args.ema_decay = ema_decay_for(total_steps)
    torch.manual_seed(args.seed)  # the same first weights on every rank
    model = task.make_model(args, len(train_set.classes), args.image_size)
    for core in cores(model).values() if args.zero_dconv else ():
        if core.dconv is not None:
            nn.init.zeros_(core.dconv.weight)
    if args.checkpoint and starts_fresh(args):
        report = task.load(model, args.checkpoint)
        if rank() == 0:
            say(f"{args.checkpoint}\n{report}")
    model.to(device)
    run = Run(
        task=task,
        args=args,
        device=device,
        classes=train_set.classes,
        model=model,
        net=model,
        ema=averaged(model, args.ema_decay),
        optimizer=task.make_optimizer(args, model),
        train_loader=task.train_loader(args, train_set),
        val_loader=task.val_loader(args, val_set),
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == "float16"),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    task.setup(run)
    begin_or_resume(run)
    if args.compile:
        run.net = torch.compile(run.net)
    if world_size() > 1:  # no static_graph: torch's does not allow for no_sync() in the first backward pass
        run.net = DistributedDataParallel(run.net, device_ids=[device.index] if device.type == "cuda" else None)
    return functools.partial(train, run)


def prepare_evaluation(task: Task, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """--eval: prints one JSON object, the metrics of the checkpoint with and without its auxiliary branch."""
    task.resolve(args, settings_for(task, args.checkpoint))
    val_set = task.open_split(args, args.split)
    model, classes = load_model(task, args, val_set.classes)
    if classes != val_set.classes:
        some = [", ".join(map(str, known[:3])) for known in (classes, val_set.classes)]
        raise ValueError(
            f"{args.checkpoint} knows {len(classes)} classes ({some[0]}, ...), "
            f"{args.data} has {len(val_set.classes)} ({some[1]}, ...)"
        )
    loader = task.val_loader(args, val_set)

    dropped = read_checkpoint(args.checkpoint).get("dropped", {})

    def work() -> None:
        record = evaluate_castling(task, model.to(device), loader, args, device, dropped)
        if not math.isfinite(record.get("test_loss", 0.0)):
            raise DataError(f"{args.checkpoint}: the loss is {record['test_loss']}")
        if rank() == 0:
            say(json.dumps(record))

    return work


def image_paths(source: str) -> list[Path]:
    """An image file, or the image files of a folder by name. Raises ValueError if there is none."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"no image or folder {path}")
    if not path.is_dir():
        return [path]
    paths = sorted(file for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise ValueError(f"no image in {path}: looked for {', '.join(IMG_EXTENSIONS)}")
    return paths


def drawing_paths(source: str, output: str | None, suffix: str) -> dict[Path, Path]:
    """{image file: file to draw it to} for an image or a folder of images.

    By default NAME_suffix.png here, or NAME.png in a folder NAME_suffix. Raises ValueError for an `output` that cannot
    be drawn to, or that would overwrite an image.
    """
    images, folder = image_paths(source), Path(source).is_dir()
    if not folder:
        target = Path(output or f"{images[0].stem}_{suffix}.png")
        if target.suffix.lower() not in Image.registered_extensions() or not target.parent.is_dir():
            raise ValueError(f"--output {target} is no image file in an existing folder")
        targets = {images[0]: target}
    else:
        root = Path(output or f"{Path(source).resolve().name}_{suffix}")
        if root.exists() and not root.is_dir():
            raise ValueError(f"--output {root} is a file; a folder of images is drawn to a folder")
        stems = Counter(path.stem for path in images)
        targets = {path: root / f"{path.stem if stems[path.stem] == 1 else path.name}.png" for path in images}
    overwritten = {path.resolve() for path in images} & {path.resolve() for path in targets.values()}
    if overwritten:
        raise ValueError(f"--output would overwrite {min(overwritten)}")
    return targets


def read_each(paths: Iterable[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """The images of files that can be read, upright, on rank 0; then DataError if there were others, each named."""
    unread = 0
    for path in paths if rank() == 0 else ():
        try:
            image = read_image(path, upright=True)
        except DataError as error:
            say(str(error), sys.stderr)
            unread += 1
            continue
        yield path, image
    if unread:
        raise DataError(f"{unread} images could not be read")


def write_image(image: Image.Image, target: Path) -> None:
    """Save a drawing; DataError names the file that cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {target}: {error}") from None


def prepare_drawings(
    task: Task, args: argparse.Namespace, device: torch.device, *, suffix: str, folder: str, predict: Callable
) -> Callable[[], None]:
    """--image of detection and segmentation: what is found is drawn to --output, or printed with --json, or both.

    Args:
        suffix: of the default output's name. folder: what --data is where a checkpoint has no settings: the image size
            of photographs, not of rendered scenes.
        predict(model, classes, image, args, device) -> what --json prints for an RGB image, its drawing, and a text.
    Raises: ValueError for images, outputs and checkpoints that cannot be used.
    """
    targets = drawing_paths(args.image, args.output, suffix)
    drawn = args.output is not None or not args.json
    if args.data is None and not settings_for(task, args.checkpoint):
        args.data = folder
    model, classes = load_model(task, args)

    @torch.inference_mode()
    def work() -> None:
        """Predict image by image; what was found is kept where a later one cannot be read."""
        model.to(device)
        printed = []
        with contextlib.ExitStack() as stack:
            if args.json and rank() == 0:  # also where an image cannot be read
                stack.callback(lambda: say(json.dumps(printed, indent=1)))
            for path, image in read_each(targets):
                record, drawing, text = predict(model, classes, image, args, device)
                printed.append(dict(image=str(path), **record))
                if drawn:
                    write_image(drawing, targets[path])
                if not args.json:
                    say(f"{path}: {text}, drawn to {targets[path]}")

    return work


def load_predictor(args: argparse.Namespace) -> tuple[nn.Module, list, Callable]:
    """`load_model` of a classifier, and what turns an image into its square uint8 input (3, size, size)."""
    if args.data is None and not settings_for(CLASSIFICATION, args.checkpoint):
        args.data = "folder"  # somebody else's model: the sizes and crop of photographs
    model, classes = load_model(CLASSIFICATION, args)
    transform = eval_transform(args)
    if args.data == "shapes":  # its images are square: fit others whole
        transform = v2.Compose([v2.Resize((args.image_size, args.image_size)), v2.PILToTensor()])
    return model, classes, transform


def prepare_prediction(args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """--image: prints the five likeliest classes of a file, or of each image file of a folder."""
    paths = image_paths(args.image)
    model, classes, transform = load_predictor(args)

    @torch.inference_mode()
    def work() -> None:
        model.to(device)
        for path, image in read_each(paths):
            images = to_model_input(transform(image)[None], device, args.channels_last)
            top = model(images)[0].softmax(0).topk(min(5, len(classes)))
            found = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            say(f"{path}: " + ", ".join(f"{classes[i]} {probability:.1%}" for i, probability in found))

    return work


def prepare_export(task: Task, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """--export: writes the checkpoint's castled model to a file, and runs the file beside it."""
    check_export(args.export)
    model, _ = load_model(task, args)

    def work() -> None:
        if rank() != 0:
            return
        shapes, difference = export(task.graph(model), args.export, args.image_size)
        shapes = ", ".join("x".join(map(str, shape)) for shape in shapes)
        say(f"{args.export}: run on {shapes}; largest difference {difference:.1e}")
        if not difference < 1e-4:
            raise DataError(f"{args.export} is not the model that it was made from")

    return work


# ---- the run ---------------------------------------------------------------------------------------------------------


def describe(run: Run) -> str:
    """The settings that shape any run, in a few lines, for the start of the output."""
    a, train_set, val_set = run.args, run.train_loader.dataset, run.val_loader.dataset
    parameters = sum(p.numel() for p in run.model.parameters())
    branch = any(core.auxiliary for core in cores(run.model).values())
    mask = f"mask: threshold {a.epsilon}, {a.mask_schedule}; " if branch else ""
    return f"""{a.model}, {a.attention}: {parameters / 1e6:.2f} M parameters, {world_size()} x {run.device.type}
data: {a.data}, {len(train_set)} training and {len(val_set)} validation images of {a.image_size} px, \
{len(run.classes)} classes
length: {run.total_steps / run.steps_per_epoch:.4g} epochs, {run.total_steps} steps of {a.global_batch} images
{run.task.describe(run)}
{mask}output: {a.output}"""


def train(run: Run) -> None:
    """Train to the end, one checkpoint, evaluation and log line per epoch; then the castling report."""
    record = None
    try:
        with run.signals:
            with contextlib.closing(Progress(run.total_steps, run.step)) as progress:
                progress.say(describe(run))
                while run.step < run.total_steps or run.trained is not None:
                    if run.trained is None:
                        train_and_save(run, progress)
                    record = evaluate_and_log(run, progress)
            if record is None:  # the run was complete already
                set_threshold(run.ema.module, 1.0)
                record = evaluated(run)
            append_log(run, {"castling_report": castling_report(run, record), "step": run.step})
    except Stopped:
        if rank() == 0:
            again = same_command(run.args)
            say(f"stopped at step {run.step} of {run.total_steps}; continue with: {again}")
        raise


def same_command(args: argparse.Namespace) -> str:
    """The command that goes on with this run. What was before the script's name under torchrun is not known here."""
    launcher = "the same torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else Path(sys.executable).name
    return f"{launcher} {shlex.join(sys.argv)}{'' if args.resume == 'auto' else ' --resume=auto'}"


def evaluated(run: Run) -> dict:
    """`evaluate_castling` of the averaged weights."""
    return evaluate_castling(run.task, run.ema.module, run.val_loader, run.args, run.device, run.dropped)


def train_and_save(run: Run, progress: Progress) -> None:
    """One epoch, or what is left of it, and the checkpoint from which its evaluation goes on."""
    epoch = run.step // run.steps_per_epoch
    with run.signals.noted():
        record = dict(epoch=epoch, **train_one_epoch(run, epoch, progress), step=run.step)
        record["n_parameters"] = sum(parameter.numel() for parameter in run.model.parameters())
        if run.step < run.total_steps:
            drop_empty_branches(run, record, progress)
        run.trained, run.gathered = record, Gathered()
        synchronise_buffers(run.ema.module)
        save_last(run)
        if any_rank(run.device, run.signals.asked)[0]:
            raise Stopped(together=True)


def evaluate_and_log(run: Run, progress: Progress) -> dict:
    """The record of the epoch that was trained last: evaluated if it is its turn, and logged."""
    record, args, scores = run.trained, run.args, ""
    set_threshold(run.ema.module, run.step / run.total_steps)
    if (record["epoch"] + 1) % args.eval_every == 0 or run.step == run.total_steps:
        record |= evaluated(run)
        if not math.isfinite(record.get("test_loss", 0.0)):
            what = f"validation loss is {record['test_loss']}"
            raise not_finite(run, what, record["train_lr"], kept="previous.pt")
        improved, run.best = deployed(run.task, record) > run.best, max(run.best, deployed(run.task, record))
        if improved and rank() == 0:
            save(run.folder / "best.pt", weights_and_settings(run))
        scores = " ".join(f"{title} {record[f'test_{key}']:.2f}" for key, title in run.task.metrics.items())
        castled = f" (castled: {deployed(run.task, record):.2f})" if "castling_gap" in record else ""
        scores = f"* {scores}{castled}, "
    layers = [name for name, step in run.dropped.items() if step == record["step"]]
    dropped = [{"dropped": layers, "step": run.step, "step_seconds": record["step_seconds"]}] if layers else []
    append_log(run, *dropped, record)
    saved = ""
    if run.before_drop is not None and record["step"] > max(run.dropped.values()):
        faster = 1000 * (run.before_drop - record["step_seconds"])
        saved = f", steps {abs(faster):.3g} ms {'faster' if faster > 0 else 'slower'} without their branches"
        run.before_drop = None
    run.trained = None
    progress.say(
        f"epoch {record['epoch']}: train_loss {record['train_loss']:.4f}, lr {record['train_lr']:.3g}, {scores}"
        f"{record['images_per_s']:.0f} images/s, {100 * record['data_wait']:.0f}% waiting for data{saved}"
    )
    return record


def prepare(task: Task, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """What the arguments ask for, checked and ready to go. Raises ValueError for what the user can mend."""
    asked = [flag for flag in ("eval", "image", "export") if getattr(args, flag)]
    if asked and not args.checkpoint:
        raise ValueError("--eval, --image and --export need --checkpoint")
    if len(asked) > 1:
        raise ValueError(f"--{' and --'.join(asked)} are different things to do")
    if args.image:
        return task.predict(args, device)
    if args.export:
        return prepare_export(task, args, device)
    return (prepare_evaluation if args.eval else prepare_run)(task, args, device)


def explained(error: RuntimeError, args: argparse.Namespace) -> str | None:
    """What to do about an error of torch's that is not one of this code; None for another."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text or "DefaultCPUAllocator" in text:
        return (
            f"out of memory with --batch-size {args.batch_size} and --image-size {args.image_size}: less of either "
            f"helps, --accumulate {2 * args.accumulate} with half the batch keeps the recipe, and so does --amp"
        )
    if text.startswith("DataLoader worker"):
        return (
            f"{text.splitlines()[0]} If the machine's memory was full, fewer --workers help ({args.workers} now); "
            f"the same command goes on from the last checkpoint"
        )
    return None


def run_script(task: Task, args: argparse.Namespace) -> None:
    """Exit status 2: arguments, checkpoint or data folder are wrong, found before work starts. 1: the work failed.

    A process that fails leaves its group without ceremony: the others may be waiting in it, and torchrun ends them.
    """
    args.script = task.script  # for its checkpoints
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes need not be text
    try:
        device = start_processes()
        refuse_differing_ranks(args)
        work = prepare(task, args, device)
    except (ValueError, OSError) as error:
        say(f"{task.script}: error: {error}", sys.stderr)
        sys.exit(2)
    try:
        work()
    except (DataError, NonFiniteLoss, SaveError) as error:
        # From a loader process the message is a whole traceback, which ends in what was raised.
        say(f"{task.script}: {str(error).strip().rpartition('DataError: ')[2]}", sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if (message := explained(error, args)) is None:
            raise
        say(f"{task.script}: {message}", sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        if dist.is_initialized() and not stopped.together:
            os._exit(0)  # others may be waiting in the group that would be left
    if dist.is_initialized():
        del work  # with its DDP wrapper: one that outlives the group now and then aborts the process at exit
        gc.collect()
        barrier()
        dist.destroy_process_group()


# ---- classification --------------------------------------------------------------------------------------------------


def epochs_and_steps(args: argparse.Namespace, train_set: Dataset) -> tuple[int, int]:
    """Steps per epoch, and of the run. Raises ValueError if there are fewer images than one global batch."""
    steps_per_epoch = len(train_set) // args.global_batch
    if steps_per_epoch == 0:
        raise ValueError(
            f"{args.data} has {len(train_set)} training images, fewer than one global batch of {args.global_batch}: "
            f"lower --batch-size"
        )
    return steps_per_epoch, min(steps_per_epoch * args.epochs, args.max_steps or math.inf)


def length(args: argparse.Namespace, train_set: Dataset) -> tuple[int, int]:
    """Steps per epoch, and of the run, to which warm-up is fitted."""
    steps_per_epoch, total_steps = epochs_and_steps(args, train_set)
    if args.warmup_epochs is None:
        args.warmup_epochs = warmup_for(total_steps / steps_per_epoch, OPTIMIZERS[args.optimizer]["warmup_epochs"])
    return steps_per_epoch, total_steps


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW; its learning rate is set at every step."""
    groups = parameter_groups(model, args.weight_decay)
    return torch.optim.SGD(groups, momentum=0.9) if args.optimizer == "sgd" else torch.optim.AdamW(groups)


def train_loader(args: argparse.Namespace, train_set: Dataset) -> DataLoader:
    """Augmented batches (images, classes), shuffled."""
    order = dict(rank=rank(), world=world_size(), seed=args.seed, multiple=args.global_batch)
    dataset = Augmented(train_set, train_transform(args), args.seed, training=True)
    return make_loader(dataset, EpochSampler(len(train_set), **order), args.batch_size, args.workers)


def val_loader(args: argparse.Namespace, val_set: Dataset) -> DataLoader:
    """Batches (images, classes) of this rank's share of the validation set."""
    sampler = EpochSampler(len(val_set), rank=rank(), world=world_size())
    dataset = Augmented(val_set, eval_transform(args), args.seed)
    return make_loader(dataset, sampler, args.batch_size, args.workers)


def setup(run: Run) -> None:
    """The teacher; and BatchNorm refuses a single value in training: one image, in two dimensions one of a token."""
    args = run.args
    refusing = (nn.BatchNorm1d, nn.BatchNorm2d) if args.image_size <= 32 else nn.BatchNorm1d
    if args.batch_size == 1 and any(isinstance(module, refusing) for module in run.model.modules()):
        raise ValueError(f"BatchNorm of {args.model} needs --batch-size 2 or more per process at {args.image_size} px")
    teacher = load_teacher(run.args, run.classes)
    run.teacher = None if teacher is None else teacher.to(run.device)


def describe_recipe(run: Run) -> str:
    """Optimiser, learning rate and augmentation."""
    a, batch = run.args, lr_batch(run.args)
    return f"""recipe: {a.optimizer}, {a.schedule}, {a.warmup_epochs:.2g} epochs of warm-up to a learning rate of \
{a.lr * a.global_batch / batch:.4g} ({a.lr} per {batch} images), weight decay {a.weight_decay}, EMA {a.ema_decay:.5f}
augmentation: mixup {a.mixup}, cutmix {a.cutmix}, randaugment {a.randaugment}, erasing {a.erasing}, \
smoothing {a.smoothing}"""


CLASSIFICATION = Task(
    script="train.py",
    metrics={"acc1": "Acc@1", "acc5": "Acc@5"},
    resolve=resolve,
    open_split=open_split,
    length=length,
    make_model=make_model,
    make_optimizer=make_optimizer,
    train_loader=train_loader,
    val_loader=val_loader,
    learning_rate=learning_rate,
    loss=loss_of_batch,
    evaluate=evaluate,
    describe=describe_recipe,
    unnamed=unnamed_classes,
    predict=prepare_prediction,
    setup=setup,
)


def main(args: argparse.Namespace) -> None:
    run_script(CLASSIFICATION, args)


if __name__ == "__main__":
    main(parser().parse_args())
