"""Fine-tune an encoder on a GLUE task or on a CSV of labelled texts (S2FT's Table 4).

    python examples/text_classification.py --task cola --output_dir out/cola
    python examples/text_classification.py --train_file train.csv --validation_file dev.csv --output_dir out/mine

Numbers as labels, some with a fraction, are a regression, scored by Pearson's r; else a label is a class. All flags
of transformers' TrainingArguments count too. Runs under `accelerate launch` and `torchrun` as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import finetuning as ft
import numpy as np
from datasets import ClassLabel, DatasetDict, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainingArguments,
    set_seed,
)

from s2ft_diffusion.dreambooth.process import exit_codes
from s2ft_diffusion.errors import InputError

# Columns of a GLUE task's texts, and the measures that the benchmark defines for it, the first one leading.
GLUE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("sentence",), ("mcc", "accuracy")),
    "sst2": (("sentence",), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1")),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman")),
    "qqp": (("question1", "question2"), ("accuracy", "f1")),
    "mnli": (("premise", "hypothesis"), ("accuracy",)),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "rte": (("sentence1", "sentence2"), ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), ("accuracy",)),
}
MEASURES = {
    "mcc": matthews_corrcoef,
    "accuracy": accuracy_score,
    "f1": f1_score,
    "pearson": lambda labels, predicted: pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: spearmanr(labels, predicted).statistic,
}


@dataclass
class Arguments:
    """Model and data."""

    model_name_or_path: str = "roberta-base"
    task: str | None = field(default=None, metadata={"help": f"a GLUE task: {', '.join(GLUE)}"})
    train_file: str | None = field(default=None, metadata={"help": "CSV, instead of a GLUE task"})
    validation_file: str | None = field(default=None, metadata={"help": "CSV that every epoch is scored on"})
    test_file: str | None = field(
        default=None, metadata={"help": "CSV that the end is scored on; every epoch, too, without a --validation_file"}
    )
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    max_length: int | None = field(default=None, metadata={"help": "tokens: 128, or what the model takes"})
    max_train_samples: int | None = None


@dataclass
class Task:
    """Texts with labels: splits, columns, classes (none in a regression), and measures."""

    data: DatasetDict
    columns: tuple[str, ...]
    classes: list[str] | None
    measures: tuple[str, ...]


def load_task(args: Arguments) -> Task:
    """The splits "train", "validation" and, where there are labels, others; raises InputError for what is missing."""
    if (args.task is None) == (args.train_file is None):
        raise InputError("Give either --task, a GLUE task, or --train_file, a CSV.")
    if args.task is not None:
        if args.task not in GLUE:
            raise InputError(f"There is no GLUE task {args.task!r}; there are {', '.join(GLUE)}.")
        columns, measures = GLUE[args.task]
        with ft.readable(f"GLUE's {args.task}"):
            data = load_dataset("nyu-mll/glue", args.task)
        data = DatasetDict({name: split for name, split in data.items() if not name.startswith("test")})  # no labels
        if args.task == "mnli":
            data["validation"] = data.pop("validation_matched")
        feature = data["train"].features["label"]
        return Task(data, columns, feature.names if isinstance(feature, ClassLabel) else None, measures)
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    files = {name: path for name, path in files.items() if path is not None}
    if len(files) == 1:
        raise InputError("--validation_file or --test_file is needed to score what is trained.")
    with ft.readable(" and ".join(files.values())):
        data = load_dataset("csv", data_files=files, keep_default_na=False, na_values=[""])  # "None" may be a class
    names = {args.text_column: "text", args.text_pair_column: "pair", args.label_column: "label"}
    if len(names) < 3:
        raise InputError("--text_column, --text_pair_column and --label_column must be three columns.")
    names.pop(None, None)
    for split in data.values():
        ft.need_columns(split.column_names, *names)
        ft.check_texts(split, names)
    data = data.select_columns(list(names)).rename_columns(names)
    columns = tuple(name for name in names.values() if name != "label")
    if data["train"].features["label"].dtype.startswith("float") and any(n % 1 for n in data["train"]["label"]):
        return Task(data, columns, None, ("pearson", "spearman"))
    classes = sorted(set(data["train"]["label"]))
    if len(classes) < 2:
        raise InputError(f"{args.train_file} has one class alone, {classes[0]!r}.")
    data = ft.encode_labels(data, classes)
    return Task(data, columns, data["train"].features["label"].names, ("accuracy",))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and evaluate; returns what is written to results.json."""
    args, method, training = ft.parse(
        (Arguments, ft.MethodArguments, TrainingArguments),
        argv,
        num_train_epochs=10, per_device_train_batch_size=32, per_device_eval_batch_size=64,
        warmup_steps=0.06, eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", save_total_limit=1,
        ddp_broadcast_buffers=False, ddp_find_unused_parameters=False,
    )  # fmt: skip
    ft.at_least(1, max_train_samples=args.max_train_samples)
    if training.load_best_model_at_end and args.test_file and not args.validation_file:
        raise InputError("--load_best_model_at_end would choose by --test_file; give a --validation_file.")
    set_seed(training.seed)
    with training.main_process_first(desc="data"):
        task = load_task(args)
    if args.max_train_samples is not None:
        count = min(args.max_train_samples, len(task.data["train"]))
        task.data["train"] = task.data["train"].shuffle(seed=training.seed).select(range(count))
    labels = {} if task.classes is None else {"id2label": dict(enumerate(task.classes))}
    with ft.readable(args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model_name_or_path,
            num_labels=len(task.classes or [""]),
            problem_type="regression" if task.classes is None else "single_label_classification",
            label2id={name: number for number, name in enumerate(task.classes or [])},
            ignore_mismatched_sizes=True,
            **labels,
        )
    args.max_length = ft.choose_length(model, tokenizer, args.max_length, 128)
    ft.need_padding(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        return tokenizer(*(rows[column] for column in task.columns), truncation=True, max_length=args.max_length)

    def measure(predictions: EvalPrediction) -> dict[str, float]:
        scores = ft.logits(predictions)
        found = scores.squeeze(-1) if task.classes is None else np.argmax(scores, axis=-1)
        return {name: float(MEASURES[name](predictions.label_ids, found)) for name in task.measures}

    with training.main_process_first(desc="tokens"):
        data = task.data.map(encode, batched=True)
    heads = ft.head_names(model)
    if training.metric_for_best_model is None:
        training.metric_for_best_model, training.greater_is_better = task.measures[0], True
    with ft.readable("--push_to_hub" if training.push_to_hub else "The flags do not go together"):
        trainer = ft.HeadTrainer(
            ft.adapt(model, method, seed=training.seed, heads=heads),
            training,
            train_dataset=data["train"],
            eval_dataset=data.get("validation", data.get("test")),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=measure,
            heads=heads,
            head_learning_rate=method.head_learning_rate,
        )
    facts = ft.train(trainer, method, args)
    facts["metrics"] = {}
    for name in (split for split in data if split != "train"):
        facts["metrics"] |= trainer.evaluate(data[name], metric_key_prefix=name)
        facts[f"{name}_rows"] = len(data[name])
    return ft.report(trainer, facts)


if __name__ == "__main__":
    with exit_codes("text_classification.py"):
        main()
