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
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from superfine.delta import DeltaInfo, _read, _targets, base_hash
from superfine.select import uncompiled

__all__ = ["Deltas"]


class Deltas:
    """Deltas of one base model, of which the model holds one, a mixture, or none.

    Kept on the CPU: the deltas' tensors, and the base's values of those tensors alone that some delta holds. So two
    classifiers whose last layers and heads were trained cost twice these layers, not a second model.

    Between calls the model is not to be trained, or the base would be lost. `requires_grad` stays as it is.

    Attributes:
        active: the name of the delta in the model; None for the base; "average" after `average`.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Deltas: model is {type(model).__name__}; expected a torch.nn.Module")
        self.model = uncompiled(model)
        self.active: str | None = None
        self._infos: dict[str, DeltaInfo] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._targets: dict[str, Tensor] = {}
        self._base: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the deltas, in the order they were added."""
        return tuple(self._infos)

    def add(self, name: str, path: str | os.PathLike[str]) -> DeltaInfo:
        """Reads a delta and keeps it under `name`; the model does not change.

        Raises `FileNotFoundError`, or `ValueError` for a name in use or a file that `load_delta` would refuse: one
        that is damaged, of another architecture, or of another base.
        """
        if not isinstance(name, str) or not name or name in self._infos or name == "average":
            raise ValueError(f"Deltas: name is {name!r}; expected a new one, not 'average'")
        info, tensors = _read(path)
        targets = _targets(self.model, info, tensors)
        with _On(self, None):
            found = base_hash(self.model, info.names)
            if found != info.base_hash:
                raise ValueError(
                    f"Deltas: {name!r} expects base {info.base_hash}, got {found}: it was trained on another base, "
                    "or the model was trained since"
                )
            for key, target in targets.items():
                if key not in self._base:
                    self._base[key] = target.detach().to("cpu", copy=True)
        self._targets |= targets
        self._infos[name], self._tensors[name] = info, tensors
        return info

    def switch(self, name: str | None) -> None:
        """Puts the delta called `name` into the model, or with None the base, in the bits they were saved in."""
        self._require([] if name is None else [name])
        self._write({} if name is None else self._tensors[name])
        self.active = name

    def average(self, weights: Mapping[str, float]) -> None:
        """Puts base + sum of weight * (delta - base) into the model (Ilharco et al. 2023).

        Weights that add up to 1 average models (Wortsman et al. 2022); a single one below 1 goes part of the way from
        the base; negative ones take away. A tensor that a delta does not hold counts as the base's for it. Sums are
        float64, rounded once; buffers that are not floating-point come from the delta of the largest weight.

        Raises `ValueError` for an unknown name, no weights, or one that is not finite.
        """
        self._require(weights)
        bad = [name for name, weight in weights.items() if not math.isfinite(weight)]
        if not weights or bad:
            raise ValueError(f"Deltas: weights are {dict(weights)!r}; expected names with finite numbers")
        heaviest = max(weights, key=lambda name: weights[name])
        mixed = {}
        for key in dict.fromkeys(key for name in weights for key in self._tensors[name]):
            base = self._base[key]
            if not (base.is_floating_point() or base.is_complex()):
                mixed[key] = self._tensors[heaviest].get(key, base)
                continue
            wide = torch.complex128 if base.is_complex() else torch.float64
            total = base.to(wide)
            for name, weight in weights.items():
                if key in self._tensors[name]:
                    total = total + weight * (self._tensors[name][key].to(wide) - base.to(wide))
            mixed[key] = total.to(base.dtype)
        self._write(mixed)
        self.active = "average"

    def remove(self, name: str) -> None:
        """Forgets a delta; where the model holds it, or an average, the base comes back first."""
        self._require([name])
        if self.active in (name, "average"):
            self.switch(None)
        del self._infos[name], self._tensors[name]
        kept = {key for tensors in self._tensors.values() for key in tensors}
        for key in self._base.keys() - kept:
            del self._base[key], self._targets[key]

    @property
    def nbytes(self) -> int:
        """Of all that is kept beside the model."""
        kept = [*self._base.values(), *(t for tensors in self._tensors.values() for t in tensors.values())]
        return sum(tensor.nbytes for tensor in kept)

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for key, base in self._base.items():
            self._targets[key].copy_(tensors.get(key, base))

    def _require(self, names: Mapping[str, float] | list[str]) -> None:
        unknown = [name for name in names if name not in self._infos]
        if unknown:
            known = ", ".join(map(repr, self._infos)) or "none was added"
            raise ValueError(f"Deltas: there is no delta {unknown[0]!r}; expected one of: {known}")


class _On:
    """The model with another delta for a moment, then as it was, bit for bit."""

    def __init__(self, deltas: Deltas, name: str | None) -> None:
        self.deltas, self.name = deltas, name

    @torch.no_grad()
    def __enter__(self) -> None:
        self.before = {
            key: self.deltas._targets[key].detach().clone()
            for key in self.deltas._base
            if self.deltas.active is not None
        }
        if self.before:
            self.deltas._write({} if self.name is None else self.deltas._tensors[self.name])

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for key, value in self.before.items():
            self.deltas._targets[key].copy_(value)
