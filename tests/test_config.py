"""The configuration: defaults, overrides, round trip through TOML, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from superfine.config import (
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    TrainConfig,
    differing_keys,
    load_config,
    parse_override,
    to_toml,
)

MINIMAL = """
[data]
path = "tweets.csv"
[model]
name = "bert"
[output]
directory = "runs/x"
"""


def written(tmp_path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_left_out_takes_its_default(tmp_path):
    config = load_config(written(tmp_path, MINIMAL))
    assert config.data.path == "tweets.csv"
    assert config.data.text_columns == ("text",)
    assert config.select.parameters == ["last:2", "head"]
    assert config.optimizer.name == "adamw"
    assert config.train.loss == "cross_entropy"


def test_overrides_go_over_the_file(tmp_path):
    path = written(tmp_path, MINIMAL + "[train]\nepochs = 5\nseed = 3\n")
    config = load_config(path, {"train.epochs": 7, "optimizer.lr": 1e-3})
    assert (config.train.epochs, config.train.seed, config.optimizer.lr) == (7, 3, 1e-3)


def test_overrides_alone_are_enough():
    config = load_config(overrides={"data.path": "a.csv", "model.name": "bert", "output.directory": "out"})
    assert config.output.directory == "out"


@pytest.mark.parametrize(
    "text",
    [
        'quote " and \\ backslash',
        "new\nline and tab\t",
        "naïve 🤗 漢字",
        "control \x01 and \x7f",
        "[section] # no",
    ],
)
def test_toml_round_trip_keeps_every_value(tmp_path, text):
    config = Config.model_validate(
        {
            "data": {"dataset": text, "text": ["a", text], "validation": text, "limit": 10, "dedupe": False},
            "model": {"name": text},
            "optimizer": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8},
            "train": {"warmup": 7},
            "output": {"directory": text},
        }
    )
    assert load_config(written(tmp_path, to_toml(config))) == config


def test_round_trip_keeps_a_fraction_apart_from_steps(tmp_path):
    for warmup in (0, 0.0, 1, 0.5):
        config = load_config(written(tmp_path, MINIMAL), {"train.warmup": warmup})
        again = load_config(written(tmp_path, to_toml(config)))
        assert type(again.train.warmup) is type(warmup)


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("[train]\nepoch = 3", "train.epoch is not a known key; did you mean 'epochs'?"),
        ("[trian]\nepochs = 3", "trian is not a known section; did you mean 'train'?"),
        ("[train]\nzzz = 3", "train.zzz is not a known key; expected one of epochs, batch_size"),
        ('[train]\nepochs = "three"', "train.epochs is 'three'; expected integer"),
        ("[train]\nepochs = true", "train.epochs is True; expected integer"),
        ("[train]\nepochs = 0", "train.epochs is 0; expected greater than or equal to 1"),
        ('[train]\nschedule = "cosin"', "expected 'constant', 'linear' or 'cosine'; did you mean 'cosine'?"),
        ("[train]\nwarmup = 1.0", "train: warmup is 1.0; expected whole steps, or a fraction"),
        ("[train]\nwarmup = -1", "train: warmup is -1"),
        ('[train]\nloss = "mse"\nlabel_smoothing = 0.1', "label_smoothing is 0.1; expected 0.0 with mse"),
        ("[optimizer]\nlr = nan", "optimizer.lr is nan; expected"),
        (
            '[optimizer]\nname = "sgd"\nbetas = [0.9, 0.99]',
            "betas is set; expected none, because sgd has no betas",
        ),
        ("[optimizer]\nmomentum = 0.9", "momentum is set; expected none, because adamw has no momentum"),
        ("[optimizer]\nbetas = [0.9]", "optimizer.betas is [0.9]; expected"),
        ("[optimizer]\nbetas = [0.9, 1.0]", "betas is [0.9, 1.0]; expected two numbers in [0, 1)"),
        ("[select]\nparameters = []", "select: parameters is []; expected"),
        ('[select]\nparameters = "head"', "select.parameters is 'head'; expected list"),
    ],
)
def test_an_error_names_file_key_and_expectation(tmp_path, addition, message):
    path = written(tmp_path, MINIMAL + addition)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "expected one of path (a file) and dataset (a name)"),
        ({"path": "a.csv", "dataset": "imdb"}, "expected one of path (a file) and dataset (a name)"),
        ({"path": "a.csv", "text": ["a", "b", "c"]}, "expected one column, or two different ones"),
        ({"path": "a.csv", "text": ["a", "a"]}, "expected one column, or two different ones"),
        ({"path": "a.csv", "text": "label"}, "label and text are both 'label'"),
        ({"path": "a.csv", "validation": 0.5, "test": 0.5}, "expected fractions above 0 that leave some"),
        ({"path": "a.csv", "test": 0.0}, "validation is 0.1 and test is 0.0; expected fractions above 0"),
        ({"path": "a.csv", "encoding": "utf-9"}, "encoding is 'utf-9'; expected a codec"),
    ],
)
def test_contradictory_data_settings_are_errors(data, message):
    values = {f"data.{key}": value for key, value in data.items()}
    with pytest.raises(ValueError) as caught:
        load_config(overrides={"model.name": "b", "output.directory": "o", "data.seed": 0, **values})
    assert str(caught.value).startswith("config: data: ")
    assert message in str(caught.value)


def test_sections_given_as_objects_take_the_task_s_defaults():
    model = ModelConfig(name="m", task="causal-lm")
    given = {"data": DataConfig(path="x", text="label"), "output": OutputConfig(directory="o")}
    config = Config(model=model, train=TrainConfig(epochs=7), **given)
    assert (config.data.max_length, config.train.batch_size, config.train.epochs) == (512, 8, 7)
    assert config.select.parameters == ["last:2"]
    assert Config(model=model, train=TrainConfig(batch_size=32), **given).train.batch_size == 32
    assert Config.model_validate(config) == config


def test_several_problems_are_counted(tmp_path):
    with pytest.raises(ValueError, match=r"train.epochs is 0; .* \(and 1 more problem\)$"):
        load_config(written(tmp_path, MINIMAL + "[train]\nepochs = 0\nbatch_size = 0"))


def test_missing_sections_are_named():
    with pytest.raises(ValueError, match=r"model is missing; expected a section \[model\]"):
        load_config(overrides={"data.path": "a.csv", "output.directory": "o"})


def test_a_file_that_is_no_toml_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not valid TOML"):
        load_config(written(tmp_path, "[data\n"))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a TOML configuration"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("train.epochs=3", ("train.epochs", 3)),
        ("train.warmup=0.5", ("train.warmup", 0.5)),
        ("data.dedupe=false", ("data.dedupe", False)),
        ('select.parameters=["head", "norms"]', ("select.parameters", ["head", "norms"])),
        ("model.name=bert-base", ("model.name", "bert-base")),  # no TOML value: a string
        ("data.path=a=b.csv", ("data.path", "a=b.csv")),
    ],
)
def test_an_override_on_the_command_line_is_a_toml_value_or_a_string(text, parsed):
    assert parse_override(text) == parsed


@pytest.mark.parametrize("text", ["train.epochs", "epochs=3", ""])
def test_an_override_without_key_or_value_is_an_error(text):
    with pytest.raises(ValueError, match=r"expected section\.key=value"):
        parse_override(text)


def test_differing_keys_are_named_and_the_place_does_not_count(tmp_path):
    a = load_config(written(tmp_path, MINIMAL))
    b = load_config(
        written(tmp_path, MINIMAL), {"train.seed": 1, "optimizer.lr": 1.0, "output.directory": "elsewhere"}
    )
    assert differing_keys(a, a) == []
    assert differing_keys(a, b) == ["optimizer.lr", "train.seed"]


def test_the_example_of_a_language_model_is_valid():
    config = load_config(Path(__file__).parents[1] / "examples" / "text.toml")
    assert config.model.task == "causal-lm"
    assert config.train.fused_loss


def test_a_task_has_its_own_defaults_and_what_is_given_goes_over_them(tmp_path):
    values = {"data.path": "a.txt", "model.name": "m", "model.task": "causal-lm", "output.directory": "o"}
    config = load_config(overrides=values)
    assert (config.data.max_length, config.train.batch_size) == (512, 8)
    assert config.select.parameters == ["last:2"]
    config = load_config(overrides=values | {"data.max_length": 64, "select.parameters": ["norms"]})
    assert (config.data.max_length, config.train.batch_size) == (64, 8)
    assert config.select.parameters == ["norms"]
    assert differing_keys(config, load_config(written(tmp_path, to_toml(config)))) == []


def test_the_annotated_example_is_valid():
    example = Path(__file__).parents[1] / "examples" / "tweets.toml"
    config = load_config(example)
    # It shows every key, so that it can serve as the reference.
    shown = example.read_text(encoding="utf-8")
    for section, table in config.model_dump(exclude_none=True).items():
        for key, value in table.items():
            assert value is None or f"\n{key} = " in shown, f"{section}.{key} is not in the example"


def test_every_example_is_valid():
    examples = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))
    tasks = {load_config(example).model.task for example in examples}
    assert tasks == {"classification", "regression", "causal-lm", "translation", "qa"}
