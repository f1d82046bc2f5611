"""Train a Castling-ViT classifier, and castle it at the end. Plain PyTorch.

    python train.py
        trains on built-in drawings of shapes: one process, no download
    torchrun --nproc-per-node=8 train.py --data /data/imagenet
        trains by the paper's recipe on eight GPUs
    torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        train.py --data /imagenet
        the same on eight machines: give this line on each; HOST is the name of one of them
    python train.py --eval --checkpoint runs/X/best.pt
        prints the accuracy with and without the branch
    python train.py --image photo.jpg --checkpoint runs/X/best.pt
        prints the five most probable classes

If a run was stopped, the same command continues it. The training loop is the function `train`. The
file run.py has what it calls. The recipe is section 4.1 of the paper (arXiv:2211.10526v4), with
SGD. The paper does not give the augmentation, so it has the values of DeiT's (arXiv:2012.12877,
Table 9), and torchvision's operations.
"""

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import fast
import run
from attention import look_up, set_threshold
from convert import HEADS, convert, load_pretrained
from data import MEAN, Augmented, EpochSampler, Shapes, make_loader, open_folder, to_model_input
from models import DEIT, ESNET, LCNET, LEVIT, MODELS, VIT_DENSE, build_model
from run import at_least, autocast, ema_decay_for, rank, say, share, world_size

METRICS = {"acc1": "Acc@1", "acc5": "Acc@5"}  # scores of `evaluate`; the first one chooses best.pt

# DeiT's values; its magnitude 9 of 10 in RandAugment is 27 of 30 here. Not as in DeiT: no repeated
# augmentation; RandAugment always applies both operations, with one magnitude; erased areas get the mean colour.
AUGMENTATION = dict(randaugment=27, mixup=0.8, cutmix=1.0, erasing=0.25, smoothing=0.1)

# Defaults for each kind of data. A folder gets the paper's epochs and batch (`batch_per_gpu`). The
# shapes have a short recipe, made for two CPU cores.
DATA_DEFAULTS = {
    "folder": dict(image_size=224, epochs=1000, optimizer="sgd", **AUGMENTATION),
    "cifar": dict(image_size=64, epochs=100, batch_size=128, optimizer="sgd", **AUGMENTATION),
    "shapes": dict(
        image_size=64, epochs=4, batch_size=128, optimizer="sgd", schedule="cosine", lr=3.2, shapes_length=30000,
        randaugment=0, mixup=0.0, cutmix=0.0, erasing=0.0, smoothing=0.0, drop_path=0.0,
    ),
}  # fmt: skip

OPTIMIZERS = {
    # arXiv:2211.10526v4, section 4.1: momentum 0.9. The learning rate rises from 0.01 to 2.0 in 11
    # of 1000 epochs. Then each epoch multiplies it by 0.9875.
    "sgd": dict(lr=2.0, weight_decay=2e-5, warmup_epochs=11.0, schedule="exponential"),
    # The recipe of LeViT and DeiT. The weight decay is LeViT's; DeiT's is 0.05.
    "adamw": dict(lr=5e-4, weight_decay=0.025, warmup_epochs=5.0, schedule="cosine"),
}
# (learning rate at the start of warm-up, at the end of a cosine). Like `lr`, both are for a step of
# `lr_batch` images.
LR_ENDS = {"sgd": (0.01, 0.0), "adamw": (1e-6, 1e-5)}


# ---- batch sizes and learning rates --------------------------------------------------------------


def exponential_lr(epoch: float, *, epochs: float, peak: float, start: float, warmup: float) -> float:
    """Learning rate at `epoch`, a real number in 0..epochs.

    It rises linearly from `start` to `peak` during `warmup` epochs. Then it falls geometrically.
    The paper multiplies by 0.9875 in each of the 989 epochs after warm-up. A run of another length
    ends at the same rate. So its factor is 0.9875 ** (989 / (epochs - warmup)): 0.870 for 100
    epochs, 0.958 for 300, each with 11 epochs of warm-up.
    """
    if epoch < warmup:
        return start + (peak - start) * epoch / warmup
    return peak * 0.9875 ** (989 * (epoch - warmup) / max(epochs - warmup, 1e-12))


def cosine_lr(epoch: float, *, epochs: float, peak: float, start: float, warmup: float, end: float) -> float:
    """Learning rate at `epoch`: linear rise from `start` to `peak`, then a half cosine to `end`."""
    if epoch < warmup:
        return start + (peak - start) * epoch / warmup
    t = min(1.0, (epoch - warmup) / max(epochs - warmup, 1e-12))
    return end + (peak - end) * (1 + math.cos(math.pi * t)) / 2


def warmup_for(epochs: float, full: float) -> float:
    """Epochs of warm-up: `full`, the recipe's, but at most 11% of the run."""
    return min(full, 0.11 * epochs)


def kind_of(data: str | None) -> str:
    """The row of DATA_DEFAULTS for --data: "shapes", "cifar" or "folder"."""
    kinds = {None: "shapes", "shapes": "shapes", "cifar10": "cifar", "cifar100": "cifar"}
    return kinds.get(data, "folder")


def batch_per_gpu(model: str) -> int:
    """Images per GPU in section 4.1: 64 for LeViT, LCNet and ESNet, 32 for DeiT and MViTv2.

    The paper pretrains LCNet and ESNet by LeViT's recipe. timm's models are not in it: 32.
    """
    return 64 if model in {*LEVIT, *LCNET, *ESNET} else 32


def lr_batch(args: argparse.Namespace) -> int:
    """The number of images per step for which --lr is the largest learning rate.

    For SGD on a folder it is the paper's, 64 GPUs of `batch_per_gpu`: 4096 or 2048. For shapes and
    cifar it is 4096 with every model. For AdamW it is 512.
    """
    if args.optimizer == "adamw":
        return 512
    return 64 * batch_per_gpu(args.model) if kind_of(args.data) == "folder" else 4096


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step`, from 0: recipe's rate x global_batch / `lr_batch`."""
    scale = args.global_batch / lr_batch(args)
    start, end = (min(args.lr, lr) * scale for lr in LR_ENDS[args.optimizer])
    epoch, epochs = step / steps_per_epoch, total_steps / steps_per_epoch
    shape = dict(epochs=epochs, peak=args.lr * scale, start=start, warmup=min(args.warmup_epochs, epochs))
    return exponential_lr(epoch, **shape) if args.schedule == "exponential" else cosine_lr(epoch, **shape, end=end)


# ---- data ----------------------------------------------------------------------------------------


def train_transform(args: argparse.Namespace) -> Callable:
    """A function: image (PIL or uint8 tensor) -> augmented uint8 tensor (3, S, S)."""
    mean = [round(255 * m) for m in MEAN]
    steps = [v2.RandomHorizontalFlip()]
    if args.data != "shapes":  # shapes are drawn at image_size: nothing to crop
        steps.insert(0, v2.RandomResizedCrop(args.image_size, interpolation=v2.InterpolationMode.BICUBIC))
    if args.randaugment:
        steps.append(v2.RandAugment(magnitude=args.randaugment, fill=mean))
    return v2.Compose([*steps, v2.PILToTensor(), v2.RandomErasing(args.erasing, value=mean)])


def eval_transform(args: argparse.Namespace) -> Callable:
    """A function: image -> uint8 tensor (3, S, S).

    As in DeiT and LeViT, the short side is resized to S / 0.875, and the centre is cut out.
    """
    if args.data == "shapes":
        return v2.PILToTensor()  # shapes are tensors of this size already: they pass unchanged
    resize = v2.Resize(round(args.image_size / 0.875), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([without_far_ends, resize, v2.CenterCrop(args.image_size), v2.PILToTensor()])


def without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of the image, at most 8 times as long as wide.

    Resizing all of a very thin image could take gigabytes.
    """
    width, height = image.size
    return v2.functional.center_crop(image, [min(height, 8 * width), min(width, 8 * height)])


def open_split(args: argparse.Namespace, split: str) -> Dataset:
    """The "train" or "val" images of `args.data`, not augmented. The data set has `.classes`.

    Raises: ValueError for unknown data, a failed download, or a folder of another layout.
    """
    if args.data == "shapes":
        length = args.shapes_length if split == "train" else max(1, args.shapes_length // 10)
        return Shapes(split, length, args.image_size, args.seed)
    if args.data in ("cifar10", "cifar100"):
        cifar = getattr(torchvision.datasets, args.data.upper())
        try:
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                cifar("data", download=True)
            run.barrier()
            return cifar("data", train=split == "train")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {args.data} to ./data: {error}") from None
    if not Path(args.data).is_dir():
        raise ValueError(f"unknown data {args.data!r}: shapes, cifar10, cifar100 or an existing folder of "
                         "train/CLASS/ and val/CLASS/ or test/CLASS/")  # fmt: skip
    return open_folder(Path(args.data), split)


# ---- model, loss, metric -------------------------------------------------------------------------


def timm_model(args: argparse.Namespace, num_classes: int, image_size: int) -> nn.Module:
    """--model timm:NAME: with --attention softmax timm's own model, with castling its conversion.

    Raises: ValueError if timm is not installed or lacks the model, if `convert` cannot change it,
        or if a flag does not go with it.
    """
    name = args.model.removeprefix("timm:")
    try:
        import timm
    except ImportError:
        raise ValueError(f"--model {args.model} needs timm: pip install timm") from None
    look_up(dict.fromkeys(timm.list_models()), name, "model of timm")
    if args.attention not in ("castling", "softmax"):
        raise ValueError(f"timm's models have --attention softmax or castling, not {args.attention}")
    if args.distilled is not None or args.mlp_dwconv:
        raise ValueError("--distilled and --mlp-dwconv are for this project's models, not for timm's")
    rate = dict(drop_path_rate=args.drop_path or 0.0)
    for options in (rate | dict(img_size=image_size), rate, {}):  # some models lack these arguments
        try:
            model = timm.create_model(name, num_classes=num_classes, **options)
            break
        except TypeError as error:
            unfit = error
    else:
        raise ValueError(f"cannot build --model {args.model} with {num_classes} classes: {unfit}")
    if args.drop_path and not options:
        raise ValueError(f"--model {args.model} takes no --drop-path")
    if args.attention == "castling":
        dconv = 9 if args.dconv is None else args.dconv
        convert(model, epsilon=args.epsilon, schedule=args.mask_schedule, dconv=dconv)
    return model


def make_model(args: argparse.Namespace, num_classes: int, image_size: int) -> nn.Module:
    """The model that the flags describe.

    Raises: ValueError as `build_model` does, and for a model without classes.
    """
    if args.patch_size is not None and args.model not in DEIT:
        raise ValueError(f"--patch-size is for {', '.join(DEIT)}, not {args.model}")
    if args.model.startswith("timm:"):
        model = timm_model(args, num_classes, image_size)
    elif args.model in VIT_DENSE:
        raise ValueError(f"{args.model} gives feature maps, not classes: it is a backbone of segment.py")
    else:
        look_up([name for name in MODELS if name not in VIT_DENSE], args.model, "model")
        flags = ("drop_path", "distilled", "patch_size")  # a model has its own defaults for these
        given = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
        options = run.core_options(args) | given
        model = build_model(args.model, args.attention, num_classes, image_size, args.castle_downsample, **options)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: with `weight_decay`; and biases, norms and what model.no_weight_decay() names."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]


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
        outputs: logits (B, classes), or a pair of them: (class head, distillation head). With a
            teacher, the second head learns from it. Without, both learn the targets.
        targets: (B,) classes or (B, classes) probabilities.
        teacher: logits (B, classes).
        distillation: "none"; "hard", cross entropy to the teacher's most probable class; or "soft",
            tau^2 KL to the teacher's probabilities at temperature tau, averaged over images.
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


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, args: argparse.Namespace, device: torch.device) -> dict:
    """Mean cross entropy ("loss"), and top-1 and top-5 accuracy in percent ("acc1", "acc5").

    The ranks share the images. Each image counts once.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, loss, top-1, top-5
    for images, labels in loader:
        labels = labels.to(device)
        with autocast(args, device):
            logits = model(to_model_input(images, device, args.channels_last)).float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        sums[0] += len(labels)
        sums[1] += F.cross_entropy(logits, labels, reduction="sum")
        sums[2] += hits[:, 0].sum()
        sums[3] += hits.sum()
    images, loss, top1, top5 = run.all_sum(sums)
    return dict(loss=loss / images, acc1=100 * top1 / images, acc5=100 * top5 / images)


# ---- training ------------------------------------------------------------------------------------


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train, with a checkpoint and a line of the log per epoch. Then print the castling report."""
    with run.checked(args):  # a mistake in flags or files ends the script here, with one line
        # Defaults and data. Some defaults depend on the length of the run.
        resolve(args)
        train_set, val_set = open_split(args, "train"), open_split(args, "val")
        run.same_classes(train_set.classes, val_set.classes, f"train and val of {args.data}")
        steps_per_epoch, total_steps = run.epoch_and_run(args, len(train_set))
        if args.warmup_epochs is None:
            full = OPTIMIZERS[args.optimizer]["warmup_epochs"]
            args.warmup_epochs = warmup_for(total_steps / steps_per_epoch, full)
        if args.ema_decay is None:
            args.ema_decay = ema_decay_for(total_steps)

        # Model, moving average of its weights (EMA), optimiser, and a teacher for distillation.
        torch.manual_seed(args.seed)  # the same first weights on every rank
        model = make_model(args, len(train_set.classes), args.image_size)
        check_batch_norm(args, model)
        run.start_from(model, args, partial(load_pretrained, class_layers=("head", "classifier.", "fc.")))
        model.to(device)
        ema = run.averaged(model, args.ema_decay)
        groups = parameter_groups(model, args.weight_decay)
        optimizer = torch.optim.SGD(groups, momentum=0.9) if args.optimizer == "sgd" else torch.optim.AdamW(groups)
        teacher = load_teacher(args, train_set.classes, device)

        # One order of images follows from the seed. Each rank reads its part of it. A step always
        # has global_batch images over all ranks.
        sampler = EpochSampler(
            len(train_set), seed=args.seed, multiple=args.global_batch, rank=rank(), world=world_size()
        )
        augmented = Augmented(train_set, train_transform(args), args.seed)
        train_loader = make_loader(augmented, sampler, args.batch_size, args.workers)
        val_loader = validation_loader(args, val_set)

        # The run is at its first step, or at the step of the newest checkpoint in --output.
        state = run.Run(
            args, train_set.classes, model, ema, optimizer, train_loader, device,
            steps_per_epoch=steps_per_epoch, total_steps=total_steps, metrics=METRICS,
        )  # fmt: skip

    # For each batch MixUp or CutMix is chosen at random. Both turn classes (B,) into probabilities
    # (B, classes).
    kinds = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    mixes = [kind(alpha=alpha, num_classes=len(train_set.classes)) for kind, alpha in kinds if alpha > 0]
    mix = v2.RandomChoice(mixes) if mixes else lambda images, targets: (images, targets)

    # `net` is `model` wrapped for training (DDP, torch.compile). It has the same parameters.
    net = run.parallel(model, args, device)
    with state:
        state.bar.say(run.describe(state, describe_recipe(args), val_set))
        for _ in state.epochs():
            net.train()
            for batches in state.steps(train_loader):  # --accumulate batches; usually one
                # 1. Mask threshold and learning rate, which depend on the share of training done.
                set_threshold(model, state.progress)                                  # Eq. (10), D4
                lr = run.set_lr(optimizer, learning_rate(args, state.step, steps_per_epoch, total_steps))

                # 2. Forward and backward; `loss` is the mean over the step's batches.
                loss = torch.zeros((), device=device)
                for i, (images, targets) in enumerate(batches):
                    net.require_backward_grad_sync = i == len(batches) - 1  # DDP: once a step
                    images, targets = to_model_input(images, device, args.channels_last), targets.to(device)
                    images, targets = mix(images, targets)
                    with autocast(args, device):
                        outputs = net(images)
                        with torch.no_grad():
                            taught = None if teacher is None else teacher(images)
                        part = classification_loss(
                            outputs, targets, smoothing=args.smoothing, teacher=taught,
                            distillation=args.distillation, alpha=args.alpha, tau=args.tau,
                        ) / len(batches)  # fmt: skip
                    state.scaler.scale(part).backward()
                    loss += part.detach()

                # 3. Change the weights and their average. NaN on one rank stops all before that.
                state.update(loss, lr)

            # The epoch is trained and saved. Evaluate the averaged weights, with the branch and
            # without.
            metrics = {}
            if state.evaluation_due():
                metrics = run.evaluate_castling(lambda m: evaluate(m, val_loader, args, device), ema.module, "acc1")
            state.log(metrics)
        state.report()


def check_batch_norm(args: argparse.Namespace, model: nn.Module) -> None:
    """Raise ValueError if BatchNorm would get one value per channel, which is an error in training.

    BatchNorm2d does if an image has at most 32 px: then the last feature map may be 1 x 1.
    """
    refusing = (nn.BatchNorm1d, nn.BatchNorm2d) if args.image_size <= 32 else nn.BatchNorm1d
    if args.batch_size == 1 and any(isinstance(module, refusing) for module in model.modules()):
        raise ValueError(f"BatchNorm of {args.model} needs --batch-size 2 or more per process at {args.image_size} px")


def validation_loader(args: argparse.Namespace, val_set: Dataset) -> DataLoader:
    """Batches (images, classes) of this rank's share of `val_set`."""
    sampler = EpochSampler(len(val_set), rank=rank(), world=world_size())
    return make_loader(Augmented(val_set, eval_transform(args), args.seed), sampler, args.batch_size, args.workers)


def load_teacher(args: argparse.Namespace, classes: list[str], device: torch.device) -> nn.Module | None:
    """The frozen teacher of --teacher, a model of this project or of torchvision.

    Returns: None if no flag asks for distillation.
    Raises: ValueError for an unknown teacher, flags that do not go together, or a teacher of other
        classes than `classes`.
    """
    given = [args.distillation != "none", args.teacher is not None, args.teacher_checkpoint is not None]
    if not any(given):
        return None
    if not all(given):
        raise ValueError("distillation needs three flags: --distillation hard (or soft), --teacher and "
                         "--teacher-checkpoint")  # fmt: skip
    if args.teacher in MODELS:
        # As `train.py --model TEACHER --checkpoint FILE` would load it. Its other settings are in
        # the file.
        size = f"--image-size={args.image_size}"
        own = parser().parse_args([f"--model={args.teacher}", f"--checkpoint={args.teacher_checkpoint}", size])
        if not run.settings_for(own):
            own.attention = "softmax"  # a file of another project
        teacher, known = load(own, classes)
        run.same_classes(known, classes, f"{args.teacher_checkpoint} and {args.data}")
    elif args.teacher in torchvision.models.list_models(torchvision.models):
        teacher = torchvision.models.get_model(args.teacher, weights=None, num_classes=len(classes))
        load_pretrained(teacher, args.teacher_checkpoint)
        try:
            teacher.eval()(torch.zeros(1, 3, args.image_size, args.image_size))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"--teacher {args.teacher} takes no images of {args.image_size} px: {error}") from None
    else:
        raise ValueError(f"unknown teacher {args.teacher!r}: expected a model of this project or of torchvision.models")
    return teacher.eval().requires_grad_(False).to(device)


def describe_recipe(args: argparse.Namespace) -> str:
    """Optimiser, learning rate and augmentation, as a run prints them."""
    a, batch = args, lr_batch(args)
    changes = [f"{name} {value}" for name in AUGMENTATION if (value := getattr(a, name))]
    return f"""optimiser: {a.optimizer}, weight decay {a.weight_decay}
learning rate: {a.warmup_epochs:.4g} epochs of warm-up to {a.lr * a.global_batch / batch:.4g} \
(--lr {a.lr} x {a.global_batch} / {batch} images), then {a.schedule}
augmentation: {", ".join(changes) or "none"}"""


# ---- what is done with a checkpoint --------------------------------------------------------------


def load(args: argparse.Namespace, classes: list | None = None) -> tuple[nn.Module, list]:
    """The model in --checkpoint, in eval mode, and its classes.

    Classes that the file does not name are `classes`, or else "class 0", "class 1" and so on.
    """
    trained = run.settings_for(args)
    resolve(args, trained)
    classes = trained.get("classes") or classes
    classes = classes or [f"class {i}" for i in range(run.count_classes(args.checkpoint, HEADS))]
    model = make_model(args, len(classes), trained.get("image_size") or args.image_size)
    return run.load_trained(model, args), classes


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """--eval: print the scores of the checkpoint with and without its auxiliary branch."""
    with run.checked(args):
        resolve(args, run.settings_for(args))
        val_set = open_split(args, args.split)
        model, classes = load(args, val_set.classes)
        run.same_classes(classes, val_set.classes, f"{args.checkpoint} and {args.data}")
        loader = validation_loader(args, val_set)
    record = run.evaluate_castling(lambda m: evaluate(m, loader, args, device), model.to(device), "acc1")
    run.print_evaluation(args, record, METRICS)


def load_predictor(args: argparse.Namespace) -> tuple[nn.Module, list, Callable]:
    """`load`, and a function that makes the model's input of an image: uint8 (3, size, size)."""
    if args.data is None and not run.settings_for(args):
        args.data = "folder"  # a file of another project: size and crop as for photographs
    model, classes = load(args)
    transform = eval_transform(args)
    if args.data == "shapes":  # trained on whole square images: squeeze all of the image into one
        transform = v2.Compose([v2.Resize((args.image_size, args.image_size)), v2.PILToTensor()])
    return model, classes, transform


@torch.inference_mode()
def predict(args: argparse.Namespace, device: torch.device) -> None:
    """--image: print the five most probable classes of each file.

    With --json the output is one list of {"image": file, "probabilities": {class: 0..1}}.
    """
    with run.checked(args):
        run.check_images(args.image)
        model, classes, transform = load_predictor(args)
    model.to(device)
    with run.json_list(args) as printed:
        for path, image in run.read_each(args.image):
            with autocast(args, device):
                logits = model(to_model_input(transform(image)[None], device, args.channels_last)).float()
            top = logits[0].softmax(0).topk(min(5, len(classes)))
            names = [classes[i] for i in top.indices.tolist()]
            probabilities = dict(zip(names, top.values.tolist(), strict=True))
            printed.append(dict(image=str(path), probabilities=probabilities))
            if not args.json:
                say(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in probabilities.items()))


# ---- command line --------------------------------------------------------------------------------


def mixing(text: str) -> float:
    """argparse type: alpha of a Beta distribution, or 0 for none.

    Torch cannot draw numbers from a Beta distribution whose alpha is far below 0.001.
    """
    value = at_least(0, float)(text)
    if 0 < value < 1e-3:
        raise argparse.ArgumentTypeError(f"must be 0 or at least 0.001, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line of train.py. `resolve` later fills in the flags that are None."""
    p = run.Parser(
        "train.py", __doc__,
        epilog="--data is shapes, cifar10 or cifar100 (both are downloaded to ./data), or a folder that has\n"
        "train/<class>/ and val/<class>/ (or test/). In the defaults above, cifar is cifar10 or cifar100.\n"
        "--batch-size of a folder is by default 64 for LeViT, LCNet and ESNet, and 32 for other models.\n"
        "--shapes-length: for validation there are 1/10 as many images.\n"
        f"--model is one of {', '.join(name for name in MODELS if name not in VIT_DENSE)}; default levit128.\n"
        "It can also be timm:NAME: with --attention softmax a classifier of timm, with castling a vision\n"
        "transformer of timm that `convert` can change.\n"
        "Eq. is an equation of the paper. D4, D5 and so on are explained in docs/departures.md.",
    )  # fmt: skip
    recipe = run.shared_flags(p, DATA_DEFAULTS)
    add, on_off = recipe.add_argument, argparse.BooleanOptionalAction
    by_data = lambda flag: run.by_data(flag, DATA_DEFAULTS)  # noqa: E731
    add("--optimizer", choices=list(OPTIMIZERS), help="the optimiser. sgd, the default, is the paper's, with --lr "
        "2.0 (3.2 for shapes); adamw is LeViT's and DeiT's, with --lr 0.0005")  # fmt: skip
    add("--schedule", choices=("exponential", "cosine"), help="how the learning rate falls after warm-up; default "
        "exponential for sgd, cosine for adamw and for shapes")  # fmt: skip
    add("--weight-decay", type=at_least(0, float), help="how strongly weights are pulled towards zero; default 2e-5 "
        "for sgd, 0.025 for adamw")  # fmt: skip
    add("--warmup-epochs", type=at_least(0, float), help="epochs of warm-up, in which the learning rate rises; default "
        "11 for sgd, 5 for adamw, but at most 11%% of the run")  # fmt: skip
    add("--clip-grad", type=at_least(0, float), default=0.0, help="longer gradients are cut to this norm; default 0, "
        "for no limit")  # fmt: skip
    add("--smoothing", type=share, help="label smoothing: the share of a label that is spread over all classes; "
        f"{by_data('smoothing')}")  # fmt: skip
    add("--mixup", type=mixing, help=f"alpha of MixUp, which blends pairs of images; 0 for none; {by_data('mixup')}")
    add("--cutmix", type=mixing, help="alpha of CutMix, which pastes a part of one image into another; 0 for none; "
        f"{by_data('cutmix')}")  # fmt: skip
    add("--randaugment", type=at_least(0, most=30), help="strength of RandAugment's random changes of an image, up to "
        f"30; 0 for none; {by_data('randaugment')}")  # fmt: skip
    add("--erasing", type=share, help=f"probability that a rectangle of an image is erased; {by_data('erasing')}")
    add("--drop-path", type=share, help="stochastic depth: largest probability that a block is skipped for an image; "
        "default 0 for shapes, else the model's own")  # fmt: skip
    add("--ema-decay", type=share, help="decay of the averaged weights, which are evaluated and deployed: each step "
        "keeps this share of the average. Default: the average covers about the last 4%% of the run")  # fmt: skip
    add("--channels-last", action=on_off, default=False, help="keep images and convolutions in channels-last memory "
        "order; default off")  # fmt: skip
    add("--castle-downsample", action=on_off, help="also castle the blocks that reduce the number of tokens (D5); "
        "default on")  # fmt: skip
    add("--patch-size", type=at_least(1), help="side of DeiT's patches, in pixels; default 4 for deit_mini, else 16")
    add("--distilled", action=on_off, help="give the model a second head, for distillation; default as published")
    add("--distillation", default="none", choices=("none", "hard", "soft"), help="learn also from a teacher, as DeiT "
        "does: from its decisions (hard) or its probabilities (soft). The paper does not say which. Default none")
    add("--teacher", help="model that teaches: one of this project or of torchvision.models")
    add("--teacher-checkpoint", help="file of the teacher's weights")
    add("--alpha", type=share, default=0.5, help="share of distillation in the loss; default 0.5")
    add("--tau", type=at_least(1e-6, float), default=1.0, help="temperature of soft distillation; default 1")
    return p


def resolve(args: argparse.Namespace, trained: dict | None = None) -> None:
    """Fill in flags not given: from `trained`, a checkpoint's settings, else from the tables."""
    run.take_over(args, trained or {})
    args.model = args.model or "levit128"
    row = {"batch_size": batch_per_gpu(args.model)} | DATA_DEFAULTS[kind_of(args.data)]
    args.optimizer = args.optimizer or row["optimizer"]
    if args.optimizer != row["optimizer"]:  # then the row's learning rate and schedule do not fit
        row = {flag: value for flag, value in row.items() if flag not in ("lr", "schedule")}
    # `train` sets warmup_epochs when it knows the length of the run.
    recipe = dict(OPTIMIZERS[args.optimizer], warmup_epochs=None)
    run.fill_in(args, dict(castle_downsample=True, shapes_length=30000) | recipe | row)


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
            run.write_export(model, args)


if __name__ == "__main__":
    main(parser().parse_args())
