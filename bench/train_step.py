"""Whole training steps: forward, loss, backward, clipping, AdamW and zero_grad, on models with random weights.

Every provider trains the same model on the same batch, with the same selection and parameter groups, without dropout.
Weights are put back before each call, so that every step is the same one. A call returns the seconds of its parts.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from superfine.losses import CrossEntropyLoss
from superfine.select import Plan, select
from torch import Tensor, nn
from torch.profiler import record_function

from superfine_kernels._library import Cost

from .harness import PARTS, Case, Provider, UnavailableError
from .peers import compiled, require

LR, WEIGHT_DECAY, MAX_GRAD_NORM, CLASSES = 1e-3, 0.01, 1.0, 3
# Of the losses and gradient norms of three steps: sums in another order, and autocast's products rounded to 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Step = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Size:
    """Of a model and of its batch of ``rows`` times ``tokens``."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int


SMALL = Size(layers=4, hidden=256, heads=4, vocabulary=8192, rows=8, tokens=128)
MEDIUM = Size(layers=6, hidden=384, heads=6, vocabulary=16384, rows=8, tokens=128)
BASE = {
    "bert": Size(layers=12, hidden=768, heads=12, vocabulary=30522, rows=16, tokens=512),
    "gpt2": Size(layers=12, hidden=768, heads=12, vocabulary=50257, rows=8, tokens=1024),
    "llama": Size(layers=16, hidden=1024, heads=16, vocabulary=32000, rows=8, tokens=1024),
}

#: What trains, in the language of ``superfine.select``.
SELECTIONS = {"full": "all", "last:2": "last:2", "head": "head", "norms": "norms", "LoRA": "*lora_*"}
QUICK = (("bert", "full"), ("bert", "last:2"), ("gpt2", "last:2"))


@dataclass
class Inputs:
    """A model whose selection is made, a batch, what a step overwrites, and what the check expects."""

    model: nn.Module
    plan: Plan
    trained: list[Tensor]
    pristine: list[Tensor]
    batch: dict[str, Tensor]
    dtype: torch.dtype
    # Held by the steps that use them: what is built and dropped again takes its moments with it.
    optimizers: weakref.WeakSet[torch.optim.Optimizer] = field(default_factory=weakref.WeakSet)
    outcome: tuple[Tensor, ...] = ()  # loss and gradient norm of the last step
    expected: list[list[float]] = field(default_factory=list)  # of the first steps


def _model(family: str, size: Size, selection: str) -> nn.Module:
    transformers = require("transformers", "transformers")
    common: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.tokens,
    }
    model: nn.Module
    if family == "bert":
        common |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
        config = transformers.BertConfig(**common, intermediate_size=4 * size.hidden)
        model, attention = transformers.BertForSequenceClassification(config), ["query", "value"]
    elif family == "gpt2":
        common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        common |= {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
        tied = selection != "head"  # a tied head cannot train alone
        config = transformers.GPT2Config(**common, tie_word_embeddings=tied)
        model, attention = transformers.GPT2LMHeadModel(config), ["c_attn"]
    else:
        common |= {"num_key_value_heads": size.heads // 2, "use_cache": False}
        config = transformers.LlamaConfig(**common, intermediate_size=8 * size.hidden // 3 // 64 * 64)
        model, attention = transformers.LlamaForCausalLM(config), ["q_proj", "v_proj"]
    if selection == "LoRA":
        peft = require("peft", "peft")
        # Random B, as after some steps: with zeros there, A has no gradient.
        options = {"fan_in_fan_out": family == "gpt2", "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=attention, **options))
    return model.train()


def _inputs(
    device: torch.device, *, family: str, size: Size, selection: str, dtype: torch.dtype
) -> Inputs | UnavailableError:
    """The reason instead where the model cannot be made: every provider then says so."""
    torch.compiler.reset()
    torch.manual_seed(0)
    try:
        model = _model(family, size, selection).to(device)
    except UnavailableError as reason:
        return reason
    plan = select(model, SELECTIONS[selection])
    ids = torch.randint(size.vocabulary, (size.rows, size.tokens))
    labels = torch.randint(CLASSES, (size.rows,)) if family == "bert" else ids
    trained: list[Tensor] = list(plan.parameters())
    batch = {"input_ids": ids.to(device), "labels": labels.to(device)}
    inputs = Inputs(model, plan, trained, [p.detach().clone() for p in trained], batch, torch.float32)
    step = _build(inputs, optimizer=partial(_torch_adamw, foreach=False), loss=_model_loss)
    for _ in range(3):
        step()
        inputs.expected.append(_values(inputs))
    inputs.dtype = dtype
    _before(inputs)
    return inputs


@torch.no_grad()
def _before(inputs: Inputs) -> None:
    torch._foreach_copy_(inputs.trained, inputs.pristine)


def _check(inputs: Inputs, call: Step) -> float:
    """Errors of the losses and gradient norms of a run's first steps, relative to the tolerance."""
    _before(inputs)
    for optimizer in inputs.optimizers:
        optimizer.state.clear()
    errors = []
    for expected in inputs.expected:
        call()
        errors += [abs(a - b) / abs(b) for a, b in zip(_values(inputs), expected, strict=True)]
    return float(torch.tensor(errors).max()) / TOLERANCE[inputs.dtype]  # NaN if any is


def _values(inputs: Inputs) -> list[float]:
    return [value.item() for value in inputs.outcome]


def _step(inputs: Inputs, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> Step:
    """One training step. On a GPU the parts lie between events: nothing waits for the device before the end."""
    inputs.optimizers.add(optimizer)
    device = inputs.trained[0].device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=inputs.dtype == torch.bfloat16)

    clip: Callable[[float], Tensor] = partial(torch.nn.utils.clip_grad_norm_, inputs.trained)
    if device.type == "cpu":  # ours leaves the scaling to the step; on a GPU it waits for the norm
        clip = getattr(optimizer, "clip_grad_norm_", clip)

    def step() -> dict[str, float]:
        marks = [_now(device)]
        with record_function("forward"), autocast:
            loss = loss_of()
        marks.append(_now(device))
        with record_function("backward"):
            loss.backward()
        marks.append(_now(device))
        with record_function("optimizer"):
            norm = clip(MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        marks.append(_now(device))
        inputs.outcome = loss.detach(), norm
        return dict(zip(PARTS, map(_seconds, marks, marks[1:]), strict=True))

    return step


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end) / 1000)


def _model_loss(inputs: Inputs, model: Callable[..., Any]) -> Tensor:
    return model(**inputs.batch).loss


def _superfine_loss(inputs: Inputs, model: Callable[..., Any]) -> Tensor:
    """The same loss from the logits, which nobody needs afterwards: their gradient takes their place."""
    logits, labels = model(input_ids=inputs.batch["input_ids"]).logits, inputs.batch["labels"]
    if labels.ndim == 2:  # each position predicts the next token
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return CrossEntropyLoss(inplace=True)(logits.view(-1, logits.shape[-1]), labels.view(-1))


def _torch_adamw(plan: Plan, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(plan.param_groups(WEIGHT_DECAY), lr=LR, **options)


def _superfine_adamw(plan: Plan) -> torch.optim.Optimizer:
    return plan.optimizer("adamw", lr=LR, weight_decay=WEIGHT_DECAY)


def _build(
    inputs: Inputs | UnavailableError,
    *,
    optimizer: Callable[[Plan], torch.optim.Optimizer],
    loss: Callable[[Inputs, Callable[..., Any]], Tensor],
    compile: bool = False,
) -> Step:
    if isinstance(inputs, UnavailableError):
        raise inputs
    model = torch.compile(inputs.model) if compile else inputs.model
    step = _step(inputs, optimizer(inputs.plan), partial(loss, inputs, model))
    return compiled(step) if compile else step


_eager = partial(_build, optimizer=_torch_adamw, loss=_model_loss)  # as most people write it
_fused = partial(_build, optimizer=partial(_torch_adamw, fused=True), loss=_model_loss)
_superfine = partial(_build, optimizer=_superfine_adamw, loss=_superfine_loss)

PROVIDERS = (
    Provider("eager", _eager),
    Provider("torch fused", _fused),
    Provider("torch fused, compiled", partial(_fused, compile=True), in_quick=False),
    Provider("superfine", _superfine),
    Provider("superfine, compiled", partial(_superfine, compile=True), in_quick=False),
)


def _cost(family: str, size: Size, selection: str) -> Cost:
    """The usual estimate: for each weight and token 2 FLOPs forward, 2 for the gradient of its input where something
    before it trains, and 2 for its own where it trains, so 6 in all for full training. The products of attention are
    left out, the one token that a pooler sees counts as all. Bytes are no floor of a whole step: 0.
    """
    try:
        with torch.device("meta"):
            model = _model(family, size, selection)
    except UnavailableError:
        return Cost(0, 0)
    select(model, SELECTIONS[selection])
    return Cost(bytes=0, flops=flops_of_token(model) * size.rows * size.tokens)


def flops_of_token(model: nn.Module) -> int:
    """As `_cost` counts them, of the parameters that train now."""
    flops, trains_before = 0, False
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ in ("Linear", "Conv1D") and isinstance(weight, Tensor):
            flops += 2 * weight.numel() * (1 + trains_before + weight.requires_grad)
        trains_before |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return flops


def _memory(size: Size) -> int:
    """Bytes of weights, their copy and gradients, moments for each provider, activations, and logits four times."""
    weights = 2 * size.vocabulary * size.hidden + 12 * size.layers * size.hidden**2
    token = size.layers * (24 * size.hidden + size.heads * size.tokens) + 4 * size.vocabulary
    return 4 * (weights * (3 + 2 * len(PROVIDERS)) + token * size.rows * size.tokens)


def _case(
    family: str,
    size: Size,
    selection: str,
    dtype: torch.dtype = torch.float32,
    in_quick: bool = False,
    device: str = "",
) -> Case:
    name = str(dtype).removeprefix("torch.")
    return Case(
        op="train_step",
        name=f"{family} {size.layers}x{size.hidden}, {selection}",
        dtype=name,
        work=f"one step on {size.rows}x{size.tokens} tokens: forward, loss, backward, clipping, AdamW, zero_grad",
        cost=partial(_cost, family, size, selection),
        traffic="",
        memory=_memory(size),
        inputs=partial(_inputs, family=family, size=size, selection=selection, dtype=dtype),
        before=_before,
        check=_check,
        providers=PROVIDERS,
        in_quick=in_quick,
        gemm=name,
        parts=True,
        device=device,
    )


def cases() -> list[Case]:
    """Return the cases: real base sizes for GPUs, sizes whose steps take a second at most for CPUs."""
    everything = [(family, selection) for family in BASE for selection in SELECTIONS]
    gpu = [
        _case(family, BASE[family], selection, dtype, (family, selection) in QUICK, "cuda")
        for family, selection in everything
        for dtype in (torch.float32, torch.bfloat16)
    ]
    quick = [_case(family, SMALL, selection, in_quick=True, device="cpu") for family, selection in QUICK]
    return gpu + quick + [_case(family, MEDIUM, selection, device="cpu") for family, selection in everything]
