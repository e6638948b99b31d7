"""Delta files: what a selection trained, tied to the exact base it was trained on.

A delta is one safetensors file. Tensors: the full values of the trained parameters; of a slice (`superfine.slices`)
its values, as ``lm_head.weight_rows``, and int64 ``lm_head.weight_rows.indices``; and the model's persistent buffers
(BatchNorm's running statistics move in training without being parameters). Metadata, all strings:

================ ========================================================================================
``format``       ``superfine-delta``
``version``      ``2``; ``1``, which knew no slices, is read
``selectors``    JSON list, as they were given to ``select``
``names``        JSON list of the parameters that trained whole, in model order
``slices``       JSON list of ``{"name", "dim", "untie"}``, in model order
``base_hash``    :func:`base_hash` of the model
``content_hash`` SHA-256 over everything else in the file, so that a damaged file is noticed
``versions``     JSON object, library to version
================ ========================================================================================

and whatever the caller put in ``extra``. Nothing is pickled, so a delta from a stranger is safe to read.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from superfine import slices
from superfine._files import atomic_folder, atomic_write
from superfine._processes import refuse_sharded
from superfine.select import Plan, uncompiled
from superfine.slices import Slice

__all__ = ["DeltaInfo", "base_hash", "load_delta", "merge", "save_delta"]

FORMAT = "superfine-delta"
VERSION = "2"
VERSIONS = ("1", VERSION)
INDICES = ".indices"  # beside the values of a slice
RESERVED = ("format", "version", "selectors", "names", "slices", "base_hash", "content_hash", "versions")

# What a tokenizer or processor keeps beside a model's weights; weights and config come from the merged model.
TOKENIZER_FILES = (
    "*token*.json",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*processor_config.json",
)


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta says of itself: trained ``names`` and ``slices``, ``selectors``, ``base_hash``, the saver's
    ``extra``."""

    names: tuple[str, ...]
    selectors: tuple[str, ...]
    base_hash: str
    extra: dict[str, str]
    slices: tuple[Slice, ...] = ()


def save_delta(
    model: nn.Module, plan: Plan, path: str | os.PathLike[str], *, extra: Mapping[str, str] | None = None
) -> None:
    """Write the trained parameters of ``plan`` and the persistent buffers of ``model`` to one safetensors
    file.

    ``model`` is the one that ``select`` planned, or a copy of it. ``extra`` goes into the file's metadata;
    :func:`merge` understands ``model_class`` (a transformers class) and ``config`` (JSON object of config
    values).

    The file appears whole or not at all: on any error the previous one stays. Raises ``ValueError`` when the
    model lacks a planned parameter or ``extra`` uses a reserved key, ``TypeError`` when ``extra`` holds
    anything but strings, and ``OSError`` when the file cannot be written.
    """
    model = uncompiled(model)
    extra = _checked_extra(extra)
    parameters = _parameters(model)
    missing = [name for name in plan.names if name not in parameters]
    if missing:
        raise ValueError(
            f"save_delta: model has no parameter {_listed(missing)}; expected the model of the plan"
        )
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("save_delta: model is on the meta device; expected parameters with values")
    slices.write_values(model)
    tensors = {name: parameters[name] for name in plan.names} | _slice_tensors(model, plan.slices)
    tensors |= _persistent_buffers(model)
    seen: set[int] = set()
    tensors = {name: _own_contiguous(tensor, seen) for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "selectors": json.dumps(list(plan.selectors)),
        "names": json.dumps(list(plan.names)),
        "slices": json.dumps([{"name": p.name, "dim": p.dim, "untie": p.untie} for p in plan.slices]),
        "base_hash": base_hash(model, plan.names, plan.slices),
        "versions": json.dumps(_versions()),
        **extra,
    }
    metadata["content_hash"] = _content_hash(metadata, tensors)
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its way to report a full disk
            raise OSError(f"save_delta: path is {path}; writing it failed: {error}") from error


def load_delta(model: nn.Module, path: str | os.PathLike[str], *, weight: float = 1.0) -> DeltaInfo:
    """Copy a delta's tensors into ``model``, which must hold the base that the delta was trained on.

    ``weight`` between 0 and 1 stops part of the way, at (1 - weight) * base + weight * tuned (WiSE-FT, Wortsman et
    al. 2022), which often keeps more of what the base could do: then the model must hold the base's own values, not
    those of a delta. Of buffers that are no floating-point numbers the delta's are taken.

    Everything is checked before the model is touched: the file, that each tensor exists in the model with the
    same shape and dtype, and that the rest of the model is bit for bit the base (``base_hash``).
    ``requires_grad`` stays as it is.

    Raises ``FileNotFoundError``, or ``ValueError`` for a file that is damaged or no delta, for another base, and
    for a ``weight`` outside [0, 1].
    """
    return _load(model, path, weight, new=())


def _load(model: nn.Module, path: str | os.PathLike[str], weight: float, new: Collection[str]) -> DeltaInfo:
    """As ``load_delta``; parameters ``new`` in the tuned model have no base and are taken whole."""
    if not 0 <= weight <= 1:
        raise ValueError(f"load_delta: weight is {weight}; expected a number from 0 to 1")
    model = uncompiled(model)
    info, tensors = _read(path)
    targets = _targets(model, info, tensors)
    found = base_hash(model, info.names, info.slices)
    if found != info.base_hash:
        raise ValueError(
            f"load_delta: expected base {info.base_hash}, got {found}: this delta belongs to another base. "
            "The parameters outside the delta must have the names, dtypes and values they had in training. "
            "One that the base checkpoint lacks is initialised at random on every load: train it as well, "
            "so that the delta holds it"
        )
    slices.write_values(model)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name] if name in new else _between(target, tensors[name], weight))
        for piece in info.slices:
            whole = slices.own_weight(model, piece)
            indices = piece.indices.to(whole.device)
            values = _between(whole.index_select(piece.dim, indices), tensors[piece.parameter_name], weight)
            whole.index_copy_(piece.dim, indices, values.to(whole.device))
    slices.read_values(model)  # a model with slices of its own holds what was loaded there, too
    return info


def _between(base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """(1 - weight) * base + weight * tuned, rounded once; at 0 and 1 their own bits."""
    if weight == 1 or not (tuned.is_floating_point() or tuned.is_complex()):
        return tuned
    wide = torch.complex128 if tuned.is_complex() else torch.float64
    return torch.lerp(base.detach().to("cpu", wide), tuned.to(wide), weight).to(tuned.dtype)


def merge(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weight: float = 1.0,
) -> None:
    """Write base and delta as an ordinary Hugging Face folder, which ``from_pretrained`` loads.

    ``base``: folder of the pretrained model. ``delta``: file by :func:`save_delta`. ``out``: new or empty
    folder; it appears whole or not at all. Weights are stored in the dtype they were trained in; the base's
    tokenizer files are copied. The model class is the delta's ``model_class``, or else the base's first
    architecture; values in the delta's ``config`` (``num_labels``, ``id2label``, ...) replace those of the
    base. A ``weight`` below 1 stops between base and tuned model, as in :func:`load_delta`; a head that the base does
    not have is taken whole.

    Raises ``FileExistsError`` when ``out`` holds anything, ``FileNotFoundError`` when ``base`` or ``delta``
    is missing, ``ValueError`` when they do not belong together, ``ImportError`` without transformers.
    """
    from superfine import hf

    folder = Path(base)
    if Path(out).exists() and not (Path(out).is_dir() and not any(Path(out).iterdir())):
        raise FileExistsError(f"merge: out is {out}, which exists; expected a new or an empty folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"merge: base is {base}; expected a folder with config.json and weights")
    info, tensors = _read(delta)
    model, new = _load_base(folder, info, tensors)
    _load(model, delta, weight, new)
    with atomic_folder(out) as temporary:
        with hf.quiet():
            model.save_pretrained(temporary)
        for path in sorted(folder.iterdir()):
            known = any(fnmatch.fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES)
            if known and path.is_file() and not (temporary / path.name).exists():
                shutil.copyfile(path, temporary / path.name)


def base_hash(model: nn.Module, trained: Iterable[str], pieces: Iterable[Slice] = ()) -> str:
    """SHA-256 over the parameters outside ``trained``, as hex: what must be equal for a delta to fit.

    For each, sorted by name: name, dtype, shape, then the bytes in C order; the slices ``pieces`` count as zeros. A
    tied parameter counts once, under its first name, and once more under that of a head that a slice unties. Buffers
    do not count: persistent ones travel in the delta, the others follow from the config.
    """
    model = uncompiled(model)
    slices.write_values(model)
    names = set(trained)
    frozen: dict[str, Tensor] = {
        name: parameter for name, parameter in _parameters(model).items() if name not in names
    }
    of_slices = {piece.name: piece for piece in pieces}
    frozen |= {name: model.get_parameter(name) for name in of_slices}
    digest = hashlib.sha256()
    for name in sorted(frozen):
        tensor = frozen[name].detach()
        if name in of_slices:
            tensor = slices.without(model, of_slices[name])
        _update(digest, name, tensor)
    return digest.hexdigest()


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters without those that slices have of their own."""
    refuse_sharded("delta", model)
    own = slices.own_names(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in own}


def _slice_tensors(model: nn.Module, pieces: Iterable[Slice]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        weight = slices.region(model, piece, "save_delta")[1]
        tensors[piece.parameter_name] = weight.index_select(piece.dim, piece.indices.to(weight.device))
        tensors[piece.parameter_name + INDICES] = piece.indices
    return tensors


def _content_hash(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    stated = {key: value for key, value in metadata.items() if key != "content_hash"}
    digest.update(json.dumps(stated, sort_keys=True).encode())
    for name in sorted(tensors):
        _update(digest, name, tensors[name])
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"\n{name} {_dtype(tensor)} {tuple(tensor.shape)}\n".encode())
    # One tensor at a time comes to the CPU, to be read in place; as bytes, for numpy has no bfloat16.
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _read(path: str | os.PathLike[str]) -> tuple[DeltaInfo, dict[str, Tensor]]:
    """A delta file's statements and tensors, checked against its own hash."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_delta: path is {path}; expected a delta file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"load_delta: path is {path}, a safetensors file of another kind; expected a delta"
                )
            if metadata.get("version") not in VERSIONS:
                raise ValueError(
                    f"load_delta: path is {path}, a delta of version {metadata.get('version')}; "
                    f"expected version {' or '.join(VERSIONS)}, or a newer Superfine"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(
            f"load_delta: path is {path}, truncated or no safetensors file ({error}); expected a delta"
        ) from error
    if metadata.get("content_hash") != _content_hash(metadata, tensors):
        raise ValueError(
            f"load_delta: path is {path}, whose content hash differs; expected an undamaged delta"
        )
    names, selectors = (_strings(path, metadata, key) for key in ("names", "selectors"))
    extra = {key: value for key, value in metadata.items() if key not in RESERVED}
    pieces = _slices(path, metadata, tensors)
    return DeltaInfo(names, selectors, metadata.get("base_hash", ""), extra, pieces), tensors


def _slices(
    path: str | os.PathLike[str], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[Slice, ...]:
    """The slices that the metadata states and whose tensors fit them; the file can be a stranger's."""
    try:
        stated = [
            (str(each["name"]), int(each["dim"]), bool(each["untie"]))
            for each in json.loads(metadata.get("slices", "[]"))
        ]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"load_delta: path is {path}, without a list of slices; expected a delta") from None
    pieces: list[Slice] = []
    for name, dim, untie in stated:
        piece = Slice(name, dim, torch.empty(0, dtype=torch.int64), untie)
        values = tensors.get(piece.parameter_name)
        indices = tensors.get(piece.parameter_name + INDICES)
        sound = dim in (0, 1) and values is not None and indices is not None
        if values is not None and indices is not None:
            sound &= indices.dtype == torch.int64 and indices.dim() == 1 and values.dim() == 2
            sound = (
                sound and values.shape[dim] == len(indices) > 0 and bool((indices[1:] > indices[:-1]).all())
            )
        if not sound or indices is None or name in [other.name for other in pieces]:
            raise ValueError(
                f"load_delta: path is {path}, whose slice of {name!r} has no fitting values and indices; "
                "expected a delta"
            )
        pieces.append(Slice(name, dim, indices, untie))
    return tuple(pieces)


def _strings(path: str | os.PathLike[str], metadata: Mapping[str, str], key: str) -> tuple[str, ...]:
    """A JSON list of strings from the metadata; the file can be a stranger's, with a hash that fits."""
    try:
        values = json.loads(metadata.get(key, ""))
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"load_delta: path is {path}, without a list of {key}; expected a delta")
    return tuple(values)


def _targets(model: nn.Module, info: DeltaInfo, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where each tensor goes in the model; ``ValueError`` unless all fit."""
    parameters: dict[str, Tensor] = dict(_parameters(model))
    buffers = _persistent_buffers(model)
    trained = set(info.names)
    of_slices = {piece.parameter_name + end for piece in info.slices for end in ("", INDICES)}
    targets = {
        name: (parameters if name in trained else buffers).get(name)
        for name in dict.fromkeys([*info.names, *tensors])
        if name not in of_slices
    }
    unknown = [name for name, target in targets.items() if target is None]
    if unknown:
        raise ValueError(
            f"load_delta: model has no {_listed(unknown)}, which the delta holds; expected the architecture "
            "that the delta was trained on"
        )
    absent = [name for name in (*info.names, *buffers) if name not in tensors]
    if absent:
        raise ValueError(
            f"load_delta: the delta lacks {_listed(absent)}; expected the architecture it was trained on"
        )
    found = {name: target for name, target in targets.items() if target is not None}
    for what, describe in (("shape", lambda tensor: tuple(tensor.shape)), ("dtype", _dtype)):
        differ = [name for name, target in found.items() if describe(target) != describe(tensors[name])]
        if differ:
            name = differ[0]
            raise ValueError(
                f"load_delta: {what} of {_listed(differ)} is {describe(found[name])} in the model; expected "
                f"{describe(tensors[name])}, as in the delta"
            )
    for piece in info.slices:
        weight, values = slices.region(model, piece, "load_delta")[1], tensors[piece.parameter_name]
        shape = [*weight.shape]
        shape[piece.dim] = len(piece)
        if (*values.shape, values.dtype) != (*shape, weight.dtype):
            raise ValueError(
                f"load_delta: {piece.parameter_name!r} in the delta is {_dtype(values)} {tuple(values.shape)}; "
                f"expected {_dtype(weight)} {tuple(shape)}, as in the model"
            )
    return found


def _load_base(folder: Path, info: DeltaInfo, tensors: Mapping[str, Tensor]) -> tuple[Any, set[str]]:
    """The base as the class, config and dtype that the delta was trained with, and the parameters it lacks."""
    import transformers

    from superfine import hf

    config = hf.load_config(str(folder))
    if "config" in info.extra:
        try:
            settings = dict(json.loads(info.extra["config"]))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"merge: the delta's config is no JSON object ({error}); expected one"
            ) from error
        config = type(config).from_dict({**config.to_dict(), **settings})
    named = [info.extra["model_class"]] if "model_class" in info.extra else list(config.architectures or [])
    model_class = getattr(transformers, named[0], None) if named else None
    if model_class is None:
        raise ValueError(
            f"merge: model class is {named[0] if named else 'not stated'}; expected a transformers class, "
            "stated by the delta's extra['model_class'] or by architectures in the base's config.json"
        )
    of_slices = {piece.parameter_name for piece in info.slices}
    dtypes = {tensors[name].dtype for name in (*info.names, *of_slices)}
    with hf.quiet(), hf._readable("model", str(folder)):
        model, loading = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtypes.pop() if len(dtypes) == 1 else "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for another number of labels: the delta holds the new one
        )
    of_slices |= {name + INDICES for name in of_slices}
    unknown = sorted(tensors.keys() - of_slices - model.state_dict().keys())
    if unknown and "model_class" not in info.extra:
        raise ValueError(
            f"merge: model class is {named[0]}, from the base's config.json, which has no {_listed(unknown)} of the "
            "delta; expected the class that was trained. Save the delta with extra={'model_class': "
            "type(model).__name__}, and 'config' for a new head; or load_delta into that model and save_pretrained it"
        )
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in loading["mismatched_keys"]]
    parameters = dict(model.named_parameters())
    random = sorted({*loading["missing_keys"], *mismatched} & parameters.keys())
    lost = [name for name in random if name not in tensors]
    if lost:
        raise ValueError(
            f"merge: neither base nor delta holds {_listed(lost)}; it was initialised at random and stayed "
            "frozen in training. Expected such parameters in the selection, as with 'head'"
        )
    return model, set(random)


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict(keep_vars=True)  # references, no copies
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _own_contiguous(tensor: Tensor, seen: set[int]) -> Tensor:
    """The tensor on the CPU with memory of its own: safetensors refuses shared storage and views of more."""
    tensor = tensor.detach().cpu().contiguous()
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
        tensor = tensor.clone()
    seen.add(tensor.untyped_storage().data_ptr())
    return tensor


def _checked_extra(extra: Mapping[str, str] | None) -> dict[str, str]:
    for key, value in (extra or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"save_delta: extra[{key!r}] is {type(value).__name__}; expected strings only")
        if key in RESERVED:
            raise ValueError(f"save_delta: extra has the key {key!r}; expected none of {', '.join(RESERVED)}")
    return dict(extra or {})


def _versions() -> dict[str, str]:
    from superfine import __version__

    versions = {"superfine": __version__, "torch": str(torch.__version__)}
    versions["safetensors"] = importlib.metadata.version("safetensors")
    if "transformers" in sys.modules:  # not imported: the model is not one of its
        versions["transformers"] = importlib.metadata.version("transformers")
    return versions


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(names: list[str]) -> str:
    others = len(names) - 1
    return f"'{names[0]}'" + (f" (and {others} other{'s' if others > 1 else ''})" if others else "")
