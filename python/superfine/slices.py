"""Rows and columns of a weight that train alone, in a model: their own parameters, and layers that read them.

    plan = superfine.select(model, rows={"embed_tokens": "new:32000"}, cols={"*.down_proj": 0.05})
    superfine.prepare(model, plan)      # installs plan.slices
    superfine.restore(model)            # puts their values into the weights, and takes everything back

A layer gets a parameter `weight_rows` (n, in) or `weight_cols` (out, n) beside its frozen `weight`, and a forward
that uses it in place of those rows or columns (superfine_kernels/slices.py). Rows are output features and columns
input features, also of transformers' Conv1D (GPT-2), which keeps its weight transposed; rows of an embedding are its
entries.

To everyone who reads or writes `state_dict` the model is what it was: the values are in `weight`, and loading puts
them back into the slice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from superfine._swap import Part, add_part, remove_part
from superfine_kernels import TrainableRows
from superfine_kernels._sharded import is_sharded
from superfine_kernels.slices import COLS, ROWS, cols_linear, make_slots, rows_embedding, rows_linear

__all__ = ["Slice", "install", "remove"]


@dataclass(frozen=True, eq=False)
class Slice:
    """Rows (`dim` 0) or columns (1) of the layer whose weight parameter is `name`.

    `indices`: (n), int64, ascending, on the CPU. `untie`: the weight is shared with an embedding, and the slice is
    the head's alone, which gets a weight of its own when the slice is installed.
    """

    name: str
    dim: int
    indices: Tensor
    untie: bool = False

    @property
    def parameter_name(self) -> str:
        """Name of the slice's own parameter once it is installed."""
        return self.name + ("_rows" if self.dim == ROWS else "_cols")

    def __len__(self) -> int:
        return self.indices.numel()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Slice):
            return NotImplemented
        mine, theirs = ((s.name, s.dim, s.untie) for s in (self, other))
        return mine == theirs and torch.equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash((self.name, self.dim, self.untie, len(self)))

    def __repr__(self) -> str:
        return f"Slice({len(self)} {'rows' if self.dim == ROWS else 'columns'} of {self.name})"


# --- layers -----------------------------------------------------------------------------------------------


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with its weight transposed."""
    loaded = sys.modules.get("transformers.pytorch_utils")  # where it is not, no module is one of its
    return loaded is not None and isinstance(module, loaded.Conv1D)


def is_served(module: nn.Module, dim: int) -> bool:
    """Whether rows or columns of the layer's weight can train alone."""
    embedding = isinstance(module, nn.Embedding) and dim == ROWS
    return embedding or isinstance(module, nn.Linear) or is_conv1d(module)


def oriented(module: nn.Module) -> Tensor:
    """The layer's weight as (out, in) or (num, features): a view that requires no gradient."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if is_conv1d(module) else weight


class _Sliced(Part):
    """What layers with a slice have in common: `state_dict` is that of the layer without."""

    innermost = True
    weight: Any
    bias: Any
    weight_slice: Slice
    weight_indices: Tensor  # those of weight_slice on the weight's device

    def _values(self) -> nn.Parameter:
        return self.get_parameter("weight_rows" if self.weight_slice.dim == ROWS else "weight_cols")

    @torch.no_grad()
    def _write(self) -> None:
        """Puts the slice's values into the weight."""
        # .data: a backward pass still to come reads the frozen part only.
        oriented(self).data.index_copy_(self.weight_slice.dim, self.weight_indices, self._values().data)

    @torch.no_grad()
    def _read(self) -> None:
        """Takes the slice's values from the weight."""
        self._values().copy_(oriented(self).index_select(self.weight_slice.dim, self.weight_indices))

    def train(self, mode: bool = True) -> Any:
        # Some layers of torch read the weights of others, without their forward, in eval mode.
        self._write()
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._write()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + self._values_name()]

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard puts a part of each parameter here. It gathers the weight anew for backward, without the values
        # that forward has written into it, which would be gradients that are wrong without a sign.
        if is_sharded(value):
            raise ValueError(
                f"{self.weight_slice!r} was installed, and {name} is to be split over processes (fully_shard); "
                "expected a plan without rows= and cols=, or DistributedDataParallel"
            )
        super().__setattr__(name, value)

    def _values_name(self) -> str:
        return self.weight_slice.parameter_name.rpartition(".")[2]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = prefix + self._values_name()
        if own in missing_keys:
            missing_keys.remove(own)
        if prefix + "weight" in state_dict and len(error_msgs) == errors:
            self._read()


class _RowsLinear(_Sliced, nn.Linear):
    weight_rows: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return rows_linear(
            input, self.weight, self.bias, self.weight_indices, self.weight_rows, check_indices=False
        )


class _ColsLinear(_Sliced, nn.Linear):
    weight_cols: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return cols_linear(
            input, self.weight, self.bias, self.weight_indices, self.weight_cols, check_indices=False
        )


class _RowsConv1D(_Sliced):
    weight_rows: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t()
        return rows_linear(x, weight, self.bias, self.weight_indices, self.weight_rows, check_indices=False)


class _ColsConv1D(_Sliced):
    weight_cols: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t()
        return cols_linear(x, weight, self.bias, self.weight_indices, self.weight_cols, check_indices=False)


class _RowsEmbedding(_Sliced, nn.Embedding):
    weight_rows: nn.Parameter
    weight_slots: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return rows_embedding(
            input,
            self.weight,
            self.weight_indices,
            self.weight_rows,
            self.padding_idx,
            slots=self.weight_slots,
            check_indices=False,
        )


_PARTS = (_RowsLinear, _ColsLinear, _RowsConv1D, _ColsConv1D, _RowsEmbedding)


def _part_for(module: nn.Module, dim: int) -> type[_Sliced]:
    if isinstance(module, nn.Embedding):
        return _RowsEmbedding
    if is_conv1d(module):
        return _RowsConv1D if dim == ROWS else _ColsConv1D
    return _RowsLinear if dim == ROWS else _ColsLinear


def rows_of(head: nn.Module) -> TrainableRows | None:
    """The rows of a linear layer that train alone, as `linear_cross_entropy` takes them, or None."""
    if not isinstance(head, _RowsLinear):
        return None
    return TrainableRows(head.weight_slice.indices, head.weight_rows)


def weight_of(head: nn.Linear) -> Tensor:
    """The weight of a linear layer; with columns that train a copy that they are put into, which autograd follows."""
    if not isinstance(head, _ColsLinear):
        return head.weight
    return head.weight.index_copy(COLS, head.weight_indices, head.weight_cols)


# --- in a model -------------------------------------------------------------------------------------------


def install(model: nn.Module, slices: Iterable[Slice]) -> None:
    """Gives each slice a parameter with the values of its rows or columns, and freezes the rest of its weight.

    A weight that several layers share is one parameter in all of them. A slice that unties gives its layer a copy of
    the weight, and sets `tie_word_embeddings` of the configuration to False, so that both are saved.

    Raises `ValueError`, with the model untouched, where a slice does not fit the model, or one is installed already.
    """
    slices = tuple(slices)
    if next(sliced(model), None) is not None:
        raise ValueError("slices.install: model has slices already; expected remove(model) first")
    names: dict[str, list[nn.Module]] = {}
    for piece in slices:
        names[piece.name] = _checked_owners("slices.install", model, piece)
        for module in names[piece.name]:
            if "forward" in vars(module):
                raise ValueError(
                    f"slices.install: {piece.name!r} belongs to a {type(module).__name__} whose forward was replaced "
                    "on the module itself; expected the class's own"
                )
    for piece in slices:
        if piece.untie:
            _untie(model, names[piece.name][0])
    for piece in slices:
        _install(piece, names[piece.name])


@torch.no_grad()
def _install(piece: Slice, owners: list[nn.Module]) -> None:
    weight = oriented(owners[0])
    indices = piece.indices.to(weight.device)
    values = nn.Parameter(weight.index_select(piece.dim, indices).contiguous())
    owners[0].get_parameter("weight").requires_grad_(False).grad = None
    for module in owners:
        part = _part_for(module, piece.dim)
        add_part(module, part)
        vars(module)["weight_slice"] = piece
        module.register_parameter("weight_rows" if piece.dim == ROWS else "weight_cols", values)
        module.register_buffer("weight_indices", indices, persistent=False)
        if part is _RowsEmbedding:
            module.register_buffer("weight_slots", make_slots(indices, weight.shape[0]), persistent=False)


def remove(model: nn.Module) -> None:
    """Puts the values of all slices into the weights, which stay frozen, and gives the layers their own forward back.

    A head that was untied stays so. Does nothing where there are no slices.
    """
    for module in list(sliced(model)):
        with torch.no_grad():
            index, values = module.weight_indices, module._values()
            oriented(module).index_copy_(module.weight_slice.dim, index, values)
        delattr(module, module._values_name())
        del module.weight_indices, module.weight_slice
        if isinstance(module, _RowsEmbedding):
            del module.weight_slots
        for part in _PARTS:
            remove_part(module, part)


def sliced(model: nn.Module) -> Iterator[_Sliced]:
    """The layers of a model in which a slice is installed."""
    return (module for module in model.modules() if isinstance(module, _Sliced))


def write_values(model: nn.Module) -> None:
    """Puts the values of all installed slices into their weights, for who reads those directly."""
    for module in sliced(model):
        module._write()


def read_values(model: nn.Module) -> None:
    """Takes the values of all installed slices from their weights, after those were written directly."""
    for module in sliced(model):
        module._read()


def is_installed(model: nn.Module, slices: Iterable[Slice]) -> bool:
    """Whether these slices, and no others, are installed."""
    return {module.weight_slice for module in sliced(model)} == set(slices)


def own_names(model: nn.Module) -> set[str]:
    """Names of the parameters that installed slices have, which the model without them has not."""
    return {
        f"{path}.{module._values_name()}" if path else module._values_name()
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _Sliced)
    }


def region(model: nn.Module, piece: Slice, op: str = "slices") -> tuple[nn.Module, Tensor]:
    """The layer of a slice and its weight, rows first; `ValueError` in the name of `op` where it does not fit."""
    module = _checked_owners(op, model, piece)[0]
    return module, oriented(module)


def own_weight(model: nn.Module, piece: Slice) -> Tensor:
    """The weight of a slice, rows first, to be written to; untied before, where the slice asks for it."""
    module, weight = region(model, piece)
    shared = sum(
        parameter is module.weight for _, parameter in model.named_parameters(remove_duplicate=False)
    )
    if piece.untie and shared > 1:
        _untie(model, module)
        return oriented(module)
    return weight


def without(model: nn.Module, piece: Slice) -> Tensor:
    """A copy of the weight of a slice, as the layer has it, with zeros for the slice."""
    module, _ = region(model, piece)
    copy = module.get_parameter("weight").detach().clone(memory_format=torch.contiguous_format)
    dim = 1 - piece.dim if is_conv1d(module) else piece.dim
    return copy.index_fill_(dim, piece.indices.to(copy.device), 0)


def numel(model: nn.Module, piece: Slice) -> int:
    """Number of elements of a slice."""
    return len(piece) * region(model, piece)[1].shape[1 - piece.dim]


def _owners(model: nn.Module, piece: Slice) -> list[nn.Module]:
    """The layers that hold the weight: those that share it, too, unless the slice unties; the named one first."""
    path, _, last = piece.name.rpartition(".")
    try:
        named = model.get_submodule(path)
        weight = named.get_parameter("weight")
    except AttributeError:
        return []
    if last != "weight":
        return []
    if piece.untie:
        return [named]
    others = (
        module
        for module in model.modules()
        if module is not named and any(p is weight for p in module.parameters(recurse=False))
    )
    return [named, *others]


def _checked_owners(op: str, model: nn.Module, piece: Slice) -> list[nn.Module]:
    owners = _owners(model, piece)
    if not owners:
        raise ValueError(f"{op}: model has no parameter {piece.name!r}; expected the model of the plan")
    for module in owners:
        if not is_served(module, piece.dim):
            raise ValueError(
                f"{op}: {piece.name!r} belongs to a {type(module).__name__}; expected "
                + ("an embedding or a linear layer" if piece.dim == ROWS else "a linear layer")
            )
    weight = oriented(owners[0])
    size = weight.shape[piece.dim]
    if weight.is_meta:
        raise ValueError(f"{op}: {piece.name!r} is on the meta device; expected a weight with values")
    if not len(piece) or not 0 <= int(piece.indices.min()) <= int(piece.indices.max()) < size:
        raise ValueError(
            f"{op}: indices of {piece.name!r} are not in [0, {size}); expected those of the layer"
        )
    return owners


@torch.no_grad()
def _untie(model: nn.Module, head: nn.Module) -> None:
    head.register_parameter("weight", nn.Parameter(head.get_parameter("weight").clone(), requires_grad=False))
    config: Any = getattr(model, "config", None)
    if config is not None:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for each in (config, text):
            if getattr(each, "tie_word_embeddings", False):
                each.tie_word_embeddings = False
