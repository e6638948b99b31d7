"""Rotating selections: which blocks train when, what is freed and kept, and that a resumed one goes on the same."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from small_models import gpt2, llama, trained
from superfine.delta import load_delta, save_delta
from superfine.rotate import Rotation
from superfine.select import select
from support import same_bits
from torch import nn


class Blocks(nn.Module):
    def __init__(self, count=4):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(count))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.inner(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


X = torch.linspace(-1, 1, 12).view(3, 4)


def train(rotation, steps, scheduler=None):
    for _ in range(steps):
        rotation.model(X).square().mean().backward()
        rotation.optimizer.step()
        rotation.optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        rotation.step()


def badam(model, **options):
    settings = {"lr": 0.01, "kind": "badam", "blocks_per_turn": 1, "every": 2} | options
    return Rotation(model, "adamw", **settings)


def test_badam_goes_through_the_blocks_in_turn_and_nothing_else_moves():
    model = Blocks()
    rotation = badam(model)
    for turn in range(6):
        block = turn % 4
        assert rotation.blocks == (block,)
        prefixes = (f"layers.{block}.", "head.")
        assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}
        before = copy.deepcopy(model.state_dict())
        train(rotation, 2)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if name.startswith(prefixes)}
    assert rotation.turn == 6
    assert rotation.steps == 12


def test_lisa_draws_blocks_by_seed_and_turn():
    def drawn(seed):
        rotation = Rotation(
            Blocks(6), lr=0.01, kind="lisa", blocks_per_turn=2, every=1, always=("head",), seed=seed
        )
        found = []
        for _ in range(12):
            found.append(rotation.blocks)
            train(rotation, 1)
        return found

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert all(len(set(blocks)) == 2 for blocks in first)
    assert {number for blocks in first for number in blocks} == set(range(6))


def test_lisa_trains_embeddings_and_head_always():
    model = llama()
    rotation = Rotation(model, lr=0.01, blocks_per_turn=1, every=1)
    for _ in range(3):
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= trained(model)
        assert sum(name.startswith("model.layers.") for name in trained(model)) == 9
        rotation.step()
    assert "transformer.wte.weight" in Rotation(gpt2(), lr=0.01, blocks_per_turn=1).plan.names  # tied


def test_memory_of_blocks_that_stop_is_freed():
    model = Blocks()
    rotation = badam(model)
    train(rotation, 1)
    stopping = list(model.layers[0].parameters())
    staying = list(model.head.parameters())
    states = [
        weakref.ref(value)
        for p in stopping
        for k, value in rotation.optimizer.state[p].items()
        if k != "step"
    ]
    kept = {p: dict(rotation.optimizer.state[p]) for p in staying}
    assert len(states) == 8
    model(X).sum().backward()
    rotation.step()  # without zero_grad
    train(rotation, 1)
    gc.collect()
    assert [reference() for reference in states] == [None] * 8
    assert all(p.grad is None and p not in rotation.optimizer.state for p in stopping)
    assert set(rotation.optimizer.state) == {*staying, *model.layers[1].parameters()}
    assert all(rotation.optimizer.state[p]["exp_avg"] is kept[p]["exp_avg"] for p in staying)


def test_kept_state_comes_back_exactly():
    model = Blocks(2)
    rotation = badam(model, every=2, keep_state=True, first_step_check=False)
    train(rotation, 1)
    weight = model.layers[0][0].weight
    before = {key: value.clone() for key, value in rotation.optimizer.state[weight].items()}
    rotation.step()
    assert rotation.blocks == (1,)
    assert weight not in rotation.optimizer.state
    rotation.step(), rotation.step()
    assert rotation.blocks == (0,)
    after = rotation.optimizer.state[weight]
    assert before.keys() == after.keys()
    assert all(same_bits(after[key], value) for key, value in before.items())
    train(rotation, 1)
    assert rotation.optimizer.state[weight]["step"] == 2


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}, {"max_grad_norm": 0.1}])
def test_steps_are_those_of_an_optimizer_made_for_each_turn(options):
    model, other = Blocks(), None
    other = copy.deepcopy(model)
    rotation = badam(model, always=(), every=3, weight_decay=0.1, **options)
    for turn in range(3):
        optimizer = select(other, f"layers:{turn}").optimizer("adamw", lr=0.01, weight_decay=0.1, **options)
        for _ in range(3):
            other(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    train(rotation, 9)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_schedulers_go_on_over_turns():
    rotation = badam(Blocks(), every=1)
    groups = rotation.optimizer.param_groups
    scheduler = torch.optim.lr_scheduler.LambdaLR(rotation.optimizer, lambda step: 1 / (1 + step))
    train(rotation, 5, scheduler)
    assert [group["lr"] for group in groups] == pytest.approx([0.01 / 6] * 2)
    assert rotation.optimizer.param_groups is groups
    assert scheduler.get_last_lr() == [group["lr"] for group in groups]


@pytest.mark.parametrize("keep_state", [False, True])
def test_a_resumed_rotation_ends_in_the_same_bits(tmp_path, keep_state):
    def build():
        torch.manual_seed(5)
        settings = {"lr": 0.01, "blocks_per_turn": 1, "every": 2, "always": ("head",), "seed": 3}
        return Rotation(Blocks(), keep_state=keep_state, **settings)

    whole = build()
    train(whole, 5)
    torch.save({"model": whole.model.state_dict(), "rotation": whole.state_dict()}, tmp_path / "c.pt")
    train(whole, 6)

    resumed = build()
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["rotation"])
    assert (resumed.steps, resumed.turn) == (5, 2)
    train(resumed, 6)
    assert resumed.blocks == whole.blocks
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert same_bits(a, b)
    other = Rotation(Blocks(), lr=0.01, blocks_per_turn=1, every=3, always=("head",), seed=3)
    with pytest.raises(ValueError, match="every is 3; expected 2, as in the checkpoint"):
        other.load_state_dict(saved["rotation"])


def test_a_delta_holds_all_that_trained(tmp_path):
    model = Blocks()
    base = copy.deepcopy(model)
    rotation = badam(model, every=1)
    train(rotation, 2)
    plan = rotation.trained_plan()
    assert set(plan.names) == {
        n for n, _ in model.named_parameters() if not n.startswith(("inner", "layers.3"))
    }
    save_delta(model, plan, tmp_path / "d")
    load_delta(base, tmp_path / "d")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))


def test_the_first_step_of_every_turn_is_checked():
    model = Blocks()
    rotation = badam(model, every=1)
    train(rotation, 1)
    model.inner.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'inner.weight' requires a gradient but is not selected"):
        train(rotation, 1)
    model.inner.weight.requires_grad_(False)
    rotation.optimizer.zero_grad()
    rotation.step()  # a turn without a step that counts leaves no check behind
    train(rotation, 1)
    assert len(rotation.optimizer._optimizer_step_pre_hooks) == 1


def test_function_that_makes_the_optimizer_and_what_is_told_of_turns():
    told = []
    model = Blocks()
    rotation = Rotation(
        model,
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        kind="badam",
        blocks_per_turn=3,
        every=1,
        always=(),
        on_turn=told.append,
    )
    train(rotation, 2)
    assert type(rotation.optimizer) is torch.optim.SGD
    assert [group["weight_decay"] for group in rotation.optimizer.param_groups] == [0.01, 0.0]
    assert told[-1] is rotation.plan
    assert len(told) == 2
    assert rotation.blocks == (0, 2, 3)  # 0, 1, 2, then 3, 0, 1, then 2, 3, 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "random"}, "kind is 'random'; expected 'lisa' or 'badam'"),
        ({"blocks_per_turn": 5}, "blocks_per_turn is 5; expected 1 to 4"),
        ({"blocks_per_turn": 0}, "blocks_per_turn is 0"),
        ({"every": 0}, "every is 0"),
        ({"lr": None}, "expected lr, and options"),
        ({"optimizer": "adamW"}, "did you mean 'adamw'"),
        ({"optimizer": lambda groups: None}, "expected lr, and options"),
        ({"always": ("heads",)}, "matches no parameter"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Rotation(Blocks(), **{"lr": 0.1, "kind": "badam", **options})


def test_bad_optimizers_and_models():
    with pytest.raises(TypeError, match="made no optimizer of the two groups"):
        Rotation(Blocks(), lambda groups: None, kind="badam")
    with pytest.raises(ValueError, match="no stack of repeated layers"):
        Rotation(nn.Bilinear(2, 2, 2), lr=0.1)


@pytest.mark.filterwarnings("ignore")  # what Trainer says of its environment
def test_trainer_rotates(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = llama()
    rotation = Rotation(model, lr=0.01, kind="badam", blocks_per_turn=1, every=2)
    before = copy.deepcopy(model.state_dict())
    ids = torch.arange(6) % 30
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(rotation.optimizer, lambda step: 1.0)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": ids, "labels": ids}] * 8,
        optimizers=(rotation.optimizer, scheduler),
        callbacks=[rotation.callback()],
    )
    trainer.train()
    assert rotation.turn == 2
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in moved if "layers" in name} == {"0", "1"}
