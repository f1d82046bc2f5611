"""Linear-angular attention (Castling-ViT) in one copyable file; needs torch and einops only.

Paper: You et al., "Castling-ViT", CVPR 2023, arXiv:2211.10526v4.
Authors' block: `LinAngularAttention`, github.com/GATECH-EIC/Castling-ViT @ c7b75c1, attention.py.

    paper        here                    shape          unit or range
    Q, K, V      q, k, v                 (B, H, N, D)   v may have E channels in place of D
    theta        angle                   (B, H, N, N)   radians, 0..pi                      Eq. (4)
    Sim(Q, K)    angular_similarity      (B, H, N, N)   0..1                                Eq. (5)
    a_k          angular_coefficients    (K,)           k = 1..K                            Eq. (8)
    DWConv(V)    dwconv                  (B, H, N, E)   9 taps along the tokens             Eq. (9)
    M_sparse     masked_softmax          (B, H, N, N)   softmax entries above epsilon       Eq. (10)
    epsilon      mask_threshold          () or (B,)     0..1; at 1 the mask is empty        Eq. (10)

B images, H heads, N tokens, D channels per head. Castling: train with the auxiliary branch
M_sparse V, which costs O(N^2), and infer without it. Call set_threshold before every step: it
stores the share of training done. Every forward computes the threshold from it (`mask_threshold`).
After training remove the branch:

    block = LinearAngularAttention(dim=192, num_heads=3, sparse_reg=True)
    set_threshold(block, progress=step / total_steps)       # before every step
    y = block(x)                                            # (B, N, 192) or (B, 192, H, W)
    castle(block)                                           # from here on O(N): no softmax is left

`python attention.py` checks Eq. (8), Eq. (9) and castling; the repository's tests check the rest.
D1, D2, ... number the departures from the paper and from the authors' block. The README lists them.
"""

import contextlib
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SCHEDULES = ("ramp", "fixed", "anneal")  # of the mask's threshold, see mask_threshold
RAMP_END = 0.9  # share of training after which `ramp` and `anneal` leave the mask empty


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which matrix products keep the dtype of their operands: autocast is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # meta has no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, per_token: bool = False) -> None:
    """Raise ValueError unless q (..., N, D), k (..., M, D), v (..., M, E) fit together.

    per_token: require M = N as well.
    """
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


def check_padding(padding: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless padding (key_padding_mask) is boolean and has that shape."""
    if padding.dtype != torch.bool or padding.shape != expected:
        got = f"{padding.dtype} {tuple(padding.shape)}"
        raise ValueError(f"expected a boolean key_padding_mask of {tuple(expected)}, got {got}")


def look_up(table: Iterable[str], name: str, what: str) -> Any:
    """table[name], or name itself if table is no dict. Raises: ValueError with similar names."""
    if name in table:
        return table[name] if isinstance(table, dict) else name
    names = [str(key) for key in table]
    begin = [key for key in names if name and key.startswith(str(name))]
    near = begin[:3] or difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names[:50])}"
    raise ValueError(f"unknown {what} {name!r}: {hint}")


# ---- the angular kernel, Eq. (4) to (8) ----------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis.

    D2: a zero vector has no direction. It stays zero, and its first gradient is 0.
    float32 cannot hold the squares of very long or very short vectors. If a tensor on a CPU has a
    vector above 1e18 or below 1e-18, all its vectors are first divided by their largest entries. A
    GPU would have to wait for this test, and a compiled graph cannot make it. There a vector above
    about 1e19 becomes NaN; one below about 1e-19 loses precision, and becomes zero at last. Under
    vmap on a CPU a vector above 1e19 becomes zero, not NaN.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        norm = norm.masked_fill(norm == math.inf, math.nan)
    else:
        with contextlib.suppress(RuntimeError):  # raised under vmap and by empty tensors
            lengths = norm.detach()
            if lengths.amin().item() > 1e-18 and lengths.amax().item() < 1e18:
                return x / norm
            largest = x.detach().abs().amax(dim=-1, keepdim=True)  # detached: its gradient cancels
            x = x / largest.masked_fill(largest == 0, math.inf)
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, math.inf)


def angular_similarity(q: Tensor, k: Tensor) -> Tensor:
    """Sim(q, k) = 1 - theta / pi with theta = arccos(<q, k> / |q||k|) in radians.  Eq. (4), (5)

    Args: q (..., N, D); k (..., M, D). Only directions matter. A zero vector counts as orthogonal.
    Returns: (..., N, M) in 0..1: 1 aligned, 1/2 orthogonal, 0 opposed.
    Raises: ValueError if the shapes do not fit.

    The slope of arccos is infinite at 1. If float32 rounds the cosine of parallel vectors to
    1 - 6e-8, their similarity is 0.9999. At exactly 1 or -1 the gradient is set to 0, not infinity.
    """
    check_qkv(q, k, k)
    x = unit(q) @ unit(k).mT                                         # cos(theta), (..., N, M)
    inside, end = x.abs() < 1, torch.arccos(x.detach().clamp(-1, 1))
    angle = torch.where(inside, torch.arccos(torch.where(inside, x, 0)), end)          # Eq. (4)
    return 1 - angle / math.pi                                                         # Eq. (5)


def angular_coefficients(terms: int) -> Tensor:
    """a_1 .. a_terms of Eq. (8), a_k = (2k)! / (2^2k (k!)^2 (2k + 1)), as float64 (terms,).

    Computed from a_0 = 1 and a_k / a_(k-1) = (2k - 1)^2 / (2k (2k + 1)). In float64, (2k)! itself
    overflows at k = 86.
    Raises: ValueError for a negative number of terms.
    """
    if terms < 0:
        raise ValueError(f"terms must be >= 0, got {terms}")
    k = torch.arange(1, terms + 1, dtype=torch.float64)
    return torch.cumprod((2 * k - 1) ** 2 / (2 * k * (2 * k + 1)), dim=0)


def angular_series(x: Tensor, terms: int) -> Tensor:
    """Partial sum of Eq. (8) at x = cos(theta): 1/2 + x/pi + 1/pi sum_(k=1..terms) a_k x^(2k+1).

    With terms=0 only 1/2 + x/pi is left, as in Eq. (9). The limit is 1 - arccos(x) / pi.
    """
    total = torch.zeros_like(x)
    for a in reversed(angular_coefficients(terms).tolist()):  # Horner's rule in x^2
        total = (total + a) * x**2
    return 0.5 + x * (1 + total) / math.pi


def angular_series_bound(x: Tensor, terms: int) -> Tensor:
    """Upper bound, for |x| <= 1, on |angular_series(x, terms) - (1 - arccos(x) / pi)|.

    The remainder is 1/pi sum_(k>K) a_k |x|^(2k+1), with K = terms. The bound is the smaller of two:
      - |x|^(2K+3) times the remainder at |x| = 1. That is known: all a_k add up to pi/2 - 1.
      - a_(K+1) |x|^(2K+3) / (1 - x^2) / pi, a geometric series, as a_k falls with k.
    For terms=0 the first is |x|^3 (1/2 - 1/pi), at most 0.1817.
    """
    a = angular_coefficients(terms + 1)
    tail = math.pi / 2 - 1 - a[:-1].sum().item()
    power = x.abs() ** (2 * terms + 3)
    geometric = a[-1].item() * power / (1 - x**2).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.minimum(tail * power, geometric) / math.pi


# ---- linear-angular attention, Eq. (9) -----------------------------------------------------------


def linear_angular_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """First-order angular attention, linear in tokens.  Eq. (9), first two terms

    1/2 V + (1/pi) Q (K^T V), with each row of Q and K divided by its length.

    Args: q, k (..., N, D), any scale; v (..., N, E). A zero row of Q or K has weight 0 (D2).
    Returns: (..., N, E). `castling_attention` then normalises it and adds DWConv(V).
    Raises: ValueError if the shapes do not fit, or if there is not one value per query.
    Source: authors' attention.py @ c7b75c1, LinAngularAttention.forward.
    """
    check_qkv(q, k, v, per_token=True)
    q, k = unit(q.contiguous()), unit(k.contiguous())                                  # D2
    # D1: by Eq. (8) the first term is 1/2 sum_j v_j. Eq. (9) and the authors' code have 1/2 v_i.
    return 0.5 * v + q @ (k.mT @ v / math.pi)                                          # Eq. (9)


def channels_last(v: Tensor) -> Tensor:
    """(B, H, N, E) -> (B, H E, 1, N), in channels-last memory order, which is fast on a CPU."""
    return v.transpose(1, 2).flatten(2).contiguous().mT.unsqueeze(2)


def dwconv(v: Tensor, weight: Tensor) -> Tensor:
    """DWConv(V) of Eq. (9) along the tokens, (B, H, N, E) -> same, by filters (H, 1, T, 1)."""
    H, E, T = v.shape[1], v.shape[3], weight.shape[2]
    filters = weight.to(v.dtype).mT.repeat_interleave(E, dim=0)  # (H E, 1, 1, T), one per channel
    y = F.conv2d(channels_last(v), filters, padding=(0, T // 2), groups=H * E)
    return y.squeeze(2).unflatten(1, (H, E)).mT


def castling_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None, branch: Tensor | None = None,
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_angular_attention,
) -> Tensor:  # fmt: skip
    """unit(1/2 V + (1/pi) Q (K^T V) [+ M_sparse V]) + DWConv(V).  Eq. (9), in training Eq. (10)

    Args:
        q, k: (B, H, N, D); v: (B, H, N, E).
        weight: (H, 1, T, 1), the filters of DWConv, T taps, or None for no DWConv.
        branch: M_sparse V of Eq. (10), (B, H, N, E), or None if there is none, as once castled.
        kernel: another function of q, k, v in place of the linear-angular one (Table 5).
    Returns: (B, H, N, E). The sum before the DWConv is normalised as in the authors' block; Eq. (9)
        does not write it.
    """
    y = kernel(q, k, v)                                    # 1/2 V + (1/pi) Q (K^T V)    Eq. (9)
    if branch is not None:
        y = y + branch                                     # + M_sparse V                Eq. (10)
    y = unit(y)                                            # x / |x|                     D2
    return y if weight is None else y + dwconv(v, weight)  # + DWConv(V)                 Eq. (9)


# ---- rivals of Table 5: (..., N, D), (..., M, D), (..., M, E) -> (..., N, E) ---------------------


def angular_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sim(Q, K) V with the exact similarity of Eq. (5), quadratic: what Eq. (9) approximates."""
    check_qkv(q, k, v)
    return angular_similarity(q, k) @ v


def mc_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """"MC", mean-centring: (sum_j v_j + q (k^T v) / sqrt(D)) / M, q and k centred over tokens.

    A softmax weighs by exp(logit); this weighs by 1 + logit, its first order. As centred keys sum
    to zero, the M weights of a query sum to M. ViTALiTy, the paper's [17], centres the keys only,
    which does not change a softmax. Centring the queries too removes a term of first order. It is
    done here because the paper says "applied to Q/K".
    """
    check_qkv(q, k, v)
    q, k = q - q.mean(dim=-2, keepdim=True), k - k.mean(dim=-2, keepdim=True)
    total = v.sum(dim=-2, keepdim=True) + q @ (k.mT @ v) / math.sqrt(q.shape[-1])
    return total / max(1, v.shape[-2])


def softmax_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """"Softmax" (Efficient Attention): one softmax of q over channels, one of k over tokens."""
    check_qkv(q, k, v)
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).mT @ v)


def cosine_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """"Cosine" (Hydra attention): cosine similarity without a softmax."""
    check_qkv(q, k, v)
    return unit(q) @ (unit(k).mT @ v)


def relu_s_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """"ReLU-S", relu(q) (relu(k)^T v) / M: the whole softmax is replaced, its normaliser too.

    The paper gives only the name. The definition is this project's reading.
    """
    check_qkv(q, k, v)
    return F.relu(q) @ (F.relu(k).mT @ v) / max(1, v.shape[-2])


def relu_e_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """"ReLU-E" (EfficientViT): only exp is replaced. Rows sum to 1, up to eps; a row without a
    positive product sums to 0."""
    check_qkv(q, k, v)
    q, k = F.relu(q), F.relu(k)
    return q @ (k.mT @ v) / (q @ k.sum(dim=-2, keepdim=True).mT + eps)


def identity_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """V itself, a control that is not in the paper: only the DWConv mixes tokens.

    q and k enter times 0, because DistributedDataParallel waits for a gradient of every parameter.
    """
    check_qkv(q, k, v, per_token=True)
    return v + 0 * (q + k).sum(dim=-1, keepdim=True)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention, Eq. (1); bias ([B,] H, N, M) is added to the logits."""
    check_qkv(q, k, v)
    bias = None if bias is None else bias.to(q.dtype)  # under autocast q is bfloat16, bias float32
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


KERNELS = {
    "linear_angular": linear_angular_attention,
    "angular": angular_attention,
    "mc": mc_attention,
    "softmax_linear": softmax_linear_attention,
    "cosine": cosine_attention,
    "relu_s": relu_s_attention,
    "relu_e": relu_e_attention,
    "identity": identity_attention,
    "softmax_normed": softmax_attention,  # a control, not in the paper: normalised, DWConv
    "softmax": softmax_attention,  # the published baseline
}


# ---- the auxiliary branch, Eq. (10) --------------------------------------------------------------


def mask_threshold(
    progress: float | Tensor, tokens: int | Tensor, epsilon: float = 0.02, schedule: str = "ramp"
) -> Tensor:
    """Threshold epsilon of Eq. (10) for one layer.  D4

    The largest entry of a softmax over N keys is at least 1/N. So a threshold of 0.02, the paper's,
    cannot empty the mask of a layer with N < 50. `fixed` is the paper's setting. `ramp` starts at
    min(1, max(epsilon, 4/N)), about 0.02 at the paper's N = 197. It rises to 1 with the square of
    the training done. At 1 the mask is empty; with N <= 4 it is empty from the first step. `anneal`
    starts dense at 1/(4N) and rises to 1 geometrically. `ramp` and `anneal` reach 1 when RAMP_END
    of training is done.

    Args:
        progress: share of training done, 0..1.
        tokens: N, the number of keys; a tensor (B,) if the images of a batch differ in it.
        epsilon: the paper's threshold; not used by `anneal`.
    Returns: the threshold, () or (B,).
    Raises: ValueError for an unknown schedule.
    """
    look_up(SCHEDULES, schedule, "mask schedule")
    t = (torch.as_tensor(progress) / RAMP_END).clamp(0, 1)
    tokens = torch.as_tensor(tokens, device=t.device).clamp(min=1)
    if schedule == "fixed":
        return torch.full_like(t, epsilon)
    if schedule == "anneal":
        return (4 * tokens) ** (t - 1)
    start = (4 / tokens).clamp(min=epsilon, max=1)
    return start + (1 - start) * t**2


def softmax_rows(q: Tensor, k: Tensor, hidden: Tensor | None = None) -> Tensor:
    """P = softmax(q k^T / sqrt(D)), (..., N, D), (..., M, D) -> (..., N, M).

    hidden: boolean, broadcasts to (..., N, M), True at keys to ignore.
    """
    logits = q * q.shape[-1] ** -0.5 @ k.mT
    if hidden is not None:
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)  # -inf could give NaN
    return logits.softmax(dim=-1)


def above(p: Tensor, threshold: float | Tensor) -> Tensor:
    """P where P > threshold, else 0. A threshold of 1 or more keeps nothing, not even an entry that
    is rounded to more than 1.

    threshold: a number, or a tensor that broadcasts. The comparison has no gradient.
    """
    if not isinstance(threshold, Tensor):  # faster than comparing with a tensor
        return F.threshold(p, threshold if threshold < 1 else math.inf, 0.0)
    return torch.where(p > threshold.masked_fill(threshold >= 1, math.inf), p, 0)


def masked_softmax(
    q: Tensor, k: Tensor, threshold: float | Tensor, hidden: Tensor | None = None
) -> Tensor:
    """M_sparse of Eq. (10), (..., N, D), (..., M, D) -> (..., N, M). See `softmax_rows`, `above`.

    q and k keep their lengths here. With unit vectors of 3 or more channels no entry would exceed
    0.02 at 196 tokens.
    The kept entries of a row are not scaled to sum to 1.
    """
    return above(softmax_rows(q, k, hidden), threshold)                                # Eq. (10)


def masked_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, threshold: float | Tensor
) -> tuple[Tensor, Tensor]:
    """M_sparse V of Eq. (10) and no more. Layers run `auxiliary_branch`, which has more options.

    Args: q (..., N, D), k (..., M, D), v (..., M, E); threshold 0..1, see `above`.
    Returns: out (..., N, E), and kept (..., N, M), True at the entries above the threshold.
    Raises: ValueError if the shapes do not fit.
    """
    check_qkv(q, k, v)
    sparse = masked_softmax(q, k, threshold)
    return sparse @ v, sparse != 0


def auxiliary_branch(
    q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, padding: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """M_sparse V of Eq. (10) with padding, dropout and the counts for the mask statistics.

    Args:
        q, k: (B, H, N, D); v: (B, H, N, E). threshold: () or (B,).
        padding: (B, N), True at tokens to ignore, or None. dropout: on the entries of M_sparse.
    Returns: M_sparse V, (B, H, N, E), and a tensor (2,): how many entries are kept, and their sum.
        fast.py returns None in place of M_sparse V if certainly no entry is kept.
    """
    hidden = None if padding is None else padding[:, None, None]
    sparse = masked_softmax(q, k, threshold.reshape(-1, 1, 1, 1), hidden)
    if padding is not None:
        sparse = sparse.masked_fill(padding[:, None, :, None], 0)  # rows of ignored queries
    kept = sparse.detach()
    seen = torch.stack([(kept != 0).sum().to(kept.dtype), kept.sum()])
    return (F.dropout(sparse, dropout) if dropout else sparse) @ v, seen


# ---- modules -------------------------------------------------------------------------------------


def leave_out_progress(core: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Hook on state_dict(): a castled layer has no threshold, only weights."""
    if not core.auxiliary:
        del state[prefix + "progress"]


def take_progress(core: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Hook before load_state_dict(). The authors' files have no `progress`: then keep our own."""
    if prefix + "progress" in state:
        core.set_progress(float(state[prefix + "progress"]))
    else:
        state[prefix + "progress"] = core.progress


class AttentionCore(nn.Module):
    """The attention of every model, from q, k, v to the output; the linear layers are the caller's.

    A layer with projections inherits from this class and calls `self.attend(q, k, v)`. Used alone,
    `AttentionCore(heads)(q, k, v)` does the same.

    Args:
        heads: H.
        kernel: a key of KERNELS. "softmax" is the published baseline: no norm, DWConv or branch.
        auxiliary: train with the masked softmax branch of Eq. (10), until `castle` removes it.
        dconv: taps of the DWConv on V, an odd number, or 0 for no DWConv. It runs along the tokens
            in row-major order, prefix tokens (class, register) included (D6).
        epsilon, schedule: the branch's threshold, see `mask_threshold`.
        dropout: on the entries of M_sparse, or of the softmax baseline, while training.
    Raises: ValueError for an unknown kernel or schedule, heads below 1, an even dconv, epsilon or
        dropout outside 0..1, or a branch on the softmax baseline.
    Source: authors' attention.py @ c7b75c1: the same operations and the parameter `dconv.weight`.

    Attributes: `auxiliary`, whether the branch exists; `active`, False once `ramp` or `anneal` has
    emptied its mask; `record`, whether mask statistics are collected; `progress`, the share of
    training done, in the state dict only while the branch exists. Hooks on `dconv` are not called.
    """

    # fast.py replaces these two by forms that need less memory in training.
    form = staticmethod(castling_attention)  # Eq. (9)
    branch_form = staticmethod(auxiliary_branch)  # Eq. (10)
    progress: Tensor

    def __init__(
        self, heads: int, kernel: str = "linear_angular", *, auxiliary: bool = False,
        dconv: int = 9, epsilon: float = 0.02, schedule: str = "ramp", dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        look_up(KERNELS, kernel, "kernel")
        look_up(SCHEDULES, schedule, "mask schedule")
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if dconv < 0 or dconv > 0 and dconv % 2 == 0:
            raise ValueError(f"dconv must be odd, or 0 for none, got {dconv}")
        if auxiliary and kernel == "softmax":
            raise ValueError("kernel 'softmax' takes no branch (auxiliary=True)")
        for name, value in (("epsilon", epsilon), ("dropout", dropout)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability in 0..1, got {value}")
        self.heads, self.kernel, self.auxiliary = heads, kernel, auxiliary
        self.epsilon, self.schedule, self.dropout = epsilon, schedule, dropout
        self.dconv = None
        if kernel != "softmax" and dconv:
            options = dict(padding=(dconv // 2, 0), groups=heads, bias=False)
            self.dconv = nn.Conv2d(heads, heads, (dconv, 1), **options)
        # A tensor: torch.compile would compile again at each change of a float.
        self.register_buffer("progress", torch.zeros(()))
        self.register_state_dict_post_hook(leave_out_progress)
        self.register_load_state_dict_pre_hook(take_progress)
        self.record = True
        self.set_progress(0.0)

    def extra_repr(self) -> str:
        branch = f", auxiliary, {self.schedule}, epsilon={self.epsilon}" if self.auxiliary else ""
        return f"heads={self.heads}, kernel={self.kernel}{branch}"

    def set_progress(self, progress: float) -> None:
        """Set the share of training done, 0..1, and with it the threshold. Clear the statistics."""
        self.progress.fill_(progress)
        self.active = self.schedule == "fixed" or progress < RAMP_END
        with torch.inference_mode(False):  # training could not add to an inference tensor
            # Kept entries, their sum, rows, entries. Not a buffer: DDP would overwrite it.
            self.tally = torch.zeros(4, device=self.progress.device)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        return self.attend(*inputs, **options)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor,
        bias: Tensor | None = None, padding: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Eq. (9), plus the branch of Eq. (10) while it is active.

        Args:
            q, k: (B, H, N, D); v: (B, H, N, E). With the softmax kernel k and v may have M tokens.
            bias: (H, N, M) or (B, H, N, M), added to the logits; softmax kernel only.
            padding: (B, N) boolean, True at tokens to ignore; linear_angular kernel only.
        Returns: (B, H, N, E) in v's dtype; the softmax kernel under autocast, in autocast's. All
            other kernels compute in float32 or wider, also under autocast (D3): in float16 k^T v
            overflows at a few thousand tokens.
        Raises: ValueError if the inputs do not fit, or the kernel does not take bias or padding.
        """
        self.check(q, k, v, bias, padding)
        if self.kernel == "softmax":
            return softmax_attention(q, k, v, bias, self.dropout if self.training else 0.0)
        if v.shape[2] == 0:
            return v
        dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
        weight = None if self.dconv is None else self.dconv.weight
        with without_autocast(v.device):                                               # D3
            q, k, v = (x.to(wide) for x in (q, k, v))
            if padding is not None:  # zeros, so that a NaN in an ignored token does not spread
                q, k, v = (x.masked_fill(padding[:, None, :, None], 0) for x in (q, k, v))
            branch = None
            if self.auxiliary and self.active:
                q, k, v = (x.contiguous() for x in (q, k, v))  # one copy for Eq. (9) and (10)
                branch = self.branch(q, k, v, padding)
            return self.form(q, k, v, weight, branch, KERNELS[self.kernel]).to(dtype)

    def check(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, padding: Tensor | None
    ) -> None:
        """Raise the errors that `attend` documents."""
        check_qkv(q, k, v, per_token=self.kernel != "softmax")  # D1 and DWConv need M = N
        if v.ndim != 4 or v.shape[1] != self.heads:
            q, v = tuple(q.shape), tuple(v.shape)
            raise ValueError(f"expected (B, {self.heads}, N, D), got q {q}, v {v}")
        for name, given, owner in ("bias", bias, "softmax"), ("padding", padding, "linear_angular"):
            if given is not None and self.kernel != owner:
                raise ValueError(f"{name} needs the {owner} kernel, not {self.kernel!r}")
        if padding is not None:
            check_padding(padding, (v.shape[0], v.shape[2]))

    def branch(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor | None:
        """M_sparse V at this layer's threshold, (B, H, N, E).  Eq. (10)

        fast.py may return None in its place, if the mask is certainly empty.
        """
        tokens = v.shape[2] if padding is None else (~padding).sum(-1)                 # N or (B,)
        threshold = mask_threshold(self.progress.float(), tokens, self.epsilon, self.schedule)
        dropout = self.dropout if self.training else 0.0
        out, seen = self.branch_form(q, k, v, threshold, padding, dropout)
        if self.record:
            self.tally = self.tally.to(v.device)
            real = torch.as_tensor(tokens, dtype=torch.float32).expand(len(v))
            rows = self.heads * torch.stack([real.sum(), (real**2).sum()]).to(v.device)
            with contextlib.suppress(RuntimeError):  # inside torch.func, writing is an error
                self.tally += torch.cat([seen.float(), rows])
        return out


class LinearAngularAttention(AttentionCore):
    """Self-attention block with the arguments of the authors' block. It loads their checkpoints.

    Args:
        dim: C, divisible by num_heads (the authors call it in_channels).
        num_heads: H. qkv_bias: whether the layer to q, k, v has a bias.
        attn_drop: dropout on M_sparse (the authors' block accepts and ignores it).
        proj_drop: dropout after the output layer. res_kernel_size: taps of the DWConv on V.
        sparse_reg: train with the auxiliary branch of Eq. (10), until `castle` removes it.
        epsilon, schedule: its threshold, see `mask_threshold`. The authors' is "fixed" at 0.02.
    Raises: ValueError if dim is not divisible by num_heads, and as AttentionCore does.
    Source: arXiv:2211.10526v4, Eq. (9); github.com/GATECH-EIC/Castling-ViT @ c7b75c1, attention.py,
        LinAngularAttention.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, attn_drop: float = 0.0,
        proj_drop: float = 0.0, res_kernel_size: int = 9, sparse_reg: bool = False, *,
        epsilon: float = 0.02, schedule: str = "ramp",
    ):  # fmt: skip
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} must be divisible by the number of heads, {num_heads}")
        options = dict(epsilon=epsilon, schedule=schedule, dropout=attn_drop)
        super().__init__(num_heads, auxiliary=sparse_reg, dconv=res_kernel_size, **options)
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, prefix: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Args:
            x: tokens (B, N, C) or a feature map (B, C, H, W), read row by row.
            prefix: (B, P, C) class or register tokens. They are put before the tokens of x.
            key_padding_mask: boolean, (B, N) or (B, H, W), True at tokens of x to ignore. They
                influence no other token. The output at their own places has no meaning.
        Returns: the shape of x; with a prefix, two tensors, of the shapes of x and of the prefix.
        Raises: ValueError that names the shapes that do not fit.
        """
        shape = tuple(x.shape)
        if not (x.ndim == 3 and shape[2] == self.dim or x.ndim == 4 and shape[1] == self.dim):
            raise ValueError(f"expected (B, N, {self.dim}) or (B, {self.dim}, H, W), got {shape}")
        tokens = rearrange(x, "b c y x -> b (y x) c") if x.ndim == 4 else x
        padding, before = key_padding_mask, 0
        if padding is not None:
            check_padding(padding, shape[:2] if x.ndim == 3 else (shape[0], *shape[2:]))
            padding = padding.flatten(1)
            tokens = tokens.masked_fill(padding[..., None], 0)  # else NaN reaches qkv's gradient
        if prefix is not None:
            if prefix.ndim != 3 or prefix.shape[::2] != tokens.shape[::2]:
                expected = f"({shape[0]}, P, {self.dim})"
                raise ValueError(f"expected a prefix of {expected}, got {tuple(prefix.shape)}")
            before = prefix.shape[1]
            tokens = torch.cat([prefix, tokens], dim=1)
            padding = None if padding is None else F.pad(padding, (before, 0), value=False)

        q, k, v = rearrange(self.qkv(tokens), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        y = self.attend(q, k, v, padding=padding)                          # (B, H, N, D)   Eq. (9)
        y = self.proj_drop(self.proj(rearrange(y, "b h n d -> b n (h d)")))
        prefix_out, y = y[:, :before], y[:, before:]
        if x.ndim == 4:
            y = y.mT.unflatten(2, shape[2:])
        return y if prefix is None else (y, prefix_out)


# ---- castling a model ----------------------------------------------------------------------------


def cores(model: nn.Module) -> dict[str, AttentionCore]:
    """{layer name: core}; names are without the prefixes that DDP and torch.compile add."""
    named = {name: m for name, m in model.named_modules() if isinstance(m, AttentionCore)}
    wrappers = ("module", "_orig_mod")
    short = {".".join(p for p in name.split(".") if p not in wrappers): name for name in named}
    if len(short) < len(named):  # two short names are the same
        return named
    return {name: named[long] for name, long in short.items()}


def castle(model: nn.Module) -> nn.Module:
    """Remove the auxiliary branch of every layer, in place, and return the model.

    Afterwards no castling layer computes an N x N softmax. A layer whose mask was empty gives the
    same output bit for bit. Another layer loses the entries that its mask still kept: check with
    `mask_density` first.
    """
    for core in cores(model).values():
        core.auxiliary = False
    return model


def set_threshold(model: nn.Module, progress: float) -> None:
    """Set every layer's mask threshold for `progress`, the share of training done, 0..1.

    This also clears the mask statistics. An averaged copy of the model needs its own call.
    Raises: ValueError for a progress outside 0..1.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is the share of training done, 0..1, got {progress}")
    for core in cores(model).values():
        core.set_progress(float(progress))


def record_masks(model: nn.Module, on: bool = True) -> None:
    """Switch mask statistics on (the default) or off (a little faster)."""
    for core in cores(model).values():
        core.record = on


def mask_statistics(model: nn.Module) -> dict[str, tuple[float, float, float]]:
    """{layer: (density, mass, tokens)} of every branch, since the threshold was last set.

    density: share of non-zero entries of M_sparse, 0..1 (Fig. 6).
    mass: mean sum of a row of M_sparse, 0..1: how much of the softmax is kept.
    tokens: N; if inputs differed in it, the mean over rows.
    All three are nan if nothing was recorded, but density and mass are 0 if `active` is False. A
    castled layer is left out.
    The sums run over all processes: in a process group every process must call this.
    """
    branches = {name: core for name, core in cores(model).items() if core.auxiliary}
    if not branches:
        return {}
    sums = torch.stack([core.tally.to(core.progress.device) for core in branches.values()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    statistics = {}
    for (name, core), (kept, mass, rows, entries) in zip(branches.items(), sums.tolist()):
        if rows > 0:
            statistics[name] = kept / entries, mass / rows, entries / rows
        else:
            empty = math.nan if core.active else 0.0
            statistics[name] = empty, empty, math.nan
    return statistics


def mask_density(model: nn.Module) -> dict[str, float]:
    """{layer: share of non-zero entries of M_sparse, 0..1}, see `mask_statistics`."""
    return {name: density for name, (density, *_) in mask_statistics(model).items()}


if __name__ == "__main__":
    q, k, v = 3 * torch.randn(3, 2, 4, 100, 16, dtype=torch.float64)
    cosine, exact = unit(q) @ unit(k).mT, angular_similarity(q, k)
    for terms in (0, 1, 2, 5, 10, 20, 50):
        error = (angular_series(cosine, terms) - exact).abs()
        assert (error <= angular_series_bound(cosine, terms) + 1e-12).all()
        print(f"Eq. (8) with {terms:2} terms is off by {error.max():.1e} at most")
    assert torch.allclose(linear_angular_attention(q, k, v), 0.5 * v + cosine @ v / math.pi)
    core = AttentionCore(4, auxiliary=True).double()
    hybrid = core(q, k, v)
    set_threshold(core, 1.0)
    empty = core(q, k, v)
    assert not torch.equal(hybrid, empty) and torch.equal(empty, castle(core)(q, k, v))
    print("Eq. (9): the O(N) form equals the definition")
    print("Eq. (10): castling changes no bit of the output when the mask is empty")
