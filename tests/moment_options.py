"""What an optimizer's step may take beside gradients and moments, for the tests of the GPU kernels."""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import AdamWCase
from torch import Tensor

from superfine_kernels._storage import scales_shape

#: (parameter, moments, options): each option alone, and all that a pair of dtypes allows.
OPTIONS = [
    (torch.float32, torch.float32, ("anchors",)),
    (torch.float32, torch.float32, ("zero_grads",)),
    (torch.float32, torch.bfloat16, ("anchors", "zero_grads")),
    (torch.float32, torch.uint8, ()),
    (torch.float32, torch.uint8, ("anchors", "zero_grads")),
    (torch.bfloat16, torch.bfloat16, ("remainders",)),
    (torch.bfloat16, torch.float32, ("remainders",)),
    (torch.bfloat16, torch.bfloat16, ("kahan",)),
    (torch.bfloat16, torch.bfloat16, ("stochastic_rounding",)),
    (torch.bfloat16, torch.uint8, ()),
    (torch.bfloat16, torch.bfloat16, ("remainders", "anchors", "zero_grads")),
    (torch.bfloat16, torch.float32, ("remainders", "anchors", "zero_grads")),
    (torch.bfloat16, torch.float32, ("kahan", "anchors", "zero_grads")),
    (torch.bfloat16, torch.float32, ("stochastic_rounding", "anchors", "zero_grads")),
    (torch.bfloat16, torch.uint8, ("remainders", "anchors", "zero_grads")),
    (torch.bfloat16, torch.uint8, ("kahan", "anchors", "zero_grads")),
    (torch.bfloat16, torch.uint8, ("stochastic_rounding", "anchors", "zero_grads")),
    (torch.float16, torch.float16, ("kahan",)),
    (torch.float16, torch.float16, ("anchors", "zero_grads")),
    (torch.float16, torch.float32, ("kahan", "anchors", "zero_grads")),
    (torch.float16, torch.uint8, ("kahan", "anchors", "zero_grads")),
]


def with_amsgrad(options: list[tuple]) -> list[tuple]:
    """Each of `options` without AMSGrad and, where moments have more than 8 bits, with it."""
    return [(*one, amsgrad) for one in options for amsgrad in (False, True)[: 1 + (one[1] != torch.uint8)]]


def random_options(case: AdamWCase, names: tuple[str, ...]) -> dict[str, Any]:
    """Keyword arguments of the op for the options called `names`, and the scales of 8-bit moments."""
    generator = torch.Generator().manual_seed(len(case.params))

    def numbers(p: Tensor, factor: float = 1.0) -> Tensor:
        return (factor * torch.randn(p.shape, generator=generator)).to(p.dtype).to(p.device)

    made: dict[str, Any] = {"zero_grads": "zero_grads" in names, "seed": 7}
    if "stochastic_rounding" in names:
        made["stochastic_rounding"] = True
    if "anchors" in names:
        made["anchors"] = [numbers(p) for p in case.params]
    if "remainders" in names:
        made["remainders"] = [
            torch.randint(-(2**15), 2**15, p.shape, generator=generator, dtype=torch.int16).to(p.device)
            for p in case.params
        ]
    if "kahan" in names:
        made["remainders"] = [numbers(p, 2**-9) for p in case.params]
    if case.exp_avgs and case.exp_avgs[0].dtype == torch.uint8:
        made["scales"] = [
            torch.rand(scales_shape(p.numel()), generator=generator).to(p.device) for p in case.params
        ]
    return made


def on_cpu(options: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU."""
    return {
        name: [t.cpu().clone() for t in value] if isinstance(value, list) else value
        for name, value in options.items()
    }


def assert_same_options(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal bits; the optimizer writes remainders and scales, and leaves the anchors alone."""
    for name in ("anchors", "remainders", "scales"):
        for i, (a, b) in enumerate(zip(actual.get(name, []), expected.get(name, []), strict=True)):
            assert torch.equal(a.cpu(), b), f"{name}[{i}] of {a.numel()} elements differs"
