"""Random sequences of the verbs, of two S2FT adapters and two LoRAs, against a model of what they mean.

The model holds dense weight changes and says which count: those fused into the weights, and those that are active while
adapters are on. After every step the layers' outputs are those of the dense weights.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_pipeline import Mochi1LoraLoaderMixin
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from s2ft_diffusion import S2FTConfig, S2FTLayer

LAYERS = {"to_q": (16, 12), "to_v": (10, 12), "to_out": (9, 16)}
WHERE = {"dog": ("to_q", "to_v"), "cat": ("to_q", "to_out"), "ink": ("to_q", "to_v"), "oil": ("to_q", "to_out")}
S2FT, LORA = ("dog", "cat"), ("ink", "oil")
SCALES = st.sampled_from([-0.5, 0.0, 0.25, 1.0, 2.0])
Change = dict[str, torch.Tensor]


class Layers(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Three linear layers, each seen by itself."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        for name, (out, width) in LAYERS.items():
            setattr(self, name, nn.Linear(width, out))


class LayersPipeline(DiffusionPipeline, Mochi1LoraLoaderMixin):
    def __init__(self, transformer: Layers) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


def new_pipeline() -> LayersPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LayersPipeline(Layers())


@functools.cache
def s2ft_file(folder: Path, name: str, seed: int) -> tuple[Path, Change]:
    """An adapter's file and its dense weight changes: "dog" on a grid, "cat" at free positions."""
    torch.manual_seed(seed)
    pipe = new_pipeline()
    options = {"positions": "free" if name == "cat" else "grid", "n_frequency": 30, "seed": seed, "scaling": 0.5 + seed}
    config = S2FTConfig(target_modules=list(WHERE[name]), init_weights=False, **options)
    pipe.transformer.add_adapter(config, "x")
    path = pipe.save_s2ft_weights(folder / f"{name}-{seed}")
    with torch.no_grad():
        return path, {layer: getattr(pipe.transformer, layer).get_delta_weight("x") for layer in WHERE[name]}


def lora_state(name: str, seed: int) -> tuple[Change, Change]:
    """A LoRA's state dict, and its dense weight changes."""
    generator = torch.Generator().manual_seed(seed)
    state, change = {}, {}
    for layer in WHERE[name]:
        out, width = LAYERS[layer]
        a, b = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
        state |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
        change[layer] = b @ a
    return state, change


class Verbs(RuleBasedStateMachine):
    folder: Path

    @initialize()
    def start(self) -> None:
        folder = self.folder
        self.pipe = new_pipeline()
        self.base = {name: tensor.clone() for name, tensor in self.pipe.transformer.state_dict().items()}
        self.files = {name: [s2ft_file(folder, name, seed) for seed in (1, 2)] for name in S2FT}
        self.loras = {name: lora_state(name, seed) for seed, name in enumerate(LORA)}
        self.loaded: dict[str, Change] = {}
        self.weights: dict[str, float] = {}
        self.active: list[str] = []
        self.on = True
        self.fused: dict[str, float] = {}
        self.left: list[tuple[Change, float]] = []  # fused, and then unloaded
        self.exact = True  # no LoRA has been in the weights, whose unfusing rounds

    # What it should be

    def wanted(self, layer: str) -> torch.Tensor:
        weight = self.base[f"{layer}.weight"].clone()
        for change, scale in self.left:
            weight += change.get(layer, torch.zeros(())) * scale
        for name, scale in self.fused.items():
            weight += self.loaded[name].get(layer, torch.zeros(())) * scale
        for name in self.active if self.on else ():
            if name not in self.fused:
                weight += self.loaded[name].get(layer, torch.zeros(())) * self.weights[name]
        return weight

    @invariant()
    def outputs_are_those_of_the_dense_weights(self) -> None:
        if not hasattr(self, "pipe"):
            return
        if not self.on:
            self.fused = {}  # as in PEFT, a layer that runs switched off unfuses what is in it
        with torch.no_grad():
            for layer in LAYERS:
                x = torch.eye(LAYERS[layer][1])
                found = getattr(self.pipe.transformer, layer)(x).T - self.base[f"{layer}.bias"][:, None]
                torch.testing.assert_close(found, self.wanted(layer), rtol=1e-4, atol=1e-3)

    @invariant()
    def nothing_is_left_of_what_is_gone(self) -> None:
        if not hasattr(self, "pipe"):
            return
        model = self.pipe.transformer
        s2ft = [m for m in model.modules() if isinstance(m, S2FTLayer)]
        assert {name for layer in s2ft for name in layer.s2ft_delta} == {n for n in self.loaded if n in S2FT}
        assert not any(p.requires_grad for layer in s2ft for p in layer.s2ft_delta.parameters())
        assert set(getattr(model, "peft_config", {})) == set(self.loaded)
        if not self.loaded and self.exact and not self.left:
            # Empty LoRA layers are diffusers' to leave behind.
            state = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
            assert state.keys() == self.base.keys()
            assert all(torch.equal(tensor, self.base[name]) for name, tensor in state.items())

    @invariant()
    def what_is_said_to_be_active_is(self) -> None:
        if hasattr(self, "pipe"):
            assert set(self.pipe.get_active_adapters()) == set(self.active) <= set(self.loaded)

    # The verbs

    @rule(name=st.sampled_from(S2FT), which=st.integers(0, 1), inference=st.booleans())
    def load_s2ft(self, name: str, which: int, inference: bool) -> None:
        path, change = self.files[name][which]
        if name in self.loaded:
            with pytest.raises(ValueError, match="already"):
                self.pipe.load_s2ft_weights(path, adapter_name=name)
            return
        with torch.inference_mode(inference):
            self.pipe.load_s2ft_weights(path, adapter_name=name)
        self.loaded[name], self.weights[name], self.active, self.on = change, 1.0, [name], True

    # diffusers alone decides what a LoRA beside LoRAs that are switched off or fused does.
    @precondition(lambda self: not set(self.fused) & set(LORA))
    @rule(name=st.sampled_from(LORA), of_model=st.booleans())
    def load_lora(self, name: str, of_model: bool) -> None:
        mixed = any(n in S2FT for n in self.loaded)
        if name in self.loaded or not (mixed or self.on):
            return
        state, change = self.loras[name]
        if of_model:
            self.pipe.transformer.load_lora_adapter(dict(state), adapter_name=name)
        else:
            self.pipe.load_lora_weights(dict(state), adapter_name=name)
        self.loaded[name], self.weights[name], self.active, self.on = change, 1.0, [name], True

    @precondition(lambda self: any(name in S2FT for name in self.loaded))
    @rule(data=st.data())
    def hotswap(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n in self.loaded if n in S2FT]))
        path, change = data.draw(st.sampled_from(self.files[name]))
        if name in self.fused:
            with pytest.raises(ValueError, match="is fused"):
                self.pipe.load_s2ft_weights(path, adapter_name=name, hotswap=True)
            return
        self.pipe.load_s2ft_weights(path, adapter_name=name, hotswap=True)
        self.loaded[name] = change

    @precondition(lambda self: self.loaded and not set(self.fused) & set(LORA))
    @rule(data=st.data())
    def set_adapters(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.loaded)), min_size=1, unique=True))
        scales = data.draw(st.lists(SCALES, min_size=len(names), max_size=len(names)))
        self.pipe.set_adapters(names, scales)
        self.active = names
        self.weights |= dict(zip(names, scales, strict=True))

    @precondition(lambda self: self.loaded)
    @rule(on=st.booleans())
    def switch(self, on: bool) -> None:
        (self.pipe.enable_lora if on else self.pipe.disable_lora)()
        self.on = on

    @precondition(lambda self: any(n in S2FT or n not in self.fused for n in self.loaded))
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n in self.loaded if n in S2FT or n not in self.fused]))
        mixed = any(n in S2FT for n in self.loaded)
        if not mixed and self.active == [name] and len(self.loaded) > 1:
            return  # diffusers alone: each layer chooses for itself
        (self.pipe.transformer if data.draw(st.booleans()) else self.pipe).delete_adapters(name)
        del self.loaded[name], self.weights[name]
        self.fused.pop(name, None)
        left = [n for n in self.active if n != name]
        self.active = left or sorted(self.loaded)[:1]

    @rule(scale=st.sampled_from([0.5, 1.0]), data=st.data())
    def fuse_s2ft(self, scale: float, data: st.DataObject) -> None:
        own = sorted(n for n in self.loaded if n in S2FT)
        names = data.draw(st.none() | st.lists(st.sampled_from(own), min_size=1, unique=True)) if own else None
        wanted = names or [n for n in self.active if n in S2FT]
        if not wanted:
            with pytest.raises(ValueError, match="no active S2FT adapter"):
                self.pipe.fuse_s2ft(scale)
            return
        self.pipe.fuse_s2ft(scale, names)
        for name in wanted:
            self.fused.setdefault(name, self.weights[name] * scale)

    @rule()
    def unfuse_s2ft(self) -> None:
        self.pipe.unfuse_s2ft()
        self.fused = {n: s for n, s in self.fused.items() if n in LORA}

    @precondition(lambda self: any(n in LORA for n in self.active))
    @rule()
    def fuse_lora(self) -> None:
        self.pipe.fuse_lora()
        for name in self.active:
            if name in LORA:
                self.fused.setdefault(name, self.weights[name])
        self.exact = False

    @rule()
    def unfuse_lora(self) -> None:
        self.pipe.unfuse_lora()
        self.fused = {n: s for n, s in self.fused.items() if n in S2FT}

    @rule()
    def unload_s2ft(self) -> None:
        self.pipe.unload_s2ft_weights()
        self._gone(S2FT)

    @rule(of_model=st.booleans())
    def unload_lora(self, of_model: bool) -> None:
        (self.pipe.transformer.unload_lora if of_model else self.pipe.unload_lora_weights)()
        self._gone(LORA)

    def _gone(self, kind: tuple[str, ...]) -> None:
        self.left += [(self.loaded[n], s) for n, s in self.fused.items() if n in kind]
        self.fused = {n: s for n, s in self.fused.items() if n not in kind}
        self.loaded = {n: change for n, change in self.loaded.items() if n not in kind}
        self.active = [n for n in self.active if n not in kind] or sorted(self.loaded)[:1]
        if not any(isinstance(module, BaseTunerLayer) for module in self.pipe.transformer.modules()):
            self.on = True  # a LoRA's empty layers, which diffusers leaves behind, stay switched off

    @precondition(lambda self: any(name in S2FT for name in self.loaded))
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n in self.loaded if n in S2FT]))
        path = self.pipe.save_s2ft_weights(self.folder / "saved", name)
        other = new_pipeline()
        other.load_s2ft_weights(path, "x")
        with torch.no_grad():
            for layer, change in self.loaded[name].items():
                found = getattr(other.transformer, layer).get_delta_weight("x")
                torch.testing.assert_close(found, change, rtol=1e-4, atol=1e-5)

    @rule()
    def copy_the_model(self) -> None:
        self.pipe = LayersPipeline(copy.deepcopy(self.pipe.transformer))


@pytest.mark.parametrize(
    ("examples", "steps"), [(25, 15), pytest.param(200, 40, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_verbs(examples, steps, tmp_path) -> None:
    Verbs.folder = tmp_path
    checks = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    options = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=checks,
        derandomize=True,
    )
    run_state_machine_as_test(Verbs, settings=options)
