"""data.py: rendered shapes, order of the samples, folders of images, augmentation."""

import functools
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils import _pytree as pytree

import data
import detect
import segment
import train
from conftest import examples, flags, refused, run_tiny


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([32, 64, 97]))
@settings(max_examples=examples(30))
def test_scene_truth_matches_its_pixels(seed, count, size):
    """Boxes are the exact extent of each shape in the mask where a class occurs once; labels, boxes and mask agree; the
    scene follows from its generator alone."""
    labels = np.random.default_rng(seed).integers(0, len(data.SHAPES), count).tolist()
    scene, again = (data.render_scene(np.random.default_rng(seed), size, labels) for _ in range(2))
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    for name in ("image", "labels", "boxes", "mask"):
        assert np.array_equal(getattr(scene, name), getattr(again, name))
    assert len(scene.labels) == len(scene.boxes) <= count and len(scene.labels) >= 1
    assert set(scene.mask.flat) - {0} == {label + 1 for label in scene.labels}
    for label, (x0, y0, x1, y1) in zip(scene.labels, scene.boxes, strict=True):
        assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
        if (scene.labels == label).sum() == 1:
            rows, columns = np.nonzero(scene.mask == label + 1)
            assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_shapes_are_deterministic_balanced_and_split():
    """An item is a function of (seed, split, index); classes take turns; training and validation differ."""
    a, b = data.Shapes("train", 50, 32, seed=3), data.Shapes("train", 10, 32, seed=3)
    assert len(data.SHAPES) >= 10 and len(a) == 50 and a.classes == list(data.SHAPES)
    assert torch.equal(a[7][0], b[7][0]) and a[7][1] == 7 and a[19][1] == 7
    for other in (data.Shapes("val", 50, 32, seed=3), data.Shapes("train", 50, 32, seed=4)):
        assert not torch.equal(a[7][0], other[7][0])


def test_nothing_is_painted_in_a_hole():
    """A pixel's share in a shape is 1 inside its outline, 0 outside, 0 in the middle of a ring."""
    ring = data.placed(data.SHAPES["ring"], np.array([24, 24]), np.array([20, 20]), 0.0)
    assert data.coverage(ring, 48)[24, [1, 8, 24, 39, 46]].tolist() == [0, 1, 0, 1, 0]


# (pixels on shapes; x and y of their middle; mean and standard deviation of the image) of the first
# 12 training scenes of 48 px, seed 0, with NumPy 2.4.6 and Pillow 13.0.0.
KNOWN_SCENES = {
    data.Shapes: [
        (915, 29.8, 29.6, 135.2, 71.3), (906, 23.0, 22.0, 165.0, 51.1), (541, 22.8, 25.0, 138.4, 39.6),
        (368, 28.5, 24.3, 160.9, 44.7), (388, 18.5, 19.2, 142.7, 62.1), (545, 20.1, 19.8, 130.9, 77.8),
        (471, 23.4, 25.0, 143.4, 60.4), (393, 22.8, 28.5, 150.2, 75.1), (442, 16.8, 23.3, 130.0, 44.0),
        (610, 23.1, 23.2, 132.3, 51.1), (573, 24.5, 24.2, 119.1, 37.3), (359, 20.5, 22.8, 120.9, 47.4),
    ],
    data.Scenes: [
        (265, 19.7, 27.4, 139.3, 82.7), (412, 22.9, 22.8, 111.3, 36.7), (604, 22.2, 21.6, 130.9, 60.7),
        (191, 27.5, 19.1, 133.3, 47.1), (221, 17.7, 28.0, 164.2, 46.6), (218, 21.0, 24.5, 148.3, 47.5),
        (246, 21.0, 24.9, 40.8, 36.9), (426, 16.0, 20.2, 138.5, 38.9), (320, 25.9, 20.3, 167.7, 45.2),
        (358, 21.4, 28.2, 132.3, 34.3), (215, 28.3, 27.0, 112.6, 22.7), (311, 24.1, 23.0, 62.8, 43.6),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN_SCENES)
def test_shapes_stay_those_of_the_committed_results(kind):
    """Outlines, textures, occlusion and noise are as they were: another data set has other accuracies."""
    for index, expected in enumerate(KNOWN_SCENES[kind]):
        scene = kind("train", 12, 48).scene(index)
        y, x = np.nonzero(scene.mask)
        found = (len(x), x.mean(), y.mean(), scene.image.mean(), scene.image.std())
        assert found == pytest.approx(expected, abs=0.3, rel=1e-3), index


def test_shapes_are_hard_for_a_linear_classifier():
    """Ridge regression on the pixels, at its best penalty, stays far under 50% on held-out shapes."""
    def pixels(split, count):
        items = [data.Shapes(split, count, 24)[i] for i in range(count)]
        x = torch.stack([image.flatten() for image, _ in items]).double() / 255 - 0.5
        return x, torch.tensor([label for _, label in items])

    (x, y), (x_val, y_val) = pixels("train", 2400), pixels("val", 600)
    gram, target = x.T @ x, x.T @ F.one_hot(y).double()
    accuracies = []
    for penalty in (1.0, 10.0, 100.0, 1000.0):
        weights = torch.linalg.solve(gram + penalty * torch.eye(x.shape[1], dtype=x.dtype), target)
        accuracies.append(((x_val @ weights).argmax(1) == y_val).double().mean().item())
    assert max(accuracies) < 0.3


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_ranks_see_what_one_process_would(length, world, batch, epoch):
    """Training: global batch t over all ranks is batch t of a single process, and no index repeats. Evaluation: every
    index exactly once over all ranks, in any number of them."""
    samplers = [data.EpochSampler(length, rank=r, world=world, seed=1, multiple=world * batch) for r in range(world)]
    single = data.EpochSampler(length, seed=1, multiple=world * batch)
    for sampler in (*samplers, single):
        sampler.epoch = epoch
    shares, whole = [list(s) for s in samplers], list(single)
    assert len({len(s) for s in shares}) == 1 and len(whole) == length // (world * batch) * world * batch
    assert [len(s) for s in samplers] == [len(s) for s in shares]
    for t in range(len(whole) // (world * batch)):
        together = [key for share in shares for key in share[t * batch : (t + 1) * batch]]
        assert sorted(together) == sorted(whole[t * world * batch : (t + 1) * world * batch])
    assert len(set(whole)) == len(whole) and all(e == epoch for e, _ in whole)
    assert len(list(data.EpochSampler(length, seed=1))) == length
    val = [key for r in range(world) for key in data.EpochSampler(length, rank=r, world=world)]
    assert sorted(val) == [(0, i) for i in range(length)]


def test_number_of_workers_changes_nothing(photos):
    """Augmentation is a function of (seed, epoch, index): 0 and 2 workers give the same batches, epochs differ."""
    args = flags(data=photos, image_size=24, erasing=0.5)
    base = train.open_split(args, "train")

    def images(workers, epoch, seed=0):
        sampler = data.EpochSampler(len(base), seed=seed, multiple=4)
        sampler.epoch = epoch
        loader = data.make_loader(data.Augmented(base, train.train_transform(args), seed), sampler, 4, workers)
        before = torch.get_rng_state()
        batches = torch.cat([x for x, _ in loader])
        assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
        return batches

    assert torch.equal(images(0, 1), images(2, 1))
    assert not torch.equal(images(0, 1), images(0, 2)) and not torch.equal(images(0, 1), images(0, 1, seed=5))


def test_data_sets_can_be_sent_to_loader_processes():
    """Data sets of all scripts, transforms included, can be pickled and act as before: so Python 3.14, and any on
    macOS, starts loader processes."""
    args = flags("--data=.", "--image-size=32", "--randaugment=9", "--erasing=0.5")
    image, labels = torch.arange(3 * 40 * 50, dtype=torch.uint8).view(3, 40, 50), torch.zeros(40, 50, dtype=torch.uint8)
    for dataset, key in (
        (data.Augmented([(image, 0)], train.train_transform(args), 0), (0, 0)),
        (data.Augmented([(train.v2.functional.to_pil_image(image), 0)], train.eval_transform(args), 0), (0, 0)),
        (detect.Resized([detect.make_item(image, [[0, 0, 9, 9]], [0], 1)], detect.augmentation(True), 0), (0, 0, 32)),
        (segment.Pairs([(image, labels)], segment.train_transform(args), 0), (0, 0)),
        (segment.Pairs([(image, labels)], functools.partial(segment.resized_whole, size=32), 0), (0, 0)),
    ):
        sent = pickle.loads(pickle.dumps((dataset, data.leave_group, detect.collate)))[0]
        for before, after in zip(*(pytree.tree_leaves(one[key]) for one in (dataset, sent)), strict=True):
            assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))


@pytest.mark.parametrize("workers", [0, 1])
def test_small_folders_are_read_once(photos, monkeypatch, workers):
    """Images of the first one's size are read once, by any process; their pixels are those of the file,
    whatever was done to an image that was given out. Bad images and others are read each time, and
    nothing is kept of a set too large for memory or of one whose first image is bad."""
    def kept(folder):
        there = [] if folder.kept is None else folder.kept[:, 0].nonzero()[0]
        return [Path(folder.samples[i][0]).name for i in there]

    def pixels(folder, index):
        return np.asarray(folder[index][0]).tolist()

    small = photos / "train" / "dark"
    files = [path for path, _ in data.open_folder(photos, "train").samples]
    for i, path in enumerate(files):
        if i % 6 in (0, 2, 5):
            Image.open(path).resize((30, 40)).save(path)
    (small / "5.png").write_bytes(b"none")
    whole = [np.asarray(data.read_image(path)).tolist() for path in files[:11]]
    folder = data.open_folder(photos, "train")
    loader = data.make_loader(folder, range(11), 1, workers, collate=lambda batch: batch)
    for _, label in (item for batch in loader for item in batch):
        assert label in (0, 1)
    assert kept(folder) == ["0.jpg", "2.png", "5.png", "0.jpg", "2.png"]
    for index in (0, 2, 5, 6, 8):
        Path(files[index]).write_bytes(b"no longer needed")
    for turn in range(2):
        for one in (folder, pickle.loads(pickle.dumps(folder))):
            assert [pixels(one, i) for i in range(11)] == whole, turn
        folder[0][0].paste((1, 2, 3), (0, 0, 30, 40))
        with pytest.raises(data.DataError, match="dark/5.png"):
            folder[11]
    assert data.open_folder(photos, "train").kept is None  # its first image is bad by now
    rows = 6 * (1 + 3 * 30 * 40)
    for most in (rows, rows - 1):
        monkeypatch.setattr(data, "KEPT_BYTES", most)
        folder = data.open_folder(photos, "val")
        assert folder[0][1] == 0 and kept(folder) == (["0.jpg"] if most == rows else [])


def test_input_is_normalised():
    """0..255 to ImageNet's mean 0 and deviation 1, in the memory format asked for."""
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for channels_last, memory in ((False, torch.contiguous_format), (True, torch.channels_last)):
        x = data.to_model_input(images, torch.device("cpu"), channels_last)
        torch.testing.assert_close(x, (images / 255 - mean) / std)
        assert x.is_contiguous(memory_format=memory)


def odd_images(folder):
    """{what: path} of images that are unusual, and fine."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    thin = Image.new("RGB", (20_000, 1), "orange")
    far = folder.joinpath(*["sehr langer Pfad " + 100 * "ß"] * 5)
    far.mkdir(parents=True)
    palette = pixels.quantize(16)
    palette.info["transparency"] = 3
    images = {
        "grey.png": pixels.convert("L"), "bits.png": pixels.convert("1"), "palette.png": palette,
        "alpha.png": pixels.convert("RGBA"), "grey alpha.png": pixels.convert("LA"), "cmyk.jpg": pixels.convert("CMYK"),
        "one.png": pixels.crop((0, 0, 1, 1)), "wide.png": thin, "high.png": thin.transpose(Image.Transpose.ROTATE_90),
        "日本語 ñ.png": pixels,
    }  # fmt: skip
    for name, image in images.items():
        image.save(folder / name)
    pixels.save(far / "far.jpg")
    return {name: folder / name for name in images} | {"far": far / "far.jpg"}


def test_odd_images_are_read(tmp_path):
    """Grey, palette, alpha, CMYK, one pixel, 20,000 pixels wide or high, names of any language, paths of 600
    characters: read as RGB, and every transform of the three scripts takes them."""
    classifying, segmenting = flags("--data=.", "--image-size=32", "--randaugment=9"), flags("--image-size=32")
    segmenting.data = "folder"
    for name, path in odd_images(tmp_path).items():
        image = data.read_image(path)
        assert image.mode == "RGB" and image.size == Image.open(path).size, name
        for transform in (train.train_transform(classifying), train.eval_transform(classifying)):
            assert transform(image).shape == (3, 32, 32), name
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        box = [[0, 0, image.width, image.height]]
        for transform in (detect.augmentation(True), None):
            resized = detect.Resized([detect.make_item(tensor, box, [0], 1)], transform, 0)
            assert resized[0, 0, 64]["image"].shape == (3, 64, 64), name
        labels = torch.zeros(tensor.shape[1:], dtype=torch.uint8)
        pairs = segment.Pairs([(tensor, labels)], segment.train_transform(segmenting), 0)
        assert [x.shape[-2:] for x in pairs[0, 0]] == [(32, 32), (32, 32)], name
        seen = segment.resized_whole(tensor, labels, 32)[0]
        assert 1 <= min(seen.shape[1:]) <= 32 and max(seen.shape[1:]) <= 128, name


def test_bad_images_are_named(tmp_path, monkeypatch):
    """16 bits and floats, which would be clipped, bombs, cut and empty files, text, and links in a circle are refused
    by name; of a size that Pillow only warns of, an image is read."""
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(good)
    bad = {name: tmp_path / name for name in ("16.png", "float.tiff", "bomb.png", "cut.jpg", "empty.png", "text.png",
                                              "circle.png", "folder.png", "gone.png",
                                              "texture.png")}  # fmt: skip
    bad["texture.png"].write_bytes(b"DDS " + bytes(200))
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(bad["16.png"])
    Image.fromarray(np.zeros((9, 9), np.float32)).save(bad["float.tiff"])
    Image.new("RGB", (250, 100)).save(bad["bomb.png"])
    bad["cut.jpg"].write_bytes(good.read_bytes()[:800])
    bad["empty.png"].write_bytes(b"")
    bad["text.png"].write_text("no picture")
    bad["circle.png"].symlink_to(bad["circle.png"])
    bad["folder.png"].mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for path in bad.values():
        with pytest.raises(data.DataError, match=re.escape(str(path))):
            data.read_image(path)
    Image.new("RGB", (150, 100)).save(good)
    with pytest.warns(Image.DecompressionBombWarning):
        assert data.read_image(good).size == (150, 100)


def test_folders_of_links_and_long_names(tmp_path, photos, capsys, monkeypatch):
    """Links to other folders are followed. Names that no file system takes are wrong arguments.
    Nothing is written but to --output."""
    monkeypatch.chdir(tmp_path / "photos")
    before = sorted(tmp_path.rglob("*"))
    (photos / "train" / "dark" / "more").symlink_to(photos / "test" / "dark")
    run_tiny("train", tmp_path / "out", f"--data={photos}", "--batch-size=4", "--max-steps=1")
    assert "15 training" in capsys.readouterr().out
    (photos / "train" / "dark" / "more").unlink()
    long = 300 * "x"
    for wrong in (f"--data={long}", f"--output={long}", f"--checkpoint={long}"):
        assert "too long" in refused(capsys, 2, run_tiny, "train", tmp_path / "new", wrong), wrong
    assert "too long" in refused(capsys, 2, run_tiny, "train", tmp_path / "new", f"--image={long}", "--checkpoint=x")
    assert [path for path in sorted(tmp_path.rglob("*")) if path.relative_to(tmp_path).parts[0] != "out"] == before
