"""Adapters are found and read by their headers; what is broken is shown and never chosen."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from app.app import App
from app.history import History
from app.library import Library, plain
from app.limits import RequestError
from app.page import Page
from app.prompts import differing, exchanged
from app.tabs.library import details
from app.words import drawn
from s2ft_diffusion.adapters.file import read_adapter, write_adapter
from s2ft_diffusion.adapters.format import FORMAT_VERSION

VERSION = rf"format_version\": {FORMAT_VERSION}".encode()


def test_headers_alone(library, adapters, monkeypatch) -> None:
    cat = next(entry for entry in library.search() if entry.name == "cat")
    assert cat.summary() == {
        "id": cat.id,
        "name": "cat",
        "subject": "cat",
        "instance_prompt": "a photo of sks cat",
        "base": "toybox",
        "bytes": (adapters / "cat.safetensors").stat().st_size,
        "trainable": 28 * 196,
        "date": "2026-01-01",
        "usable": True,
        "reason": None,
        "warning": None,
    }
    assert cat.picture().getextrema() != cat.picture().convert("L").convert("RGB").getextrema()  # its photo, in colour
    opened = []
    monkeypatch.setattr("app.library.read_header", lambda path: opened.append(path))
    library.refresh()
    assert opened == []  # unchanged files are not read again


HOSTILE = {
    "half a surrogate": "bad\ud800name",
    "long": "A" * 100_000,
    "Markdown": "x ![p](https://example.org/p.png) [click](https://example.org) <b>|",
    "lines": "one\ntwo\0three",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_words_of_strangers_harm_no_page(name, adapters, engine, tmp_path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    with safe_open(adapters / "cat.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["s2ft"])
    header["info"]["subject"] = header["info"]["base_model"] = name
    save_file(tensors, folder / "cat.safetensors", metadata={"s2ft": json.dumps(header)})
    library = Library([str(folder)], tmp_path / "own", engine.components)
    (entry,) = library.search()
    shown = json.dumps([entry.summary(), library.choices(), details(entry)], ensure_ascii=False)
    shown.encode()  # as a page is sent
    assert len(shown) < 3000
    assert "](" not in details(entry)
    assert "\\u0000" not in shown
    entry.picture()


def test_every_spelling_and_script_is_found_and_drawn(adapters, engine, tmp_path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    adapter = read_adapter(adapters / "cat.safetensors")
    for number, subject in enumerate(("Mu\u0308ßli", "柴犬")):  # an umlaut as a Mac types it in a file's name
        adapter.info.subject, adapter.info.class_name, adapter.info.thumbnail = subject, "dog", None
        write_adapter(folder / f"{number}.safetensors", adapter)
    library = Library([str(folder)], tmp_path / "own", engine.components)
    assert [entry.name for entry in library.search("MÜSSLI")] == ["Müßli"]
    (shiba,) = library.search("柴")
    assert len(shiba.picture().getcolors()) > 1  # its class's initial
    assert (drawn("Müßli"), drawn("柴犬")) == ("Mussli", "")


def test_the_hub_is_asked_once(engine, tmp_path, monkeypatch, adapters) -> None:
    asked = []

    def find(source: str) -> Path:
        asked.append(source)
        if source == "someone/none":
            raise OSError("not there")
        return adapters / "cat.safetensors"

    monkeypatch.setattr("app.library.find_adapter_file", find)
    library = Library(["someone/cat", "someone/none"], tmp_path / "own", engine.components)
    for _ in range(3):
        library.refresh()
    assert asked == ["someone/cat", "someone/none"]
    assert [entry.reason is None for entry in library.search()] == [True, False]


def test_search_and_sort(library) -> None:
    names = lambda *args: [entry.name for entry in library.search(*args)]  # noqa: E731
    assert names("", "name") == ["both", "cat", "dog"]
    assert names("SKS toybox", "name") == ["both", "cat", "dog"]
    assert names("sks dog", "name") == ["dog"]
    assert names("elephant") == []
    assert names("", "fewest numbers")[-1] == "both"
    assert names("", "smallest")[-1] == "both"
    for none in ("colour", ["name"], {}, None):
        with pytest.raises(RequestError, match="sort must be"):
            library.search("", none)


def test_what_cannot_be_used_is_shown_with_the_reason(adapters, engine, tmp_path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy(adapters / "cat.safetensors", folder)
    whole = (adapters / "dog.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").touch()
    save_file({"x": torch.zeros(3)}, folder / "lora.safetensors")
    other = read_adapter(adapters / "dog.safetensors")
    other.layers["unet"] = {name.replace("down", "sideways"): w for name, w in other.layers["unet"].items()}
    write_adapter(folder / "elsewhere.safetensors", other)
    (folder / "gone.safetensors").symlink_to(folder / "nothing")
    (folder / ".hidden.safetensors").write_bytes(whole)
    (folder / "checkpoint-5").mkdir()
    shutil.copy(adapters / "cat.safetensors", folder / "checkpoint-5")
    library = Library(
        [str(folder), str(tmp_path / "no" / "such"), "some?one/../dog"], tmp_path / "own", engine.components
    )
    found = {entry.path.name if entry.path.suffix else entry.name: entry for entry in library.search()}
    reasons = {name: entry.reason for name, entry in found.items()}
    assert reasons.pop("cat.safetensors") is None
    assert "not a complete safetensors file" in reasons["truncated.safetensors"]
    assert "not an S2FT adapter" in reasons["lora.safetensors"]
    assert reasons["elsewhere.safetensors"] == "it was made for toybox and does not fit this one"
    assert set(reasons) == {
        "truncated.safetensors", "empty.safetensors", "lora.safetensors", "elsewhere.safetensors",
        str(tmp_path / "no" / "such"), "some?one/../dog",
    }  # fmt: skip
    assert all(reasons.values())
    assert not any(str(tmp_path) in reason for reason in reasons.values())
    assert library.search()[0].name == "cat"  # what can be used comes first
    assert [label for label, _ in library.choices()] == ["cat"]
    for entry in found.values():
        picture = entry.picture()
        grey = picture.convert("L").convert("RGB")
        assert (list(picture.getdata()) == list(grey.getdata())) == bool(entry.reason)
        if entry.reason:
            with pytest.raises(RequestError, match="cannot be used"):
                library.get(entry.id)


def test_new_and_changed_files_appear_on_refresh(adapters, engine, tmp_path) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    library = Library([str(folder)], tmp_path / "own", engine.components)
    assert library.choices() == []
    shutil.copy(adapters / "cat.safetensors", folder / "a.safetensors")
    library.refresh()
    (label, first), = library.choices()  # fmt: skip
    assert label == "cat"
    shutil.copy(adapters / "dog.safetensors", folder / "a.safetensors")
    os.utime(folder / "a.safetensors", (time.time() + 5,) * 2)
    shutil.copy(adapters / "dog.safetensors", folder / "b.safetensors")
    library.refresh()
    labels = [label for label, _ in library.choices()]
    assert len(set(labels)) == 2  # equal names are told apart
    assert all(label.startswith("dog (") for label in labels)
    assert library.get(first).name == "dog"
    (folder / "a.safetensors").unlink()
    library.refresh()
    with pytest.raises(RequestError, match="no such adapter"):
        library.get(first)


@pytest.mark.parametrize(
    "name",
    ["", "..", "../cat", "/etc/passwd", "cat.safetensors", "a\0b", "x" * 100_000, "some?one/dog", None, 7, ["cat"], {}],
)
def test_only_ids_are_looked_up(library, name) -> None:
    with pytest.raises(RequestError, match="no such adapter"):
        library.get(name)


def test_uploads_are_checked_and_stored_under_names_of_ours(library, fresh, tmp_path) -> None:
    upload = tmp_path / "..; rm -rf x.safetensors"
    upload.write_bytes(fresh("dog").read_bytes())
    entry = library.add(upload)
    assert entry.name == "dog"
    assert entry.path.parent == library.folder
    assert entry.path.stem.isalnum()
    assert library.get(entry.id) == entry
    whole = upload.read_bytes()
    for damage in (whole[:-40], b"", b"not one", whole.replace(VERSION, VERSION.replace(b": ", b": 9"))):
        upload.write_bytes(damage)
        with pytest.raises(RequestError, match="cannot be used") as caught:
            library.add(upload)
        assert str(tmp_path) not in str(caught.value)
    assert len(list(library.folder.iterdir())) == 1


def test_uploads_are_limited_in_number(library, fresh, monkeypatch) -> None:
    monkeypatch.setattr("app.library.MAX_OWN", 1)
    library.add(fresh("dog"))
    with pytest.raises(RequestError, match="full"):
        library.add(fresh("cat"))
    assert len(list(library.folder.iterdir())) == 1


def test_a_file_that_is_there_is_not_stored_again(library, fresh, adapters, ids) -> None:
    assert library.add(adapters / "dog.safetensors").id == ids["dog"]
    upload = fresh("dog")
    assert library.add(upload).id == library.add(upload).id
    assert len(list(library.folder.iterdir())) == 1


def test_a_page_begins_with_what_is_there(library, engine, fresh, ids, tmp_path) -> None:
    first = library.add(fresh("cat", subject="A cat"))
    page = Page(App(engine, library, History(tmp_path / "history")))
    page.build()
    opened = SimpleNamespace(query_params={})
    assert page.first == first.id
    assert page.read_address(opened)[2] == gr.skip()
    library.delete(first.id)
    assert page.read_address(opened)[0::2][:2] == ("a photo of sks both", ids["both"])
    # whoever has a prompt in the link keeps it; a negative seed is none
    linked = SimpleNamespace(query_params={"prompt": "hello", "seed": "-1"})
    prompt, _, adapter, *others = page.read_address(linked)
    assert (prompt, adapter) == ("hello", ids["both"])
    assert others[-2] == gr.skip()  # "Random" stays on


def test_equal_names_are_told_apart_by_dates_else_by_files(library, fresh, ids) -> None:
    new = library.add(fresh("dog"))
    assert library.labels()[ids["dog"]] == "dog (2026-01-02)"
    assert library.labels()[new.id] == "dog (2026-02-03)"
    twin = library.add(fresh("dog", class_name="dog"))
    assert library.labels()[twin.id] == f"dog ({twin.path.stem})"
    assert library.labels()[ids["cat"]] == "cat"
    assert dict(library.choices())[f"dog ({twin.path.stem})"] == twin.id


def test_renaming_changes_the_name_alone(library, fresh, ids) -> None:
    entry = library.add(fresh("both"))
    before = read_adapter(entry.path)
    renamed = library.rename(entry.id, "  Max\n& Moritz ")
    after = read_adapter(entry.path)
    assert renamed.name == after.info.subject == "Max & Moritz"
    assert replace(after.info, subject="both") == before.info
    for component, layers in before.layers.items():
        for name, layer in layers.items():
            assert torch.equal(after.layers[component][name].coefficients, layer.coefficients)
    assert len(list(library.folder.iterdir())) == 1
    for bad in ("", " ", "x" * 200, "a\0b", None, 3):
        with pytest.raises(RequestError):
            library.rename(entry.id, bad)
    with pytest.raises(RequestError, match="not uploaded or trained here"):
        library.rename(ids["dog"], "x")
    with pytest.raises(RequestError, match="not uploaded or trained here"):
        library.delete(ids["dog"])
    library.delete(entry.id)
    assert list(library.folder.iterdir()) == []


def test_what_was_made_for_another_base_is_said(adapters, engine, fresh, tmp_path) -> None:
    library = Library([], tmp_path / "own", engine.components, "toybox")
    assert library.add(adapters / "cat.safetensors").warning is None
    assert "made for other-base" in library.add(fresh("cat", base_model="some/other-base")).warning
    wrong = read_adapter(adapters / "cat.safetensors")
    wrong.layers["unet"] = {f"{name}.x": layer for name, layer in wrong.layers["unet"].items()}
    write_adapter(tmp_path / "wrong.safetensors", replace(wrong, info=replace(wrong.info, base_model="a/b")))
    with pytest.raises(RequestError, match="it was made for b and does not fit toybox"):
        library.add(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(
    ("prompt", "new", "others", "wanted"),
    [
        ("", "a photo of sks dog", [], "a photo of sks dog"),
        ("a photo of sks cat", "a photo of sks dog", ["a photo of sks cat"], "a photo of sks dog"),
        ("sks cat on the moon", "a photo of sks dog", ["a photo of sks cat"], "sks dog on the moon"),
        (
            "a photo of sks cat on the moon",
            "a drawing of sks x",
            ["a photo of sks cat"],
            "a drawing of sks x on the moon",
        ),
        ("a lighthouse", "a photo of sks dog", ["a photo of sks cat", None, ""], "a lighthouse"),
        ("sks dog runs", "a photo of sks dog", ["a photo of sks cat"], "sks dog runs"),
        ("sks cat runs", None, ["a photo of sks cat"], "sks cat runs"),
        (
            "sks cat beside sks dog",
            "a photo of sks bird",
            ["a photo of sks dog", "a photo of sks cat"],
            "sks bird beside sks dog",
        ),
        ("sks catfish", "a photo of sks dog", ["a photo of sks cat", "a photo of sks catfish"], "sks dog"),
    ],
)
def test_another_adapter_exchanges_the_trigger_words(prompt, new, others, wanted) -> None:
    assert exchanged(prompt, new, others) == wanted


def test_what_tells_prompts_apart() -> None:
    assert differing(["a photo of sks dog on the beach", "a photo of sks dog in space"]) == ["on the beach", "in space"]
    assert differing(["a red dog", "a red dog in space"]) == ["a red dog", "in space"]
    assert differing(["a dog"]) == ["a dog"]


def test_messages_for_strangers_have_no_paths(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    assert plain(f"{path}: no good", path) == "no good"
    assert plain(f"cannot open {tmp_path}/b/c.txt now") == "cannot open c.txt now"
    assert plain("1,000 numbers at 1/2 of it, and/or more") == "1,000 numbers at 1/2 of it, and/or more"
