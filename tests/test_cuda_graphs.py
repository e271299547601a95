"""Transforms recorded as CUDA graphs: they need a GPU, and are left out where there is none."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from s2ft_diffusion import S2FTConfig, cuda_graphs
from s2ft_diffusion.cuda_graphs import graphs_apply
from s2ft_diffusion.rearrange import Rearrangement
from s2ft_diffusion.spectrum import sample_positions

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_not_on_a_cpu() -> None:
    assert not graphs_apply(torch.zeros(4, 2), (32, 32))


@pytest.fixture
def eager(monkeypatch):
    """Runs something without graphs."""

    def run(call):
        with monkeypatch.context() as patched:
            patched.setattr(cuda_graphs, "enabled", False)
            return call()

    return run


def adapted(dtype: torch.dtype = torch.float32, **options) -> nn.Sequential:
    """Three layers on a GPU, two of one shape, with adapters at random places."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 33), nn.Linear(33, 48), nn.Linear(48, 33)).to("cuda", dtype)
    model.requires_grad_(False)
    config = {"target_modules": ["0", "1", "2"], "n_frequency": 90, "init_weights": False, "scaling": 0.3}
    inject_adapter_in_model(S2FTConfig(**{**config, **options}), model)
    for layer in model:
        place(layer)
    return model


def place(layer: nn.Module) -> None:
    delta = layer.s2ft_delta["default"]
    d, k = delta.shape
    signs = (torch.randint(0, 2, (n,), dtype=torch.int8) * 2 - 1 for n in (d, k))
    kind = "real" if delta.coefficients.ndim == 1 else "complex"
    positions = sample_positions(len(delta.positions), (d, k), kind=kind, sampling="random")
    delta.place(positions, Rearrangement(torch.randperm(d), torch.randperm(k), *signs))
    with torch.no_grad():
        delta.coefficients.normal_()


def result(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, the input's gradient and the coefficients'."""
    x = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *trained])]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coefficients", ["complex", "real"])
def test_same_as_without(eager, dtype, coefficients) -> None:
    model = adapted(dtype, coefficients=coefficients)
    x = torch.randn(7, 48, device="cuda", dtype=dtype)
    expected = eager(lambda: result(model, x))
    assert not any(layer.s2ft_delta["default"]._graphed for layer in model)
    for _ in range(3):
        assert_same(result(model, x), expected)
    assert all(layer.s2ft_delta["default"]._graphed for layer in model)


@needs_gpu
def test_follows_what_changes(eager) -> None:
    """Coefficients, scale, places and the type: nothing recorded outlives them."""
    model = adapted()
    x = torch.randn(7, 48, device="cuda")
    result(model, x)
    layer = model[0]
    changes = (
        lambda: layer.s2ft_delta["default"].coefficients.data.mul_(1.5),
        lambda: layer.set_scale("default", 0.5),
        lambda: place(layer),
        lambda: setattr(layer.s2ft_delta["default"].coefficients, "data", torch.randn(45, 2, device="cuda")),
    )
    for change in changes:
        before = result(model, x)
        change()
        found = result(model, x)
        assert (found[0] - before[0]).abs().max() > 1e-3
        assert_same(found, eager(lambda: result(model, x)))
    model.to(torch.bfloat16)
    assert_same(result(model, x.bfloat16()), eager(lambda: result(model, x.bfloat16())))


@needs_gpu
def test_training_is_the_same(eager) -> None:
    """Two forward passes before a backward one, accumulated gradients, checkpointing, and an optimizer's steps."""

    def train() -> list[torch.Tensor]:
        model = adapted()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for step in range(4):
            torch.manual_seed(step)
            x, z, w = torch.randn(3, 7, 48, device="cuda").unbind()
            (model(x).square().sum() - model(z).abs().sum()).backward()
            checkpoint(model, w.requires_grad_(), use_reentrant=step % 2 == 0).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in trained]

    assert_same(train(), eager(train))


@needs_gpu
def test_a_copy_is_its_own(eager) -> None:
    model = adapted()
    x = torch.randn(7, 48, device="cuda")
    expected = result(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert_same(result(twin, x), eager(lambda: result(twin, x)))
    assert_same(result(model, x), expected)


@needs_gpu
def test_inside_another_graph() -> None:
    """Who records a whole step is not in the way of it."""
    model = adapted()
    x = torch.randn(7, 48, device="cuda")
    expected = result(model, x)
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result(model, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = result(model, static)
    graph.replay()
    assert_same(found, expected)
