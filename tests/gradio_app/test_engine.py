"""An image depends on its settings alone."""

from __future__ import annotations

import functools
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops

from app.arguments import parse_arguments
from app.engine import SCHEDULERS, Cancelled, Engine, Listener, Settings, _encode
from app.library import Library
from app.limits import RequestError
from app.running import Running
from tests.gradio_app.conftest import settings, until


def same(one: Image.Image, two: Image.Image) -> bool:
    return one.size == two.size and ImageChops.difference(one, two).getbbox() is None


def test_same_settings_same_image_whatever_came_between(engine, library, ids) -> None:
    wishes = [
        settings(),
        settings((ids["cat"], 1.0)),
        settings((ids["cat"], 0.5)),
        settings((ids["both"], 1.0)),
        settings((ids["cat"], 1.0), (ids["dog"], 0.7)),
        settings((ids["cat"], 1.0), scheduler="Euler a"),
        settings((ids["cat"], 1.0), negative_prompt="red", guidance=7.0),
        settings((ids["cat"], 0.0)),
    ]
    first = [engine.generate(wish, library)[0] for wish in wishes]
    fresh = Engine("toybox")
    for wish, image in random.Random(0).sample(list(zip(wishes, first, strict=True)), len(wishes)):
        assert same(fresh.generate(wish, library)[0], image)
    for i, one in enumerate(first):
        for j, two in enumerate(first[:i]):
            assert same(one, two) == ({i, j} == {0, 7})  # strength 0 is the base


def test_each_image_is_its_seeds_own(engine, library, ids) -> None:
    three = engine.generate(settings((ids["dog"], 1.0), images=3, seed=2**32 - 2), library)
    assert [json.loads(image.info["s2ft"])["seed"] for image in three] == [2**32 - 2, 2**32 - 1, 0]
    for image in three:
        again = Settings.from_json(image.info["s2ft"])
        assert again.images == 1
        assert same(engine.generate(again, library)[0], image)


@pytest.mark.slow
def test_requests_at_once_do_not_share_how_prompts_are_padded() -> None:
    """A tokenizer's padding is its state: with one for two pipelines, a tenth of these came out shorter."""
    two = Engine("toybox", pipelines=2)
    pipes = [two._workers.get().pipe for _ in range(2)]
    wanted = [settings(prompt=prompt) for prompt in ("a photo of sks cat", "a photo of a red dog in the snow")]
    alone = [_encode(two.family(pipe), wish) for pipe, wish in zip(pipes, wanted, strict=True)]

    def differing(pipe, wish, right) -> int:
        made = [_encode(two.family(pipe), wish) for _ in range(100)]
        return sum(not torch.equal(words[key], right[key]) for words in made for key in right)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(differing, pipes, wanted, alone)) == [0, 0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(engine, library, scheduler) -> None:
    image = engine.generate(settings(scheduler=scheduler, steps=4), library)[0]
    assert f"Sampler: {scheduler}," in image.info["parameters"]
    assert len(set(image.getdata())) > 50


@pytest.mark.slow
def test_few_adapters_stay_loaded(library, ids, monkeypatch) -> None:
    monkeypatch.setattr("app.engine.KEPT_ADAPTERS", 1)
    small = Engine("toybox")
    wish = settings((ids["cat"], 1.0))
    first = small.generate(wish, library)[0]
    small.generate(settings((ids["dog"], 1.0)), library)
    worker = small._workers.get()
    assert len(worker.pipe.get_list_adapters()["unet"]) == 1
    small._workers.put(worker)
    assert same(small.generate(wish, library)[0], first)


def test_cancelling_leaves_the_pipeline_free(engine, library, ids) -> None:
    seen = []
    listener = Listener(
        on_step=lambda done, total, preview: seen.append((done, total)), cancelled=lambda: len(seen) >= 2
    )
    with pytest.raises(Cancelled):
        engine.generate(settings((ids["cat"], 1.0), steps=50, images=4), library, listener)
    assert seen == [(1, 200), (2, 200)]
    assert engine.generate(settings(), library)


def test_cancelling_one_kind_leaves_the_other() -> None:
    def work(listener: Listener):
        while not listener.cancelled():
            time.sleep(0.01)
        raise Cancelled
        yield

    with ThreadPoolExecutor(4) as threads:
        running = Running(threads)
        kinds = {
            kind: threads.submit(lambda kind=kind: list(running.watch(work, "somebody", kind)))
            for kind in ("generate", "compare")
        }
        until(lambda: running.under_way == 2)
        assert not running.cancel("somebody else")
        assert running.cancel("somebody", "compare")
        assert kinds["compare"].result() == []
        assert running.under_way == 1
        assert running.cancel("somebody")
        assert kinds["generate"].result() == []


def test_previews_look_like_what_comes_of_them_and_change_nothing(engine, library) -> None:
    previews = []
    listener = Listener(on_step=lambda done, total, preview: previews.append(preview()))
    wish = settings(steps=12)
    watched = engine.generate(wish, library, listener)[0]
    assert len(previews) == 12
    assert {preview.size for preview in previews} == {watched.size}

    def likeness(preview: Image.Image) -> float:
        small = [np.asarray(image.resize((8, 8), Image.Resampling.BOX)).ravel() for image in (preview, watched)]
        return np.corrcoef(*small)[0, 1]

    assert likeness(previews[-1]) > 0.75
    assert likeness(previews[6]) > 0.5
    assert same(watched, engine.generate(wish, library)[0])


def test_too_little_memory_is_said_and_survived(engine, library, monkeypatch) -> None:
    wish = settings()
    before = engine.generate(wish, library)[0]

    @functools.wraps(StableDiffusionPipeline.__call__)  # whose arguments a family reads
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory at /secret/path")

    with monkeypatch.context() as patch:
        patch.setattr("diffusers.StableDiffusionPipeline.__call__", fail)
        with pytest.raises(RequestError, match="not enough memory") as caught:
            engine.generate(wish, library)
    assert "secret" not in str(caught.value)
    assert same(engine.generate(wish, library)[0], before)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"steps": 0}, "steps must be from 1"),
        ({"steps": 1_000_000}, "steps must be from 1"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": float("nan")}, "must be a number"),
        ({"steps": "3"}, "must be a number"),
        ({"steps": True}, "must be a number"),
        ({"guidance": float("inf")}, "guidance must be a number"),
        ({"guidance": -1}, "guidance must be from"),
        ({"seed": 2**32}, "The seed must be from 0 to 4,294,967,295, got 4,294,967,296"),
        ({"seed": -2}, "The seed must be from 0"),
        ({"seed": 1.5}, "The seed must be a whole number, got 1.5"),
        ({"seed": 2**32}, "seed"),
        ({"images": 9}, "images"),
        ({"prompt": "x" * 1001}, "at most 1,000"),
        ({"prompt": "a\0b"}, "control characters"),
        ({"prompt": None, "negative_prompt": 3}, "must be text"),
        ({"scheduler": "__class__"}, "scheduler must be one of"),
        ({"adapters": (("a", 1.6),)}, "strength must be from 0 to 1.5"),
        ({"adapters": (("a", 1.0), ("a", 0.5))}, "same one"),
    ],
)
def test_requests_are_bounded(values, match) -> None:
    good = {
        "prompt": "x",
        "negative_prompt": "",
        "steps": 3,
        "guidance": 4,
        "seed": 0,
        "images": 1,
        "scheduler": "DDIM",
    }
    assert Settings.checked(**good)
    with pytest.raises(RequestError, match=match):
        Settings.checked(**{**good, **values})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"prompt": 1}', "[" * 100_000, '{"__class__": 1}'])
def test_damaged_settings_are_refused(text) -> None:
    with pytest.raises(RequestError, match="cannot be used"):
        Settings.from_json(text)


def test_a_subject_that_would_not_be_read_is_refused(engine, library, ids) -> None:
    with pytest.raises(RequestError, match="sks cat”, where the subject is: put the subject first"):
        engine.generate(settings((ids["cat"], 1.0), prompt="a photo of a " + 40 * "very " + "good sks cat"), library)
    long = "sks cat " + 40 * "very " + "good cat"  # words beside the subject's, and the subject's once more
    assert engine.generate(settings((ids["cat"], 1.0), prompt=long, steps=1), library)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"offload": True}, {"quantize": "nf4"}], ids=["offloaded", "nf4"])
def test_a_base_that_is_packed_or_offloaded(adapters, engine, tmp_path, options) -> None:
    """Adapters come and go as on any other; offloading changes no image, packing takes less memory."""
    if "quantize" in options:
        pytest.importorskip("bitsandbytes")
    packed = Engine("toybox", **options)
    library = Library([str(adapters)], tmp_path / "own", packed.components, "toybox")
    cat = next(entry.id for entry in library.search() if entry.name == "cat")
    alone, with_cat, again = (
        packed.generate(settings(*chosen, steps=2), library)[0] for chosen in ((), ((cat, 1.0),), ())
    )
    assert same(alone, again)
    assert not same(alone, with_cat)
    if "offload" in options:
        assert same(with_cat, engine.generate(settings((cat, 1.0), steps=2), library)[0])
        assert packed.weights_bytes == engine.weights_bytes
    else:
        assert packed.weights_bytes < 0.8 * engine.weights_bytes
    packed.threads.shutdown()


@pytest.mark.parametrize("flags", [["--offload"], ["--quantize", "nf4"]], ids=["offload", "nf4"])
def test_a_packed_base_has_one_pipeline(flags, tmp_path, capsys) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SystemExit) as end:
        parse_arguments([*flags, "--concurrency", "2", "--outputs", str(tmp_path)])
    assert end.value.code == 2
    assert "--concurrency must be 1 with --quantize or --offload" in capsys.readouterr().err


def test_outputs_are_apart_from_what_is_read(tmp_path, capsys) -> None:
    base, outputs = tmp_path / "base", tmp_path / "outputs"
    base.mkdir()
    (outputs / "adapters").mkdir(parents=True)
    (tmp_path / "link").symlink_to(outputs / "adapters")
    for flags, said in {
        ("--adapters", "a/hub-id", str(tmp_path / "link")): "lies in adapters/ of --outputs, where visitors may delete",
        ("--base", str(base), "--outputs", str(base / "unet" / "..")): "--outputs lies in --base",
        ("--base", str(outputs / "history")): "--base lies in history/ of --outputs",
    }.items():
        with pytest.raises(SystemExit) as end:
            parse_arguments(["--outputs", str(outputs), *flags])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
    assert not list(base.iterdir())
