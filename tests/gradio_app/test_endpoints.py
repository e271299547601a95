"""Every action by its named endpoint, as a program would call it over HTTP."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from app.engine import SCHEDULERS, Engine, Settings
from app.tabs.generate import GenerateTab
from s2ft_diffusion.adapters.file import read_adapter, write_adapter
from tests.conftest import ROOT
from tests.gradio_app.conftest import PATIENCE, until
from tests.gradio_app.test_engine import same

QUICK = {"steps": 3, "guidance": 4.0}


@pytest.fixture(scope="module")
def app(served):
    return served[1]


@pytest.fixture
def client(served) -> Client:
    return Client(served[0], verbose=False)


@pytest.fixture
def named(client) -> dict[str, str]:
    return {a["name"]: a["id"] for a in client.predict(api_name="/list_adapters") if a["usable"]}


def images(result: tuple) -> list[Image.Image]:
    return [Image.open(item["image"]) for item in result[1]]


def test_the_manuals_example(served, tmp_path, monkeypatch) -> None:
    """The Python code of the section on the API in docs/app.md, with this server's address."""
    section = (ROOT / "docs" / "app.md").read_text().split("## The API")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S).group(1)
    assert "http://127.0.0.1:7860" in code
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code.replace("http://127.0.0.1:7860", served[0]).replace("verbose=True", "verbose=False"), scope)
    assert (tmp_path / "cat.png").read_bytes().startswith(b"\x89PNG")


def test_every_action_is_a_documented_endpoint(client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {
        "/generate", "/cancel", "/compare", "/train", "/training_status", "/cancel_training", "/inspect",
        "/list_history", "/image_settings", "/upload_adapter", "/download_adapter", "/list_adapters",
        "/compare_grid", "/count_tokens", "/delete_adapter", "/rename_adapter", "/favourite_image", "/delete_image",
        "/export_adapter",
    }  # fmt: skip
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_generate_gives_a_png_with_its_settings(client, named, app, engine) -> None:
    result = client.predict(
        prompt="a photo of sks cat", negative_prompt="red", adapter=named["cat"], strength=0.8, seed=5, images=2,
        scheduler="Euler", **QUICK, api_name="/generate",
    )  # fmt: skip
    assert result[2] == "done"
    first, second = images(result)
    assert (first.format, second.format) == ("PNG", "PNG")
    settings = Settings.from_json(second.info["s2ft"])
    assert settings == Settings(
        "a photo of sks cat", "red", ((named["cat"], 0.8),), steps=3, guidance=4.0, seed=6, scheduler="Euler"
    )
    assert "Negative prompt: red" in second.info["parameters"]
    assert "S2FT: cat 0.8" in second.info["parameters"]
    assert same(engine.generate(settings, app.library)[0], second.convert("RGB"))
    plain = client.predict(prompt="a photo of sks cat", adapter="", seed=6, **QUICK, api_name="/generate")
    assert not same(images(plain)[0].convert("RGB"), second.convert("RGB"))


def generated(engine: Engine, settings: Settings, library) -> Image.Image:
    """An image made in the engine's own thread, as all of the app's are: OpenMP has another pool in every thread."""
    return engine.threads.submit(engine.generate, settings, library).result()[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 40])
def test_mixed_requests_of_eight_clients_equal_those_made_alone(served, named, app, count) -> None:
    rng = random.Random(1)
    cat, dog, both = named["cat"], named["dog"], named["both"]
    choices = [("", 1.0, "", 0.5), (cat, 1.0, "", 0.5), (dog, 0.6, "", 0.5), (both, 1.2, "", 0.5), (dog, 1.0, cat, 0.5)]
    wishes = []
    for _ in range(count):
        adapter, strength, second, second_strength = rng.choice(choices)
        wishes.append(
            {
                "prompt": rng.choice(("a photo of sks cat", "a red dog in the snow")),
                "adapter": adapter, "strength": strength,
                "second_adapter": second, "second_strength": second_strength,
                "steps": rng.randint(2, 4), "seed": rng.randrange(100), "scheduler": rng.choice(list(SCHEDULERS)),
            }
        )  # fmt: skip
    made: dict[int, Image.Image] = {}

    def visit(number: int) -> None:
        client = Client(served[0], verbose=False)
        for i in range(number, count, 8):
            made[i] = images(client.predict(**wishes[i], api_name="/generate"))[0].convert("RGB")

    threads = [threading.Thread(target=visit, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(range(count))
    for i, wish in enumerate(wishes):
        alone = Settings.checked(
            negative_prompt="", guidance=4.0, images=1,
            adapters=((wish["adapter"], wish["strength"]), (wish["second_adapter"], wish["second_strength"])),
            **{name: wish[name] for name in ("prompt", "steps", "seed", "scheduler")},
        )  # fmt: skip
        assert same(generated(app.engine, alone, app.library), made[i]), wish
    fresh = Engine("toybox")  # and one that nobody else has used
    assert same(generated(fresh, alone, app.library), made[count - 1])


def test_cancel(client) -> None:
    job = client.submit(prompt="x", steps=100, images=8, api_name="/generate")
    while not job.outputs():
        assert not job.done()
        time.sleep(0.05)
    assert client.predict(api_name="/cancel") == "cancelled"
    assert job.result(timeout=PATIENCE)[2].startswith("cancelled with ")
    assert client.predict(api_name="/cancel") == "nothing to cancel"
    assert client.predict(prompt="x", **QUICK, api_name="/generate")[2] == "done"


LONG = {
    "/generate": {"prompt": "x", "steps": 100, "images": 8},
    "/compare": {"prompt": "x", "steps": 100, "seeds": 4, "strengths": "0.5, 1, 1.5"},
}


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", LONG)
def test_closing_the_page_frees_the_pipelines(served, app, named, endpoint) -> None:
    for _ in range(3):  # more than there are pipelines
        client = Client(served[0], verbose=False)
        job = client.submit(**LONG[endpoint], adapter=named["cat"], api_name=endpoint)
        while not job.outputs():
            time.sleep(0.05)
        job.cancel()
    assert Client(served[0], verbose=False).predict(prompt="x", **QUICK, api_name="/generate")[2] == "done"
    until(lambda: not app.running.under_way)  # long before they would have been done


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"adapter": "nobody"}, "no such adapter"),
        ({"adapter": "../../etc/passwd"}, "no such adapter"),
        ({"prompt": "x" * 1001}, "at most 1,000|1000"),
        ({"steps": 10**6}, "steps|maximum"),
        ({"seed": -3}, "The seed must be from"),
        ({"strength": 1.0, "adapter": "a\0b"}, "no such adapter"),
    ],
)
def test_errors_say_what_is_wrong_and_nothing_else(client, values, match) -> None:
    with pytest.raises(Exception, match=f"(?i){match}") as caught:  # Gradio checks sliders itself
        client.predict(**{"prompt": "x", **QUICK, **values}, api_name="/generate")
    assert "Traceback" not in str(caught.value)
    assert str(ROOT) not in str(caught.value)


def test_an_unexpected_error_stays_in_the_log(client, app, monkeypatch) -> None:
    def fail(*args):
        raise RuntimeError("secret /root/path")

    monkeypatch.setattr(app.engine, "iterate", fail)
    with pytest.raises(AppError) as caught:
        client.predict(prompt="x", **QUICK, api_name="/generate")
    assert "secret" not in str(caught.value)
    assert "log" in str(caught.value)


def test_upload_and_download(client, adapters, tmp_path, app) -> None:
    listed = client.predict(api_name="/list_adapters")
    before = {a["id"] for a in listed}
    there = client.predict(handle_file(str(adapters / "dog.safetensors")), api_name="/upload_adapter")
    assert there["there_already"]
    assert there["id"] in before
    adapter = read_adapter(adapters / "dog.safetensors")
    write_adapter(tmp_path / "new.safetensors", replace(adapter, info=replace(adapter.info, date="2026-03-04")))
    good = client.predict(handle_file(str(tmp_path / "new.safetensors")), api_name="/upload_adapter")
    assert good["usable"]
    assert not good["there_already"]
    assert {a["id"] for a in client.predict(api_name="/list_adapters")} == before | {good["id"]}
    back = client.predict(good["id"], api_name="/download_adapter")
    assert Path(back).read_bytes() == (tmp_path / "new.safetensors").read_bytes()
    assert Path(back).name == "dog.safetensors"
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((adapters / "dog.safetensors").read_bytes()[:-100])
    with pytest.raises(AppError, match="cannot be used") as caught:
        client.predict(handle_file(str(damaged)), api_name="/upload_adapter")
    assert "/tmp" not in str(caught.value)
    with pytest.raises(AppError, match="no such adapter"):
        client.predict(str(adapters / "dog.safetensors"), api_name="/download_adapter")
    assert client.predict(good["id"], "Rex", api_name="/rename_adapter")["name"] == "Rex"
    assert app.library.get(good["id"]).info.date == "2026-03-04"
    with pytest.raises(AppError, match="not uploaded or trained here"):
        client.predict(there["id"], "Rex", api_name="/rename_adapter")
    with pytest.raises(AppError, match="not uploaded or trained here"):
        client.predict(there["id"], api_name="/delete_adapter")
    assert client.predict(good["id"], api_name="/delete_adapter") == "deleted"
    assert {a["id"] for a in client.predict(api_name="/list_adapters")} == before


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "README.md", "a\0b", "x" * 5000])
def test_no_path_from_a_client_is_opened(served, adapters, path) -> None:
    """Calls that claim to have uploaded a file of the server's."""
    address = served[0].rstrip("/")
    for target in (path, str(adapters / "dog.safetensors")):
        data = {"data": [{"path": target, "meta": {"_type": "gradio.FileData"}}]}
        begun = httpx.post(f"{address}/gradio_api/call/upload_adapter", json=data)
        if begun.status_code != 200:
            continue
        answer = httpx.get(
            f"{address}/gradio_api/call/upload_adapter/{begun.json()['event_id']}", timeout=PATIENCE
        ).text
        assert "event: error" in answer
        assert "event: complete" not in answer
        assert "Traceback" not in answer
    for url in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/file={adapters / 'dog.safetensors'}"):
        with contextlib.suppress(httpx.InvalidURL):
            assert httpx.get(f"{address}{url.replace(chr(0), '%00')}").status_code >= 400


def test_a_link_in_the_upload_folder_is_not_followed(served, adapters) -> None:
    """An upload is a regular file of its own, whatever its name says."""
    address = served[0].rstrip("/")
    files = {"files": ("../../../../tmp/evil.safetensors", b"x", "application/octet-stream")}
    stored = httpx.post(f"{address}/gradio_api/upload", files=files).json()[0]
    assert ".." not in stored
    assert Path(stored).is_file()
    assert not Path(stored).is_symlink()
    assert not Path("/tmp/evil.safetensors").exists()


def test_uploads_are_limited_in_size(served) -> None:
    address = served[0].rstrip("/")
    files = {"files": ("big.safetensors", b"\0" * (21 * 2**20), "application/octet-stream")}
    assert httpx.post(f"{address}/gradio_api/upload", files=files, timeout=PATIENCE).status_code == 413


def test_compare(client, named) -> None:
    sheet = Image.open(
        client.predict(
            prompt="a photo of sks cat", adapter=named["cat"], strengths="0.5, 1", seeds=1, **QUICK, api_name="/compare"
        )
    )
    assert sheet.format == "PNG"
    assert sheet.width > 3 * 256
    for values, match in (
        ({"strengths": "1, x"}, "numbers separated by commas"),
        ({"strengths": "9"}, "from 0 to 1.5"),
        ({"strengths": ",".join(["1"] * 7)}, "One to six"),
        ({"adapter": ""}, "Choose an adapter"),
        ({"second_adapter": named["cat"]}, "same one"),
    ):
        with pytest.raises(AppError, match=match):
            client.predict(**{"prompt": "x", "adapter": named["cat"], **QUICK, **values}, api_name="/compare")


@pytest.mark.parametrize(
    ("endpoint", "values", "match"),
    [
        ("/list_adapters", {"sort": ["name"]}, "sort must be one of"),
        ("/export_adapter", {"adapter": {"name": "cat"}, "tool": "ComfyUI", "second_adapter": []}, "no such adapter"),
        ("/export_adapter", {"tool": {}}, "not in the list of choices"),
    ],
)
def test_what_is_sent_may_be_of_any_type(client, named, endpoint, values, match) -> None:
    usual = {"adapter": named["cat"]} if endpoint == "/export_adapter" else {}
    with pytest.raises(AppError, match=match):
        client.predict(**usual | values, api_name=endpoint)


def test_count_tokens(client) -> None:
    assert client.predict("a photo of sks cat", api_name="/count_tokens") == {"tokens": 7, "limit": 32, "unread": ""}
    assert client.predict("cat " * 31 + "zebra", api_name="/count_tokens")["unread"].endswith("zebra")


@pytest.mark.parametrize(
    ("prompt", "negative", "said"),
    [
        ("a", "b", "7 of 32 tokens"),
        ("a lost", "", "!7 of 32 tokens: “lost” is not read"),
        ("a", "b gone", "!7 of 32 tokens: “gone” of the negative prompt is not read"),
        ("a lost", "b gone", "!7 of 32 tokens: “lost” is not read; “gone” of the negative prompt is not read"),
    ],
)
def test_the_line_under_the_prompt(prompt, negative, said) -> None:
    def count(text: str) -> dict[str, object]:
        return {"tokens": 7, "limit": 32, "unread": text.partition(" ")[2]}

    assert GenerateTab.token_words(SimpleNamespace(count_tokens=count), prompt, negative) == said


def test_the_line_under_prompts_one_a_line() -> None:
    """Each is counted for itself."""

    def count(text: str) -> dict[str, object]:
        words = text.split()
        return {"tokens": len(words), "limit": 3, "unread": " ".join(words[3:])}

    def said(prompt: str, each_line: bool) -> str:
        return GenerateTab.token_words(SimpleNamespace(count_tokens=count), prompt, "", each_line)

    assert said("a red\n\na blue cat", True) == "3 of 3 tokens in the longest line"
    assert said("a red\na blue cat", False) == "!5 of 3 tokens: “blue cat” is not read"
    assert said("a red cat here\na blue cat", True) == "!4 of 3 tokens in the longest line: “here” is not read"
    assert said(" ", True) == "0 of 3 tokens"


@pytest.mark.slow
def test_compare_grid(client, named) -> None:
    wish = {"prompts": "a red dog\na blue cat", "strengths": "1", "seeds": 2, **QUICK}
    sheet, status = client.predict(
        adapters=[named["cat"], named["dog"], named["both"]], **wish, api_name="/compare_grid"
    )
    assert status == "done"
    size = Image.open(sheet).size
    assert (size[0] // 256, size[1] // 256) == (4, 4)
    for values, match in (
        ({"adapters": "x"}, "Choose an adapter"),
        ({"adapters": [named["cat"], "../x"]}, "no such adapter"),
        ({"adapters": [named["cat"]], "prompts": " "}, "1 to 12 prompts"),
        ({"adapters": [named["cat"]], "prompts": "x\n" * 12, "seeds": 4, "strengths": "0, 1"}, "too large"),
    ):
        with pytest.raises(AppError, match=match):
            client.predict(**{**wish, **values}, api_name="/compare_grid")


def test_inspect(client, named) -> None:
    plot, pictures, _ = client.predict(adapter=named["both"], layer="", api_name="/inspect")
    assert len(plot["data"]) == 28 + 6
    assert len(pictures) == 3
    _, other, _ = client.predict(
        adapter=named["both"], layer="text_encoder.text_model.encoder.layers.0.self_attn.q_proj", api_name="/inspect"
    )
    assert " numbers, by size" in other[0]["caption"]


def test_history(client, named) -> None:
    client.predict(prompt="remember me", adapter=named["dog"], seed=77, **QUICK, api_name="/generate")
    gallery, names = client.predict(api_name="/list_history")
    assert gallery[0]["caption"].startswith("dog 1 · seed 77 · ")
    settings = client.predict(names[0], api_name="/image_settings")
    assert (settings["seed"], settings["adapters"]) == (77, [[named["dog"], 1.0]])
    assert json.loads(Image.open(gallery[0]["image"]).info["s2ft"]) == settings
    for endpoint in ("/image_settings", "/favourite_image", "/delete_image"):
        with pytest.raises(AppError, match="no such image"):
            client.predict("../../x", api_name=endpoint)
    assert client.predict(names[0], api_name="/favourite_image") is True
    assert client.predict(favourites=True, api_name="/list_history")[1] == [names[0]]
    assert client.predict(names[0], api_name="/delete_image") == "deleted"
    assert names[0] not in client.predict(api_name="/list_history")[1]
    assert client.predict(favourites=True, api_name="/list_history") == ([], [])


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_train(client, photos, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    files = [handle_file(str(path)) for path in sorted(photos.iterdir())]
    wish = {"subject": "rex", "class_name": "dog", "steps": 20, "n_frequency": 100}
    status = client.predict(photos=files, **wish, api_name="/train")
    assert status["state"] in ("waiting", "running")
    until(lambda: client.predict(status["job"], api_name="/training_status")["state"] not in ("waiting", "running"))
    status = client.predict(status["job"], api_name="/training_status")
    assert status["state"] == "done"
    assert len(status["losses"]) == 20
    assert (
        client.predict(prompt="a photo of sks dog", adapter=status["adapter"], **QUICK, api_name="/generate")[2]
        == "done"
    )
    assert client.predict(status["job"], api_name="/cancel_training")["state"] == "done"
    with pytest.raises(AppError, match="3 to 20 photos"):
        client.predict(photos=files[:1], **wish, api_name="/train")
    with pytest.raises(AppError, match="no such training"):
        client.predict("../x", api_name="/training_status")


@pytest.mark.slow
def test_users_and_their_images(adapters, tmp_path) -> None:
    from app.arguments import parse_arguments
    from app.server import close, launch

    (tmp_path / "users").write_text("ann:one\nbob:two:three\n")
    flags = ["--adapters", str(adapters), "--outputs", str(tmp_path / "out"), "--port", "0", "--no_training"]
    blocks, app, address = launch(parse_arguments([*flags, "--auth", str(tmp_path / "users")]), block=False)
    try:
        assert httpx.get(f"{address}config").status_code == 401
        with pytest.raises(Exception, match=r"(?i)auth|login|401"):
            Client(address, verbose=False, auth=("ann", "wrong"))
        ann, bob = (Client(address, verbose=False, auth=who) for who in (("ann", "one"), ("bob", "two:three")))
        ann.predict(prompt="ann's", **QUICK, api_name="/generate")
        gallery, names = ann.predict(api_name="/list_history")
        assert len(gallery) == 1
        assert bob.predict(api_name="/list_history") == ([], [])
        with pytest.raises(AppError, match="no such image"):
            bob.predict(names[0], api_name="/image_settings")
        assert "/train" not in ann.view_api(return_format="dict", print_info=False)["named_endpoints"]
    finally:
        close(blocks, app)
