"""AdamW cases: one optimizer step on parameters, gradients and moments that are all there already.

Every provider steps the *same* tensors, so pages, alignment and sizes are equal for all. The check puts
known values in and compares with the formula in fp64, at whatever step the provider has reached.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .harness import Case, MovesMemory, Provider, UnavailableError

HIDDEN, INTERMEDIATE, LAYERS = 768, 3072, 12
BERT_LAYER = (
    *[(HIDDEN, HIDDEN), (HIDDEN,)] * 4,  # query, key, value, output
    *[(INTERMEDIATE, HIDDEN), (INTERMEDIATE,), (HIDDEN, INTERMEDIATE), (HIDDEN,)],
    *[(HIDDEN,)] * 4,  # two LayerNorms
)
BERT_ENCODER = BERT_LAYER * LAYERS  # 85 million parameters in 192 tensors
SMALL_TENSORS = ((HIDDEN,),) * 300  # the time per tensor, not the bytes, decides

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.01
# Of the value and the tensor's mean magnitude: a few roundings of fp32, or of bf16 after every operation.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@dataclass
class Inputs:
    """Parameters with gradients, their moments, and pools of values that the check puts in."""

    params: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    pools: dict[str, torch.Tensor]

    def pooled(self, name: str, index: int) -> torch.Tensor:
        """Values for tensor ``index``: windows of one random pool, shifted so that tensors differ."""
        param = self.params[index]
        return self.pools[name][64 * index : 64 * index + param.numel()].view(param.shape)


def _inputs(device: torch.device, *, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    pool_size = max(torch.Size(shape).numel() for shape in shapes) + 64 * len(shapes)

    def pool(scale: float) -> torch.Tensor:
        return (scale * torch.randn(pool_size, generator=generator)).to(device, dtype)

    pools = {"param": pool(0.02), "grad": pool(0.01), "exp_avg": pool(0.01)}
    pools["exp_avg_sq"] = pool(0.01).square_()
    params = [torch.empty(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    exp_avgs, exp_avg_sqs = ([torch.empty_like(p, requires_grad=False) for p in params] for _ in range(2))
    inputs = Inputs(params, exp_avgs, exp_avg_sqs, pools)
    for index, param in enumerate(params):
        param.grad = inputs.pooled("grad", index).clone()
    _fill(inputs)
    return inputs


@torch.no_grad()
def _fill(inputs: Inputs) -> None:
    for index, param in enumerate(inputs.params):
        param.copy_(inputs.pooled("param", index))
        inputs.exp_avgs[index].copy_(inputs.pooled("exp_avg", index))
        inputs.exp_avg_sqs[index].copy_(inputs.pooled("exp_avg_sq", index))


def _build(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], inputs: Inputs) -> Callable[[], int]:
    """A call that makes one step and returns its number."""
    optimizer = make(inputs.params)
    group = optimizer.param_groups[0]
    on_device = group.get("fused") or group.get("capturable")
    for param, exp_avg, exp_avg_sq in zip(inputs.params, inputs.exp_avgs, inputs.exp_avg_sqs, strict=True):
        step = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
        optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    steps = 0

    def call() -> int:
        nonlocal steps
        optimizer.step()
        steps += 1
        return steps

    return call


@torch.no_grad()
def _check(inputs: Inputs, call: Callable[[], int]) -> float:
    """Largest error of parameters and moments, relative to the tolerance, against the formula in fp64."""
    _fill(inputs)
    step = call()
    worst = 0.0
    for index, param in enumerate(inputs.params):
        p, g, m, v = (inputs.pooled(name, index).double() for name in inputs.pools)
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        denominator = (v.sqrt() / (1 - BETA2**step) ** 0.5).add_(EPS)
        p.mul_(1 - LR * WEIGHT_DECAY).addcdiv_(m, denominator, value=-LR / (1 - BETA1**step))
        for actual, expected in ((param, p), (inputs.exp_avgs[index], m), (inputs.exp_avg_sqs[index], v)):
            floor = expected.abs().mean()  # a difference near zero keeps the error of its terms
            tolerance = TOLERANCE[param.dtype] * (expected.abs() + floor)
            worst = max(worst, ((actual.double() - expected).abs() / tolerance).max().item())
    return worst


def _superfine(inputs: Inputs) -> Callable[[], int]:
    try:
        optim = importlib.import_module("superfine.optim")
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    return _build(lambda params: optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY), inputs)


def _torch(inputs: Inputs, **options: Any) -> Callable[[], int]:
    def make(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **options)

    return _build(make, inputs)


PROVIDERS = (
    Provider("torch fused", partial(_torch, fused=True)),
    Provider("torch foreach", partial(_torch, foreach=True)),
    Provider("torch single-tensor", partial(_torch, foreach=False)),
    Provider("superfine", _superfine),
)


def _case(name: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Case:
    numel = sum(torch.Size(shape).numel() for shape in shapes)

    def cost() -> MovesMemory:
        return importlib.import_module("superfine_kernels.adamw").cost(numel, dtype)

    return Case(
        op="adamw",
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        work="one step; gradients there already, no clipping, no zero_grad",
        cost=cost,
        traffic="4r3w",
        memory=6 * numel * dtype.itemsize,  # parameters, gradients, moments; temporaries of foreach
        inputs=partial(_inputs, shapes=shapes, dtype=dtype),
        before=lambda inputs: None,  # a step works as well on what the last one left
        check=_check,
        providers=PROVIDERS,
    )


def cases() -> list[Case]:
    """Return the cases: an encoder the size of BERT-base, in two precisions, and many small tensors."""
    return [
        _case("bert-base encoder, 85M", BERT_ENCODER, torch.float32),
        _case("bert-base encoder, 85M", BERT_ENCODER, torch.bfloat16),
        _case("300 tensors of 768", SMALL_TENSORS, torch.float32),
    ]
