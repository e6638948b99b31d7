"""The Kullback-Leibler divergence of a student from the largest probabilities of its teacher.

For one row with student logits x, temperature T and the teacher's probabilities q_k of K classes c_k, at T as well:

    loss = T^2 sum_k q_k (log q_k - log p_{c_k}),   p = softmax(x / T)

which is T^2 (cross-entropy of p from q, less the entropy of q): the gradient is cross_entropy's, from one reading of
the logits, or linear_cross_entropy's, which never stores them. T^2 keeps gradients comparable between temperatures
(Hinton et al. 2015).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from superfine_kernels._library import reject
from superfine_kernels._losses import REDUCTIONS, reduced
from superfine_kernels.cross_entropy import cross_entropy
from superfine_kernels.linear_cross_entropy import linear_cross_entropy


def topk_kl_div(
    input: Tensor,
    target: Tensor,
    probabilities: Tensor,
    *,
    temperature: float = 1.0,
    renormalize: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    softcap: float | None = None,
    inplace: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Divergence of softmax(input / temperature) from a teacher's K largest probabilities, times temperature squared.

    Args:
        input: the student's logits (C), (N, C) or (N, C, d1, ...), as in `cross_entropy`.
        target: the teacher's K classes for each row, (K), (N, K) or (N, d1, ..., K); int64 or int32. `ignore_index`
            marks places that do not count, and a row of nothing else has no loss.
        probabilities: of these classes, of the shape of `target`; constant. At the same temperature.
        temperature: above 0.
        renormalize: divide each row's probabilities by their sum. Without, what the K classes leave of the
            teacher's probability counts for nothing.
        reduction: "mean", over the rows that count (torch's "batchmean"), "sum" or "none".
        num_items: what "mean" divides by instead, as in `cross_entropy`.
        softcap, inplace, check, backend: as in `cross_entropy`.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or for "none" one number a row. As the difference of
        a cross-entropy and an entropy it is exact to some 1e-7 of these: a divergence near 0 may come out below 0.

    Raises:
        ValueError, TypeError: as `cross_entropy`.
    """
    wanted, constant = _teacher("topk_kl_div", target, probabilities, temperature, renormalize, ignore_index)
    settings: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "num_items": num_items}
    options: dict[str, Any] = {"softcap": softcap, "inplace": inplace, "check": check, "backend": backend}
    loss = cross_entropy(input, target, probabilities=wanted, scale=1 / temperature, **settings, **options)
    return loss + _reduce(constant, target, **settings).to(loss.dtype)


def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    probabilities: Tensor,
    *,
    temperature: float = 1.0,
    renormalize: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`topk_kl_div` of the logits `input @ linear_weight.T + linear_bias`, which are never stored.

    Args:
        input: (features) or (..., features).
        linear_weight: (classes, features).
        target, probabilities: (..., K), and what follows, as in `topk_kl_div`.
        options: linear_bias, lora, rows, softcap, accumulate_into, tile_bytes, skip_mass, check, backend, as in
            `linear_cross_entropy`.
    """
    name = "linear_topk_kl_div"
    unknown = sorted(options.keys() - _LINEAR_OPTIONS)
    if unknown:
        expected = ", ".join(sorted(_LINEAR_OPTIONS))
        raise TypeError(f"{name}: argument is {unknown[0]!r}; expected one of {expected}")
    wanted, constant = _teacher(name, target, probabilities, temperature, renormalize, ignore_index)
    settings: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "num_items": num_items}
    more = {"probabilities": wanted, "scale": 1 / temperature, **settings, **options}
    loss = linear_cross_entropy(input, linear_weight, target, **more)
    return loss + _reduce(constant, target, **settings).to(loss.dtype)


def _teacher(
    op: str, target: Tensor, probabilities: Tensor, temperature: float, renormalize: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """T^2 q, and of every row T^2 sum_k q_k log q_k."""
    for name, tensor in (("target", target), ("probabilities", probabilities)):
        if not isinstance(tensor, Tensor):
            reject(op, name, tensor, "a torch.Tensor", TypeError)
    if not probabilities.is_floating_point() or probabilities.shape != target.shape or target.dim() < 1:
        reject(op, "probabilities", probabilities, f"as many as classes: float {tuple(target.shape)}")
    if probabilities.requires_grad:
        reject(op, "probabilities", "a tensor that requires grad", "a constant teacher")
    if not 0 < temperature < math.inf:
        reject(op, "temperature", temperature, "a finite number above 0")
    q = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    q = torch.where(target.long() != ignore_index, q, 0.0)
    if renormalize:
        total = q.sum(-1, keepdim=True)
        q = torch.where(total > 0, q / total, 0.0)
    return temperature**2 * q, temperature**2 * torch.xlogy(q, q).sum(-1)


def _reduce(
    constant: Tensor, target: Tensor, ignore_index: int, reduction: str, num_items: float | Tensor | None
) -> Tensor:
    rows = target.reshape(-1, target.shape[-1])
    return reduced(constant, REDUCTIONS[reduction], rows, constant, None, ignore_index, num_items)


_LINEAR_OPTIONS = {
    "linear_bias", "lora", "rows", "softcap", "accumulate_into", "tile_bytes", "skip_mass", "check", "backend",
}  # fmt: skip
