"""python -m s2ft_diffusion: what it prints, and one line with exit code 2 for what cannot work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from safetensors import safe_open

from s2ft_diffusion import AdapterInfo, toybox
from s2ft_diffusion.__main__ import main, weighted
from s2ft_diffusion.adapters.file import WEIGHTS_NAME, read_adapter, write_adapter
from s2ft_diffusion.adapters.lora_files import read_lora
from tests.conftest import ROOT
from tests.random_adapters import random_adapter, tiny_unet

NAMES = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"]


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture
def file(unet, tmp_path):
    info = AdapterInfo("a/base", "a photo of sks cat", "mittens", "cat", training={"steps": 300})
    path = tmp_path / "cat.safetensors"
    write_adapter(path, random_adapter({"unet": unet}, {"unet": NAMES}, info=info))
    return path


@pytest.fixture
def free(unet, tmp_path):
    path = tmp_path / "free.safetensors"
    write_adapter(path, random_adapter({"unet": unet}, {"unet": NAMES[:1]}, free=True))
    return path


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_info(capsys, file) -> None:
    code, out, _ = run(capsys, "info", file)
    assert code == 0
    for words in ("a photo of sks cat", "mittens", "24 numbers in 2 layers", "scaling 1.5"):
        assert words in out
    (line,) = (line.split() for line in out.splitlines() if line.endswith(NAMES[1]))
    assert line[:3] == ["32x288", "12", "3"]
    code, out, _ = run(capsys, "info", file, "--json")
    found = json.loads(out)
    assert found["info"]["training"] == {"steps": 300}
    assert [layer["name"] for layer in found["layers"]] == sorted(NAMES)
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1.0)
    adapter = read_adapter(file)
    for layer in found["layers"]:
        change = 1.5 * adapter.layers["unet"][layer["name"]].delta()
        assert layer["energy"] == pytest.approx(float(change.square().sum()), rel=1e-4)


def test_convert_says_what_it_wrote(capsys, file, free, tmp_path) -> None:
    code, out, _ = run(capsys, "convert", file, tmp_path / "k.safetensors", "--to", "kohya")
    assert code == 0
    assert f"{(tmp_path / 'k.safetensors').stat().st_size:,} bytes, rank 3, relative error 0.000" in out
    code, out, _ = run(capsys, "convert", free, tmp_path / "f.safetensors", "--to", "comfyui", "--rank", "2")
    assert code == 0
    assert "rank 2" in out
    assert f"unet.{NAMES[0]}" in out.splitlines()[0]  # the error by layer, where it is more than rounding
    code, out, _ = run(capsys, "convert", file, tmp_path / "i.safetensors", "--to", "s2ft", "--dtype", "int8")
    assert code == 0
    assert read_adapter(tmp_path / "i.safetensors").trainable == 24


def test_add_extract_verify_merge(capsys, file, tmp_path) -> None:
    code, out, _ = run(capsys, "add", f"{file}:0.5", f"{file}:-0.25", tmp_path / "sum.safetensors")
    assert (code, "rank 6" in out) == (0, True)
    assert set(read_lora(tmp_path / "sum.safetensors").layers["unet"]) == set(NAMES)
    code, out, _ = run(capsys, "extract", tmp_path / "sum.safetensors", tmp_path / "b", "--numbers", "0.05")
    assert (code, "relative error" in out) == (0, True)
    assert read_adapter(tmp_path / "b").layers["unet"][NAMES[1]].coefficients.numel() <= 0.05 * 32 * 288
    code, out, _ = run(capsys, "verify", file, "--base", "toybox")
    assert code == 1
    assert f"unet.{NAMES[0]}: the adapter has 32x32, the base " in out
    assert "does not fit toybox" in out
    code, _, err = run(capsys, "merge", "toybox", file, tmp_path / "merged")
    assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "nowhere.safetensors"], "no such file"),
        (["info", "nowhere"], "no such file"),  # without asking the hub
        (["info", "{folder}/text\nand more"], "no such file"),
        (["convert", "{file}", "{folder}", "--to", "lora"], "is a folder: give the name of a file"),
        (["convert", "{file}", "{folder}/text", "--to", "peft"], "is a file: peft's adapters are folders"),
        (["add", "{file}", "{folder}"], "is a folder: give the name of a file"),
        (["extract", "{file}", "{folder}/text/out"], "text is a file, not a folder"),
        (["verify", "{file}", "--base", "{folder}/broken"], "its model_index.json cannot be read"),
        (["info", "{folder}"], "there is no pytorch_s2ft_weights.safetensors"),
        (["info", "{folder}/text"], "not a complete safetensors file"),
        (["convert", "{free}", "out", "--to", "lora"], "its positions are free"),
        (["convert", "{file}", "out", "--to", "lora", "--rank", "0"], "rank must be at least 1"),
        (["convert", "{file}", "out", "--to", "lora", "--error", "2"], "error must be"),
        (["convert", "{file}", "out", "--to", "lora", "--dtype", "int8"], "dtype must be one of"),
        (["convert", "{file}", "out", "--to", "s2ft", "--rank", "3"], "are for LoRA files"),
        (["convert", "{file}", "{folder}/text/out", "--to", "lora"], "text"),
        (["add", "{free}", "out"], "its positions are free"),
        (["extract", "{file}", "out"], "is no key of a LoRA"),
        (["extract", "nowhere", "out"], "nowhere"),
        (["verify", "{file}", "--base", "nowhere"], "no folder in diffusers' layout"),
        (["merge", "nowhere", "{file}", "out"], "no folder in diffusers' layout"),
    ],
)
def test_bad_input(capsys, file, free, tmp_path, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no adapter")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, *[word.format(file=file, free=free, folder=tmp_path) for word in words])
    assert (code, out) == (2, "")
    assert err.startswith("s2ft: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_names_under_an_ascii_locale(unet, tmp_path) -> None:
    """In a process of its own: Python decides at its start how to read arguments and how to write."""
    for name, subject in (("Kätz", "Kätzchen"), ("plain", None)):
        adapter = random_adapter({"unet": unet}, {"unet": NAMES}, info=AdapterInfo(subject=subject))
        write_adapter(tmp_path / f"{name}.safetensors", adapter)
    latin = os.fsencode(tmp_path) + b"/caf\xe9.safetensors"
    shutil.copy(tmp_path / "plain.safetensors", latin)
    code = (
        "import sys, os; from s2ft_diffusion.__main__ import main\n"
        "def run(*words):\n    print('code', main(words), flush=True)\n"
        "file, plain, latin, out = sys.argv[1:]\n"
        "run('info', file); run('info', file, '--json'); run('info', latin)\n"
        "run('convert', file, out, '--to', 'kohya'); run('convert', plain, out, '--to', 'kohya')\n"
        "from s2ft_diffusion import read_header\n"
        "try: read_header(latin)\n"
        "except ValueError as error: print(error)\n"
    )
    out = tmp_path / "Kätzlein.safetensors"
    words = [tmp_path / "Kätz.safetensors", tmp_path / "plain.safetensors", latin, out]
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == [
        "code 0", "code 0", "code 2", "code 0", "code 0"
    ], done.stderr  # fmt: skip
    assert r"subject      K\xe4tzchen" in done.stdout
    assert r'"subject": "K\u00e4tzchen"' in done.stdout
    assert r"K\xe4tzlein.safetensors: " in done.stdout
    assert r"caf\xe9.safetensors is not UTF-8; write it so, or rename it." in done.stderr
    assert r"caf\xe9.safetensors: its name, or a folder's, is not UTF-8; rename it." in done.stdout
    assert done.stderr.count("\n") == 1
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["ss_output_name"] == "Kätzlein"


def test_nothing_is_written_over_what_is_read(capsys, file, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "dog")
    (tmp_path / "cat-link.safetensors").symlink_to(file)
    stored = tmp_path / "dog" / WEIGHTS_NAME
    stored.write_bytes(file.read_bytes())
    assert run(capsys, "convert", file, "lora.safetensors", "--to", "lora")[0] == 0
    assert run(capsys, "convert", file, "peft", "--to", "peft")[0] == 0
    base = shutil.copytree(toybox.base_path(), tmp_path / "base")
    spellings = [file, "cat.safetensors", "./cat.safetensors", "dog/../cat.safetensors", "cat-link.safetensors"]
    commands = [["convert", file, same, "--to", "lora"] for same in spellings]
    commands += [["convert", same, file, "--to", "s2ft"] for same in spellings]
    commands += [
        ["convert", "dog", "dog", "--to", "peft"],
        ["convert", "dog", "link/" + WEIGHTS_NAME, "--to", "s2ft"],
        ["convert", "peft/adapter_model.safetensors", "peft", "--to", "peft"],
        ["add", "dog", f"{file}:0.5", "dog/../cat.safetensors"],
        ["add", "peft", file, "peft", "--to", "peft"],
        ["add", "dog", "peft", "peft/adapter_model.safetensors"],
        ["extract", "lora.safetensors", "./lora.safetensors"],
        ["extract", "peft", "peft/adapter_model.safetensors"],
        ["convert", file, "base/unet/new.safetensors", "--to", "lora", "--base", base],
        ["merge", base, file, base], ["merge", base, file, "base/unet"], ["merge", base, file, "base/new"],
        ["merge", base, file, file], ["merge", base, "dog", "link"],
    ]  # fmt: skip
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words in commands:
        code, out, err = run(capsys, *words)
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert any(said in err for said in ("would be written over", "lies in the base", "exists already")), err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(capsys, "convert", "dog", "dog/lora.safetensors", "--to", "lora")[0] == 0  # beside it


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--to", "webui"],
        ["merge", "a"],
        ["extract", "a", "b", "--numbers", "many"],
    ],
)
def test_words_that_argparse_refuses(capsys, words) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2


def test_weights_of_adapters() -> None:
    assert weighted("dog/:0.5") == ("dog/", 0.5)
    assert weighted("dog/") == ("dog/", 1.0)
    assert weighted("a:b/c:-1e-1") == ("a:b/c", -0.1)
    assert weighted("C:\\dogs") == ("C:\\dogs", 1.0)


@pytest.mark.slow
def test_the_module_and_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "s2ft_diffusion", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    for command in ("info", "convert", "merge", "add", "extract", "verify"):
        assert command in done.stdout
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts["s2ft"] == "s2ft_diffusion.__main__:main"
