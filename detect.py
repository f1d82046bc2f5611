"""Train an object detector on COCO with a Castling-ViT backbone. Evaluate it and draw its boxes.

    python detect.py                                                    built-in rendered scenes
    torchrun --nproc-per-node=8 detect.py --model esnet_vit_m --data /data/coco    on eight GPUs
    python detect.py --eval --checkpoint runs/X/best.pt                 prints AP
    python detect.py --checkpoint runs/X/best.pt --image photo.jpg --output boxes.png

The backbone trains with a softmax branch in its attention. Castling removes the branch after
training. Evaluation is done with and without it. The same command again continues a stopped run.
The training loop is the function `train`. The file run.py has what it calls.
"""

# Paper: arXiv:2211.10526v4, section 4.2. It follows "PicoDet's detection head design as well as
# their training recipe". Where its text is silent, the parameters and MACs of its Tables 3, 6 and 7
# decide. The backbones are ESNet-ViT and LCNet-ViT, and the detector is version 1 of PicoDet.
# PicoDet: Yu et al., arXiv:2111.00902; PaddleDetection @ v2.6.0.
# Picodet_Pytorch: its PyTorch port, github.com/Bo396543018/Picodet_Pytorch.
#
# Shapes: B images, P points, K classes, G ground-truth boxes of an image.
# A point is the centre of a cell of a feature map. It is (x, y, stride) in pixels. P counts the
# points of all levels.
# Boxes are xyxy in pixels: left, top, right, bottom. Only COCO's files have x, y, width, height.

import argparse
import contextlib
import io
import json
import math
import os
import random
import reprlib
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, generalized_box_iou, generalized_box_iou_loss
from torchvision.transforms import v2

import fast
import run
from attention import cores, look_up, set_threshold
from convert import load_pretrained
from data import (
    SHAPES,
    Augmented,
    DataError,
    EpochSampler,
    Scenes,
    make_loader,
    mixed_seed,
    read_image,
    seeded,
    to_model_input,
)
from models import ESNET, LCNET, ConvBackbone, DepthSeparable, build_model, conv_norm
from run import at_least, autocast, mean_over_ranks, rank, say, share, world_size

METRICS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75"}  # printed; the first one chooses best.pt
STRIDES = (8, 16, 32, 64)  # of the levels, pixels
BINS = 8  # the distance to a side of a box is the mean of a distribution over 0..7 strides
# Weights of the GIoU loss and the distribution focal loss. The varifocal loss has weight 1.
BOX_WEIGHT, BINS_WEIGHT = 2.0, 0.25
# Evaluation: the least score, scores kept per level, IoU with a better box above which a box is
# removed, and boxes kept per image.
MIN_SCORE, LEVEL_TOP, NMS_IOU, MAX_BOXES = 0.025, 1000, 0.6, 100
# Class i is drawn in colour i, and after the last colour the first one comes again.
COLOURS = ("red", "blue", "green", "orange", "purple", "deeppink", "teal", "brown")
HEAD = "head.predict.0.weight"  # (K + 32, C, 1, 1) of a checkpoint: tells its number of classes
# `lr` is the peak for this many images per step, the paper's 8 x 80. It scales with that number.
LR_BATCH = 640
# By the last letter of the model: channels of neck and head, and convolutions of each head tower.
SIZES = {"s": dict(channels=96, convs=2), "m": dict(channels=128, convs=4), "l": dict(channels=160, convs=4)}

DETECTORS = {  # backbone: its neck and its row of SIZES
    **{name: dict(neck="lc", **SIZES[name[-1]]) for name in LCNET},
    **{name: dict(neck="csp", **SIZES[name[-1]]) for name in ESNET},
}

# Defaults by kind of data. COCO has the paper's batch and PicoDet's recipe. The rendered scenes
# have a small and short recipe of our own, made for two CPU cores.
DATA_DEFAULTS = {
    "coco": dict(epochs=300, batch_size=80, lr=0.4, multi_scale=2, augment=True, eval_every=10),
    "shapes": dict(
        image_size=128, epochs=4, batch_size=16, lr=1.6, multi_scale=0, augment=False, eval_every=1,
        shapes_length=6000,
    ),
}  # fmt: skip


# ---- neck ----------------------------------------------------------------------------------------


class CSPBlock(nn.Module):
    """(B, 2C, y, x) -> (B, C, y, x). Two branches give C / 2 channels each.

    Source: CSP-PAN, arXiv:2111.00902.
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.main, self.short = conv_norm(2 * channels, half), conv_norm(2 * channels, half)
        self.inner = nn.Sequential(conv_norm(half, half), DepthSeparable(half, half, 5))
        self.out = conv_norm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.inner(self.main(x)), self.short(x)], dim=1))


def lc_block(channels: int) -> nn.Sequential:
    """(B, 2C, y, x) -> (B, C, y, x): two depthwise separable convolutions.

    Source: LC-PAN, PaddleDetection @ v2.6.0.
    """
    return nn.Sequential(DepthSeparable(2 * channels, 2 * channels, 5), DepthSeparable(2 * channels, channels, 5))


NECKS = {"csp": CSPBlock, "lc": lc_block}


class PAN(nn.Module):
    """Neck: maps [C3, C4, C5] of strides 8, 16, 32 -> [P3, P4, P5, P6] of strides 8, 16, 32, 64.

    Information flows from coarse to fine maps (top-down), then from fine to coarse (bottom-up).

    Args:
        channels_in: channels of C3, C4, C5. channels: C, those of each output.
        block: C -> module (B, 2C, y, x) -> (B, C, y, x). It merges two concatenated maps.
    """

    def __init__(self, channels_in: tuple[int, int, int], channels: int, block: Callable[[int], nn.Module]):
        super().__init__()
        self.reduce = nn.ModuleList(conv_norm(c, channels) for c in channels_in)
        self.top_down = nn.ModuleList(block(channels) for _ in range(2))
        self.down = nn.ModuleList(DepthSeparable(channels, channels, 5, stride=2) for _ in range(2))
        self.bottom_up = nn.ModuleList(block(channels) for _ in range(2))
        self.extra_in = DepthSeparable(channels, channels, 5, stride=2)
        self.extra_out = DepthSeparable(channels, channels, 5, stride=2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        # C channels for each map
        t3, t4, t5 = (reduce(x) for reduce, x in zip(self.reduce, maps, strict=True))
        # Top-down, by nearest-neighbour upsampling
        m4 = self.top_down[0](torch.cat([F.interpolate(t5, size=t4.shape[2:]), t4], dim=1))
        p3 = self.top_down[1](torch.cat([F.interpolate(m4, size=t3.shape[2:]), t3], dim=1))
        # Bottom-up
        p4 = self.bottom_up[0](torch.cat([self.down[0](p3), m4], dim=1))
        p5 = self.bottom_up[1](torch.cat([self.down[1](p4), t5], dim=1))
        p6 = self.extra_in(t5) + self.extra_out(p5)
        return [p3, p4, p5, p6]


# ---- head and detector ---------------------------------------------------------------------------


class Head(nn.Module):
    """PicoDet's first head: maps [(B, C, y, x)] -> logits (B, P, K) of classes, bins (B, P, 4, 8).

    The bins are logits of four distributions: of the distances from the point to the left, top,
    right and bottom side of its box. Each level has its own convolutions (a tower) and its own 1x1
    convolution, which gives both outputs.
    """

    def __init__(self, channels: int, convs: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.towers = nn.ModuleList(
            nn.Sequential(*(DepthSeparable(channels, channels, 5) for _ in range(convs))) for _ in STRIDES
        )
        self.predict = nn.ModuleList(nn.Conv2d(channels, num_classes + 4 * BINS, 1) for _ in STRIDES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        for layer in self.predict:
            # Each class starts at 1%. The softmax of the bins ignores a common constant.
            nn.init.constant_(layer.bias, -math.log(99))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        layers = zip(self.predict, self.towers, maps, strict=True)
        out = torch.cat([predict(tower(x)).flatten(2).mT for predict, tower, x in layers], dim=1)
        logits, bins = out.split([self.num_classes, 4 * BINS], dim=-1)  # out: (B, P, K + 32)
        return logits, bins.unflatten(-1, (4, BINS))


def make_points(sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Points (P, 3) of feature maps, level by level and row by row: x, y, stride in pixels.

    Args: sizes: (y, x) of each level's map, in cells.
    """
    points = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y = (torch.arange(height, device=device) + 0.5) * stride
        x = (torch.arange(width, device=device) + 0.5) * stride
        x, y = x.expand(height, width), y[:, None].expand(height, width)
        points.append(torch.stack([x, y, torch.full_like(x, stride)], dim=-1).flatten(0, 1))
    return torch.cat(points)


def decode(bins: Tensor, points: Tensor) -> Tensor:
    """Boxes (B, P, 4), from bins (B, P, 4, 8) and points (P, 3).

    The distance from a point to a side of its box is the mean of a distribution, times the stride.
    """
    steps = torch.arange(BINS, dtype=bins.dtype, device=bins.device)
    # A matrix product would be shorter, but autocast would round it.
    distance = (bins.softmax(dim=-1) * steps).sum(-1)                                 # (B, P, 4)
    centre, stride = points[:, :2], points[:, 2:]
    return torch.cat([centre - stride * distance[..., :2], centre + stride * distance[..., 2:]], dim=-1)


class Detector(nn.Module):
    """Normalised pixels (B, 3, H, W) -> logits (B, P, K), bins (B, P, 4, 8), points (P, 3).

    See `Head` and `make_points`. `detections` turns them into boxes.
    """

    def __init__(self, backbone: ConvBackbone, neck: str, channels: int, convs: int, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.neck = PAN(backbone.channels, channels, look_up(NECKS, neck, "neck"))
        self.head = Head(channels, convs, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.neck(self.backbone(x))
        logits, bins = self.head(maps)
        return logits, bins, make_points([(p.shape[2], p.shape[3]) for p in maps], x.device)


def build_detector(
    name: str,
    attention: str = "castling",
    num_classes: int = 80,
    image_size: int | tuple[int, int] = 320,
    **overrides,
) -> Detector:
    """A detector by its backbone's name, randomly initialised.

    Args:
        name: a key of DETECTORS.
        attention: as in `build_model`.
        num_classes: K.
        image_size: pixels. No weight depends on it, but all builders have this argument.
        overrides: options of `build_model`, or neck ("csp" or "lc"), channels, convs (see SIZES).
    Raises: ValueError for num_classes below 1, or an unknown name, attention or override. It
        suggests known names.
    """
    row = look_up(DETECTORS, name, "detector")
    row = row | {key: overrides.pop(key) for key in row.keys() & overrides.keys()}
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return Detector(build_model(name, attention, image_size=image_size, **overrides), **row, num_classes=num_classes)


# ---- assignment and losses -----------------------------------------------------------------------


def varifocal_elements(logits: Tensor, targets: Tensor, *, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """Varifocal loss of each logit, in any shape.  VarifocalNet, arXiv:2008.13367, Eq. (2)

    It is the binary cross entropy of p = sigmoid(logit) to a target q in 0..1. Its weight is q, or
    alpha p^gamma where q = 0. Here the weight has a gradient too, as in PicoDet.
    """
    weight = torch.where(targets > 0, targets, alpha * logits.sigmoid() ** gamma)
    return weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


@torch.no_grad()
def simota(
    logits: Tensor, boxes: Tensor, points: Tensor, gt_boxes: Tensor, gt_labels: Tensor,
    *, radius: float = 2.5, top: int = 10, iou_weight: float = 6.0,
) -> Tensor:
    """SimOTA: which ground-truth box each point of one image has to predict.

    A candidate is a point inside some box, or near the centre of one: within `radius` strides in x
    and in y. The cost of a candidate for a box is the varifocal loss plus `iou_weight` (1 - GIoU).
    Each box takes k candidates. Those that are both inside the box and near its centre come first,
    and then those of least cost. k is the sum of its `top` largest IoUs with candidates, rounded
    down, and at least 1. If several boxes take a point, the same order decides between all boxes.
    So the point may go to a box that did not take it.

    Args:
        logits: (P, K). boxes: (P, 4), as predicted. points: (P, 3).
        gt_boxes: (G, 4). gt_labels: (G,).
    Returns: (P,), an index into gt_boxes, or -1 for background.
    Source: YOLOX, arXiv:2107.08430; PicoDet, arXiv:2111.00902, section 3.3, for the varifocal cost.
    """
    matched = torch.full((len(points),), -1, device=points.device)
    # The candidates: points inside a box, or near its centre.
    centre, stride = points[:, None, :2], points[:, None, 2:]                 # (P, 1, 2), (P, 1, 1)
    sides = torch.cat([centre - gt_boxes[:, :2], gt_boxes[:, 2:] - centre], dim=-1)   # (P, G, 4)
    inside = sides.amin(-1) > 0                                                       # (P, G)
    middle = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    near = ((centre - middle).abs() < radius * stride).all(-1)                        # (P, G)
    candidates = (inside | near).any(1).nonzero()[:, 0]                               # (V,)
    if len(candidates) == 0:
        return matched
    logits, boxes, inside, near = (x[candidates] for x in (logits, boxes, inside, near))
    iou = box_iou(boxes, gt_boxes)                                                    # (V, G)
    # The cost of every pair. In its varifocal loss the target of the box's class is their IoU, and
    # that of all other classes is 0.
    background = varifocal_elements(logits, torch.zeros_like(logits))                 # (V, K)
    own = logits[:, gt_labels]                                                        # (V, G)
    cost = background.sum(1, keepdim=True) - background[:, gt_labels] + varifocal_elements(own, iou)
    cost = cost + iou_weight * (1 - generalized_box_iou(boxes, gt_boxes))
    # Points that are not both inside and near come last. In float32 the cost would vanish in 1e8.
    cost = cost.double() + 1e8 * ~(inside & near)

    # Each box takes its cheapest candidates. A point that several boxes take goes to the cheapest.
    counts = iou.topk(min(top, len(iou)), dim=0).values.sum(0).int().clamp_min(1)     # (G,), k
    cheapest = cost.topk(int(counts.max()), dim=0, largest=False).indices             # (k, G)
    first = torch.arange(len(cheapest), device=cost.device)[:, None] < counts
    taken = torch.zeros_like(cost, dtype=torch.bool).scatter_(0, cheapest, first)     # (V, G)
    choice = torch.where(taken.sum(1) > 1, cost.argmin(1), taken.int().argmax(1))
    matched[candidates] = torch.where(taken.any(1), choice, -1)
    return matched


def distribution_focal_elements(bins: Tensor, targets: Tensor) -> Tensor:
    """Distribution focal loss: (..., 8) bins, (...) targets -> (...).

    A target is a real number, 0 <= target < 7. The loss is the cross entropy to the two bins beside
    it. The nearer bin has the larger weight, and the weights sum to 1.
    Source: Generalized Focal Loss, arXiv:2006.04388, Eq. (6).
    """
    log_p, lower = bins.log_softmax(dim=-1), targets.long()[..., None]
    upper_share = targets - lower[..., 0]
    at = lambda index: log_p.gather(-1, index)[..., 0]  # noqa: E731
    return -(1 - upper_share) * at(lower) - upper_share * at(lower + 1)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU (N,) of each box of a, (N, 4), with the box in the same row of b, (N, 4)."""
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return overlap / (area_a + area_b - overlap).clamp_min(1e-7)


def detection_losses(
    logits: Tensor, bins: Tensor, points: Tensor, targets: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The three losses of a batch, with their weights. Training minimises their sum.

    A point is positive if `simota` gives it a ground-truth box. Losses are computed in float32.

    Args:
        logits: (B, P, K). bins: (B, P, 4, 8). points: (P, 3).
        targets: boxes (G, 4) and labels (G,) of each image. G may be 0.
    Returns: three numbers:
        cls: varifocal loss of all points, divided by the number of positive points. An image without
            positive points counts as one.
        box, dfl: GIoU loss and distribution focal loss of positive points, averaged with the largest
            class score of each as its weight. The sum of these weights counts as at least 1.
    Source: Picodet_Pytorch, mmdet/models/dense_heads/pico_head.py; PaddleDetection @ v2.6.0,
        pico_head.py.
    """
    logits, bins, points = logits.float(), bins.float(), points.float()
    targets = [(gt_boxes.float(), gt_labels) for gt_boxes, gt_labels in targets]
    # Match points to ground-truth boxes. Keep what belongs to the N positive points of the batch.
    boxes = decode(bins, points)                                                      # (B, P, 4)
    matched = torch.stack([
        simota(logits[i], boxes[i], points, *target) for i, target in enumerate(targets)
    ])  # fmt: skip                                                               (B, P)
    positive = matched >= 0
    gt_boxes = torch.cat([gt[m[m >= 0]] for m, (gt, _) in zip(matched, targets, strict=True)])
    gt_labels = torch.cat([gt[m[m >= 0]] for m, (_, gt) in zip(matched, targets, strict=True)])
    boxes, bins, points = boxes[positive], bins[positive], points.expand(len(logits), -1, -1)[positive]

    # Varifocal loss. Its target is the IoU with the matched box in the class of that box, else 0.
    # `varifocal_elements` takes 0 as background. So the IoU is at least 1e-6.
    quality = torch.zeros_like(logits)
    image, point = positive.nonzero(as_tuple=True)
    quality[image, point, gt_labels] = paired_iou(boxes.detach(), gt_boxes).clamp_min(1e-6)
    # The divisors `count` and `total` are means over all processes. DistributedDataParallel takes
    # the mean of gradients. So the result is the gradient of one process with all images.
    count = mean_over_ranks(logits.device, positive.sum(1).clamp_min(1).sum())[0]
    losses = dict(cls=varifocal_elements(logits, quality).sum() / count)

    # GIoU loss
    weight = logits.detach()[positive].sigmoid().amax(-1)                             # (N,)
    total = max(1.0, mean_over_ranks(logits.device, weight.sum())[0])
    giou = generalized_box_iou_loss(boxes, gt_boxes, eps=1e-7)
    losses["box"] = BOX_WEIGHT * (weight * giou).sum() / total
    # Distribution focal loss of the four distances, in strides
    centre, stride = points[:, :2], points[:, 2:]
    sides = torch.cat([centre - gt_boxes[:, :2], gt_boxes[:, 2:] - centre], dim=-1) / stride
    dfl = distribution_focal_elements(bins, sides.clamp(0, BINS - 1 - 0.1)).mean(-1)
    losses["dfl"] = BINS_WEIGHT * (weight * dfl).sum() / total
    return losses


# ---- from outputs to boxes -----------------------------------------------------------------------


@torch.no_grad()
def detections(
    logits: Tensor, bins: Tensor, points: Tensor, size: tuple[int, int],
    original: tuple[int, int] | None = None, *, min_score: float = MIN_SCORE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The objects found in one image: boxes (n, 4), scores (n,) and labels (n,), best first.

    A point may give several objects, each of another class. n is at most MAX_BOXES.

    Args:
        logits: (P, K). bins: (P, 4, 8). points: (P, 3).
        size: (H, W) of the model's input. Boxes are clipped to it.
        original: (H, W) of the image before resizing. Boxes are in its pixels. Default `size`.
        min_score: objects have a score above it, 0..1.
    Returns: tensors on the CPU.
    """
    logits, bins = logits.float(), bins.float()
    boxes, scores = decode(bins, points), logits.sigmoid()
    # The best scores of each level
    kept = []  # indices into the P K scores
    for stride in STRIDES:
        level = (points[:, 2:] == stride) & (scores > min_score)                      # (P, K)
        index = level.flatten().nonzero()[:, 0]
        kept.append(index[scores.flatten()[index].topk(min(LEVEL_TOP, len(index))).indices])
    kept = torch.cat(kept)
    scores, labels = scores.flatten()[kept], kept % logits.shape[1]
    boxes = clip_boxes_to_image(boxes[kept // logits.shape[1]], size)
    # Of boxes that overlap in a class, the best one
    best = batched_nms(boxes, scores, labels, NMS_IOU)[:MAX_BOXES]
    boxes, scores, labels = (x[best].cpu() for x in (boxes, scores, labels))
    (height, width), (full_height, full_width) = size, original or size
    return boxes * torch.tensor([full_width / width, full_height / height] * 2), scores, labels


class Boxes(nn.Module):
    """The graph that `--export` writes: normalised pixels (B, 3, H, W) -> boxes and scores.

    Boxes (B, P, 4) are xyxy in pixels, and scores (B, P, K) in 0..1. All points are there. Remove
    low scores and overlaps yourself, as `detections` does.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, bins, points = self.detector(x)
        return decode(bins, points), logits.sigmoid()


# ---- data: COCO files and rendered scenes --------------------------------------------------------


def within(low: float, high: float = 1e10, kind: type = int | float) -> Callable:
    """A check: is a value a number within low..high? True and False are not numbers here.

    COCO's metrics ignore areas above 1e10.
    """
    return lambda value: isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


coordinate = within(-1e10)
AN_ID = (within(1 - 2**63, 2**63 - 1, int), "an integer of 64 bits")  # a check, and what it expects
A_TEXT = (lambda value: isinstance(value, str), "a text")
A_SIDE = (within(1), "a number of pixels within 1..1e10")
AN_AREA = (within(0), "a number within 0..1e10 (COCO's metrics ignore larger areas)")
A_BOX = (
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(coordinate, value)),
    "four numbers within -1e10..1e10: x, y, width, height",
)
A_SWITCH = (lambda value: value in (0, 1), "0 or 1")
COCO_FIELDS = {  # the lists of an annotation file, and the fields of their records
    "images": dict(id=AN_ID, file_name=A_TEXT, width=A_SIDE, height=A_SIDE),
    "categories": dict(id=AN_ID, name=A_TEXT),
    "annotations": dict(id=AN_ID, image_id=AN_ID, category_id=AN_ID, bbox=A_BOX, area=AN_AREA, iscrowd=A_SWITCH),
}
# Values of fields that a record may lack
OPTIONAL = {"area": lambda row: max(0, row["bbox"][2]) * max(0, row["bbox"][3]), "iscrowd": lambda row: 0}


def read_annotations(path: Path) -> dict:
    """The content of a COCO annotation file.

    Raises: ValueError that names the file, and the record and field that are wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # RecursionError: lists nested too deep
        raise ValueError(f"cannot read {path} as JSON: {error}") from None
    for part, fields in COCO_FIELDS.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} has no list of records {part!r}: COCO's files have {', '.join(COCO_FIELDS)}")
        for i, row in enumerate(rows):
            for name, (fits, expected) in fields.items():
                if name not in row and name in OPTIONAL:
                    row[name] = OPTIONAL[name](row)
                if name not in row:
                    hint = ", only a segmentation, but detection needs boxes" if "segmentation" in row else ""
                    raise ValueError(f"{path}: {part}[{i}] has no {name!r}{hint}")
                if not fits(row[name]):
                    found = reprlib.repr(row[name])  # shortened
                    raise ValueError(f"{path}: in {part}[{i}] {name!r} is {found}, expected {expected}")
        key, times = Counter(row["id"] for row in rows).most_common(1)[0] if rows else (None, 1)
        if times > 1:
            raise ValueError(f"{path}: {part} has {times} records with the same 'id' {key}")
    for part, name in (("images", "image_id"), ("categories", "category_id")):
        known = {row["id"] for row in content[part]}
        for row in content["annotations"]:
            if row[name] not in known:
                raise ValueError(f"{path}: annotation {row['id']} has {name!r} {row[name]}, but no record in "
                                 f"{part} has that id")  # fmt: skip
    return content


class CocoFolder(Dataset):
    """Images and boxes of one COCO annotation file, with the file's own classes.

    Items are as `make_item` gives them. Their boxes are clipped to the image. Boxes without area
    are left out, and so are crowds (boxes around a group of objects). For training, images without
    a box are left out too. `ground_truth` has all boxes as the file has them.

    Args:
        annotations: the file. training: whether the set is for training.
        images: the folder of the images. File names may also be relative to the folder above it.
    Attributes: `classes`, [{"id", "name"}] in the order of ids: a label is an index into it;
        `dropped`, how many boxes without area a training set has left out.
    Raises: ValueError for an error in the file, a missing image, or a file without boxes to find.
    """

    def __init__(self, annotations: Path, images: Path, training: bool):
        content = read_annotations(annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = [{"id": category["id"], "name": category["name"]} for category in categories]
        labels = {category["id"]: label for label, category in enumerate(self.classes)}
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        self.targets, self.annotations, self.dropped = {key: ([], []) for key in sizes}, [], 0
        for row in content["annotations"]:
            if not training:
                self.annotations.append({field: row[field] for field in COCO_FIELDS["annotations"]})
            (x, y, width, height), (right, bottom) = row["bbox"], sizes[row["image_id"]]
            box = max(0, x), max(0, y), min(right, x + width), min(bottom, y + height)
            if box[2] <= box[0] or box[3] <= box[1]:
                self.dropped += training
                continue
            if not row["iscrowd"]:
                boxes, kinds = self.targets[row["image_id"]]
                boxes.append(box)
                kinds.append(labels[row["category_id"]])
        if not any(boxes for boxes, _ in self.targets.values()):
            raise ValueError(f"{annotations} has no boxes to find: crowds, and boxes without area, do not count")
        self.images = [image for image in content["images"] if self.targets[image["id"]][0] or not training]
        # One listing is faster than a question for each of 100,000 files.
        there = set(os.listdir(images)) if images.is_dir() else set()
        names = [image["file_name"] for image in self.images]
        self.paths = [
            next((path for path in (images / name, images.parent / name) if name in there or path.is_file()), None)
            for name in names
        ]
        missing = [name for name, path in zip(names, self.paths, strict=True) if path is None]
        if missing:
            raise ValueError(f"{images} lacks {len(missing)} of the images in {annotations}, such as {missing[0]}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        row, path = self.images[index], self.paths[index]
        image = v2.functional.pil_to_tensor(read_image(path))
        if image.shape[1:] != (row["height"], row["width"]):
            raise DataError(
                f"{path} has {image.shape[2]} x {image.shape[1]} pixels before any EXIF rotation, but its "
                f"annotations say {row['width']} x {row['height']}"
            )
        return make_item(image, *self.targets[row["id"]], row["id"])

    def ground_truth(self) -> dict:
        """Images, boxes and classes of the file, as COCO's metrics read them. Not for training."""
        images = [{"id": row["id"]} for row in self.images]
        return dict(images=images, annotations=self.annotations, categories=self.classes)


class SceneBoxes(Scenes):
    """Rendered scenes with their boxes, as `make_item` gives them."""

    classes = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]

    def __getitem__(self, index: int) -> dict:
        scene = self.scene(index)
        return make_item(torch.from_numpy(scene.image).permute(2, 0, 1), scene.boxes, scene.labels, index)

    def ground_truth(self) -> dict:
        """Images, boxes and classes of all scenes, as COCO's metrics read them."""
        annotations = []
        for index in range(len(self)):
            scene = self.scene(index)
            for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
                box = [x1, y1, x2 - x1, y2 - y1]
                row = dict(id=len(annotations) + 1, image_id=index, category_id=self.classes[label]["id"])
                annotations.append(row | dict(bbox=box, area=box[2] * box[3], iscrowd=0))
        return dict(images=[{"id": i} for i in range(len(self))], annotations=annotations, categories=self.classes)


def make_item(image: Tensor, boxes, labels, image_id: int) -> dict:
    """An item of a data set: image (3, H, W) uint8, boxes (G, 4), labels (G,), image_id, size.

    `size` is (H, W). It stays when the image is resized later.
    """
    size = tuple(image.shape[1:])
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return dict(
        image=tv_tensors.Image(image),
        boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        labels=torch.as_tensor(labels, dtype=torch.int64),
        image_id=image_id,
        size=size,
    )


class Resized(Augmented):
    """The items of `base`, augmented if a transform is given, then resized to a square.

    The aspect ratio is not kept. A key is (epoch, index, side of the square in pixels). The random
    numbers of an item depend on (seed, epoch, index) only.
    """

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        epoch, index, side = key
        item = self.base[index]
        if self.transform is not None:
            with seeded(self.seed, epoch, index):
                item = self.transform(item)
        return v2.Resize((side, side), antialias=False)(item)


def collate(items: list[dict]) -> tuple[Tensor, list[dict]]:
    """Images (B, 3, S, S) uint8, and the rest of each item. Images and boxes are plain tensors."""
    images = torch.stack([item.pop("image").as_subclass(Tensor) for item in items])
    return images, [item | {"boxes": item["boxes"].as_subclass(Tensor)} for item in items]


class CropWithBoxes(v2.RandomIoUCrop):
    """RandomIoUCrop that leaves images without boxes, and very small ones, as they are."""

    def forward(self, item: dict) -> dict:
        large = min(item["image"].shape[1:]) * self.min_scale >= 1
        return super().forward(item) if large and len(item["boxes"]) else item


def augmentation(augment: bool) -> Callable:
    """Random flips; with `augment` also random crops and changes of colour.

    A crop keeps at least one box. Brightness, contrast, saturation and hue each change in half of
    the images, in a random order. At last, boxes below one pixel in width or height are removed.
    Source: PaddleDetection @ v2.6.0, RandomCrop and RandomDistort.
    """
    steps = [v2.RandomHorizontalFlip()]
    if augment:
        steps = [
            CropWithBoxes(min_scale=0.3, max_scale=1.0, min_aspect_ratio=0.5, max_aspect_ratio=2.0, trials=50,
                          sampler_options=[0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
            *steps,
            v2.RandomOrder([v2.RandomApply([v2.ColorJitter(**{what: x})], p=0.5) for what, x in
                            dict(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.07).items()]),
        ]  # fmt: skip
    return v2.Compose([*steps, v2.SanitizeBoundingBoxes(min_size=1)])


class ScaleSampler(EpochSampler):
    """Gives (epoch, index, side). All images of a step have the same side, on all processes.

    The side is a random one of `sides`. It depends on (seed, epoch, step) only.
    """

    def __init__(self, length: int, *, sides: list[int], per_step: int, **order):
        """per_step: how many images this process takes in one optimiser step."""
        super().__init__(length, **order)
        self.sides, self.per_step = sides, per_step

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for position, (epoch, index) in enumerate(super().__iter__(), self.start):
            if position % self.per_step == 0:
                drawn = random.Random(mixed_seed(self.seed or 0, epoch, position // self.per_step))
                side = drawn.choice(self.sides)
            yield epoch, index, side


def coco_files(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of the split "train" or "val" in a COCO folder.

    Raises: ValueError unless there is one file for the split, or one for 2017 among several.
    """
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    found = [path for path in found if path.stem.endswith("2017")] or found
    if len(found) != 1:
        what = "several" if found else "no"
        raise ValueError(f"{root}/annotations has {what} files instances_{split}*.json: expected one file, "
                         f"or instances_{split}2017.json among several")  # fmt: skip
    name = found[0].stem.removeprefix("instances_")
    folders = [root / name, root / "images" / name]
    return found[0], next((folder for folder in folders if folder.is_dir()), folders[0])


def open_split(args: argparse.Namespace, split: str) -> Dataset:
    """The split "train" or "val" of the data that flags name: SceneBoxes or CocoFolder.

    Raises: ValueError for unknown data, an error in the files, or a missing COCO library.
    """
    coco_library()
    if args.data == "shapes":
        length = args.shapes_length if split == "train" else max(1, args.shapes_length // 15)
        return SceneBoxes(split, length, args.image_size, args.seed)
    if not Path(args.data).is_dir():
        raise ValueError(f"unknown data {args.data!r}: expected shapes, or a folder with "
                         "annotations/instances_train*.json")  # fmt: skip
    annotations, images = coco_files(Path(args.data), split)
    dataset = CocoFolder(annotations, images, training=split == "train" and not args.eval)
    if dataset.dropped:
        say(f"{annotations}: left out {dataset.dropped} boxes without area or outside their image", sys.stderr)
    return dataset


# ---- evaluation ----------------------------------------------------------------------------------

# COCO's names: mean AP, AP at IoU 0.5 and 0.75, AP of small, medium and large objects
STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def coco_library() -> tuple[type, type]:
    """The classes COCO and COCOeval of faster-coco-eval. ValueError if it is not installed."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise ValueError("evaluation needs faster-coco-eval: pip install faster-coco-eval") from None
    return COCO, COCOeval_faster


def coco_metrics(ground_truth: dict, results: list[dict]) -> dict:
    """COCO's box metrics, {name of STATISTICS: percent, or None without such objects}.

    Args:
        ground_truth: COCO's {"images", "annotations", "categories"}.
        results: the objects found, [{"image_id", "category_id", "bbox", "score"}]; bbox is x, y,
            width, height.
    """
    COCO, Evaluator = coco_library()
    # The evaluators store the id of a matched annotation, or 0 for "no match". So no id may be 0.
    truths = [row | dict(id=i + 1) for i, row in enumerate(ground_truth["annotations"])]
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = ground_truth | {"annotations": truths}
        found.dataset = ground_truth | {"annotations": [
            row | dict(id=i + 1, area=row["bbox"][2] * row["bbox"][3], iscrowd=0) for i, row in enumerate(results)
        ]}  # fmt: skip
        truth.createIndex()
        found.createIndex()
        evaluator = Evaluator(truth, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats = [float(value) for value in evaluator.stats[:6]]
    return {name: 100 * value if value >= 0 else None for name, value in zip(STATISTICS, stats, strict=True)}


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, args: argparse.Namespace, device: torch.device) -> dict:
    """COCO's metrics over the whole set, as `coco_metrics` gives them. All processes call this.

    The processes share the images, and each image is counted once. Rank 0 writes the boxes to
    coco_results.json in COCO's format, those of a castled model to coco_results_castled.json.
    """
    model.eval()
    dataset, found = loader.dataset.base, []
    # Find boxes in this process's share of the images.
    for images, targets in loader:
        with autocast(args, device):
            logits, bins, points = model(to_model_input(images, device, args.channels_last))
        size = images.shape[2:]
        for i, target in enumerate(targets):
            boxes, scores, labels = detections(logits[i], bins[i], points, size, target["size"])
            boxes[:, 2:] -= boxes[:, :2]                                     # x, y, width, height
            found += [
                dict(image_id=target["image_id"], category_id=dataset.classes[label]["id"], bbox=box, score=score)
                for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
            ]
    # Rank 0 collects the boxes of all processes and computes the metrics.
    parts = [found]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
    metrics = [None]
    if rank() == 0:
        results = sorted((row for part in parts for row in part), key=lambda row: row["image_id"])
        castled = args.attention == "castling" and not any(core.auxiliary for core in cores(model).values())
        run.rewrite(Path(args.output) / f"coco_results{'_castled' if castled else ''}.json", json.dumps(results))
        metrics = [coco_metrics(dataset.ground_truth(), results)]
    if dist.is_initialized():
        dist.broadcast_object_list(metrics, 0)
    return metrics[0]


# ---- training ------------------------------------------------------------------------------------


def learning_rate(args: argparse.Namespace, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (0-based): a linear warm-up, then a cosine to 0.

    The warm-up starts at a tenth of the peak. The cosine spans the whole run, so it takes over a
    little below the peak.
    """
    peak = args.lr * args.global_batch / LR_BATCH
    if step < args.warmup_steps:
        return peak * (0.1 + 0.9 * step / args.warmup_steps)
    return peak * (1 + math.cos(math.pi * step / total_steps)) / 2


def make_model(args: argparse.Namespace, num_classes: int, image_size: int) -> Detector:
    """The detector that the flags describe. Raises ValueError as `build_detector` does."""
    options = run.core_options(args)
    model = build_detector(args.model, args.attention, num_classes, image_size, **options)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train, with a checkpoint and a line of the log per epoch. Then print the castling report."""
    with run.checked(args):  # a mistake in flags or files ends the script here, with one line
        # Data
        resolve(args)
        train_set, val_set = open_split(args, "train"), open_split(args, "val")
        run.same_classes(train_set.classes, val_set.classes, f"train and val of {args.data}")
        steps_per_epoch, total_steps = run.epoch_and_run(args, len(train_set))
        args.warmup_steps = min(args.warmup_steps, total_steps // 10)
        check_sides(args)

        # Model, averaged weights and optimiser
        torch.manual_seed(args.seed)  # the same first weights on every process
        model = make_model(args, len(train_set.classes), args.image_size)
        run.start_from(model, args, partial(load_pretrained, class_layers=("head.predict.",)))
        if args.backbone and run.begins_anew(args):
            say(f"{args.backbone}\n{load_pretrained(model.backbone, args.backbone)}")
        model.to(device)
        ema = run.averaged(model, args.ema_decay)
        # All parameters decay, those of norms too, as in Picodet_Pytorch.
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=args.weight_decay)

        # Batches, and the state of the run
        sampler = ScaleSampler(
            len(train_set), seed=args.seed, multiple=args.global_batch, rank=rank(), world=world_size(),
            sides=[args.image_size + 32 * i for i in range(-args.multi_scale, args.multi_scale + 1)],
            per_step=args.batch_size * args.accumulate,
        )  # fmt: skip
        augmented = Resized(train_set, augmentation(args.augment), args.seed)
        train_loader = make_loader(augmented, sampler, args.batch_size, args.workers, collate)
        val_loader = validation_loader(args, val_set)
        state = run.Run(
            args, train_set.classes, model, ema, optimizer, train_loader, device,
            steps_per_epoch=steps_per_epoch, total_steps=total_steps, metrics=METRICS,
        )  # fmt: skip

    net = run.parallel(model, args, device)
    with state:
        state.bar.say(run.describe(state, describe_recipe(args), val_set))
        for epoch in state.epochs():
            begins = state.step == epoch * steps_per_epoch
            if begins and args.ema_reset and epoch % args.ema_reset == 0:
                ema.n_averaged.zero_()             # PaddleDetection @ v2.6.0, ModelEMA, cycle_epoch
            net.train()
            for batches in state.steps(train_loader):
                # Gradients, summed over the batches of the step
                set_threshold(model, state.progress)                                  # Eq. (10), D4
                lr = run.set_lr(optimizer, learning_rate(args, state.step, total_steps))
                loss = torch.zeros((), device=device)
                for i, (images, targets) in enumerate(batches):
                    net.require_backward_grad_sync = i == len(batches) - 1    # DDP: once a step
                    images = to_model_input(images, device, args.channels_last)
                    targets = [(t["boxes"].to(device), t["labels"].to(device)) for t in targets]
                    with autocast(args, device):
                        outputs = net(images)
                    part = sum(detection_losses(*outputs, targets).values()) / len(batches)
                    state.scaler.scale(part).backward()
                    loss += part.detach()

                # Weights and averaged weights; NaN stops every process before that
                state.update(loss, lr)

            metrics = {}
            if state.evaluation_due():                                     # with and without branch
                metrics = run.evaluate_castling(lambda m: evaluate(m, val_loader, args, device), ema.module, "AP")
            state.log(metrics)
        state.report()


def check_sides(args: argparse.Namespace) -> None:
    """Raise ValueError for images below 32 px, or whose coarsest map gives BatchNorm one value."""
    least = 32 + 32 * args.multi_scale
    if args.image_size < least:
        raise ValueError(f"--image-size must be at least {least} with --multi-scale {args.multi_scale}, got "
                         f"{args.image_size}")  # fmt: skip
    if args.batch_size == 1 and args.image_size - 32 * args.multi_scale <= STRIDES[-1]:
        raise ValueError(f"BatchNorm needs --batch-size 2 or more if images have {STRIDES[-1]} px or less per side; "
                         f"with --multi-scale {args.multi_scale} the smallest have "
                         f"{args.image_size - 32 * args.multi_scale}")  # fmt: skip


def validation_loader(args: argparse.Namespace, val_set: Dataset) -> DataLoader:
    """This process's share of the validation set, at --image-size."""
    sampler = ScaleSampler(len(val_set), sides=[args.image_size], per_step=1, rank=rank(), world=world_size())
    return make_loader(Resized(val_set, None, args.seed), sampler, args.batch_size, args.workers, collate)


def describe_recipe(args: argparse.Namespace) -> str:
    """Optimiser, learning rate and augmentation, as a run prints them."""
    a = args
    peak = f"{a.lr * a.global_batch / LR_BATCH:.4g} (--lr {a.lr} x {a.global_batch} / {LR_BATCH} images)"
    reset = f"the average of the weights starts anew every {a.ema_reset} epochs\n" if a.ema_reset else ""
    limit = f", gradient norm at most {a.clip_grad}" if a.clip_grad else ""
    changes = "random crops, flips and colours" if a.augment else "random flips"
    sides = f"{a.image_size} +- {32 * a.multi_scale}" if a.multi_scale else a.image_size
    return f"""optimiser: SGD, weight decay {a.weight_decay}{limit}
learning rate: {a.warmup_steps} steps of warm-up to {peak}, then a cosine to 0
{reset}augmentation: {changes}; images of {sides} px"""


# ---- drawing -------------------------------------------------------------------------------------


def draw_boxes(image: Image.Image, rows: list[dict], colours: list[str]) -> Image.Image:
    """The image with boxes and their labels. A small image is enlarged.

    A label is above its box. If there is no room, it is below, else inside at the top.

    Args:
        rows: [{"label", "score", "box"}], best first. A box is xyxy in pixels of the image.
        colours: the colour of each box.
    """
    image, factor = run.magnified(image)
    draw, size = ImageDraw.Draw(image), max(12, min(image.size) // 32)
    font, line = ImageFont.load_default(size), max(2, size // 8)
    for row, colour in reversed([*zip(rows, colours, strict=True)]):  # the best last, on top
        x1, y1, x2, y2 = (factor * side for side in row["box"])
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        text = f"{row['label']} {row['score']:.2f}"
        width, height = draw.textlength(text, font) + 2 * line, size + 2 * line
        x = max(0, min(x1, image.width - width))
        y = next((y for y in (y1 - height, y2) if 0 <= y <= image.height - height), y1)
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + line, y + line), text, "white", font)
    return image


# ---- what is done with a checkpoint --------------------------------------------------------------


def load(args: argparse.Namespace, classes: list | None = None) -> tuple[Detector, list[dict]]:
    """The model in --checkpoint, in eval mode, and its classes [{"id", "name"}].

    If the file does not name its classes, they are `classes`, or else "class 1", "class 2" and so
    on.
    """
    trained = run.settings_for(args)
    resolve(args, trained)
    classes = trained.get("classes") or classes
    if classes is None:
        count = run.count_classes(args.checkpoint, [HEAD]) - 4 * BINS
        classes = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(count)]
    model = make_model(args, len(classes), trained.get("image_size") or args.image_size)
    return run.load_trained(model, args), classes


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """--eval: print the metrics of --checkpoint, with and without the auxiliary branch."""
    with run.checked(args):
        resolve(args, run.settings_for(args))
        val_set = open_split(args, args.split)
        model, classes = load(args, val_set.classes)
        run.same_classes(classes, val_set.classes, f"{args.checkpoint} and {args.data}")
        Path(args.output).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()  # can `evaluate` write its boxes there?
        loader = validation_loader(args, val_set)
    record = run.evaluate_castling(lambda m: evaluate(m, loader, args, device), model.to(device), "AP")
    run.print_evaluation(args, record, METRICS)


@torch.inference_mode()
def predict(args: argparse.Namespace, device: torch.device) -> None:
    """--image: draw the boxes of each file. With --json print them, and draw only into --output."""
    with run.checked(args):
        drawings = run.drawing_paths(args, "boxes")
        if args.data is None and not run.settings_for(args):
            args.data = "coco"  # not our checkpoint: the image size of photographs
        model, classes = load(args)
    model.to(device)
    size = (args.image_size, args.image_size)
    with run.json_list(args) as printed:
        for path, image in run.read_each(args.image):
            pixels = v2.functional.pil_to_tensor(image)
            resized = v2.functional.resize(pixels, size, antialias=False)
            with autocast(args, device):
                logits, bins, points = model(to_model_input(resized[None], device, args.channels_last))
            own = pixels.shape[1:]
            found = detections(logits[0], bins[0], points, size, own, min_score=args.min_score)
            boxes, scores, labels = (x.tolist() for x in found)
            rows = [
                dict(label=classes[label]["name"], score=score, box=box)
                for label, score, box in zip(labels, scores, boxes, strict=True)
            ]
            printed.append(dict(image=str(path), boxes=rows))
            if drawings:
                colours = [COLOURS[label % len(COLOURS)] for label in labels]
                run.write_image(draw_boxes(image, rows, colours), drawings[path])
            if not args.json:
                say(f"{path}: {len(rows)} boxes, drawn to {drawings[path]}")


# ---- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of detect.py. `resolve` fills in the flags that are None."""
    p = run.Parser(
        "detect.py", __doc__,
        epilog=f"""--model is one of {', '.join(DETECTORS)}; default lcnet_vit_s
--data is shapes, or a folder with annotations/instances_NAME.json and the images in NAME/ or images/NAME/;
NAME is train2017 and val2017, or train and val
--shapes-length: for validation there are 1/15 as many scenes
--image-size for a folder is by default 320 for S models, 416 for M and L
Eq. is an equation of the paper. D4, D7 and so on are explained in docs/departures.md.""",
    )  # fmt: skip
    recipe = run.shared_flags(p, DATA_DEFAULTS)
    add, on_off = recipe.add_argument, argparse.BooleanOptionalAction
    by_data = lambda flag: run.by_data(flag, DATA_DEFAULTS)  # noqa: E731
    add("--weight-decay", type=at_least(0, float), default=4e-5,
        help="weight decay of all parameters, those of norms too; default 4e-5, as in the paper")
    add("--warmup-steps", type=at_least(0), default=300,
        help="optimiser steps in which the learning rate rises; default 300, but at most a tenth of the run")
    add("--ema-decay", type=share, default=0.9998,
        help="decay per step of the averaged weights, which are the ones evaluated; default 0.9998")
    add("--ema-reset", type=at_least(0), default=40,
        help="number of epochs after which the average of the weights starts anew, 0 for never; default 40")
    add("--multi-scale", type=at_least(0),
        help="largest difference of the training images' side from --image-size, in units of 32 pixels; "
        f"the side is drawn for each step; {by_data('multi_scale')}")
    add("--augment", action=on_off,
        help=f"train on random crops and colours, besides random flips; {by_data('augment')}")
    add("--clip-grad", type=at_least(0, float), default=0.0,
        help="largest norm of the gradient over all parameters, 0 for no limit; default 0")
    add("--channels-last", action=on_off, default=True,
        help="keep images and weights in the memory order channels-last, which can be faster; default on")
    add("--backbone", help="file with a trained classifier, whose weights the backbone starts from; "
        "default: random weights")
    add = p.add_argument_group("boxes").add_argument
    add("--min-score", type=share, default=0.3,
        help="--image draws and prints boxes with a score above this, 0..1; default 0.3")
    return p


def resolve(args: argparse.Namespace, trained: dict | None = None) -> None:
    """Fill in flags that were not given: from `trained`, a checkpoint's settings, else from tables.

    Raises: ValueError for an unknown --model.
    """
    run.take_over(args, trained or {})
    args.model = args.model or "lcnet_vit_s"
    look_up(DETECTORS, args.model, "detector")
    sides = dict(image_size=320 if args.model.endswith("_s") else 416)
    run.fill_in(args, sides | DATA_DEFAULTS["shapes" if args.data in (None, "shapes") else "coco"])


def main(args: argparse.Namespace) -> None:
    fast.enable()
    with run.session(args) as (task, device):
        if task == "train":
            train(args, device)
        elif task == "eval":
            evaluate_checkpoint(args, device)
        elif task == "image":
            predict(args, device)
        else:
            with run.checked(args):
                model, _ = load(args)
            run.write_export(Boxes(model), args)


if __name__ == "__main__":
    main(parser().parse_args())
