"""A text encoder's adapter fits whatever transformers calls the layers: with or without an outer `text_model`."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from s2ft_diffusion import AdapterFileError, S2FTConfig, read_adapter, read_header, toybox, write_adapter
from s2ft_diffusion.adapters.file import METADATA_KEY, adapter_from_peft, collect_adapter
from s2ft_diffusion.dreambooth.checkpoints import ADAPTER, restore_adapter
from s2ft_diffusion.pipelines.attach import attach_adapter, check_fits, check_swap, swap_adapter


class Wrapped(nn.Module):
    """CLIP's text encoder as transformers built it up to 5.5."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.text_model = inner

    def forward(self, *args, **kwargs):
        return self.text_model(*args, **kwargs)


def encoders(pipe) -> dict[str, nn.Module]:
    """Both spellings of the embedded base's text encoder, whichever is installed."""
    inner = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    return {"flat": copy.deepcopy(inner), "wrapped": Wrapped(copy.deepcopy(inner))}


def adapted(model: nn.Module, name: str = ADAPTER) -> nn.Module:
    config = S2FTConfig(target_modules=["q_proj", "v_proj"], n_frequency=50, init_weights=False)
    return inject_adapter_in_model(config, model, name)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10))[0]


@pytest.mark.parametrize(("trained", "loaded"), [("flat", "wrapped"), ("wrapped", "flat"), ("wrapped", "wrapped")])
def test_files_fit_either_spelling(pipe, tmp_path, trained, loaded) -> None:
    source, target = adapted(encoders(pipe)[trained]), encoders(pipe)[loaded]
    write_adapter(tmp_path / "a", collect_adapter({"text_encoder": source}, ADAPTER))
    assert all(
        name.startswith("text_model.encoder.layers.") for name in read_header(tmp_path / "a").shapes["text_encoder"]
    )
    adapter = read_adapter(tmp_path / "a")
    assert not torch.allclose(output(target), output(source))
    check_fits(adapter, {"text_encoder": target}, "a")
    attach_adapter({"text_encoder": target}, adapter, "a")
    assert torch.equal(output(target), output(source))
    with torch.no_grad():
        next(p for n, p in source.named_parameters() if "coefficients" in n).mul_(3)
    changed = collect_adapter({"text_encoder": source}, ADAPTER)
    check_swap(changed, {"text_encoder": target}, "a", "a")
    swap_adapter({"text_encoder": target}, changed, "a")
    assert torch.equal(output(target), output(source))


@pytest.mark.parametrize(("trained", "resumed"), [("flat", "wrapped"), ("wrapped", "flat")])
def test_checkpoints_resume_under_either(pipe, trained, resumed) -> None:
    source, target = adapted(encoders(pipe)[trained]), adapted(encoders(pipe)[resumed])
    assert not torch.equal(output(target), output(source))
    restore_adapter({"text_encoder": target}, collect_adapter({"text_encoder": source}, ADAPTER))
    assert torch.equal(output(target), output(source))


def rename(path, to, rewrite) -> None:
    """The file again with other layer names, as an earlier release under another transformers would have them."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    header["shapes"] = {c: {rewrite(n): s for n, s in layers.items()} for c, layers in header["shapes"].items()}
    save_file({rewrite(key): tensor for key, tensor in tensors.items()}, to, {METADATA_KEY: json.dumps(header)})


def test_earlier_files_without_the_outer_name(pipe, tmp_path) -> None:
    write_adapter(tmp_path / "now", collect_adapter({"text_encoder": adapted(encoders(pipe)["flat"])}, ADAPTER))
    rename(tmp_path / "now", tmp_path / "before", lambda name: name.replace("text_model.", ""))
    now, before = read_adapter(tmp_path / "now"), read_adapter(tmp_path / "before")
    assert now.layers["text_encoder"].keys() == before.layers["text_encoder"].keys()


def test_a_layer_under_both_names_is_refused(pipe, tmp_path) -> None:
    write_adapter(tmp_path / "now", collect_adapter({"text_encoder": adapted(encoders(pipe)["flat"])}, ADAPTER))
    with safe_open(tmp_path / "now", framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    name, shape = next(iter(header["shapes"]["text_encoder"].items()))
    inner = name.removeprefix("text_model.")
    header["shapes"]["text_encoder"][inner] = shape
    tensors |= {key.replace(name, inner): t.clone() for key, t in tensors.items() if f".{name}." in key}
    save_file(tensors, tmp_path / "twice", {METADATA_KEY: json.dumps(header)})
    with pytest.raises(AdapterFileError, match="under two names"):
        read_adapter(tmp_path / "twice")


@pytest.mark.parametrize("spelling", ["flat", "wrapped"])
def test_peft_state_dicts(pipe, spelling) -> None:
    model = adapted(encoders(pipe)[spelling], "a")
    weights = get_peft_model_state_dict(model, adapter_name="a")
    adapter = adapter_from_peft(weights, model.peft_config["a"], "text_encoder")
    assert all(name.startswith("text_model.encoder.layers.") for name in adapter.layers["text_encoder"])


def test_the_embedded_bases_load_under_every_transformers() -> None:
    """Up to 5.5 a CLIP encoder's weights must have the outer name, or they are drawn anew with a mere warning."""
    found = 0
    for kind in ("unet", "flow"):
        for folder in toybox.base_path(kind).glob("text_encoder*"):
            if "CLIP" in (folder / "config.json").read_text():
                with safe_open(folder / "model.safetensors", framework="pt") as file:
                    names = [name for name in file.keys() if name != "text_projection.weight"]  # noqa: SIM118
                assert all(name.startswith("text_model.") for name in names)
                found += 1
    assert found == 3
