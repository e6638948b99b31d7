"""Several deltas on one base: switched, averaged, and taken off again to the base's own bits.

deltas = Deltas(model)                     # holds the base
deltas.add("tweets", "tweets.safetensors")
deltas.add("news", "news.safetensors")
deltas.switch("news")
deltas.average({"tweets": 0.5, "news": 0.5})
deltas.switch(None)                        # the base
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from superfine import slices
from superfine.delta import DeltaInfo, _read, _targets, base_hash
from superfine.select import uncompiled

__all__ = ["Deltas"]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A tensor of a delta: where it goes, its values, and the base's there; of a slice a part of `target`."""

    name: str  # of the parameter or buffer that it is, or is a part of
    target: Tensor
    values: Tensor
    base: Tensor
    dim: int = 0
    indices: Tensor | None = None

    def write(self, values: Tensor) -> None:
        if self.indices is None:
            self.target.copy_(values)
        else:
            device = self.target.device
            self.target.index_copy_(self.dim, self.indices.to(device), values.to(device))

    def add_to(self, total: Tensor, weight: float) -> None:
        """Adds weight * (values - base) to a wide copy of the whole tensor."""
        difference = weight * (self.values.to(total.dtype) - self.base.to(total.dtype))
        if self.indices is None:
            total += difference
        else:
            total.index_add_(self.dim, self.indices, difference)


class Deltas:
    """Deltas of one base model, of which the model holds one, a mixture, or none.

    Kept on the CPU: the deltas' tensors, and the base's values of what they touch. So two classifiers whose last
    layers and heads were trained cost twice these layers, not a second model.

    Between calls the model is not to be trained, or the base would be lost. `requires_grad` stays as it is.

    Attributes:
        active: the name of the delta in the model; None for the base; "average" after `average`.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Deltas: model is {type(model).__name__}; expected a torch.nn.Module")
        self.model = uncompiled(model)
        self.active: str | None = None
        self._pieces: dict[str, list[_Piece]] = {}
        self._touched: list[_Piece] = []  # where the model differs from the base

    @property
    def names(self) -> tuple[str, ...]:
        """Of the deltas, in the order they were added."""
        return tuple(self._pieces)

    def add(self, name: str, path: str | os.PathLike[str]) -> DeltaInfo:
        """Reads a delta and keeps it under `name`; the model does not change.

        Raises `FileNotFoundError`, or `ValueError` for a name in use or a file that `load_delta` would refuse: one
        that is damaged, of another architecture, or of another base. And for slices that untie a head, which no
        switch could tie again.
        """
        if not isinstance(name, str) or not name or name in self._pieces or name == "average":
            raise ValueError(f"Deltas: name is {name!r}; expected a new one, not 'average'")
        info, tensors = _read(path)
        untied = [piece.name for piece in info.slices if piece.untie]
        if untied:
            raise ValueError(
                f"Deltas: {name!r} unties {untied[0]!r}; expected slices that leave weights tied"
            )
        targets = _targets(self.model, info, tensors)
        with self._base_in_the_model():
            found = base_hash(self.model, info.names, info.slices)
            if found != info.base_hash:
                raise ValueError(
                    f"Deltas: {name!r} expects base {info.base_hash}, got {found}: it was trained on another base, "
                    "or the model was trained since"
                )
            known = {p.name: p.base for pieces in self._pieces.values() for p in pieces if p.indices is None}
            pieces = []
            for key, target in targets.items():
                base = known[key] if key in known else target.detach().to("cpu", copy=True)
                pieces.append(_Piece(key, target, tensors[key], base))
            for piece in info.slices:
                weight = slices.own_weight(self.model, piece)
                base = weight.detach().index_select(piece.dim, piece.indices.to(weight.device)).cpu()
                values = tensors[piece.parameter_name]
                pieces.append(_Piece(piece.name, weight, values, base, piece.dim, piece.indices))
        self._pieces[name] = pieces
        return info

    def switch(self, name: str | None) -> None:
        """Puts the delta called `name` into the model, or with None the base, in the bits they were saved in."""
        self._require([] if name is None else [name])
        with self._writing():
            self._to_base()
            self._touched = [] if name is None else self._pieces[name]
            for piece in self._touched:
                piece.write(piece.values)
        self.active = name

    def average(self, weights: Mapping[str, float]) -> None:
        """Puts base + sum of weight * (delta - base) into the model (Ilharco et al. 2023).

        Weights that add up to 1 average models (Wortsman et al. 2022); a single one below 1 goes part of the way from
        the base; negative ones take away. A tensor that a delta does not hold counts as the base's for it. Sums are
        float64, rounded once; buffers that are not floating-point come from the delta of the largest weight.

        Raises `ValueError` for an unknown name, no weights, or one that is not finite.
        """
        self._require(weights)
        if not weights or not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(f"Deltas: weights are {dict(weights)!r}; expected names with finite numbers")
        places: dict[str, list[tuple[_Piece, float]]] = {}
        for name in sorted(weights, key=lambda name: weights[name]):
            for piece in self._pieces[name]:
                places.setdefault(piece.name, []).append((piece, weights[name]))
        with self._writing():
            self._to_base()
            self._touched = [piece for name in weights for piece in self._pieces[name]]
            for parts in places.values():
                heaviest = parts[-1][0]
                if not (heaviest.values.is_floating_point() or heaviest.values.is_complex()):
                    heaviest.write(heaviest.values)
                    continue
                # Slices see a transposed weight the other way round than who trains all of it: each part adds to
                # the total as it sees it.
                target = heaviest.target
                total = target.detach().to("cpu", torch.promote_types(target.dtype, torch.float64), copy=True)
                for piece, weight in parts:
                    same = piece.target.stride() == target.stride()
                    piece.add_to(total if same else total.t(), weight)
                target.copy_(total.to(target.dtype))
        self.active = "average"

    def remove(self, name: str) -> None:
        """Forgets a delta; where the model holds it, or an average, the base comes back first."""
        self._require([name])
        if self.active in (name, "average"):
            self.switch(None)
        del self._pieces[name]

    @property
    def nbytes(self) -> int:
        """Of all that is kept beside the model."""
        kept = {
            id(t): t.nbytes for pieces in self._pieces.values() for p in pieces for t in (p.values, p.base)
        }
        return sum(kept.values())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Where slices of the model's own are installed, they take part in what is read and written."""
        installed = any("weight_slice" in vars(module) for module in self.model.modules())
        with torch.no_grad():
            if installed:
                slices.write_values(self.model)
            yield
            if installed:
                slices.read_values(self.model)

    def _to_base(self) -> None:
        for piece in self._touched:
            piece.write(piece.base)

    @contextmanager
    def _base_in_the_model(self) -> Iterator[None]:
        """For a moment; then what was there, bit for bit."""
        with self._writing():
            before = [piece.target.detach().clone() for piece in self._touched]
            self._to_base()
            try:
                yield
            finally:
                for piece, value in zip(self._touched, before, strict=True):
                    piece.target.copy_(value)

    def _require(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._pieces]
        if unknown:
            known = ", ".join(map(repr, self._pieces)) or "none was added"
            raise ValueError(f"Deltas: there is no delta {unknown[0]!r}; expected one of: {known}")
