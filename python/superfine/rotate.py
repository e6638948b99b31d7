"""Selections that move: a few blocks of a model train at a time, then others, with the memory of those few.

    rotation = superfine.Rotation(model, "adamw", lr=2e-5, kind="lisa", blocks_per_turn=2, every=20)
    scheduler = torch.optim.lr_scheduler.LinearLR(rotation.optimizer)
    for batch in batches:
        model(**batch).loss.backward()
        rotation.optimizer.step()
        rotation.optimizer.zero_grad()
        scheduler.step()
        rotation.step()                        # every 20 calls: other blocks
    superfine.save_delta(model, rotation.trained_plan(), "delta.safetensors")

LISA (Pan et al. 2024) draws blocks at random and trains embeddings and head always; BAdam (Luo et al. 2024) goes
through the blocks in turn. The optimizer stays one object, whose groups get other parameters, so that schedulers and
scalers keep what they hold on to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from superfine._first_step import watch_first_step
from superfine.select import Plan, optimizer_class, select, uncompiled
from superfine.selectors import layer_stack

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["Rotation"]

#: What trains in every turn besides the blocks.
ALWAYS = {"lisa": ("embeddings", "head"), "badam": ("head",)}


class Rotation:
    """Trains `blocks_per_turn` blocks of a model's layer stack for `every` steps, then others.

    Args:
        model: as `select` takes it.
        optimizer: a name as for `Plan.optimizer`, or what makes an optimizer from two groups with "params" (matrices,
            then vectors; one may be empty) and "weight_decay".
        lr, weight_decay, options: for an optimizer by name; matrices decay, norms and biases do not.
        kind: "lisa": blocks drawn at random, without repetition within a turn; "badam": in order, from the first
            block to the last and over again.
        blocks_per_turn: how many blocks train at a time.
        every: optimizer steps to a turn.
        always: selectors of what trains all the time; None: embeddings and head with "lisa", the head with "badam".
        seed: of the drawing. Turn t draws the same blocks in every run.
        keep_state: whether a block that comes back has the optimizer state it had, which meanwhile is kept on the
            CPU; otherwise the state is freed, as in both papers, and begins anew.
        first_step_check: check the first step of every turn, as `Plan.optimizer` does.
        on_turn: called with the new plan before the optimizer gets its parameters, as `Prepared.update` of a prepared
            model must be.

    Attributes:
        plan: what trains now. optimizer: made once. turn: number of this turn, from 0. steps: calls of `step()`.
        blocks: numbers of the blocks that train now.

    Raises:
        ValueError: arguments out of range, a model without a layer stack, or selectors that `select` refuses, such as
            one side of tied weights in `always`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: str | Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = "adamw",
        *,
        lr: float | None = None,
        weight_decay: float = 0.01,
        kind: str = "lisa",
        blocks_per_turn: int = 2,
        every: int = 20,
        always: Sequence[str] | None = None,
        seed: int = 0,
        keep_state: bool = False,
        first_step_check: bool = True,
        on_turn: Callable[[Plan], Any] | None = None,
        **options: Any,
    ) -> None:
        if kind not in ALWAYS:
            raise ValueError(f"Rotation: kind is {kind!r}; expected 'lisa' or 'badam'")
        self.model = uncompiled(model)
        self._block_paths = layer_stack(self.model).blocks
        if not 1 <= blocks_per_turn <= len(self._block_paths):
            raise ValueError(
                f"Rotation: blocks_per_turn is {blocks_per_turn}; expected 1 to {len(self._block_paths)}, the blocks"
            )
        if every < 1:
            raise ValueError(f"Rotation: every is {every}; expected a number of steps >= 1")
        by_name = isinstance(optimizer, str)
        if by_name is (lr is None) or (options and not by_name):
            raise ValueError(
                f"Rotation: optimizer is {optimizer!r}, lr is {lr}, options are {options}; expected lr, and options "
                "if any, with an optimizer by name, and neither with a function that makes it"
            )
        self.kind, self.blocks_per_turn, self.every, self.seed = kind, blocks_per_turn, every, seed
        self.always = ALWAYS[kind] if always is None else tuple(always)
        self.keep_state, self.first_step_check, self.on_turn = keep_state, first_step_check, on_turn
        self.turn = self.steps = 0
        self._trained: set[str] = set()
        self._kept: dict[str, dict[str, Any]] = {}
        self._check: Any = None
        self._select()
        self._decays = (weight_decay, 0.0)
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in zip(self._parameters(), self._decays, strict=True)
        ]
        if isinstance(optimizer, str):
            self.optimizer: torch.optim.Optimizer = optimizer_class(optimizer)(
                groups, lr=lr, weight_decay=weight_decay, **options
            )
        else:
            self.optimizer = optimizer(groups)
            if not isinstance(self.optimizer, torch.optim.Optimizer) or len(self.optimizer.param_groups) != 2:
                raise TypeError("Rotation: the function made no optimizer of the two groups; expected one")
        if getattr(self.optimizer, "_release", None) is not None:
            raise ValueError("Rotation: gradients are released in backward; expected an ordinary optimizer")
        self._watch()

    @property
    def blocks(self) -> tuple[int, ...]:
        return self._blocks_of(self.turn)

    def step(self) -> bool:
        """Counts an optimizer step; after each `every` of them moves on, and returns whether it did.

        To be called after `optimizer.step()` and `zero_grad()`: gradients of blocks that stop are dropped.
        """
        self.steps += 1
        if self.steps % self.every:
            return False
        self._move_to(self.turn + 1)
        return True

    def trained_plan(self) -> Plan:
        """A plan of all that has trained so far, for `save_delta`; the selection stays as it is."""
        names = [name for name, _ in self.model.named_parameters() if name in self._trained]
        return Plan(self.model, tuple(names), self.plan.selectors)

    def state_dict(self) -> dict[str, Any]:
        """Where the rotation is, with the optimizer's state; without the model's parameters, of which all move."""
        kept = {name: dict(state) for name, state in self._kept.items()}
        return {
            "kind": self.kind,
            "seed": self.seed,
            "blocks_per_turn": self.blocks_per_turn,
            "every": self.every,
            "turn": self.turn,
            "steps": self.steps,
            "trained": sorted(self._trained),
            "kept": kept,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken: selects that turn's blocks, and gives them their optimizer state.

        Raises `ValueError`, with nothing changed, for the state of a rotation with other settings.
        """
        for name in ("kind", "seed", "blocks_per_turn", "every"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"Rotation: {name} is {getattr(self, name)!r}; expected {state[name]!r}, as in the checkpoint"
                )
        self._move_to(state["turn"], park=False)
        self.steps, self._trained = state["steps"], {*state["trained"], *self.plan.names}
        self._kept = {name: dict(entries) for name, entries in state["kept"].items()}
        self.optimizer.load_state_dict(state["optimizer"])

    def callback(self) -> TrainerCallback:
        """For `transformers.Trainer(..., optimizers=(rotation.optimizer, scheduler), callbacks=[...])`."""
        from transformers import TrainerCallback

        rotation = self

        class Rotate(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                rotation.step()

        return Rotate()

    # --- a turn -------------------------------------------------------------------------------------------

    def _blocks_of(self, turn: int) -> tuple[int, ...]:
        count, size = len(self._block_paths), self.blocks_per_turn
        if self.kind == "lisa":  # from (seed, turn) alone: a resumed run needs no state of a generator
            return tuple(sorted(random.Random(f"{self.seed} {turn}").sample(range(count), size)))
        return tuple(sorted((turn * size + i) % count for i in range(size)))

    def _select(self) -> None:
        numbers = ",".join(map(str, self.blocks))
        self.plan = select(self.model, f"layers:{numbers}", *self.always)
        self._trained |= set(self.plan.names)

    def _parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        matrices: list[Tensor] = []
        vectors: list[Tensor] = []
        for parameter in self.plan.parameters():
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
        return matrices, vectors

    def _move_to(self, turn: int, *, park: bool = True) -> None:
        before = dict(self.plan.named_parameters())
        self.turn = turn
        self._select()
        if self.on_turn is not None:
            self.on_turn(self.plan)
        after = dict(self.plan.named_parameters())
        for name, parameter in before.items():
            if name in after:
                continue
            state = self.optimizer.state.pop(parameter, None)
            parameter.grad = None
            if self.keep_state and park and state:
                self._kept[name] = {key: _moved(value, "cpu") for key, value in state.items()}
        for group, parameters in zip(self.optimizer.param_groups, self._parameters(), strict=True):
            group["params"] = parameters
        for name, parameter in after.items():
            if name in self._kept and name not in before:
                state = self._kept.pop(name)
                device = parameter.device
                self.optimizer.state[parameter] = {
                    # Counts of steps lie where the optimizer keeps them, which may be the CPU.
                    key: value
                    if key == "step" and not _step_on(self.optimizer, parameter)
                    else _moved(value, device)
                    for key, value in state.items()
                }
        self._watch()

    def _watch(self) -> None:
        if not self.first_step_check:
            return
        if self._check is not None:
            self._check.remove()  # of a turn whose steps were all skipped
        self._check = watch_first_step(self.model, self.plan.names, self.optimizer)


def _moved(value: Any, device: str | torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _step_on(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether the count of steps of a parameter lies on its device."""
    from superfine.optim._in_pass import InPass

    group: dict[str, Any] = optimizer.param_groups[0]
    ours = isinstance(optimizer, InPass) and parameter.is_cuda
    return ours or bool(group.get("capturable") or group.get("fused"))
