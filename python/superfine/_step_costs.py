"""What one training step costs, found by running it on fake tensors: shapes without values.

The model runs forward and backward as it stands, with nothing allocated or computed, so attention kernels, tied
weights, adapters and checkpoints count as what they are. FLOPs are those of `torch.utils.flop_counter`, two for a
multiply-add in matrix products, convolutions and attention; activations are the storages that autograd saves.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from superfine_kernels._sharded import is_sharded

__all__ = ["Inputs", "StepCosts", "Unpredictable", "example_inputs", "step_costs"]

REST = ""  # what runs outside every place: the loss, masks, dropout between blocks


class Unpredictable(Exception):  # noqa: N818 (an answer, no failure)
    """The step cannot be run on fake tensors; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of a forward, and what they are in words: "1,024 tokens in sequences of 128"."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    text: str


@dataclass
class StepCosts:
    """By place: FLOPs of forward and backward, bytes of activations. `uncounted`: ops whose FLOPs are unknown."""

    flops: Counter[str] = field(default_factory=Counter)
    activations: Counter[str] = field(default_factory=Counter)
    uncounted: tuple[str, ...] = ()


def step_costs(
    model: nn.Module, trained: Collection[str], inputs: Inputs, places: Mapping[str, nn.Module]
) -> StepCosts:
    """Costs of forward and backward in training mode when the parameters named in `trained` train.

    Neither flags, gradients, modes, buffers nor random states of the model change. `places` are modules that costs
    are told apart by; none lies in another. Where the model has no loss, its floating-point outputs are summed.

    Raises `Unpredictable`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if any(is_sharded(parameter) for parameter in model.parameters()):
        # What fully_shard gathers for a forward it keeps, and fake tensors are no weights.
        raise Unpredictable("parameters are split over processes; print the plan before fully_shard")
    counter = _Counter(places)
    try:
        with _training(model), warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            warnings.simplefilter("ignore")
            state = {name: _fake(fake, p).requires_grad_(name in trained) for name, p in _parameters(model)}
            buffers = {name: _fake(fake, buffer) for name, buffer in model.named_buffers()}
            args, kwargs = tree_map(
                lambda leaf: _fake(fake, leaf) if isinstance(leaf, Tensor) else leaf,
                (inputs.args, inputs.kwargs),
            )
            ignored = {_storage(t) for t in (*state.values(), *buffers.values()) if t.numel()}
            with torch.enable_grad(), counter, counter.hooked():
                with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
                    output = torch.func.functional_call(model, state | buffers, args, kwargs)
                    loss = _loss(output)
                counter.count_saved(ignored)
                wanted = [tensor for name, tensor in state.items() if name in trained]
                if loss.requires_grad:
                    torch.autograd.grad(loss, wanted, allow_unused=True)
    except Unpredictable:
        raise
    except Exception as error:  # a model's code can fail in any way: then its costs are unknown, no more
        reason = str(error).strip().splitlines()
        raise Unpredictable(f"{type(error).__name__}: {reason[0][:150] if reason else ''}") from error
    return counter.costs()


def example_inputs(model: nn.Module, tokens: int, rows: int) -> Inputs:
    """Inputs of about `tokens` tokens in `rows` sequences, with labels where the model takes them.

    Sequences are no longer than the model has positions for. Known are Hugging Face models of tokens, and modules
    whose first layer is an `nn.Embedding` or an `nn.Linear`; raises `Unpredictable` for others.
    """
    length = max(1, tokens // rows)
    inner: Any = model
    if hasattr(model, "peft_config"):
        inner = inner.get_base_model()
    config: Any = getattr(inner, "config", None)
    if config is not None and getattr(inner, "main_input_name", None) == "input_ids":
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and not isinstance(positions, bool):
            offset = 2 if "roberta" in str(getattr(config, "model_type", "")) else 0
            length = max(1, min(length, positions - offset))
        ids = torch.ones(rows, length, dtype=torch.long)
        # With a mask, as for batches with padding: attention without one saves a little less in some models.
        kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        named = type(inner).__name__
        if "ForSequenceClassification" in named:
            kwargs["labels"] = torch.zeros(rows, dtype=torch.long)
        elif any(part in named for part in ("LM", "ForConditionalGeneration", "ForTokenClassification")):
            kwargs["labels"] = ids
        elif "ForQuestionAnswering" in named:
            kwargs |= dict.fromkeys(("start_positions", "end_positions"), torch.zeros(rows, dtype=torch.long))
        if getattr(config, "is_encoder_decoder", False) and "labels" not in kwargs:
            kwargs["decoder_input_ids"] = ids
        if "use_cache" in inspect.signature(inner.forward).parameters:
            kwargs["use_cache"] = False  # training keeps no keys and values for later tokens
        return Inputs((), kwargs, f"{rows * length:,} tokens in sequences of {length:,}")
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            ids = torch.zeros(rows, length, dtype=torch.long)
            return Inputs((ids,), {}, f"{rows * length:,} tokens in sequences of {length:,}")
        if isinstance(module, nn.Linear):
            x = torch.empty(rows * length, module.in_features, dtype=module.weight.dtype, device="meta")
            return Inputs((x,), {}, f"{rows * length:,} rows of {module.in_features:,} features")
        if next(module.parameters(recurse=False), None) is not None:
            break
    raise Unpredictable(
        f"no inputs are known for a {type(model).__name__}: plan.table(inputs=...) takes them"
    )


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters()


def _fake(mode: Any, tensor: Tensor) -> Any:
    """A fake copy; of a tensor on the meta device one that pretends to lie on the CPU."""
    if tensor.is_meta:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return mode.from_tensor(tensor.detach())


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found and hasattr(output, "values"):  # a ModelOutput where pytree does not know it
        found = [value for value in output.values() if isinstance(value, Tensor)]
    if not found:
        raise Unpredictable("the model returns no floating-point tensor")
    return torch.stack(
        [tensor.sum().float() for tensor in found if tensor.requires_grad] or [found[0].sum()]
    ).sum()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)  # classifiers write down what the first labels look like
    try:
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if config is not None and getattr(config, "problem_type", None) != problem:
            config.problem_type = problem


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Held:
    """A tensor in the keeping of a node; gone when the node is."""

    def __init__(self, tensor: Tensor, place: str) -> None:
        self.tensor, self.place = tensor, place


class _Counter(TorchDispatchMode):
    """Counts the FLOPs of what runs under it, and what is saved, by place."""

    def __init__(self, places: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.places = places
        self.stack: list[str] = []
        # Nodes of the graph are numbered as they are made: from which number on they belong to which place.
        self.borders: list[tuple[int, str]] = [(0, REST)]
        self.held: list[weakref.ref[_Held]] = []
        self.flops: Counter[str] = Counter()
        self.activations: Counter[str] = Counter()
        self.unknown: set[str] = set()
        self.formulas = _formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is None and func.namespace == "superfine":
            formula = _OURS.get(func._opname)
        if formula is not None:
            self.flops[self.place()] += int(formula(*args, **(kwargs or {}), out_val=result))
        elif func.namespace not in ("aten", "prims", "prim") and not _without_products(func):
            self.unknown.add(f"{func.namespace}::{func._opname}")
        return result

    def place(self) -> str:
        if self.stack:
            return self.stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return REST
        index = bisect_right(self.borders, node._sequence_nr(), key=lambda border: border[0])
        return self.borders[index - 1][1]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        def enter(place: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self.stack.append(place)
                self.borders.append((_next_node(), place))

            return hook

        def leave(*_: Any) -> None:
            if self.stack:
                self.stack.pop()
            self.borders.append((_next_node(), self.stack[-1] if self.stack else REST))

        handles = []
        try:
            for place, module in self.places.items():
                handles.append(module.register_forward_pre_hook(enter(place), prepend=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor, self.stack[-1] if self.stack else REST)
        self.held.append(weakref.ref(held))
        return held

    @staticmethod
    def unpack(held: _Held) -> Tensor:
        return held.tensor

    def count_saved(self, ignored: Collection[int]) -> None:
        """Once for a storage, where it was saved first; not what was freed again, nor parameters and buffers."""
        seen = set(ignored)
        for held in (reference() for reference in self.held):
            if held is not None and held.tensor.numel() and _storage(held.tensor) not in seen:
                seen.add(_storage(held.tensor))
                self.activations[held.place] += held.tensor.untyped_storage().nbytes()

    def costs(self) -> StepCosts:
        return StepCosts(self.flops, self.activations, tuple(sorted(self.unknown)))


def _next_node() -> int:
    return int(torch._C._autograd._get_sequence_nr())


def _without_products(func: Any) -> bool:
    """Ours compute by elements and rows, except those with a linear layer in them."""
    return func.namespace == "superfine" and "linear" not in func._opname and "cols" not in func._opname


def _formulas() -> dict[Any, Callable[..., Any]]:
    """torch's, and those of attention on the CPU, which it lacks."""
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query.shape, key.shape, value.shape))

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))

    return {
        **flop_registry,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }


def _product(input: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of rows with a matrix, whichever way round that is kept."""
    return 2 * input[..., 0].numel() * int(weight.numel())


def _loss_backward(input: Any, weight: Any, *more: Any, **_: Any) -> int:
    kept, wants, _into = more[-3:]  # the logits are made again unless they were kept
    return _product(input, weight) * (int(not kept.numel()) + int(wants[0]) + int(wants[1]))


#: Our ops that hold a matrix product; what others hold is made of torch's.
_OURS: dict[str, Callable[..., int]] = {
    "linear_cross_entropy": _product,
    "linear_cross_entropy_backward": _loss_backward,
    "slice_linear": _product,
    "slice_linear_input_grad": _product,
}
