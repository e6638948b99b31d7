"""The configuration of ``superfine tune``: one TOML file, flags over it, and errors that name the key.

``Config`` lists every key with its default; ``examples/tweets.toml`` explains them. Values are checked
strictly ("3" is not 3) and unknown keys are errors, because a misspelt key that is silently ignored costs a
training run.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Config", "differing_keys", "load_config", "parse_override", "to_toml"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataConfig(_Section):
    """Where the samples come from and how they are split."""

    path: str | None = None  # .csv, .tsv or .jsonl; of a language model also .txt, or a folder of these
    dataset: str | None = None  # name for datasets.load_dataset, instead of path
    dataset_config: str | None = None
    text: str | list[str] = "text"  # one column, or two for sentence pairs
    label: str = "label"
    validation: float | str = 0.1  # fraction, or a file (path) or split name (dataset)
    test: float | str = 0.1
    dedupe: bool = True
    max_length: int = Field(default=128, ge=2)  # tokens; longer texts are cut
    pack: bool = True  # language models: texts follow each other in blocks of max_length, uncut
    limit: int | None = Field(default=None, ge=3)  # use this many samples, drawn by seed
    seed: int = Field(default=0, ge=0)
    on_bad_line: Literal["error", "skip"] = "error"
    encoding: str = "utf-8"  # of the files; any codec of Python's

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("expected one of path (a file) and dataset (a name)")
        if len(self.text_columns) not in (1, 2) or len(set(self.text_columns)) != len(self.text_columns):
            raise ValueError(f"text is {self.text!r}; expected one column, or two different ones")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(
                f"encoding is {self.encoding!r}; expected a codec such as utf-8 or latin-1"
            ) from None
        fractions = [f for f in (self.validation, self.test) if isinstance(f, float)]
        if any(not 0 < f < 1 for f in fractions) or sum(fractions) >= 1:
            raise ValueError(
                f"validation is {self.validation} and test is {self.test}; expected fractions above 0 that"
                " leave some for training, or file names"
            )
        return self


class ModelConfig(_Section):
    """The pretrained model."""

    name: str  # a local Hugging Face folder, or a hub name
    task: Literal["classification", "regression", "causal-lm", "translation", "qa"] = "classification"


class SelectConfig(_Section):
    """Which parameters train: arguments of ``superfine.select``."""

    parameters: list[str] = ["last:2", "head"]
    rows: dict[str, Any] = {}  # of layers by name or glob: indices, a share, "norm:0.05", "tokens", ...
    cols: dict[str, Any] = {}
    tied: Literal["both", "head"] = "both"
    seed: int = Field(default=0, ge=0)  # of "random:0.05"

    @model_validator(mode="after")
    def _check(self) -> SelectConfig:
        if not (self.parameters or self.rows or self.cols):
            raise ValueError("parameters is []; expected at least one selector, or rows or cols")
        for argument, chosen in (("rows", self.rows), ("cols", self.cols)):
            for key, value in chosen.items():
                numbers = isinstance(value, list) and all(type(number) is int for number in value)
                if not (numbers or type(value) in (float, str)) or (argument, value) == ("cols", "tokens"):
                    tokens = ", 'tokens'" if argument == "rows" else ""
                    raise ValueError(
                        f"{argument}[{key!r}] is {value!r}; expected a list of indices, a fraction such as 0.05,"
                        f" 'norm:0.05', 'random:0.05'{tokens} or 'new:32000'"
                    )
        return self


class OptimizerConfig(_Section):
    """The optimizer and gradient clipping. An option left out takes the optimizer's own default."""

    name: Literal["adamw", "adam", "lamb", "sgd"] = "adamw"
    lr: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    betas: list[float] | None = Field(default=None, min_length=2, max_length=2)
    eps: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    state_dtype: Literal["bf16", "8bit"] | None = None
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # each block's lr is this times that of the next
    anchor: bool = False  # weight decay pulls toward the pretrained weights instead of zero (L2-SP)
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)  # 0: no clipping

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        foreign = ("betas", "eps", "state_dtype") if self.name == "sgd" else ("momentum",)
        for key in foreign:
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is set; expected none, because {self.name} has no {key}")
        if self.anchor and (self.name == "sgd" or not self.weight_decay):
            raise ValueError(
                f"anchor is true with {self.name} and weight_decay {self.weight_decay}; expected adamw, adam or "
                "lamb, and a weight_decay above 0, which is what pulls"
            )
        if self.betas is not None and any(not 0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas is {self.betas}; expected two numbers in [0, 1)")
        return self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``Plan.optimizer``."""
        optional = {
            "betas": self.betas and tuple(self.betas),
            "eps": self.eps,
            "momentum": self.momentum,
            "state_dtype": self.state_dtype,
            "layer_decay": self.layer_decay if self.layer_decay < 1 else None,
            "anchored": self.anchor or None,
        }
        return {"lr": self.lr, "weight_decay": self.weight_decay} | {
            key: value for key, value in optional.items() if value is not None
        }


class TrainConfig(_Section):
    """The loop: length, batches, schedule, precision, and how often things happen (in optimizer steps)."""

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=32, ge=1)  # samples in one forward pass
    accumulation: int = Field(default=1, ge=1)  # forward passes per optimizer step
    warmup: int | float = 0.1  # an integer: steps; below 1 with a point: fraction of all steps
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, parameters stay fp32
    loss: Literal["cross_entropy", "binary_cross_entropy", "mse"] = "cross_entropy"
    fused_loss: bool = True  # language models: the loss without logits; false: eager torch's
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    eval_every: int = Field(default=0, ge=0)  # 0: at the end of every epoch
    patience: int = Field(default=3, ge=0)  # validations without improvement before stopping; 0: never
    checkpoint_every: int = Field(default=100, ge=0)  # 0: only at validations
    log_every: int = Field(default=10, ge=1)
    prepare: bool = (
        True  # superfine.prepare: frozen layers without a graph, fused ops, the one position that counts
    )
    checkpointing: bool | str = (
        False  # true or "every:N": trained layers run again in backward, for less memory
    )
    cache: str | None = Field(default=None, min_length=1)  # directory: what the frozen layers compute, kept
    cache_dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup >= 1):
            raise ValueError(f"warmup is {self.warmup}; expected whole steps, or a fraction in [0.0, 1.0)")
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(f"label_smoothing is {self.label_smoothing}; expected 0.0 with {self.loss}")
        if self.checkpointing and not self.prepare:
            raise ValueError(f"checkpointing is {self.checkpointing!r}; expected prepare = true with it")
        return self


class OutputConfig(_Section):
    """Where the run is written."""

    directory: str


class TranslationConfig(_Section):
    """``model.task = "translation"``."""

    prefix: str = ""  # before every source: "translate English to German: " for T5
    max_target_length: int = Field(default=128, ge=2)  # tokens
    generate: Literal["never", "test", "validation"] = (
        "test"  # when text is written and scored by chrF and BLEU
    )


class QAConfig(_Section):
    """``model.task = "qa"``."""

    stride: int = Field(default=128, ge=0)  # tokens that two windows of a long context share
    n_best: int = Field(default=20, ge=1)  # first and last tokens of a window that are tried with each other
    max_answer_length: int = Field(default=30, ge=1)  # tokens
    impossible: bool = False  # questions without an answer are allowed


class _Columns(_Section):
    text: str | list[str] | None = None  # columns; None: as in [data]
    label: str | None = None

    @property
    def text_columns(self) -> tuple[str, ...] | None:
        text = [self.text] if isinstance(self.text, str) else self.text
        return None if text is None else tuple(text)


class ReplayConfig(_Columns):
    """Samples of the task that the model knows already, mixed into the training against forgetting."""

    path: str
    fraction: float = Field(default=0.1, gt=0, lt=1)  # of the samples of an epoch


class OriginalConfig(_Columns):
    """Held-back samples of the task that the model knows already: scored before and after."""

    path: str


class EWCConfig(_Columns):
    """``superfine.EWC``: what the task that the model knows already needs is pulled toward where it was."""

    path: str | None = None  # samples of that task; None: those of [original]
    strength: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    samples: int = Field(default=256, ge=1)  # drawn by data.seed, for the Fisher information

    @model_validator(mode="after")
    def _check(self) -> EWCConfig:
        if self.path is None and (self.text is not None or self.label is not None):
            raise ValueError(
                "text or label is given without path; expected neither with the data of [original]"
            )
        return self


# What differs from the defaults above, as they suit classification.
TASK_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "regression": {"train": {"loss": "mse"}},
    "causal-lm": {
        "data": {"max_length": 512},
        "select": {"parameters": ["last:2"]},  # the head is often tied to the embeddings
        "train": {"batch_size": 8},
    },
    "translation": {
        "data": {"text": "source", "label": "target"},
        "select": {"parameters": ["last:2"]},
        "train": {"batch_size": 16},
        "translation": {},
    },
    "qa": {
        "data": {"text": ["question", "context"], "label": "answers", "max_length": 384},
        "train": {"batch_size": 16},
        "qa": {},
    },
}


class Config(_Section):
    """A whole run."""

    data: DataConfig
    model: ModelConfig
    select: SelectConfig = SelectConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    translation: TranslationConfig | None = None
    qa: QAConfig | None = None
    replay: ReplayConfig | None = None
    original: OriginalConfig | None = None
    ewc: EWCConfig | None = None
    output: OutputConfig

    @model_validator(mode="before")
    @classmethod
    def _task_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        task = _given(values.get("model")).get("task")
        for section, table in TASK_DEFAULTS.get(task, {}).items() if isinstance(task, str) else ():
            given = values.get(section, {})
            if isinstance(given, (dict, _Section)):
                values = values | {section: table | _given(given)}
        return values

    @model_validator(mode="after")
    def _check_task(self) -> Config:
        task, labels = self.model.task, self.model.task in ("classification", "regression")
        for section in ("translation", "qa"):
            if getattr(self, section) is not None and task != section:
                raise ValueError(f"[{section}] is given; expected it with model.task = {section!r} only")
        if not self.train.fused_loss and task not in ("causal-lm", "translation"):
            raise ValueError(
                "train.fused_loss is false; expected it with model.task = 'causal-lm' and 'translation' only"
            )
        if not self.data.pack and task != "causal-lm":
            raise ValueError("data.pack is false; expected it with model.task = 'causal-lm' only")
        if task != "causal-lm" and self.data.label in self.data.text_columns:
            raise ValueError(f"data: label and text are both {self.data.label!r}; expected different columns")
        loss = "mse" if task == "regression" else "cross_entropy"
        if task != "classification" and self.train.loss != loss:
            raise ValueError(f"train.loss is {self.train.loss!r}; expected {loss!r} with {task}")
        if self.train.label_smoothing and not labels:
            raise ValueError(
                f"train.label_smoothing is {self.train.label_smoothing}; expected 0.0 with {task}"
            )
        if task == "qa" and len(self.data.text_columns) != 2:
            raise ValueError(
                f"data.text is {self.data.text!r}; expected two columns, question and context, with qa"
            )
        if task == "qa" and self.data.max_length < 16:
            raise ValueError(f"data.max_length is {self.data.max_length}; expected at least 16 with qa")
        if self.ewc is not None and self.ewc.path is None and self.original is None:
            raise ValueError(
                "ewc.path is missing; expected it, or a section [original], whose data then serve"
            )
        if (self.select.rows or self.select.cols) and not self.train.prepare:
            raise ValueError("train.prepare is false; expected true with select.rows and select.cols")
        if not labels and task != "qa" and len(self.data.text_columns) != 1:
            raise ValueError(f"data.text is {self.data.text!r}; expected one column with {task}")
        return self


def _given(section: Any) -> dict[str, Any]:
    """The keys that a section, an object or a table, was given."""
    if isinstance(section, _Section):
        return {key: getattr(section, key) for key in section.model_fields_set}
    return section if isinstance(section, dict) else {}


def load_config(
    path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Read a TOML file, if there is one, and put ``overrides`` such as ``{"train.epochs": 3}`` over it.

    Raises ``FileNotFoundError``, or ``ValueError`` in one line that names the file, the key and near misses.
    """
    where = "config" if path is None else str(path)
    values: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"config: {path} is not a file; expected a TOML configuration")
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}: not valid TOML: {error}") from None
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        if not name:
            raise ValueError(f"config: override is {key!r}; expected section.key, such as train.epochs")
        table = values.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"{where}: {section} is {table!r}; expected a section [{section}]")
        table[name] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(error)}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """``"train.epochs=3"`` -> ``("train.epochs", 3)``: a TOML value, or a string where it is none.

    Raises ``ValueError`` where no key is named.
    """
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ValueError(f"config: override is {text!r}; expected section.key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def to_toml(config: Config) -> str:
    """The configuration as TOML, every key that has a value, so that a run records its defaults too."""
    lines = []
    for section, table in config.model_dump(exclude_none=True).items():
        lines.append(f"[{section}]")
        lines.extend(f"{key} = {_toml_value(value)}" for key, value in table.items())
        lines.append("")
    return "\n".join(lines)


def differing_keys(a: Config, b: Config) -> list[str]:
    """Dotted names of the keys whose values differ; where the run lies is no part of the comparison."""
    left, right = a.model_dump(), b.model_dump()
    found = []
    for section in left:
        ours, theirs = left[section] or {}, right[section] or {}
        if section != "output":
            found += [f"{section}.{key}" for key in ours | theirs if ours.get(key) != theirs.get(key)]
    return found


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML also wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        items = (f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    return repr(value)


def _explain(error: ValidationError) -> str:
    """The first problem in one line: key, value, what was expected, near misses."""
    problems = error.errors()
    problem = problems[0]
    # Branches of a union add their type's name to the location; a key is section.name and no deeper.
    location = [str(part) for part in problem["loc"][:2]]
    key = ".".join(location) or "the configuration"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        text = f"{key} is not a known {'key' if len(location) > 1 else 'section'}"
        text += _did_you_mean(location[-1], known) or f"; expected one of {', '.join(known)}"
    elif problem["type"] == "missing":
        text = f"{key} is missing"
        if len(location) == 1:
            text += f"; expected a section [{key}]"
    elif problem["type"] == "value_error":
        text = problem["msg"].removeprefix("Value error, ")
        text = f"{key}: {text}" if location else text  # what concerns several sections names its keys
    else:
        expected = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
        text = f"{key} is {problem['input']!r}; expected {expected}"
        if problem["type"] == "literal_error" and isinstance(problem["input"], str):
            choices = problem["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
            text += _did_you_mean(problem["input"], choices)
    others = len({tuple(p["loc"][:2]) for p in problems}) - 1
    return text + (f" (and {others} more problem{'s' if others > 1 else ''})" if others else "")


def _keys_at(location: list[str]) -> list[str]:
    section = Config.model_fields[location[0]].annotation if location else Config
    section = next((kind for kind in get_args(section) if kind is not type(None)), section)  # X of X | None
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _did_you_mean(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
