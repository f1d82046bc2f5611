"""What all tests share: Hypothesis profiles, tiny models, short runs, fixtures."""

import functools
import hashlib
import json
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

import convert
import detect
import fast
import flops
import run
import segment
import train
from models import build_model

ROOT = Path(__file__).parent
# What is tested is small: more threads wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in processes that tests start, too
# Hypothesis: `quick` is the default; pytest's --hypothesis-profile=thorough, read later, wins over it.
QUICK_EXAMPLES = 30
settings.register_profile(
    "quick", deadline=None, derandomize=True, max_examples=QUICK_EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `form` is the same for all examples
)  # fmt: skip
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=20 * QUICK_EXAMPLES)
settings.load_profile("quick")


def examples(quick):
    """How many examples a test that asks for `quick` of them takes: 20 times as many in `thorough`."""
    return quick * settings.default.max_examples // QUICK_EXAMPLES


TINY_LEVIT = dict(dims=(32, 48, 64), heads=(2, 3, 4), key_dim=8, depths=(1, 1, 1))
TINY_DEIT = dict(dim=24, heads=2, depth=2)
TINY_MVIT = dict(dim=8, depths=(1, 2, 1))
TINY_LCNET = dict(width=0.25, heads=(2, 4))
TINY_ESNET = dict(width=0.25, ratios=((0.875, 0.5), (0.5, 0.75), (0.5, 0.5)), heads=4)
FAMILIES = ["levit", "deit", "mvit", "lcnet", "esnet"]


def tiny(family, attention="castling", image_size=64, seed=0, num_classes=5, **options):
    """A small model; norms and other constants shaken, so that nothing is zero by accident."""
    name, row = {
        "levit": ("levit128", TINY_LEVIT), "deit": ("deit_tiny", TINY_DEIT), "mvit": ("mvitv2_tiny", TINY_MVIT),
        "lcnet": ("lcnet_vit_s", TINY_LCNET), "esnet": ("esnet_vit_s", TINY_ESNET),
    }[family]  # fmt: skip
    torch.manual_seed(seed)
    return shaken(build_model(name, attention, num_classes, image_size, **(row | options))).eval()


def shaken(model, std=0.1):
    """Random parameters and BatchNorm statistics: zero-initialised ones would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if name.endswith("attention_biases") else std) * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


@pytest.fixture(autouse=True)
def formulas():
    """After a script has run, cores take the formulas of attention.py again."""
    yield
    fast.disable()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def flags(*options, **extra):
    """Resolved arguments, as a run would have them."""
    args = train.parser().parse_args([*options, *(f"--{k.replace('_', '-')}={v}" for k, v in extra.items())])
    train.resolve(args)
    return args


@pytest.fixture
def photos(tmp_path):
    """An ImageNet-style folder: two classes, train/ and test/, JPEG and PNG, grey, palette and alpha among them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name, shade in (("bright", 170), ("dark", 60)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(shade - 40, shade + 40, (40, 30 + 5 * i, 3), dtype=np.uint8)
                mode = ("RGB", "L", "RGBA", "P")[i % 4]
                Image.fromarray(pixels).convert(mode).save(folder / f"{i}.{'jpg' if mode == 'RGB' else 'png'}")
    return tmp_path / "photos"


SMALL = ("--model=deit_mini", "--image-size=32", "--shapes-length=40", "--batch-size=8", "--workers=0", "--epochs=2",
         "--max-steps=4")  # fmt: skip


def run_train(folder, *options):
    """train.py in this process, into `folder`; the log's records."""
    train.main(train.parser().parse_args([f"--output={folder}", *SMALL, *options]))
    return records_of(folder)


def records_of(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def in_group(world, function):
    """Exit codes of `world` forked processes that call function(rank) as torchrun would have them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        function(rank)

    processes = [multiprocessing.get_context("fork").Process(target=call, args=(r,)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


DETECT_SMALL = ("--image-size=64", "--shapes-length=40", "--batch-size=4", "--workers=0", "--epochs=2", "--max-steps=4")


def run_detect(folder, *options):
    """detect.py in this process, into `folder`; the log's records."""
    detect.main(detect.parser().parse_args([f"--output={folder}", *DETECT_SMALL, *options]))
    return records_of(folder)


@pytest.fixture(scope="session")
def table_2():
    """The rows of `flops.py --table 2`: the models are built and counted once."""
    return flops.table_2()


def tiny_segmenter(attention="castling", pixel_decoder="fpn_transformer", num_classes=5, seed=0, **options):
    """A small segmenter for 5 classes, in eval mode; constants shaken, so that nothing is zero by accident."""
    torch.manual_seed(seed)
    small = dict(dim=32, depth=2, patch_size=8, width=64, heads=4, queries=6, layers=4, encoder_layers=1, image_size=32)
    model = segment.build_segmenter("vit_mini", attention, num_classes, pixel_decoder, **(small | options))
    return shaken(model).eval()


# Of each script: its module, a tiny model for its `make_model`, the flags of a short run of two epochs.
TINY_RUNS = {
    "train": (
        train,
        lambda args, classes, size: build_model(
            "levit128", "castling", classes, size, drop_path=0.1, epsilon=args.epsilon,
            schedule=args.mask_schedule, **TINY_LEVIT),
        ("--image-size=32", "--batch-size=4", "--shapes-length=16", "--epochs=2", "--mixup=0.8", "--erasing=0.5",
         "--mask-schedule=anneal"),
    ),
    "detect": (
        detect,
        lambda args, classes, size: detect.build_detector(
            "lcnet_vit_s", "castling", classes, size, channels=16, convs=1, **TINY_LCNET),
        ("--image-size=64", "--batch-size=2", "--shapes-length=8", "--epochs=2", "--multi-scale=1", "--ema-reset=1"),
    ),
    "segment": (
        segment,
        lambda args, classes, size: segment.build_segmenter(
            "vit_mini", "castling", classes, args.pixel_decoder, size, dim=32, depth=2, patch_size=8, width=64, heads=4,
            queries=6, layers=2, encoder_layers=1, drop_path=0.1),
        ("--image-size=32", "--batch-size=2", "--shapes-length=6", "--max-steps=8", "--eval-steps=4", "--points=64"),
    ),
}  # fmt: skip
CLOCK = {"seconds", "images_per_s", "data_wait", "step_seconds", "inference_images_per_s"}  # what the log measures


def run_tiny(script, folder, *options):
    """A short run of a script's tiny model in this process: bit for bit the same whenever.

    MACs are not counted: that would take half of the time, and other tests do.
    """
    module, make_model, flags = TINY_RUNS[script]
    args = [f"--output={folder}", "--workers=0", "--save-minutes=1e-9", *flags, *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_model", make_model)
        patch.setattr(run, "count_macs", lambda *given: 0)
        module.main(module.parser().parse_args(args))


def without_clock(record):
    """A record of the log but for the times in it."""
    if not isinstance(record, dict):
        return record
    return {key: without_clock(value) for key, value in record.items() if key not in CLOCK}


def outcome(folder):
    """What has to be the same however a run came to its end: SHA-256 of weights and average, and the log."""
    state = convert.read_checkpoint(folder / "last.pt")
    digest = hashlib.sha256()
    for part in ("model", "ema"):
        for name, tensor in state[part].items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest(), [without_clock(record) for record in records_of(folder)]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """script -> `outcome` of its tiny run that nothing has happened to."""

    @functools.cache
    def whole(script):
        folder = tmp_path_factory.mktemp(script)
        run_tiny(script, folder)
        return outcome(folder)

    return whole


def refused(capsys, code, function, *arguments):
    """What a run that ends with exit status `code` says on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == code, said
    return said
