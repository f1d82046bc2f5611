"""detect.py: the neck, COCO files, evaluation, and the script."""

import colorsys
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close

import convert
import detect
import run
from conftest import (
    DETECT_SMALL,
    ROOT,
    TINY_ESNET,
    TINY_LCNET,
    examples,
    in_group,
    records_of,
    refused,
    run_detect,
)
from data import SHAPES, DataError
from models import build_model
from test_castling import Calls, randn

COUNT_MACS = run.count_macs


@pytest.fixture(autouse=True)
def small_detectors(monkeypatch):
    """What the script builds has a quarter of its width, and its MACs are not counted: most tests have no use for
    them."""
    small, build = dict(lcnet_vit_s=TINY_LCNET, esnet_vit_s=TINY_ESNET, lcnet_s=dict(width=0.25)), detect.build_detector
    monkeypatch.setattr(detect, "build_detector", lambda name, *rest, **options: build(
        name, *rest, channels=16, convs=1, **small[name], **options))  # fmt: skip
    monkeypatch.setattr(run, "count_macs", lambda model, images: 1)


@pytest.mark.parametrize("sizes", [((8, 10), (4, 5), (2, 3)), ((7, 9), (4, 5), (2, 3))])
def test_neck_is_wired_as_published(sizes):
    """Each map reaches the others on the published ways, told apart by factors: upsampled or down-sampled map first in
    every concatenation, P5 from C5 as reduced, P6 from both C5 and P5; also where a side is odd."""
    neck = detect.PAN((2, 2, 2), 2, lambda channels: Calls(lambda x: x[:, :channels] + 10 * x[:, channels:]))
    halve = lambda factor: Calls(lambda x: factor * x[..., ::2, ::2])  # noqa: E731
    neck.reduce = nn.ModuleList(Calls(lambda x, factor=factor: factor * x) for factor in (1, 100, 10_000))
    neck.down, neck.extra_in, neck.extra_out = nn.ModuleList([halve(3), halve(5)]), halve(7), halve(11)
    c3, c4, c5 = (randn(1, 2, *size, seed=size[0]) for size in sizes)
    p3, p4, p5, p6 = neck([c3, c4, c5])
    up = lambda x, like: F.interpolate(x, size=like.shape[2:])  # noqa: E731
    t4, t5 = 100 * c4, 10_000 * c5
    m4 = up(t5, t4) + 10 * t4
    assert_close(p3, up(m4, c3) + 10 * c3)
    assert_close(p4, 3 * p3[..., ::2, ::2] + 10 * m4)
    assert_close(p5, 5 * p4[..., ::2, ::2] + 10 * t5)
    assert_close(p6, 7 * t5[..., ::2, ::2] + 11 * p5[..., ::2, ::2])


def test_first_guesses_are_as_published():
    """The head's filters start with a deviation of 0.01, and each class with a probability of 1% at
    every point: else the many points of background would rule the first steps' loss."""
    torch.manual_seed(0)
    head = detect.Head(32, convs=2, num_classes=80)
    for conv in (module for module in head.modules() if isinstance(module, nn.Conv2d)):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert abs(conv.weight.mean().item()) < 0.002
    logits, _ = head([randn(2, 32, side, side, dtype=torch.float32) for side in (8, 4, 2, 1)])
    shares = logits.sigmoid()
    assert shares.mean().item() == pytest.approx(0.01, rel=0.008)
    assert shares.min() > 0.007 and shares.max() < 0.014


def test_detections_keep_the_best():
    """Scores above the least, a point may have two classes, overlaps of a class go, boxes end at the image's border."""
    points = torch.tensor([[20.0, 20, 8], [21.0, 20, 8], [60.0, 60, 16]])
    logits = torch.tensor([[4.0, -9], [3.0, 2.0], [-1.0, -9]])
    bins = torch.full((3, 4, 8), -50.0)
    bins[..., 4] = 50.0  # every side 4 strides
    boxes, scores, labels = detect.detections(logits, bins, points, (64, 90))
    assert labels.tolist() == [0, 1, 0]
    assert_close(scores, torch.tensor([4.0, 2.0, -1.0]).sigmoid())
    assert_close(boxes, torch.tensor([[0.0, 0, 52, 52], [0.0, 0, 53, 52], [0.0, 0, 90, 64]]))
    many = detect.make_points([(32, 32), (0, 0), (0, 0), (0, 0)], "cpu")
    bins = torch.full((len(many), 4, 8), -50.0)
    bins[..., 0] = 50.0
    bins[..., 1] = 49.0
    assert len(detect.detections(torch.full((len(many), 2), 2.0), bins, many, (256, 256))[0]) == 100
    assert len(detect.detections(torch.full((len(many), 2), -5.0), bins, many, (256, 256))[0]) == 0


def test_each_level_gives_its_best(monkeypatch):
    """Before overlaps go, a level keeps its LEVEL_TOP best scores, however good those of other levels are."""
    monkeypatch.setattr(detect, "LEVEL_TOP", 1)
    x = 600 * torch.arange(8) + 300  # two points of each level, all far apart
    points = torch.stack([x, torch.full_like(x, 300), torch.tensor(detect.STRIDES).repeat(2)], dim=1).float()
    logits = torch.tensor([[9.0, 7, 5, 3, 8, 6, 4, 2]]).T
    bins = F.one_hot(torch.full((8, 4), 4), 8) * 50.0  # every side 4 strides
    assert_close(detect.detections(logits, bins, points, (600, 4800))[1], logits[:4, 0].sigmoid())


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    """Normalisers are averaged over ranks: the mean of two ranks' gradients is that of one process with all images,
    though one rank has many boxes and the other none."""
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import sys, torch; sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from detect import detection_losses, make_points
g = torch.Generator().manual_seed(0)
points = make_points([(8, 8), (4, 4), (2, 2), (1, 1)], "cpu")
logits = torch.randn(4, len(points), 3, generator=g).requires_grad_()
bins = torch.randn(4, len(points), 4, 8, generator=g).requires_grad_()
box = torch.tensor([[5., 5, 40, 40], [20., 10, 60, 60], [1, 30, 20, 60]])
none = (box[:0], torch.zeros(0).long())
targets = [(box, torch.tensor([0, 1, 2])), (box[:2], torch.tensor([2, 2])), none, none]
def gradients(part):
    losses = detection_losses(logits[part], bins[part], points, targets[part])
    return torch.autograd.grad(sum(losses.values()), (logits, bins))
whole = gradients(slice(0, 4))
dist.init_process_group("gloo")
for a, b in zip(whole, gradients(slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))):
    dist.all_reduce(b)
    assert (a - b / 2).abs().max() < 1e-6, (a - b / 2).abs().max()
dist.barrier(); dist.destroy_process_group()
""")
    assert in_group(2, lambda rank: exec(script.read_text(), {})) == [0, 0]


@pytest.fixture
def coco(tmp_path):
    """A COCO folder: 6 + 4 images of several sizes, classes 3 and 7, a crowd, an empty image; a function edits it."""
    root, rng = tmp_path / "coco", np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        (root / f"{split}2017").mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            width, height = 60 + 7 * i, 80 - 5 * i
            pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
            pixels[10:40, 20:50] = (250, 240, 60)
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{i}.jpg")
            images.append(dict(id=100 + i, file_name=f"{i}.jpg", width=width, height=height))
            if i > 0:  # the first image is empty
                row = dict(id=10 * i, image_id=100 + i, category_id=(3, 7)[i % 2], iscrowd=0)
                annotations.append(row | dict(bbox=[20, 10, 30, 30], area=800))
        annotations.append(dict(id=999, image_id=101, category_id=3, bbox=[0, 0, 50, 20], area=900, iscrowd=1))
        content = dict(images=images, annotations=annotations,
                       categories=[dict(id=7, name="kite"), dict(id=3, name="owl")])  # fmt: skip
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))

    def edit(change, split="train"):
        path = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    edit.root = root
    return edit


def detect_flags(*options):
    args = detect.parser().parse_args(list(options))
    detect.resolve(args)
    return args


def test_coco_folder_is_read(coco, capsys):
    """Labels are indices of classes by id; boxes are xyxy, clipped; crowds are no targets but known to evaluation;
    images without a target are left out of training only; what has no area is dropped and counted once."""
    coco(lambda c: c["annotations"].extend([
        dict(id=1, image_id=102, category_id=3, bbox=[50, 60, 500, 500]),     # partly outside
        dict(id=2, image_id=102, category_id=3, bbox=[500, 60, 5, 5]),        # wholly
        dict(id=3, image_id=102, category_id=3, bbox=[5, 6, -1, 5]),          # no area
    ]))  # fmt: skip
    args = detect_flags(f"--data={coco.root}")
    train_set, val_set = detect.open_split(args, "train"), detect.open_split(args, "val")
    assert capsys.readouterr().err.count("left out 2 boxes without area or outside their image") == 1
    assert train_set.classes == [dict(id=3, name="owl"), dict(id=7, name="kite")] == val_set.classes
    assert len(train_set) == 5 and len(val_set) == 4
    item = train_set[1]
    assert item["image"].shape == (3, 70, 74) and item["size"] == (70, 74) and item["image_id"] == 102
    assert item["boxes"].tolist() == [[20, 10, 50, 40], [50, 60, 74, 70]] and item["labels"].tolist() == [0, 0]
    truth = val_set.ground_truth()
    assert len(truth["images"]) == 4 and sum(row["iscrowd"] for row in truth["annotations"]) == 1
    assert len(val_set[0]["boxes"]) == 0 and len(val_set[1]["boxes"]) == 1


ERRORS = [  # a change of the training annotations, or flags; what is said
    (lambda c: c.pop("categories"), "no list of records 'categories'"),
    (lambda c: c["images"][2].pop("file_name"), r"images\[2\] has no 'file_name'"),
    (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] has no 'bbox'"),
    (lambda c: c["annotations"][1].update(segmentation=[c["annotations"][1].pop("bbox")]), "only a segmentation"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "expected four numbers"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), "expected four numbers"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 10**400, 4]), r"in annotations\[1\] 'bbox' is"),
    (lambda c: c["annotations"][1].update(area=10**400), r"in annotations\[1\] 'area' is"),
    (lambda c: c["images"][1].update(width=10**400), r"in images\[1\] 'width' is"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 1e300, 1e300]), "expected four numbers"),
    (lambda c: c["annotations"][1].update(id=10**400), "expected an integer of 64 bits"),
    (lambda c: c["annotations"][1].update(category_id=55), "annotation 20 has 'category_id' 55"),
    (lambda c: c["annotations"][1].update(image_id=9), "annotation 20 has 'image_id' 9"),
    (lambda c: c["annotations"][1].update(id=10), "annotations has 2 records with the same 'id' 10"),
    (lambda c: c["images"][1].update(id=100), "images has 2 records with the same 'id' 100"),
    (lambda c: c["images"][1].update(file_name="gone.jpg"), "gone.jpg"),
    (lambda c: c["images"][1].update(width="wide"), "expected a number of pixels"),
    (lambda c: c["annotations"].clear(), "has no boxes to find"),
    (lambda c: [row.update(iscrowd=1) for row in c["annotations"]], "has no boxes to find"),
    (lambda c: c["annotations"][1].update(iscrowd="0"), "'iscrowd' is '0', expected 0 or 1"),
    (lambda c: c["annotations"][1].update(area=-1), "'area' is -1, expected a number within 0..1e10"),
    (lambda c: c["annotations"][1].update(area=None), "'area' is None, expected a number"),
    (lambda c: c["annotations"].append(dict(id=1, image_id=102, category_id=3, bbox=[1, 2, 1e6, 1e6])), "'area' is 1"),
    (lambda c: c["categories"][0].update(name="cat"), "different classes, 2 and 2: .*'cat'"),
    (("--model=lcnet_vit_x",), "lcnet_vit_s"),
    (("--data=nowhere",), "unknown data 'nowhere'"),
    (("--image-size=64", "--multi-scale=2"), "at least 96 with --multi-scale 2, got 64"),
    (("--batch-size=1",), "--batch-size 2 or more"),
    (("--image=x.png",), "need --checkpoint"),
    (("--eval", "--checkpoint=gone.pt"), "no checkpoint file gone.pt"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors_are_found_before_work(coco, tmp_path, capsys, wrong, message):
    """Wrong arguments, and what is wrong in an annotation file, end with status 2 and are named, the file too."""
    options = wrong
    if callable(wrong):
        coco(wrong)
        options = (f"--data={coco.root}",)
    said = refused(capsys, 2, run_detect, tmp_path / "x", *options)
    assert re.search(message, said) and len(said) < 400 and not (tmp_path / "x").exists()
    assert str(coco.root) in said or not callable(wrong)


def test_other_data_errors(coco, tmp_path, capsys):
    """No annotations, several, no JSON, a picture of another size than its annotations say, an unreadable picture."""
    for folder in (tmp_path, tmp_path / "nothing"):
        assert "instances_train" in refused(capsys, 2, run_detect_with, f"--data={folder}")
    Image.new("RGB", (9, 9)).save(coco.root / "train2017" / "2.jpg")
    train_set = detect.open_split(detect_flags(f"--data={coco.root}"), "train")
    with pytest.raises(DataError, match="2.jpg has 9 x 9 pixels .* but its annotations say 74 x 70"):
        train_set[1]
    (coco.root / "train2017" / "3.jpg").write_text("no picture")
    with pytest.raises(DataError, match="3.jpg"):
        train_set[2]
    path = coco.root / "annotations" / "instances_train2017.json"
    path.write_text("{")
    assert "as JSON" in refused(capsys, 2, run_detect_with, f"--data={coco.root}")
    path.write_text("[" * 200_000 + "]" * 200_000)
    assert f"cannot read {path} as JSON" in refused(capsys, 2, run_detect_with, f"--data={coco.root}")
    path.rename(path.with_name("instances_train_a.json"))
    path.with_name("instances_train_b.json").write_text("{}")
    assert "several files" in refused(capsys, 2, run_detect_with, f"--data={coco.root}")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_scene_stops_the_training(coco, tmp_path, capsys, workers):
    """The first training image that cannot be read ends the run with status 1 and one line that names it: none takes
    its place."""
    (coco.root / "train2017" / "3.jpg").write_text("no picture")
    options = (f"--data={coco.root}", "--batch-size=5", "--multi-scale=0", f"--workers={workers}")
    said = refused(capsys, 1, run_detect, tmp_path / "run", *options)
    assert said.count("\n") == 1 and f"cannot read image '{coco.root}/train2017/3.jpg'" in said


def test_augmentation_keeps_boxes_on_their_objects(coco):
    """The bright square stays in its box through crops, flips, colours and resizing; items follow from their keys."""
    train_set = detect.open_split(detect_flags(f"--data={coco.root}"), "train")
    data, kept = detect.Resized(train_set, detect.augmentation(True), seed=0), 0
    for epoch in range(10):
        item, again, other = data[epoch, 0, 64], data[epoch, 0, 64], data[epoch + 1, 0, 64]
        assert torch.equal(item["image"], again["image"]) and torch.equal(item["boxes"], again["boxes"])
        assert not torch.equal(item["image"], other["image"])
        assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.uint8
        for x1, y1, x2, y2 in item["boxes"].round().int().tolist():
            inside = item["image"][:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().amax(0)
            outside = item["image"].float().amax(0)
            outside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = 0
            if min(inside.shape) > 3:
                kept += 1
                assert inside.mean() > outside.max() - 60
    assert kept > 5
    empty = detect.make_item(torch.zeros(3, 9, 9, dtype=torch.uint8), [], [], 1)
    assert len(detect.augmentation(True)(empty)["boxes"]) == 0


def test_colours_change_as_cited():
    """RandomDistort: each of four changes in half of the images, hue by at most 18 of 255; channels
    are never exchanged. On (200, 40, 40) only a change of hue can make green and blue differ."""
    red = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    hues, unchanged, count = [], 0, 400
    torch.manual_seed(0)
    for _ in range(count):
        pixel = detect.augmentation(True)(detect.make_item(red, [], [], 1))["image"][:, 0, 0]
        unchanged += pixel.tolist() == [200, 40, 40]
        hue = colorsys.rgb_to_hsv(*(pixel / 255).tolist())[0]
        hues.append(min(hue, 1 - hue) * 255)
    assert 15 < max(hues) < 20
    assert 0.4 < sum(hue > 0 for hue in hues) / count < 0.55  # some changes are too small to see
    assert 1 / 40 < unchanged / count < 1 / 10  # 1 / 16


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=examples(20))
def test_a_step_has_one_size_on_all_ranks(length, world, per_step, epoch):
    """Every rank draws the same side for the same step, from those allowed; and sides do vary."""
    order = dict(sides=[64, 96, 128], per_step=per_step, seed=3, multiple=world * per_step)
    steps = []
    for rank in range(world):
        sampler = detect.ScaleSampler(length, rank=rank, world=world, **order)
        sampler.epoch = epoch
        sides = [side for _, _, side in sampler]
        steps.append([sides[i : i + per_step] for i in range(0, len(sides), per_step)])
        assert all(len(set(step)) == 1 and step[0] in (64, 96, 128) for step in steps[-1])
    assert all(step == steps[0] for step in steps)


def test_sides_vary():
    """Over an epoch's steps, every allowed side is drawn."""
    sampler = detect.ScaleSampler(400, sides=[64, 96, 128], per_step=4, seed=0)
    assert {side for _, _, side in sampler} == {64, 96, 128}


def random_results(seed, images=12, classes=4):
    """A COCO ground truth with crowds, and results for it of every quality."""
    rng = np.random.default_rng(seed)
    truth, results = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 8)):
            x, y, w, h = rng.uniform(0, 200, 2).tolist() + np.exp(rng.uniform(1, 5.3, 2)).tolist()
            kind = int(rng.integers(1, classes + 1))
            truth.append(dict(id=len(truth) + 1, image_id=image, category_id=kind, bbox=[x, y, w, h], area=w * h * 0.8,
                              iscrowd=int(rng.random() < 0.1)))  # fmt: skip
            for _ in range(rng.integers(0, 3)):
                noise = rng.normal(0, 0.15, 4) * [w, h, w, h]
                box = [x + noise[0], y + noise[1], max(1, w + noise[2]), max(1, h + noise[3])]
                results.append(dict(image_id=image, category_id=kind, bbox=[float(v) for v in box], score=rng.random()))
    categories = [dict(id=i + 1, name=str(i)) for i in range(classes)]
    return dict(images=[dict(id=i) for i in range(images)], annotations=truth, categories=categories), results


@pytest.mark.parametrize("first", [0, -7, 2**70])
def test_annotation_ids_do_not_matter(first):
    """Any numbering of annotations gives the same metrics: the evaluators would take an id of 0 for "not matched"."""
    truth, results = random_results(1)
    renumbered = [row | dict(id=first + i) for i, row in enumerate(truth["annotations"])]
    assert detect.coco_metrics(truth | dict(annotations=renumbered), results) == detect.coco_metrics(truth, results)


@pytest.mark.parametrize("seed", range(5))
def test_both_coco_libraries_agree(seed, monkeypatch):
    """faster-coco-eval and pycocotools give the same numbers."""
    faster, reference = pytest.importorskip("faster_coco_eval"), pytest.importorskip("pycocotools.cocoeval")
    from pycocotools.coco import COCO

    truth, results = random_results(seed)
    monkeypatch.setattr(detect, "coco_library", lambda: (faster.COCO, faster.COCOeval_faster))
    ours = detect.coco_metrics(truth, results)
    monkeypatch.setattr(detect, "coco_library", lambda: (COCO, reference.COCOeval))
    assert ours == pytest.approx(detect.coco_metrics(truth, results), abs=1e-9)
    assert 0 < ours["AP"] < ours["AP50"] < 100


def test_evaluation_keeps_the_truth_of_the_file(coco, tmp_path):
    """A box without width, outside its image or of negative size is truth all the same: our numbers
    are those that pycocotools gives for the file as it is."""
    reference = pytest.importorskip("pycocotools.cocoeval")
    from pycocotools.coco import COCO

    coco(lambda c: c["annotations"].extend([
        dict(id=1, image_id=102, category_id=3, bbox=[5, 6, 0, 5], area=0, iscrowd=0),
        dict(id=2, image_id=103, category_id=7, bbox=[500, 60, 5, 5], area=25, iscrowd=0),
        dict(id=3, image_id=103, category_id=7, bbox=[9, 9, -5, 5], area=25, iscrowd=0),
    ]), "val")  # fmt: skip
    val_set = detect.open_split(detect_flags(f"--data={coco.root}"), "val")
    found = [dict(image_id=image, category_id=kind, bbox=[20, 10, 30, 30], score=0.9)
             for image, kind in ((101, 7), (102, 3), (103, 7))]  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(found))
    truth = COCO(coco.root / "annotations" / "instances_val2017.json")
    theirs = reference.COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    ours = detect.coco_metrics(val_set.ground_truth(), found)
    assert ours["AP"] == pytest.approx(100 * theirs.stats[0]) and 0 < ours["AP"] < 90
    assert ours["AP50"] == pytest.approx(100 * theirs.stats[1])


def test_metrics_at_their_ends():
    """The truth itself scores 100; nothing found scores 0; sizes of which there is none have no score."""
    truth, _ = random_results(1)
    perfect = [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=1.0)
               for a in truth["annotations"] if not a["iscrowd"]]  # fmt: skip
    assert detect.coco_metrics(truth, perfect)["AP"] == pytest.approx(100)
    assert detect.coco_metrics(truth, [])["AP"] == 0
    small = dict(truth, annotations=[dict(truth["annotations"][0], iscrowd=0, area=9.0)])
    assert detect.coco_metrics(small, [])["APl"] is None


def test_evaluation_restores_boxes(tmp_path):
    """A detector that answers with the truth, in the resized image's pixels, scores 100 on images of any shape."""

    class Oracle(nn.Module):
        def forward(self, images):
            assert not self.training
            i = round(float(images[0, 0, 0, 0] * 0.229 + 0.485) * 25.5) - 1
            boxes = torch.tensor([[3.0, 4, 20, 30], [30, 2, 60, 33]])
            boxes = boxes * torch.tensor([64 / (90 - 7 * i), 64 / (40 + 10 * i)] * 2)
            # A point in the middle of each box; a side is `far` strides of 8 px away, between two of the 8 bins.
            points = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, torch.full((2, 1), 8.0)], dim=1)
            far = torch.cat([points[:, :2] - boxes[:, :2], boxes[:, 2:] - points[:, :2]], dim=1) / 8
            bins = (1 - (far[..., None] - torch.arange(8)).abs()).clamp_min(0).log()
            return torch.tensor([[[3.0, -9], [-9, 3]]]), bins[None], points

    class Data(torch.utils.data.Dataset):
        classes = [dict(id=5, name="a"), dict(id=9, name="b")]

        def __len__(self):
            return 3

        def __getitem__(self, i):
            image = torch.full((3, 40 + 10 * i, 90 - 7 * i), 10 * i + 10, dtype=torch.uint8)
            return detect.make_item(image, [[3, 4, 20, 30], [30, 2, 60, 33]], [0, 1], 70 + i)

        def ground_truth(self):
            rows = [dict(id=2 * i + j + 1, image_id=70 + i, category_id=(5, 9)[j], bbox=b, area=b[2] * b[3], iscrowd=0)
                    for i in range(3) for j, b in enumerate(([3, 4, 17, 26], [30, 2, 30, 31]))]  # fmt: skip
            return dict(images=[dict(id=70 + i) for i in range(3)], annotations=rows, categories=self.classes)

    args = detect_flags("--image-size=64", "--batch-size=1", "--workers=0", f"--output={tmp_path}/out")
    metrics = detect.evaluate(Oracle(), detect.validation_loader(args, Data()), args, torch.device("cpu"))
    assert metrics["AP"] == pytest.approx(100)
    rows = json.loads((tmp_path / "out" / "coco_results_castled.json").read_text())
    found = sorted((row["image_id"], row["category_id"]) for row in rows)
    assert found == [(image, category) for image in (70, 71, 72) for category in (5, 9)]
    assert rows[0].keys() == {"image_id", "category_id", "bbox", "score"}


def test_detection_learning_rate():
    """Warm-up from a tenth, the peak scaled by the batch, a cosine to 0 over the whole run, step by step."""
    args = detect_flags("--data=somewhere")
    args.global_batch, args.warmup_steps = 1280, 300
    rate = lambda step: detect.learning_rate(args, step, 300_000)  # noqa: E731
    assert rate(0) == pytest.approx(0.08) and rate(150) == pytest.approx(0.44)
    assert rate(300) == pytest.approx(0.8, rel=1e-4)
    assert rate(150_000) == pytest.approx(0.4) and rate(299_999) == pytest.approx(0, abs=1e-9)
    assert (args.epochs, args.batch_size, args.ema_decay, args.ema_reset) == (300, 80, 0.9998, 40)


def confident(checkpoint, path):
    """A detector's checkpoint, trained to be sure of anything: with few steps nothing else would be found at all."""
    state = convert.read_checkpoint(checkpoint)
    for level in range(4):
        state["ema"][f"head.predict.{level}.bias"] += 3
    torch.save(state, path)
    return path


def run_detect_with(*options):
    detect.main(detect.parser().parse_args(list(options)))


def test_detection_script(tmp_path, capsys, monkeypatch):
    """A whole run on rendered scenes: its files, its log, its report; --eval finds what its model finds."""
    monkeypatch.setattr(run, "count_macs", COUNT_MACS)
    *epochs, report = run_detect(tmp_path / "run", "--ema-reset=1")
    printed = capsys.readouterr().out
    assert "castling gap          0.00 points of AP" in printed
    assert "warm-up to 0.01 (--lr 1.6 x 4 / 640 images)" in printed
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "lock", "log.jsonl", "last.pt", "best.pt", "castled.pt", "example.png",
        "coco_results.json", "coco_results_castled.json",
    }  # fmt: skip
    (group,) = convert.read_checkpoint(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 4e-5 and group["momentum"] == 0.9  # of all parameters
    record = epochs[-1]
    assert {f"test_{name}" for name in detect.STATISTICS} <= record.keys() and "test_AP_castled" in record
    assert record["mask_curve"].keys() - {"step"} == record["mask_density"].keys() == {
        "backbone.blocks.3.1.attn", "backbone.blocks.5.1.attn",
    }  # fmt: skip
    assert report["castling_report"]["macs"]["castled"] < report["castling_report"]["macs"]["with branch"]
    sure = confident(tmp_path / "run" / "best.pt", tmp_path / "sure.pt")
    found = {}
    for split, images in (("val", 2), ("train", 40)):
        run_detect_with("--eval", "--json", f"--split={split}", f"--checkpoint={sure}", "--workers=0")
        folder = tmp_path / f"eval-shapes-{split}"
        found[split] = [json.loads((folder / f"coco_results{x}.json").read_text()) for x in ("", "_castled")]
        assert {row["image_id"] for row in found[split][0]} == set(range(images))
        assert found[split][0] == found[split][1] and len(found[split][0]) > images  # the masks are empty: no gap
        assert json.loads(capsys.readouterr().out)["castling_gap"] == 0
    # the castled weights alone, in another folder, and a branch that still holds something
    weights, names = convert.read_checkpoint(sure)["ema"], torch.load(tmp_path / "run" / "castled.pt").keys()
    torch.save({name: weights[name] for name in names}, tmp_path / "castled.pt")
    shape = ("--data=shapes", "--image-size=64", "--shapes-length=40", "--workers=0")
    run_detect_with("--eval", f"--checkpoint={tmp_path}/castled.pt", f"--output={tmp_path}/alone", *shape)
    assert json.loads((tmp_path / "alone" / "coco_results_castled.json").read_text()) == found["val"][0]
    whole = ("--epsilon=0", "--mask-schedule=fixed")  # a mask that keeps everything
    run_detect_with("--eval", f"--checkpoint={sure}", f"--output={tmp_path}/branch", "--workers=0", *whole)
    hybrid, castled = ((tmp_path / "branch" / f"coco_results{x}.json").read_text() for x in ("", "_castled"))
    assert hybrid != castled
    monkeypatch.setattr(detect, "evaluate", None)  # a folder that cannot be written is named before the work
    assert "alone.json" in refused(capsys, 2, run_detect_with, "--eval", f"--checkpoint={sure}",
                                   f"--output={tmp_path}/castled.pt/alone.json")  # fmt: skip


def test_detection_draws_and_prints(tmp_path, capsys):
    """--image draws images, upright, small ones enlarged by a whole number to a short side near 512;
    --json prints classes, scores and boxes in the file's pixels."""
    run_detect(tmp_path / "run", "--max-steps=1")
    sure = confident(tmp_path / "run" / "best.pt", tmp_path / "sure.pt")
    photos = [tmp_path / name for name in ("a.png", "b.jpg", "c.png")]
    for i, path in enumerate(photos):
        image = Image.fromarray(detect.SceneBoxes("val", 5, 90).scene(i).image[: 90 - 20 * i])
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 1 else 1  # turned by a quarter
        image.save(path, exif=exif)
    a, b, c = map(str, photos)
    common = [f"--checkpoint={sure}", "--min-score=0.1", "--image"]
    capsys.readouterr()
    run_detect_with(*common, a, b, c, f"--output={tmp_path}/drawn")
    assert capsys.readouterr().out.count("drawn to") == 3
    drawn = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "drawn").iterdir()}
    assert {name: image.shape for name, image in drawn.items()} == {
        "a.png": (540, 540, 3), "b.png": (630, 490, 3), "c.png": (500, 900, 3),
    }  # fmt: skip
    enlarged = np.asarray(Image.open(a)).repeat(6, 0).repeat(6, 1)
    assert (drawn["a.png"] != enlarged).any()
    run_detect_with(*common, c, f"{tmp_path}/drawn/c.png", "--json")  # of one name, but nothing is drawn
    found = json.loads(capsys.readouterr().out)
    assert [one["image"] for one in found] == [c, f"{tmp_path}/drawn/c.png"]
    assert found[0]["boxes"][0].keys() == {"label", "score", "box"}
    assert all(box["label"] in SHAPES and box["box"][3] <= 50 for box in found[0]["boxes"])
    run_detect_with(*common, c, "--json", "--amp")  # in the precision of --eval
    rounded = json.loads(capsys.readouterr().out)[0]["boxes"]
    assert rounded != found[0]["boxes"] and abs(rounded[0]["score"] - found[0]["boxes"][0]["score"]) < 0.05
    run_detect_with(*common, a, "--min-score=1", f"--output={tmp_path}/none.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "none.png")), enlarged)
    (tmp_path / "d.png").write_text("no picture")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:  # the rest is printed, the failure too
        run_detect_with(*common, a, f"{tmp_path}/d.png", b, "--json")
    streams = capsys.readouterr()
    assert stopped.value.code == 1 and len(json.loads(streams.out)) == 2 and "d.png" in streams.err
    for images, output, message in (
        ((a, c), "", "would overwrite"),
        ((a, c), "d.png", "is a file"),
        ((a,), "drawn", "no image file in an existing folder"),
        ((a,), "nowhere/x.png", "no image file in an existing folder"),
        ((a,), "x.psd", "no image file in an existing folder"),  # Pillow reads it, and does not write it
        ((str(tmp_path),), "x.png", "no image file"),
    ):
        assert message in refused(capsys, 2, run_detect_with, *common, *images, f"--output={tmp_path}/{output}")


@pytest.mark.parametrize(("box", "side"), [
    ((20, 30, 70, 60), "above"), ((110, 30, 120, 60), "above"), ((20, 1, 70, 60), "below"), ((0, 0, 120, 90), "inside"),
])  # fmt: skip
def test_labels_leave_objects_free(box, side):
    """A label is whole, in the picture, beside its box where there is room: it covers no object.
    Boxes keep their places when a picture is enlarged; a large picture keeps its size."""
    row = dict(label="half disc", score=0.5, box=box)
    drawn = np.asarray(detect.draw_boxes(Image.new("RGB", (120, 90)), [row], ["red"])).astype(int)
    assert drawn.shape == (540, 720, 3)
    x1, y1, x2, y2 = (6 * v for v in box)
    painted = drawn.any(-1)
    assert painted[(y1 + y2) // 2, x1] and painted[y2 - 1, (x1 + x2) // 2]  # left and lower side
    edge = 3
    inside = painted[y1 + edge : y2 - edge, x1 + edge : x2 - edge]
    assert inside.any() == (side == "inside") and inside.mean() < 0.02
    assert painted[: max(0, y1)].any() == (side == "above") and painted[y2 + 1 :].any() == (side == "below")
    text = (drawn.min(-1) > 200).nonzero()  # white
    at_left = np.asarray(detect.draw_boxes(Image.new("RGB", (120, 90)), [row | dict(box=(20, 30, 70, 60))], ["red"]))
    assert len(text[0]) == (at_left.min(-1) > 200).sum() > 100  # nothing of the text is cut off
    for size in ((900, 700), (10, 10000)):
        assert detect.draw_boxes(Image.new("RGB", size), [row], ["red"]).size == size


def test_average_starts_anew(tmp_path):
    """Every --ema-reset epochs the average of weights is set to the current ones: it is over the steps since then.
    Where each epoch has a single step and starts anew, the average is the weights themselves."""
    run_detect(tmp_path / "run", "--max-steps=8", "--epochs=4", "--shapes-length=8", "--eval-every=9", "--ema-reset=2")
    assert convert.read_checkpoint(tmp_path / "run" / "last.pt")["ema_updates"] == 4
    for reset in (1, 0):
        run_detect(tmp_path / str(reset), "--shapes-length=4", "--eval-every=9", f"--ema-reset={reset}")
        state = convert.read_checkpoint(tmp_path / str(reset) / "last.pt")
        same = [torch.equal(state["model"][name], x) for name, x in state["ema"].items() if name.endswith("weight")]
        assert all(same) == (reset == 1) and len(same) > 100


@pytest.mark.parametrize("options", [
    ("--model=esnet_vit_s", "--amp", "--accumulate=2", "--multi-scale=1"),
    ("--attention=softmax", "--no-channels-last", "--augment"),
    ("--attention=relu_e", "--dconv=0", "--mlp-dwconv=0", "--clip-grad=1"),
    ("--model=lcnet_s",),
])  # fmt: skip
def test_every_detection_option_trains(tmp_path, options):
    """Each combination runs to its report; a model without a branch reports no gap."""
    *_, report = run_detect(tmp_path, "--max-steps=2", *options)
    assert ("castling_gap" in report["castling_report"]) == any("esnet" in option for option in options)


def test_detection_on_coco_files(coco, tmp_path, capsys):
    """A COCO folder with classes of its own, from a classification checkpoint; its classes are in the checkpoint."""
    torch.save(build_model("lcnet_vit_s", num_classes=5, **TINY_LCNET).state_dict(), tmp_path / "backbone.pt")
    options = (f"--data={coco.root}", "--batch-size=2", f"--backbone={tmp_path}/backbone.pt", "--multi-scale=0")
    *_, report = run_detect(tmp_path / "run", *options)
    assert "ignored: classifier.bias" in capsys.readouterr().out and report["castling_report"]["castling_gap"] == 0
    (tmp_path / "backbone.pt").unlink()
    run_detect(tmp_path / "run", *options)  # complete: its first weights are no longer asked for
    assert "resumed" in capsys.readouterr().out
    run_detect(tmp_path / "shapes", f"--checkpoint={tmp_path}/run/best.pt", "--max-steps=1")  # other classes
    assert "new: head.predict.*.bias x 4, head.predict.*.weight x 4" in capsys.readouterr().out
    classes = [dict(id=3, name="owl"), dict(id=7, name="kite")]
    assert convert.read_checkpoint(tmp_path / "run" / "best.pt")["classes"] == classes
    common = (f"--checkpoint={tmp_path}/run/best.pt", "--eval", f"--output={tmp_path}/e")
    message = refused(capsys, 2, run_detect_with, *common, "--data=shapes")
    assert "have different classes, 2 and 12: only the first has {'id': 3, 'name': 'owl'}, " in message
    assert "; only the second has " in message and message.rstrip().endswith(" ...")


def test_detection_trains_on_two_processes(tmp_path, capsys):
    """Two processes share data and metrics: one log, one gradient; every image is evaluated once over both."""
    common = [*DETECT_SMALL, "--batch-size=2", f"--output={tmp_path}/two"]
    assert in_group(2, lambda rank: run_detect_with(*common)) == [0, 0]
    records = records_of(tmp_path / "two")
    assert len(records) == 2 and records[0]["step"] == 4
    sure = confident(tmp_path / "two" / "best.pt", tmp_path / "sure.pt")
    common = ["--eval", f"--checkpoint={sure}", "--workers=0"]
    assert in_group(2, lambda rank: run_detect_with(*common, f"--output={tmp_path}/by-two")) == [0, 0]
    run_detect_with(*common, f"--output={tmp_path}/by-one")
    one, two = (json.loads((tmp_path / name / "coco_results.json").read_text()) for name in ("by-one", "by-two"))
    assert len(one) == len(two) > 2
    for a, b in zip(one, two, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
