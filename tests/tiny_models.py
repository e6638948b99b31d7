"""Tiny Hugging Face folders and labelled files, made from nothing, for tests that need a whole model."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

POSITIVE = ("good", "great", "lovely", "happy", "superb")
NEGATIVE = ("bad", "awful", "sad", "poor", "terrible")
NEUTRAL = ("the", "a", "film", "day", "is", "was", "this", "very", "and", "it", "we", "saw")
GERMAN = ("das", "ein", "Film", "Tag", "ist", "war", "dies", "sehr", "und", "es", "wir", "sahen")


def tiny_bert(folder: Path, *, seed: int = 0, layers: int = 2, dropout: float = 0.1) -> Path:
    """A BertModel of about 20,000 parameters, without a head, and its tokenizer; from ``seed`` alone."""
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *POSITIVE,
        *NEGATIVE,
        *NEUTRAL,
        *map(str, range(10)),
    ]
    vocabulary += [f"##{digit}" for digit in range(10)]
    core = Tokenizer(WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer = Lowercase()
    core.pre_tokenizer = BertPreTokenizer()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, *, seed: int = 0, tied: bool = False) -> Path:
    """A LlamaForCausalLM of about 20,000 parameters and its tokenizer, which closes no text by itself."""
    vocabulary = ["<unk>", "<end>", ".", *POSITIVE, *NEGATIVE, *NEUTRAL, *map(str, range(10))]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<end>", model_max_length=64
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_t5(folder: Path, *, seed: int = 0, dropout: float = 0.1) -> Path:
    """A T5ForConditionalGeneration of about 40,000 parameters and its tokenizer, which closes texts by itself."""
    vocabulary = ["<pad>", "</s>", "<unk>", "de:", *NEUTRAL, *GERMAN, *map(str, range(10))]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
    )
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def translation_rows(n: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """``n`` different pairs of a sentence and its translation, word by word."""
    generator = random.Random(seed)
    rows: dict[tuple[str, str], None] = {}
    while len(rows) < n:
        words = [generator.randrange(len(NEUTRAL)) for _ in range(generator.randint(2, 6))]
        rows[" ".join(NEUTRAL[i] for i in words), " ".join(GERMAN[i] for i in words)] = None
    return list(rows)


def question_rows(n: int, *, seed: int = 0) -> list[dict[str, object]]:
    """``n`` SQuAD-like questions; the answer is the number after the word that is asked for."""
    generator = random.Random(seed)
    rows = []
    for index in range(n):
        words = generator.sample(POSITIVE + NEGATIVE, 4)
        numbers = generator.sample(range(10), 4)
        context = f"{index} " + " ".join(
            f"{word} is {number}" for word, number in zip(words, numbers, strict=True)
        )
        word, number = words[index % 4], str(numbers[index % 4])
        start = context.index(f"{word} is {number}") + len(word) + 4
        answers = {"text": [number], "answer_start": [start]}
        rows.append({"id": str(index), "question": f"{word} is", "context": context, "answers": answers})
    return rows


def story(paragraphs: int, *, seed: int = 0) -> str:
    """Paragraphs of sentences that have much in common, a blank line between them."""
    generator = random.Random(seed)
    sentences = ["the film was very {} .", "we saw a {} day and it was {} .", "this is a {} film ."]

    def sentence() -> str:
        template = generator.choice(sentences)
        return template.format(*(generator.choice(POSITIVE + NEGATIVE) for _ in range(template.count("{}"))))

    return "\n\n".join(" ".join(sentence() for _ in range(4)) for _ in range(paragraphs)) + "\n"


def sentiment_rows(n: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """``n`` different (text, label) pairs that one word decides, labels "positive" and "negative" in turn."""
    generator = random.Random(seed)
    rows = []
    for index in range(n):
        positive = index % 2 == 0
        words = generator.choices(NEUTRAL, k=generator.randint(2, 8))
        words.insert(generator.randint(0, len(words)), generator.choice(POSITIVE if positive else NEGATIVE))
        # The number makes every text different, so that removing duplicates leaves n rows.
        rows.append((f"{' '.join(words)} {index}", "positive" if positive else "negative"))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, ...] = ("text", "label")) -> Path:
    """Write rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
