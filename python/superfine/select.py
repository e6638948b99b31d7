"""Choose which parameters train: ``select`` freezes the rest and returns a ``Plan``.

    plan = superfine.select(model, "last:2", "head")
    print(plan)
    optimizer = plan.optimizer("adamw", lr=2e-5)

``superfine.selectors`` documents the selector language.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from superfine._first_step import watch_first_step
from superfine._processes import refuse_sharded
from superfine.selectors import depths_below_top, match

if TYPE_CHECKING:
    from superfine.slices import Slice

__all__ = ["Plan", "select"]

OPTIMIZERS = ("adamw", "adam", "lamb", "sgd")


def select(
    model: nn.Module,
    *selectors: str,
    rows: Mapping[str, Any] | None = None,
    cols: Mapping[str, Any] | None = None,
    tied: str = "both",
    seed: int = 0,
) -> Plan:
    """Freeze everything but the union of ``selectors`` and of single rows and columns, and return the plan.

    ``rows`` and ``cols`` map names or globs of layers (``"embed_tokens"``, ``"*.down_proj"``) to the output features
    (entries of an embedding) or input features that train: integers, a range or slice, a tensor; a fraction such as
    ``0.05``, those of the largest norm; ``"norm:0.05"``, ``"random:0.05"`` (by ``seed``); ``"new:32000"``, all from
    32000 on. They become parameters of their own by ``superfine.prepare``. Rows of an embedding that a head shares
    train on both sides; with ``tied="head"`` the head alone, which is named then, gets rows of its own.

    Sets ``requires_grad`` on exactly the selected parameters and drops the gradients of the others. Selecting
    again replaces the selection: make a new optimizer from the new plan, the earlier one no longer fits. Select
    before wrapping the model for data parallelism, which fixes what is synchronised.

    Raises ``TypeError`` or ``ValueError``, with the model untouched, when a selector matches nothing or
    counts layers that are not there; when rows or columns are outside their layer, named twice, or part of a weight
    that is selected whole; when the selection holds one name of a tied parameter but not the
    others, a view that overlaps another parameter, or a tensor that cannot train (integer, 8-bit,
    uninitialised).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"select: model is {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"select: model is {type(model).__name__}; expected the model before it is wrapped")
    if not (selectors or rows or cols):
        raise ValueError("select: no selector given; expected at least one, as 'last:2' or 'head'")
    model = uncompiled(model)
    refuse_sharded("select", model)
    if any("weight_slice" in vars(module) for module in model.modules()):
        raise ValueError(
            "select: model holds the slices of an earlier plan; expected superfine.restore(model) before"
        )
    chosen: set[str] = set().union(*(match(model, selector) for selector in selectors))
    slices: tuple[Slice, ...] = ()
    if rows or cols:
        from superfine._slice_patterns import resolve

        slices = resolve(model, rows, cols, chosen, tied=tied, seed=seed)
    sliced = {piece.name for piece in slices}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_trainable({name: parameters[name] for name in parameters if name in chosen | sliced})
    _check_tied(parameters, chosen)
    _check_overlap(dict(model.named_parameters()), chosen | sliced)

    names = []
    for name, parameter in model.named_parameters():
        if name in chosen:
            names.append(name)
        else:
            parameter.grad = None
        if parameter.requires_grad != (name in chosen):
            parameter.requires_grad_(name in chosen)
    return Plan(model, tuple(names), tuple(selectors), slices)


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What trains in a model, made by :func:`select`. ``print(plan)`` shows a table of it.

    ``names``: parameters that train whole, in model order, a tied parameter once. ``selectors``: as they were given.
    ``slices``: rows and columns that train alone, each in a parameter of its own after ``superfine.prepare``.
    """

    model: nn.Module
    names: tuple[str, ...]
    selectors: tuple[str, ...]
    slices: tuple[Slice, ...] = ()

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Names of the parameters that train whole or in part."""
        return (*self.names, *(piece.name for piece in self.slices))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train, in model order; of slices once they are installed."""
        names = {*self.names, *(piece.parameter_name for piece in self.slices)}
        return ((name, parameter) for name, parameter in self.model.named_parameters() if name in names)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train, in model order."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def num_trainable(self) -> int:
        """Number of elements that train, those of slices included."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        whole = sum(parameters[name].numel() for name in self.names)
        if not self.slices:
            return whole
        from superfine.slices import numel

        return whole + sum(numel(self.model, piece) for piece in self.slices)

    @property
    def num_total(self) -> int:
        """Number of elements in the model, a tied parameter counted once."""
        own = {piece.parameter_name for piece in self.slices}
        return sum(parameter.numel() for name, parameter in self.model.named_parameters() if name not in own)

    def param_groups(
        self, weight_decay: float, *, lr: float | None = None, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """Optimizer groups in model order: ``weight_decay`` for matrices, none for norms and biases.

        With a ``layer_decay`` below 1 each depth of the model has groups of its own, whose learning rate is ``lr``
        times ``layer_decay ** (n + 1 - depth)`` in a stack of n blocks: depth 0 are embeddings and what else comes
        before the blocks, k + 1 is block k, n + 1 what comes after them. So the head has ``lr``, the last block
        ``lr * layer_decay``, the embeddings ``lr * layer_decay ** (n + 1)`` (Clark et al. 2020, ELECTRA; Howard &
        Ruder 2018, ULMFiT; the formula is that of Bao et al. 2022, BEiT). Each stack of an encoder-decoder counts
        from its own top.

        Raises ``ValueError`` for a ``layer_decay`` outside (0, 1], and below 1 without ``lr`` or a layer stack, and
        where the plan has slices that are not installed.
        """
        if self.slices:
            from superfine.slices import is_installed

            if not is_installed(self.model, self.slices):
                raise ValueError(
                    "Plan.optimizer: the plan's slices have no parameters yet; expected "
                    "superfine.prepare(model, plan) before"
                )
        if not 0 < layer_decay <= 1 or (layer_decay < 1 and lr is None):
            raise ValueError(
                f"Plan.param_groups: layer_decay is {layer_decay} and lr {lr}; expected 0 < layer_decay <= 1, and lr "
                "where it is below 1"
            )
        below_top = depths_below_top(self.model) if layer_decay < 1 else lambda name: 0
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            below, is_matrix = below_top(name), parameter.ndim >= 2
            group = groups.setdefault((below, is_matrix), {"params": []})
            group["weight_decay"] = weight_decay if is_matrix else 0.0
            if layer_decay < 1 and lr is not None:
                group["lr"] = lr * layer_decay**below
            group["params"].append(parameter)
        # The deepest first, as in the model; at one depth matrices before vectors.
        return [groups[key] for key in sorted(groups, key=lambda key: (-key[0], not key[1]))]

    def optimizer(
        self,
        name: str = "adamw",
        *,
        lr: float,
        weight_decay: float = 0.01,
        layer_decay: float = 1.0,
        first_step_check: bool = True,
        **kwargs: Any,
    ) -> torch.optim.Optimizer:
        """An optimizer over the selection, which checks its first step.

        ``name``: ``"adamw"``, ``"adam"``, ``"lamb"`` (``superfine.optim``) or ``"sgd"`` (``torch.optim``). The
        decay of adam and sgd is L2 regularisation. Further arguments go to the optimizer. Groups are those of
        :meth:`param_groups`, with ``layer_decay`` for learning rates that fall with depth; lamb adapts those with
        weight decay.

        The first step raises ``ValueError`` when a selected parameter has no gradient, or when a frozen one
        has a gradient or moves. Of a model that ``superfine.prepare`` has changed, every step raises when
        requires_grad is not the plan's. ``first_step_check=False`` leaves both out, for models that use a part of
        their parameters in each step, such as mixtures of experts, and for ``in_backward``.

        Raises ``ValueError`` for an unknown ``name`` and for a plan that a later ``select`` replaced.
        """
        kind = optimizer_class(name)
        for trained, parameter in self.named_parameters():
            if not parameter.requires_grad:
                raise ValueError(
                    f"Plan.optimizer: {trained!r} is frozen; expected requires_grad as select left it "
                    "(a later select replaces the plan)"
                )
        groups = self.param_groups(weight_decay, lr=lr, layer_decay=layer_decay)
        optimizer: torch.optim.Optimizer = kind(groups, lr=lr, weight_decay=weight_decay, **kwargs)
        if first_step_check:
            watch_first_step(self.model, (name for name, _ in self.named_parameters()), optimizer)
        return optimizer

    def __repr__(self) -> str:
        trained = f"{self.num_trainable:,} of {self.num_total:,} parameters"
        pieces = (
            [repr(piece) for piece in self.slices] if len(self.slices) < 4 else [f"{len(self.slices)} slices"]
        )
        return f"Plan({', '.join([*self.selectors, *pieces])}: {trained})"

    def __str__(self) -> str:
        return self.table()

    def table(
        self,
        *,
        tokens: int = 1024,
        rows: int = 8,
        inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    ) -> str:
        """What ``print(plan)`` shows, for steps of ``tokens`` tokens in ``rows`` sequences, or of ``inputs``.

        :func:`superfine.plan_table.plan_table` explains it.
        """
        from superfine.plan_table import plan_table

        return plan_table(self, tokens=tokens, rows=rows, inputs=inputs)


def optimizer_class(name: str) -> Any:
    """The class that ``Plan.optimizer`` makes under this name."""
    if name not in OPTIMIZERS:
        close = difflib.get_close_matches(str(name).lower(), OPTIMIZERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Plan.optimizer: name is {name!r}; expected one of {', '.join(OPTIMIZERS)}{hint}")
    if name == "sgd":
        return torch.optim.SGD
    from superfine.optim import LAMB, Adam, AdamW

    return {"adamw": AdamW, "adam": Adam, "lamb": LAMB}[name]


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
