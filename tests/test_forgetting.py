"""Anchors, layer-wise learning rates, Fisher information and EWC."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import bert, gpt2, mlp, t5
from superfine.config import load_config
from superfine.forgetting import EWC, fisher, load_fisher, save_fisher
from superfine.select import select
from superfine.trainer import Trainer
from superfine.tune import tune
from torch import nn

X = torch.linspace(-1, 1, 12).view(3, 4)


def losses(model, batch):
    return model(batch).square().sum(1)


def batches():
    return [X, X.flip(0) * 0.5]


def ewc_of(plan, strength=10.0):
    return EWC(plan, fisher(plan, batches(), losses), strength)


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


# ---- learning rates that fall with depth ----


def rates(model, plan, decay=0.5):
    groups = plan.param_groups(0.1, lr=1.0, layer_decay=decay)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def test_layer_decay_follows_the_formula_of_depth():
    model = bert()
    found = rates(model, select(model, "all"))
    assert found["classifier.weight"] == found["bert.pooler.dense.bias"] == 1
    for block in range(4):
        assert found[f"bert.encoder.layer.{block}.output.dense.weight"] == 0.5 ** (4 - block)
    assert (
        found["bert.embeddings.word_embeddings.weight"] == found["bert.embeddings.LayerNorm.bias"] == 0.5**5
    )


def test_layer_decay_with_tied_weights_two_stacks_and_plain_modules():
    model = gpt2()
    found = rates(model, select(model, "all"))
    assert (found["transformer.wte.weight"], found["transformer.ln_f.weight"]) == (0.5**4, 1)
    model = t5()  # three encoder blocks, two of the decoder: each counts from its own top
    found = rates(model, select(model, "all"))
    assert found["encoder.block.0.layer.0.SelfAttention.q.weight"] == 0.5**3
    assert found["decoder.block.0.layer.0.SelfAttention.q.weight"] == 0.5**2
    assert (found["shared.weight"], found["decoder.final_layer_norm.weight"]) == (0.5**4, 1)
    model = mlp()
    assert rates(model, select(model, "all"))["4.weight"] == 0.5


def test_optimizer_with_layer_decay_keeps_decay_groups_and_schedules():
    model = bert()
    optimizer = select(model, "last:2", "head").optimizer("adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    groups = optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (0.25, 0.1), (0.25, 0.0), (0.5, 0.1), (0.5, 0.0), (1.0, 0.1), (1.0, 0.0)
    ]  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in groups[::2]] == [0.125, 0.25, 0.5]
    assert scheduler.base_lrs == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("decay", [0, 1.1, -1, float("nan")])
def test_bad_layer_decay(decay):
    with pytest.raises(ValueError, match="expected 0 < layer_decay <= 1"):
        select(mlp(), "all").optimizer("sgd", lr=0.1, layer_decay=decay)


def test_layer_decay_needs_layers():
    with pytest.raises(ValueError, match="no stack of repeated layers"):
        select(nn.Bilinear(2, 2, 2), "all").optimizer("sgd", lr=0.1, layer_decay=0.9)


def test_config_reaches_anchor_and_layer_decay():
    values = {"data.path": "a.csv", "model.name": "m", "output.directory": "o"}
    options = {"optimizer.anchor": True, "optimizer.layer_decay": 0.9}
    arguments = load_config(overrides=values | options).optimizer.arguments()
    assert arguments["anchored"] is True
    assert arguments["layer_decay"] == 0.9
    assert load_config(overrides=values).optimizer.arguments().keys() == {"lr", "weight_decay"}
    for bad in ({"optimizer.name": "sgd"}, {"optimizer.weight_decay": 0.0}):
        with pytest.raises(ValueError, match="anchor is true with"):
            load_config(overrides=values | {"optimizer.anchor": True} | bad)


@pytest.mark.usefixtures("no_report", "one_thread")
def test_a_run_with_anchor_and_layer_decay_schedules_every_group_and_resumes_to_the_same_bits(
    base, data, tmp_path
):
    from tune_runs import At, CrashError, assert_same_run, crash, of_kind, settings

    options = {
        "optimizer__anchor": True,
        "optimizer__layer_decay": 0.5,
        "train__epochs": 1,
        "train__warmup": 2,
        "train__schedule": "constant",
        "train__checkpoint_every": 4,
    }
    rates = {}

    def keep(trainer, *args):
        rates[trainer.progress.step] = [group["lr"] for group in trainer.optimizer.param_groups]

    with pytest.MonkeyPatch.context() as patch:
        original = Trainer._log
        patch.setattr(
            Trainer, "_log", lambda self, *args, **values: (keep(self), original(self, *args, **values))
        )
        tune(settings(base, data, tmp_path / "whole", **options))
    assert rates[1] == pytest.approx([lr / 2 for lr in (1.5e-3, 1.5e-3, 3e-3, 3e-3)])  # warming up
    assert rates[10] == pytest.approx([1.5e-3, 1.5e-3, 3e-3, 3e-3])  # the last block, then pooler and head
    assert of_kind(tmp_path / "whole", "train")[-1]["lr"] == 3e-3
    config = settings(base, data, tmp_path / "broken", **options)
    with pytest.raises(CrashError):
        tune(config, listener=At(6, crash))
    tune(config, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_anchor_pulls_a_plan_toward_where_it_began():
    model = mlp()
    plan = select(model, "last:1")
    optimizer = plan.optimizer("adamw", lr=0.1, weight_decay=0.5, anchored=True)
    start = model[4].weight.detach().clone()
    model(X).square().sum().backward()
    optimizer.step()
    away = (model[4].weight - start).norm()
    for _ in range(200):
        for parameter in plan.parameters():
            parameter.grad.zero_()
        optimizer.step()
    # Adam's first moment carries on for a while; then only the anchor is left.
    assert (model[4].weight - start).norm() < 0.05 * away


# ---- Fisher information ----


def test_fisher_of_samples_is_the_mean_square_of_their_gradients():
    model = mlp().double()
    plan = select(model, "last:2")
    data = [batch.double() for batch in batches()]
    found = fisher(plan, data, losses)
    squares = {name: [] for name in plan.names}
    for sample in torch.cat(data):
        grads = torch.autograd.grad(losses(model, sample[None]).sum(), list(plan.parameters()))
        for name, grad in zip(plan.names, grads, strict=True):
            squares[name].append(grad.square())
    for name in plan.names:
        torch.testing.assert_close(found[name], torch.stack(squares[name]).mean(0), rtol=1e-12, atol=0)
        assert found[name].dtype == torch.float64


def test_fisher_of_batches_is_that_of_their_mean_losses():
    model = mlp()
    plan = select(model, "last:1")
    found = fisher(plan, batches(), lambda model, batch: losses(model, batch).mean())
    expected = torch.zeros(2, 4)
    for batch in batches():
        expected += torch.autograd.grad(losses(model, batch).mean(), model[4].weight)[0].square() / 2
    torch.testing.assert_close(found["4.weight"], expected)
    assert (found["4.weight"] <= fisher(plan, batches(), losses)["4.weight"] + 1e-6).all()


def test_fisher_leaves_the_model_alone_and_runs_without_dropout():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).bfloat16().train()
    plan = select(model, "2.*")
    data = [X.bfloat16()]
    found = fisher(plan, data, losses, progress=True)
    assert torch.equal(found["2.weight"], fisher(plan, data, losses)["2.weight"])
    assert found["2.weight"].dtype == torch.float32
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fisher_refuses_what_is_no_loss_of_the_plan():
    model = mlp()
    plan = select(model, "last:1")
    with pytest.raises(ValueError, match="batches is empty"):
        fisher(plan, [], losses)
    with pytest.raises(ValueError, match=r"loss_fn returned \(3, 2\); expected a scalar"):
        fisher(plan, [X], lambda model, batch: model(batch))
    with pytest.raises(ValueError, match="loss is nan"):
        fisher(plan, [X], lambda model, batch: model(batch).sum() * float("nan"))
    with pytest.raises(ValueError, match="requires_grad False"):
        fisher(plan, [X], lambda model, batch: model(batch).detach().sum())
    with pytest.raises(ValueError, match=r"does not depend on '4.bias'"):
        fisher(plan, [X], lambda model, batch: model[4].weight.sum())


def test_fisher_files_round_trip_and_others_are_refused(tmp_path):
    plan = select(mlp(), "last:1")
    values = fisher(plan, batches(), losses)
    save_fisher(values, tmp_path / "f.safetensors")
    loaded = load_fisher(tmp_path / "f.safetensors")
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
    with pytest.raises(FileNotFoundError, match="expected a file by save_fisher"):
        load_fisher(tmp_path / "none")
    (tmp_path / "f.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_fisher(tmp_path / "f.safetensors")
    from safetensors.torch import save_file

    save_file(loaded, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="a file of another kind"):
        load_fisher(tmp_path / "other.safetensors")


# ---- EWC ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_pull_is_the_gradient_of_the_penalty(dtype):
    model = mlp().to(dtype)
    plan = select(model, "last:2")
    ewc = EWC(plan, fisher(plan, [X.to(dtype)], losses), 10.0)
    assert ewc.penalty() == 0
    moved(model)
    expected = torch.autograd.grad(ewc.penalty(), list(plan.parameters()))
    for parameter in plan.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ewc.add_to_gradients()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for parameter, gradient in zip(plan.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=tolerance, atol=tolerance * 1e-3)
        assert gradient.any()


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_attached_steps_are_those_of_a_loss_with_the_penalty(name):
    models = [mlp()]
    models.append(copy.deepcopy(models[0]))
    limit = {} if name == "sgd" else {"max_grad_norm": 0.5}
    plans = [select(model, "last:2") for model in models]
    ewcs = [ewc_of(plan) for plan in plans]
    optimizers = [plan.optimizer(name, lr=0.05, **limit) for plan in plans]
    handle = ewcs[0].attach(optimizers[0])
    for _ in range(5):
        models[0](X).sum().backward()
        (models[1](X).sum() + ewcs[1].penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(plans[0].parameters(), plans[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert ewcs[0].penalty() > 0
    handle.remove()
    models[0](X).sum().backward()
    before = models[0][4].weight.grad.clone()
    optimizers[0].step()
    assert torch.equal(models[0][4].weight.grad, before)


def test_the_pull_has_the_scale_of_a_grad_scaler():
    models = [mlp()]
    models.append(copy.deepcopy(models[0]))
    plans = [select(model, "last:1") for model in models]
    optimizers = [plan.optimizer("adamw", lr=0.05) for plan in plans]
    for plan, optimizer in zip(plans, optimizers, strict=True):
        ewc_of(plan).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        scaler.scale(models[0](X).sum()).backward()
        scaler.step(optimizers[0])
        scaler.update()
        models[1](X).sum().backward()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    torch.testing.assert_close(models[0][4].weight, models[1][4].weight, rtol=1e-6, atol=1e-7)


def test_frozen_gradients_and_closures_and_measured_norms():
    model = mlp()
    plan = select(model, "last:1")
    ewc = ewc_of(plan)
    optimizer = plan.optimizer("adamw", lr=0.1, first_step_check=False)
    ewc.attach(optimizer)
    optimizer.step()  # no gradients: nothing to add to
    assert model[4].weight.grad is None
    with pytest.raises(RuntimeError, match="step\\(\\) has a closure"):
        optimizer.step(lambda: None)
    model(X).sum().backward()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="measured gradients without the pull; expected max_grad_norm"):
        optimizer.step()


def test_state_survives_a_checkpoint(tmp_path):
    model = mlp()
    plan = select(model, "last:1")
    ewc = ewc_of(plan)
    moved(model)
    torch.save({"model": model.state_dict(), "ewc": ewc.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    again = mlp()
    again.load_state_dict(saved["model"])
    other = select(again, "last:1")
    resumed = EWC(other, {name: torch.zeros_like(p) for name, p in other.named_parameters()}, 1.0)
    resumed.load_state_dict(saved["ewc"])
    assert resumed.penalty() == ewc.penalty() > 0
    wrong = select(nn.Sequential(nn.Linear(4, 2)), "all")
    with pytest.raises(ValueError, match=r"fisher\['0.weight'\] is missing"):
        EWC(wrong, {n: torch.zeros_like(p) for n, p in wrong.named_parameters()}, 1.0).load_state_dict(
            saved["ewc"]
        )


def test_ewc_refuses_bad_arguments():
    plan = select(mlp(), "last:1")
    good = {name: torch.ones_like(p) for name, p in plan.named_parameters()}
    for strength in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"strength is .*; expected a finite number > 0"):
            EWC(plan, good, strength)
    with pytest.raises(
        ValueError, match=r"fisher\['4.bias'\] is of shape \(3,\); expected one of shape \(2,\)"
    ):
        EWC(plan, good | {"4.bias": torch.ones(3)}, 1.0)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="below 0 or not finite"):
            EWC(plan, good | {"4.bias": torch.tensor([value, 1])}, 1.0)
