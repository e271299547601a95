"""A file is read where neither diffusers nor PEFT nor Pillow is, as in ComfyUI."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from s2ft_diffusion.adapters.file import read_adapter, write_adapter
from s2ft_diffusion.adapters.reading import read_stored
from tests.conftest import ROOT
from tests.test_adapter_file import make_adapter

WITHOUT = """
import json, sys
for name in ("diffusers", "peft", "transformers", "accelerate", "PIL", "torchvision"):
    sys.modules[name] = None  # as if it were not installed
from s2ft_diffusion.adapters.reading import read_header, read_stored
adapter = read_stored(sys.argv[1])
print(json.dumps({
    "scaling": adapter.configs["unet"].scaling, "trainable": adapter.trainable, "info": adapter.info.to_json(),
    "header": read_header(sys.argv[1]).trainable,
}))
"""


def test_reading_without_diffusers_and_peft(tmp_path) -> None:
    adapter = make_adapter()
    write_adapter(tmp_path / "a", adapter)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path / "a")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    info = adapter.info.to_json()
    assert said == {"scaling": 1.0, "trainable": adapter.trainable, "info": info, "header": adapter.trainable}


OUTDATED = """
import sys, warnings
sys.modules["peft.tuners.tuners_utils"] = None  # one that lacks what is needed
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from s2ft_diffusion.adapters.reading import read_stored
print([str(w.message) for w in caught if "s2ft_diffusion" in str(w.message)], read_stored(sys.argv[1]).trainable)
"""


@pytest.mark.slow
def test_reading_beside_a_peft_that_does_not_fit(tmp_path) -> None:
    """Someone else's environment may have another release of PEFT: files are read all the same."""
    write_adapter(tmp_path / "a", make_adapter())
    done = subprocess.run(
        [sys.executable, "-c", OUTDATED, str(tmp_path / "a")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot be imported" in done.stdout
    assert done.stdout.endswith("] 120\n")


def test_both_readers_read_the_same(tmp_path) -> None:
    write_adapter(tmp_path / "a", make_adapter())
    full, stored = read_adapter(tmp_path / "a"), read_stored(tmp_path / "a")
    assert stored.info == full.info
    for name, value in vars(stored.configs["unet"]).items():
        assert getattr(full.configs["unet"], name) == value
    for name, layer in full.layers["unet"].items():
        for key, tensor in layer.state().items():
            assert torch.equal(stored.layers["unet"][name].state()[key], tensor)
