"""Choose which parameters train: ``select`` freezes the rest and returns a ``Plan``.

    plan = superfine.select(model, "last:2", "head")
    print(plan)
    optimizer = plan.optimizer("adamw", lr=2e-5)

``superfine.selectors`` documents the selector language.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from superfine._first_step import watch_first_step
from superfine.selectors import layer_stacks, match

__all__ = ["Plan", "select"]

OPTIMIZERS = ("adamw", "adam", "lamb", "sgd")


def select(model: nn.Module, *selectors: str) -> Plan:
    """Freeze everything but the union of ``selectors`` and return the plan.

    Sets ``requires_grad`` on exactly the selected parameters and drops the gradients of the others. Selecting
    again replaces the selection: make a new optimizer from the new plan, the earlier one no longer fits. Select
    before wrapping the model for data parallelism, which fixes what is synchronised.

    Raises ``TypeError`` or ``ValueError``, with the model untouched, when a selector matches nothing or
    counts layers that are not there; when the selection holds one name of a tied parameter but not the
    others, a view that overlaps another parameter, or a tensor that cannot train (integer, 8-bit,
    uninitialised).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"select: model is {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"select: model is {type(model).__name__}; expected the model before it is wrapped")
    if not selectors:
        raise ValueError("select: no selector given; expected at least one, as 'last:2' or 'head'")
    model = uncompiled(model)
    chosen = set().union(*(match(model, selector) for selector in selectors))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_trainable({name: parameters[name] for name in parameters if name in chosen})
    _check_tied(parameters, chosen)
    _check_overlap(dict(model.named_parameters()), chosen)

    names = []
    for name, parameter in model.named_parameters():
        if name in chosen:
            names.append(name)
        else:
            parameter.grad = None
        if parameter.requires_grad != (name in chosen):
            parameter.requires_grad_(name in chosen)
    return Plan(model, tuple(names), tuple(selectors))


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What trains in a model, made by :func:`select`. ``print(plan)`` shows a table of it.

    ``names``: trained parameters in model order, a tied parameter once. ``selectors``: as they were given.
    """

    model: nn.Module
    names: tuple[str, ...]
    selectors: tuple[str, ...]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train, in model order."""
        parameters = dict(self.model.named_parameters())
        return ((name, parameters[name]) for name in self.names)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train, in model order."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def num_trainable(self) -> int:
        """Number of elements that train."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_total(self) -> int:
        """Number of elements in the model, a tied parameter counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups in model order: ``weight_decay`` for matrices, none for norms and biases."""
        parameters = list(self.parameters())
        groups = [
            {
                "params": [parameter for parameter in parameters if parameter.ndim >= 2],
                "weight_decay": weight_decay,
            },
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def optimizer(
        self,
        name: str = "adamw",
        *,
        lr: float,
        weight_decay: float = 0.01,
        first_step_check: bool = True,
        **kwargs: Any,
    ) -> torch.optim.Optimizer:
        """An optimizer over the selection, which checks its first step.

        ``name``: ``"adamw"``, ``"adam"``, ``"lamb"`` (``superfine.optim``) or ``"sgd"`` (``torch.optim``). The
        decay of adam and sgd is L2 regularisation. Further arguments go to the optimizer. Groups are those of
        :meth:`param_groups`; lamb adapts those with weight decay.

        The first step raises ``ValueError`` when a selected parameter has no gradient, or when a frozen one
        has a gradient or moves. Of a model that ``superfine.prepare`` has changed, every step raises when
        requires_grad is not the plan's. ``first_step_check=False`` leaves both out, for models that use a part of
        their parameters in each step, such as mixtures of experts, and for ``in_backward``.

        Raises ``ValueError`` for an unknown ``name`` and for a plan that a later ``select`` replaced.
        """
        if name not in OPTIMIZERS:
            close = difflib.get_close_matches(str(name).lower(), OPTIMIZERS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"Plan.optimizer: name is {name!r}; expected one of {', '.join(OPTIMIZERS)}{hint}"
            )
        for trained, parameter in self.named_parameters():
            if not parameter.requires_grad:
                raise ValueError(
                    f"Plan.optimizer: {trained!r} is frozen; expected requires_grad as select left it "
                    "(a later select replaces the plan)"
                )
        groups = self.param_groups(weight_decay)
        optimizer: torch.optim.Optimizer
        if name == "sgd":
            optimizer = torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay, **kwargs)
        else:
            from superfine.optim import LAMB, Adam, AdamW

            kind = {"adamw": AdamW, "adam": Adam, "lamb": LAMB}[name]
            optimizer = kind(groups, lr=lr, weight_decay=weight_decay, **kwargs)
        if first_step_check:
            watch_first_step(self.model, self.names, optimizer)
        return optimizer

    def __repr__(self) -> str:
        trained = f"{self.num_trainable:,} of {self.num_total:,} parameters"
        return f"Plan({', '.join(self.selectors)}: {trained})"

    def __str__(self) -> str:
        return _table(self)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module behind ``torch.compile``, so that names do not carry its prefix."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def _check_trainable(parameters: dict[str, nn.Parameter]) -> None:
    reasons = []
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            reasons.append((name, "not initialised yet", "a model that has run once"))
        elif not (parameter.is_floating_point() or parameter.is_complex()) or parameter.element_size() == 1:
            dtype = str(parameter.dtype).removeprefix("torch.")
            reasons.append((name, dtype, "a floating-point parameter of 16 bits or more"))
        elif parameter.is_inference():
            reasons.append((name, "an inference tensor", "a model made outside torch.inference_mode()"))
    if reasons:
        name, problem, expected = reasons[0]
        others = f" (and {len(reasons) - 1} others cannot train either)" if len(reasons) > 1 else ""
        raise ValueError(f"select: {name!r} is {problem}; expected {expected}{others}")


def _check_tied(parameters: dict[str, nn.Parameter], chosen: set[str]) -> None:
    shared: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        shared.setdefault(id(parameter), []).append(name)
    for names in shared.values():
        inside = [name for name in names if name in chosen]
        outside = [name for name in names if name not in chosen]
        if inside and outside:
            others = ", ".join(repr(name) for name in outside)
            raise ValueError(
                f"select: {inside[0]!r} is tied to {others}, not selected; expected all names of a shared "
                f"parameter (add {others}) or none"
            )


def _check_overlap(parameters: dict[str, nn.Parameter], chosen: set[str]) -> None:
    """Refuse selected parameters that share memory with themselves or with another parameter object."""
    storages: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
    for name, parameter in parameters.items():
        if (
            is_lazy(parameter)
            or parameter.is_meta
            or parameter.layout != torch.strided
            or not parameter.numel()
        ):
            continue
        sizes, strides = parameter.shape, parameter.stride()
        if name in chosen and any(
            size > 1 and stride == 0 for size, stride in zip(sizes, strides, strict=True)
        ):
            raise ValueError(
                f"select: {name!r} is an expanded view whose elements share memory; expected its own memory"
            )
        start = parameter.data_ptr()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        span = (start, start + extent * parameter.element_size(), name)
        storages.setdefault((parameter.device, parameter.untyped_storage().data_ptr()), []).append(span)
    for spans in storages.values():
        spans.sort()
        for index, (_, stop, first) in enumerate(spans):
            for start, _, second in spans[index + 1 :]:
                if start >= stop:
                    break
                if (first in chosen or second in chosen) and _share_elements(
                    parameters[first], parameters[second]
                ):
                    raise ValueError(
                        f"select: {first!r} and {second!r} are overlapping views of one memory; "
                        "expected parameters that do not overlap"
                    )


def _share_elements(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two views of one storage have an element in common; interleaved column slices have none."""
    if first.element_size() != second.element_size():
        return True
    low = min(first.storage_offset(), second.storage_offset())
    extents = [
        view.storage_offset()
        - low
        + 1
        + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
        for view in (first, second)
    ]
    touched = torch.zeros(max(extents), dtype=torch.bool)
    once = [
        size if stride else 1 for size, stride in zip(first.shape, first.stride(), strict=True)
    ]  # expanded
    touched.as_strided(once, first.stride(), first.storage_offset() - low).fill_(True)
    return bool(touched.as_strided(second.shape, second.stride(), second.storage_offset() - low).any())


@dataclass(frozen=True)
class _Row:
    block: str
    number: int | None  # position in a layer stack, so that equal neighbours can share a line
    tensors: int
    trained_tensors: int
    elements: int
    trained: int
    nbytes: int


def _table(plan: Plan) -> str:
    """One line for each block, or run of equal blocks, then totals against full fine-tuning."""
    names = set(plan.names)
    parameters = dict(plan.model.named_parameters())
    members: dict[str, list[str]] = {}
    place = _block_finder(plan.model)
    for name in parameters:
        members.setdefault(place(name), []).append(name)
    rows = []
    for block, inside in members.items():
        tail = block.rpartition(".")[2]
        trained = [name for name in inside if name in names]
        rows.append(
            _Row(
                block,
                int(tail) if tail.isdecimal() else None,
                len(inside),
                len(trained),
                sum(parameters[name].numel() for name in inside),
                sum(parameters[name].numel() for name in trained),
                sum(parameters[name].numel() * parameters[name].element_size() for name in inside),
            )
        )
    lines = [("block", "trains", "parameters", "trained", "size")]
    for _, run in groupby(rows, key=_alike):
        lines.append(_line(list(run)))
    total_bytes = sum(row.nbytes for row in rows)
    trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in plan.parameters())
    total, trained_total = plan.num_total, plan.num_trainable
    lines.append(("total", "", f"{total:,}", f"{trained_total:,}", _size(total_bytes)))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    text = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    share = 100 * trained_total / max(total, 1)
    return "\n".join(
        [
            text[0],
            rule,
            *text[1:-1],
            rule,
            text[-1],
            f"trains {share:.2f}% ({', '.join(plan.selectors)})",
            f"gradients    {_size(trained_bytes)}, full fine-tuning {_size(total_bytes)}",
            f"AdamW state  {_size(2 * trained_bytes)}, full fine-tuning {_size(2 * total_bytes)}",
        ]
    )


def _block_finder(model: nn.Module) -> Callable[[str], str]:
    """From a parameter's name to its line of the table: the widest module that holds no layer stack."""
    ancestors = {""}
    for stack in layer_stacks(model):
        parts = stack.path.split(".")
        ancestors.update(".".join(parts[: length + 1]) for length in range(len(parts)))

    def place(name: str) -> str:
        parts = name.split(".")
        for length in range(1, len(parts)):
            if ".".join(parts[:length]) not in ancestors:
                return ".".join(parts[:length])
        return name

    return place


def _alike(row: _Row) -> tuple[object, ...]:
    """Neighbouring blocks of a stack with equal keys share a line."""
    path = row.block if row.number is None else row.block.rpartition(".")[0]
    return (path, row.number is None, row.tensors, row.trained_tensors, row.elements, row.trained, row.nbytes)


def _line(run: list[_Row]) -> tuple[str, str, str, str, str]:
    first, last = run[0], run[-1]
    block = first.block if first is last else f"{first.block}-{last.number}"
    if first.trained_tensors in (0, first.tensors):
        trains = "yes" if first.trained_tensors else "-"
    else:
        trains = f"{first.trained_tensors} of {first.tensors} tensors"
    return (
        block,
        trains,
        f"{sum(row.elements for row in run):,}",
        f"{sum(row.trained for row in run):,}",
        _size(sum(row.nbytes for row in run)),
    )


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"
