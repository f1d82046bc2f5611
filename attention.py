"""Linear-angular attention (Castling-ViT) in one copyable file; needs torch and einops only.

Paper: You et al., "Castling-ViT", CVPR 2023, arXiv:2211.10526v4.
Authors' block: `LinAngularAttention`, github.com/GATECH-EIC/Castling-ViT @ c7b75c1, attention.py.

    paper        here                    shape          unit or range
    Q, K, V      q, k, v                 (B, H, N, D)   N tokens, D channels per head; v may have E != D channels
    theta        angle                   (B, H, N, N)   radians, 0..pi                                      Eq. (4)
    Sim(Q, K)    angular_similarity      (B, H, N, N)   0..1                                                Eq. (5)
    a_k          angular_coefficients    (K,)           k = 1..K                                            Eq. (8)
    DWConv(V)    AttentionCore.dconv     (B, H, N, D)   one 9-tap filter per head, along the token index    Eq. (9)
    M_sparse     sparse                  (B, H, N, N)   softmax entries above the threshold, else 0         Eq. (10)
    epsilon      threshold               scalar         0..1; rises to 1, where the mask is empty           Eq. (10)

Train with the auxiliary branch, tell it how far training is, and remove it at the end:

    block = LinearAngularAttention(dim=192, num_heads=3, sparse_reg=True)
    set_threshold(block, progress=step / total_steps)       # before every step
    y = block(x)                                            # (B, N, 192) or (B, 192, H, W), same shape out
    castle(block)                                           # from here on O(N): no N x N softmax is left

`python attention.py` checks the laws of this file and times it on your machine.
Departures from the paper and the released block are numbered D1, D2, ... as in the README.
"""

import contextlib
import difflib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SCHEDULES = ("ramp", "fixed", "anneal")
Kernel = TypeVar("Kernel", bound=Callable[..., Tensor])
EPS = 1e-12  # floor under every norm, D2
GROUP_BYTES = 2 * 2**20  # of q, k and v that the core works on at a time on a CPU
BLOCK_BYTES, BLOCK_BYTES_GPU = 4 * 2**20, 256 * 2**20  # of an N x N matrix that the branch holds at a time
RAMP_END = 0.9  # share of training after which `ramp` and `anneal` masks are empty: the rest trains the inference graph


# ---- precision and shapes --------------------------------------------------------------------------------------------


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which matrix products keep the dtype of their operands, whatever the surrounding autocast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # "meta" knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def in_float32(function: Kernel) -> Kernel:
    """Decorator for f(q, k, v, ...) -> Tensor: compute in float32 or wider, return v's dtype.

    D3: norms and k^T v are sums over channels and tokens; float16 overflows in them at a few thousand tokens. A result
    that is itself too large for v's dtype still is: the core normalises before it returns.
    """

    @functools.wraps(function)
    def wrapped(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype, torch.float32))
        with without_autocast(v.device):
            return function(q.to(dtype), k.to(dtype), v.to(dtype), *args, **kwargs).to(v.dtype)

    return cast(Kernel, wrapped)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, per_token: bool = False) -> None:
    """Raise ValueError unless q (..., N, D), k (..., M, D), v (..., M, E) fit together; `per_token` asks for M = N."""
    if min(q.ndim, k.ndim, v.ndim) < 2:
        law = "q, k, v need at least a token and a channel axis"
    elif q.shape[:-2] != k.shape[:-2] or k.shape[:-2] != v.shape[:-2]:
        law = "q, k, v must agree on their leading (batch, head) axes"
    elif q.shape[-1] != k.shape[-1]:
        law = "q and k must have the same number of channels"
    elif k.shape[-2] != v.shape[-2]:
        law = "k and v must have the same number of tokens"
    elif per_token and q.shape[-2] != v.shape[-2]:
        law = "this attention needs one value per query (M = N, departure D1)"
    else:
        return
    raise ValueError(f"{law}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")


def unit(x: Tensor, eps: float = EPS) -> Tensor:
    """x / max(|x|, eps) over the last axis.

    D2: with the floor a zero vector stays zero. It has no direction to speak of, so its gradient is 0, not 1/eps.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > eps, x, x.detach()) / norm.clamp_min(eps)


def product(q: Tensor, k: Tensor, v: Tensor, order: str | None = None) -> Tensor:
    """q k^T v of (..., N, D), (..., M, D), (..., M, E) -> (..., N, E), in the association that costs fewer MACs.

    (M + N) D E for "kv", q (k^T v): linear in tokens. N M (D + E) for "qk", (q k^T) v: cheaper only for fewer tokens
    than channels (N <= D where N = M, D = E). Without a softmax in between they are the same function.
    Raises: ValueError for another order.
    """
    if order not in (None, "kv", "qk"):
        raise ValueError(f"order must be 'kv', 'qk' or None, got {order!r}")
    (N, D), (M, E) = q.shape[-2:], v.shape[-2:]
    if order is None and isinstance(N, torch.SymInt):  # exported for any number of tokens
        order = "kv"
    if order is None:
        order = "qk" if N * M * (D + E) <= (M + N) * D * E else "kv"
    return q @ (k.mT @ v) if order == "kv" else (q @ k.mT) @ v


# ---- the angular kernel, Eq. (4) to (8) ------------------------------------------------------------------------------


def angular_similarity(q: Tensor, k: Tensor, eps: float = EPS) -> Tensor:
    """Sim(q, k) = 1 - theta / pi with theta = arccos(<q, k> / |q||k|) in radians.  Eq. (4), (5)

    Args:
        q: (..., N, D); k: (..., M, D). Only directions matter.
        eps: floor on the norms. A zero vector is orthogonal to everything: Sim = 1/2.
    Returns: (..., N, M) in [0, 1]: 1 aligned, 1/2 orthogonal, 0 opposed.
    Raises: ValueError if the shapes do not fit.

    arccos has infinite slope where the vectors are parallel: a cosine that rounds to 1 - 6e-8 in float32 gives 0.9999.
    Where it rounds to 1 or -1 the value is exact, and the gradient is defined as 0, so that it stays finite.
    """
    check_qkv(q, k, k)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device):
        x = unit(q.to(dtype), eps) @ unit(k.to(dtype), eps).mT                          # cos(theta), (..., N, M)
    inside, end = x.abs() < 1, torch.arccos(x.detach().clamp(-1, 1))
    angle = torch.where(inside, torch.arccos(torch.where(inside, x, 0)), end)                # Eq. (4)
    return (1 - angle / math.pi).to(q.dtype)                                                 # Eq. (5)


def angular_coefficients(terms: int) -> Tensor:
    """The coefficients a_1 .. a_terms of Eq. (8), a_k = (2k)! / (2^2k (k!)^2 (2k + 1)), as float64 (terms,).

    By the ratio a_k / a_(k-1) = (2k - 1)^2 / (2k (2k + 1)), a_0 = 1: the factorials overflow float64 at k = 86.
    Raises: ValueError for a negative number of terms.
    """
    if terms < 0:
        raise ValueError(f"terms must be >= 0, got {terms}")
    k = torch.arange(1, terms + 1, dtype=torch.float64)
    return torch.cumprod((2 * k - 1) ** 2 / (2 * k * (2 * k + 1)), dim=0)


def angular_series(x: Tensor, terms: int) -> Tensor:
    """Partial sum of Eq. (8) at x = cos(theta): 1/2 + x / pi + (1 / pi) sum_(k=1..terms) a_k x^(2k + 1).

    `terms=0` leaves the linear terms that Eq. (9) keeps. The limit is 1 - arccos(x) / pi.
    """
    total = torch.zeros_like(x)
    for a in reversed(angular_coefficients(terms).tolist()):  # Horner's rule in x^2
        total = (total + a) * x**2
    return 0.5 + x * (1 + total) / math.pi


def angular_series_bound(x: Tensor, terms: int) -> Tensor:
    """Upper bound, for |x| <= 1, on |angular_series(x, terms) - (1 - arccos(x) / pi)|; exact at |x| = 1.

    The remainder (1/pi) sum_(k>K) a_k |x|^(2k+1) is at most |x|^(2K+3) times its value at |x| = 1, which is known
    because all of sum_(k>=0) a_k is pi / 2; and, since a_k falls, at most the geometric a_(K+1) |x|^(2K+3) / (1 - x^2).
    For `terms=0` the first is |x|^3 (1/2 - 1/pi): the linear terms alone are wrong by at most 0.1817.
    """
    a = angular_coefficients(terms + 1)
    tail = math.pi / 2 - 1 - a[:-1].sum().item()
    power = x.abs() ** (2 * terms + 3)
    geometric = a[-1].item() * power / (1 - x**2).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.minimum(tail * power, geometric) / math.pi


# ---- attention by kernel, Eq. (9) and Table 5: (..., N, D), (..., M, D), (..., M, E) -> (..., N, E) ------------------


@in_float32
def linear_angular_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS, order: str | None = None) -> Tensor:
    """First-order angular self-attention, linear in tokens.

    Eq. (9), first two terms:  1/2 V + (1/pi) Q (K^T V), rows of Q and K on the unit sphere.

    Args:
        q, k: (..., N, D), any scale; v: (..., N, E).
        eps: floor on |q| and |k| (D2): an all-zero token attends with weight 0 instead of turning the image into NaN.
        order: association of the product, see `product`. None takes the cheaper: N x N is formed only for fewer tokens
            than channels (N <= 2 D E / (D + E)), where it is the smaller one.
    Returns: (..., N, E), before the normalisation and DWConv that `AttentionCore` adds.
    Raises: ValueError if the shapes do not fit, there is not one value per query, or for another order.
    Source: authors' attention.py @ c7b75c1, LinAngularAttention.forward, which divides by |q| without a floor.
    """
    check_qkv(q, k, v, per_token=True)
    # D1: the constant term of Eq. (8) times V is 1/2 sum_j v_j; Eq. (9) and the authors' code have 1/2 v_i. So do we.
    return 0.5 * v + product(unit(q, eps), unit(k, eps), v, order) / math.pi


@in_float32
def angular_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sim(Q, K) V with the exact similarity of Eq. (5), quadratic: the thing that Eq. (9) approximates."""
    check_qkv(q, k, v)
    return angular_similarity(q, k) @ v


@in_float32
def mc_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mean-centred first-order Taylor softmax, "MC" of Table 5 (ViTALiTy): q and k centred over tokens.

    exp(x) ~ 1 + x gives (sum_j v_j + q (k^T v) / sqrt(D)) / M; centred keys sum to zero, so the normaliser is exactly
    M. The paper names the kernel only; this definition is this project's reading.
    """
    check_qkv(q, k, v)
    q, k = q - q.mean(dim=-2, keepdim=True), k - k.mean(dim=-2, keepdim=True)
    return (v.sum(dim=-2, keepdim=True) + product(q, k, v) / math.sqrt(q.shape[-1])) / max(1, v.shape[-2])


@in_float32
def softmax_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two separate softmaxes, "Softmax" of Table 5 (Efficient Attention): q over channels, k over tokens."""
    check_qkv(q, k, v)
    return product(q.softmax(dim=-1), k.softmax(dim=-2), v)


@in_float32
def cosine_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    """Cosine similarity without softmax, "Cosine" of Table 5 (Hydra attention): unit q and k."""
    check_qkv(q, k, v)
    return product(unit(q, eps), unit(k, eps), v)


@in_float32
def relu_s_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """"ReLU-S" of Table 5, relu(q) (relu(k)^T v) / M: the whole softmax, its normaliser too, is replaced.

    The paper names the kernel only; this definition is this project's reading.
    """
    check_qkv(q, k, v)
    return product(F.relu(q), F.relu(k), v) / max(1, v.shape[-2])


@in_float32
def relu_e_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """"ReLU-E" of Table 5 (EfficientViT): only the exponential is replaced, rows are still normalised."""
    check_qkv(q, k, v)
    q, k = F.relu(q), F.relu(k)
    return product(q, k, v) / (q @ k.sum(dim=-2, keepdim=True).mT + eps)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention, Eq. (1), with an optional additive bias ([B,] H, N, M): the quadratic baseline."""
    check_qkv(q, k, v)
    bias = None if bias is None else bias.to(q.dtype)  # under autocast q is bfloat16, the parameter float32
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


KERNELS = {
    "linear_angular": linear_angular_attention,
    "angular": angular_attention,
    "mc": mc_attention,
    "softmax_linear": softmax_linear_attention,
    "cosine": cosine_attention,
    "relu_s": relu_s_attention,
    "relu_e": relu_e_attention,
    "softmax": softmax_attention,
}


def look_up(table: dict[str, Any], name: str, what: str) -> Any:
    """table[name], or a ValueError that names the nearest keys."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), map(str, table), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(map(str, table))}"
    raise ValueError(f"unknown {what} {name!r}: {hint}")


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "linear_angular") -> Tensor:
    """Attention by the name of its kernel, a key of `KERNELS`: one row of Table 5. ValueError for another name."""
    return look_up(KERNELS, kernel, "kernel")(q, k, v)


# ---- the auxiliary branch, Eq. (10) ----------------------------------------------------------------------------------


def mask_threshold(
    progress: float | Tensor, tokens: int | Tensor, epsilon: float = 0.02, schedule: str = "ramp"
) -> float | Tensor:
    """Threshold of Eq. (10) for one layer, D4.

    A softmax row over N keys has an entry >= 1/N, so the paper's fixed 0.02 can only ever be emptied where N >= 50.
    `ramp` starts at eps_N = min(1, max(epsilon, 4/N)), the paper's own 0.02 at N = 197, and rises to 1, where the mask
    is empty by construction. `anneal` starts dense at 1/(4N) and thins geometrically. `fixed` is the paper's setting.

    Args:
        progress: share of training done, 0..1, a float or a 0-d tensor.
        tokens: N, the number of keys; a tensor where it differs over the batch.
        epsilon: the paper's threshold; `anneal` has no use for it.
        schedule: "ramp", "fixed" or "anneal".
    Returns: the threshold; a tensor if progress or tokens is one, except for `fixed`.
    Raises: ValueError for another schedule.
    """
    look_up(dict.fromkeys(SCHEDULES), schedule, "mask schedule")
    if schedule == "fixed":
        return epsilon
    t = (progress / RAMP_END).clamp(0, 1) if isinstance(progress, Tensor) else min(1.0, max(0.0, progress / RAMP_END))
    if schedule == "anneal":
        return (4 * (tokens.clamp_min(1) if isinstance(tokens, Tensor) else max(1, tokens))) ** (t - 1)
    start: float | Tensor
    if isinstance(tokens, Tensor):
        start = (4 / tokens).clamp(min=epsilon, max=1)
    else:
        start = min(1.0, max(epsilon, 4 / max(1, tokens)))
    return start + (1 - start) * t**2


def sparse_matrix(
    q: Tensor, k: Tensor, threshold: float | Tensor, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """M_sparse of Eq. (10) and the mask of its kept entries, both (..., N, M).

    P = softmax(q k^T / sqrt(D)) with q and k as they come, not normalised: with unit vectors no entry would pass 0.02
    at 196 tokens. Entries are kept where P > threshold, strictly, and not renormalised. The comparison has no
    gradient, kept entries do. `padding` is a boolean mask, broadcastable to (..., N, M), of pairs to leave out.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if padding is not None:
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)  # finite: an all-padding row is no NaN
    probabilities = logits.softmax(dim=-1)
    kept = probabilities.clamp(max=1) > threshold  # a softmax may round to just above 1
    if padding is not None:
        kept = kept & ~padding
    return torch.where(kept, probabilities, 0), kept


def masked_softmax_attention(q: Tensor, k: Tensor, v: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """The auxiliary branch, M_sparse V.  Eq. (10)

    Args: q (..., N, D), k (..., M, D), v (..., M, E); threshold in 0..1, a number or a tensor that broadcasts.
    Returns: out (..., N, E) in v's dtype, and kept (..., N, M), the boolean mask of entries above the threshold.
    Raises: ValueError if the shapes do not fit.
    """
    check_qkv(q, k, v)
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v.device):
        sparse, kept = sparse_matrix(q.to(dtype), k.to(dtype), threshold)
        return (sparse @ v.to(dtype)).to(v.dtype), kept


def masked_branch_reference(
    q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, padding: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """M_sparse V with dropout on the kept probabilities, through the whole matrix; and (kept entries, their sum).

    Args: as `masked_branch`; its plain form where dropout is 0.
    """
    pairs = None if padding is None else padding[:, None, :, None] | padding[:, None, None, :]   # (B, 1, N, N)
    sparse, kept = sparse_matrix(q, k, threshold[..., None, None] if threshold.ndim else threshold, pairs)
    return F.dropout(sparse, dropout) @ v, torch.stack([kept.sum().to(sparse.dtype), sparse.sum()])


# ---- Eq. (9) as the modules compute it -------------------------------------------------------------------------------


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def observed() -> bool:
    """Whether somebody counts, traces or transforms the operators of eager mode: they see the formulas as written."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing() or transformed()


def castled_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, branch: Tensor | None = None) -> Tensor:
    """Eq. (9) in full for the linear_angular kernel: unit(1/2 V + (1/pi) Q (K^T V) [+ branch]) + DWConv(V).

    Args:
        q, k: (B, H, N, D); v: (B, H, N, E); all in one dtype, float32 or wider (D3).
        weight: (H, 1, K, 1), the filters of DWConv.
        branch: M_sparse V of Eq. (10), (B, H, N, E), or None.
    Returns: (B, H, N, E). `castled_attention_reference` is the formula; in eager mode on a CPU this one is faster.
    """
    # torch.compile fuses the formula itself, a GPU wants large steps.
    if v.device.type != "cpu" or torch.compiler.is_compiling() or observed():
        return castled_attention_reference(q, k, v, weight, branch)
    inputs = q, k, v, weight, branch
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return CastledAttention.apply(*inputs)
    return castled_attention_in_groups(*inputs)


def castled_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, branch: Tensor | None = None
) -> Tensor:
    """`castled_attention` as it is in the paper."""
    y = linear_angular_attention(q, k, v)
    return unit(y if branch is None else y + branch) + dwconv(v, weight)                         # D2


def dwconv(v: Tensor, weight: Tensor) -> Tensor:
    """DWConv(V) of Eq. (9): (B, H, N, E), filters (H, 1, K, 1) along the tokens -> (B, H, N, E)."""
    taps, weight = weight.shape[2], weight.to(v.dtype)
    if torch.compiler.is_compiling() or transformed():
        # Shifted sums fuse into the kernel around them, a convolution does not; and vmap knows no channels-last.
        padded = F.pad(v, (0, 0, taps // 2, taps // 2))
        shifted = [weight[:, :, tap] * padded[:, :, tap : tap + v.shape[2]] for tap in range(taps)]
        return functools.reduce(torch.add, shifted)
    # Channels-last, i.e. heads innermost: the layout in which this convolution is fast on a CPU.
    v = v.contiguous(memory_format=torch.channels_last)
    return F.conv2d(v, weight, padding=(taps // 2, 0), groups=weight.shape[0])


def shifts(taps: int, tokens: int) -> list[tuple[int, slice, slice]]:
    """[(tap, i, j)]: output tokens i take input tokens j = i + tap - taps // 2 where both exist; not the middle tap."""
    offsets = [(tap, tap - taps // 2) for tap in range(taps) if 0 < abs(tap - taps // 2) < tokens]
    return [(t, slice(max(0, -s), tokens - max(0, s)), slice(max(0, s), tokens + min(0, s))) for t, s in offsets]


def convolve(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """out = DWConv of x (B, N, C) with one filter per channel, rows (K, C), as K multiply-adds of shifted tokens.

    On a CPU 2 to 5 times as fast as Conv2d, which pads the H heads to 16 and copies its input into that layout.
    """
    taps = rows.unbind()
    torch.mul(x, taps[len(taps) // 2], out=out)
    for tap, i, j in shifts(len(taps), x.shape[1]):
        out[:, i].addcmul_(x[:, j], taps[tap])
    return out


def channels(x: Tensor) -> Tensor:
    """(B, H, N, E) -> (B, N, H E); a view where x was cut from a linear layer's output."""
    return x.transpose(1, 2).flatten(2)


def per_channel(weight: Tensor, like: Tensor) -> Tensor:
    """Filters (H, 1, K, 1) as rows (K, H E) for `convolve` of `like` (B, H, N, E)."""
    return weight[:, 0, :, 0].to(like.dtype).T.repeat_interleave(like.shape[-1], dim=1)


def groups(q: Tensor, v: Tensor) -> list[slice]:
    """The batch in slices of images of which q, k and v, and as much again, stay in a core's cache."""
    images = max(1, GROUP_BYTES // max(1, v.element_size() * (2 * q[:1].numel() + v[:1].numel())))
    return [slice(i, i + images) for i in range(0, len(v), images)]


def floored_norm(x: Tensor, floor: float = EPS) -> Tensor:
    """max(|x|, floor) over the last axis, which is kept.  D2"""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(floor)


def before_normalising(q: Tensor, k: Tensor, v: Tensor, branch: Tensor | None) -> tuple[Tensor, ...]:
    """x = V + (2/pi) Q (K^T V) + 2 branch, twice Eq. (9), which normalising forgets; and |x|, q, |q|, k, |k|, K^T V.

    Contiguous copies, which the products below want anyway, are normalised in place.
    """
    q, k, x = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))                # (B, H, N, D|E)
    q_norm, k_norm = floored_norm(q), floored_norm(k)
    kv = k.div_(k_norm).mT @ x                                                                   # (B, H, D, E)
    x.flatten(0, 1).baddbmm_(q.div_(q_norm).flatten(0, 1), kv.flatten(0, 1), alpha=2 / math.pi)
    if branch is not None:
        x.add_(branch, alpha=2)
    return x, floored_norm(x, 2 * EPS), q, q_norm, k, k_norm, kv


def castled_attention_in_groups(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, branch: Tensor | None) -> Tensor:
    """`castled_attention` a few images at a time."""
    B, H, N, E = v.shape
    rows, out = per_channel(weight, v), v.new_empty(B, N, H * E)
    for g in groups(q, v):
        x, x_norm, *_ = before_normalising(q[g], k[g], v[g], None if branch is None else branch[g])
        y = convolve(channels(v[g]), rows, out[g]).unflatten(2, (H, E))
        y.transpose(1, 2).addcdiv_(x, x_norm)
    return out.unflatten(2, (H, E)).transpose(1, 2)


def through_unit(grad: Tensor, y: Tensor, norm: Tensor, floor: float = EPS) -> Tensor:
    """Gradient of x from that of y = x / |x|, in place: (grad - y (y . grad)) / |x|, and 0 below the floor (D2)."""
    grad.addcmul_(y, (y * grad).sum(-1, keepdim=True), value=-1)
    return grad.div_(norm.masked_fill(norm <= floor, math.inf))


def differentiable_gradients(ctx: Any, grad: Tensor, function: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs of `function(*ctx.saved_tensors)` that need one, which can be differentiated again.

    Of aliases of the inputs: one input may be a function of another.
    """
    with torch.enable_grad(), without_autocast(grad.device):
        inputs = [x if x is None else x.view_as(x) for x in ctx.saved_tensors]
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


class CastledAttention(torch.autograd.Function):
    """`castled_attention_in_groups` with a backward that does the same: it keeps the inputs only.

    For Jacobians use torch.func.jacrev: a batch of gradients (is_grads_batched) is not taken.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, branch: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, weight, branch)
        return castled_attention_in_groups(q, k, v, weight, branch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, weight and branch from that of the output, a group of images at a time."""
        if torch.is_grad_enabled():  # create_graph=True: the formula's backward can itself be differentiated
            return differentiable_gradients(ctx, grad, castled_attention_reference)
        q, k, v, weight, branch = ctx.saved_tensors
        B, H, N, E = v.shape
        rows = per_channel(weight, v)
        dq, dk = (t.new_empty(B, N, H, t.shape[-1]).transpose(1, 2) for t in (q, k))
        dbranch = None if branch is None else torch.empty_like(branch)
        dv, drows = v.new_empty(B, N, H * E), torch.zeros_like(rows)
        with without_autocast(v.device):
            for g in groups(q, v):
                of_branch = None if branch is None else branch[g]
                x, x_norm, qg, q_norm, kg, k_norm, kv = before_normalising(q[g], k[g], v[g], of_branch)
                dxg = grad[g].clone(memory_format=torch.contiguous_format)
                dxg = through_unit(dxg, x.div_(x_norm), x_norm, 2 * EPS)
                dkv = (qg.mT @ dxg).mul_(2 / math.pi)
                dq[g] = through_unit((dxg @ kv.mT).mul_(2 / math.pi), qg, q_norm)
                dk[g] = through_unit(v[g] @ dkv.mT, kg, k_norm)
                if dbranch is not None:
                    dbranch[g] = 2 * dxg
                # DWConv, whose transpose is itself with the filters reversed
                dy, values = channels(grad[g]), channels(v[g])
                dvg = convolve(dy, rows.flip(0), dv[g]).unflatten(2, (H, E)).transpose(1, 2)
                dvg.add_(dxg).add_(kg @ dkv)
                drows[len(rows) // 2] += (dy * values).sum((0, 1))
                for tap, i, j in shifts(len(rows), N):
                    drows[tap] += (dy[:, i] * values[:, j]).sum((0, 1))
        dweight = drows.unflatten(1, (H, E)).sum(2).T[:, None, :, None].to(weight.dtype)
        return dq, dk, dv.unflatten(2, (H, E)).transpose(1, 2), dweight, dbranch


# ---- Eq. (10) in blocks of rows, for training ------------------------------------------------------------------------


def empty_for_certain(q: Tensor, k: Tensor, threshold: Tensor) -> Tensor:
    """Which (batch, head) pairs cannot have an entry above their threshold, found without any N x N work.

    Logits centred over the keys have mean 0, so by Jensen a row's softmax denominator is at least M and
        p_max(i) <= exp(|q_i| max_j |k_j - mean k| / sqrt(D)) / M.
    Args: q (G, N, D), k (G, M, D), threshold (G,). Returns: (G,) boolean; True is a proof, False says nothing.
    """
    reach = q.norm(dim=-1).amax(-1) * (k - k.mean(dim=-2, keepdim=True)).norm(dim=-1).amax(-1)
    return reach / math.sqrt(q.shape[-1]) <= (k.shape[-2] * threshold).log() - 1e-3  # 1e-3: the bound's own rounding


def row_probabilities(q: Tensor, k: Tensor, hidden: Tensor | None, rows: slice | Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) of some rows, (G, R, D), (G, N, D) -> (G, R, N); 0 where a token is `hidden` (G, N)."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if hidden is None:
        return logits.softmax(dim=-1)
    logits.masked_fill_(hidden[:, None], torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1).masked_fill_(hidden[:, None] | hidden[:, rows, None], 0)


def blocks(heads: Tensor, thresholds: list[float], tokens: int, like: Tensor) -> Iterator[tuple[Tensor, float, int]]:
    """(some heads of one threshold, that threshold, rows at a time): a block is several whole heads, or rows of one."""
    size = max(1, (BLOCK_BYTES_GPU if like.is_cuda else BLOCK_BYTES) // like.element_size())
    together = size // max(1, tokens * tokens) if len(set(thresholds)) == 1 else 1
    for some in heads.split(max(1, together)) if len(heads) else ():
        yield some, thresholds[some[0]], max(1, size // max(1, len(some) * tokens))


def flat_inputs(
    q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The operation's arguments with batch and heads as one axis G, and thresholds of 1 as infinity: P > 1 is false."""
    B, H = v.shape[:2]
    threshold = threshold.expand(B, H).flatten()
    hidden = None if padding is None else padding[:, None].expand(-1, H, -1).flatten(0, 1)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    return q, k, v, torch.where(threshold < 1, threshold, math.inf), hidden


@torch.library.custom_op(
    "castling::masked_softmax_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor threshold, Tensor? padding, bool count) -> (Tensor, Tensor, Tensor)",
)
def masked_branch(
    q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, padding: Tensor | None, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """M_sparse V of Eq. (10), as `masked_softmax_attention`, with one block of rows of an N x N matrix at a time.

    An operation of its own, so that torch.compile and checkpointing take it whole.

    Args:
        q, k (B, H, N, D), v (B, H, N, E): in one dtype, float32 or wider.
        threshold: of shape () or (B, 1). padding: (B, N) boolean, True at tokens to ignore, or None.
        count: also add up the mask's statistics.
    Returns: M_sparse V (B, H, N, E); live (B, H, N), the rows that keep an entry, all that backward has to look at; and
        totals (2,), kept entries and their sum, 0 unless counted.
    """
    shape, N = v.shape, v.shape[2]
    q, k, v, threshold, hidden = flat_inputs(q, k, v, threshold, padding)
    out, totals = torch.zeros_like(v, memory_format=torch.contiguous_format), v.new_zeros(2)
    live = torch.zeros(v.shape[:2], dtype=torch.bool, device=v.device)
    heads = torch.arange(len(v), device=v.device)
    if hidden is None and N > 0:
        heads = heads[~empty_for_certain(q, k, threshold)]
    for g, above, step in blocks(heads, threshold.tolist(), N, q):
        qg, kg, vg, og, lg = (x[g] for x in (q, k, v, out, live))
        hg = None if hidden is None else hidden[g]
        for i in range(0, N, step):
            p = row_probabilities(qg[:, i : i + step], kg, hg, slice(i, i + step))               # (G, R, N)
            alive = lg[:, i : i + step] = p.amax(-1) > above
            rows = alive.any(0).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            if 2 * len(rows) < p.shape[1]:
                p = p[:, rows]
            else:
                rows = torch.arange(p.shape[1], device=p.device)
            p = torch.threshold_(p, above, 0)                                                      # M_sparse
            if count:
                totals += torch.stack([p.count_nonzero().to(p.dtype), p.sum()])
            og.index_copy_(1, rows + i, p @ vg)
        out.index_copy_(0, g, og)
        live.index_copy_(0, g, lg)
    return out.view(shape), live.view(shape[:3]), totals


@torch.library.custom_op(
    "castling::masked_softmax_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor threshold, Tensor? padding, Tensor live)"
    " -> (Tensor, Tensor, Tensor)",
)
def masked_branch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, padding: Tensor | None, live: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v: each block of live rows is computed anew; a dead row's gradient is exactly 0."""
    shapes, scale, N = (q.shape, k.shape, v.shape), q.shape[-1] ** -0.5, v.shape[2]
    q, k, v, threshold, hidden = flat_inputs(q, k, v, threshold, padding)
    grad, live = grad.flatten(0, 1), live.flatten(0, 1)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    with without_autocast(v.device):
        for g, above, step in blocks(live.any(1).nonzero().squeeze(1), threshold.tolist(), N, q):
            qg, kg, vg, dyg = (x[g] for x in (q, k, v, grad))
            hg = None if hidden is None else hidden[g]
            dqg, dkg, dvg = (torch.zeros_like(x) for x in (qg, kg, vg))
            for rows in live[g].any(0).nonzero().squeeze(1).split(step):
                q_rows, dy = qg[:, rows], dyg[:, rows]
                p = row_probabilities(q_rows, kg, hg, rows)
                sparse = F.threshold(p, above, 0)                                                # M_sparse
                dvg += sparse.mT @ dy
                # softmax: dlogits = p (dp - sum_j p dp), where dp = dout v^T at kept entries, 0 elsewhere
                weighted = sparse.mul_(dy @ vg.mT)                                               # p dp
                dlogits = weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
                dqg.index_copy_(1, rows, (dlogits @ kg).mul_(scale))
                dkg.add_(dlogits.mT @ q_rows, alpha=scale)
            for total, part in ((dq, dqg), (dk, dkg), (dv, dvg)):
                total.index_copy_(0, g, part)
    return tuple(x.view(shape) for x, shape in zip((dq, dk, dv), shapes, strict=True))


@masked_branch.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    live = v.new_empty(v.shape[:3], dtype=torch.bool)
    return torch.empty_like(v, memory_format=torch.contiguous_format), live, v.new_empty(2)


@masked_branch_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *unused: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing of size N x N is kept for backward: (B, H, N) marks of the live rows, beside the inputs."""
    q, k, v, threshold, padding, _ = inputs
    ctx.save_for_backward(q, k, v, threshold, padding, output[1])


def masked_branch_gradients(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    """Of the six inputs; in place of the last, `count`, the live rows are saved, and neither needs one."""
    if torch.is_grad_enabled():
        return differentiable_gradients(ctx, grad, lambda *saved: masked_branch_reference(*saved[:5])[0])
    return *masked_branch_backward(grad, *ctx.saved_tensors), None, None, None


masked_branch.register_autograd(masked_branch_gradients, setup_context=save_inputs)


# ---- modules ---------------------------------------------------------------------------------------------------------


def channels_per_head(dim: int, heads: int) -> int:
    """dim / heads. Raises ValueError if that is no whole number."""
    if heads < 1 or dim % heads:
        raise ValueError(f"dim {dim} must be divisible by the number of heads, {heads}")
    return dim // heads


class AttentionCore(nn.Module):
    """The attention of every backbone: q, k, v of (B, H, N, D) in, (B, H, N, E) out; projections are the caller's.

    Eq. (9):  y = kernel(q, k, v) [+ M_sparse v while the auxiliary branch lives];  y = y / |y|;  y = y + DWConv(v).
    `kernel="softmax"` is the published baseline instead: plain attention, no norm, no DWConv, no branch.

    Args:
        heads: H.
        kernel: a key of KERNELS.
        auxiliary: train with the masked softmax branch of Eq. (10).
        conv_kernel: taps of the DWConv on V along the row-major token index (D6: prefix tokens included); odd, or 0
            for no DWConv.
        epsilon, schedule: the branch's threshold, see `mask_threshold`.
        dropout: on the attention probabilities of the branch, or of the softmax baseline, while training.
    Raises: ValueError for an unknown kernel or schedule, heads below 1, an even conv_kernel, epsilon or dropout outside
        0..1, or a branch on the softmax baseline.
    Source: authors' attention.py @ c7b75c1: the same order of operations and the same parameter `dconv.weight`.

    Attributes: `auxiliary` (the branch exists; `castle` clears it), `active` (its mask can still be non-empty),
    `record` (keep mask statistics; False makes them free), `tally` (sums of images x density, images x mass, images).
    Forwards that are counted, traced or under torch.func leave no trace in the statistics.
    The DWConv is computed from `dconv.weight`; hooks on `dconv` itself are not called.
    A copy that averages buffers, or `to_empty`, loses the threshold: call `set_threshold` on it.
    """

    progress: Tensor

    def __init__(
        self,
        heads: int,
        kernel: str = "linear_angular",
        *,
        auxiliary: bool = False,
        conv_kernel: int = 9,
        epsilon: float = 0.02,
        schedule: str = "ramp",
        dropout: float = 0.0,
    ):
        super().__init__()
        look_up(KERNELS, kernel, "kernel")
        look_up(dict.fromkeys(SCHEDULES), schedule, "mask schedule")
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if conv_kernel < 0 or (conv_kernel > 0 and conv_kernel % 2 == 0):
            raise ValueError(f"conv_kernel must be odd, or 0 for none, got {conv_kernel}")
        if auxiliary and kernel == "softmax":
            raise ValueError("the softmax baseline has no auxiliary branch: auxiliary=True needs another kernel")
        for name, value in (("epsilon", epsilon), ("dropout", dropout)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability in 0..1, got {value}")
        self.heads, self.kernel, self.auxiliary = heads, kernel, auxiliary
        self.epsilon, self.schedule, self.dropout = epsilon, schedule, dropout
        self.dconv = None
        if kernel != "softmax" and conv_kernel:
            taps = (conv_kernel, 1)
            self.dconv = nn.Conv2d(heads, heads, taps, padding=(conv_kernel // 2, 0), groups=heads, bias=False)
        # A tensor, because a compiled model would be recompiled at every change of a float.
        self.register_buffer("progress", torch.zeros(()), persistent=False)
        # Not a buffer, because DistributedDataParallel overwrites every rank's buffers with those of rank 0.
        self.tally = torch.zeros(3, device="cpu")
        self.active, self.record = True, True
        self.watch: Callable | None = None  # see `captured`

    def extra_repr(self) -> str:
        branch = f", auxiliary, {self.schedule}, epsilon={self.epsilon}" if self.auxiliary else ""
        return f"heads={self.heads}, kernel={self.kernel}{branch}"

    def set_progress(self, progress: float) -> None:
        """Move the mask threshold to `progress` (0..1 of training); mask statistics start anew."""
        self.progress.fill_(progress)
        self.active = self.schedule == "fixed" or progress < RAMP_END
        self.tally = torch.zeros(3, device=self.progress.device)

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless q, k and v fit together and this core."""
        check_qkv(q, k, v, per_token=self.kernel != "softmax")  # D1: the DWConv too needs one value per query
        if v.ndim != 4 or v.shape[1] != self.heads:
            raise ValueError(f"expected (B, {self.heads}, N, D), got q {tuple(q.shape)}, v {tuple(v.shape)}")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Args:
            q, k: (B, H, N, D); v: (B, H, N, E). The softmax baseline may have another number of keys.
            bias: (H, N, M) or (B, H, N, M), added to the softmax baseline's logits.
            padding: (B, N) boolean, True where a token is to be ignored; linear-angular kernel only.
        Returns: (B, H, N, E) in v's dtype.
        Raises: ValueError if q, k, v or padding do not fit, or for a bias or padding that the kernel has no use for.
        """
        self.check(q, k, v)
        if bias is not None and self.kernel != "softmax":
            raise ValueError(f"only the softmax baseline takes an attention bias, not {self.kernel!r}")
        if padding is not None and self.kernel != "linear_angular":
            raise ValueError(f"padding is defined for the linear_angular kernel only, not for {self.kernel!r}")
        if padding is not None and (padding.dtype != torch.bool or padding.shape != (v.shape[0], v.shape[2])):
            raise ValueError(f"expected boolean padding of (B, N), got {padding.dtype} {tuple(padding.shape)}")
        if self.watch is not None:
            self.watch((q, k, v))
        if self.kernel == "softmax":
            return softmax_attention(q, k, v, bias, self.dropout if self.training else 0.0)
        if v.shape[2] == 0:
            return v
        dtype = torch.promote_types(v.dtype, torch.float32)                                      # D3
        with without_autocast(v.device):
            y = self.equation_9(q.to(dtype), k.to(dtype), v.to(dtype), padding)
        return y.to(v.dtype)

    def equation_9(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """Eq. (9) in full, all (B, H, N, D|E) in float32 or wider."""
        if padding is not None:
            k, v = (x.masked_fill(padding[:, None, :, None], 0) for x in (k, v))  # nothing to k^T v, nor to DWConv
        branch = self.auxiliary_branch(q, k, v, padding) if self.auxiliary and self.active else None  # Eq. (10)
        if self.kernel == "linear_angular" and self.dconv is not None:
            return castled_attention(q, k, v, self.dconv.weight, branch)
        y = KERNELS[self.kernel](q, k, v)
        y = unit(y if branch is None else y + branch)                                            # D2
        return y if self.dconv is None else y + dwconv(v, self.dconv.weight)

    def auxiliary_branch(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """M_sparse V at this layer's threshold, (B, H, N, E); the mask's statistics go to the tally.  Eq. (10)"""
        tokens: int | Tensor = k.shape[-2] if padding is None else (~padding).sum(-1)[:, None]   # N or (B, 1)
        threshold = mask_threshold(self.progress.float(), tokens, self.epsilon, self.schedule)
        threshold = torch.as_tensor(threshold, dtype=q.dtype, device=q.device)                   # () or (B, 1)
        dropout = self.dropout if self.training else 0.0
        watched = not torch.compiler.is_compiling() and observed()
        if dropout > 0 or watched:
            out, totals = masked_branch_reference(q, k, v, threshold, padding, dropout)
        else:
            out, _, totals = masked_branch(q, k, v, threshold, padding, self.record)
        if self.record and not watched:  # a tensor of a transform or a fake one must not outlive its context
            self.add_to_tally(totals.detach(), len(v), tokens)
        return out

    def add_to_tally(self, totals: Tensor, images: int, tokens: int | Tensor) -> None:
        """Add a batch's density and mass from its kept entries and their sum, over the real tokens of each image."""
        entries: int | Tensor
        rows: int | Tensor
        if isinstance(tokens, Tensor):
            entries, rows = (self.heads * x.sum().clamp_min(1) for x in (tokens**2, tokens))
        else:
            entries, rows = (self.heads * max(1, images * x) for x in (tokens**2, tokens))
        density, mass = (totals[0] / entries).float(), (totals[1] / rows).float()
        self.tally = self.tally.to(totals.device) + images * torch.stack([density, mass, torch.ones_like(mass)])


class LinearAngularAttention(AttentionCore):
    """Drop-in self-attention block with the parameters, and so the checkpoints, of the authors' released block.

    Args:
        dim: C, divisible by num_heads.
        num_heads, qkv_bias, proj_drop, res_kernel_size: as in the released block.
        attn_drop: dropout on the auxiliary branch's probabilities (the released block accepts it and ignores it).
        sparse_reg: train with the auxiliary branch of Eq. (10), until `castle` removes it.
        epsilon, schedule: its threshold. The released block's is `schedule="fixed"`, 0.02 everywhere.
    Raises: ValueError if dim is not divisible by num_heads, and as AttentionCore does.
    Source: arXiv:2211.10526v4, Eq. (9); GATECH-EIC/Castling-ViT @ c7b75c1 on GitHub, attention.py, LinAngularAttention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        res_kernel_size: int = 9,
        sparse_reg: bool = False,
        *,
        epsilon: float = 0.02,
        schedule: str = "ramp",
    ):
        channels_per_head(dim, num_heads)  # a whole number
        super().__init__(
            num_heads,
            auxiliary=sparse_reg,
            conv_kernel=res_kernel_size,
            epsilon=epsilon,
            schedule=schedule,
            dropout=attn_drop,
        )
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(  # type: ignore[override]
        self, x: Tensor, prefix: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Args:
            x: tokens (B, N, C) or a feature map (B, C, H, W), read row by row.
            prefix: (B, P, C) class or register tokens kept apart from x; they attend, and are attended to, before x.
            key_padding_mask: boolean, (B, N) or (B, H, W), True at tokens of x to ignore. They influence no other
                token; what comes out at their own places means nothing.
        Returns: the shape of x; with a prefix, the pair (x's shape, (B, P, C)).
        Raises: ValueError that names the shapes that do not fit.
        """
        shape = tuple(x.shape)
        if not (x.ndim == 3 and shape[2] == self.dim or x.ndim == 4 and shape[1] == self.dim):
            raise ValueError(f"expected (B, N, {self.dim}) or (B, {self.dim}, H, W), got {shape}")
        tokens = rearrange(x, "b c y x -> b (y x) c") if x.ndim == 4 else x
        padding = key_padding_mask
        if padding is not None:
            expected = tuple(tokens.shape[:2]) if x.ndim == 3 else (shape[0], *shape[2:])
            if padding.dtype != torch.bool or tuple(padding.shape) != expected:
                raise ValueError(
                    f"expected a boolean key_padding_mask of {expected}, got {padding.dtype} {tuple(padding.shape)}"
                )
            padding = padding.flatten(1)
            tokens = tokens.masked_fill(padding[..., None], 0)  # whatever it holds, nan included, goes no further
        before = 0
        if prefix is not None:
            before = prefix.shape[1] if prefix.ndim == 3 else -1
            if tuple(prefix.shape) != (shape[0], before, self.dim):
                raise ValueError(f"expected a prefix of ({shape[0]}, P, {self.dim}), got {tuple(prefix.shape)}")
            tokens = torch.cat([prefix, tokens], dim=1)
            padding = None if padding is None else F.pad(padding, (before, 0), value=False)

        q, k, v = rearrange(self.qkv(tokens), "b n (s h d) -> s b h n d", s=3, h=self.heads)     # (B, H, N, D)
        y = super().forward(q, k, v, padding=padding)                                            # Eq. (9)
        y = self.proj_drop(self.proj(rearrange(y, "b h n d -> b n (h d)")))                      # (B, P + N, C)
        prefix_out, y = y[:, :before], y[:, before:]
        if x.ndim == 4:
            y = y.mT.unflatten(2, shape[2:])
        return y if prefix is None else (y, prefix_out)


# ---- castling a model ------------------------------------------------------------------------------------------------


def cores(model: nn.Module) -> dict[str, AttentionCore]:
    """{layer name: core} of every attention core, without the prefixes that DDP and torch.compile put before names."""
    named = {name: module for name, module in model.named_modules() if isinstance(module, AttentionCore)}
    short = {name: ".".join(p for p in name.split(".") if p not in ("module", "_orig_mod")) for name in named}
    if len(set(short.values())) < len(short):  # some layer is really called so
        return named
    return {short[name]: core for name, core in named.items()}


def castle(model: nn.Module) -> nn.Module:
    """Remove the auxiliary branch everywhere, in place, and return the model. Idempotent.

    Afterwards no castling layer computes an N x N softmax. Where a mask was empty the output is the same bit for bit;
    elsewhere the model has changed by what the mask still held: measure it (`mask_density`), do not assume it.
    """
    for core in cores(model).values():
        core.auxiliary = False
    return model


def set_threshold(model: nn.Module, progress: float) -> None:
    """Set every layer's mask threshold for `progress`, the share of training done; statistics start anew.

    Raises: ValueError for a progress outside 0..1.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is the share of training done, 0..1, got {progress}")
    for core in cores(model).values():
        core.set_progress(float(progress))


def record_masks(model: nn.Module, on: bool = True) -> None:
    """Switch mask statistics on or off. They are on to begin with; off they are free."""
    for core in cores(model).values():
        core.record = on


def mask_statistics(model: nn.Module) -> dict[str, tuple[float, float]]:
    """{layer: (density, mass)} of every auxiliary branch over the forwards since its threshold was last set.

    density: share of non-zero entries of M_sparse (Fig. 6); mass: its mean row sum, the attention that survives. Both
    0..1; nan where nothing has been recorded yet; no entry for a castled layer. Sums run over all ranks, so in a
    process group every rank must call this.
    """
    branches = {name: core for name, core in cores(model).items() if core.auxiliary}
    if not branches:
        return {}
    sums = torch.stack([core.tally.to(core.progress.device) for core in branches.values()])       # (layers, 3)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    statistics = {}
    for (name, core), (density, mass, images) in zip(branches.items(), sums.tolist(), strict=True):
        unknown = math.nan if core.active else 0.0  # an inactive branch is empty by construction
        statistics[name] = (density / images, mass / images) if images else (unknown, unknown)
    return statistics


def mask_density(model: nn.Module) -> dict[str, float]:
    """{layer: share of non-zero entries of M_sparse}, see `mask_statistics`."""
    return {name: density for name, (density, _) in mask_statistics(model).items()}


# ---- looking inside --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def captured(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Context that keeps the q, k, v (B, H, N, D) which every core of a model last saw: {layer: (q, k, v)}. Tokens that
    a padding mask hides are still in them.

    with captured(model) as seen:
        model(images)
    """
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    watched = cores(model)
    for name, core in watched.items():
        core.watch = functools.partial(seen.__setitem__, name)
    try:
        yield seen
    finally:
        for core in watched.values():
            core.watch = None


def check_queries(q: Tensor, queries: Sequence[int] | Tensor) -> Tensor:
    """Token indices as a tensor (Q,). Raises ValueError for one that q, (B, H, N, D), does not have."""
    try:
        index = torch.as_tensor(queries, device=q.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"expected a list of token indices, got {queries!r}") from None
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool or index.numel() == 0:
        raise ValueError(f"expected a list of token indices, got {queries}")
    if index.min() < 0 or index.max() >= q.shape[-2]:
        raise ValueError(f"queries must be within 0..{q.shape[-2] - 1}, got {queries}")
    return index


@torch.no_grad()
def auxiliary_mask_rows(core: AttentionCore, q: Tensor, k: Tensor, queries: Sequence[int] | Tensor) -> Tensor:
    """Rows of M_sparse at the core's present threshold, (B, H, Q, N) for Q chosen queries; 0 once castled.  Eq. (10)

    Args: q, k: (B, H, N, D), as `captured` gives them; queries: token indices.
    Raises: ValueError if q and k do not fit the core, and for indices that are none.
    """
    core.check(q, k, k)
    index, dtype = check_queries(q, queries), torch.promote_types(q.dtype, torch.float32)
    q, k = q[..., index, :].to(dtype), k.to(dtype)
    if not (core.auxiliary and core.active):
        return q.new_zeros(*q.shape[:-1], k.shape[-2])
    threshold = mask_threshold(core.progress.float(), k.shape[-2], core.epsilon, core.schedule)
    with without_autocast(q.device):
        return sparse_matrix(q, k, threshold)[0]


@torch.no_grad()
def attention_rows(
    core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int] | Tensor, band: bool = True
) -> Tensor:
    """The attention map that a linear-angular core never forms, for chosen queries: (B, H, Q, N), in O(Q N D).

    Row i is (1/2 e_i + q_i K^T / pi [+ row i of M_sparse]) / |y_i|, plus the DWConv's taps around i, so that
    attention_rows(core, q, k, v, queries) @ v = core(q, k, v)[..., queries, :]  in eval mode. Entries may be negative.

    Args:
        q, k: (B, H, N, D); v: (B, H, N, E), as `captured` gives them.
        queries: token indices. band: False leaves the DWConv out.
    Raises: ValueError for a core of another kernel, q, k, v that do not fit it, and for indices that are none.
    """
    core.check(q, k, v)
    if core.kernel != "linear_angular":
        raise ValueError(f"rows are those of the linear_angular kernel, not of {core.kernel!r}")
    index, dtype = check_queries(q, queries), torch.promote_types(v.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    own = (index[:, None] == torch.arange(k.shape[-2], device=q.device)).to(dtype)                # (Q, N)
    with without_autocast(q.device):                                                              # D3
        rows = 0.5 * own + unit(q)[..., index, :] @ unit(k).mT / math.pi                          # Eq. (9)
        rows = rows + auxiliary_mask_rows(core, q, k, index)                                      # Eq. (10)
        rows = rows / floored_norm(rows @ v)                                                      # D2
    if band and core.dconv is not None:
        taps = core.dconv.weight[:, 0, :, 0].to(dtype)                                            # (H, taps)
        offset = torch.arange(k.shape[-2], device=q.device) - index[:, None] + taps.shape[1] // 2
        inside = (offset >= 0) & (offset < taps.shape[1])
        rows = rows + torch.where(inside, taps[:, offset.clamp(0, taps.shape[1] - 1)], 0)
    return rows


@torch.no_grad()
def effective_rank(q: Tensor, k: Tensor, diagonal: float = 0.5) -> Tensor:
    """Effective rank, 1..N, of diagonal I + Q K^T / pi, rows of Q and K on the unit sphere: (..., N, D) -> (...).

    exp of the entropy of the singular values over their sum; of the map of Eq. (9) before its normalisation, of its
    low-rank part alone with diagonal=0. In O(N D^2): outside the span of Q and K the matrix is `diagonal` times the
    identity, inside it is one of at most 2 D x 2 D.
    Raises: ValueError if the shapes do not fit, or for a negative diagonal.
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    check_qkv(q, k, k, per_token=True)
    if not diagonal >= 0:
        raise ValueError(f"diagonal must be at least 0, got {diagonal}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = unit(q.to(dtype)), unit(k.to(dtype))
    basis = torch.linalg.qr(torch.cat([q, k], dim=-1)).Q                                          # (..., N, r)
    N, r = basis.shape[-2:]
    with without_autocast(q.device):
        inner = diagonal * torch.eye(r, dtype=dtype, device=q.device) + (basis.mT @ q) @ (basis.mT @ k).mT / math.pi
    values = torch.linalg.svdvals(inner)
    total = (values.sum(-1) + (N - r) * diagonal).clamp_min(EPS)
    outside = torch.special.entr(torch.as_tensor(diagonal, dtype=dtype, device=q.device) / total)
    return (torch.special.entr(values / total[..., None]).sum(-1) + (N - r) * outside).exp()


# ---- self-check: python attention.py ---------------------------------------------------------------------------------


def self_check() -> None:
    """Assert the laws that make this file what it says, print the convergence of Eq. (8) and this machine's speed."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 100, 16, dtype=torch.float64)
    cosine = unit(q) @ unit(k).mT
    definition = 0.5 * v + cosine @ v / math.pi
    for order in ("kv", "qk"):
        assert torch.allclose(linear_angular_attention(q, k, v, order=order), definition)
    assert torch.allclose(angular_attention(q, k, v), (1 - torch.arccos(cosine) / math.pi) @ v)

    inputs = q, k, v, torch.randn(4, 1, 9, 1, dtype=torch.float64), v.roll(1)
    assert torch.allclose(castled_attention(*inputs), castled_attention_reference(*inputs))
    branch = masked_branch(3 * q, k, v, torch.tensor(0.05).double(), None, False)[0]
    assert branch.any() and torch.allclose(branch, masked_softmax_attention(3 * q, k, v, 0.05)[0])

    core = AttentionCore(4, auxiliary=True).double().eval()
    hybrid, rows = core(q, k, v), attention_rows(core, q, k, v, [0, 50, 99])
    assert torch.allclose(rows @ v, hybrid[:, :, [0, 50, 99]])
    set_threshold(core, 1.0)
    assert not torch.equal(core(q, k, v), hybrid) and torch.equal(core(q, k, v), castle(core)(q, k, v))
    assert torch.isfinite(core(0 * q, 0 * k, 0 * v)).all()
    print("linear = quadratic, fast = formula, rows = map, castled = empty mask: all as they should be")

    print("Eq. (8) after K terms: largest error, where it is")
    print("  K    |x| <= 0.5   |x| <= 0.9   |x| <= 1     bound at 1")
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    exact = 1 - torch.arccos(x) / math.pi
    for terms in (0, 1, 2, 5, 10, 20, 50):
        error = (angular_series(x, terms) - exact).abs()
        assert (error <= angular_series_bound(x, terms) + 1e-12).all()
        worst = [error[x.abs() <= end].max().item() for end in (0.5, 0.9, 1.0)]
        bound = angular_series_bound(x[-1:], terms).item()
        print(f"  {terms:<4} " + "".join(f"{number:<13.2e}" for number in (*worst, bound)))

    ratios: list[str] = []
    for tokens in (64, 256, 1024, 2048):
        q, k, v = torch.randn(3, 1, 4, tokens, 32)
        ratio = []
        for _ in range(15):
            clock = [time.perf_counter()]
            for function in (F.scaled_dot_product_attention, linear_angular_attention):  # in turn
                function(q, k, v)
                clock.append(time.perf_counter())
            ratio.append((clock[1] - clock[0]) / (clock[2] - clock[1]))
        ratios.append(f"{statistics.median(ratio):.2f} at N = {tokens}")
    print(f"speed, softmax / linear-angular, {torch.get_num_threads()} CPU threads, D = 32: {', '.join(ratios)}")


if __name__ == "__main__":
    self_check()
