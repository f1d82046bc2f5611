"""Data: rendered shapes, image folders, and the order and augmentation of their items. Nothing of ours is imported.

The rendered shapes give classes, boxes and per-pixel labels without a download. All randomness is a function of a
seed: that of a scene of (seed, split, index), that of an augmented item of (seed, epoch, index). So neither the number
of loader processes nor a stop changes what a run sees. Who reads a data set says which of how many processes it is.
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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0..1; used for all data


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers; near numbers give unrelated seeds."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


# ---- rendered shapes: classes, boxes and per-pixel labels without a download ---------------------


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


# ---- image files ---------------------------------------------------------------------------------


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
    try:
        return Folder(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"no images in {folder}: {error}") from None



# ---- augmentation, order, batches ----------------------------------------------------------------


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within, torch's random numbers on the CPU are a function of the numbers alone; outside, nothing has changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(*numbers))  # torch.manual_seed would seed GPUs as well
        yield


class Augmented(Dataset):
    """`base` with its items transformed, by randomness that is a function of (seed, epoch, index) alone.

    Items are asked for as (epoch, index), which is what `EpochSampler` yields: so no loader process needs to be told
    the epoch, and their number changes nothing.
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


def make_loader(
    dataset: Dataset, sampler: Sampler, batch_size: int, workers: int, collate: Callable | None = None
) -> DataLoader:
    """Batches (B, ...) in the sampler's order. Draws nothing from the global random generator."""
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
    """Ctrl-C, and other signals to the process group of a run, are for the run: it ends its loader processes."""
    os.setpgrp()


def to_model_input(images: Tensor, device: torch.device, channels_last: bool = False) -> Tensor:
    """uint8 (B, 3, H, W) -> normalised float32 on the device."""
    images = images.to(device, non_blocking=True).float().div_(255)
    images = v2.functional.normalize(images, MEAN, STD, inplace=True)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images
