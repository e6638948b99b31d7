"""The training loop of ``superfine tune``: forward, backward, clip, step, validate, checkpoint.

Everything that decides the next bits (position, order of samples, learning rate) is a function of the
configuration and of ``Progress``, so a run that goes on from a checkpoint repeats an unbroken one exactly.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superfine import checkpoint
from superfine.checkpoint import MetricsLog, Progress
from superfine.config import Config
from superfine.encoded import Encoded
from superfine.evaluate import autocast, evaluate
from superfine.forgetting import EWC
from superfine.optim._in_pass import InPass
from superfine.replay import Mixture
from superfine.schedule import lr_scale, warmup_steps
from superfine.select import Plan
from superfine.tasks import Task

__all__ = ["Interrupted", "Listener", "Trainer"]


class Listener:
    """What a run tells while it goes on. The base class is silent; ``superfine.display`` prints."""

    def stage(self, number: int, text: str) -> None:
        """One of the six steps begins."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def on_step(self, step: int, total: int) -> None:
        """An optimizer step is done."""

    def on_event(self, event: dict[str, Any]) -> None:
        """A line was added to ``metrics.jsonl``."""


class Interrupted(Exception):  # noqa: N818 (no error: somebody asked for it)
    """A signal stopped the run after a whole step, with a checkpoint written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Trainer:
    """Trains ``plan`` and keeps a run directory resumable. ``run`` returns when training is over."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        optimizer: torch.optim.Optimizer,
        task: Task,
        train: Encoded,
        validation: Encoded,
        *,
        directory: Path,
        log: MetricsLog,
        fingerprint: dict[str, str],
        listener: Listener,
        mixture: Mixture | None = None,
        ewc: EWC | None = None,
    ) -> None:
        self.config, self.plan, self.optimizer, self.task = config, plan, optimizer, task
        self.train, self.validation = train, validation
        self.folder, self.log, self.listener = directory / "checkpoint", log, listener
        self.fingerprint, self.ewc = fingerprint, ewc
        self.device = torch.device(config.train.device)
        self.progress = Progress()

        self.samples_per_step = config.train.batch_size * config.train.accumulation
        self.mixture = mixture or Mixture(len(train))
        self.steps_per_epoch = math.ceil(len(self.mixture) / self.samples_per_step)
        self.total = self.steps_per_epoch * config.train.epochs
        self.warmup = warmup_steps(config.train.warmup, self.total)
        self.eval_every = config.train.eval_every or self.steps_per_epoch
        self.parameters = list(plan.parameters())
        self.lrs = [float(group["lr"]) for group in optimizer.param_groups]  # a checkpoint's are scaled
        self._order: tuple[int, list[int]] = (-1, [])
        self._signum = 0

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``checkpoint.load_state`` returned."""
        checkpoint.load_trained(self.plan.model, state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        checkpoint.restore_rng(state["rng"])

    def run(self) -> None:
        """Train to the end or to early stopping, then put the best tensors into the model.

        Raises ``Interrupted`` after Ctrl-C or SIGTERM, when the step under way is finished and saved, and
        ``FloatingPointError`` when the loss or the gradient norm is no longer finite.
        """
        self.plan.model.train()
        self._clock = time.perf_counter()
        with self._signals():
            try:
                while True:
                    if self._validation_due():
                        self._validate()
                        self._raise_if_interrupted()
                    if self.progress.step == self.total or self.progress.stopped_early:
                        break
                    self._step()
                    self._raise_if_interrupted()
                    every = self.config.train.checkpoint_every
                    if every and self.progress.step % every == 0 and not self._validation_due():
                        self._checkpoint()
            except Interrupted:
                self._checkpoint()
                raise
        checkpoint.load_best(self.folder, self.plan)
        self.plan.model.eval()

    def _step(self) -> None:
        train, step = self.config.train, self.progress.step
        indices = self._samples(step)
        logged = step == 0 or (step + 1) % train.log_every == 0
        watch = _Stopwatch(self.device, active=logged)
        loss_sum = torch.zeros((), device=self.device)
        for start in range(0, len(indices), train.batch_size):
            part = indices[start : start + train.batch_size]
            inputs, targets = self.train.batch(part, self.device)
            watch.start()
            with autocast(self.device, train.precision):
                outputs = self.task.outputs(self.plan.model, inputs, targets)
            # Each part counts by its samples or tokens, so that the sum is the mean over the whole group.
            share = self.train.terms(part) / self.train.terms(indices)
            loss = self.task.loss_of(outputs, targets, train.label_smoothing) * share
            watch.lap("ms_forward")
            loss.backward()
            watch.lap("ms_backward")
            loss_sum += loss.detach()
        watch.start()
        pull = {}
        if self.ewc is not None:
            if logged:
                with torch.no_grad():
                    pull = {"ewc_penalty": self.ewc.penalty().item()}
            self.ewc.add_to_gradients()  # here, not attached to the optimizer: the norm is of the sum
        norm = self._clip(logged)
        scale = self._scale(step)
        lr = self.config.optimizer.lr * scale  # of what is not made smaller by layer_decay
        for group, initial in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = initial * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        watch.lap("ms_optimizer")

        self.progress.step = step + 1
        if logged or self.device.type == "cpu":  # on a GPU looking at the loss waits for it
            self._check_finite("loss", loss_sum.item())
        if logged:
            self._check_finite("gradient norm", norm.item())
            self._log(
                "train", loss=loss_sum.item(), lr=lr, grad_norm=norm.item(), **pull, **watch.milliseconds
            )
        self.listener.on_step(self.progress.step, self.total)

    def _samples(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self.mixture.order(self.config.train.seed, epoch))
        start = position * self.samples_per_step
        return self._order[1][start : start + self.samples_per_step]

    def _scale(self, step: int) -> float:
        return lr_scale(step, self.total, kind=self.config.train.schedule, warmup=self.warmup)

    def _clip(self, logged: bool) -> Tensor:
        limit = self.config.optimizer.max_grad_norm
        if self.device.type == "cpu" and isinstance(self.optimizer, InPass):
            norm = self.optimizer.clip_grad_norm_(limit or math.inf)  # the step scales what it reads
            self._check_finite("gradient norm", norm.item())
            return norm
        if limit:
            return torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        gradients = [p.grad for p in self.parameters if p.grad is not None] if logged else []
        return torch.nn.utils.get_total_norm(gradients)

    def _validation_due(self) -> bool:
        step = self.progress.step
        due = step > 0 and (step % self.eval_every == 0 or step == self.total)
        return due and self.progress.validated_step != step

    def _validate(self) -> None:
        progress, train = self.progress, self.config.train
        scores = evaluate(
            self.plan.model,
            self.validation,
            self.task,
            batch_size=train.batch_size,
            device=self.device,
            precision=train.precision,
            between_batches=self._raise_if_interrupted,
            final=False,
        )
        self._check_finite("validation loss", scores["loss"])
        if scores["loss"] < progress.best_loss:
            progress.best_loss, progress.best_step = scores["loss"], progress.step
            progress.bad_validations = 0
            checkpoint.save_best(self.folder, self.plan)
        else:
            progress.bad_validations += 1
            progress.stopped_early = bool(train.patience) and progress.bad_validations >= train.patience
        progress.validated_step = progress.step
        brief = {key: value for key, value in scores.items() if key not in ("labels", "confusion")}
        self._log("validation", **brief)
        self._checkpoint()

    def _log(self, kind: str, **values: Any) -> None:
        epoch = round(self.progress.step / self.steps_per_epoch, 4)
        event = {"event": kind, "step": self.progress.step, "epoch": epoch, **values}
        self.log.append(event)
        self.listener.on_event(event)

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"train: {name} is {value} at step {self.progress.step}; expected a finite one: try a lower"
                " optimizer.lr, more train.warmup, or train.precision = 'fp32'"
            )

    def _checkpoint(self) -> None:
        # Between logged steps nobody has looked: never replace a good checkpoint by a ruined one.
        with torch.no_grad():
            self._check_finite(
                "the norm of the parameters", torch.nn.utils.get_total_norm(self.parameters).item()
            )
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now
        checkpoint.save_state(
            self.folder,
            self.progress,
            self.plan,
            self.optimizer,
            metrics_bytes=self.log.synced_bytes(),
            fingerprint=self.fingerprint,
        )

    def _raise_if_interrupted(self) -> None:
        if self._signum:
            raise Interrupted(self._signum)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks the loop to stop; a second one acts at once, as without us."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before: dict[int, Any] = {
            number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)
        }

        def ask(signum: int, frame: Any) -> None:
            self._signum = signum
            signal.signal(signum, before[signum])

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Stopwatch:
    """Milliseconds by part of a step. Waits for the GPU only when active, because waiting costs time."""

    def __init__(self, device: torch.device, *, active: bool) -> None:
        self.synchronise = active and device.type == "cuda"
        self.milliseconds = dict.fromkeys(("ms_forward", "ms_backward", "ms_optimizer"), 0.0)
        self.last = 0.0

    def _now(self) -> float:
        if self.synchronise:
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        self.last = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self.milliseconds[part] += (now - self.last) * 1e3
        self.last = now
