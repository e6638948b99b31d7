"""The table of a plan: what trains, module by module, what a step of it costs, and what is needlessly dear.

    print(plan)
    print(plan.table(tokens=4096, rows=8))

Costs are those of `superfine._step_costs`: forward and backward on fake tensors. Where that fails, they show as "?",
with the reason below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from superfine._step_costs import Inputs, StepCosts, Unpredictable, example_inputs, step_costs
from superfine.selectors import depths_below_top, layer_stack, layer_stacks, match

if TYPE_CHECKING:
    from superfine.select import Plan

__all__ = ["PlanCosts", "block_finder", "plan_costs", "plan_table"]

_HEADER = (
    "block", "trains", "parameters", "trained", "size", "GFLOPs", "activations", "gradients", "AdamW state"
)  # fmt: skip


@dataclass(frozen=True)
class PlanCosts:
    """Predicted costs of one step: of the plan, and of full fine-tuning; None where unknown, `reason` says why."""

    plan: StepCosts | None
    full: StepCosts | None
    inputs: Inputs | None
    reason: str = ""


@dataclass(frozen=True)
class _Row:
    block: str
    number: int | None  # position in a layer stack, so that equal neighbours can share a line
    tensors: int
    trained_tensors: int
    elements: int
    trained: int
    nbytes: int
    trained_bytes: int
    state_bytes: int


def plan_table(
    plan: Plan,
    *,
    tokens: int = 1024,
    rows: int = 8,
    inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> str:
    """The table as text.

    One line for each block, or run of equal blocks: parameters, and for a step of `tokens` tokens in `rows`
    sequences the FLOPs (a multiply-add is two), bytes that autograd saves, and bytes of gradients and of AdamW's two
    moments in the parameter's dtype. Then totals beside full fine-tuning's, and warnings. `inputs`, a mapping of
    keyword arguments or a tuple of positional ones, takes the place of made-up inputs; only shapes count.

    Raises `ValueError` unless `tokens` and `rows` are positive, and `tokens` not smaller.
    """
    costs = plan_costs(plan, tokens=tokens, rows=rows, inputs=inputs)
    blocks = [row for row in _rows(plan) if row.tensors or _runs(row.block, costs.plan)]
    lines: list[tuple[str, ...]] = [_HEADER]
    for _, run in groupby(blocks, key=_alike):
        lines.append(_line(list(run), costs.plan))
    known = {row.block for row in blocks}
    if costs.plan is not None:
        rest = [place for place in costs.plan.flops | costs.plan.activations if place not in known]
        flops, saved = (sum(of[p] for p in rest) for of in (costs.plan.flops, costs.plan.activations))
        if flops or saved:
            lines.append(("loss and the rest", "-", "", "", "", _giga(flops), _size(saved), "", ""))
    total = _Row("total", None, 0, 0, *(sum(getattr(row, name) for row in blocks) for name in _SUMS))
    own = _slice_names(plan)
    full = [p for name, p in plan.model.named_parameters() if _can_train(p) and name not in own]
    full_bytes = sum(p.nbytes for p in full)
    summary = [
        _totals("total", total.elements, total.trained, total.nbytes, costs.plan, total.trained_bytes),
        _totals(
            "full fine-tuning",
            total.elements,
            sum(p.numel() for p in full),
            total.nbytes,
            costs.full,
            full_bytes,
        ),
    ]
    share = 100 * plan.num_trainable / max(total.elements, 1)
    pieces = [repr(piece) for piece in plan.slices]
    chosen = [*plan.selectors, *(pieces if len(pieces) < 4 else [f"{len(pieces)} slices"])]
    closing = [
        f"trains {share:.2f}% ({', '.join(chosen)})",
        f"gradients    {_size(total.trained_bytes)}, full fine-tuning {_size(full_bytes)}",
        f"AdamW state  {_size(2 * total.trained_bytes)}, full fine-tuning {_size(2 * full_bytes)}",
    ]
    waiting = plan.num_trainable - total.trained
    if waiting:
        closing.append(
            f"without {waiting:,} elements of rows and columns, which superfine.prepare gives parameters"
        )
    return "\n".join([*_aligned(lines, summary), *closing, *_notes(plan, costs), *_warnings(plan, costs)])


def plan_costs(
    plan: Plan,
    *,
    tokens: int = 1024,
    rows: int = 8,
    inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> PlanCosts:
    """What `plan_table` shows, as numbers; by place, "" for what lies outside all blocks."""
    if not (isinstance(tokens, int) and isinstance(rows, int) and 1 <= rows <= tokens):
        raise ValueError(f"plan.table: tokens is {tokens!r}, rows is {rows!r}; expected 1 <= rows <= tokens")
    model = plan.model
    trained = {name for name, _ in plan.named_parameters()}
    places = _places(model)
    reasons: list[str] = []
    for candidate in _candidates(model, tokens, rows, inputs, reasons):
        try:
            costs = step_costs(model, trained, candidate, places)
        except Unpredictable as error:
            reasons.append(str(error))
            continue
        try:
            whole = _unprepared(model)
            everything = {name for name, parameter in whole.named_parameters() if _can_train(parameter)}
            full = step_costs(whole, everything, candidate, _places(whole))
        except Unpredictable as error:
            return PlanCosts(costs, None, candidate, str(error))
        return PlanCosts(costs, full, candidate)
    return PlanCosts(None, None, None, reasons[0])


def _is_prepared(model: nn.Module) -> bool:
    return any({"_superfine_prepared", "weight_slice"} & vars(module).keys() for module in model.modules())


def _unprepared(model: nn.Module) -> nn.Module:
    """A prepared model as it was before, for a look: its frozen part runs without a graph, and could not say what
    training all of it costs. Tensors are shared but for weights with slices; any other model is returned itself.

    Raises `Unpredictable` where it cannot be copied or restored.
    """
    if not _is_prepared(model):
        return model
    from superfine import slices
    from superfine.prepare import restore

    written = {id(layer.weight) for layer in slices.sliced(model)}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        copied = copy.deepcopy(model, {key: tensor for key, tensor in shared.items() if key not in written})
        if "_superfine_prepared" in vars(copied):
            restore(copied)
        slices.remove(copied)
    except Exception as error:  # hooks and attributes of any kind, and what others make of classes
        raise Unpredictable(f"{type(error).__name__}: {error}") from error
    return copied


def _candidates(model: nn.Module, tokens: int, rows: int, given: Any, reasons: list[str]) -> Iterable[Inputs]:
    """Inputs to try, best first: a model may take neither mask nor labels."""
    if given is not None:
        args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        yield Inputs(args, kwargs, f"the inputs given, of shapes {shapes}")
        return
    try:
        inputs = example_inputs(model, tokens, rows)
    except Unpredictable as error:
        reasons.append(str(error))
        return
    yield inputs
    for without in ({"attention_mask"}, {"attention_mask", "labels"}) if inputs.kwargs else ():
        kwargs = {key: value for key, value in inputs.kwargs.items() if key not in without}
        yield Inputs((), kwargs, inputs.text)


def _can_train(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.element_size() > 1


# --- the rows ---------------------------------------------------------------------------------------------

_SUMS = ("elements", "trained", "nbytes", "trained_bytes", "state_bytes")


def block_finder(model: nn.Module) -> Callable[[str], str]:
    """From a parameter's name to its line of the table: the widest module that holds no layer stack."""
    ancestors = {""}
    for stack in layer_stacks(model):
        parts = stack.path.split(".")
        ancestors.update(".".join(parts[: length + 1]) for length in range(len(parts)))

    def place(name: str) -> str:
        parts = name.split(".")
        for length in range(1, len(parts)):
            if ".".join(parts[:length]) not in ancestors:
                return ".".join(parts[:length])
        return name

    return place


def _places(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are lines of the table, also those whose parameters are tied to another's."""
    place = block_finder(model)
    found = dict.fromkeys(place(name) for name, _ in model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    return {path: modules[path] for path in found if path in modules}


def _rows(plan: Plan) -> list[_Row]:
    place = block_finder(plan.model)
    trained = dict(plan.named_parameters())
    counted = dict(plan.model.named_parameters())
    own = _slice_names(plan)
    members: dict[str, list[str]] = {}
    for name, _ in plan.model.named_parameters(remove_duplicate=False):
        members.setdefault(place(name), []).extend([name] if name in counted else [])
    rows = []
    for block, inside in members.items():
        tail = block.rpartition(".")[2]
        chosen = [trained[name] for name in inside if name in trained]
        rows.append(
            _Row(
                block,
                int(tail) if tail.isdecimal() else None,
                len(inside),
                len(chosen),
                sum(counted[name].numel() for name in inside if name not in own),
                sum(p.numel() for p in chosen),
                sum(_nbytes(counted[name]) for name in inside if name not in own),
                sum(_nbytes(p) for p in chosen),
                2 * sum(_nbytes(p) for p in chosen),
            )
        )
    return rows


def _slice_names(plan: Plan) -> set[str]:
    """Names of the parameters that rows and columns have of their own, beside the weights that they are part of."""
    return {piece.parameter_name for piece in plan.slices}


def _runs(block: str, costs: StepCosts | None) -> bool:
    """Whether a module without parameters of its own has a share in the costs."""
    return costs is not None and bool(costs.flops[block] or costs.activations[block])


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _alike(row: _Row) -> tuple[object, ...]:
    """Neighbouring blocks of a stack with equal keys share a line."""
    path = row.block if row.number is None else row.block.rpartition(".")[0]
    return (path, row.number is None, row.tensors, row.trained_tensors, row.elements, row.trained, row.nbytes)


def _line(run: list[_Row], costs: StepCosts | None) -> tuple[str, ...]:
    first, last = run[0], run[-1]
    block = first.block if first is last else f"{first.block}-{last.number}"
    if not first.tensors:
        trains = "tied"
    elif first.trained_tensors in (0, first.tensors):
        trains = "yes" if first.trained_tensors else "-"
    else:
        trains = f"{first.trained_tensors} of {first.tensors} tensors"
    elements, trained, nbytes, gradients, state = (sum(getattr(row, name) for row in run) for name in _SUMS)
    flops = saved = "?"
    if costs is not None:
        flops = _giga(sum(costs.flops[row.block] for row in run))
        saved = _size(sum(costs.activations[row.block] for row in run))
    return (
        block, trains, f"{elements:,}", f"{trained:,}", _size(nbytes), flops, saved, _size(gradients), _size(state)
    )  # fmt: skip


def _totals(
    name: str, elements: int, trained: int, nbytes: int, costs: StepCosts | None, gradients: int
) -> tuple[str, ...]:
    flops = "?" if costs is None else _giga(costs.flops.total())
    saved = "?" if costs is None else _size(costs.activations.total())
    return (
        name, "", f"{elements:,}", f"{trained:,}", _size(nbytes), flops, saved, _size(gradients), _size(2 * gradients)
    )  # fmt: skip


def _aligned(lines: list[tuple[str, ...]], summary: list[tuple[str, ...]]) -> list[str]:
    every = [*lines, *summary]
    widths = [max(len(line[column]) for line in every) for column in range(len(_HEADER))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in every
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [text[0], rule, *text[1 : len(lines)], rule, *text[len(lines) :]]


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.1f}" if flops >= 1e8 else f"{flops / 1e9:.2g}"


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"


# --- what is said below -----------------------------------------------------------------------------------


def _notes(plan: Plan, costs: PlanCosts) -> list[str]:
    if costs.plan is None or costs.inputs is None:
        return [f"GFLOPs and activations are unknown: {costs.reason}"]
    notes = [f"GFLOPs and activations: forward and backward of {costs.inputs.text}"]
    if _is_prepared(plan.model):
        notes.append("of the model as it was prepared; full fine-tuning of the model before that")
    if costs.full is None:
        notes.append(f"full fine-tuning is unknown: {costs.reason}")
    if costs.plan.uncounted:
        notes.append(f"GFLOPs leave out what is unknown of {', '.join(costs.plan.uncounted)}")
    return notes


def _warnings(plan: Plan, costs: PlanCosts) -> list[str]:
    """What of the costs is spent where nothing trains, and a cheaper selection with its costs."""
    model, ours, full = plan.model, costs.plan, costs.full
    if ours is None or full is None or not full.activations.total() or _is_prepared(model):
        return []  # a prepared model cannot say what another selection would cost
    try:
        blocks = layer_stack(model).blocks
    except ValueError:
        return []
    names = {name for name, _ in plan.named_parameters()}
    chosen = {id(parameter) for parameter in plan.parameters()}
    aliases = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in chosen]
    training = [n for n, block in enumerate(blocks) if any(name.startswith(f"{block}.") for name in names)]
    embeddings = sorted(_match(model, "embeddings") & set(aliases))
    first = training[0] if training and not embeddings else 0
    frozen = [n for n in range(first, len(blocks)) if n not in training]
    tied = [name for name in aliases if name not in names and name not in embeddings]
    kept = ours.activations.total()
    share = f"{_share(kept, full.activations.total())} of full fine-tuning's activations are kept"
    number = max(1, len(training))
    if embeddings and frozen:
        if tied:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            other = next(name for name in plan.names if parameters[name] is parameters[tied[0]])
            why = f"{tied[0]} is tied to {other}, which trains with it and comes first"
        else:
            why = f"{embeddings[0]} comes first"
        advice = "select it only for new tokens, or single rows of it"
        cheaper = _cheaper(plan, costs, f"last:{number}")
        return [
            f"! {why}: gradients flow back through all {len(blocks)} blocks, and {share}; {advice}{cheaper}"
        ]
    if len(training) > 2 and all(parameter.ndim < 2 for parameter in plan.parameters()):
        kind = "norms" if names <= _match(model, "norms") else "biases"
        cheaper = _cheaper(plan, costs, f"{kind}&last:2")
        return [
            f"! only vectors train: little state, but gradients flow through every block, and {share}{cheaper}"
        ]
    if training and len(frozen) >= number:
        saved = sum(ours.activations[blocks[n]] for n in frozen)
        flops = sum(ours.flops[blocks[n]] for n in frozen)
        return [
            f"! gradients flow through {len(frozen)} frozen blocks above block {training[0]}, which take "
            f"{_share(saved, kept)} of the activations and {_share(flops, ours.flops.total())} of the FLOPs"
            f"{_cheaper(plan, costs, f'last:{number}')}"
        ]
    return []


def _cheaper(plan: Plan, costs: PlanCosts, selector: str) -> str:
    """`; cheaper: 'last:2' (12.1 MB, 3.4 GFLOPs)` where it is, with what trains of the plan above the layer stack."""
    model = plan.model
    below_top = depths_below_top(model)
    above = {name for name, _ in plan.named_parameters() if below_top(name) == 0}
    chosen = _match(model, selector)
    if costs.plan is None or costs.inputs is None or not chosen:
        return ""
    try:
        other = step_costs(model, chosen | above, costs.inputs, _places(model))
    except Unpredictable:
        return ""
    if other.activations.total() >= costs.plan.activations.total():
        return ""
    return (
        f"; cheaper: {selector!r} ({_size(other.activations.total())}, {_giga(other.flops.total())} GFLOPs)"
    )


def _match(model: nn.Module, selector: str) -> set[str]:
    try:
        return match(model, selector)
    except ValueError:
        return set()


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.0f}%"
