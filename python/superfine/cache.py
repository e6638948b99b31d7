"""The frozen prefix of a model, computed once for each sample and kept: ``PrefixCache``.

    plan = superfine.select(model, "last:2", "head")
    cache = superfine.PrefixCache(model, plan, "states", eval_prefix=True)
    cache.fill(loader)              # optional: what is missing is computed when it is first met
    with cache:
        train(model, loader)        # any loop

What the leading blocks make of a text does not change while they are frozen, so from the second epoch on a step costs
what the blocks after them cost. ``docs/cache.md`` says what a sample is, and what is refused.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn

from superfine._cache_codec import DTYPES, decode, encode
from superfine._cache_inputs import (
    PER_SAMPLE,
    Samples,
    dropouts,
    fill_arguments,
    flat_arguments,
    generates,
    read_samples,
    settings,
    shared_key,
)
from superfine._cache_parts import (
    CapturedError,
    attached_cache,
    evaluating,
    find_place,
    install,
    look,
    named_modules,
    uninstall,
)
from superfine._cache_store import DiskStore, MemoryStore, Record
from superfine._processes import refuse_sharded
from superfine._shortcut import LastLayer, position_read
from superfine._swap import has_part, unmixed
from superfine.select import Plan, uncompiled

__all__ = ["PrefixCache"]

# Of a configuration: what does not reach the frozen blocks in eval mode.
_NO_MATTER = (
    "architectures", "dtype", "id2label", "label2id", "num_labels", "pad_token_id", "problem_type", "return_dict",
    "superfine", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
)  # fmt: skip


class PrefixCache:
    """What the frozen prefix of ``model`` makes of each sample, kept in memory or in ``directory``.

    ``plan`` says what trains; the prefix is the embeddings and the leading blocks before it, of an encoder-decoder
    the encoder. ``dtype``: ``"fp32"`` keeps what the model computes as it is, also where that has 16 bits; ``"bf16"``
    and ``"fp16"`` round it; ``"int8"`` keeps 8 bits an element and a float32 scale a token, the largest magnitude of
    the token / 127. ``max_bytes`` bounds the memory, out of which what was used the longest ago goes first; in a
    directory it bounds the data, and what comes later is computed each time. ``eval_prefix=True`` agrees that a
    prefix with dropout runs as in evaluation while the model trains; without it such a forward pass is an error.

    While the cache is attached (``with cache:``, or ``attach`` and ``detach``) every forward pass of the model looks
    its samples up. Those that are missing run through the prefix alone, in eval mode and without gradients. States of
    padding on the right are zero. Passes that bring or want ``past_key_values`` run uncached.

    Attributes: ``hits`` and ``misses``, samples since the cache was made; ``nbytes``; ``len(cache)``, samples kept.

    Raises ``ValueError`` with the reason where a model or a call cannot be served: no frozen prefix, weights of the
    prefix that change or train, several documents in a row, ``inputs_embeds``, outputs of the frozen blocks, or a
    directory of another model or damaged; ``OSError`` for a full disk.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        directory: str | os.PathLike[str] | None = None,
        dtype: str = "fp32",
        max_bytes: int | None = None,
        *,
        eval_prefix: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"PrefixCache: model is {type(model).__name__}; expected a torch.nn.Module")
        if not isinstance(plan, Plan):
            raise TypeError(
                f"PrefixCache: plan is {type(plan).__name__}; expected what superfine.select returned"
            )
        self.model = uncompiled(model)
        if plan.model is not self.model:
            raise ValueError("PrefixCache: plan is another model's; expected the plan of the model given")
        if dtype not in DTYPES:
            raise ValueError(f"PrefixCache: dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(
                f"PrefixCache: max_bytes is {max_bytes}; expected a positive number of bytes, or None"
            )
        self.dtype, self.eval_prefix = dtype, eval_prefix
        self.hits = self.misses = 0
        self.place = find_place(self.model, set(plan.trained_names))
        self.passes_through, self.computing = False, False
        self.states: Any = None  # (rows, tokens, width) of the forward pass under way
        self._shape: tuple[int, ...] = (0, 0)  # rows and tokens of that pass
        self._taken = self._attached = False
        self._last = self.model.get_submodule(self.place.blocks[-1])
        self._backbone: Any = self.model.get_submodule(self.place.backbone)
        self._signature = inspect.signature(self._backbone.forward)
        self._config = getattr(self._backbone, "config", None) or getattr(self.model, "config", None)
        self._settings: dict[str, Any] | None = None
        self._keys: dict[tuple[Any, ...], Any] = {}
        if attached_cache(self._backbone) is not None:
            raise ValueError("PrefixCache: the model has a cache attached; expected none (detach it first)")
        self._look = look(self.model, self.place)
        self._read_modules()
        self._check_frozen()
        self._marks = self._mark()
        self._weights = self._hash()
        self._shapes = {id(self.model.get_submodule(n)): shape for n, shape in self._look.embeddings.items()}
        self._zero: Tensor | None = None
        self._store: MemoryStore | DiskStore = MemoryStore(max_bytes)
        if directory is not None:
            self._store = DiskStore(directory, self._header(), max_bytes)
        self._check_serves()

    def attach(self) -> PrefixCache:
        """Serve the model's forward passes from now on; nothing where it does already."""
        if self._attached:
            return self
        other = attached_cache(self._backbone)
        if other is not None:
            raise ValueError(
                "PrefixCache: the model has a cache attached; expected none (detach the other first)"
            )
        # Writing through .data leaves no trace in the versions that each forward pass compares.
        self._validate(reread=True)
        install(self.model, self.place, self._look, self)
        self._attached = True
        return self

    def detach(self) -> None:
        """Leave the model as it was; what is kept stays."""
        if self._attached:
            uninstall(self.model)
            self._attached = False

    def __enter__(self) -> PrefixCache:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def fill(self, batches: Iterable[Any], progress: bool = True) -> int:
        """Compute what is missing of ``batches``: mappings of model arguments, or tuples that begin with one.

        Call it under the autocast that training will use. ``progress`` shows a bar on a terminal. Returns the number
        of samples computed; ``hits`` and ``misses`` do not count.
        """
        attached, counted = self._attached, (self.hits, self.misses)
        self.attach()
        device = next(self._backbone.parameters()).device
        computed = 0
        try:
            for batch in _shown(batches) if progress else batches:
                arguments = fill_arguments(self._signature, batch, device)
                self._validate()
                position = position_read(self.model, self._last, arguments)
                computed += self._missing(arguments, self._samples(arguments, position))[1]
        finally:
            self.hits, self.misses = counted
            if not attached:
                self.detach()
        return computed

    @property
    def nbytes(self) -> int:
        """Bytes of the states that are kept."""
        return self._store.nbytes

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        stack, blocks = self.place.prefix.stack, self.place.prefix.blocks
        where = f"in {self._store.directory}" if isinstance(self._store, DiskStore) else "in memory"
        return (
            f"PrefixCache({type(self.model).__name__}: {blocks} of {len(stack.blocks)} blocks of {stack.path},"
            f" {self.dtype}, {len(self):,} samples, {self.nbytes / 1e6:,.1f} MB {where})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model has no cache: two models must not share what one of them may change.
        return type(None), ()

    # What the parts in the model call.

    @torch.compiler.disable
    def look_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments to run with when the states are at hand, or None to run uncached."""
        arguments = flat_arguments(self._signature, args, kwargs)
        if generates(arguments):
            return None
        self._validate()
        self._check_mode()
        position = arguments.pop("superfine_position", None)  # of the short-cut of classifiers
        samples = self._samples(arguments, position if has_part(self._last, LastLayer) else None)
        records, missed = self._missing(arguments, samples)
        kept = [record for record in records if record is not None]
        if not kept:
            return None  # no rows, or nothing but padding
        self.hits += len(samples.keys) - missed
        self.misses += missed
        self.states = self._served(samples, records, kept[0], arguments["input_ids"].device)
        self._shape, self._taken = samples.shape, False
        if position is not None:
            arguments["superfine_position"] = position
        if "use_cache" in self._signature.parameters:
            arguments["use_cache"] = False  # keys and values of the frozen blocks would be missing in it
        return arguments

    @torch.compiler.disable
    def finish(self) -> bool:
        """End the forward pass; whether the states were used."""
        self.states = None
        return self._taken

    def take(self, requires_grad: bool) -> Tensor:
        """The states of the forward pass under way."""
        self._taken = True
        return self.states.requires_grad_() if requires_grad else self.states

    def pack(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which the blocks return them."""
        extra = self._look.extra
        return hidden if extra is None else (hidden, *[None] * extra)

    @torch.compiler.disable
    def stand_in(self, module: nn.Module) -> Tensor:
        """Zeros of the shape of the module's output, which share one element."""
        if self._zero is None or self._zero.device != self.states.device:
            self._zero = torch.zeros((), dtype=self._look.embedding_dtype, device=self.states.device)
        rows, tokens = self._shape
        shape = [{-1: rows, -2: tokens}.get(size, size) for size in self._shapes[id(module)]]
        return self._zero.expand(shape)

    # Samples

    def _samples(self, arguments: dict[str, Any], position: int | Tensor | None = None) -> Samples:
        configured = vars(self._config) if self._config is not None else {}
        if configured != self._settings:
            self._settings, self._keys = dict(configured), {}
        device = arguments["input_ids"].device.type if "input_ids" in arguments else "cpu"
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if any(m._forward_pre_hooks for m in self._adapters):
            raise ValueError("PrefixCache: adapter_names is given; expected one adapter for all samples")
        adapters = tuple(
            (
                m._disable_adapters,
                repr(getattr(m, "scaling", None)),
                repr(getattr(m, "active_adapter", None)),
                tuple(getattr(m, "merged_adapters", ())),
            )
            for m in self._adapters
        )
        state = (device, str(autocast), torch.get_float32_matmul_precision(), adapters)
        if state not in self._keys:
            shared = (self._weights, self._stated_config(), self.dtype, torch.__version__, *state)
            self._keys[state] = shared_key(shared)
        return read_samples(arguments, self._config, self._keys[state], position)

    def _stated_config(self) -> str:
        config: Any = self._config
        if config is None:
            return ""
        kept = {
            key: value
            for key, value in config.to_dict().items()
            if key not in _NO_MATTER and "drop" not in key and not key.startswith("output_")
        }
        kept["attention"] = getattr(config, "_attn_implementation", None)
        return json.dumps(kept, sort_keys=True, default=str)

    def _missing(self, arguments: dict[str, Any], samples: Samples) -> tuple[list[Record | None], int]:
        """The records of a batch, after those that were missing are computed, and how many of its rows were."""
        records = self._store.get(samples.keys)
        rows: dict[bytes, int] = {}
        missed = 0
        for row, (key, record) in enumerate(zip(samples.keys, records, strict=True)):
            if record is None and samples.lengths[row]:
                rows.setdefault(key, row)
                missed += 1
        if rows:
            chosen = list(rows.values())
            states = self._compute(arguments, samples, chosen)
            computed = encode(states, [samples.kept(row) for row in chosen], self.dtype)
            fresh = dict(zip(rows, computed, strict=True))
            for row, key in enumerate(samples.keys):
                if records[row] is None:
                    records[row] = fresh.get(key)
            self._store.put(list(fresh.items()))
        return records, missed

    def _compute(self, arguments: dict[str, Any], samples: Samples, rows: list[int]) -> Tensor:
        """The states of some rows of a batch, (rows, tokens, width), up to the last token that one of them has, or of
        the one token that is wanted, (rows, 1, width)."""
        width = max(samples.lengths[row] for row in rows)
        chosen = torch.tensor(rows)
        part: dict[str, Any] = {}
        for name in PER_SAMPLE:
            if name in arguments:
                value = arguments[name][..., :width]
                whole = value.ndim == 2 and len(value) == samples.shape[0]
                part[name] = value[chosen.to(value.device)] if whole else value
        if "use_cache" in self._signature.parameters:
            part["use_cache"] = False
        position = samples.position
        if isinstance(position, Tensor):
            position = position[chosen.to(position.device)]
        if position is not None:
            part["superfine_position"] = position
        self.passes_through = self.computing = True
        try:
            with evaluating(self._backbone):
                self._backbone.forward(**part)
        except CapturedError as captured:
            return captured.states if position is None else _one_token(captured.states, position)
        finally:
            self.passes_through = self.computing = False
        raise RuntimeError(
            f"PrefixCache: {self.place.blocks[-1]!r} did not run; expected every frozen block to"
        )

    def _served(
        self, samples: Samples, records: list[Record | None], like: Record, device: torch.device
    ) -> Tensor:
        """What the last frozen block returns of a batch: with zeros where there is no sample."""
        tokens = samples.shape[1] if samples.position is None else 1
        states = decode(records, like, tokens, self._look.states.shape[-1], device)
        if not isinstance(samples.position, Tensor):
            return states
        whole = states.new_zeros(*samples.shape, states.shape[-1])
        return whole.scatter_(1, samples.position[:, None, None].expand_as(states), states)

    # What must stay as it is

    def _read_modules(self) -> None:
        """The modules of the prefix as they are now, and what they hold."""
        inside = named_modules(self.model, {name: self.model.get_submodule(name) for name in self._look.read})
        around = {name: self.model.get_submodule(name) for name in self.place.path[:-1]}
        self._modules = inside | around
        self._children = [(name, module._modules) for name, module in inside.items() if module._modules]
        self._tensors: list[tuple[str, dict[str, Any], str]] = [
            (f"{name}.{key}" if name else key, owner, key)
            for name, module in self._modules.items()
            for owner in (module._parameters, module._buffers)
            for key, value in owner.items()
            if value is not None
        ]
        self._dropouts = dropouts(self._modules)
        self._adapters = [module for module in inside.values() if hasattr(module, "_disable_adapters")]

    def _mark(self) -> dict[str, Any]:
        """Of each tensor what changes when it is written to, moved or replaced; of each module what is in it."""
        marks: dict[str, Any] = {name: tuple(map(id, children.values())) for name, children in self._children}
        for name, owner, key in self._tensors:
            tensor = owner.get(key)
            if tensor is not None:
                version = -1 if tensor.is_inference() else tensor._version
                marks[name] = (id(tensor), version, tensor.data_ptr())
        return marks

    def _hash(self) -> str:
        """Over names, classes and settings of the modules, and names, dtypes, shapes and bytes of the tensors."""
        refuse_sharded("PrefixCache", self.model)
        digest = hashlib.blake2b(digest_size=16)
        for name, module in self._modules.items():
            digest.update(f"\n{name} {unmixed(module).__qualname__} {settings(module)}\n".encode())
        for name, owner, key in self._tensors:
            tensor = owner[key].detach()
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _validate(self, reread: bool = False) -> None:
        self._check_frozen()
        marks = self._mark()
        if not reread and marks == self._marks:
            return
        self._read_modules()
        self._check_frozen()
        marks = self._mark()
        if self._hash() != self._weights:
            changed = [name for name, mark in marks.items() if self._marks.get(name) != mark]
            what = repr(changed[0]) if changed else "a frozen tensor or setting"
            raise ValueError(
                f"PrefixCache: {what} has changed since the cache was made; expected a frozen prefix: make a new"
                " cache (in another directory), for what this one keeps belongs to the weights from before"
            )
        self._marks = marks  # moved, or written with the same values

    def _check_frozen(self) -> None:
        for name, owner, key in self._tensors:
            tensor = owner.get(key)  # None where an adapter was taken out
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"PrefixCache: {name!r} requires a gradient; expected all of the prefix to be frozen (select"
                    " after loading, and make the cache from that plan)"
                )

    def _check_mode(self) -> None:
        if not self.eval_prefix:
            for name, module in self._dropouts:
                if module.training:
                    raise ValueError(
                        f"PrefixCache: {name!r} is in train mode, where it has dropout or statistics of the batch;"
                        " expected eval_prefix=True, which agrees that the frozen prefix runs as in evaluation"
                        " (losses then differ from those with dropout), or the prefix in eval mode"
                    )

    def _header(self) -> dict[str, Any]:
        stack = self.place.prefix.stack
        return {
            "model": type(self._backbone).__name__,
            "blocks": f"{self.place.prefix.blocks} of {len(stack.blocks)}",
            "width": self._look.states.shape[-1],
            "dtype": self.dtype,
            "prefix": self._weights,
        }

    def _check_serves(self) -> None:
        """That nothing but the states of the last frozen block reaches the rest of the model."""
        found = self._look
        install(self.model, self.place, found, self)
        try:
            mask = found.arguments.get("attention_mask", torch.ones_like(found.arguments["input_ids"])).bool()
            self.states, self._shape = found.states * mask[..., None], found.arguments["input_ids"].shape
            self.passes_through, self._taken = True, False
            with evaluating(self._backbone):
                outputs = self._backbone(**found.arguments)[0]
        finally:
            self.states, self.passes_through = None, False
            uninstall(self.model)
        expected, actual = found.outputs[mask], outputs[mask]
        tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
        scale = float(expected.abs().amax().nan_to_num(0))
        if not self._taken or not torch.allclose(
            actual, expected, rtol=0, atol=tolerance * scale, equal_nan=True
        ):
            raise ValueError(
                f"PrefixCache: {type(self.model).__name__} uses more of its frozen blocks than the hidden states"
                f" after {self.place.blocks[-1]!r}; expected the blocks to follow each other"
            )


def _one_token(states: Tensor, position: int | Tensor) -> Tensor:
    """Of (rows, tokens, width) the token at the position, of all rows or of each: (rows, 1, width)."""
    if not isinstance(position, Tensor):
        return states[:, position : position + 1]
    return states.gather(1, position[:, None, None].expand(-1, 1, states.shape[-1]))


def _shown(batches: Iterable[Any]) -> Iterable[Any]:
    """The same batches, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    total = len(batches) if isinstance(batches, Sized) else None
    return track(batches, "frozen prefix", total, console=console, disable=not console.is_terminal)
