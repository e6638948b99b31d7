"""Prepared models where other libraries take them: Trainer's checkpoints, PEFT's merges, export."""

from __future__ import annotations

import pytest
import superfine
import torch
import transformers
from prepare_cases import assert_same_gradients, gradients, make, without_dropout
from small_models import TOKENS, VOCAB, bert

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_thread")]

SLICES = {"rows": {"word_embeddings": [3, 4, 5]}, "cols": {"*.0.output.dense": 0.3}}


def sliced_bert(**options):
    torch.manual_seed(0)
    model = without_dropout(bert(layers=2)).train()
    plan = superfine.select(model, "last:1", "head", **SLICES)
    superfine.prepare(model, plan, **options)
    return model, plan


def test_trainer_resumes_to_the_bits_of_an_unbroken_run(tmp_path):
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"input_ids": torch.randint(1, VOCAB, (8,), generator=generator), "labels": torch.tensor(i % 3)}
        for i in range(16)
    ]

    def train(resume=None):
        model, plan = sliced_bert(checkpointing=True)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=4, save_steps=2,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1,
            label_smoothing_factor=0.1, bf16=True, seed=0,
        )  # fmt: skip
        optimizer = plan.optimizer(lr=1e-2, max_grad_norm=1.0)
        trainer = transformers.Trainer(
            model, arguments, train_dataset=samples, eval_dataset=samples, optimizers=(optimizer, None)
        )
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = {name: value.clone() for name, value in train().items()}
    resumed = train(str(tmp_path / "checkpoint-2"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    loaded = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-4"
    ).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in whole.items())


def test_reentrant_checkpointing_which_needs_inputs_with_gradients_is_named():
    model = without_dropout(bert(layers=3)).train()
    plan = superfine.select(model, "last:1", "head")
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    prepared = superfine.prepare(model, plan)
    with pytest.raises(
        ValueError, match=r"'bert\.encoder\.layer\.2' runs without a graph .*use_reentrant=True"
    ):
        gradients(model)
    with torch.no_grad():
        model(TOKENS)
        model.bert(TOKENS)
    superfine.restore(model)
    prepared = superfine.prepare(model, plan, checkpointing=True)
    assert "switched off" in prepared.done["checkpointing"]
    assert_same_gradients(gradients(model), expected, 1e-4)


def test_what_peft_takes_out_of_a_prepared_model_can_be_restored():
    peft = pytest.importorskip("peft")
    classes = [type(module) for module in make("llama").modules()]
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=[1, 2], init_lora_weights=False
    )
    outer = peft.get_peft_model(make("llama"), config).double().train()
    superfine.prepare(outer, superfine.select(outer, "*lora_*"))
    outer(TOKENS)
    with torch.no_grad():
        expected = outer.eval()(TOKENS).logits
    model = outer.merge_and_unload()
    torch.testing.assert_close(model(TOKENS).logits, expected)
    superfine.select(model, "all")
    with pytest.raises(ValueError, match=r"'weight' of a Embedding requires a gradient.*superfine\.restore"):
        model.train()(TOKENS)
    superfine.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert len(gradients(model)) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="not prepared"):
        superfine.restore(model)


def test_a_restored_model_is_exported_without_ops_of_ours():
    model, _ = sliced_bert()
    model.eval()
    expected = model(TOKENS).logits
    superfine.restore(model)
    exported = torch.export.export(model, (), {"input_ids": TOKENS})
    assert not any("superfine" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
