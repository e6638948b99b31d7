"""What ``superfine tune`` makes of ``[select]`` and ``[ewc]``: the plan, and the pull against forgetting."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from superfine._slice_patterns import matching
from superfine.config import Config, EWCConfig
from superfine.encoded import Encoded
from superfine.forgetting import EWC, fisher
from superfine.select import Plan, select
from superfine.tasks import Task
from superfine_kernels.slices import ROWS

__all__ = ["choose", "consolidate"]


def choose(config: Config, model: Any, encoded: Mapping[str, Encoded]) -> Plan:
    """The plan of ``[select]``. Rows that are ``"tokens"`` are those of the tokens in what is trained on.

    Raises as ``superfine.select``, and ``ValueError`` for ``"tokens"`` of a layer that has no row for each token.
    """
    rows = dict(config.select.rows)
    asked = [key for key, value in rows.items() if value == "tokens"]
    if asked:
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        of_tokens = {id(table.weight) for table in tables if table is not None}
        for key in asked:
            for name in matching(model, "rows", ROWS, key):
                if id(model.get_parameter(name)) not in of_tokens:
                    raise ValueError(
                        f"select: rows[{key!r}] is 'tokens' and matches {name!r}; expected the embedding of tokens"
                        " or the head of a language model"
                    )
        trained_on = (part for name, part in encoded.items() if name in ("train", "replay"))
        tokens = sorted(set().union(*(part.vocabulary() for part in trained_on)))
        rows |= dict.fromkeys(asked, tokens)
    chosen = config.select
    return select(model, *chosen.parameters, rows=rows, cols=chosen.cols, tied=chosen.tied, seed=chosen.seed)


def consolidate(
    settings: EWCConfig,
    plan: Plan,
    task: Task,
    data: Encoded,
    *,
    seed: int,
    new: Collection[str],
    listener: Any,
) -> EWC:
    """Elastic weight consolidation by the Fisher information of samples of ``data``, of the values that are now.

    A sample's loss counts times the square root of its terms: the squared gradient then is that of one term, as if
    they were independent, and ``strength`` 1 stands for the mean loss of ``data`` itself, to second order.

    Raises ``ValueError`` where a parameter is ``new``: at random values it knows nothing that could be forgotten.
    """
    if new:
        raise ValueError(
            f"ewc: {min(new)} is new and untrained; expected a model that knows the original task, such as a folder"
            " that superfine merge wrote"
        )
    drawn = random.Random(f"ewc {seed}").sample(range(len(data)), min(len(data), settings.samples))
    device = next(plan.parameters()).device

    def loss_of(model: nn.Module, sample: int) -> Tensor:
        inputs, targets = data.batch([sample], device)
        loss = task.loss_of(task.outputs(model, inputs, targets), targets)
        return loss * math.sqrt(data.terms([sample]))

    started = time.perf_counter()
    importance = fisher(plan, drawn, loss_of)
    listener.note(
        f"EWC: strength {settings.strength}, Fisher information of {len(drawn):,} samples in"
        f" {time.perf_counter() - started:.1f} s"
    )
    return EWC(plan, importance, settings.strength)
