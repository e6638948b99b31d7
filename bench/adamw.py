"""AdamW cases: one optimizer step on parameters, gradients and moments that are all there already.

Every provider steps the *same* tensors, so pages, alignment and sizes are equal for all. The check puts
known values in and compares with the formula in fp64, at whatever step the provider has reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from superfine.optim import AdamW

from superfine_kernels.adamw import cost

from .harness import Case, Provider, UnavailableError
from .peers import ADAMW, ADAMW_8BIT, Peer, compiled

HIDDEN, INTERMEDIATE, LAYERS = 768, 3072, 12
BERT_LAYER = (
    *[(HIDDEN, HIDDEN), (HIDDEN,)] * 4,  # query, key, value, output
    *[(INTERMEDIATE, HIDDEN), (INTERMEDIATE,), (HIDDEN, INTERMEDIATE), (HIDDEN,)],
    *[(HIDDEN,)] * 4,  # two LayerNorms
)
BERT_ENCODER = BERT_LAYER * LAYERS  # 85 million parameters in 192 tensors
SMALL_TENSORS = ((HIDDEN,),) * 300  # the time per tensor, not the bytes, decides

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.01
HYPERPARAMETERS: dict[str, Any] = {  # in full: libraries differ in their defaults
    "lr": LR,
    "betas": (BETA1, BETA2),
    "eps": EPS,
    "weight_decay": WEIGHT_DECAY,
}
# Of the value and the tensor's mean magnitude: a few roundings of fp32, or of bf16 after every operation.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
# Of the update: 0.999 rounded to fp32, as torch.compile has it, moves 1 - beta2 ** step by 1.3e-5.
UPDATE_TOLERANCE = 2e-5
CHECKED_AT_ONCE = 2**15  # elements
CHECKED_SHARE = 16  # one in so many blocks of a long tensor: fp64 of all would take longer than all the steps
TOLERANCE_8BIT = 0.1  # of the mean update: moments in 8 bits carry a few per cent


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


def _counted(step: Callable[[], Any], before: int = 0) -> Callable[[], int]:
    """A call that makes one step and returns its number."""
    steps = before

    def call() -> int:
        nonlocal steps
        step()
        steps += 1
        return steps

    return call


def _optimizer(
    inputs: Inputs, make: Callable[..., torch.optim.Optimizer], **options: Any
) -> torch.optim.Optimizer:
    """An optimizer over the case's parameters and moments."""
    optimizer = make(inputs.params, **HYPERPARAMETERS, **options)
    group = optimizer.param_groups[0]
    on_device = group.get("fused") or group.get("capturable")
    for param, exp_avg, exp_avg_sq in zip(inputs.params, inputs.exp_avgs, inputs.exp_avg_sqs, strict=True):
        step = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
        optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return optimizer


@torch.no_grad()
def _check(inputs: Inputs, call: Callable[[], int]) -> float:
    """Largest error of parameters and moments, relative to the tolerance, against the formula in fp64."""
    _fill(inputs)
    step = call()
    worst = 0.0
    for index, param in enumerate(inputs.params):
        actual = (param, inputs.exp_avgs[index], inputs.exp_avg_sqs[index])
        values = [inputs.pooled(name, index) for name in inputs.pools]
        # In blocks: their fp64 temporaries stay in the cache, and need no fresh memory. Of long tensors both
        # ends and a share of the rest, another one at the next check.
        blocks = [tensor.flatten().split(CHECKED_AT_ONCE) for tensor in (*actual, *values)]
        count = len(blocks[0])
        for i in sorted({0, count - 1, *range((step + index) % CHECKED_SHARE, count, CHECKED_SHARE)}):
            p, m, v, *before = (of_tensor[i] for of_tensor in blocks)
            worst = max(worst, _block_error((p, m, v), before, step))
    return worst


def _block_error(actual: tuple[torch.Tensor, ...], before: list[torch.Tensor], step: int) -> float:
    p, g, m, v = (tensor.double() for tensor in before)
    m.lerp_(g, 1 - BETA1)
    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    denominator = v.sqrt().div_((1 - BETA2**step) ** 0.5).add_(EPS)
    update = (m / denominator).mul_(LR / (1 - BETA1**step))
    p.mul_(1 - LR * WEIGHT_DECAY).sub_(update)
    errors = []
    for found, expected in zip(actual, (p, m, v), strict=True):
        tolerance = expected.abs()
        floor = tolerance.mean()  # a difference near zero keeps the error of its terms
        tolerance.add_(floor).mul_(TOLERANCE[found.dtype])
        if expected is p:
            tolerance.add_(update.abs_(), alpha=UPDATE_TOLERANCE)
        errors.append((found.double().sub_(expected).abs_().div_(tolerance)).max())
    return torch.stack(errors).max().item()


@torch.no_grad()
def _check_8bit(inputs: Inputs, call: Callable[[], int]) -> float:
    """Mean error of the updates, relative to the tolerance.

    While the gradient stays the same, both moments are exact after bias correction at every step: the update is
    ``lr * g / (|g| + eps)``. What remains is the rounding to 8 bits.
    """
    _fill(inputs)
    call()
    worst = 0.0
    for index, param in enumerate(inputs.params):
        p, g = (inputs.pooled(name, index).double() for name in ("param", "grad"))
        expected = p.mul(1 - LR * WEIGHT_DECAY).sub_(LR * g / (g.abs() + EPS))
        worst = max(worst, ((param.double() - expected).abs().mean() / (LR * TOLERANCE_8BIT)).item())
    return worst


def _superfine(inputs: Inputs) -> Callable[[], int]:
    return _counted(_optimizer(inputs, AdamW).step)


def _torch(inputs: Inputs, **options: Any) -> Callable[[], int]:
    return _counted(_optimizer(inputs, torch.optim.AdamW, **options).step)


def _torch_compiled(inputs: Inputs) -> Callable[[], int]:
    torch.compiler.reset()
    # On a GPU the step's number must be there too, or the graph would wait for the host.
    optimizer = _optimizer(inputs, torch.optim.AdamW, capturable=inputs.params[0].is_cuda)
    return compiled(_counted(torch.compile(lambda: optimizer.step())))


def _peer(inputs: Inputs, *, peer: Peer) -> Callable[[], int]:
    make = peer.load(inputs.params[0].device)
    dtype = inputs.params[0].dtype
    if peer.fp32_moments and dtype != torch.float32:
        raise UnavailableError(
            f"keeps float32 moments; this case has {str(dtype).removeprefix('torch.')} ones"
        )
    optimizer = make(inputs.params, **HYPERPARAMETERS)
    for param, *moments in zip(inputs.params, inputs.exp_avgs, inputs.exp_avg_sqs, strict=True):
        state = dict(zip(peer.moments, moments, strict=True))
        optimizer.state[param] = {"step": 0, **state, **peer.state}
    if peer.start is None:
        return _counted(optimizer.step)
    return _counted(optimizer.step, peer.start(optimizer))


def _peer_8bit(inputs: Inputs, *, peer: Peer) -> Callable[[], int]:
    optimizer = peer.load(inputs.params[0].device)(inputs.params, **HYPERPARAMETERS)
    return _counted(optimizer.step)


def _providers(peers: tuple[Peer, ...], build: Callable[..., Callable[[], int]]) -> tuple[Provider, ...]:
    return tuple(Provider(peer.name, partial(build, peer=peer), peer.in_quick) for peer in peers)


PROVIDERS = (
    Provider("torch fused", partial(_torch, fused=True)),
    Provider("torch foreach", partial(_torch, foreach=True), in_quick=False),  # fused is the one to beat
    Provider("torch single-tensor", partial(_torch, foreach=False), in_quick=False),
    Provider("torch.compile", _torch_compiled, in_quick=False),  # compiling takes longer than measuring
    Provider("superfine", _superfine),
    *_providers(ADAMW, _peer),
)
PROVIDERS_8BIT = _providers(ADAMW_8BIT, _peer_8bit)


def make_case(name: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Case:
    numel = sum(torch.Size(shape).numel() for shape in shapes)

    return Case(
        op="adamw",
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        work="one step; gradients there already, no clipping, no zero_grad",
        cost=partial(cost, numel, dtype),
        traffic="4r3w",
        memory=6 * numel * dtype.itemsize,  # parameters, gradients, moments; temporaries of foreach
        inputs=partial(_inputs, shapes=shapes, dtype=dtype),
        before=lambda inputs: None,  # a step works as well on what the last one left
        check=_check,
        providers=PROVIDERS,
        resident=numel < 2**20,  # many small tensors: the cost of a call
    )


def _case_8bit(name: str, shapes: tuple[tuple[int, ...], ...]) -> Case:
    """The same step with moments in 8 bits: less memory and less traffic, so a case of its own."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)

    return replace(
        make_case(f"{name}, 8-bit moments", shapes, torch.float32),
        work="one step with moments in 8 bits, each library's own rounding; no clipping, no zero_grad",
        cost=partial(cost, numel, torch.float32, torch.uint8),
        check=_check_8bit,
        providers=PROVIDERS_8BIT,
        in_quick=False,
    )


def cases() -> list[Case]:
    """Return the cases: an encoder the size of BERT-base, in three precisions, and many small tensors."""
    from . import adamw_in_pass  # which builds on this file

    return [
        make_case("bert-base encoder, 85M", BERT_ENCODER, torch.float32),
        make_case("bert-base encoder, 85M", BERT_ENCODER, torch.bfloat16),
        _case_8bit("bert-base encoder, 85M", BERT_ENCODER),
        make_case("300 tensors of 768", SMALL_TENSORS, torch.float32),
        *adamw_in_pass.cases(),
    ]
