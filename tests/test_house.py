"""Which part needs which libraries, and which part may import which: data flows one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import s2ft_diffusion

PACKAGE = Path(s2ft_diffusion.__file__).parent
# Each folder may import those before it; settings are plain values, which anyone may take.
VALUES = {"dreambooth.settings"}
FLOW = ["tuner", "adapters", "pipelines", "toybox", "families", "dreambooth"]

ALONE = """
import sys

# transformers and accelerate are there: PEFT needs them itself.
BLOCKED = {
    "PIL", "datasets", "diffusers", "gradio", "lpips", "matplotlib", "open_clip", "scipy", "tensorboard", "torchvision",
}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in BLOCKED else found(name, package)

import torch
from peft import get_peft_model
from s2ft_diffusion.tuner.config import S2FTConfig
from s2ft_diffusion.tuner.prior import initialize_s2ft_weights
from s2ft_diffusion import S2FTConfig as same

assert same is S2FTConfig
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), S2FTConfig(target_modules=["0"], n_frequency=9))
initialize_s2ft_weights(model, lambda x: model(x).square().mean(), [torch.randn(4, 8)])
assert not any(name.partition(".")[0] in BLOCKED for name in sys.modules)
print("ok")
"""


def test_the_tuner_needs_torch_and_peft_alone() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


def test_the_recipe_can_be_read_from_top_to_bottom() -> None:
    tree = ast.parse((PACKAGE.parent / "train_dreambooth_s2ft.py").read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno - main.lineno < 120


def imports(path: Path) -> set[str]:
    """The folders of the package that a file imports from when it is imported itself, by relative imports."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found.update(name.partition(".")[0] for name in names if name not in VALUES)
    return found


@pytest.mark.parametrize("folder", FLOW)
def test_nothing_imports_what_comes_after_it(folder) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        if path.parent == PACKAGE / folder:
            later = imports(path) & set(FLOW[FLOW.index(folder) + 1 :])
            assert not later, f"{path.relative_to(PACKAGE)} imports {sorted(later)}"


def _by_the_locale(node: ast.Call) -> bool:
    """Whether a call opens, reads or writes text in whatever encoding the machine's locale says."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    if any(keyword.arg == "encoding" for keyword in node.keywords):
        return False
    modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if name == "open":  # a file's, if it is given a mode or nothing
        of_a_file = isinstance(node.func, ast.Name) or modes or not node.args
        return bool(of_a_file) and not any("b" in mode for mode in modes)
    return isinstance(node.func, ast.Attribute) and name in ("read_text", "write_text")


def test_text_files_are_utf_8() -> None:
    root = PACKAGE.parent
    folders = ("app", "benchmarks", "eval", "examples", "integrations")
    files = [*root.glob("*.py"), *(p for f in (PACKAGE, *(root / name for name in folders)) for p in f.rglob("*.py"))]
    found = []
    for path in files:
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        found += [f"{path.relative_to(root)}:{node.lineno}" for node in calls if _by_the_locale(node)]
    assert not found, f"text without an encoding: {found}"


def test_every_public_name_is_there() -> None:
    for name in s2ft_diffusion.__all__:
        assert getattr(s2ft_diffusion, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        s2ft_diffusion.nothing_like_it  # noqa: B018


def test_the_reference_has_every_verb_and_the_citation_the_version() -> None:
    root = PACKAGE.parent
    if not (root / "docs").is_dir():
        pytest.skip("only in a checkout")
    pages = "".join(path.read_text(encoding="utf-8") for path in (root / "docs" / "reference").glob("*.md"))
    verbs = [n for n in vars(s2ft_diffusion.pipeline) if "s2ft" in n and not n.startswith("_")]
    verbs = [n for n in verbs if getattr(s2ft_diffusion.pipeline, n).__module__ == s2ft_diffusion.pipeline.__name__]
    assert {"load_s2ft_weights", "save_s2ft_as_lora"} <= set(verbs)
    assert not [name for name in verbs if f"pipelines.verbs.{name}\n" not in pages]
    assert "::: s2ft_diffusion.adapters.convert\n" in pages
    assert f"\nversion: {s2ft_diffusion.__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
