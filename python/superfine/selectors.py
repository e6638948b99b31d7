"""The selector language: from words such as ``last:2`` to parameter names.

============== ===========================================================================================
``all``        every parameter
``head``       what reads the backbone: the parameters outside the base model of a Hugging Face model, and the
               base model's pooler where it has one; in a plain module the last child that has parameters
``last:N``     the last N blocks of the layer stack; ``first:N`` the first N
``layers:...`` blocks by number from 0, as ``layers:3,5-7``
``norms``      weights and biases of normalisation layers
``biases``     every bias, those of norms included
``embeddings`` embedding tables (token, position, segment), not T5's relative attention bias
``adapters``   what PEFT added for its active adapters, modules it trains whole included; ``adapters:NAME`` of one
``re:...``     a regular expression, found anywhere in a parameter's name
anything else  a glob on parameter names, as ``*.attention.*`` (``*`` also crosses dots)
``A&B``        what both select, as ``adapters&last:2``
============== ===========================================================================================

The *layer stack* is the longest ``nn.ModuleList`` of repeated blocks or ``nn.Sequential`` of one class of
block, counting only blocks that have parameters, and not one nested in another stack's blocks. In a Hugging
Face model it is looked for in the base model. An encoder-decoder (T5, BART) has two stacks: numbers count the
*decoder*'s blocks there, and the encoder is selected by a pattern such as ``encoder.block.11.*``.

In a PEFT model words mean what they mean in the model that it wraps, adapters within a block being part of it: so
``last:2`` trains the base's weights there too, and ``adapters&last:2`` does not. What does not run is never selected:
adapters that are not active, and the originals of modules that PEFT trains whole.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from superfine._swap import unmixed

__all__ = ["Stack", "backbone_path", "depths_below_top", "layer_stack", "layer_stacks", "match"]

WORDS = ("all", "head", "norms", "biases", "embeddings", "adapters")
PREFIXES = ("last", "first", "layers", "adapters", "re")

# Norms have no common base class, and models bring their own (LlamaRMSNorm, T5LayerNorm): go by name.
_NORM_CLASS = re.compile(r"Norm(?!al(?!iz))")  # BatchNorm1d, Normalization; not Normal


@dataclass(frozen=True)
class Stack:
    """Repeated blocks of a model: the container's path, each block's path, the class of the first."""

    path: str
    blocks: tuple[str, ...]
    block: type[nn.Module]
    leaves: bool  # the blocks are single layers such as Linear


def match(model: nn.Module, selector: str) -> set[str]:
    """Names of the parameters that ``selector`` selects, a shared parameter under each name it matches.

    Raises ``TypeError`` for a selector that is no string, and ``ValueError`` for one that is malformed,
    counts layers that the model does not have, or matches nothing; the message offers near misses.
    """
    if not isinstance(selector, str):
        raise TypeError(f"select: selector is {selector!r}, a {type(selector).__name__}; expected a string")
    if "&" in selector:
        parts = [match(model, part.strip()) for part in selector.split("&")]
        both = set.intersection(*parts)
        if not both:
            raise ValueError(
                f"select: the parts of selector {selector!r} have no parameter in common; expected some"
            )
        return both
    idle = _idle(model)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in idle]
    word, _, argument = (part.strip() for part in selector.partition(":"))
    if selector == "all":
        found = set(names)
    elif selector == "head":
        found = _head(model, names)
    elif selector == "norms":
        found = _owned_by(model, lambda path, module: _NORM_CLASS.search(type(module).__name__) is not None)
    elif selector == "biases":
        found = {name for name in names if _is_bias(name)}
    elif selector == "embeddings":
        found = _embeddings(model, names)
    elif selector == "adapters" or (word == "adapters" and ":" in selector):
        found = _adapters(model, argument)
    elif word in ("last", "first", "layers") and ":" in selector:
        stack = layer_stack(model)
        blocks = [stack.blocks[number] for number in _numbers(selector, word, argument, stack)]
        found = {name for name in names if any(_under(name, block) for block in blocks)}
    elif word == "re" and ":" in selector:
        try:
            pattern = re.compile(selector[len("re:") :])
        except re.error as error:
            raise ValueError(
                f"select: selector is {selector!r}; expected a regular expression ({error})"
            ) from None
        found = {name for name in names if pattern.search(name)}
    else:
        found = {name for name in names if fnmatchcase(name, selector)}
    found -= idle
    if not found:
        raise ValueError(
            f"select: selector {selector!r} matches no parameter{_near_misses(model, names, selector)}"
        )
    return found


def backbone_path(model: nn.Module) -> str | None:
    """Path of a Hugging Face model's base model inside it; None for a plain module or a base model itself."""
    wrapped = _wrapped(model)
    if wrapped is not None:
        path = backbone_path(wrapped[1])
        return None if path is None else _join(wrapped[0], path)
    base = getattr(model, "base_model", None)
    if not isinstance(getattr(model, "base_model_prefix", None), str) or base is model:
        return None
    return next((path for path, module in model.named_modules() if module is base), None)


def layer_stacks(model: nn.Module) -> list[Stack]:
    """Every stack of repeated blocks, in model order, without those inside another stack's blocks."""
    stacks = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        blocks = [(_join(path, name), child) for name, child in children if _has_parameters(child)]
        classes = {unmixed(child) for _, child in blocks}
        # Hybrids (attention and state-space blocks in turn) repeat a few classes in one ModuleList.
        repeats = len(classes) == 1 or (isinstance(module, nn.ModuleList) and 2 * len(classes) <= len(blocks))
        if blocks and repeats:
            first = blocks[0][1]
            leaves = next(first.children(), None) is None
            stacks.append(Stack(path, tuple(block for block, _ in blocks), unmixed(first), leaves))
    return [
        stack
        for stack in stacks
        if not any(
            outer is not stack and len(outer.blocks) > 1 and _under(stack.path, outer.path)
            for outer in stacks
        )
    ]


def layer_stack(model: nn.Module) -> Stack:
    """The stack that ``last:``, ``first:`` and ``layers:`` count; ``ValueError`` unless there is just one."""
    backbone = backbone_path(model)
    stacks = layer_stacks(model)
    if backbone is not None:
        stacks = [stack for stack in stacks if _under(stack.path, backbone)]
    if not stacks:
        inside = f" in {backbone}" if backbone else ""
        tops = [f"'{name}.*'" for name, child in model.named_children() if _has_parameters(child)]
        raise ValueError(
            f"select: {type(model).__name__} has no stack of repeated layers to count{inside}: no nn.ModuleList of "
            "one or a few classes of block, no nn.Sequential of one. Expected a pattern on parameter names instead "
            f"of last:, first: or layers:{', such as ' + ' or '.join(tops[:3]) if tops else ''}"
        )
    decoders = [stack for stack in stacks if "decoder" in stack.path.split(".")]
    if decoders and any("encoder" in stack.path.split(".") for stack in stacks):
        stacks = decoders
    longest = max(stacks, key=lambda stack: len(stack.blocks))
    equals = [stack for stack in stacks if stack.block is longest.block]
    if len(equals) > 1 and not longest.leaves:  # a ResNet's stages, the two towers of CLIP: no honest guess
        listed = ", ".join(f"{stack.path} ({len(stack.blocks)})" for stack in equals)
        raise ValueError(
            f"select: {type(model).__name__} has several layer stacks: {listed}; expected a pattern such as "
            f"'{equals[-1].blocks[-1]}.*' instead of last:, first: or layers:"
        )
    return longest


def depths_below_top(model: nn.Module) -> Callable[[str], int]:
    """From a parameter's name to how many steps it lies below what comes after its stack of n blocks.

    0 after the stack, n - k in block k, n + 1 before it; an embedding counts as before wherever it is registered. A
    parameter between two stacks counts as after the first. Raises `ValueError` where there is no layer stack.
    """
    counted = layer_stack(model)
    # The other stacks of an encoder-decoder; not adapters, projections or whatever else makes a short list.
    stacks = [stack for stack in layer_stacks(model) if stack.block is counted.block or not stack.leaves]
    stacks = [stack for stack in stacks if stack.path == counted.path or len(stack.blocks) > 1]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    begins = {
        stack.path: next(i for i, n in enumerate(names) if _under(n, stack.blocks[0])) for stack in stacks
    }
    first = min(begins.values())
    position = {name: i for i, name in enumerate(names)}
    lowest = 1 + max(len(stack.blocks) for stack in stacks)
    embeddings = _embeddings(model, names)

    def below(name: str) -> int:
        for stack in stacks:
            for number, block in enumerate(stack.blocks):
                if _under(name, block):
                    return len(stack.blocks) - number
        return lowest if name in embeddings or position.get(name, len(names)) < first else 0

    return below


def _numbers(selector: str, word: str, argument: str, stack: Stack) -> list[int]:
    """Block numbers of ``last:N``, ``first:N`` or ``layers:3,5-7``, checked against the stack."""
    count = len(stack.blocks)
    has = f"the model has {count} layer{'s' if count > 1 else ''}, {stack.blocks[0]} to {stack.blocks[-1]}"
    if word in ("last", "first"):
        if not re.fullmatch(r"[0-9]+", argument) or not 1 <= int(argument) <= count:
            raise ValueError(
                f"select: selector is {selector!r}; expected {word}:N with N from 1 to {count} ({has})"
            )
        chosen = int(argument)
        return list(range(count - chosen, count) if word == "last" else range(chosen))
    numbers: list[int] = []
    for item in argument.split(","):
        bounds = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", item)
        low, high = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (0, -1)
        if low > high or high >= count:
            raise ValueError(
                f"select: selector is {selector!r}; expected numbers and ranges from 0 to {count - 1}, "
                f"as layers:0,2-3 ({has}; last:N counts from the end)"
            )
        numbers += range(low, high + 1)
    return numbers


def _wrapped(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of what a PEFT model wraps; None for any other model."""
    get_base_model = getattr(model, "get_base_model", None)
    if not callable(get_base_model) or not hasattr(model, "peft_config"):
        return None
    inner = get_base_model()
    path = next((path for path, module in model.named_modules() if path and module is inner), None)
    return None if path is None else (path, inner)


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """Of each parameter that belongs to an adapter of PEFT's: its name, the adapter's, whether that is active."""
    for path, module in model.named_modules(remove_duplicate=False):
        layers = getattr(module, "adapter_layer_names", ())
        if path == "" and _wrapped(model) is not None:
            layers = (*layers, "prompt_encoder")  # prompt tuning has no layers, and keeps its prompts there
        if not isinstance(layers, tuple) or not layers:
            continue
        active = getattr(module, "active_adapters", ())
        active = (active,) if isinstance(active, str) else active
        for name, _ in module.named_parameters(remove_duplicate=False):
            for layer in dict.fromkeys(layers):
                if name.startswith(f"{layer}."):
                    adapter = name.removeprefix(f"{layer}.").partition(".")[0]
                    yield _join(path, name), adapter, not callable(active) and adapter in active


def _adapters(model: nn.Module, wanted: str) -> set[str]:
    layers = list(_adapter_layers(model))
    if not layers:
        raise ValueError(f"select: {type(model).__name__} has no adapters; expected a model of PEFT's")
    if wanted and not any(active for _, adapter, active in layers if adapter == wanted):
        known = sorted({adapter for _, adapter, active in layers if active})
        raise ValueError(
            f"select: adapter is {wanted!r}; expected an active one ({', '.join(known) or 'there is none'}): "
            "PEFT's set_adapter activates others"
        )
    return {name for name, adapter, active in layers if active and wanted in ("", adapter)}


def _idle(model: nn.Module) -> set[str]:
    """Parameters that PEFT keeps and does not run: inactive adapters, originals of modules that it trains whole."""
    idle = {name for name, _, active in _adapter_layers(model) if not active}
    for path, module in model.named_modules(remove_duplicate=False):
        copies, original = getattr(module, "modules_to_save", None), getattr(module, "original_module", None)
        if not isinstance(copies, nn.ModuleDict) or not isinstance(original, nn.Module):
            continue
        if any(adapter in copies for adapter in getattr(module, "active_adapters", ())):
            prefix = _join(path, "original_module")
            idle |= {_join(prefix, name) for name, _ in original.named_parameters(remove_duplicate=False)}
    return idle


def _head(model: nn.Module, names: list[str]) -> set[str]:
    wrapped = _wrapped(model)
    if wrapped is not None:
        prefix, inner = wrapped
        inside = [name.removeprefix(prefix + ".") for name in names if _under(name, prefix)]
        return {_join(prefix, name) for name in _head(inner, inside)}
    backbone = backbone_path(model)
    if backbone is not None:
        outside = {name for name in names if not _under(name, backbone)}
        pooler = _join(backbone, "pooler")  # where a model builds one, its head reads it
        return outside and outside | {name for name in names if _under(name, pooler)}
    if isinstance(getattr(model, "base_model_prefix", None), str):
        # T5ForConditionalGeneration and T5ForQuestionAnswering are their own base models; a bare BertModel ends in
        # its pooler.
        get_output = getattr(model, "get_output_embeddings", None)
        output = get_output() if callable(get_output) else None
        ends = [path for path, module in model.named_modules() if output is not None and module is output]
        return {name for name in names if any(_under(name, path) for path in (*ends, "pooler", "qa_outputs"))}
    path, module = "", model
    while True:  # a wrapper with one child is not yet a head
        children = [(name, child) for name, child in module.named_children() if _has_parameters(child)]
        own = next(module.parameters(recurse=False), None) is not None
        if not children:
            return {name for name in names if _under(name, path)}
        path, module = _join(path, children[-1][0]), children[-1][1]
        if own or len(children) > 1:
            return {name for name in names if _under(name, path)}


def _embeddings(model: nn.Module, names: list[str]) -> set[str]:
    # Vision models keep positions as bare parameters; T5 keeps an attention bias in an nn.Embedding.
    tables = _owned_by(
        model,
        lambda path, module: isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not _is_bias(path),
    )
    return tables | {name for name in names if "embed" in name.rpartition(".")[2]}


def _owned_by(model: nn.Module, belongs: Callable[[str, nn.Module], bool]) -> set[str]:
    """Names of the parameters held directly by modules for which ``belongs(path, module)`` is true."""
    return {
        _join(path, name)
        for path, module in model.named_modules(remove_duplicate=False)
        if belongs(path, module)
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias") or last.startswith("bias_")  # bias_ih_l0 of an LSTM


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _under(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(path + ".")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _near_misses(model: nn.Module, names: Iterable[str], selector: str) -> str:
    """``; did you mean ...?`` with up to three selectors that would match, or else what there is."""
    _, colon, argument = selector.partition(":")
    words = [f"{known}:{argument}" for known in PREFIXES] if colon else [*WORDS]
    words = [word for word in words if word != selector]  # known, and nothing here is one
    modules = [f"{path}.*" for path, module in model.named_modules() if path and _has_parameters(module)]
    core = selector.strip("*.?").lower()
    containing = [name for name in (*modules, *names) if core and core in name.lower()]
    close = difflib.get_close_matches(selector, [*words, *modules, *names], n=3, cutoff=0.6)
    known = [name for name in close if name in words]
    offered = list(dict.fromkeys([*known, *containing, *close]))[:3]
    if offered:
        return f"; did you mean {' or '.join(repr(name) for name in offered)}?"
    words_listed = ", ".join([*WORDS, *(f"{prefix}:..." for prefix in PREFIXES)])
    tops = ", ".join(f"{name}.*" for name, child in model.named_children() if _has_parameters(child))
    return f"; expected one of {words_listed}, or a glob that matches a parameter" + (
        f" ({tops})" if tops else ""
    )
