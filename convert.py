"""Read checkpoints, convert other libraries' models, fold norms, export models.

    load_pretrained(model, "levit128.pth")  load this project's, timm's or the official weights
    convert(model)                          put castling attention into another library's ViT
    fuse(model)                             fold every BatchNorm into the layer beside it
    export(model, "model.onnx", 224)        write the castled model as .onnx or .pt2, and check it

`convert` and `fuse` change the model in place. `fuse` and `export` take converted models too.
B images, N tokens, C channels, H heads, D channels per head; `grid`: token grid (y, x), row-major.
"""

import copy
import importlib.util
import inspect
import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._pytree import tree_leaves

from attention import AttentionCore, castle, cores
from models import (
    CastlingLeViTAttention,
    DenseViT,
    LCNet,
    LeViT,
    LinearNorm,
    MlpDWConv,
    MViTv2,
    NormLinear,
    ViT,
    build_model,
    list_models,
    pair,
    resize_offsets,
    resize_positions,
    resize_relative,
    symbolic,
)

# ---- BatchNorm folded ----------------------------------------------------------------------------

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def normed_layers(module: nn.Module) -> list[tuple[nn.Conv2d | nn.Linear, str]]:
    """[(layer, name of the norm applied right after it)] of a module whose forward is known."""
    if isinstance(module, MlpDWConv):
        return [(module, "norm")]
    if isinstance(module, LinearNorm):
        return [(module.linear, "bn")]
    if isinstance(module, LCNet):
        return [(module.conv_stem, "bn1")]
    if type(module).forward is not nn.Sequential.forward:
        return []
    children = list(module.named_children())
    pairs = zip(children, children[1:], strict=False)
    return [(layer, name) for (_, layer), (name, norm) in pairs if type(layer) is nn.Conv2d]


def fuse(model: nn.Module) -> nn.Module:
    """Fold each BatchNorm1d and 2d into the layer beside it, in place, for inference; return the model.

    The function stays the same up to rounding. With running mean m and variance u, scale g, shift b
    and s = sqrt(u + eps), the layer W x + c gets the weights
        norm after it:                        W' = (g / s) W,       c' = (g / s) (c - m) + b
        norm before it, as in LeViT's heads:  W' = W diag(g / s),   c' = c + W (b - (g / s) m).
    In other libraries' models only a Conv2d with the norm right after it in an nn.Sequential is
    folded. Layers that are used more than once are left as they are.
    Raises: ValueError for a model in training mode, in which norms are not constant.
    """
    if any(isinstance(module, BatchNorm) and module.training for module in model.modules()):
        raise ValueError("fuse needs a model in eval mode: call model.eval() first")
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for module in list(model.modules()):
        if isinstance(module, NormLinear) and isinstance(module.bn, BatchNorm):
            bn, linear = module.bn, module.linear
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            linear.bias = nn.Parameter(linear(bn.bias - scale * bn.running_mean).detach(), linear.bias.requires_grad)
            linear.weight = nn.Parameter((linear.weight * scale).detach(), linear.weight.requires_grad)
            module.bn = nn.Identity()
        for layer, name in normed_layers(module):
            norm = getattr(module, name)
            # A subclass of BatchNorm may do more, so only the two classes themselves are folded.
            plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) and norm.track_running_stats
            if plain and uses[id(layer)] == uses[id(norm)] == 1:
                statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                fold = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
                layer.weight, layer.bias = fold(layer.weight, layer.bias, *statistics)
                setattr(module, name, nn.Identity())
    return model


# ---- other people's models -----------------------------------------------------------------------


class ConvertedAttention(AttentionCore):
    """Another library's self-attention with the castling core; its layers keep their names.

    A subclass is for one layout. `parts`: names of the children and parameters that are kept.
    `inputs`: arguments that the original's forward may have. `heads_of(module)`: (H, D).
    A call with a mask of token pairs raises ValueError.
    """

    parts: tuple[str, ...]
    inputs: tuple[str, ...]

    def __init__(self, original: nn.Module, **core):
        rates = (getattr(original, name, 0.0) for name in ("attn_drop", "attention_dropout", "dropout", "dropout_prob"))
        dropout = max(getattr(rate, "p", rate) for rate in rates)
        super().__init__(self.heads_of(original)[0], auxiliary=True, dropout=dropout, **core)
        like = next(original.parameters())
        self.to(like.device, like.dtype)
        for name in self.parts:
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))
        self.train(original.training)

    @classmethod
    def problems(cls, module: nn.Module) -> list[str]:
        """Reasons why a module of this layout cannot be converted; [] if it can."""
        state = {name.split(".")[0] for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]}
        inputs = inspect.signature(module.forward).parameters
        scale, dim = getattr(module, "scale", getattr(module, "scaling", None)), cls.heads_of(module)[1]
        found = []
        if extra := sorted(state - set(cls.parts)):
            found.append(f"linear-angular attention has no place for {', '.join(extra)}")
        if unknown := [name for name in inputs if name not in (*cls.inputs, "kwargs")]:
            found.append(f"its forward takes {', '.join(unknown)}, unknown here")
        if isinstance(scale, float) and not math.isclose(scale, dim**-0.5):
            found.append(f"its logits are scaled by {scale:.4g}, not 1 / sqrt({dim})")
        if getattr(module, "is_causal", False):
            found.append("it is causal")
        return found or cls.strange(module)

    @classmethod
    def strange(cls, module: nn.Module) -> list[str]:
        """Try a module on a few tokens: how does it differ from softmax attention? [] if not."""
        weight = next(module.parameters())
        if weight.is_meta:
            return []
        original = copy.deepcopy(module).eval().cpu().float()
        ours = cls(copy.deepcopy(original))
        ours.kernel, ours.auxiliary = "softmax", False
        x = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        args = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
        try:
            with torch.no_grad():
                theirs, ours = original(*args), ours(*args)
        except Exception as error:  # whatever its own checks raise
            return [f"it does not take tokens (B, N, C) alone: {str(error).splitlines()[0]}"]
        if isinstance(theirs, tuple) != isinstance(ours, tuple):
            return [f"it returns a {type(theirs).__name__}, not a {type(ours).__name__}"]
        theirs, ours = (y[0] if isinstance(y, tuple) else y for y in (theirs, ours))
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-4, rtol=1e-4):
            return ["it computes something else than softmax attention over tokens"]
        return []

    def refuse(self, **given) -> None:
        """Raise ValueError for an argument that is given: castling attention cannot use it."""
        for name, value in given.items():
            if value is not None and value is not False:
                raise ValueError(f"a converted {type(self).__name__} cannot use {name}")

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, (B, H, N, D), after the original's norms, if it has any."""
        return q, k

    def split_and_attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
        """The core on q, k, v (B, N, H D) -> (B, N, H D)."""
        if q.ndim != 3:
            raise ValueError(f"expected tokens (B, N, C), got {q.ndim} axes: {tuple(q.shape)}")
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in (q, k, v))
        return rearrange(self.attend(*self.normed(q, k), v, padding=padding), "b h n d -> b n (h d)")


class FusedAttention(ConvertedAttention):
    """timm's `Attention`: one layer to q, k, v with layout (3, H, D); norms of q, k and output."""

    parts = ("qkv", "q_norm", "k_norm", "norm", "proj", "proj_drop")
    inputs = ("x", "attn_mask", "is_causal")

    def __init__(self, original: nn.Module, **core):
        super().__init__(original, **core)
        for name in self.parts:
            if not hasattr(self, name):  # older versions of timm have fewer parts
                self.add_module(name, nn.Identity())

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("qkv", "proj"))

    @staticmethod
    def heads_of(module: nn.Module) -> tuple[int, int]:
        return module.num_heads, module.qkv.out_features // 3 // module.num_heads

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        self.refuse(attn_mask=attn_mask, is_causal=is_causal)
        y = self.split_and_attend(*self.qkv(x).chunk(3, dim=-1))
        return self.proj_drop(self.proj(self.norm(y)))


class SeparateAttention(ConvertedAttention):
    """Hugging Face's: three layers to q, k, v. In older versions the output layer is outside."""

    triples = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
    outputs = ("o_proj", "out_proj")
    parts = (*triples[0], *triples[1], *outputs)
    inputs = ("hidden_states", "attention_mask", "head_mask", "output_attentions")

    def __init__(self, original: nn.Module, **core):
        super().__init__(original, **core)
        self.inputs = tuple(inspect.signature(original.forward).parameters)  # versions differ

    @classmethod
    def layers(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        """The layers to q, k and v; () if there are none."""
        for triple in cls.triples:
            if all(isinstance(getattr(module, name, None), nn.Linear) for name in triple):
                return tuple(getattr(module, name) for name in triple)
        return ()

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return bool(cls.layers(module))

    @classmethod
    def heads_of(cls, module: nn.Module) -> tuple[int, int]:
        heads = getattr(module, "num_attention_heads", None) or module.num_heads
        return heads, cls.layers(module)[0].out_features // heads

    @classmethod
    def problems(cls, module: nn.Module) -> list[str]:
        widths = [layer.out_features for layer in cls.layers(module)]
        unequal = [] if len(set(widths)) == 1 else [f"q, k and v have {widths} channels, not the same number"]
        return unequal + super().problems(module)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        given = dict(zip(self.inputs[1:], args, strict=False)) | kwargs
        self.refuse(**{name: given[name] for name in given if name not in ("output_hidden_states", "return_dict")})
        y = self.split_and_attend(*(layer(hidden_states) for layer in self.layers(self)))
        for name in self.outputs:
            y = getattr(self, name)(y) if hasattr(self, name) else y
        return y, None


class PackedAttention(ConvertedAttention):
    """torch.nn.MultiheadAttention, as in torchvision's models and nn.TransformerEncoder.

    query, key and value must be the same tensor. It returns (output, None) for any `need_weights`.
    """

    parts = ("in_proj_weight", "in_proj_bias", "out_proj")
    inputs = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights",
              "is_causal")  # fmt: skip
    # nn.TransformerEncoderLayer reads this. If True, it would compute softmax attention by itself.
    _qkv_same_embed_dim = False

    def __init__(self, original: nn.MultiheadAttention, **core):
        super().__init__(original, **core)
        self.batch_first = original.batch_first

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @staticmethod
    def heads_of(module: nn.Module) -> tuple[int, int]:
        return module.num_heads, module.head_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        self.refuse(attn_mask=attn_mask, is_causal=is_causal)
        if key is not query or value is not query:
            raise ValueError("a converted attention is self-attention: query, key and value must be one tensor")
        padding = key_padding_mask
        if padding is not None and padding.dtype != torch.bool:  # TransformerEncoderLayer's 0, -inf
            padding = padding == -math.inf
            if (key_padding_mask.masked_fill(padding, 0) != 0).any():
                raise ValueError("key_padding_mask must be boolean, or hold only 0 and -inf")
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        y = self.out_proj(self.split_and_attend(q, k, v, padding))
        return y if self.batch_first else y.transpose(0, 1), None


LAYOUTS = (PackedAttention, FusedAttention, SeparateAttention)


@dataclass
class ConversionReport:
    """What `convert` did: {layer: {"kept": parameters, "dropped": what, "new": parameters}}."""

    layers: dict[str, dict[str, list[str]]]

    def __str__(self) -> str:
        kinds = Counter()  # equal layers are listed once
        for name, layer in self.layers.items():
            lines = [f"  {group}: {', '.join(items)}" for group, items in layer.items()]
            kinds[re.sub(r"\d+", "*", name), "\n".join(lines)] += 1
        lines = [f"{kind} x {count}\n{lines}" for (kind, lines), count in kinds.items()]
        advice = "The converted model is another function with the same weights: fine-tune it before you use it."
        return "\n".join([*lines, advice])


def convert(
    model: nn.Module, *, epsilon: float = 0.02, schedule: str = "ramp", dconv: int = 9
) -> ConversionReport:
    """Replace softmax self-attention by castling attention in another library's model, in place.

    Known: timm's `Attention`; Hugging Face's with query, key and value layers (ViT, DINOv2, ...);
    torch.nn.MultiheadAttention (torchvision's ViT, nn.TransformerEncoder). Every weight keeps its
    name. New in the state dict are each layer's `dconv.weight` and, until `castle`, `progress`.
    Norms of q and k, prefix tokens and attention dropout (now on the branch) are kept. Afterwards,
    fine-tune with `set_threshold`, then `castle`. If the model passes a mask, or another sequence
    as keys, to a layer, its first forward raises ValueError.

    Args: epsilon, schedule, dconv: of every AttentionCore.
    Raises: ValueError that names each layer that cannot be converted, and why; each is first tried
        on a few tokens. Also if there is no attention. The model is then unchanged.
    """
    if cores(model):
        raise ValueError("the model has attention cores already: it was converted, or build_model made it, "
                         "which takes attention='castling'")  # fmt: skip
    found, wrong = {}, {}  # {name: layout}; {(class, reasons): names}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or outer == "" for outer in found):
            continue  # inside a layer that was found
        layout, problems = next((layout for layout in LAYOUTS if layout.matches(module)), None), []
        if layout is None:
            called = name.rpartition(".")[2] in ("attn", "attention", "self_attn", "self_attention")
            called = called or "attention" in type(module).__name__.lower()
            known = any(layout.matches(part) for part in module.modules() for layout in LAYOUTS)
            if called and not known and [*module.parameters()]:
                problems.append("its layout is none of those known here")
        else:
            found[name] = layout
            try:
                problems += layout.problems(module)
            except AttributeError as error:
                problems.append(f"it lacks an attribute of such layers: {error}")
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerDecoderLayer):
                problems.append("a decoder's attention is causal or to another sequence")
            if name == "":
                problems.append("the model itself is one attention layer: put it into a module")
        if problems:
            wrong.setdefault((type(module).__name__, "; ".join(problems)), []).append(name or "model")
    if wrong:
        reasons = [f"{', '.join(names)} ({kind}): {problems}" for (kind, problems), names in wrong.items()]
        raise ValueError(f"cannot convert {type(model).__name__}\n" + "\n".join(reasons))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no self-attention that is known here: looked for nn.MultiheadAttention, and "
            f"for modules with linear layers named qkv and proj, q_proj, k_proj and v_proj, or query, key and value"
        )
    new, report = {}, ConversionReport({})
    for name, layout in found.items():
        original = model.get_submodule(name)
        core = new[original] = layout(original, epsilon=epsilon, schedule=schedule, dconv=dconv)
        kept = [key for key, _ in original.named_parameters()]
        report.layers[name] = dict(
            kept=kept,
            dropped=["full softmax; a masked softmax stays until castle()"],
            new=[key for key, _ in core.named_parameters() if key not in kept],
        )
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in new:
                setattr(module, name, new[child])
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # our attention does not take nested tensors
    return report


# ---- export --------------------------------------------------------------------------------------


def fitting(model: nn.Module, *size: int) -> tuple[int, ...]:
    """`size`, rounded up to multiples of `model.multiple` if it has that."""
    multiple = getattr(model, "multiple", 1)
    return tuple(-(-side // multiple) * multiple for side in size)


def accepts(model: nn.Module, images: Tensor) -> bool:
    """Whether a model, or an exported graph, can run on these images."""
    try:
        model(images)
    except Exception:  # a wrong size raises any kind of error
        return False
    return True


def traced(model: nn.Module, image_size: int | tuple[int, int], fixed: bool = False) -> torch.export.ExportedProgram:
    """The castled model with folded norms as one graph, for images (B, 3, H, W) of any B, H and W.

    With `fixed`, or for a model that takes only one size (as timm's do), H and W are those of
    `image_size`. If the model has an attribute `images`, B is that number. If it has `multiple`, H
    and W must be multiples of that. A .pt2 file refuses sizes at which some token grid
    has one row or column: for LeViT, sides of 64 pixels or less. An ONNX file takes them.
    """
    model = fuse(castle(copy.deepcopy(model)).eval()).cpu().float()
    (height, width), images = pair(image_size), getattr(model, "images", 2)
    # If two sides of the example are equal, torch.export demands that they stay equal. A side of 1
    # it fixes. So the sides differ, and no token grid has a side of 1.
    example = torch.zeros(images, 3, *fitting(model, max(height, 128), max(width, 128) + 64))
    sides = torch.export.Dim.AUTO
    with torch.no_grad():
        if fixed or not accepts(model, example):
            example, sides = torch.zeros(images, 3, *fitting(model, height, width)), torch.export.Dim.STATIC
        free = {0: torch.export.Dim.AUTO if images > 1 else torch.export.Dim.STATIC, 2: sides, 3: sides}
        return torch.export.export(model, (example,), dynamic_shapes=(free,), strict=False)


def check_export(path: str | Path) -> None:
    """Raise ValueError if `export` cannot write a file: wrong kind, no folder, missing packages."""
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2") or not path.parent.is_dir():
        raise ValueError(f"a model is exported to a .onnx or .pt2 file in an existing folder, not to {path}")
    if path.suffix == ".onnx":
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(name)]
        if missing:
            raise ValueError(f"{path} needs {', '.join(missing)}: pip install onnx onnxruntime onnxscript")


def flattened(outputs: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dictionaries, in order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def export(model: nn.Module, path: str | Path, image_size: int | tuple[int, int]) -> tuple[list[tuple], float]:
    """Write `traced` to a .onnx or .pt2 file, read it back, and compare it with the castled model.

    If a .pt2 file for any height and width would refuse `image_size`, it is written for that size
    alone.
    Returns: shapes of the test images, and the largest difference / max(1, largest output).
    Raises: ValueError, see `check_export`.
    """
    check_export(path)
    path, program = Path(path), traced(model, image_size)
    wanted = fitting(model, *pair(image_size))
    if path.suffix == ".pt2":
        example = torch.zeros(getattr(model, "images", 2), 3, *wanted)
        if not accepts(program.module(), example):  # too small for free sides
            program = traced(model, image_size, fixed=True)
        torch.export.save(program, path)
        run = torch.export.load(path).module()
    else:
        import onnxruntime

        torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"]).save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(x: Tensor) -> list[Tensor]:
            return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]

    example = next(node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    sizes = [wanted]
    if symbolic(example.shape[2:]):
        height, width = (max(side, 32) for side in wanted)
        sizes = [(height, width), (height + 32, width + 64), (2 * height, width + 32)]
        sizes = [fitting(model, *size) for size in sizes]
    castled, shapes, differences = castle(copy.deepcopy(model)).eval().cpu().float(), [], []
    for seed, size in enumerate(sizes, 1):
        batch = seed if symbolic(example.shape[:1]) else example.shape[0]
        x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for ours, expected in zip(flattened(run(x)), flattened(castled(x)), strict=True):
                scale = max(1.0, expected.abs().max().item())
                differences.append((ours - expected).abs().max() / scale)
        shapes.append(tuple(x.shape))
    return shapes, torch.stack(differences).max().item()  # keeps NaN, unlike max()


# ---- checkpoints ---------------------------------------------------------------------------------


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file by its checksums; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as file:
            record = file.testzip()
    except Exception as error:  # a damaged file can raise nearly anything
        return f"{path} is damaged: {error}"
    return record and f"{path} is damaged: the checksum of {record} is wrong"


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary in a checkpoint file, on the CPU. Only tensors and plain data are unpickled.

    Raises: ValueError that names the file if it is missing or damaged, if loading it would run
        code, or if it is no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint file {path}")
    if zipfile.is_zipfile(path) and (reason := damage(path)):
        raise ValueError(reason)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is no checkpoint, is damaged, or holds more than tensors and plain data") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is damaged or is no PyTorch checkpoint: {error!r}") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(key, str) for key in checkpoint):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary by name")
    return checkpoint


# Names of a classifier's weights, (classes, C); the second line is of official files and timm's ResNets.
HEADS = ("classifier.weight", "head.weight", "head.linear.weight", "head.fc.weight",
         "head.l.weight", "head.projection.weight", "fc.weight")  # fmt: skip


def weights_in(checkpoint: dict) -> dict[str, Tensor]:
    """The state dict in a checkpoint (of the averaged weights, if any), or the dictionary itself.

    Prefixes that DistributedDataParallel and torch.compile add to names are removed.
    """
    for key in ("ema", "model_ema", "state_dict_ema", "model", "model_state", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    weights = {}
    for name, value in checkpoint.items():
        if name == "n_averaged":  # of torch's AveragedModel
            continue
        while isinstance(name, str) and name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        weights[name] = value
    return weights


@dataclass
class LoadReport:
    """Names of parameters and buffers, by what `load_pretrained` did with them."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # position tables of another image size, or with other tokens
    partly: list[str] = field(default_factory=list)  # only the rows of V were loaded
    new: list[str] = field(default_factory=list)  # in the model only
    ignored: list[str] = field(default_factory=list)  # in the file only

    def __str__(self) -> str:
        lines = []
        for group in fields(self):
            # blocks.*.attn.dconv.weight stands for this parameter of every block.
            kinds = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in getattr(self, group.name))
            names = [f"{kind} x {count}" if count > 1 else kind for kind, count in sorted(kinds.items())]
            if group.name == "loaded":
                names = [f"{sum(kinds.values())} parameters and buffers"]
            if kinds:
                lines.append(f"{group.name}: {', '.join(names)}")
        return "\n".join(lines)


def official_levit_names(weights: dict[str, Tensor], depths: list[int]) -> dict[str, Tensor]:
    """LeViT's released weights under this project's (timm's) names.

    The released file has one flat list: attention and MLP of each block in turn, and those of a
    down-sampling block between stages. In names `m` is a residual, `c` or `l` a linear layer.
    Source: facebookresearch/LeViT @ 3772b8e, levit.py.
    """
    places = []
    for stage, depth in enumerate(depths):
        if stage > 0:
            places += [f"stages.{stage}.downsample.attn_downsample", f"stages.{stage}.downsample.mlp"]
        for block in range(depth):
            places += [f"stages.{stage}.blocks.{block}.attn", f"stages.{stage}.blocks.{block}.mlp"]
    renamed = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            parts[:2] = ["stem", f"conv{int(parts[1]) // 2 + 1}"]
        elif parts[0] == "blocks" and int(parts[1]) < len(places):
            place, rest = places[int(parts[1])], [part for part in parts[2:] if part != "m"]
            inner = {"0": "ln1", "2": "ln2"} if place.endswith(".mlp") else {"1": "ln"}
            parts = [place, *(inner.get(part, part) for part in rest)]
        renamed[".".join("linear" if part in ("c", "l") else part for part in parts)] = value
    return renamed


def official_mvit_names(weights: dict[str, Tensor], depths: list[int]) -> dict[str, Tensor]:
    """MViTv2's released weights, a flat list of blocks, under this project's (timm's) names."""
    places = [f"stages.{stage}.blocks.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    renamed = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "blocks" and int(parts[1]) < len(places):
            parts[:2] = [places[int(parts[1])]]
            if parts[1] == "proj":
                parts[1] = "shortcut_proj_attn"
        renamed[".".join(parts).replace("head.projection.", "head.fc.")] = value
    return renamed


def renamed_weights(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The file's weights; those of an official LeViT or MViTv2 get the names of `model`."""
    if "patch_embed.0.c.weight" in weights and isinstance(model, LeViT):
        return official_levit_names(weights, [len(stage.blocks) for stage in model.stages])
    if "blocks.0.attn.pool_q.weight" in weights and isinstance(model, MViTv2):
        return official_mvit_names(weights, [len(stage["blocks"]) for stage in model.stages])
    return weights


def likeliest_model(weights: dict[str, Tensor], model: nn.Module) -> str | None:
    """Which of `list_models()` a file is of, if more of its entries have that one's names and
    shapes than have those of `model`, and half of them have. Else None."""

    def agreeing(other: nn.Module) -> int:
        own = {name: x.shape for name, x in other.state_dict().items() if not name.startswith(("head", "class"))}
        found = renamed_weights(weights, other).items()
        return sum(name in own and own[name] == getattr(value, "shape", None) for name, value in found)

    with torch.device("meta"):
        counts = {name: agreeing(build_model(name, "softmax")) for name in list_models()}
    best = max(counts, key=counts.get)
    return best if counts[best] > max(agreeing(model), len(weights) / 2) else None


def square_side(entries: int) -> int | None:
    """Side of the square grid with this number of entries, or None if there is none."""
    side = math.isqrt(max(0, entries))
    return side if side > 0 and side**2 == entries else None


def resized_table(name: str, value: Tensor, own: Tensor, model: nn.Module, file_has_dist: bool) -> Tensor | None:
    """A file's position table, resampled to the model's shape; None if it is not one or cannot."""
    layer, _, kind = name.rpartition(".")
    owner = model.get_submodule(layer)
    if value.ndim != own.ndim:
        return None
    if kind == "pos_embed" and value.shape[::2] == own.shape[::2] and isinstance(owner, ViT):
        prefix = 2 if file_has_dist else 1
        side = square_side(value.shape[1] - prefix)
        if side is None:
            return None
        patches = resize_positions(value[:, prefix:], (side, side), owner.grid)
        kept = value[:, : min(prefix, owner.position_rows)]
        return torch.cat([kept, own[:, kept.shape[1] : owner.position_rows], patches], dim=1)
    if kind == "attention_biases" and len(value) == len(own) and (side := square_side(value.shape[1])):
        return resize_offsets(value.unflatten(1, (side, side)), owner.grid).flatten(1)
    if kind in ("rel_pos_h", "rel_pos_w") and value.shape[1] == own.shape[1] and len(value) > 0:
        return resize_relative(value, len(own))
    return None


def value_rows(name: str, weights: dict[str, Tensor], own: Tensor, model: nn.Module) -> Tensor | None:
    """A castling LeViT's qkv with V's rows from a published one, whose Q and K differ; or None."""
    match = re.fullmatch(r"(.*)\.qkv\.((?:linear|bn)\.\w+)", name)
    core = model.get_submodule(match[1]) if match else None
    if not isinstance(core, CastlingLeViTAttention) or own.ndim == 0:
        return None
    source = weights.get(name, weights.get(f"{match[1]}.kv.{match[2]}"))
    if source is None or len(source) % core.heads or source.shape[1:] != own.shape[1:]:
        return None
    source, result = source.unflatten(0, (core.heads, -1)), own.clone().unflatten(0, (core.heads, -1))
    if source.shape[1] < core.head_dim:
        return None
    result[:, -core.head_dim :] = source[:, -core.head_dim :]  # in each head the values come last
    return result.flatten(0, 1)


def load_pretrained(model: nn.Module, path: str | Path, class_layers: tuple[str, ...] = ()) -> LoadReport:
    """Load a checkpoint of this project or timm, or an official one of DeiT, LeViT, MViTv2 or MAE.

    A castling model loads the weights that it shares with the published softmax model. Its other
    weights keep their initial values. A dense model ignores class token, final norm and head.
    Position tables of another image size are resized. If a table has another length than the
    model's, its token grid is assumed to be square, as files do not store it. A table of the same
    length is taken as it is.

    Args:
        class_layers: how names of class layers start. They keep their initial values if the file
            has another number of classes.
    Returns: names of what was loaded, resized, loaded in part, new or ignored. It can be printed.
    Raises: ValueError that names the file and each entry that is missing, unknown or of another
        shape, if none of the cases above explains it. The model is then unchanged.
    """
    weights, own, report = weights_in(read_checkpoint(path)), model.state_dict(), LoadReport()
    if not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path} holds no parameters by name")
    # `progress` is not a weight: each training run sets its own.
    weights, own = ({n: x for n, x in state.items() if not n.endswith("progress")} for state in (weights, own))
    file_weights, weights = weights, renamed_weights(weights, model)
    castling = any(core.kernel != "softmax" for core in cores(model).values())
    published = not any(".dconv." in name for name in weights)
    file_has_dist = "dist_token" in weights or any(name.startswith("head_dist.") for name in weights)

    file_has_head = any(name.startswith(("head.", "fc_norm.")) for name in weights)
    added = r"\.(dconv|dwconv|pool_[qkv]|norm_[qkv]|skip)\.|attn_downsample\.qkv\.bn\.num_batches_tracked"
    # Names that the file may lack, or the model, and when.
    new = [
        (r"^(head_dist\.|dist_token)", not file_has_dist),
        (r"^head\.", published and not file_has_head),  # MAE's encoder has no classifier
        # the DWConv of a DeiT has no bias; ours starts at 0, which is the same
        (r"\.dwconv\.bias$", True),
        (added, castling and published),
    ]
    rest = [
        (r"attention_bias_idxs$|^decoder_|^mask_token", True),
        (r"^(head_dist\.|dist_token)", getattr(model, "head_dist", None) is None),
        (r"^(cls_token|(norm|fc_norm|head)\.)", isinstance(model, DenseViT)),
        (r"\.(attention_biases|rel_pos_[hw])$", castling),
        (r"^(conv_head|classifier)\.", getattr(model, "classifier", model) is None),  # a detector's backbone
        # the published LeViT has separate layers to kv and to q in its down-sampling attention
        (r"\.attn_downsample\.(kv|q\.ln)\.", castling),
    ]

    def expected(name: str, table: list[tuple[str, bool]]) -> bool:
        return any(allowed and re.search(pattern, name) for pattern, allowed in table)

    classes = {name: value.shape for name, value in own.items() if name.startswith(class_layers)}
    other_classes = any(getattr(weights.get(name), "shape", shape) != shape for name, shape in classes.items())
    final = {}
    tensors = {name: x for name, x in weights.items() if isinstance(x, Tensor)}
    tensors = {name: x for name, x in tensors.items() if x.layout == torch.strided and not x.is_meta}
    numbers = {name: x.float() for name, x in tensors.items() if x.is_floating_point()}
    wrong = [f"{name} holds nan or inf" for name, x in numbers.items() if not x.isfinite().all()]
    for name, value in own.items():
        found = weights.get(name)
        if other_classes and name in classes:
            report.new.append(name)
        elif found is not None and name not in tensors:
            wrong.append(f"{name} is no dense tensor")
        elif found is not None and value.is_floating_point() and name not in numbers:
            wrong.append(f"{name} is {found.dtype} in the file, {value.dtype} in the model")
        elif found is not None and found.shape == value.shape:
            final[name] = found
            report.loaded.append(name)
        elif found is not None and (table := resized_table(name, found, value, model, file_has_dist)) is not None:
            final[name] = table
            report.resized.append(name)
        elif published and (rows := value_rows(name, weights, value, model)) is not None:
            final[name] = rows
            report.partly.append(name)
        elif found is None and expected(name, new):
            report.new.append(name)
        elif found is None:
            wrong.append(f"missing {name}")
        else:
            if name in HEADS and found.shape[:1] != value.shape[:1]:
                wrong.insert(0, f"{(*found.shape, 0)[0]} classes in the file, {len(value)} in the model")
            wrong.append(f"{name} is {tuple(found.shape)} in the file, {tuple(value.shape)} in the model")
    unknown = [name for name in weights if name not in own]
    report.ignored = [name for name in unknown if expected(name, rest)]
    wrong += [f"unknown {name}" for name in unknown if not expected(name, rest)]
    if wrong:
        more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        only_classes = all(re.match(r"\d|head|classifier", one) for one in wrong)
        other = None if only_classes else likeliest_model(file_weights, model)
        hint = f"It looks like a checkpoint of {other}. " if other else ""
        if any("pos_embed is (" in one for one in wrong):
            hint += "Its position table has another size: perhaps it is of another --image-size. "
        raise ValueError(f"{path} does not fit the model. {hint}{'; '.join(wrong[:8])}{more}")
    model.load_state_dict(model.state_dict() | final)
    return report
