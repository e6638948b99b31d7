"""From `select(rows={...}, cols={...})` to slices: which layers, and which of their rows or columns."""

from __future__ import annotations

import difflib
import inspect
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from superfine._swap import unmixed
from superfine.slices import Slice, is_conv1d, is_served, oriented
from superfine_kernels.slices import COLS, ROWS

__all__ = ["matching", "resolve"]

_GLOB = re.compile(r"[*?\[]")
_VALUES = "integers, a range or slice, a fraction such as 0.05, 'norm:0.05', 'random:0.05' or 'new:32000'"


def resolve(
    model: nn.Module,
    rows: Mapping[str, Any] | None,
    cols: Mapping[str, Any] | None,
    chosen: Collection[str],
    *,
    tied: str = "both",
    seed: int = 0,
) -> tuple[Slice, ...]:
    """The slices that `rows` and `cols` of `select` describe, in model order; `chosen`: parameters that train whole.

    Keys are names or globs of modules or of their weights, from a dot on: `embed_tokens` is `model.embed_tokens`.
    Of what a glob matches, linear layers and, for rows, embeddings are taken that do not train whole.

    Raises `ValueError` or `TypeError`, whose messages begin with `select:`.
    """
    if tied not in ("both", "head"):
        raise ValueError(f"select: tied is {tied!r}; expected 'both' or 'head'")
    if tied == "head" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        # T5 and its kin scale what the head reads by whether it is tied.
        raise ValueError(
            f"select: tied is 'head' and {type(model).__name__} an encoder-decoder, which computes otherwise once "
            "its head is untied; expected 'both'"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"select: seed is {seed!r}, a {type(seed).__name__}; expected an integer")
    sharing: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        sharing.setdefault(id(parameter), []).append(name)
    found: dict[str, Slice] = {}

    def chosen_of(names: Iterable[str]) -> list[str]:
        return [name for name in names if name in chosen]

    for argument, dim, given in (("rows", ROWS, rows), ("cols", COLS, cols)):
        for key, value in _items(argument, given):
            matched = matching(model, argument, dim, key)
            left = [name for name in matched if not chosen_of(sharing[id(parameters[name])])]
            if _GLOB.search(key) and left:  # it means the layers that do not train whole
                matched = left
            for name in _whole_ties(f"{argument}[{key!r}]", matched, parameters, sharing, tied):
                names = sharing[id(parameters[name])]
                if name in found:
                    raise ValueError(
                        f"select: {argument}[{key!r}] matches {name!r}, of which rows or columns are chosen already; "
                        "expected one slice of a weight"
                    )
                if chosen_of(names):
                    raise ValueError(
                        f"select: {chosen_of(names)[0]!r} is selected whole, and {argument}[{key!r}] chooses a slice "
                        "of it; expected one of the two"
                    )
                module = model.get_submodule(name.rpartition(".")[0])
                what = f"{argument}[{key!r}]"
                _check_layers(model, what, names, dim)
                indices = _indices(what, value, oriented(module), dim, seed ^ zlib.crc32(name.encode()))
                found[name] = Slice(name, dim, indices, untie=tied == "head" and len(names) > 1)
    return tuple(found[name] for name in parameters if name in found)


def _items(argument: str, given: Any) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise TypeError(
            f"select: {argument} is a {type(given).__name__}; expected a dict from names of layers to {_VALUES}"
        )
    for key in given:
        if not isinstance(key, str):
            raise TypeError(f"select: a key of {argument} is {key!r}; expected a string")
    return list(given.items())


def matching(model: nn.Module, argument: str, dim: int, key: str) -> list[str]:
    """Names of the weights that a key matches, one for each name of a shared one."""
    paths = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if is_served(module, dim) and isinstance(getattr(module, "weight", None), nn.Parameter)
    }

    def matches(path: str) -> bool:
        names = (path, f"{path}.weight" if path else "weight")
        return any(fnmatchcase(name, pattern) for name in names for pattern in (key, f"*.{key}"))

    found = [f"{path}.weight" if path else "weight" for path in paths if matches(path)]
    if not found:
        close = [path for path in paths if key.strip("*.").lower() in path.lower()]
        close = close or difflib.get_close_matches(key, paths, n=3)
        hint = f"; did you mean {' or '.join(repr(path) for path in close[:3])}?" if close else ""
        kind = "embedding or linear layer" if dim == ROWS else "linear layer"
        raise ValueError(
            f"select: {argument}[{key!r}] matches no {kind}{hint or '; expected a name or glob of one'}"
        )
    return found


def _whole_ties(
    what: str,
    matched: Iterable[str],
    parameters: Mapping[str, nn.Parameter],
    sharing: Mapping[int, list[str]],
    tied: str,
) -> list[str]:
    """The weights by the name under which they are sliced."""
    names: list[str] = []
    listed = dict.fromkeys(matched)
    for name in listed:
        aliases = sharing[id(parameters[name])]
        if len(aliases) == 1 or (tied == "both" and aliases[0] in listed):
            names.append(aliases[0])
        elif tied == "both":
            raise ValueError(
                f"select: {what} matches {name!r}, which is tied to {aliases[0]!r}; expected that name, for rows "
                "that train on both sides, or tied='head', for a head with a weight of its own"
            )
        elif aliases[0] in listed:
            raise ValueError(
                f"select: {what} matches {aliases[0]!r} and tied is 'head'; expected the name of the head, "
                f"{aliases[-1]!r}"
            )
        else:
            names.append(name)
    return sorted(set(names), key=list(parameters).index)


def _check_layers(model: nn.Module, what: str, names: Iterable[str], dim: int) -> None:
    for name in names:
        path, _, _ = name.rpartition(".")
        module = model.get_submodule(path)
        if "forward" in vars(module):
            raise ValueError(
                f"select: {what} matches {path!r}, whose forward was replaced on the module itself; expected the "
                "class's own"
            )
        if not is_served(module, dim):
            kind = "an embedding or a linear layer" if dim == ROWS else "a linear layer"
            raise ValueError(
                f"select: {what} is a weight of {path!r}, a {type(module).__name__}; expected {kind}"
            )
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"select: {what} matches {path!r}, which nn.MultiheadAttention reads itself; expected a layer "
                "that is called"
            )
        if not _reaches_its_layer(module):
            raise ValueError(
                f"select: {what} matches {path!r}, a {type(module).__name__} with a forward of its own; expected one "
                "that calls super().forward"
            )
        if isinstance(module, nn.Embedding):
            for option in ("max_norm", "scale_grad_by_freq", "sparse"):
                if getattr(module, option):
                    raise ValueError(f"select: {what} is an embedding with {option}; expected one without")


def _reaches_its_layer(module: nn.Module) -> bool:
    """Whether the forward of a subclass of nn.Linear or nn.Embedding goes on to theirs."""
    layer: type[nn.Module] = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    own: Any = unmixed(module).forward
    if is_conv1d(module) or own is layer.forward:
        return True
    # What super() without arguments compiles to.
    return "__class__" in getattr(getattr(inspect.unwrap(own), "__code__", None), "co_freevars", ())


def _indices(what: str, value: Any, weight: Tensor, dim: int, seed: int) -> Tensor:
    """Ascending int64 on the CPU."""
    size = weight.shape[dim]
    kind = "rows" if dim == ROWS else "columns"
    if isinstance(value, float):
        value = f"norm:{value}"
    if isinstance(value, str):
        return _chosen_by(what, value, weight, dim, seed)
    if isinstance(value, slice):
        value = range(size)[value]
    if isinstance(value, Tensor):
        if value.dim() != 1 or value.dtype.is_floating_point or value.dtype in (torch.bool, torch.complex64):
            raise TypeError(
                f"select: {what} is a tensor {value.dtype} {tuple(value.shape)}; expected integers, (n)"
            )
        value = value.tolist()
    if isinstance(value, bool) or not isinstance(value, Iterable):
        raise TypeError(f"select: {what} is {value!r}, a {type(value).__name__}; expected {_VALUES}")
    numbers = list(value)
    wrong = [number for number in numbers if isinstance(number, bool) or not hasattr(number, "__index__")]
    if wrong:
        raise TypeError(f"select: {what} holds {wrong[0]!r}, a {type(wrong[0]).__name__}; expected integers")
    numbers = [int(number) for number in numbers]
    if not numbers:
        raise ValueError(f"select: {what} is empty; expected at least one of {size} {kind}")
    outside = [number for number in numbers if not 0 <= number < size]
    if outside:
        raise ValueError(f"select: {what} holds {outside[0]}; expected {kind} from 0 to {size - 1}")
    if len(set(numbers)) < len(numbers):
        twice = Counter(numbers).most_common(1)[0][0]
        raise ValueError(f"select: {what} holds {twice} more than once; expected each of the {kind} once")
    return torch.tensor(sorted(numbers), dtype=torch.int64)


def _chosen_by(what: str, rule: str, weight: Tensor, dim: int, seed: int) -> Tensor:
    size = weight.shape[dim]
    word, _, argument = rule.partition(":")
    if word == "new":
        if not argument.isdecimal() or not int(argument) < size:
            raise ValueError(
                f"select: {what} is {rule!r}; expected new:N with N below {size}, the number of "
                f"{'rows' if dim == ROWS else 'columns'} (resize_token_embeddings comes first)"
            )
        return torch.arange(int(argument), size)
    try:
        fraction = float(argument)
    except ValueError:
        fraction = float("nan")
    if word not in ("norm", "random") or not 0 < fraction < 1:
        raise ValueError(f"select: {what} is {rule!r}; expected {_VALUES}, with a fraction between 0 and 1")
    count = max(1, round(fraction * size))
    if word == "random":
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    else:
        if weight.is_meta:
            raise ValueError(f"select: {what} is on the meta device; expected a weight with values")
        real = torch.promote_types(weight.dtype, torch.float32)
        norms = torch.linalg.vector_norm(weight, dim=1 - dim, dtype=real)
        order = norms.cpu().argsort(descending=True, stable=True)
    return order[:count].sort().values
