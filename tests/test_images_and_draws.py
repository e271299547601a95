"""Any image a person has, and draws that depend on nothing but the sample's number."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s2ft_diffusion.dreambooth.arguments import parse_arguments
from s2ft_diffusion.dreambooth.batches import Layout, Pictures, estimate_batches, estimate_draws
from s2ft_diffusion.dreambooth.captions import read_captions
from s2ft_diffusion.dreambooth.draws import DrawStream, process_slots, replayed
from s2ft_diffusion.dreambooth.images import SquareImages, find_images, fingerprints, load_image
from s2ft_diffusion.dreambooth.settings import EstimateSettings
from s2ft_diffusion.errors import InputError


def half_and_half(mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue."""
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, :30] = (255, 0, 0)
    array[:, 30:] = (0, 0, 255)
    return Image.fromarray(array).convert(mode)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff"])
def test_formats(tmp_path, suffix) -> None:
    path = tmp_path / f"a.{suffix}"
    half_and_half().save(path)
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.getpixel((5, 20))[0] > 200
    assert image.getpixel((55, 20))[2] > 200


def test_exif_rotation(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    half_and_half().save(tmp_path / "a.jpg", exif=exif)
    image = load_image(tmp_path / "a.jpg")
    assert image.size == (40, 60)
    assert image.getpixel((20, 5))[0] > 200


def test_palette_alpha_and_gray(tmp_path) -> None:
    half_and_half("P").save(tmp_path / "p.png")
    assert load_image(tmp_path / "p.png").getpixel((5, 5))[0] > 200
    clear = half_and_half("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(60) < 30, 0, 255).astype(np.uint8)[None].repeat(40, 0)))
    clear.save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.getpixel((5, 5)) == (255, 255, 255)
    assert image.getpixel((55, 5)) == (0, 0, 255)
    palette = half_and_half("P")
    palette.info["transparency"] = palette.getpixel((5, 5))
    palette.save(tmp_path / "t.png", transparency=palette.getpixel((5, 5)))
    assert load_image(tmp_path / "t.png").getpixel((5, 5)) == (255, 255, 255)


def gray(path: Path, numbers: object, kind: type[np.generic]) -> list[int]:
    """What is read of a picture that has these numbers in each row."""
    Image.fromarray(np.asarray(numbers).astype(kind)[None].repeat(4, 0)).save(path)
    image = np.asarray(load_image(path)).astype(int)
    assert (image == image[:1, :, :1]).all()
    return image[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("kind", "numbers", "seen"),
    [
        (np.uint16, [0, 257, 4096, 32896, 65535], [0, 1, 16, 128, 255]),
        (np.uint16, [0, 129, 250, 5140], [0, 1, 1, 20]),  # dark, but a picture
        (np.int32, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (np.int32, [0, 1, 100, 250], [0, 1, 100, 250]),
        (np.float32, [0, 0.2, 0.5, 1], [0, 51, 128, 255]),
        (np.float32, [0, 0.2, 0.1], [0, 51, 26]),
        (np.float32, [0, 0.2, 0.6, 1.02], [0, 51, 153, 255]),  # a highlight
        (np.float32, [0, 1, 127.6, 255], [0, 1, 128, 255]),
        (np.float32, [0, 257, 65535], [0, 1, 255]),
    ],
)
def test_more_than_8_bits(tmp_path, kind, numbers, seen) -> None:
    for suffix in ("png", "tiff") if kind is np.uint16 else ("tiff",):
        assert gray(tmp_path / f"a.{suffix}", numbers, kind) == seen


def test_twelve_bits_that_a_tiff_tells_of(tmp_path) -> None:
    width, strip = 4, bytes.fromhex("000 800 7ff fff".replace(" ", "")) * 4
    tags = {256: width, 257: 4, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 4, 279: len(strip)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    (tmp_path / "a.tiff").write_bytes(head + entries + bytes(4) + strip)
    assert np.asarray(load_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == [0, 128, 127, 255]


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (np.uint16, [0, 250]),  # 8 bits in 16
        (np.uint16, [0, 4095]),  # a camera's 12 in 16
        (np.int32, [0, 1]),
        (np.int32, [0, 4095]),
        (np.int32, [0, 2**31 - 1]),
        (np.float32, [0, 0]),
        (np.float32, [-1, 1]),
        (np.float32, [0, 5]),
        (np.float32, [0, 257]),
        (np.float32, [0, 1e9]),
        (np.float32, [0.5, np.nan]),
        (np.float32, [0.5, np.inf]),
    ],
)
def test_numbers_of_no_known_scale(tmp_path, kind, numbers) -> None:
    with pytest.raises(InputError, match=r"a\.tiff: its numbers go from .* no known scale"):
        gray(tmp_path / "a.tiff", numbers, kind)


def test_oblong_pictures(tmp_path) -> None:
    Image.new("RGB", (300, 30)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (300, 30)
    Image.new("RGB", (2000, 30)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"b\.png: 2000x30 pixels are too oblong"):
        load_image(tmp_path / "b.png")


def test_hidden_files_and_folders_are_ignored_with_a_line(tmp_path, caplog) -> None:
    half_and_half().save(tmp_path / "a.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "more").mkdir()
    with caplog.at_level(logging.INFO):
        assert [p.name for p in find_images(tmp_path)] == ["a.png"]
    assert ".DS_Store, more" in caplog.text


def test_captions_are_the_text_files_of_photos(tmp_path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        half_and_half().save(tmp_path / name)
    before = fingerprints(find_images(tmp_path))
    (tmp_path / "b.txt").write_text("a photo of sks dog\non a beach\n")
    (tmp_path / "c.txt").write_text(" ")
    photos = find_images(tmp_path)
    assert [path.name for path in photos] == ["a.png", "b.png", "c.png"]
    assert read_captions(photos, "a dog") == ["a dog", "a photo of sks dog on a beach", "a dog"]
    for name, words in (("a", b"a photo of sks dog in snow\r\n"), ("c", b"")):  # as Windows' Notepad writes them
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + words)
    assert read_captions(photos, "a dog")[0::2] == ["a photo of sks dog in snow", "a dog"]
    assert fingerprints(photos) != before  # a run is not resumed on other words
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"b\.txt: a caption that cannot be read as UTF-8"):
        read_captions(photos, "a dog")


def test_each_image_has_its_own_prompt(tmp_path) -> None:
    stream = DrawStream("x", 0, 3, (1, 2, 2), random_flip=False)
    prompts = ["zero", "one", "two"]
    for number in range(6):
        draw, _, prompt, _ = Pictures(None, stream, prompts).sample(number)
        assert prompt == prompts[draw.image]
    settings = EstimateSettings("gradient", draws=2)
    for ((draw, _, prompt, _),) in estimate_batches(settings, Layout(10), stream, range(3), prompts):
        assert prompt == prompts[draw.image]


def test_bad_files_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find_images(tmp_path / "nothing")
    with pytest.raises(InputError, match="no images in it"):
        find_images(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"notes\.txt: not a readable image"):
        load_image(tmp_path / "notes.txt")
    half_and_half().save(tmp_path / "a.jpg", quality=95)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"a\.jpg: a truncated image"):
        load_image(tmp_path / "a.jpg")


def test_crops(tmp_path) -> None:
    half_and_half().save(tmp_path / "a.png")
    images = SquareImages([tmp_path / "a.png"], 32, center_crop=False)
    assert not images.fixed
    left, right = images.crop(0, (0.0, 0.0)), images.crop(0, (0.0, 0.999))
    assert left.shape == (3, 32, 32)
    assert left[0].mean() > right[0].mean()
    assert torch.equal(images.crop(0, flip=True), images.crop(0).flip(-1))
    middle = SquareImages([tmp_path / "a.png"], 32, center_crop=True)
    assert middle.fixed
    assert torch.equal(middle.crop(0, (0.0, 0.0)), middle.crop(0, (0.9, 0.9)))
    assert float(left.min()) >= -1
    assert float(left.max()) <= 1


def stream(**options) -> DrawStream:
    return DrawStream(
        **{"name": "instance", "seed": 0, "count": 5, "latent_shape": (4, 2, 2), "random_flip": True, **options}
    )


def test_a_draw_depends_on_its_number_alone() -> None:
    a, b = stream(), stream()
    later = [b.sample(n) for n in (7, 3, 11)]
    for number, draw in zip((7, 3, 11), later, strict=True):
        again = a.sample(number)
        assert (again.image, again.time, again.flip, again.place) == (draw.image, draw.time, draw.flip, draw.place)
        assert torch.equal(again.noise, draw.noise)
        assert not torch.equal(again.noise, again.posterior_noise)
    assert not torch.equal(a.sample(0).noise, a.sample(1).noise)
    assert not torch.equal(a.sample(0).noise, stream(seed=1).sample(0).noise)
    assert not torch.equal(a.sample(0).noise, stream(name="class").sample(0).noise)


def test_every_image_once_an_epoch_in_changing_order() -> None:
    epochs = [[stream().sample(e * 5 + i).image for i in range(5)] for e in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_estimate_draws_are_stratified() -> None:
    draws = stream().stratified(8)
    assert sorted(int(draw.time * 40) for draw in draws) == list(range(40))
    assert sorted(draw.image for draw in draws) == sorted(list(range(5)) * 8)


@pytest.mark.parametrize(
    ("flags", "images", "processes", "draws"),
    [
        ((), 5, 1, 8),
        (("--train_batch_size", "2"), 5, 1, 16),
        ((), 5, 2, 16),  # the same run, shared by two processes
        (("--num_train_epochs", "100"), 5, 1, 8),
        (("--max_train_steps", "300", "--train_batch_size", "4"), 6, 1, 16),
        (("--gradient_accumulation_steps", "2"), 5, 1, 16),
        (("--max_train_steps", "20"), 5, 1, 4),
        (("--max_train_steps", "90000"), 5, 1, 24),
        (("--estimate", "gradient", "--max_train_steps", "90000"), 5, 1, 8),
        (("--preset", "paper", "--max_train_steps", "20"), 5, 1, 8),
        (("--estimate_draws", "3"), 5, 1, 3),
    ],
)
def test_a_longer_run_has_a_longer_estimate(flags, images, processes, draws) -> None:
    settings = parse_arguments(["--instance_dir", "photos", *flags])
    layout = Layout.of(settings.length, images, processes)
    assert estimate_draws(settings.estimate, layout, images) == draws


@pytest.mark.parametrize(("batch", "accumulation", "processes"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_layouts_share_out_the_same_samples(batch, accumulation, processes) -> None:
    numbers = [
        number
        for step in range(3)
        for micro in range(accumulation)
        for rank in range(processes)
        for number in process_slots(step, micro, batch, accumulation, processes, rank)
    ]
    assert numbers == list(range(6))


def test_last_tenth_repeats_the_first() -> None:
    assert [replayed(step, 20) for step in (0, 1, 2, 17, 18, 19)] == [0, 1, 2, 17, 0, 1]
    assert [replayed(step, 5) for step in range(5)] == list(range(5))
