"""prepare: what it refuses, and what it sees afterwards; under Trainer, PEFT and torch.compile."""

from __future__ import annotations

import time

import pytest
import superfine
import torch
import transformers
from prepare_cases import (
    assert_same_gradients,
    gradients,
    loss,
    make,
    without_dropout,
)
from small_models import TOKENS, VOCAB, bert, llama
from superfine._guard import Flags
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def prepared_bert(*selectors, **options):
    model = make("bert", torch.float32)
    plan = superfine.select(model, *(selectors or ("last:2", "head")))
    return model, plan, superfine.prepare(model, plan, **options)


# --- flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert.pooler.dense.bias", "bert.embeddings.word_embeddings.weight"])
def test_a_flag_that_is_not_the_plans_is_named_by_forward_and_by_step(name):
    model, plan, _ = prepared_bert()
    optimizer = plan.optimizer(lr=1e-3)
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    parameter = model.get_parameter(name)
    trains = parameter.requires_grad
    loss(model).backward()
    before = [p.detach().clone() for p in model.parameters()]
    parameter.requires_grad_(not trains)
    problem = "planned, and is frozen" if trains else "not planned, and requires a gradient"
    with pytest.raises(ValueError, match=rf"forward: '{name}' is {problem}"):
        loss(model)
    with pytest.raises(ValueError, match=rf"step: '{name}' is {problem}"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        loss(model.eval())  # evaluation does not care
    parameter.requires_grad_(trains)
    loss(model.train())
    optimizer.step()


def test_a_later_select_is_seen_and_update_takes_it():
    model, plan, prepared = prepared_bert(checkpointing=True)
    stale = plan.optimizer(lr=1e-3)
    loss(model)
    other = superfine.select(model, "last:1", "head")
    with pytest.raises(ValueError, match=r"'bert\.encoder\.layer\.2\..*' is planned, and is frozen"):
        loss(model)
    with pytest.raises(ValueError, match=r"is frozen against the plan"):
        prepared.update(plan)
    prepared.update(other)
    assert prepared.plan is other
    assert "bert.encoder.layer.3" in prepared.done["checkpointing"]
    assert set(gradients(model)) == set(other.names)
    optimizer = other.optimizer(lr=1e-3)
    loss(model).backward()
    optimizer.step()
    superfine.restore(model)
    with pytest.raises(ValueError, match="restored since"):
        prepared.update(other)
    assert type(model) is transformers.BertForSequenceClassification
    del stale


def test_the_check_takes_less_than_30_microseconds_for_200_parameters():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(100))
    flags = Flags(model, {"0.weight"})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "0.weight")
    best = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        flags.check()
        best = min(best, time.perf_counter() - start)
    assert best < 30e-6


def test_ranks_cannot_come_to_train_different_parameters(tmp_path):
    model, _, _ = prepared_bert()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(TOKENS).logits.sum().backward()
        model.bert.encoder.layer[0].output.dense.bias.requires_grad_(True)
        with pytest.raises(
            ValueError, match=r"'bert\.encoder\.layer\.0\.output\.dense\.bias' is not planned"
        ):
            wrapped(TOKENS)
        superfine.restore(model)
        with pytest.raises(TypeError, match="before it is wrapped"):
            superfine.prepare(wrapped, superfine.select(model, "head"))
    finally:
        torch.distributed.destroy_process_group()


def test_a_parameter_that_is_taken_away_is_named():
    model, _, _ = prepared_bert()
    del model.classifier.bias
    with pytest.raises(ValueError, match=r"'classifier\.bias' is no longer a parameter"):
        loss(model)


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_anything_changes():
    model = make("bert", torch.float32)
    other = make("bert", torch.float32)
    old = superfine.select(model, "last:1")
    plan = superfine.select(model, "last:2", "head")
    classes = [type(module) for module in model.modules()]
    prepare = superfine.prepare
    for error, text, call in (
        (TypeError, "model is int", lambda: prepare(3, plan)),
        (TypeError, "model is DataParallel", lambda: prepare(nn.DataParallel(model), plan)),
        (TypeError, "plan is str", lambda: prepare(model, "last:2")),
        (ValueError, "plan is of another model", lambda: prepare(other, plan)),
        (ValueError, "trains against the plan", lambda: prepare(model, old)),
        (ValueError, "checkpointing is 'every:0'", lambda: prepare(model, plan, checkpointing="every:0")),
        (ValueError, "checkpointing is 2", lambda: prepare(model, plan, checkpointing=2)),
        (TypeError, "truncate is 1", lambda: prepare(model, plan, truncate=1)),
        (
            ValueError,
            "recompute is True and fuse is False",
            lambda: prepare(model, plan, recompute=True, fuse=False),
        ),
        (ValueError, "not prepared", lambda: superfine.restore(model)),
        (TypeError, "model is str", lambda: superfine.restore("model")),
    ):
        with pytest.raises(error, match=text):
            call()
    assert [type(module) for module in model.modules()] == classes
    prepare(model, plan)
    with pytest.raises(ValueError, match="prepared already"):
        prepare(model, plan)
    superfine.restore(model)
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(ValueError, match="not prepared"):
        superfine.restore(model)


def test_a_class_that_someone_else_changed_afterwards_is_told_apart():
    model, _, _ = prepared_bert()
    prepared = type(model)
    model.__class__ = type("Sharded", (prepared,), {})  # as fully_shard does
    with pytest.raises(ValueError, match=r"class was changed after prepare"):
        superfine.restore(model)
    model.__class__ = prepared
    superfine.restore(model)
    assert type(model) is transformers.BertForSequenceClassification


# --- other libraries ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_peft_adapters_in_the_last_layer():
    peft = pytest.importorskip("peft")

    def lora():
        model = make("llama")
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 2], init_lora_weights=False
        )
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).double().train()

    model = lora()
    plan = superfine.select(model, "*lora_*")
    expected = gradients(model)
    assert expected
    model.enable_input_require_grads()
    prepared = superfine.prepare(model, plan, checkpointing=True, fuse=False)
    assert "layers.1" in prepared.done["truncate"]
    seen = []
    model.base_model.model.model.layers[0].register_forward_hook(
        lambda module, args, output: seen.append(output.requires_grad)
    )
    for _ in range(2):
        assert_same_gradients(gradients(model), expected, 1e-10)
    assert seen == [False, False]
    superfine.restore(model)
    assert type(model).__name__ == "PeftModel"
    assert_same_gradients(gradients(model), expected, 1e-10)


@pytest.mark.filterwarnings("default")
def test_peft_prompts_that_go_through_the_prefix_are_named():
    peft = pytest.importorskip("peft")
    model = make("llama", torch.float32)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(model, config).train()
    superfine.prepare(model, superfine.select(model, "prompt_encoder*"))
    with pytest.raises(ValueError, match=r"'prompt_encoder\..*' trains and is used before"):
        model(input_ids=TOKENS)


@pytest.mark.filterwarnings("default")  # Trainer and accelerate give warnings of their own
def test_trainer_makes_the_eager_run(tmp_path):
    pytest.importorskip("accelerate")
    results = []
    for prepare in (False, True):
        model = make("bert", torch.float32)
        plan = superfine.select(model, "last:2", "head")
        if prepare:
            superfine.prepare(model, plan, checkpointing=True)
        generator = torch.Generator().manual_seed(0)
        samples = [
            {"input_ids": torch.randint(1, VOCAB, (8,), generator=generator), "labels": torch.tensor(i % 3)}
            for i in range(16)
        ]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(prepare)), use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=samples, eval_dataset=samples)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append([*losses, trainer.evaluate()["eval_loss"]])
        if prepare:
            trainer.save_model()
            assert (tmp_path / "True" / "model.safetensors").is_file()
            superfine.restore(model)
            assert type(model) is transformers.BertForSequenceClassification
    assert results[1] == pytest.approx(results[0], rel=1e-4)


@pytest.mark.filterwarnings("default")
def test_accelerates_mixed_precision_keeps_a_forward_that_outlives_update_and_restore():
    accelerate = pytest.importorskip("accelerate")
    model, _, prepared = prepared_bert(checkpointing=True)
    accelerate.state.AcceleratorState._reset_state(True)  # another test's Trainer has made one
    wrapped = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert wrapped is model
    assert "forward" in vars(model)
    loss(wrapped).backward()
    prepared.update(superfine.select(model, "last:1", "head"))
    assert "forward" in vars(model)
    loss(wrapped).backward()
    superfine.restore(model)
    assert loss(wrapped).isfinite()
    accelerate.state.AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match=r"model\.forward was replaced"):
        superfine.prepare(model, superfine.select(model, "head"))


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own imports
def test_a_compiled_model_is_one_graph_with_the_same_gradients():
    torch.compiler.reset()
    model = without_dropout(bert(layers=2)).double().train()
    plan = superfine.select(model, "last:1", "head")
    expected = gradients(model)
    superfine.prepare(model, plan, checkpointing=True, fuse=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        loss_of = compiled(TOKENS, attention_mask=mask()).logits.square().sum()
        model.zero_grad()
        loss_of.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same_gradients(found, expected, 1e-9)
    model.zero_grad()
    assert_same_gradients(gradients(model), expected, 1e-10)  # eager again
    superfine.restore(compiled)
    assert type(model) is transformers.BertForSequenceClassification


def mask():
    found = torch.ones_like(TOKENS)
    found[1, 4:] = 0
    return found


def test_a_vocabulary_whose_rows_train_keeps_its_size():
    for rows in ({"embed_tokens": [1, 3]}, {"lm_head": [1, 3]}):
        model = llama()
        weight = model.model.embed_tokens.weight
        superfine.prepare(model, superfine.select(model, "last:1", rows=rows))
        with pytest.raises(
            ValueError, match=r"_rows' trains in a prepared model; expected superfine.restore"
        ):
            model.resize_token_embeddings(VOCAB + 8)
        assert model.model.embed_tokens.weight is weight
        assert weight.shape[0] == VOCAB
        loss(model).backward()
        superfine.restore(model)
        model.resize_token_embeddings(VOCAB + 8)
        superfine.prepare(model, superfine.select(model, "last:1", rows=rows))
        assert loss(model).isfinite()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's
def test_a_frozen_vocabulary_may_be_resized_also_below_adapters():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    superfine.prepare(model, superfine.select(model, "*lora_*"))
    model.resize_token_embeddings(VOCAB + 8)
    model(TOKENS + 8, labels=TOKENS).loss.backward()
    superfine.restore(model)
    model = llama()
    superfine.prepare(model, superfine.select(model, "head"))
    with pytest.raises(ValueError, match=r"'lm_head.weight' trains in a prepared model"):
        model.resize_token_embeddings(VOCAB + 8)
