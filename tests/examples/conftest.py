"""Tiny random models and generated data for the examples."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from s2ft_diffusion.dreambooth.process import exit_codes

GOOD, BAD, OTHER = ("fine great lovely", "poor awful dull", "the a film story cast plot scene of and is was")
GRID = 56  # numbers of a grid for 60 in a layer of 16 by 16
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def quick(folder: Path, *flags: str) -> list[str]:
    """Flags of a run of seconds on one thread."""
    common = "--use_cpu --per_device_train_batch_size 8 --n_frequency 60 --rank 2 --estimate_batches 3 --report_to none"
    return ["--output_dir", str(folder), *common.split(), "--disable_tqdm", "true", *flags]


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Call an example's main; gives the exit code and the one line on standard error."""

    def run(example: ModuleType, argv: list[str]) -> tuple[int, str]:
        name = f"{example.__name__}.py"
        with pytest.raises(SystemExit) as stopped, exit_codes(name):
            example.main(argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}: ")]
        assert len(lines) == 1
        return stopped.value.code, lines[0]

    return run


@pytest.fixture(scope="session", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Data sets are prepared outside the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*f"{GOOD} {BAD} {OTHER} user assistant say sum to yes no what".split(), *map(str, range(20))]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<end>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="<end>", unk_token="<unk>",
        chat_template=TEMPLATE, model_max_length=64,
    )  # fmt: skip


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
    )  # fmt: skip
    ViTForImageClassification(config).vit.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv and test.csv: texts, how much better than bad (score), and which of two words they begin with."""
    folder = tmp_path_factory.mktemp("reviews")
    draw = random.Random(0)
    for name, count in (("train", 64), ("test", 32)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "score", "label", "other"])
            for i in range(count):
                good, bad = draw.randint(0, 3), draw.randint(0, 3)
                words = draw.choices(GOOD.split(), k=good) + draw.choices(BAD.split(), k=bad)
                words += draw.choices(OTHER.split(), k=4)
                draw.shuffle(words)
                rows.writerow([" ".join(words), f"{good - bad + 0.5}", "good" if good > bad else "bad", i])
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder, train/<class>/ and test/<class>/, of reddish, greenish and bluish pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = random.Random(0)
    for split, count in (("train", 8), ("test", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                colour = [draw.randint(0, 90) for _ in range(3)]
                colour[channel] = draw.randint(140, 255)
                Image.new("RGB", (24, 24), tuple(colour)).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alpaca.json, chat.jsonl and questions.jsonl."""
    folder = tmp_path_factory.mktemp("instructions")
    draw = random.Random(0)
    sums = [(a, b) for a in range(9) for b in range(9)]
    draw.shuffle(sums)
    alpaca = [{"instruction": "say the sum", "input": f"{a} and {b}", "output": str(a + b)} for a, b in sums[:40]]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    with (folder / "chat.jsonl").open("w") as lines:
        for a, b in sums[:30]:
            turns = [
                ("user", f"sum {a} {b}"),
                ("assistant", str(a + b)),
                ("user", "what"),
                ("assistant", f"yes {a + b}"),
            ]
            lines.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    with (folder / "questions.jsonl").open("w") as lines:
        lines.write(json.dumps({"question_id": 7, "turns": ["sum 3 4"]}) + "\n")
        lines.write(json.dumps({"text": "say the sum of 2 and 2"}) + "\n")
    return folder
