"""Fine-tune a vision transformer on an image data set in VTAB-1k's protocol (S2FT's Tables 1 and 2).

    python examples/image_classification.py --dataset_name cifar100 --output_dir out/cifar100
    python examples/image_classification.py --image_folder photos --output_dir out/photos

An image folder has a folder for each class, within "train" and "test" or by itself. By default 1,000 training images,
AdamW with a cosine schedule, 100 epochs with 10 of warm-up, and a score on the test split at the end; --tune scores a
fifth of the training images instead, which is what a rate is to be chosen by. The head is trained whole. All flags of
transformers' TrainingArguments count too. Runs under `accelerate launch` and `torchrun` as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import finetuning as ft
import numpy as np
import pictures
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    TrainingArguments,
    set_seed,
)

from s2ft_diffusion.dreambooth.process import exit_codes
from s2ft_diffusion.errors import InputError


@dataclass
class Arguments:
    """Model and data."""

    model_name_or_path: str = "google/vit-base-patch16-224-in21k"
    dataset_name: str | None = field(default=None, metadata={"help": "a data set of the hub, or a local one's path"})
    dataset_config: str | None = None
    image_folder: str | None = field(default=None, metadata={"help": "a folder of class folders, instead"})
    image_column: str | None = field(default=None, metadata={"help": "by default the first column of images"})
    label_column: str | None = field(default=None, metadata={"help": "by default the first column of classes"})
    train_split: str = "train"
    test_split: str | None = field(default=None, metadata={"help": "by default test, else validation"})
    train_samples: int = field(default=1000, metadata={"help": "training images, drawn by --seed; 0 for all"})
    test_samples: int = field(default=0, metadata={"help": "test images; 0 for all"})
    tune: bool = field(default=False, metadata={"help": "score a fifth of the training images, not the test split"})
    image_size: int | None = field(
        default=None, metadata={"help": "other than the model's; positions are interpolated"}
    )
    augment: bool = field(default=False, metadata={"help": "random crops and flips (VTAB-1k has none)"})


def load_images(args: Arguments, seed: int) -> DatasetDict:
    """Splits "train" and "test" with columns "image" and "label"; raises InputError for what is missing."""
    if (args.dataset_name is None) == (args.image_folder is None):
        raise InputError("Give either --dataset_name or --image_folder.")
    with ft.readable(args.dataset_name or args.image_folder):
        if args.image_folder is not None:
            data = load_dataset("imagefolder", data_dir=args.image_folder)
        else:
            data = load_dataset(args.dataset_name, args.dataset_config)
    return choose(data, args, seed)


def choose(data: DatasetDict, args: Arguments, seed: int) -> DatasetDict:
    """The splits, columns and numbers of images that are asked for."""
    if args.train_split not in data:
        raise InputError(f"There is no split {args.train_split!r}; there are {', '.join(data)}.")
    training = data[args.train_split]
    features = training.features
    images = args.image_column or next((name for name, kind in features.items() if isinstance(kind, Image)), "image")
    labels = args.label_column or next(
        (name for name, kind in features.items() if isinstance(kind, ClassLabel)), "label"
    )
    ft.need_columns(list(features), images, labels)
    if images == labels:
        raise InputError(f"--label_column {labels}: that column has the pictures.")
    if not isinstance(features[labels], ClassLabel | Value):
        raise InputError(f"--label_column {labels}: that column has no labels.")
    if args.train_samples:
        training = drawn(training, args.train_samples, seed)
    if args.tune:
        with ft.readable("--tune"):
            held_out = training.train_test_split(test_size=0.2, seed=seed)
        training, test = held_out["train"], held_out["test"]
    else:
        split = args.test_split or next((name for name in ("test", "validation") if name in data), None)
        if split not in data:
            raise InputError(
                f"There is no split {split or 'test'!r} to score; there are {', '.join(data)}. Give --tune."
            )
        test = drawn(data[split], args.test_samples, 0) if args.test_samples else data[split]
    chosen = DatasetDict(train=training, test=test).select_columns([images, labels])
    chosen = chosen.rename_columns({old: new for old, new in ((images, "image"), (labels, "label")) if old != new})
    for name, part in chosen.items():
        missing = [number for number, label in enumerate(part["label"]) if label is None or label == -1]
        if missing:
            raise InputError(f"Image {missing[0] + 1} of the {name} split has no label.")
    if not isinstance(chosen["train"].features["label"], ClassLabel):
        with ft.readable(f"--label_column {labels}"):
            chosen = ft.encode_labels(chosen, data[args.train_split][labels])
    if len(set(chosen["train"]["label"])) < 2:
        raise InputError("The training images have one class alone.")
    return chosen


def drawn(data: Dataset, count: int, seed: int) -> Dataset:
    """That many rows of a data set, without replacement."""
    return data.shuffle(seed=seed).select(range(min(count, len(data))))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and evaluate; returns what is written to results.json."""
    args, method, training = ft.parse(
        (Arguments, ft.MethodArguments, TrainingArguments),
        argv,
        n_frequency=3000, num_train_epochs=100, warmup_steps=0.1, lr_scheduler_type="cosine",
        per_device_train_batch_size=32, per_device_eval_batch_size=64, eval_strategy="no", save_strategy="epoch",
        logging_strategy="epoch", save_total_limit=1, ddp_broadcast_buffers=False, ddp_find_unused_parameters=False,
    )  # fmt: skip
    training.remove_unused_columns = False  # pictures become pixels as batches are made
    ft.at_least(0, train_samples=args.train_samples, test_samples=args.test_samples)
    ft.at_least(1, image_size=args.image_size)
    set_seed(training.seed)
    with training.main_process_first(desc="data"):
        data = load_images(args, training.seed)
    if training.process_index == 0:
        pictures.check_pictures(data)
    names = data["train"].features["label"].names
    with ft.readable(args.model_name_or_path):
        processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            ignore_mismatched_sizes=True,
        )
    plain, side = pictures.transforms(processor, args.image_size, augment=False)
    random, _ = pictures.transforms(processor, args.image_size, augment=args.augment)
    also = pictures.prepare_position_embeddings(model, side)
    pictures.check_pixels(processor, plain)
    pictures.check_size(model, side, also)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows]), **also}

    def measure(predictions: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((np.argmax(ft.logits(predictions), axis=-1) == predictions.label_ids).mean())}

    heads = ft.head_names(model)
    with ft.readable("--push_to_hub" if training.push_to_hub else "The flags do not go together"):
        trainer = ft.HeadTrainer(
            ft.adapt(model, method, seed=training.seed, heads=heads),
            training,
            train_dataset=data["train"].with_transform(pictures.reader(random)),
            eval_dataset=data["test"].with_transform(pictures.reader(plain)),
            processing_class=processor,
            data_collator=collate,
            compute_metrics=measure,
            heads=heads,
            head_learning_rate=method.head_learning_rate,
        )
    facts = ft.train(trainer, method, args)
    scored = "validation" if args.tune else "test"
    metrics = trainer.evaluate(metric_key_prefix=scored)
    return ft.report(trainer, {**facts, "image_size": side, f"{scored}_rows": len(data["test"]), "metrics": metrics})


if __name__ == "__main__":
    with exit_codes("image_classification.py"):
        main()
