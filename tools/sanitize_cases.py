"""Calls every GPU op on small inputs: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python3 tools/sanitize_cases.py

Sizes lie around a vector, a warp and a block, with tails; addresses are not aligned to a vector where the
op allows it. Results are compared with the CPU's loosely: the tests check them strictly.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import superfine_kernels
from superfine_kernels import _backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
DEVICE = torch.device("cuda")


def adamw_cases(backend: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """Multi-tensor steps over sizes with tails, with and without AMSGrad, and an unaligned parameter."""
    for dtype, amsgrad in itertools.product(DTYPES, (False, True)):
        yield f"adamw_ {dtype} amsgrad={amsgrad}", lambda d=dtype, a=amsgrad: _adamw(backend, d, a)


def _adamw(backend: str, dtype: torch.dtype, amsgrad: bool) -> float:
    generator = torch.Generator().manual_seed(0)

    def values(n: int) -> torch.Tensor:
        return torch.randn(n + 1, generator=generator).to(dtype)[
            1:
        ]  # starts one element off an aligned address

    sizes = (1, 3, 8, 127, 1025, 4096, 70001)
    on_cpu = [[values(n) for n in sizes] for _ in range(2)] + [
        [values(n).abs() for n in sizes] for _ in range(3)
    ]
    on_gpu = [[_at_odd_address(tensor) for tensor in tensors] for tensors in on_cpu]
    for lists, chosen in ((on_cpu, "reference"), (on_gpu, backend)):
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = lists
        steps = [torch.zeros((), device=params[0].device) for _ in sizes]
        superfine_kernels.adamw_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs if amsgrad else (),
            steps,
            lr=1e-2,
            backend=chosen,
        )
    return max(_difference(gpu, cpu) for gpu, cpu in zip(on_gpu[0], on_cpu[0], strict=True))


def _at_odd_address(tensor: torch.Tensor) -> torch.Tensor:
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)
    room[1:].copy_(tensor)
    return room[1:]


def cross_entropy_cases(backend: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """Vocabularies around a warp, a block and beyond, each option, and ignored rows."""
    shapes = ((1, 1), (5, 3), (7, 33), (3, 1025), (2, 30522), (2, 128256))
    for (n, v), dtype in itertools.product(shapes, DTYPES):
        yield f"cross_entropy {n}x{v} {dtype}", lambda n=n, v=v, d=dtype: _cross_entropy(backend, n, v, d)
    options: tuple[dict[str, object], ...] = (
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"weight": True},
        {"inplace": True},
        {"weight": True, "label_smoothing": 0.1},
        {"z_loss": 0.1, "softcap": 3.0, "scale": 0.5, "label_smoothing": 0.1},
        {"return_stats": True},
        {"targets": "few", "reduction": "none"},
        {"targets": "few", "softcap": 3.0, "inplace": True},
        {"targets": "all", "weight": True},
        {"behind_a_layer": True},
        {"behind_a_layer": True, "targets": "few", "label_smoothing": 0.1},
        {"behind_a_layer": True, "targets": "all", "softcap": 3.0},
    )
    for option in options:
        yield (
            f"cross_entropy 6x1001 {option}",
            lambda o=option: _cross_entropy(backend, 6, 1001, torch.float32, **o),
        )


def _cross_entropy(
    backend: str,
    n: int,
    v: int,
    dtype: torch.dtype,
    *,
    weight: bool = False,
    inplace: bool = False,
    targets: str = "labels",
    behind_a_layer: bool = False,
    **options: object,
) -> float:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, v, generator=generator).to(dtype)
    target = torch.randint(v, (n,), generator=generator)
    if n > 2:
        target[1] = -100
    class_weight = torch.rand(v, generator=generator) + 0.5 if weight else None
    probabilities = None
    if targets == "few":
        target, probabilities = (
            torch.randint(v, (n, 3), generator=generator),
            torch.rand(n, 3, generator=generator),
        )
        target[1] = target[2, 0] = -100
    elif targets == "all":
        target = torch.rand(n, v, generator=generator)
    layer = torch.randn(3 * v, v, generator=generator).to(dtype) / v if behind_a_layer else None
    if behind_a_layer and targets == "all":
        target = torch.rand(n, 3 * v, generator=generator)
    outcomes = []
    for device, chosen in ((torch.device("cpu"), "reference"), (DEVICE, backend)):
        leaf = logits.to(device).requires_grad_()
        more: dict[str, Any] = {"backend": chosen, **options}
        if probabilities is not None:
            more["probabilities"] = probabilities.to(device)
        if layer is not None:
            head = layer.to(device)
            loss = superfine_kernels.linear_cross_entropy(
                leaf, head, target.to(device), tile_bytes=n * 8, **more
            )
        else:
            loss = superfine_kernels.cross_entropy(
                leaf * 1,  # in place needs the output of an op
                target.to(device),
                weight=None if class_weight is None else class_weight.to(device),
                inplace=inplace and chosen == backend,
                **more,
            )
        if isinstance(loss, tuple):
            loss = loss[0] + loss[1].logprob.sum() + loss[1].entropy.sum()
        loss.float().sum().backward()
        outcomes.append((loss.detach(), leaf.grad))
    (expected_loss, expected_grad), (loss, grad) = outcomes
    return max(_difference(loss, expected_loss), _difference(grad, expected_grad))


def elementwise_loss_cases(backend: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """Sizes around a warp and a block, at odd addresses, and weights of classes and rows."""
    for (n, c), dtype in itertools.product(((1, 1), (3, 11), (7, 1171), (5, 5000)), DTYPES):
        yield f"elementwise losses {n}x{c} {dtype}", lambda n=n, c=c, d=dtype: _elementwise(backend, n, c, d)


def _elementwise(backend: str, n: int, c: int, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.rand(n * c, generator=generator).to(dtype) for _ in range(2))
    classes, rows = torch.rand(c, generator=generator), torch.rand(n, 1, generator=generator)
    worst = 0.0
    for reduction in ("mean", "none"):
        outcomes = []
        for device, chosen in ((torch.device("cpu"), "reference"), (DEVICE, backend)):
            leaf = _at_odd_address(x).to(device).requires_grad_()
            output, target = leaf.view(n, c) * 1, t.to(device).view(n, c)
            weights = {"weight": rows.to(device), "pos_weight": classes.to(device)}
            loss = superfine_kernels.bce_with_logits(
                output, target, reduction=reduction, **weights, backend=chosen
            )
            loss = loss + superfine_kernels.mse(output, target, reduction, backend=chosen)
            loss.sum().backward()
            outcomes.append((loss.detach(), leaf.grad))
        (expected_loss, expected_grad), (loss, grad) = outcomes
        worst = max(worst, _difference(loss, expected_loss), _difference(grad, expected_grad))
    return worst


def _difference(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Largest difference relative to the largest value, in units of the dtype's tolerance."""
    if actual is None or expected is None:
        return float("nan")
    expected = expected.double()
    scale = expected.abs().max().clamp_min(1e-6)
    return ((actual.cpu().double() - expected).abs().max() / scale / TOLERANCE[actual.dtype]).item()


CASES = (adamw_cases, cross_entropy_cases, elementwise_loss_cases)


def main() -> int:
    """Run all cases on every usable GPU backend; return 1 when a result is wrong or a case raises."""
    if not torch.cuda.is_available():
        print(
            "sanitize_cases: torch finds no CUDA device; expected a machine with an NVIDIA GPU",
            file=sys.stderr,
        )
        return 1
    failed = 0
    for backend in ("cuda", "triton"):
        reason = _backends.why_unavailable(backend)
        if reason is not None:
            print(f"{backend}: left out: {reason}")
            continue
        for name, case in itertools.chain(*(cases(backend) for cases in CASES)):
            try:
                error = case()
                torch.cuda.synchronize()
                outcome = "ok" if error <= 1 else f"WRONG: {error:.3g} times the tolerance"
            except Exception as failure:  # the next case still runs
                outcome = f"FAILED: {type(failure).__name__}: {failure}"
            failed += outcome != "ok"
            print(f"{backend}: {name}: {outcome}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
