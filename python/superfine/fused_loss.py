"""Hugging Face models whose losses Superfine computes: language models without their logits, and classifiers.

A part (`_swap`) of the model's class computes the loss, and one of its head's can keep quiet. No closure or bound
method holds on to the model, so copies, pickles and compiled models are what they would be without.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from superfine._swap import Part, add_part, remove_part, unmixed
from superfine.slices import rows_of, weight_of
from superfine_kernels import cross_entropy, linear_cross_entropy
from superfine_kernels._library import reject

__all__ = ["FusedLoss", "use_fused_loss"]

# Of a loss of a few tokens: other orders of summation; 8 and 11 bits of the logits; a model's own loss is float32.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")


def use_fused_loss(model: nn.Module, *, logits: bool | None = None) -> FusedLoss:
    """Lets a language model compute its loss from hidden states and head, without logits; a classifier by one pass.

    A forward with `labels` in training mode then holds no logits, and its output has none (`output.logits` is None).
    Where logits are asked for, the model makes them, with gradients, and the loss is `cross_entropy` of them. Without
    labels, and within `generate`, nothing changes.

    Served are causal and masked language models and encoder-decoders with a linear head (`linear_cross_entropy`,
    with the scale or cap of the logits that the configuration states), and classifiers of sequences and tokens with a
    single label (`cross_entropy`), which always return their logits. Regression and several labels stay as they are.

    `num_items_in_batch` and `shift_labels` are honoured, so `transformers.Trainer` works as before; where a model
    ignores `num_items_in_batch` (BERT), steps with accumulated gradients now are what one large batch gives.
    `state_dict()`, `save_pretrained`, `copy.deepcopy`, pickle and `torch.compile` work as ever.

    Args:
        model: a Hugging Face model. A few tokens are sent through it, both ways.
        logits: whether a forward with labels returns logits: None for in eval mode only, as `Trainer` needs for
            predictions and metrics. The argument `output_logits` of a forward goes over it.

    Returns:
        What takes it back: `.remove()`.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: neither a classifier nor a model with a linear head (without hooks), or not one of tokens; the
            loss is another one; the model changes its logits in a way that the configuration does not state, or adds
            a bias to them that is not the head's, whatever it holds (BART, ESM).
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        reject("use_fused_loss", "model", type(model).__name__, "a Hugging Face model", TypeError)
    if "_fused_loss" in vars(model) or "forward" in vars(model):
        raise ValueError("use_fused_loss: model.forward is replaced already; expected the class's own")
    if model.main_input_name != "input_ids":
        reject("use_fused_loss", "the model's input", model.main_input_name, "input_ids")
    if getattr(model, "loss_type", None) in _CLASSIFIERS:
        state: _Loss = _Classifier(logits, tokens=model.loss_type == "ForTokenClassification")
    else:
        head = model.get_output_embeddings()
        linear = isinstance(head, nn.Linear) and unmixed(head) is nn.Linear
        if not linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
            reject("use_fused_loss", "the model's head", type(head).__name__, "torch.nn.Linear without hooks")
        inside = _look_between_head_and_loss(model, head)
        shifts = hasattr(model, "prepare_decoder_input_ids_from_labels")
        if inside is None and model.config.is_encoder_decoder and not shifts:  # M2M100
            wanted = "one with prepare_decoder_input_ids_from_labels"
            reject("use_fused_loss", "the encoder-decoder", type(model).__name__, wanted)
        state = _LanguageModel(logits, head, inside, _transform(model))
    _check(model, state)
    state.install(model)
    return FusedLoss(model)


class FusedLoss:
    """A model with `use_fused_loss`; `remove()` makes it what it was. For a copy of it: `FusedLoss(copy)`."""

    def __init__(self, model: nn.Module) -> None:
        if "_fused_loss" not in vars(model):
            reject("FusedLoss", "model", type(model).__name__, "a model with use_fused_loss")
        self._model = model

    def remove(self) -> None:
        """Takes everything back; again, does nothing."""
        state = vars(self._model).get("_fused_loss")
        if state is not None:
            state.uninstall(self._model)


# --- what a model computes its loss by --------------------------------------------------------------------


class _Loss:
    """Of one model: kept as its attribute `_fused_loss`."""

    def __init__(self, logits: bool | None) -> None:
        self.logits = logits
        self.positional: tuple[str, ...] = ()  # names of the arguments that forward takes by position
        self.without_cache = False  # the model returns no past_key_values where it sees labels

    def install(self, model: Any) -> None:
        signature = inspect.signature(unmixed(model).forward)
        positional = [name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.positional = tuple(positional[1:])
        add_part(model, _Fused)
        vars(model)["_fused_loss"] = self

    def uninstall(self, model: Any) -> None:
        remove_part(model, _Fused)
        del vars(model)["_fused_loss"]

    def output(self, model: Any, forward: Callable[..., Any], arguments: dict[str, Any], logits: bool) -> Any:
        """The model's output for arguments with labels."""
        raise NotImplementedError

    def take_labels(self, arguments: dict[str, Any]) -> Tensor:
        """Removes the labels, and what the model itself does without where it sees labels."""
        if self.without_cache:
            arguments["use_cache"] = False
        labels: Tensor = arguments.pop("labels")
        return labels


class _LanguageModel(_Loss):
    def __init__(
        self, logits: bool | None, head: nn.Linear, inside: str | None, transform: dict[str, Any]
    ) -> None:
        super().__init__(logits)
        self.head = head
        self.inside = inside  # the loss that forward calls as loss_function; None: it makes one itself
        self.transform = transform  # between head and loss, as linear_cross_entropy takes it
        self.quiet = False  # within a forward that needs no logits
        self.hidden: Tensor | None = None  # what the head was given there

    def install(self, model: Any) -> None:
        super().install(model)
        add_part(self.head, _Head)
        vars(self.head)["_fused_loss"] = self

    def uninstall(self, model: Any) -> None:
        super().uninstall(model)
        remove_part(self.head, _Head)
        del vars(self.head)["_fused_loss"]

    def output(self, model: Any, forward: Callable[..., Any], arguments: dict[str, Any], logits: bool) -> Any:
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "use_fused_loss: the model is a replica of torch.nn.DataParallel, whose threads share one state; "
                "expected DistributedDataParallel, or remove() before"
            )
        if model.get_output_embeddings() is not self.head:
            raise RuntimeError(
                "use_fused_loss: the model's head is another one than when it was called; expected remove() before "
                "the head is resized, wrapped or replaced, and use_fused_loss afterwards"
            )
        options = {}
        if self.inside is None:
            options = {
                name: arguments.pop(name)
                for name in ("num_items_in_batch", "ignore_index", "shift_labels")
                if name in arguments
            }
            labels = self.take_labels(arguments)
            decoder = ("decoder_input_ids", "decoder_inputs_embeds")
            if model.config.is_encoder_decoder and all(arguments.get(name) is None for name in decoder):
                arguments["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        if not logits and (self.head._forward_hooks or self.head._forward_pre_hooks):
            raise RuntimeError(
                "use_fused_loss: the model's head has hooks, which see no logits; expected a head without hooks, or "
                "output_logits=True"
            )
        self.quiet = not logits
        try:
            output = forward(**arguments)
            loss = None
            if self.inside is None:
                scores = output[0] if isinstance(output, tuple) else output.logits
                loss = self.loss(scores, labels, **options)
        finally:
            self.quiet, self.hidden = False, None
        return _with(output, loss, logits)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As ForCausalLMLoss, where position i predicts label i + 1, or ForMaskedLMLoss."""
        if shift_labels is not None:
            labels = shift_labels
        elif self.inside == "ForCausalLMLoss":
            labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        scores = self.hidden if self.quiet else logits
        # A bias added to the stand-in, which has one class, would have made it as wide as itself.
        if scores is None or (self.quiet and logits.shape[-1] != 1):
            raise RuntimeError(
                "use_fused_loss: the loss was computed from other logits than the head's of this forward; "
                "expected one forward at a time, and nothing added to the logits"
            )
        if scores.shape[:-1] != labels.shape:
            raise ValueError(
                f"use_fused_loss: labels is of shape {tuple(labels.shape)}; expected {tuple(scores.shape[:-1])}, "
                "a label for each position with logits"
            )
        labels = labels.to(scores.device)
        if not self.quiet:
            return _loss_of_logits(logits, labels, ignore_index, num_items_in_batch)
        return linear_cross_entropy(
            scores,
            weight_of(self.head),
            labels,
            linear_bias=self.head.bias,
            rows=rows_of(self.head),
            ignore_index=ignore_index,
            num_items=num_items_in_batch,
            **self.transform,
        )


class _Classifier(_Loss):
    def __init__(self, logits: bool | None, tokens: bool) -> None:
        super().__init__(logits)
        self.tokens = tokens  # a class for each, not for the sequence

    def output(self, model: Any, forward: Callable[..., Any], arguments: dict[str, Any], logits: bool) -> Any:
        labels, config = arguments["labels"], model.config
        whole = not labels.dtype.is_floating_point
        if config.problem_type is None and config.num_labels > 1 and whole and not self.tokens:
            config.problem_type = "single_label_classification"  # what the model's own forward concludes, too
        num_items = arguments.pop("num_items_in_batch", None)
        if not self.tokens and config.problem_type != "single_label_classification":
            return forward(**arguments)
        self.take_labels(arguments)
        output = forward(**arguments)
        scores = output[0] if isinstance(output, tuple) else output.logits
        return _with(output, _loss_of_logits(scores, labels.to(scores.device), -100, num_items), logits=True)


def _loss_of_logits(
    logits: Tensor, labels: Tensor, ignore_index: int, num_items: Tensor | int | None
) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    return cross_entropy(flat, labels.reshape(-1), ignore_index=ignore_index, num_items=num_items)


def _with(output: Any, loss: Tensor | None, logits: bool) -> Any:
    """The output with a loss, unless it has one, and without the stand-in for logits."""
    if isinstance(output, tuple):  # return_dict=False: (loss, logits, ...)
        loss, rest = (output[0], output[1:]) if loss is None else (loss, output)
        return (loss, rest[0] if logits else None, *rest[1:])
    # A new one: an output keeps under its key what is set to None as an attribute.
    fields = {name: value for name, value in output.items() if logits or name != "logits"}
    if loss is not None:
        fields = {"loss": loss, **fields}
    return type(output)(**fields)


# --- classes ----------------------------------------------------------------------------------------------


class _Head(Part):
    """A linear head that, within a forward that needs no logits, keeps its input in place of them."""

    _fused_loss: _LanguageModel

    def forward(self, input: Tensor) -> Any:
        if not self._fused_loss.quiet:
            return super().forward(input)
        self._fused_loss.hidden = input
        return input.new_zeros(()).expand(*input.shape[:-1], 1)  # so that scaling or casting it costs nothing


class _Fused(Part):
    """A model whose forward with labels is that of its `_fused_loss`."""

    _fused_loss: _Loss

    def forward(self, *args: Any, output_logits: bool | None = None, **kwargs: Any) -> Any:
        fused = self._fused_loss
        named = zip(fused.positional, args)  # noqa: B905 (torch 2.9 compiles strict=False as if it were True)
        arguments = {**dict(named), **kwargs}
        # Without labels, or with arguments given twice, or too many: let the model say so.
        if arguments.get("labels") is None or len(arguments) < len(args) + len(kwargs):
            return super().forward(*args, **kwargs)
        logits = fused.logits if output_logits is None else output_logits
        logits = not self.training if logits is None else logits
        return fused.output(self, super().forward, arguments, logits)

    @property
    def loss_function(self) -> Any:
        fused = self._fused_loss
        return fused.loss if isinstance(fused, _LanguageModel) else super().loss_function  # type: ignore[misc]


# --- checks: what is between head and loss ----------------------------------------------------------------


def _transform(model: Any) -> dict[str, Any]:
    """softcap * tanh(scale * x / softcap), as the configuration states it; what it does not state is left out."""
    config = model.config.get_text_config()

    def stated(name: str) -> float | None:
        value = getattr(config, name, None)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value else None

    found = {}
    softcap = stated("final_logit_softcapping")  # Gemma
    if softcap is not None:
        found["softcap"] = float(softcap)
    # Cohere, Falcon-H1; Granite divides.
    scale = stated("logit_scale") or stated("lm_head_multiplier") or 1 / (stated("logits_scaling") or 1)
    if scale != 1:
        found["scale"] = float(scale)
    return found


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; every module is then what it was, as some may have been so before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _sample(model: Any, device: torch.device) -> dict[str, Tensor]:
    tokens = torch.arange(4, device=device)[None] % model.config.get_text_config().vocab_size
    return {"input_ids": tokens, "labels": tokens}


@torch.no_grad()
def _look_between_head_and_loss(model: Any, head: nn.Linear) -> str | None:
    """Name of the loss that forward calls; ValueError where logits change otherwise than the configuration states."""
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

    # Large ones, for caps to be seen: a random model's own lie where a cap changes little.
    probe = torch.linspace(-100, 100, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
    called = False
    own, before = model.loss_function, vars(model).get("_loss_function")

    def listen(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal called
        called = True
        return own(*args, **kwargs)

    handle = head.register_forward_hook(lambda module, inputs, output: probe.expand_as(output))
    model.loss_function = listen
    try:
        with in_eval_mode(model):
            output = model(**_sample(model, head.weight.device))
    finally:
        handle.remove()
        del vars(model)["_loss_function"]
        if before is not None:
            model.loss_function = before
    if output.loss is None:
        reject("use_fused_loss", "the loss for input_ids and labels", None, "a language model's")
    name = getattr(own, "__name__", repr(own))
    if called and own not in (ForCausalLMLoss, ForMaskedLMLoss):
        reject("use_fused_loss", "the model's loss", name, "ForCausalLMLoss or ForMaskedLMLoss")
    stated = _transform(model)
    expected = probe.double() * stated.get("scale", 1.0)
    if "softcap" in stated:
        expected = stated["softcap"] * torch.tanh(expected / stated["softcap"])
    found, tolerance = output.logits.double(), _TOLERANCE.get(head.weight.dtype, 5e-2)
    whole = found.shape[-1:] == expected.shape
    if not whole or not torch.allclose(found, expected.expand_as(found), rtol=tolerance, atol=tolerance):
        raise ValueError(
            "use_fused_loss: logits are changed between head and loss otherwise than the configuration states "
            f"({stated or 'nothing'}); expected a model that changes nothing, or scales and caps"
        )
    return name if called else None


@torch.no_grad()
def _check(model: Any, state: _Loss) -> None:
    """That both losses of a few tokens are equal."""
    parameter = next(model.parameters())
    inputs, problem = _sample(model, parameter.device), None
    if isinstance(state, _Classifier):
        problem = model.config.problem_type
        single = model.config.num_labels > 1 and problem in (None, "single_label_classification")
        if not (state.tokens or single):
            return
        inputs["labels"] = torch.zeros_like(inputs["labels"]) if state.tokens else inputs["labels"][:, 0]
    try:
        with in_eval_mode(model):
            own = model(**inputs)
            asked = getattr(model.config, "use_cache", False)
            asked = asked and "use_cache" in inspect.signature(model.forward).parameters
            state.without_cache = bool(asked) and own.get("past_key_values") is None
            state.install(model)
            try:
                found = model(**inputs, output_logits=False).loss
            except RuntimeError as error:  # which the model's own forward has not raised
                raise ValueError(
                    f"{'' if 'use_fused_loss' in str(error) else 'use_fused_loss: without logits, '}{error}"
                ) from error
            finally:
                state.uninstall(model)
    finally:
        if isinstance(state, _Classifier):
            model.config.problem_type = problem  # forward concludes it from labels, and remembers
    expected, tolerance = own.loss, _TOLERANCE.get(parameter.dtype, 5e-2)
    if not torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"use_fused_loss: the loss of a few tokens is {found.item():.6g} by Superfine and {expected.item():.6g} "
            "by the model; expected a model that changes nothing between head and loss"
        )
