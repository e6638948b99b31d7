"""How :class:`superfine.PrefixCache` gets into a model: parts that let the frozen prefix cost nothing, and the look
at the model that finds where they belong."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from superfine._prefix import Prefix, frozen_prefix
from superfine._processes import refuse_sharded
from superfine._swap import Part, add_part, has_part, remove_part
from superfine.fused_loss import in_eval_mode
from superfine.selectors import layer_stacks

__all__ = ["CapturedError", "Place", "attached_cache", "find_place", "install", "look", "uninstall"]

_ATTRIBUTE = "_superfine_prefix_cache"


class CapturedError(Exception):
    """Carries the states out of a forward pass that nobody needs to finish."""

    def __init__(self, states: Tensor) -> None:
        super().__init__("the states of the frozen prefix")
        self.states = states


class CachedBackbone(Part):
    """Looks its samples up before it runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = attached_cache(self)
        if cache is None or cache.passes_through:
            return super().forward(*args, **kwargs)
        arguments = cache.look_up(args, kwargs)
        if arguments is None:
            return super().forward(*args, **kwargs)
        try:
            outputs = super().forward(**arguments)
        finally:
            taken = cache.finish()
        if not taken:
            raise RuntimeError(
                f"PrefixCache: the last frozen block of {type(self).__name__} was left out of a forward pass;"
                " expected every block to run (layer drop is not supported)"
            )
        return outputs


class StandIn(Part):
    """In place of embeddings: zeros of their shape, which take no memory."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = attached_cache(self)
        if cache is None or cache.states is None:
            return super().forward(*args, **kwargs)
        return cache.stand_in(self)


class PassOn(Part):
    """In place of dropout and of the frozen blocks but the last: what comes in goes out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = attached_cache(self)
        if cache is None or cache.states is None:
            return super().forward(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        return hidden if isinstance(self, nn.Dropout) else cache.pack(hidden)


class LastFrozen(Part):
    """In place of the last frozen block: the cached states."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = attached_cache(self)
        if cache is None:
            return super().forward(*args, **kwargs)
        if cache.states is not None:
            hidden = args[0] if args else next(iter(kwargs.values()))
            # Reentrant checkpointing asks for it at the embeddings, and finds no gradients without.
            return cache.pack(cache.take(hidden.requires_grad))
        outputs = super().forward(*args, **kwargs)
        if cache.computing:
            raise CapturedError(outputs[0] if isinstance(outputs, tuple) else outputs)
        return outputs


@dataclass(frozen=True)
class Place:
    """Where a model's frozen prefix lies. Names are paths in the model."""

    backbone: str  # the innermost module around the blocks that takes input_ids
    prefix: Prefix
    path: tuple[str, ...]  # from the backbone to the container of the blocks
    beside: tuple[str, ...]  # their other children: embeddings, norms, poolers

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the frozen blocks."""
        return self.prefix.stack.blocks[: self.prefix.blocks]


@dataclass(frozen=True)
class Look:
    """What one pass of a small batch showed."""

    read: dict[str, nn.Module]  # modules that ran before the first block, and the frozen blocks
    embeddings: dict[str, tuple[int, ...]]  # those with parameters: the shape, -1 for rows and -2 for tokens
    dropouts: tuple[str, ...]
    extra: int | None  # further outputs of a block, all None here; None where it returns a tensor
    states: Tensor
    embedding_dtype: torch.dtype
    arguments: dict[str, Any]
    outputs: Tensor


def find_place(model: nn.Module, trained: set[str]) -> Place:
    """The frozen prefix of ``model``, of an encoder-decoder that of its encoder.

    Raises ``ValueError`` where nothing is frozen at its beginning, or no module takes ``input_ids``.
    """
    refuse_sharded("PrefixCache", model)
    root, inside = "", model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        root = _encoder(model)
        inside = model.get_submodule(root)
        ids = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in trained}
        trained = {name for name, p in inside.named_parameters(remove_duplicate=False) if id(p) in ids}
    prefix = frozen_prefix(inside, trained)
    if prefix.blocks == 0:
        raise ValueError(
            f"PrefixCache: {_join(root, prefix.stopped_by or '')!r} trains; expected a frozen prefix, which is the"
            " embeddings and at least the first block"
        )
    names = [""]
    for part in prefix.stack.path.split("."):
        names.append(_join(names[-1], part))
    takers = [name for name in names if _takes_ids(inside.get_submodule(name))]
    if not takers:
        raise ValueError(
            f"PrefixCache: model is {type(model).__name__}, where nothing around {prefix.stack.path} takes input_ids;"
            " expected a model of token ids"
        )
    path = names[names.index(takers[-1]) :]
    beside = tuple(
        _join(name, child)
        for name in path[:-1]
        for child, _ in inside.get_submodule(name).named_children()
        if _join(name, child) not in path
    )
    if root:
        stack = prefix.stack
        blocks = tuple(_join(root, block) for block in stack.blocks)
        prefix = Prefix(
            type(stack)(_join(root, stack.path), blocks, stack.block, stack.leaves), prefix.blocks, None
        )
    return Place(_join(root, path[0]), prefix, *(tuple(_join(root, n) for n in ns) for ns in (path, beside)))


@torch.no_grad()
def look(model: nn.Module, place: Place) -> Look:
    """Run two short samples, one of them padded, and note what the modules around the blocks do.

    Raises ``ValueError`` where blocks hand more on than hidden states.
    """
    backbone = model.get_submodule(place.backbone)
    device = next(backbone.parameters()).device
    config: Any = getattr(backbone, "config", None) or getattr(model, "config", None)
    vocabulary = config.get_text_config().vocab_size if config is not None else 2
    arguments: dict[str, Any] = {"input_ids": torch.arange(6, device=device).view(2, 3) % vocabulary}
    accepted = inspect.signature(backbone.forward).parameters
    if "attention_mask" in accepted:
        arguments["attention_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    seen: dict[str, Any] = {}
    hooks = []
    for name in (*place.beside, *place.blocks):

        def note(module: Any, args: Any, outputs: Any, name: str = name) -> None:
            seen.setdefault(name, outputs)

        hooks.append(model.get_submodule(name).register_forward_hook(note))
    try:
        with in_eval_mode(backbone):
            outputs = backbone(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [block for block in place.blocks if block not in seen]
    if missing:
        raise ValueError(f"PrefixCache: {missing[0]!r} did not run; expected every frozen block to")
    order = list(seen)
    before = order[: order.index(place.blocks[0])]
    last = seen[place.blocks[-1]]
    extra = len(last) - 1 if isinstance(last, tuple) else None
    states = last[0] if isinstance(last, tuple) else last
    partly = place.prefix.blocks < len(place.prefix.stack.blocks)
    if partly and extra is not None and any(value is not None for value in last[1:]):
        raise ValueError(
            f"PrefixCache: {place.blocks[-1]!r} hands more to the next block than hidden states; expected all"
            f" {len(place.prefix.stack.blocks)} blocks of {place.prefix.stack.path} to be frozen"
        )
    embeddings = {}
    for name in before:
        shape = tuple(seen[name].shape) if isinstance(seen[name], Tensor) else ()
        if next(model.get_submodule(name).parameters(), None) is not None and shape[-1:] == states.shape[-1:]:
            leading = {(2, 3): (-1, -2), (1, 3): (1, -2), (3,): (-2,)}.get(shape[:-1])
            if leading is not None:
                embeddings[name] = (*leading, shape[-1])
    kinds = [seen[name].dtype for name in embeddings]
    return Look(
        {name: model.get_submodule(name) for name in (*before, *place.blocks)},
        embeddings,
        tuple(name for name in before if type(model.get_submodule(name)) is nn.Dropout),
        extra,
        states,
        kinds[0] if kinds else states.dtype,
        arguments,
        outputs[0],
    )


def install(model: nn.Module, place: Place, found: Look, cache: Any) -> None:
    """Add the parts; where one cannot be added none stays."""
    parts: list[tuple[str, type[Part]]] = [(place.backbone, CachedBackbone), (place.blocks[-1], LastFrozen)]
    parts += [(name, PassOn) for name in (*place.blocks[:-1], *found.dropouts)]
    parts += [(name, StandIn) for name in found.embeddings]
    try:
        for name, part in parts:
            module = model.get_submodule(name)
            remove_part(module, part)  # of the model that this one is a copy of
            add_part(module, part)
            setattr(module, _ATTRIBUTE, cache)
    except BaseException:
        uninstall(model)
        raise


def uninstall(model: nn.Module) -> None:
    """The model without any part of a cache."""
    for module in model.modules():
        for part in (CachedBackbone, StandIn, PassOn, LastFrozen):
            if has_part(module, part):
                remove_part(module, part)
        vars(module).pop(_ATTRIBUTE, None)


def attached_cache(module: nn.Module) -> Any:
    """The cache that is attached at a module, or None."""
    return getattr(module, _ATTRIBUTE, None)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients."""
    with torch.no_grad(), in_eval_mode(module):
        yield


def named_modules(model: nn.Module, read: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """All modules inside those of ``read``, by their names in the model."""
    return {_join(name, inner): found for name, top in read.items() for inner, found in top.named_modules()}


def _encoder(model: nn.Module) -> str:
    stacks = [stack for stack in layer_stacks(model) if "encoder" in stack.path.split(".")]
    if not stacks:
        raise ValueError(
            f"PrefixCache: {type(model).__name__} is an encoder-decoder without an encoder's stack of blocks;"
            " expected one, as in T5 and BART"
        )
    parts = stacks[0].path.split(".")
    return ".".join(parts[: parts.index("encoder") + 1])


def _takes_ids(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    return "input_ids" in inspect.signature(module.forward).parameters


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name and inner else name or inner
