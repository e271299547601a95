"""The toybox's tokenizer: CLIP's byte-level BPE over a small vocabulary, so that any prompt has tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from .captions import PROMPT_WORDS, UNSEEN_TOKEN, world_words

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn merges until each word of the world, of `PROMPT_WORDS` and `sks` is one token, and save to `folder`.

    `vocab.json` and `merges.txt` are written beside the fast tokenizer's own file, for readers of either form.
    """
    words = [*world_words(), UNSEEN_TOKEN, *PROMPT_WORDS]
    words = list(dict.fromkeys(words))
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    characters = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        initial_alphabet=characters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*characters, *(f"{c}</w>" for c in characters), *("".join(pair) for pair in merges), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8"
    )
    return tokenizer
