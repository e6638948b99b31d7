"""One process of a group: every case against the same loss of the whole vocabulary. Run by test_vocab_parallel.py."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from superfine_kernels import (
    cross_entropy,
    linear_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

ROWS, FEATURES, IGNORED = 13, 8, -100
OPTIONS = (
    {},
    {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.1},
    {"reduction": "sum", "softcap": 3.0, "scale": 0.5},
    {"num_items": 7},
)


def shares(classes: int, world: int) -> list[int]:
    """Uneven: the first process has the fewest."""
    sizes = [1 + r * (classes - world) // sum(range(world)) for r in range(world)]
    sizes[-1] += classes - sum(sizes)
    return sizes


def targets(kind: str, classes: int) -> tuple[Tensor, Tensor | None]:
    if kind == "dense":
        return torch.rand(ROWS, classes).softmax(1), None
    target = torch.randint(0, classes, (ROWS,) if kind == "labels" else (ROWS, 3))
    target[::4] = IGNORED
    return target, None if kind == "labels" else torch.rand(ROWS, 3)


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return list(torch.autograd.grad(loss, tensors, upstream))


def compare(case: object, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {text}")


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    cases = itertools.product(
        (torch.float64, torch.bfloat16), ("labels", "few", "dense"), OPTIONS, (False, True)
    )
    for number, (dtype, kind, options, frozen) in enumerate(cases):
        torch.manual_seed(number)
        classes = 2500 + number
        sizes = shares(classes, world)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x = torch.randn(ROWS, FEATURES, dtype=torch.float64).to(dtype).requires_grad_()
        w = torch.randn(classes, FEATURES, dtype=torch.float64).to(dtype).requires_grad_(not frozen)
        b = torch.randn(classes, dtype=torch.float64).to(dtype).requires_grad_()
        target, probabilities = targets(kind, classes)
        weight = torch.rand(classes) + 0.1
        options = {**options, "weight": weight, "probabilities": probabilities}
        tolerance = 1e-12 if dtype == torch.float64 else 1e-2

        part_w = w.detach()[mine].requires_grad_(not frozen)
        part_b = b.detach()[mine].requires_grad_()
        trained, part_trained = ([x, b], [x, part_b]) if frozen else ([x, w, b], [x, part_w, part_b])
        head = {"linear_bias": b, "tile_bytes": ROWS * 8}
        expected = linear_cross_entropy(x, w, target, **head, **options)
        head["linear_bias"] = part_b
        found = vocab_parallel_linear_cross_entropy(x, part_w, target, **head, **options)
        wanted = gradients(expected, trained)
        wanted[1:] = [g[mine] for g in wanted[1:]]
        compare((number, "linear"), [found, *gradients(found, part_trained)], [expected, *wanted], tolerance)

        logits = torch.randn(ROWS, classes, dtype=torch.float64).to(dtype).requires_grad_()
        part = logits.detach()[:, mine].requires_grad_()
        expected = cross_entropy(logits, target, **options)
        found = vocab_parallel_cross_entropy(part, target, **options)
        wanted = [g[:, mine] for g in gradients(expected, [logits])]
        compare((number, "logits"), [found, *gradients(found, [part])], [expected, *wanted], tolerance)
        if kind == "labels":
            target[1] = logits[1].argmax()
            expected = cross_entropy(logits, target, return_stats=True, **options)
            found = vocab_parallel_cross_entropy(part, target, return_stats=True, **options)
            compare((number, "statistics"), [*found[1]], [*expected[1]], tolerance)
            assert found[1].correct[1]

    # Every process refuses what is wrong, before any of them waits for the others.
    for bad, message in ((classes, rf"target\[1\] is {classes}"), (-3, r"target\[1\] is -3")):
        target = torch.tensor([0, bad])
        expected = rf"{message}; expected a class in \[0, {classes}\)"
        with pytest.raises(ValueError, match=f"^vocab_parallel_cross_entropy: {expected}"):
            vocab_parallel_cross_entropy(part[:2], target)
    x = part.detach()[:2].requires_grad_()
    loss = vocab_parallel_cross_entropy(x, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="vocab_parallel_cross_entropy: a second derivative is asked for"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(ValueError, match="target is 'a tensor that requires grad'"):
        vocab_parallel_cross_entropy(part[:2], torch.rand(2, classes, requires_grad=True))
    # A group of some of the processes.
    some = dist.new_group([0, world - 1])
    if rank in (0, world - 1):
        x = torch.arange(6.0).view(2, 3) * (1 + (rank > 0))
        loss = vocab_parallel_cross_entropy(x, torch.tensor([1, 5]), group=some)
        whole = torch.cat([torch.arange(6.0).view(2, 3), 2 * torch.arange(6.0).view(2, 3)], 1)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(whole, torch.tensor([1, 5])))
    dist.destroy_process_group()
    sys.stdout.write(f"rank {rank}: {number + 1} cases\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
