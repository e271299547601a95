"""Uploading by the trainer's own flags and loading by name, against a hub of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import HTTPError

from s2ft_diffusion.adapters.file import WEIGHTS_NAME
from s2ft_diffusion.adapters.lora_files import LORA_NAME
from s2ft_diffusion.dreambooth import publish
from s2ft_diffusion.dreambooth.settings import HubSettings
from s2ft_diffusion.errors import InputError, NotPublished
from tests.conftest import ROOT
from tests.fake_hub import fake_hub

LOAD = """
import diffusers, s2ft_diffusion
from s2ft_diffusion import toybox
pipe = diffusers.StableDiffusionPipeline.from_pretrained(toybox.base_path())
print(pipe.load_s2ft_weights("someone/dog", revision="main"), pipe.get_list_adapters())
pipe.load_lora_weights("someone/dog", adapter_name="lora")
print(pipe.get_list_adapters())
try:
    pipe.load_s2ft_weights("someone/cat")
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_push_and_load(photos, tmp_path) -> None:
    with fake_hub() as (address, files):
        environment = {
            **os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

        def run(*command: str) -> str:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        output = tmp_path / "out"
        said = run(
            "train_dreambooth_s2ft.py", "--pretrained_model_name_or_path", "toybox", "--instance_dir", str(photos),
            "--output_dir", str(output), "--targets", "qv", "--n_frequency", "40", "--estimate_draws", "1",
            "--max_train_steps", "2",
            "--report_to", "none", "--validation_prompt", "a photo of sks dog", "--num_validation_images", "1",
            "--save_lora", "--push_to_hub", "--hub_model_id", "someone/dog", "--hub_token", "hf_secret",
        )  # fmt: skip
        assert "uploaded to someone/dog" in said
        names = (WEIGHTS_NAME, LORA_NAME, "README.md", "validation/final-0.png")
        assert set(files) == {f"someone/dog/{name}" for name in names}
        card = files["someone/dog/README.md"].decode()
        header = yaml.safe_load(card.split("---")[1])
        assert (header["library_name"], header["base_model_relation"]) == ("diffusers", "adapter")
        assert header["base_model"].startswith("toybox")
        assert {"s2ft", "lora"} <= set(header["tags"])
        assert header["widget"] == [{"text": "a photo of sks dog", "output": {"url": "validation/final-0.png"}}]
        assert "pipe.load_lora_weights('someone/dog')" in card
        assert files[f"someone/dog/{WEIGHTS_NAME}"] == (output / WEIGHTS_NAME).read_bytes()
        assert not any(b"hf_secret" in path.read_bytes() for path in Path(output).rglob("*") if path.is_file())
        said = run("-c", LOAD)
        assert said.startswith("s2ft_0 {'unet': ['s2ft_0']}\n{'unet': ['s2ft_0', 'lora']}")
        assert "someone/cat: the repository has no pytorch_s2ft_weights.safetensors" in said


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch) -> None:
    """The hub's client raises errors of its own library, which is no OSError."""

    def refused(*args: object, **kwargs: object) -> None:
        raise HTTPError("Connection refused")

    monkeypatch.setattr(publish, "create_repo", refused)
    monkeypatch.setattr(publish, "upload_folder", refused)
    settings = HubSettings("someone/dog", None)
    with pytest.raises(InputError, match="the repository cannot be created: Connection refused"):
        publish.open_repository(tmp_path, settings)
    with pytest.raises(NotPublished, match="failed: Connection refused"):
        publish.push(tmp_path, "someone/dog", settings)
