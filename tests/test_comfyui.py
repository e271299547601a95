"""ComfyUI's node and files: with a stand-in of ComfyUI always, with its own code where S2FT_COMFYUI names a checkout.

S2FT_COMFYUI_PYTHON may name a Python that has what ComfyUI needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from s2ft_diffusion import AdapterInfo, attention_targets, convert
from s2ft_diffusion.adapters.file import write_adapter
from s2ft_diffusion.adapters.tool_names import key
from tests.conftest import ROOT
from tests.random_adapters import dense, random_adapter, tiny_denoisers

CHECKOUT = os.environ.get("S2FT_COMFYUI")


class Model:
    """As much of ComfyUI's model patcher as the node needs."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.model = self.cond_stage_model = types.SimpleNamespace(state_dict=lambda: weights)
        self.patches: dict = {}

    def clone(self) -> Model:
        other = Model(self.model.state_dict())
        other.patches = dict(self.patches)
        return other

    def add_patches(self, patches: dict, strength: float) -> None:
        self.patches |= {key: (strength, patch) for key, patch in patches.items()}


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """The node's module, with stand-ins for the parts of ComfyUI that it imports."""
    folders: dict[str, tuple[list[str], set[str]]] = {}
    paths = types.ModuleType("folder_paths")
    paths.models_dir = str(tmp_path)
    paths.folder_names_and_paths = folders
    paths.add_model_folder_path = lambda name, path: folders.setdefault(name, ([], set()))[0].append(path)
    paths.get_folder_paths = lambda name: folders[name][0]
    paths.get_filename_list = lambda name: sorted(p.name for f in folders[name][0] for p in Path(f).glob("*.s*"))
    paths.get_full_path = lambda name, file: next(
        (str(Path(f) / file) for f in folders[name][0] if (Path(f) / file).is_file()), None
    )
    comfy, lora, adapters = (types.ModuleType(n) for n in ("comfy", "comfy.lora", "comfy.weight_adapter"))
    comfy.lora = lora
    adapters.WeightAdapterBase = object

    def unet_names(model, names):
        return {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": key for key in model.state_dict()}

    def clip_names(model, names):
        return {f"text_encoder.{key.removesuffix('.weight')}": key for key in model.state_dict()}

    lora.model_lora_keys_unet, lora.model_lora_keys_clip = unet_names, clip_names
    for module in (paths, comfy, lora, adapters):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(str(ROOT / "integrations"))
    for name in ("comfyui", "comfyui.nodes", "comfyui.patches"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "s2ft").mkdir()
    import comfyui.nodes

    yield comfyui.nodes
    for name in ("comfyui", "comfyui.nodes", "comfyui.patches"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def denoisers():
    return tiny_denoisers()


def weights_for(adapter, component: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in adapter.layers[component].items():
        kernel = adapter.kernels[component].get(name, ())
        weight = torch.randn(layer.shape, generator=torch.Generator().manual_seed(1))
        found[f"{name}.weight"] = weight.view(layer.shape[0], -1, *kernel) if kernel else weight
    return found


def test_the_node(nodes, tmp_path, denoisers) -> None:
    info = AdapterInfo(base_model="a base", subject="mittens", instance_prompt="a photo of sks cat")
    unet = denoisers["sd15"]
    adapter = random_adapter({"unet": unet}, {"unet": attention_targets(unet, "all")[:40]}, info=info)
    write_adapter(tmp_path / "s2ft" / "cat.safetensors", adapter)
    (tmp_path / "s2ft" / "bad.safetensors").write_bytes(b"nothing")
    choices = nodes.LoadS2FT.INPUT_TYPES()["required"]["file"][0]
    assert choices == [
        "bad.safetensors | not an S2FT adapter", "cat.safetensors | mittens | a photo of sks cat",
    ]  # fmt: skip
    model = Model(weights_for(adapter, "unet"))
    for label in (choices[1], "cat.safetensors"):  # a workflow of before the file had a subject still runs
        assert nodes.LoadS2FT.VALIDATE_INPUTS(label) is True
        patched, clip, words = nodes.LoadS2FT().load(model, label, 0.5, 1.0)
        assert (clip, words) == (None, "a photo of sks cat")
        assert not model.patches
        assert len(patched.patches) == 40
        for name in adapter.layers["unet"]:
            before = model.model.state_dict()[f"{name}.weight"]
            strength, patch = patched.patches[f"{name}.weight"]
            found = patch.calculate_weight(before.clone(), name, strength, 1.0, None, lambda x: x)
            wanted = before + 0.5 * dense(adapter, "unet", name).view(before.shape)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert nodes.LoadS2FT().load(model, "cat.safetensors", 0.0, 1.0)[0] is model
    _, words, text = nodes.S2FTInfo().look("cat.safetensors")
    assert json.loads(text) | {"date": None} == {
        "base_model": "a base", "subject": "mittens", "instance_prompt": words, "numbers": adapter.trainable,
        "date": None,
    }  # fmt: skip


def test_the_nodes_own_words(nodes, tmp_path, denoisers) -> None:
    unet = denoisers["sd15"]
    names = attention_targets(unet, "qv")[:2]
    adapter = random_adapter({"unet": unet}, {"unet": names}, info=AdapterInfo(base_model="a base"))
    write_adapter(tmp_path / "s2ft" / "cat.safetensors", adapter)
    with pytest.raises(ValueError, match=r"trained on a base; this model has no layer unet\."):
        nodes.LoadS2FT().load(Model({}), "cat.safetensors", 1.0, 1.0)
    wrong = {f"{name}.weight": torch.zeros(3, 5) for name in names}
    with pytest.raises(ValueError, match=r"is 32x\d+; in this model it is 3x5"):
        nodes.LoadS2FT().load(Model(wrong), "cat.safetensors", 1.0, 1.0)
    assert "no dog.safetensors" in nodes.LoadS2FT.VALIDATE_INPUTS("dog.safetensors")
    (tmp_path / "s2ft" / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^Load S2FT: .*not a complete safetensors file"):
        nodes.LoadS2FT().load(Model({}), "bad.safetensors", 1.0, 1.0)


NODE_WITHOUT = """
import sys, types
for name in ("diffusers", "peft", "transformers", "accelerate", "PIL", "torchvision"):
    sys.modules[name] = None
paths = types.ModuleType("folder_paths")
paths.models_dir, paths.folder_names_and_paths = "models", {"s2ft": (["models/s2ft"], set())}
paths.add_model_folder_path = lambda *names: None
comfy, lora, adapters = (types.ModuleType(n) for n in ("comfy", "comfy.lora", "comfy.weight_adapter"))
comfy.lora, adapters.WeightAdapterBase = lora, object
sys.modules |= {m.__name__: m for m in (paths, comfy, lora, adapters)}
sys.path.insert(0, "integrations")
import comfyui
print(sorted(comfyui.NODE_CLASS_MAPPINGS))
"""


def test_the_node_imports_without_diffusers_and_peft() -> None:
    done = subprocess.run([sys.executable, "-c", NODE_WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['LoadS2FT', 'S2FTInfo']\n", done.stderr[-3000:]


def test_transformers_that_comfyui_does_not_read() -> None:
    for name in ("layers.0.attn.to_q", "noise_refiner.1.feed_forward.linear_2"):
        with pytest.raises(ValueError, match="no names for Lumina 2's layers; use lora"):
            key("comfyui", "transformer", name)
    with pytest.raises(ValueError, match="no names for Sana's layers"):
        key("comfyui", "transformer", "transformer_blocks.3.ff.conv_point")
    assert key("comfyui", "transformer", "layers.0.attention.to_q") == "transformer.layers.0.attention.to_q"  # Z-Image


@pytest.mark.skipif(not CHECKOUT, reason="S2FT_COMFYUI names no checkout of ComfyUI")
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "flux2", "qwen", "zimage"])
def test_in_comfyui_itself(tmp_path, denoisers, family) -> None:
    """Every key of every file is used, nothing is warned of, and ComfyUI's weights are the sums."""
    from transformers import CLIPTextConfig, CLIPTextModel

    component = "unet" if family in ("sd15", "sdxl") else "transformer"
    models = {component: denoisers[family]}
    targets = {component: attention_targets(denoisers[family], "all")}
    if family == "sd15":
        with torch.device("meta"):
            size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
            models["text_encoder"] = CLIPTextModel(CLIPTextConfig(**size))
        targets["text_encoder"] = attention_targets(models["text_encoder"], "blocks")
    info = AdapterInfo(subject="mittens", instance_prompt="a photo of sks cat")
    adapter = random_adapter(models, targets, info=info)
    written = write_adapter(tmp_path / "s2ft.safetensors", adapter).bytes
    for tool in ("comfyui", "kohya") if component == "unet" else ("comfyui", "lora"):
        convert.convert(tmp_path / "s2ft.safetensors", tmp_path / f"{tool}.safetensors", to=tool, dtype="float32")
    if component == "unet":
        options = {"to": "comfyui", "dtype": "float32", "dense": True}
        convert.convert(tmp_path / "s2ft.safetensors", tmp_path / "dense.safetensors", **options)
    driver = Path(__file__).parent / "comfyui_driver.py"
    python = os.environ.get("S2FT_COMFYUI_PYTHON", sys.executable)
    command = [python, str(driver), str(Path(CHECKOUT).resolve()), family, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if (
        family in ("flux2", "zimage")
        and f"has no attribute '{'Flux2' if family == 'flux2' else 'ZImage'}'" in done.stderr
    ):
        pytest.skip(f"this ComfyUI has no {family} yet")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("RESULT ")[1])
    assert found["warnings"] == []
    assert found["unchanged"]
    expected = {"comfyui", "node", "kohya", "dense"} if component == "unet" else {"comfyui", "node", "lora"}
    assert found["results"].keys() == expected
    for result in found["results"].values():
        assert result["model"] < 1e-4
        assert result.get("clip", 0.0) < 1e-4
        assert ("clip" in result) == (family == "sd15")
    assert found["results"]["node"]["words"] == "a photo of sks cat"
    assert found["results"]["node"]["kept"] < 4 * written
