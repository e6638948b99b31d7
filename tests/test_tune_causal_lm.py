"""superfine tune with a causal language model: both losses, what is reported, and what comes afterwards."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from superfine import hf
from superfine._memory import PeakMemory
from superfine.cli import app
from superfine.config import load_config
from superfine.evaluate import evaluate, evaluate_saved, load_run
from superfine.tune import tune
from tiny_models import story, tiny_llama, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from tune_runs import At, CrashError, Recorder, assert_same_run, crash, of_kind
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """About 2,300 tokens: 59 blocks of 32 to train on."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(story(80))
    return path


def settings(base: Path, data: Path, out: Path, **values):
    overrides = {
        "data.path": str(data),
        "data.max_length": 32,
        "model.name": str(base),
        "model.task": "causal-lm",
        "optimizer.lr": 3e-3,
        "train.epochs": 2,
        "train.checkpoint_every": 3,
        "train.log_every": 1,
        "train.device": "cpu",
        "output.directory": str(out),
    }
    return load_config(overrides=overrides | {key.replace("__", "."): value for key, value in values.items()})


@pytest.fixture(scope="module")
def run(llama, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("superfine.tune._write_report", lambda directory, listener: None)
        tune(settings(llama, text, out))
    return out


def superfine(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- training ---------------------------------------------------------------------------------------------------


def test_a_run_learns_and_reports_perplexity_and_memory(llama, text, tmp_path, monkeypatch):
    monkeypatch.undo()  # with its report
    told = Recorder()
    result = tune(settings(llama, text, tmp_path / "run", train__epochs=4), listener=told)
    assert told.stages == [1, 2, 3, 4, 5, 6]
    assert result.test["loss"] < 0.95 * result.baseline["loss"]
    for scores in (result.test, result.baseline, *of_kind(tmp_path / "run", "validation")):
        assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    memory = result.summary["peak_memory_bytes"]
    assert memory is None or memory >= result.summary["memory_before_training_bytes"] > 1e7
    assert any(note.startswith("memory: ") for note in told.notes) == (memory is not None)
    assert any(note.startswith("train: 1,888 tokens in 59 samples of up to 32") for note in told.notes)
    start = of_kind(tmp_path / "run", "start")[0]
    assert start["data"]["tokens"]["train"] == 1888
    page = (tmp_path / "run" / "report.html").read_text()
    assert "test perplexity" in page
    assert ("peak memory of training" in page) == (memory is not None)


@pytest.mark.parametrize(
    "values",
    [{}, {"train__accumulation": 3}, {"data__pack": False}, {"select__parameters": ["norms", "head"]}],
    ids=str,
)
def test_fused_and_eager_losses_train_alike(llama, tmp_path, values):
    # Texts of unequal length: unpacked they weigh by their tokens, in batches and over accumulated ones.
    data = write_jsonl(
        tmp_path / "a.jsonl", [{"text": story(1 + i % 3, seed=i)[: 40 + 9 * i]} for i in range(40)]
    )
    for name, fused in (("fused", True), ("eager", False)):
        tune(settings(llama, data, tmp_path / name, train__fused_loss=fused, **values))
    for kind in ("train", "validation", "baseline", "test"):
        found, expected = (of_kind(tmp_path / name, kind) for name in ("fused", "eager"))
        assert len(found) == len(expected) > 0
        assert [event["loss"] for event in found] == pytest.approx(
            [event["loss"] for event in expected], rel=1e-5
        )


def test_the_first_loss_is_the_mean_over_all_tokens_of_the_step(llama, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": story(1, seed=i)[: 30 + 9 * i]} for i in range(20)])
    options = {"data__pack": False, "train__batch_size": 3, "train__accumulation": 2}
    config = settings(llama, data, tmp_path / "run", **options)
    tune(config)
    from superfine.data import load_splits
    from superfine.tasks import CausalLM

    task = CausalLM(max_length=32, pack=False)
    rows = load_splits(config.data, CausalLM()).train
    encoded = hf.encode(rows, hf.load_tokenizer(str(llama)), task)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    total, count = 0.0, 0
    for i in hf.epoch_order(len(encoded), config.train.seed, 0)[:6]:
        ids = torch.tensor(encoded.features["input_ids"][i])
        logp = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        total -= logp.gather(1, ids[1:, None]).sum().item()
        count += len(ids) - 1
    assert len({len(ids) for ids in encoded.features["input_ids"]}) > 3
    assert of_kind(tmp_path / "run", "train")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_bf16(llama, text, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        tune(settings(llama, text, tmp_path / precision, train__precision=precision))
        losses[precision] = [event["loss"] for event in of_kind(tmp_path / precision, "train")]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("step", [3, 8])
def test_a_crashed_run_resumes_to_the_same_bits(llama, text, run, tmp_path, step):
    config = settings(llama, text, tmp_path / "run")
    with pytest.raises(CrashError):
        tune(config, listener=At(step, crash))
    tune(config, resume=True)
    assert_same_run(tmp_path / "run", run)


def test_batches_are_padded_with_labels_that_do_not_count(llama):
    from superfine.data import Rows
    from superfine.tasks import CausalLM

    tokenizer = hf.load_tokenizer(str(llama))
    task = CausalLM(max_length=8, pack=False)
    texts = [("the film",), ("the film was very <end> bad .",), ("good",)]
    encoded = hf.encode(Rows(texts, [None] * 3), tokenizer, task)
    assert len(encoded) == 2, "a single token predicts nothing"
    inputs, targets = encoded.batch([0, 1], "cpu")
    assert inputs["attention_mask"].tolist()[0] == [1, 1] + [0] * (inputs["input_ids"].shape[1] - 2)
    assert targets[0, 2:].unique().tolist() == [-100]
    assert torch.equal(targets[1], inputs["input_ids"][1]), (
        "an end token within a text counts, though it pads, too"
    )
    assert encoded.terms([0, 1]) == (targets[:, 1:] != -100).sum()


# --- afterwards -------------------------------------------------------------------------------------------------


def test_eval_merge_and_generate(run, llama, text, tmp_path):
    (tmp_path / "more.txt").write_text(story(10, seed=7))
    scores = evaluate_saved(run, tmp_path / "more.txt")
    assert set(scores) == {"loss", "perplexity", "rows", "skipped"}
    assert scores["loss"] < evaluate_saved(llama, tmp_path / "more.txt")["loss"]

    done = superfine("merge", run, tmp_path / "merged")
    assert done.exit_code == 0, done.stderr
    done = superfine(
        "eval", tmp_path / "merged", "--data", tmp_path / "more.txt", "--json", tmp_path / "s.json"
    )
    assert done.exit_code == 0, done.stderr
    assert "perplexity" in done.stdout
    assert json.loads((tmp_path / "s.json").read_text())["loss"] == scores["loss"]

    model, tokenizer = (
        kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    tuned, task, _ = load_run(run)
    assert task.kind == "causal-lm"
    for name, value in tuned.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    ids = tokenizer("this is", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 6)
    assert tuned.generate(ids, max_new_tokens=4, do_sample=False).tolist() == model.generate(
        ids, max_new_tokens=4, do_sample=False
    ).tolist()  # fmt: skip


def test_the_command(llama, text, tmp_path):
    done = superfine(
        "tune", "--task", "causal-lm", "--data", text, "--model", llama, "--output", tmp_path / "run",
        "--eager-loss", "--epochs", 1, "--device", "cpu", "--set", "data.max_length=32",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "perplexity" in done.stdout[done.stdout.index("Test split") :]
    config = load_config(tmp_path / "run" / "config.toml")
    assert (config.train.fused_loss, config.select.parameters, config.train.batch_size) == (
        False,
        ["last:2"],
        8,
    )


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"train__loss": "mse"}, ValueError, "config: train.loss is 'mse'; expected 'cross_entropy' with causal-lm"),
        ({"train__label_smoothing": 0.1}, ValueError, "config: train.label_smoothing is 0.1; expected 0.0"),
        ({"data__text": ["a", "b"]}, ValueError, r"config: data.text is \['a', 'b'\]; expected one column"),
        ({"model__task": "causal_lm"}, ValueError, "model.task is 'causal_lm'; .* did you mean 'causal-lm'"),
        ({"model__task": "classification", "train__fused_loss": False}, ValueError, "train.fused_loss is false"),
        ({"model__task": "classification", "data__pack": False}, ValueError, "data.pack is false"),
        ({"data__path": "none.txt"}, FileNotFoundError, r"data: path is none.txt; .*, a \.txt file or"),
        ({"data__max_length": 65}, ValueError, "max_length is 65; expected at most 64"),
        ({"select__parameters": ["last:3"]}, ValueError, "2"),
    ],
)  # fmt: skip
def test_bad_settings_are_errors(llama, text, tmp_path, values, error, message):
    with pytest.raises(error, match=message):
        tune(settings(llama, text, tmp_path / "run", **values))
    assert not (tmp_path / "run").exists()


def test_another_kind_of_model_is_refused(base, text, run, data, tmp_path):
    with pytest.raises(ValueError, match="is a BertModel; expected a causal language model"):
        tune(settings(base, text, tmp_path / "run"))
    with pytest.raises(ValueError, match="eval: label or two text columns are given; expected neither"):
        evaluate_saved(run, data, label="label")


def test_a_model_that_cannot_do_without_logits_says_how_to_go_on(llama, text, tmp_path, monkeypatch):
    def refuse(model, **options):
        raise ValueError("use_fused_loss: expected another model")

    monkeypatch.setattr("superfine.tasks.causal_lm.use_fused_loss", refuse)
    with pytest.raises(ValueError, match=r"expected another model, or train.fused_loss = false"):
        tune(settings(llama, text, tmp_path / "run"))
    assert evaluate_saved(llama, text)["rows"] == 1  # by its own loss
    tune(settings(llama, text, tmp_path / "eager", train__fused_loss=False, train__epochs=1))


def test_a_model_whose_loss_is_of_the_current_token_is_refused(llama, text, tmp_path):
    from transformers import BartConfig, BartForCausalLM

    base = tmp_path / "bart"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8,
        encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=8, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    BartForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    message = (
        r"is a BartForCausalLM, which compares logits with the current token; expected a causal .* shifts"
    )
    with pytest.raises(ValueError, match=message):
        tune(settings(base, text, tmp_path / "run", select__parameters=["all"]))
    with pytest.raises(ValueError, match=message):
        evaluate_saved(base, text)
    assert not (tmp_path / "run").exists()


def test_the_end_token_trains_though_it_pads(llama, text, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": story(1, seed=i)[:60]} for i in range(20)])
    tune(settings(llama, data, tmp_path / "run", select__parameters=["all"], train__epochs=1))
    tuned = load_run(tmp_path / "run")[0].get_input_embeddings().weight
    base = AutoModelForCausalLM.from_pretrained(llama).get_input_embeddings().weight
    end = AutoTokenizer.from_pretrained(llama).eos_token_id
    assert (tuned[end] - base[end]).abs().max() > 1e-3


def test_scores_weigh_every_token_alike(llama, tmp_path):
    from superfine.data import Rows
    from superfine.tasks import CausalLM

    task = CausalLM(max_length=32, pack=False)
    texts = [(story(1, seed=i)[: 12 + 15 * i],) for i in range(7)]  # batches of 2: short and long ones apart
    encoded = hf.encode(Rows(texts, [None] * 7), hf.load_tokenizer(str(llama)), task)
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that losses of tokens differ
    exact, total, count = copy.deepcopy(model).double(), 0.0, 0
    for ids in map(torch.tensor, encoded.features["input_ids"]):
        logp = exact(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= logp.gather(1, ids[1:, None]).sum().item()
        count += len(ids) - 1
    scores = evaluate(model, encoded, task, batch_size=2)
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)


def test_what_is_no_text_for_a_task_names_the_other(llama, text, data, tmp_path):
    done = superfine("tune", "--data", text, "--model", llama, "--output", tmp_path / "run")
    assert done.exit_code == 2
    assert "is plain text; expected .csv, .tsv or .jsonl, or model.task = 'causal-lm'" in done.stderr
    told = Recorder()
    tune(settings(llama, text, tmp_path / "run", data__text="label", train__epochs=1), listener=told)
    assert any(note.startswith("1 text to train on") for note in told.notes)


def test_another_kind_of_model_is_refused_before_its_text_is_read(base, text, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "encode", None)
    with pytest.raises(ValueError, match="is a BertModel; expected a causal language model"):
        tune(settings(base, text, tmp_path / "run"))


def test_a_tied_head_is_an_error_that_names_the_embeddings(text, tmp_path):
    base = tiny_llama(tmp_path / "tied", tied=True)
    with pytest.raises(ValueError, match="is tied to"):
        tune(settings(base, text, tmp_path / "run", select__parameters=["last:1", "head"]))
    tune(settings(base, text, tmp_path / "run", train__epochs=1))


def test_peak_memory_is_that_of_the_phase():
    with PeakMemory(torch.device("cpu")) as memory:
        torch.ones(50_000_000)  # 200 MB, gone at the end
    if memory.peak is None or memory.before is None:
        pytest.skip("this system does not tell")
    assert 190e6 < memory.peak - memory.before < 260e6
    with PeakMemory(torch.device("cpu")) as again:
        pass
    assert again.peak - again.before < 50e6
