"""Hugging Face causal language models that train without their logits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from superfine_kernels import linear_cross_entropy
from superfine_kernels._library import reject

__all__ = ["FusedLoss", "use_fused_loss"]

# Of a loss of a few tokens: other orders of summation; 8 and 11 bits of the logits.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def use_fused_loss(model: nn.Module) -> FusedLoss:
    """Lets a causal language model compute its loss by `linear_cross_entropy`, from its hidden states and its head.

    A forward with `labels` then holds no logits, and `output.logits` is None; without labels, and within `generate`,
    nothing changes. `num_items_in_batch` and `shift_labels` are honoured, so `transformers.Trainer` works as before.
    `state_dict()` and `save_pretrained` are as ever; to `copy.deepcopy` or pickle the model, take it back first.

    Args:
        model: a Hugging Face model with a linear head, whose loss is `ForCausalLMLoss`. A few tokens are sent through
            it, both ways.

    Returns:
        What takes it back: `.remove()`.

    Raises:
        ValueError: the head is not linear or has hooks, the loss is another one, or the model changes logits between
            head and loss (softcaps, scales), so that both losses differ.
    """
    return FusedLoss(model)


class FusedLoss:
    """A model with `use_fused_loss`; `remove()` makes it what it was."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedModel
        from transformers.loss.loss_utils import ForCausalLMLoss

        if not isinstance(model, PreTrainedModel):
            reject("use_fused_loss", "model", type(model).__name__, "a Hugging Face model", TypeError)
        if "forward" in vars(model):
            raise ValueError("use_fused_loss: model.forward is replaced already; expected the class's own")
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
            reject("use_fused_loss", "the model's head", type(head).__name__, "torch.nn.Linear without hooks")
        if model.loss_function is not ForCausalLMLoss:
            name = getattr(model.loss_function, "__name__", repr(model.loss_function))
            reject("use_fused_loss", "the model's loss", name, "ForCausalLMLoss")
        self._model, self._head = model, head
        self._hidden: Tensor | None = None  # what the head was given, within a forward with labels
        self._listening = False
        self._check()
        self._install()

    def remove(self) -> None:
        """Takes everything back."""
        for owner, name in (
            (self._model, "forward"),
            (self._model, "_loss_function"),
            (self._head, "forward"),
        ):
            vars(owner).pop(name, None)

    def _install(self) -> None:
        forward = self._model.forward

        @functools.wraps(forward)
        def without_logits(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            if labels is None:
                return forward(*args, **kwargs)
            self._listening = True
            try:
                output = forward(*args, labels=labels, **kwargs)
            finally:
                self._listening, self._hidden = False, None
            if isinstance(output, tuple):  # return_dict=False: (loss, logits, ...)
                return (output[0], None, *output[2:])
            output.logits = None
            return output

        self._model.forward = without_logits
        self._model.loss_function = self._loss
        vars(self._head)["forward"] = self._listen

    def _listen(self, hidden: Tensor) -> Tensor:
        if not self._listening:
            return nn.functional.linear(hidden, self._head.weight, self._head.bias)
        self._hidden = hidden
        # In place of logits: their shape, and no memory.
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], self._head.out_features)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As transformers' ForCausalLMLoss: position i predicts label i + 1."""
        hidden = self._hidden
        if hidden is None or hidden.shape[:-1] != labels.shape:
            raise RuntimeError(
                "use_fused_loss: the loss was computed from other logits than the head's of this forward; "
                "expected one forward at a time, with logits of all positions"
            )
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return linear_cross_entropy(
            hidden,
            self._head.weight,
            shift_labels.to(hidden.device),
            linear_bias=self._head.bias,
            ignore_index=ignore_index,
            num_items=num_items_in_batch,
        )

    @torch.no_grad()
    def _check(self) -> None:
        """That both losses of a few tokens are equal."""
        model, training = self._model, self._model.training
        tokens = torch.arange(4, device=self._head.weight.device)[None] % self._head.out_features
        model.eval()
        try:
            expected = model(input_ids=tokens, labels=tokens).loss
            self._install()
            try:
                found = model(input_ids=tokens, labels=tokens).loss
            finally:
                self.remove()
        finally:
            model.train(training)
        tolerance = _TOLERANCE[self._head.weight.dtype]
        if not torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"use_fused_loss: the loss of a few tokens is {found.item():.6g} without logits and "
                f"{expected.item():.6g} with them; expected a model that changes nothing between head and loss"
            )
