"""What an optimizer's step may take beside gradients and moments, for the tests of the GPU kernels."""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import AdamWCase

#: (parameter, moments, options): each option alone, and all that a pair of dtypes allows.
OPTIONS = [
    (torch.float32, torch.float32, ("anchors",)),
    (torch.float32, torch.float32, ("zero_grads",)),
    (torch.bfloat16, torch.bfloat16, ("remainders",)),
    (torch.bfloat16, torch.float32, ("remainders",)),
    (torch.bfloat16, torch.bfloat16, ("remainders", "anchors", "zero_grads")),
    (torch.bfloat16, torch.float32, ("remainders", "anchors", "zero_grads")),
    (torch.float16, torch.float16, ("anchors", "zero_grads")),
    (torch.float16, torch.float32, ("anchors", "zero_grads")),
]


def random_options(case: AdamWCase, names: tuple[str, ...]) -> dict[str, Any]:
    """Keyword arguments of the op for the options called `names`."""
    generator = torch.Generator().manual_seed(len(case.params))
    made: dict[str, Any] = {"zero_grads": "zero_grads" in names}
    if "anchors" in names:
        made["anchors"] = [
            torch.randn(p.shape, generator=generator).to(p.dtype).to(p.device) for p in case.params
        ]
    if "remainders" in names:
        made["remainders"] = [
            torch.randint(-(2**15), 2**15, p.shape, generator=generator, dtype=torch.int16).to(p.device)
            for p in case.params
        ]
    return made


def on_cpu(options: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU."""
    return {
        name: [t.cpu().clone() for t in value] if isinstance(value, list) else value
        for name, value in options.items()
    }


def assert_same_options(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal bits; the optimizer writes the lower bits, and leaves the anchors alone."""
    for name in ("anchors", "remainders"):
        for i, (a, b) in enumerate(zip(actual.get(name, []), expected.get(name, []), strict=True)):
            assert torch.equal(a.cpu(), b), f"{name}[{i}] of {a.numel()} elements differs"
