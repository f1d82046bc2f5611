"""Data: rendered shapes, image folders, and the order and augmentation of images.

The rendered shapes give classes, boxes and per-pixel labels without a download. All random numbers
follow from a seed: those of a rendered scene from (seed, split, index), those of an augmented image
from (seed, epoch, index). So a run sees the same images with any number of loader processes, and
after a stop. This file imports no other file of this project. Callers give their rank, the number
of their process, and how many processes there are.
"""

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in 0..1; for all data


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers. Numbers that are close give unrelated seeds."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


# ---- rendered shapes: classes, boxes and per-pixel labels without a download ---------------------


def arc(start: float, stop: float, points: int = 36, radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> list:
    """Points on a circle about (x, y), from the angle `start` to the angle `stop`, in degrees."""
    angles = np.radians(np.linspace(start, stop, points))
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


OUTLINES = {  # class: [outline, and a hole if it has one]; points (x, y), y points down
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
SHAPES = {  # the same outlines, each scaled to touch the unit circle from inside
    name: [np.array(points) / np.linalg.norm(outlines[0], axis=1).max() for points in outlines]
    for name, outlines in OUTLINES.items()
}
SQUARE = [[(-1, -1), (1, -1), (1, 1), (-1, 1)]]


@dataclass
class Scene:
    """A rendered image of n shapes, and what it shows.

    image: (H, W, 3) uint8.
    labels: (n,) int64, class indices.
    boxes: (n, 4) float32, xyxy in pixels, around the visible part of each shape.
    mask: (H, W) uint8, 0 for background, 1 + class on a shape.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    mask: np.ndarray


def placed(outlines: list, centre: np.ndarray, half: np.ndarray, angle: float) -> list[np.ndarray]:
    """Outlines, scaled by `half`, turned by `angle` (radians), moved to `centre` (both (2,), pixels)."""
    cos, sin = math.cos(angle), math.sin(angle)
    return [np.asarray(points) * half @ np.array([[cos, sin], [-sin, cos]]) + centre for points in outlines]


def coverage(outlines: list[np.ndarray], size: int) -> np.ndarray:
    """The share, 0..1, of each pixel inside the first outline and outside the others: (size, size)."""
    fine = 3
    canvas = Image.new("L", (fine * size, fine * size))
    draw = ImageDraw.Draw(canvas)
    for i, outline in enumerate(outlines):
        draw.polygon([tuple(point) for point in outline * fine], fill=0 if i else 255)
    return np.asarray(canvas.reduce(fine), np.float32) / 255


def texture(rng: np.random.Generator, size: int, colour: np.ndarray) -> np.ndarray:
    """Blotches, stripes or checks around a colour, with random scale: (size, size, 3) float32."""
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
    """A random RGB colour, 20..235, at least `distance` (Euclidean) away from `other`."""
    while True:
        colour = rng.uniform(20, 235, 3).astype(np.float32)
        if np.linalg.norm(colour - other) >= distance:
            return colour


def render_scene(rng: np.random.Generator, size: int, labels: list[int]) -> Scene:
    """Draw shapes of the given classes on a textured background with clutter.

    A bar hides a part of some shapes. Size, rotation, aspect, position, colours, textures, clutter,
    bars and sensor noise are random, by `rng`. Shapes lie inside the image and at most touch. A
    shape is left out if 20 tries find no place for it, or if nothing of it is visible.
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
        if rng.random() < 0.4:  # a bar across the shape hides a part, but not its middle
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
    """Rendered scenes of one shape each, for classification: (uint8 tensor (3, S, S), class).

    A scene follows from (seed, split, index), with the same versions of NumPy and Pillow. Scene i
    has class i modulo the number of classes. `scene` gives its box and mask too.
    """

    classes = list(SHAPES)

    def __init__(self, split: str, length: int, size: int, seed: int = 0):
        self.split, self.length, self.size, self.seed = ("train", "val").index(split), length, size, seed

    def __len__(self) -> int:
        return self.length

    def generator(self, index: int) -> np.random.Generator:
        """The random numbers of a scene. Raises: IndexError for an index outside the set."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} is not one of {self.length} scenes, 0 to {self.length - 1}")
        return np.random.default_rng([self.seed, self.split, index])

    def scene(self, index: int) -> Scene:
        return render_scene(self.generator(index), self.size, [index % len(SHAPES)])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        scene = self.scene(index)
        return torch.from_numpy(scene.image).permute(2, 0, 1), index % len(SHAPES)


class Scenes(Shapes):
    """Rendered scenes of one to four shapes of random classes, for tasks that locate things."""

    def scene(self, index: int) -> Scene:
        rng = self.generator(index)
        return render_scene(rng, self.size, rng.integers(0, len(SHAPES), rng.integers(1, 5)).tolist())


# ---- image files ---------------------------------------------------------------------------------


class DataError(RuntimeError):
    """A file of a data set cannot be used. The message names the file."""


def read_image(path: str | Path, upright: bool = False) -> Image.Image:
    """An image file as RGB.

    upright: turn it as the orientation in its EXIF data says.
    Raises: DataError, which names the file, if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits per channel, and values would be cut off")
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except Exception as error:  # a damaged file can raise nearly anything
        # repr, because a file name may have line breaks
        raise DataError(f"cannot read image {str(path)!r}: {error}") from None


KEPT_BYTES = 2**30  # a set of images that takes more memory than this, decoded, is not kept


class Folder(torchvision.datasets.ImageFolder):
    """ImageNet-style folders: (RGB image, class). A small set of one size is read only once.

    A set is small if it fits in KEPT_BYTES when all images are as large as the first one. Then each
    image of that size is kept in memory. Others are read every time.

    kept: (images, 1 + H W 3) uint8: a flag, 1 if the image is kept, and its pixels. Forked loader
        processes share this memory. None for a large set, or if the first image cannot be read.
    """

    def __init__(self, root: str):
        super().__init__(root, loader=read_image)
        self.kept = self.shape = None
        with contextlib.suppress(Exception), Image.open(self.samples[0][0]) as first:
            self.shape = (first.height, first.width, 3)  # `read_image` reports a damaged image
        if self.shape and len(self) * (row := 1 + math.prod(self.shape)) <= KEPT_BYTES:
            # Not torch's shared memory: a container may have only 64 MB of it. This memory is taken
            # from the machine when it is written to.
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
            row[0] = 1  # after the pixels, as other processes read this flag
        return image, label


def open_folder(root: Path, split: str) -> Dataset:
    """One split of ImageNet-style folders train/<class>/ and val/<class>/ (or test/<class>/).

    Raises: ValueError for a missing folder, or a class without images.
    """
    folder = root / split
    if split == "val" and not folder.is_dir():
        folder = root / "test"
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: expected {root}/train/<class>/ and {root}/val/<class>/ (or test/)")
    try:
        return Folder(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"no images in {folder}: {error}") from None


# ---- augmentation, order, batches ----------------------------------------------------------------


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """A context in which torch's random numbers on the CPU follow from `numbers` alone.

    After it, torch's random numbers go on as if it had not been there.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed GPUs too.
        torch.default_generator.manual_seed(mixed_seed(*numbers))
        yield


class Augmented(Dataset):
    """The data set `base`, transformed. Random numbers follow from (seed, epoch, index) alone.

    The key of an item is (epoch, index), as `EpochSampler` yields it: loader processes need not
    know the epoch.
    """

    def __init__(self, base: Dataset, transform: Callable | None, seed: int):
        self.base, self.transform, self.seed = base, transform, seed

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        item = self.base[key[1]]
        with seeded(self.seed, *key):
            return self.apply(*item)

    def apply(self, image, label: int) -> tuple[Tensor, int]:
        """One item of `base`, transformed. A subclass overrides this if labels change too."""
        return self.transform(image), label


class EpochSampler(Sampler):
    """The pairs (epoch, index) of one rank.

    In each step all ranks together read the images that a single process would read.
    Training: a permutation by (seed, epoch), cut to whole steps. Evaluation: all indices in order,
    each on exactly one rank. None is repeated to fill a batch.
    """

    def __init__(self, length: int, *, rank: int = 0, world: int = 1, seed: int | None = None, multiple: int = 1):
        """Args:
            length: number of images. rank, world: number of this process, and of all processes.
            seed: None for evaluation.
            multiple: images per step over all ranks. In training, the length is cut to a multiple.
        """
        self.length, self.rank, self.world, self.seed = length, rank, world, seed
        self.used = length if seed is None else length // multiple * multiple
        self.epoch = self.start = 0  # `start`: number of this rank's items to skip in an epoch

    def __len__(self) -> int:
        return len(range(self.rank, self.used, self.world)[self.start :])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.length)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator)
        for index in order[self.rank : self.used : self.world][self.start :].tolist():
            yield self.epoch, index


def make_loader(
    dataset: Dataset, sampler: Sampler, batch_size: int, workers: int, collate: Callable | None = None
) -> DataLoader:
    """Batches (B, ...) in the sampler's order. torch's global random numbers are not used."""
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
    """Put a loader process into a group of its own: Ctrl-C reaches only the run, which ends it."""
    os.setpgrp()


def to_model_input(images: Tensor, device: torch.device, channels_last: bool = False) -> Tensor:
    """Images, uint8 (B, 3, H, W) -> float32 on the device, normalised by MEAN and STD."""
    images = images.to(device, non_blocking=True).float().div_(255)
    images = v2.functional.normalize(images, MEAN, STD, inplace=True)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images
