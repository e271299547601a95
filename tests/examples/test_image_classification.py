"""examples/image_classification.py, end to end on a tiny vision transformer."""

from __future__ import annotations

import shutil
from pathlib import Path

import image_classification
import pictures as pictures_of_models
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessor,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessor,
    DeiTImageProcessor,
    MobileViTImageProcessor,
    ViTImageProcessor,
)

from s2ft_diffusion.dreambooth.process import exit_codes
from s2ft_diffusion.errors import InputError
from tests.examples.conftest import GRID, quick


def flags(vit: str, pictures: Path, output: Path, *more: str) -> list[str]:
    return quick(output, "--model_name_or_path", vit, "--image_folder", str(pictures), "--num_train_epochs", "2", *more)


def test_trains_resumes_and_loads(vit, pictures, tmp_path) -> None:
    more = ("--learning_rate", "3e-2", "--save_total_limit", "5")
    facts = image_classification.main(flags(vit, pictures, tmp_path, *more))
    assert facts["trainable"] == 4 * GRID + 3 * 16 + 3
    assert facts["steps"] == 2 * 3
    assert "test_accuracy" in facts["metrics"]
    half = tmp_path / "half"
    first = tmp_path / "checkpoint-3"
    again = image_classification.main(flags(vit, pictures, half, *more, "--resume_from_checkpoint", str(first)))
    assert again["metrics"]["test_accuracy"] == facts["metrics"]["test_accuracy"]
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, half))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    base = AutoModelForImageClassification.from_pretrained(vit, num_labels=3)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    adapted = loaded(pixel_values=pixels).logits
    with loaded.disable_adapter():
        assert not torch.allclose(adapted, loaded(pixel_values=pixels).logits, atol=1e-4)


def test_tells_colours_apart(vit, pictures, tmp_path) -> None:
    more = ("--num_train_epochs", "8", "--learning_rate", "3e-2", "--head_learning_rate", "1e-1", "--preset", "paper")
    facts = image_classification.main(flags(vit, pictures, tmp_path, *more, "--save_strategy", "no"))
    assert facts["metrics"]["test_accuracy"] > 0.6  # one in three by chance


def test_tuning_scores_training_images_at_another_size(vit, pictures, tmp_path) -> None:
    more = ("--tune", "true", "--image_size", "48", "--train_samples", "20", "--method", "lora", "--augment", "true")
    facts = image_classification.main(flags(vit, pictures, tmp_path, *more, "--num_train_epochs", "1"))
    assert facts["image_size"] == 48
    assert facts["steps"] == 2  # 16 of 20 images, 8 a step
    assert facts["metrics"]["validation_accuracy"] * 4 == pytest.approx(
        round(facts["metrics"]["validation_accuracy"] * 4)
    )
    assert "test_accuracy" not in facts["metrics"]


@pytest.mark.parametrize(
    ("processor", "side"),
    [
        (DeiTImageProcessor(), 224),  # 256 pixels, of which 224 are cut out
        (BitImageProcessor(size={"shortest_edge": 256}), 224),  # DINOv2's
        (BitImageProcessor(size={"shortest_edge": 256}, do_center_crop=False), 256),
        (ViTImageProcessor(size={"height": 32, "width": 32}), 32),
    ],
)
def test_pictures_have_the_size_that_the_processor_cuts_out(processor, side) -> None:
    transform, found = pictures_of_models.transforms(processor, None, augment=False)
    assert found == side
    assert transform(Image.new("RGB", (300, 200))).shape == (3, side, side)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--image_size 7", "pictures of 7 pixels"),
        ("--image_size -5", "--image_size must be at least 1"),
        ("--train_samples -1", "--train_samples must be at least 0"),
        ("--test_samples -1", "--test_samples must be at least 0"),
        ("--tune true --train_samples 1", "--tune"),
        ("--label_column image", "has the pictures"),
        ("--image_column label --label_column image", "--label_column image: that column has no labels"),
    ],
)
def test_refused_before_training(vit, pictures, tmp_path, ended, given, words) -> None:
    code, line = ended(image_classification, flags(vit, pictures, tmp_path, *given.split()))
    assert code == 2
    assert words in line


@pytest.mark.parametrize(
    "processor",
    [
        MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),  # 0 to 1, BGR
        ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]),
    ],
)
def test_pixels_are_the_processors(processor) -> None:
    transform, _ = pictures_of_models.transforms(processor, None, augment=False)
    picture = Image.new("RGB", (64, 64), (255, 128, 0))
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform(picture), theirs, rtol=1e-3, atol=1e-3)
    pictures_of_models.check_pixels(processor, transform)
    processor.rescale_factor = 1 / 127
    with pytest.raises(InputError, match="other pixels"):
        pictures_of_models.check_pixels(processor, transform)


def test_classes_are_those_of_all_training_labels() -> None:
    """Also where a split, or the images that are drawn, lack some of them."""
    pixels = Image.new("RGB", (8, 8))

    def split(labels: str) -> Dataset:
        return Dataset.from_dict({"image": [pixels] * len(labels.split()), "label": labels.split()})

    training = split("bee ant cat ant bee bee bee bee bee")
    args = image_classification.Arguments(image_folder="x", image_column="image", train_samples=4)
    found = image_classification.choose(DatasetDict(train=training, test=split("cat bee")), args, 0)
    for part in found.values():
        assert part.features["label"].names == ["ant", "bee", "cat"]
    assert found["test"]["label"] == [2, 1]
    with pytest.raises(InputError, match="test split has a label that the training data have not: 'dog'"):
        image_classification.choose(DatasetDict(train=training, test=split("cat dog")), args, 0)


def test_a_broken_picture_is_found_before_training(vit, pictures, tmp_path, ended) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    whole = (folder / "test" / "red" / "1.png").read_bytes()
    (folder / "test" / "red" / "1.png").write_bytes(whole[: len(whole) // 2])
    code, line = ended(image_classification, flags(vit, folder, tmp_path / "out"))
    assert code == 2
    assert "of the test split" in line


def test_clip_is_an_image_classifier(pictures, tmp_path) -> None:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**tower, "image_size": 32, "patch_size": 8}, text_config=tower)
    CLIPForImageClassification(config).save_pretrained(tmp_path / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path / "clip")
    facts = image_classification.main(
        flags(str(tmp_path / "clip"), pictures, tmp_path / "out", "--save_strategy", "no")
    )
    assert facts["trainable_head"] == 3 * 16 + 3
    assert facts["trainable"] == 4 * GRID + 3 * 16 + 3


def test_bad_input_is_one_line(vit, pictures, tmp_path, capsys, monkeypatch) -> None:
    def refused(*argv: str) -> str:
        with pytest.raises(SystemExit) as stopped, exit_codes("image_classification.py"):
            image_classification.main(quick(tmp_path, "--model_name_or_path", vit, *argv))
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("image_classification.py: ")]
        assert len(lines) == 1
        return lines[0]

    folder = ["--image_folder", str(pictures)]
    assert "either --dataset_name" in refused()
    assert "no column 'photo'" in refused(*folder, "--image_column", "photo")
    assert "no split 'training'" in refused(*folder, "--train_split", "training")
    assert "no split 'dev'" in refused(*folder, "--test_split", "dev")
    assert "nowhere" in refused("--image_folder", str(tmp_path / "nowhere"))
    assert "no column 'label'" in refused("--image_folder", str(pictures / "train" / "red"))
    unlabelled = Dataset.from_dict({"image": [0, 0], "label": [1, None]})
    monkeypatch.setattr(
        image_classification, "load_dataset", lambda *found: DatasetDict(train=unlabelled, test=unlabelled)
    )
    assert "has no label" in refused("--dataset_name", "some")
