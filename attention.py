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

Departures from the paper and the released block are numbered D1, D2, ... as in the README.
"""

import contextlib
import difflib
import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SCHEDULES = ("ramp", "fixed", "anneal")
EPS = 1e-12  # floor under every norm, D2
RAMP_END = 0.9  # share of training after which `ramp` and `anneal` masks are empty: the rest trains the inference graph


# ---- precision and shapes --------------------------------------------------------------------------------------------


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which matrix products keep the dtype of their operands, whatever the surrounding autocast."""
    if device.type == "meta":  # knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def in_float32(function):
    """Decorator for f(q, k, v, ...) -> Tensor: compute in float32 or wider, return v's dtype.

    D3: norms and k^T v are sums over channels and tokens; float16 overflows in them at a few thousand tokens. A result
    that is itself too large for v's dtype still is: the core normalises before it returns.
    """

    @functools.wraps(function)
    def wrapped(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype, torch.float32))
        with without_autocast(v.device):
            return function(q.to(dtype), k.to(dtype), v.to(dtype), *args, **kwargs).to(v.dtype)

    return wrapped


def check_qkv(q: Tensor, k: Tensor, v: Tensor, per_token: bool = False) -> None:
    """Raise ValueError unless q (..., N, D), k (..., M, D), v (..., M, E) fit together; `per_token` asks for M = N."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if min(q.ndim, k.ndim, v.ndim) < 2:
        raise ValueError(f"q, k, v need at least a token and a channel axis: {shapes}")
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-2] != v.shape[:-2]:
        raise ValueError(f"q, k, v must agree on their leading (batch, head) axes: {shapes}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same number of channels: {shapes}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same number of tokens: {shapes}")
    if per_token and q.shape[-2] != v.shape[-2]:
        raise ValueError(f"this attention needs one value per query (M = N, departure D1): {shapes}")


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
    """
    if order not in (None, "kv", "qk"):
        raise ValueError(f"order must be 'kv', 'qk' or None, got {order!r}")
    (N, D), (M, E) = q.shape[-2:], v.shape[-2:]
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
    Raises: ValueError if the shapes do not fit or there is not one value per query.
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
    """Scaled dot-product attention with an optional additive (H, N, M) bias: the quadratic baseline."""
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


def look_up(table: dict, name, what: str):
    """table[name], or a ValueError that names the nearest keys."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), map(str, table), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(map(str, table))}"
    raise ValueError(f"unknown {what} {name!r}: {hint}")


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "linear_angular") -> Tensor:
    """Attention by the name of its kernel, a key of `KERNELS`: one row of Table 5."""
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
        epsilon: the paper's threshold.
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


# ---- modules ---------------------------------------------------------------------------------------------------------


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
    Raises: ValueError for an unknown kernel or schedule, an even conv_kernel, or a branch on the softmax baseline.
    Source: authors' attention.py @ c7b75c1: the same order of operations and the same parameter `dconv.weight`.

    Attributes: `auxiliary` (the branch exists; `castle` clears it), `active` (its mask can still be non-empty),
    `record` (keep mask statistics; False makes them free), `tally` (sums of images x density, images x mass, images).
    A copy that averages buffers, or `to_empty`, loses the threshold: call `set_threshold` on it.
    """

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

    def extra_repr(self) -> str:
        branch = f", auxiliary, {self.schedule}, epsilon={self.epsilon}" if self.auxiliary else ""
        return f"heads={self.heads}, kernel={self.kernel}{branch}"

    def set_progress(self, progress: float) -> None:
        """Move the mask threshold to `progress` (0..1 of training); mask statistics start anew."""
        self.progress.fill_(progress)
        self.active = self.schedule == "fixed" or progress < RAMP_END
        self.tally = torch.zeros(3, device=self.progress.device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Args:
            q, k: (B, H, N, D); v: (B, H, N, E). The softmax baseline may have another number of keys.
            bias: (H, N, M), added to the softmax baseline's logits.
            padding: (B, N) boolean, True where a token is to be ignored; linear-angular kernel only.
        Returns: (B, H, N, E) in v's dtype.
        Raises: ValueError if the shapes do not fit, or for a bias or padding that the kernel has no use for.
        """
        check_qkv(q, k, v, per_token=self.kernel != "softmax")  # D1: the DWConv too needs one value per query
        if v.ndim != 4 or v.shape[1] != self.heads:
            raise ValueError(f"expected (B, {self.heads}, N, D), got q {tuple(q.shape)}, v {tuple(v.shape)}")
        if bias is not None and self.kernel != "softmax":
            raise ValueError(f"only the softmax baseline takes an attention bias, not {self.kernel!r}")
        if padding is not None and self.kernel != "linear_angular":
            raise ValueError(f"padding is defined for the linear_angular kernel only, not for {self.kernel!r}")
        if padding is not None and (padding.dtype != torch.bool or padding.shape != (v.shape[0], v.shape[2])):
            raise ValueError(f"expected boolean padding of (B, N), got {padding.dtype} {tuple(padding.shape)}")
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
        y = KERNELS[self.kernel](q, k, v)
        if self.auxiliary and self.active:
            y = y + self.auxiliary_branch(q, k, v, padding)                                      # Eq. (10)
        if self.dconv is None:
            return unit(y)                                                                       # D2
        # Channels-last, i.e. heads innermost: the layout in which this convolution is fast on a CPU.
        v = v.to(self.dconv.weight.dtype).contiguous(memory_format=torch.channels_last)
        return unit(y) + self.dconv(v).to(y.dtype)                                               # D2

    def auxiliary_branch(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """M_sparse V at this layer's threshold, (B, H, N, E); the mask's statistics go to the tally.  Eq. (10)"""
        tokens, pairs = k.shape[-2], None
        if padding is not None:
            tokens = (~padding).sum(-1)[:, None, None, None]                                     # (B, 1, 1, 1)
            pairs = padding[:, None, :, None] | padding[:, None, None, :]                        # (B, 1, N, N)
        threshold = mask_threshold(self.progress.float(), tokens, self.epsilon, self.schedule)
        sparse, kept = sparse_matrix(q, k, threshold, pairs)
        if self.record:
            self.add_to_tally(sparse.detach(), kept, tokens)
        return F.dropout(sparse, self.dropout, self.training) @ v

    def add_to_tally(self, sparse: Tensor, kept: Tensor, tokens: int | Tensor) -> None:
        """Add one batch's density and mass, both over real tokens, `tokens` per image."""
        images, heads, rows = kept.shape[:3]
        if isinstance(tokens, Tensor):
            entries, rows = heads * (tokens**2).sum().clamp_min(1), heads * tokens.sum().clamp_min(1)
        else:
            entries, rows = max(1, kept.numel()), max(1, images * heads * rows)
        density, mass = kept.sum() / entries, sparse.sum() / rows
        self.tally = self.tally.to(kept.device) + images * torch.stack([density, mass, torch.ones_like(mass)]).float()


class LinearAngularAttention(AttentionCore):
    """Drop-in self-attention block with the parameters, and so the checkpoints, of the authors' released block.

    Args:
        dim: C, divisible by num_heads.
        num_heads, qkv_bias, proj_drop, res_kernel_size: as in the released block.
        attn_drop: dropout on the auxiliary branch's probabilities (the released block accepts it and ignores it).
        sparse_reg: train with the auxiliary branch of Eq. (10), until `castle` removes it.
        epsilon, schedule: its threshold. The released block's is `schedule="fixed"`, 0.02 everywhere.
    Raises: ValueError if dim is not divisible by num_heads.
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
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} must be divisible by num_heads {num_heads}")
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

    def forward(
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
    """Set every layer's mask threshold for `progress`, the share of training done in 0..1; statistics start anew."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is the share of training done, 0..1, got {progress}")
    for core in cores(model).values():
        core.set_progress(float(progress))


def record_masks(model: nn.Module, on: bool = True) -> None:
    """Switch mask statistics on or off. They are on to begin with, at a few percent of a forward; off they are free."""
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
