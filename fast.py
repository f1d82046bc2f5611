"""Eq. (9) and (10) of attention.py with gradients written by hand: training takes less memory.

    import fast
    fast.enable()     # the linear-angular kernel and every branch use these forms in training
    fast.disable()    # back to the formulas of attention.py

Eq. (9) keeps q, k, v and its result for backward, half of what autograd would keep. Eq. (10)
works on a few heads or rows at a time and computes their part of M_sparse again in backward. So it
keeps nothing of size N x N. On a CPU, and without padding, it skips the heads whose mask is
certainly empty. Without gradients, and under torch.compile, Eq. (9) runs as its formula. With
dropout, and under torch.compile, Eq. (10) runs as its formula, and runs a second time in backward.
The scripts and bench.py enable this file.

Gradients of any order and torch.func work as with the formulas, but for two limits of torch: a
forward-mode derivative of a forward-mode derivative (jacfwd of jacfwd) is wrong, and with dropout
torch.func.grad raises an error. Call `fast.disable()` for these.
"""

import contextlib
import math
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.checkpoint import checkpoint

import attention
from attention import (
    AttentionCore,
    above,
    channels_last,
    dwconv,
    linear_angular_attention,
    softmax_rows,
    unit,
    without_autocast,
)

BLOCK_BYTES = {"cpu": 4 * 2**20}  # of M_sparse, the part computed at a time; 256 MiB elsewhere


class KeepsInputs(torch.autograd.Function):
    """A function of tensors that keeps only its inputs for its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


def tangent(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], moved: tuple[Tensor | None, ...]
) -> Tensor:
    """Jacobian of the function at its inputs times the vectors `moved`; None counts as zero."""
    out, transposed = torch.func.vjp(function, *inputs)
    # `transposed` multiplies by the transposed Jacobian. Its own vjp multiplies by the Jacobian.
    _, jacobian = torch.func.vjp(transposed, torch.zeros_like(out))
    moved = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(inputs, moved))
    return jacobian(moved)[0]


# ---- Eq. (9) -------------------------------------------------------------------------------------


def across(grad: Tensor, y: Tensor, length: Tensor) -> Tensor:
    """Gradient of x from that of y = unit(x): its part orthogonal to y, divided by length = |x|."""
    orthogonal = grad - y * (grad * y).sum(-1, keepdim=True)
    return orthogonal / length.masked_fill(length == 0, math.inf)                      # D2


def length_along(x: Tensor, y: Tensor) -> Tensor:
    """|x| as the product of x and y = unit(x), since float32 cannot hold every square."""
    return (x * y).sum(-1, keepdim=True)


class LinearAngular(KeepsInputs):
    """linear_angular_attention(q, k, v)."""

    forward = staticmethod(linear_angular_attention)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.contiguous() for x in ctx.saved_tensors)
        unit_q, unit_k = unit(q), unit(k)
        with without_autocast(v.device):
            kv, grad_kv = unit_k.mT @ v / math.pi, unit_q.mT @ grad / math.pi
            grad_q = across(grad @ kv.mT, unit_q, length_along(q, unit_q))
            grad_k = across(v @ grad_kv.mT, unit_k, length_along(k, unit_k))
            return grad_q, grad_k, 0.5 * grad + unit_k @ grad_kv

    @staticmethod
    def jvp(ctx: Any, *moved: Tensor | None) -> Tensor:
        return tangent(linear_angular_attention, ctx.saved_tensors, moved)


class DWConv(KeepsInputs):
    """dwconv(v, weight)."""

    forward = staticmethod(dwconv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        v, weight = ctx.saved_tensors
        H, E, T = v.shape[1], v.shape[3], weight.shape[2]
        filters = weight.to(v.dtype).mT.repeat_interleave(E, dim=0)
        x, grad = channels_last(v), channels_last(grad)
        options = dict(padding=(0, T // 2), groups=H * E)
        with without_autocast(v.device):
            grad_x = conv2d_input(x.shape, filters, grad, **options)
            grad_filters = conv2d_weight(x, filters.shape, grad, **options)
        grad_weight = grad_filters.unflatten(0, (H, E)).sum(1).mT
        return grad_x.squeeze(2).unflatten(1, (H, E)).mT, grad_weight.to(weight.dtype)

    @staticmethod
    def jvp(ctx: Any, *moved: Tensor | None) -> Tensor:
        return tangent(dwconv, ctx.saved_tensors, moved)


class Unit(torch.autograd.Function):
    """unit(x) and |x|. It keeps these two for backward, and not x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = unit(x)
        return y, length_along(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_length: Tensor) -> Tensor:
        y, length = ctx.saved_tensors
        return across(grad, y, length) + y * grad_length

    @staticmethod
    def jvp(ctx: Any, moved: Tensor) -> tuple[Tensor, Tensor]:
        y, length = ctx.saved_tensors
        return across(moved, y, length), length_along(moved, y)


def castling_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None, branch: Tensor | None = None,
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_angular_attention,
) -> Tensor:  # fmt: skip
    """attention.castling_attention, Eq. (9) and (10)."""
    training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not training or kernel is not linear_angular_attention:
        return attention.castling_attention(q, k, v, weight, branch, kernel)
    y = LinearAngular.apply(q, k, v)
    y, _ = Unit.apply(y if branch is None else y + branch)
    return y if weight is None else y + DWConv.apply(v, weight)


# ---- Eq. (10) ------------------------------------------------------------------------------------


def certainly_empty(q: Tensor, k: Tensor, threshold: Tensor) -> Tensor:
    """Which of G heads have no softmax entry above the threshold, found without N x N work.

    Subtract the mean key: the softmax stays the same, and a row's logits have mean 0. Then, by
    Jensen's inequality, the softmax denominator of the row is at least M, so its largest entry is
        p_max(i) <= exp(|q_i| max_j |k_j - mean k| / sqrt(D)) / M.
    Args: q (G, N, D), k (G, M, D), threshold (G,).
    Returns: (G,) boolean. True: certainly empty. False: unknown.
    """
    spread = (k - k.mean(dim=-2, keepdim=True)).norm(dim=-1).amax(-1)
    reach = q.norm(dim=-1).amax(-1) * spread / math.sqrt(q.shape[-1])
    return reach <= (k.shape[-2] * threshold).log() - 1e-3  # 1e-3: the rounding of this line


class BranchRows(torch.autograd.Function):
    """M_sparse V of R queries of G heads, and a tensor (2,): the number of kept entries, their sum.

    q (G, R, D), k (G, N, D), v (G, N, E) -> (G, R, E). threshold: a number or (G, R, 1).
    hidden: None or (G, 1, N), True at keys to ignore. Only the inputs are kept for backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, threshold: float | Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sparse = above(softmax_rows(q, k, hidden), threshold)
        return sparse @ v, torch.stack([sparse.count_nonzero().to(sparse.dtype), sparse.sum()])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, threshold, hidden = inputs
        ctx.number = None if isinstance(threshold, Tensor) else threshold
        limits = threshold if ctx.number is None else None
        ctx.save_for_backward(q, k, v, limits, hidden)
        ctx.save_for_forward(q, k, v, limits, hidden)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, limits, hidden = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        with without_autocast(v.device):
            p = softmax_rows(q, k, hidden)
            sparse = above(p, limits if ctx.number is None else ctx.number)
            weighted = sparse * (grad @ v.mT)  # each entry times its gradient
            grad_logits = scale * (weighted - p * weighted.sum(-1, keepdim=True))
            return grad_logits @ k, grad_logits.mT @ q, sparse.mT @ grad, None, None

    @staticmethod
    def jvp(ctx: Any, *moved: Tensor | None) -> tuple[Tensor, None]:
        *qkv, limits, hidden = ctx.saved_tensors
        threshold = limits if ctx.number is None else ctx.number

        def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return above(softmax_rows(q, k, hidden), threshold) @ v

        return tangent(out, tuple(qkv), moved[:3]), None


def auxiliary_branch(
    q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, padding: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """attention.auxiliary_branch, Eq. (10)."""
    if torch.compiler.is_compiling() or dropout:  # checkpoint repeats the same random numbers
        inputs = q, k, v, threshold, padding, dropout
        return checkpoint(attention.auxiliary_branch, *inputs, use_reentrant=False)
    B, H, N = v.shape[:3]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))                                # (B H, N, D|E)
    limits = threshold.to(q.dtype).expand(B).repeat_interleave(H)                 # (B H,)
    limits = limits[:, None, None].expand(-1, N, 1)                               # (B H, N, 1)
    hidden = None if padding is None else padding.repeat_interleave(H, dim=0)[:, None]  # (.., 1, N)
    if hidden is not None:
        limits = limits.masked_fill(hidden.mT, math.inf)  # rows of ignored queries keep nothing
    number, live = None, None
    if q.device.type == "cpu" and hidden is None:  # reading the values would make a GPU wait
        with contextlib.suppress(RuntimeError):  # vmap cannot read values
            empty = certainly_empty(q, k, limits[:, 0, 0])
            if empty.all():
                return None, q.new_zeros(2)
            if empty.any():
                live = (~empty).nonzero()[:, 0]  # heads whose mask may keep an entry
                q, k, v, limits = (x[live] for x in (q, k, v, limits))
        if threshold.ndim == 0:  # comparing with a number is faster
            number = threshold.item()
    entries = BLOCK_BYTES.get(q.device.type, 256 * 2**20) // q.element_size()
    heads, rows = max(1, entries // N**2), max(1, entries // N)  # many heads, or rows of one head
    outs, totals = [], q.new_zeros(2)  # totals: kept entries, their sum
    parts = [repeat(None) if x is None else x.split(heads) for x in (q, k, v, limits, hidden)]
    for qs, ks, vs, ts, hs in zip(*parts):
        for q_rows, limit in zip(qs.split(rows, dim=1), ts.split(rows, dim=1)):
            out, seen = BranchRows.apply(q_rows, ks, vs, limit if number is None else number, hs)
            outs.append(out.flatten(0, 1))
            totals = totals + seen
    out = torch.cat(outs).unflatten(0, (len(q), N))
    if live is not None:
        out = out.new_zeros(B * H, *out.shape[1:]).index_copy(0, live, out)  # other heads: 0
    return out.unflatten(0, (B, H)), totals


# ---- putting them in place -----------------------------------------------------------------------


def enable() -> None:
    """Let every AttentionCore use the forms of this file."""
    AttentionCore.form = staticmethod(castling_attention)
    AttentionCore.branch_form = staticmethod(auxiliary_branch)


def disable() -> None:
    """Let every AttentionCore use the formulas of attention.py, which is the default."""
    AttentionCore.form = staticmethod(attention.castling_attention)
    AttentionCore.branch_form = staticmethod(attention.auxiliary_branch)
