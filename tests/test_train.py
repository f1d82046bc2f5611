"""train.py: recipes, and the script from its arguments to its checkpoints."""

import json
import re

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import convert
import data
import fast
import flops
import run
import train
from attention import set_threshold
from conftest import SMALL, flags, refused, run_train, tiny
from models import build_model


def test_recipe_of_the_optimizer():
    """A data set's own learning rate belongs to its own optimiser: another brings its recipe's; flags win over both."""
    assert (flags().optimizer, flags().schedule, flags().lr) == ("sgd", "cosine", 3.2)
    adamw, own = flags("--optimizer=adamw"), flags("--optimizer=adamw", "--lr=1e-3", "--schedule=exponential")
    assert (adamw.lr, adamw.schedule, adamw.weight_decay) == (5e-4, "cosine", 0.025)
    assert (own.lr, own.schedule) == (1e-3, "exponential")
    assert flags().output == "runs/levit128-castling-shapes" and flags("--image=x").output is None
    folder = flags("--data=.")
    assert (folder.lr, folder.schedule, folder.epochs, folder.image_size) == (2.0, "exponential", 1000, 224)
    folder.warmup_epochs, folder.global_batch = 11.0, 4096
    assert train.learning_rate(folder, 11 * 313, 313, 313_000) == 2.0
    assert train.learning_rate(folder, 999 * 313, 313, 313_000) == pytest.approx(8.0e-6, rel=0.01)
    folder.global_batch = 512
    assert train.learning_rate(folder, 0, 2502, 2_502_000) == pytest.approx(0.01 / 8)
    folder.lr = 0.001  # below where warm-up starts: it does not run backwards
    rates = [train.learning_rate(folder, step, 10, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(0.001 / 8)


@pytest.mark.parametrize(("model", "images"), [
    ("levit128", 64), ("levit384", 64), ("esnet_vit_m", 64),
    ("deit_tiny", 32), ("deit_base", 32), ("mvitv2_small", 32),
])  # fmt: skip
def test_peak_learning_rate_is_the_papers(model, images):
    """Section 4.1 on a folder: 2.0, warmed up from 0.01, on 64 GPUs of 64 images for LeViT and of 32
    for DeiT and MViTv2; linear from there. shapes and cifar have one batch for every model: 3.2 and
    2.0 at 4096."""
    folder = flags("--data=.", model=model, warmup_epochs=11)
    assert folder.batch_size == images
    for gpus, times in ((64, 1.0), (8, 1 / 8)):
        folder.global_batch = gpus * folder.batch_size
        assert train.learning_rate(folder, 0, 100, 100_000) == 0.01 * times
        assert train.learning_rate(folder, 1100, 100, 100_000) == 2.0 * times
    for name, peak in (("shapes", 3.2), ("cifar10", 2.0), ("cifar100", 2.0)):
        args = flags(model=model, data=name, warmup_epochs=11)
        assert args.batch_size == 128
        assert train.learning_rate(args, 1100, 100, 100_000) == peak * 128 / 4096


def test_averaged_weights():
    """The horizon is 4% of the run: LeViT's and DeiT's 0.99996 at 626,000 steps. The average follows its recursion, and
    integer buffers survive it."""
    assert train.ema_decay_for(626_000) == pytest.approx(0.99996, abs=1e-6) and 0 <= train.ema_decay_for(1) < 1
    assert train.ema_decay_for(10_000) == pytest.approx(1 - 1 / 400) and train.ema_decay_for(10**9) == 0.99996
    model = nn.BatchNorm1d(2)
    ema, expected = run.averaged(model, 0.5), None
    for n, value in enumerate((1.0, 3.0, -2.0, 7.0)):
        nn.init.constant_(model.weight, value)
        model.num_batches_tracked.fill_(n)
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert ema.module.weight[0].item() == pytest.approx(expected)


def test_weight_decay_skips_norms_biases_and_tables():
    model = tiny("levit", "softmax")
    decayed, others = train.parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    tables = [p for name, p in model.named_parameters() if name.endswith("attention_biases")]
    assert tables and all(any(p is q for q in others["params"]) for p in tables)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_script_trains_castles_and_evaluates(tmp_path, capsys):
    """A whole run: files, log, report with gap 0.0 and empty masks; then --eval of each checkpoint gives the logged
    metrics, and --image names classes."""
    *epochs, report = run_train(tmp_path / "run", "--model=levit_mini")
    printed = capsys.readouterr().out
    assert "castling gap          0.00" in printed and "the masks are empty" in printed
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "lock", "log.jsonl", "last.pt", "best.pt", "castled.pt", "example.png",
    }  # fmt: skip
    assert [r["step"] for r in epochs] == [4] and epochs[0]["epoch"] == 0
    keys = {"epoch", "train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "n_parameters"}
    assert keys <= epochs[0].keys()  # as DeiT's logs call them
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["seed"] == 0 and config["environment"].items() >= {"torch": torch.__version__, "processes": 1}.items()
    assert re.fullmatch("None|[0-9a-f]{40}(-dirty)?", str(config["environment"]["commit"]))
    assert epochs[0]["images_per_s"] == pytest.approx(4 * config["global_batch"] / epochs[0]["seconds"])
    curve = epochs[0]["mask_curve"]  # at every step of so short a run, per layer
    assert curve.pop("step") == [0, 1, 2, 3] and curve.keys() == epochs[0]["mask_density"].keys()
    assert all(len(densities) == 4 and densities[0] >= densities[3] for densities in curve.values())
    report = report["castling_report"]
    assert report["castling_gap"] == 0 and not any(report["mask_density"].values())
    assert report["macs"]["castled"] == flops.count(*flops.meta_model("levit_mini", image_size=32, num_classes=12)).macs
    assert report["macs"]["castled"] < report["macs"]["with branch"]
    assert report["test_acc1"] == epochs[0]["test_acc1"] == epochs[0]["test_acc1_castled"]
    for name in ("last.pt", "best.pt", "castled.pt"):
        train.main(train.parser().parse_args(
            ["--eval", "--json", f"--checkpoint={tmp_path / 'run' / name}", "--workers=0"]))
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["test_loss"] == pytest.approx(epochs[0]["test_loss"], rel=1e-5)
        assert record.get("castling_gap") == (None if name == "castled.pt" else 0)  # castled: nothing left to lose
    Image.fromarray(data.Shapes("val", 12, 50).scene(3).image).save(tmp_path / "one.png")
    asked = [f"--image={tmp_path}/one.png", f"--checkpoint={tmp_path}/run/best.pt"]
    train.main(train.parser().parse_args(asked))
    named = capsys.readouterr().out
    assert sum(name in named for name in data.SHAPES) >= 5 and named.startswith(str(tmp_path / "one.png"))
    train.main(train.parser().parse_args([*asked, "--json"]))
    (one,) = json.loads(capsys.readouterr().out)
    assert one["image"] == str(tmp_path / "one.png")
    shown = ", ".join(f"{name} {p:.1%}" for name, p in one["probabilities"].items())
    assert len(one["probabilities"]) == 5 and named == f"{tmp_path}/one.png: {shown}\n"
    train.main(train.parser().parse_args([*asked, "--json", "--amp"]))  # in the precision of --eval
    rounded = json.loads(capsys.readouterr().out)[0]["probabilities"]
    assert rounded != one["probabilities"] and rounded == pytest.approx(one["probabilities"], abs=0.05)


def test_log_follows_the_masks(tmp_path):
    """`mask_curve` is the density at each step's own threshold: a fixed threshold of 0 keeps every entry."""
    epoch, _ = run_train(tmp_path, "--max-steps=2", "--epsilon=0", "--mask-schedule=fixed")
    assert epoch["mask_curve"].pop("step") == [0, 1]
    assert all(densities == [1, 1] for densities in epoch["mask_curve"].values())


@pytest.mark.parametrize(("options", "lines"), [
    (["--model=levit_mini", "--mask-schedule=anneal", "--image-size=64"], [  # 4 x 4, 2 x 2 and 1 x 1 tokens
        r"14 of 14 masks hold entries", r"4 layers of 16 tokens, threshold 0\.0156: .*% of entries kept",
    ]),
    (["--model=levit_mini", "--image-size=64"], [
        r" of 14 masks hold", r"of 4 tokens, threshold 1: 0%", r"of 1 tokens, threshold 1: 0%",
    ]),
    ([], [r": 0 of 6 masks hold", r"6 layers of 65 tokens, threshold 0\.0615: 0% of entries kept"]),
    (["--attention=linear_angular"], []),
])  # fmt: skip
def test_a_run_says_once_what_its_masks_hold(tmp_path, capsys, options, lines):
    """The first step's masks by token count; layers of at most 4 tokens, whose ramp starts at 1, hold none."""
    run_train(tmp_path, "--max-steps=1", *options)
    out = capsys.readouterr().out
    assert out.count("branch: ") == bool(lines)
    for line in lines:
        assert re.search(line, out), line


@pytest.mark.parametrize(("attention_name", "dconv", "mlp_dwconv"), [
    ("castling", 9, 5), ("castling", 0, 5), ("castling", 9, 0), ("castling", 0, 0), ("softmax", 9, 5),
])  # fmt: skip
@pytest.mark.parametrize("name", ["deit_mini", "levit_mini", "lcnet_vit_s"])
def test_the_two_dwconvs_are_switched_apart(name, attention_name, dconv, mlp_dwconv):
    """--dconv is the one on V, --mlp-dwconv the ones in the MLPs, which softmax models can have too."""
    args = flags(f"--model={name}", f"--attention={attention_name}", f"--dconv={dconv}", f"--mlp-dwconv={mlp_dwconv}")
    names = [n for n, _ in train.make_model(args, 3, 64).named_parameters()]
    assert any(".dconv." in n for n in names) == (dconv > 0 and attention_name == "castling")
    assert any("mlp.dwconv." in n for n in names) == (mlp_dwconv > 0)


def test_softmax_weights_start_a_castling_run_without_its_dconv(tmp_path, capsys):
    """--zero-dconv: a run from a softmax checkpoint starts with DWConv(V) = 0; without the flag it starts at random.
    What the checkpoint holds is taken."""
    run_train(tmp_path / "softmax", "--model=deit_mini", "--image-size=32", "--attention=softmax", "--max-steps=1")
    start = f"--checkpoint={tmp_path / 'softmax' / 'best.pt'}"
    for zero in (True, False):
        folder = tmp_path / str(zero)
        options = ["--model=deit_mini", "--image-size=32", start, "--max-steps=1", "--lr=0", *["--zero-dconv"] * zero]
        run_train(folder, *options)
        weights = torch.load(folder / "last.pt")["model"]
        assert (weights["blocks.0.attn.dconv.weight"].abs().max() == 0) == zero
        theirs = torch.load(tmp_path / "softmax" / "best.pt")["ema"]
        assert_close(weights["blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"])
    none = ("--model=deit_mini", "--image-size=32", "--max-steps=1", "--dconv=0", "--zero-dconv")
    assert "no DWConv on V" in refused(capsys, 2, run_train, tmp_path / "none", *none)


def test_settings_of_the_first_version_are_understood():
    """Its DWConvs had other names in each script: checkpoints with those settings build the same model."""
    for then, now in [
        (dict(dwconv=False), dict(dconv=0, mlp_dwconv=0)), (dict(dwconv=None), {}), (dict(dwconv=True), {}),
        (dict(mlp_dw=None, v_dconv=True), {}), (dict(mlp_dw=0, v_dconv=False), dict(dconv=0, mlp_dwconv=0)),
        (dict(mlp_conv=5), dict(mlp_dwconv=5)), (dict(dconv=3, mlp_dwconv=0), dict(dconv=3, mlp_dwconv=0)),
    ]:  # fmt: skip
        assert run.renamed(dict(model="deit_tiny") | then) == dict(model="deit_tiny") | now


def test_evaluation_can_be_rarer(tmp_path):
    """--eval-every N: every N-th epoch and the last are evaluated, every epoch is logged and can be resumed."""
    *epochs, report = run_train(tmp_path, "--epochs=3", "--max-steps=15", "--eval-every=2")
    assert ["test_acc1" in record for record in epochs] == [False, True, True]
    assert report["castling_report"]["test_acc1"] == epochs[-1]["test_acc1"]


@pytest.mark.parametrize("options", [
    ("--attention=softmax", "--amp"),
    ("--attention=relu_e", "--optimizer=adamw", "--clip-grad=1", "--accumulate=2", "--batch-size=4"),
    ("--model=deit_tiny", "--mixup=0.8", "--cutmix=1", "--smoothing=0.1", "--erasing=0.5", "--channels-last"),
    ("--model=levit_mini", "--mask-schedule=fixed", "--no-castle-downsample", "--drop-path=0.1",
     "--schedule=exponential"),
    ("--model=levit_mini", "--amp", "--mask-schedule=anneal", "--image-size=64"),  # see half_precision_stays_finite
    ("--model=lcnet_vit_s", "--drop-path=0.1"),
    ("--model=esnet_vit_s", "--dconv=0", "--mlp-dwconv=0"),
])  # fmt: skip
def test_every_option_trains(tmp_path, capsys, options):
    """Each combination runs to its report; a model without a branch has no threshold and reports no gap."""
    *_, report = run_train(tmp_path, "--max-steps=2", *options)
    branch = all("attention=" not in o for o in options)
    assert ("castling_gap" in report["castling_report"]) == branch
    assert ("masks: schedule" in capsys.readouterr().out) == branch


def teacher_of(*source):
    """The teacher that these flags of distillation name."""
    return train.load_teacher(flags(*SMALL, *source), list(data.SHAPES), torch.device("cpu"))


def test_patches_of_any_size_train(tmp_path, capsys):
    """--patch-size P makes a DeiT of ceil(S / P)^2 tokens and the class token. The checkpoint answers for it where
    weights are evaluated or taught from; another size is another run."""
    for patch, tokens in ((2, 257), (8, 17)):
        folder, small = tmp_path / str(patch), ("--max-steps=1", "--model=deit_mini", f"--patch-size={patch}")
        epoch, _ = run_train(folder, *small)
        kept = convert.read_checkpoint(folder / "best.pt")
        assert kept["ema"]["pos_embed"].shape == (1, tokens, 96) and kept["args"]["patch_size"] == patch
        capsys.readouterr()
        train.main(train.parser().parse_args(["--eval", "--json", f"--checkpoint={folder}/best.pt", "--workers=0"]))
        assert json.loads(capsys.readouterr().out)["test_loss"] == pytest.approx(epoch["test_loss"], rel=1e-5)
    source = ("--distillation=hard", "--teacher=deit_mini", f"--teacher-checkpoint={folder}/best.pt")
    assert teacher_of(*source).patch_size == 8
    said = refused(capsys, 2, run_train, folder, "--max-steps=1", "--model=deit_mini", "--patch-size=4")
    assert "patch_size 8 -> 4" in said


def test_a_teacher_of_another_image_size_is_refused(tmp_path, monkeypatch):
    """torchvision's ViTs take the size that they were built for. It is asked before training."""
    import torchvision

    options = dict(image_size=224, patch_size=32, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    vit = torchvision.models.VisionTransformer(**options, num_classes=len(data.SHAPES))
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **options: vit)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="vit_b_32 takes no images of .* px: Wrong"):
        teacher_of("--distillation=hard", "--teacher=vit_b_32", f"--teacher-checkpoint={tmp_path}/vit.pt")


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_trains(tmp_path, capsys, kind):
    """From a torchvision model, and from a run of this script, each loaded from a local file."""
    import torchvision

    teacher = torchvision.models.get_model("mobilenet_v3_small", weights=None, num_classes=len(data.SHAPES))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    source = (f"--distillation={kind}", "--teacher=mobilenet_v3_small", f"--teacher-checkpoint={tmp_path}/teacher.pt")
    run_train(tmp_path / "a", "--max-steps=1", *source, "--distilled")
    (tmp_path / "teacher.pt").rename(tmp_path / "moved.pt")  # a run continues with it, and says so
    capsys.readouterr()
    run_train(tmp_path / "a", "--max-steps=1", *source[:2], f"--teacher-checkpoint={tmp_path}/moved.pt", "--distilled")
    assert f"the teacher is now in {tmp_path}/moved.pt, and was in {tmp_path}/teacher.pt" in capsys.readouterr().out
    own = (f"--distillation={kind}", "--teacher=deit_mini", f"--teacher-checkpoint={tmp_path}/a/best.pt")
    run_train(tmp_path / "b", "--max-steps=1", *own)  # a teacher with two heads, as its checkpoint says
    teacher = teacher_of(*own)
    assert teacher.head_dist is not None and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_folder_trains_and_names_what_is_wrong(tmp_path, photos, capsys):
    """Folders train and predict; missing splits, empty classes, differing classes and unreadable images are named."""
    run_train(tmp_path / "run", f"--data={photos}", "--batch-size=4", "--max-steps=2")
    images = ["--image", *map(str, (photos / "test" / "dark").iterdir())]
    train.main(train.parser().parse_args([*images, f"--checkpoint={tmp_path}/run/best.pt"]))
    assert capsys.readouterr().out.count("bright") == 3
    run_train(tmp_path / "shapes", f"--checkpoint={tmp_path}/run/best.pt", "--max-steps=1")  # other classes
    assert re.search("^new: head.bias, head.weight$", capsys.readouterr().out, re.MULTILINE)

    def said(code, *options):
        return refused(capsys, code, run_train, tmp_path / "refused", "--batch-size=4", "--max-steps=2", *options)

    assert "classes" in said(2, "--eval", f"--checkpoint={tmp_path}/run/best.pt", "--data=shapes")
    (photos / "test" / "dark").rename(photos / "test" / "dusk")
    assert "only the first has dark; only the second has dusk" in said(2, f"--data={photos}")
    (photos / "test" / "dusk").rename(photos / "test" / "dark")
    (photos / "train" / "hollow").mkdir()
    assert "hollow" in said(2, f"--data={photos}")
    (photos / "train" / "hollow").rmdir()
    bad = photos / "train" / "dark" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    for workers in (0, 1):
        assert str(bad) in said(1, f"--data={photos}", f"--workers={workers}", "--max-steps=3")
    (photos / "test").rename(photos / "elsewhere")
    assert f"{photos}/test" in said(2, f"--data={photos}")
    assert "no-such-folder" in said(2, "--data=no-such-folder")


ERRORS = [  # flags, what the one line about them holds
    (["--model=levit_128"], "levit128"), (["--attention=softmx"], "softmax"), (["--epsilon=2"], "0..1"),
    (["--epoch=1"], "did you mean --epochs"),
    (["--epochs=0"], "argument --epochs: must be at least 1, got 0"), (["--lr=x"], "'x'"),
    (["--mask-schedule=up"], "up"), (["--batch-size=41"], "40"), (["--eval"], "--checkpoint"),
    (["--checkpoint=none.pt"], "none.pt"), (["--output=/dev/null/x"], "/dev/null/x"),
    (["--model=levit_mini", "--batch-size=1"], "BatchNorm"), (["--model=lcnet_s", "--batch-size=1"], "BatchNorm"),
    (["--randaugment=31"], "0..30"), (["--seed=99999999999999999999"], "seed"),
    (["--eval", "--image=x", "--checkpoint=y"], "not allowed with"), (["--export=x.pt2"], "need --checkpoint"),
    (["--export=x.pth", "--checkpoint=y"], "x.pth"),
    (["--export=x.pt2", "--checkpoint=y", "--eval"], "not allowed with"),
    # distillation, patches
    (["--distillation=hard"], "--teacher"), (["--teacher=deit_tiny"], "--distillation"),
    (["--distillation=hard", "--teacher=vgg99", "--teacher-checkpoint=x"], "vgg99"),
    *((["--patch-size=4", f"--model={model}"], f"is for deit_mini, deit_tiny, deit_small, deit_base, not {model}")
      for model in ("levit128", "timm:vit_tiny_patch16_224")),
    # values that are empty, or that no run could use
    (["--image", "", "--checkpoint=x"], "--image has an empty value"), (["--data", ""], "--data has an empty value"),
    (["--output="], "--output has an empty value"), (["--lr=inf"], "got inf"), (["--lr=nan"], "got nan"),
    (["--lr=1e308"], "--lr: must be within 0..1e+30, got 1e308"), (["--weight-decay=inf"], "got inf"),
    (["--mixup=1e-300"], "must be 0 or at least 0.001, got 1e-300"), (["--cutmix=1e-9"], "got 1e-9"),
    (["--image-size=1000000"], "--image-size: must be within 1..4096, got 1000000"),
    (["--workers=100000"], "--workers: must be within 0..128, got 100000"),
    # flags that do not exist
    (["--batchsize=4"], "unrecognized arguments: --batchsize=4 (did you mean --batch-size?)"),
    (["--resume"], "unrecognized arguments: --resume (the same command again continues a run)"),
    (["--gpus=8"], "(torchrun --nproc-per-node=GPUS starts a process for each GPU)"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate\n"),
    (["--model=vit_tiny"], "unknown model 'vit_tiny': did you mean mvitv2_tiny or deit_tiny"),  # not vit_tiny_dense
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_a_mistake_is_answered_in_two_lines(tmp_path, capsys, options, message):
    """Values out of bounds are named as every other mistake: before work starts, with status 2, one line of what is
    wrong, and, about the form of a command, one more of where to read; no usage."""
    said = refused(capsys, 2, run_train, tmp_path / "x", *options)
    assert said.startswith("train.py: error: ") and message in said
    assert said.splitlines()[1:] in ([], ["train.py --help lists all flags"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--model=timm:vit_tiny_patch17_224"], "vit_tiny_patch16_224"),
    (["--model=timm:swin_tiny_patch4_window7_224"], "relative_position_bias_table"),
    (["--model=timm:vit_tiny_patch16_224", "--attention=cosine"], "castling, not cosine"),
    (["--model=timm:vit_tiny_patch16_224", "--distilled"], "--distilled"),
    (["--model=timm:vgg11", "--attention=softmax", "--drop-path=0.1"], "--model timm:vgg11 takes no --drop-path"),
])  # fmt: skip
def test_timm_arguments_are_checked(tmp_path, capsys, options, message):
    """What timm does not have, `convert` cannot take or a flag does not fit is named."""
    pytest.importorskip("timm")
    assert message in refused(capsys, 2, run_train, tmp_path, *options)


def test_a_value_may_end_in_an_equals_sign():
    """Only what a flag is given is looked at: a folder named a= is one."""
    assert train.parser().parse_args(["--data", "a=", "--output=b="]).data == "a="


def test_non_finite_loss_stops(tmp_path, capsys):
    """The message has step, learning rate and the last good checkpoint, and that checkpoint still loads."""
    message = r"loss is (nan|inf) at step \d+, learning rate .*there is no checkpoint before it"
    assert re.search(message, refused(capsys, 1, run_train, tmp_path, "--lr=1e30", "--max-steps=10"))
    assert not (tmp_path / "last.pt").exists()
    refused(capsys, 1, run_train, tmp_path, "--lr=1e30", "--max-steps=2")  # in the last step: seen by the evaluation
    assert not (tmp_path / "castled.pt").exists()


def test_a_model_of_timm_without_drop_path_or_image_size(tmp_path):
    """It is built without them. A head `fc` for other classes is new, and a file with it is a model of the script."""
    timm = pytest.importorskip("timm")
    args = flags("--model=timm:densenet121", "--attention=softmax")
    assert train.make_model(args, 3, 32).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "five.pth")
    options = ("--model=timm:test_resnet", "--attention=softmax", f"--checkpoint={tmp_path}/five.pth", "--max-steps=1")
    run_train(tmp_path / "x", *options)
    assert run.count_classes(f"{tmp_path}/five.pth", train.HEADS) == 5


def test_train_export(tmp_path, capsys):
    """--export writes a checkpoint castled and runs the file; timm's models train, resume, evaluate and export by
    name."""
    pytest.importorskip("timm")
    name, kept = "--model=timm:test_vit", f"--checkpoint={tmp_path / 'best.pt'}"
    run_train(tmp_path, name, "--max-steps=2")
    run_train(tmp_path, name, "--max-steps=2")
    assert "resumed" in capsys.readouterr().out
    train.main(train.parser().parse_args(["--eval", "--json", "--workers=0", kept]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["castling_gap"] == 0
    train.main(train.parser().parse_args([kept, f"--export={tmp_path / 'model.pt2'}"]))
    assert "run on 1x3x32x32, 2x3x64x96, 3x3x64x64; largest difference" in capsys.readouterr().out
    model = torch.export.load(tmp_path / "model.pt2").module()
    assert model(torch.zeros(2, 3, 96, 128)).shape == (2, 12)


@pytest.mark.parametrize("name", ["levit128", "deit_tiny", "mvitv2_tiny", "lcnet_vit_s"])
def test_no_layer_waits_for_the_device(name):
    """A training step with every branch alive runs on the meta device, whose tensors hold no values: nothing in it asks
    for one, which on a GPU would wait until all work is done. The average's count of updates is on the CPU."""
    fast.enable()
    with torch.device("meta"):
        model = build_model(name, num_classes=5, image_size=64, schedule="fixed", epsilon=0.0, drop_path=0.1).train()
        optimizer = torch.optim.SGD(train.parameter_groups(model, 1e-4), lr=0.1, momentum=0.9)
        images, targets = torch.zeros(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)
    average = run.averaged(model, 0.99)
    for step in range(2):
        set_threshold(model, step / 10)
        train.classification_loss(model(images), targets, smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
    with pytest.raises(RuntimeError, match="meta"):
        model(images).sum().item()
