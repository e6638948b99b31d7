"""use_fused_loss under transformers.Trainer: the same run, with accumulation, evaluation, prediction and files."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import small_models
import torch
import transformers
from superfine.fused_loss import use_fused_loss
from torch import nn

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
pytestmark = [
    pytest.mark.filterwarnings("default"),  # Trainer and accelerate give warnings of their own
    pytest.mark.usefixtures("one_thread"),
]


def samples(model: nn.Module, n: int = 16) -> list[dict[str, torch.Tensor]]:
    """Of 8 tokens, with as many labels ignored as their number modulo 5: batches weigh differently."""
    found = []
    for i in range(n):
        ids = torch.randint(1, small_models.VOCAB, (8,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: i % 5] = -100
        if model.loss_type == "ForSequenceClassification":
            labels = torch.tensor(i % 3)
        found.append({"input_ids": ids, "labels": labels})
    return found


def train(model: nn.Module, folder, **settings) -> tuple[transformers.Trainer, list[float]]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", seed=0,
        logging_steps=1, logging_first_step=True, lr_scheduler_type="constant", learning_rate=1e-2, max_grad_norm=1.0,
        **{"max_steps": 6, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2} | settings,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=samples(model), eval_dataset=samples(model, 5)
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


MODELS = {
    "llama": small_models.llama,
    "bert": lambda: without_dropout(small_models.bert("BertForMaskedLM")),
    "bert, sequences": lambda: without_dropout(small_models.bert()),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_the_eager_one(name, tmp_path):
    model = MODELS[name]()
    other = copy.deepcopy(model)
    fused = use_fused_loss(model)
    trainer, losses = train(model, tmp_path / "fused")
    eager, expected = train(other, tmp_path / "eager")
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=1e-4)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3), "it trains"
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)

    assert trainer.evaluate()["eval_loss"] == pytest.approx(eager.evaluate()["eval_loss"], rel=1e-4)
    predicted, wanted = (each.predict(samples(model, 5)) for each in (trainer, eager))
    assert predicted.predictions.shape == wanted.predictions.shape
    np.testing.assert_allclose(predicted.predictions, wanted.predictions, rtol=1e-2, atol=1e-3)
    assert predicted.metrics["test_loss"] == pytest.approx(wanted.metrics["test_loss"], rel=1e-4)

    trainer.save_model(str(tmp_path / "saved"))
    fused.remove()
    again = type(model).from_pretrained(tmp_path / "saved")
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_gradients_are_those_of_one_large_batch(name, tmp_path):
    # Samples ignore different numbers of labels: only the number in the whole step weighs them right.
    model = MODELS[name]()
    other = copy.deepcopy(model)
    use_fused_loss(model)
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    _, losses = train(model, tmp_path / "fused", **small, max_steps=4)
    _, expected = train(other, tmp_path / "eager", per_device_train_batch_size=4, max_steps=4)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_metrics_get_logits(tmp_path):
    model = small_models.llama()
    use_fused_loss(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True
    )
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = transformers.Trainer(
        model, arguments, eval_dataset=samples(model, 5), compute_metrics=compute_metrics
    )
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert seen == [(5, 8, small_models.VOCAB)]


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}], ids=str
)
def test_other_settings(settings, tmp_path):
    # bf16 wraps model.forward; label smoothing takes logits and no labels.
    model = small_models.llama()
    other = copy.deepcopy(model)
    use_fused_loss(model)
    trainer, losses = train(model, tmp_path / "fused", **settings)
    eager, expected = train(other, tmp_path / "eager", **settings)
    assert losses == pytest.approx(expected, rel=1e-2 if "bf16" in settings else 1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(eager.evaluate()["eval_loss"], rel=1e-2)
    assert type(trainer.accelerator.unwrap_model(trainer.model_wrapped)) is type(model)
