"""The tasks of ``superfine tune``, each in a file of its own, behind one interface: ``superfine.tasks.base.Task``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from superfine.tasks.base import Run, Task
from superfine.tasks.causal_lm import CausalLM, is_causal_lm
from superfine.tasks.classification import Classification
from superfine.tasks.qa import QuestionAnswering, is_question_answering
from superfine.tasks.regression import Regression
from superfine.tasks.translation import Translation, is_encoder_decoder

__all__ = [
    "TASKS",
    "CausalLM",
    "Classification",
    "QuestionAnswering",
    "Regression",
    "Run",
    "Task",
    "Translation",
    "of_config",
    "of_dict",
    "of_settings",
]

TASKS: dict[str, type[Task]] = {
    task.kind: task for task in (Classification, Regression, CausalLM, Translation, QuestionAnswering)
}


def of_settings(config: Any) -> Task:
    """The task of a ``superfine.config.Config``, its class names not known yet."""
    kind = config.model.task
    if kind == "classification" and config.train.loss == "mse":
        kind = "regression"
    own: dict[str, Any] = {}
    if kind == "causal-lm":
        own = {"pack": config.data.pack}
    elif kind == "translation":
        own = config.translation.model_dump()
    elif kind == "qa":
        own = config.qa.model_dump()
    return TASKS[kind](
        loss=config.train.loss,
        text=config.data.text_columns,
        label=config.data.label,
        max_length=config.data.max_length,
        **own,
    )


def of_config(config: Any) -> Task:
    """The task a model was tuned for; from elsewhere, by its class, its outputs and its names for them."""
    ours = getattr(config, "superfine", None)
    if ours is not None:
        return of_dict(ours)
    limit = min(512, getattr(config, "max_position_embeddings", None) or 512)
    if is_causal_lm(config):
        return CausalLM(max_length=limit)
    if is_encoder_decoder(config):
        return Translation(max_length=limit)
    if is_question_answering(config):
        return QuestionAnswering(max_length=min(384, limit))
    if config.num_labels == 1:
        return Regression(max_length=limit)
    names = tuple(config.id2label[index] for index in range(config.num_labels))
    return Classification(labels=names, max_length=limit)


def of_dict(values: Any) -> Task:
    """The inverse of ``Task.describe``, also after a round trip through JSON."""
    known = {"kind", *(entry.name for task in TASKS.values() for entry in fields(task))}
    if not isinstance(values, dict) or not {"loss", "labels"} <= set(values) <= known:
        raise ValueError(f"task: description is {values!r}; expected the keys {', '.join(sorted(known))}")
    kind = values.get("kind", "classification")
    if kind == "classification" and values["loss"] == "mse":
        kind = "regression"
    if kind not in TASKS:
        raise ValueError(f"task: kind is {kind!r}; expected one of {', '.join(TASKS)}")
    own = {entry.name for entry in fields(TASKS[kind])}  # the first version wrote `pack` for every task
    arguments: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in own
    }
    return TASKS[kind](**arguments)
