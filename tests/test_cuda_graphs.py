"""Transforms recorded as CUDA graphs: on a GPU where there is one, and everywhere with a stand-in for the recording."""

import copy
import threading

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from s2ft_diffusion import S2FTConfig
from s2ft_diffusion.tuner import cuda_graphs
from s2ft_diffusion.tuner.cuda_graphs import GraphedTransform, graphs_apply
from s2ft_diffusion.tuner.rearrange import Rearrangement
from s2ft_diffusion.tuner.spectrum import sample_positions

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))


class Recording:
    """What replays by running again."""

    made = 0

    def __init__(self, run) -> None:
        Recording.made += 1
        self.run = run

    def replay(self) -> None:
        with torch.no_grad():
            self.run()


@pytest.fixture(params=["cpu", GPU])
def device(request, monkeypatch) -> str:
    """A device on which graphs are recorded; on a CPU by a stand-in, which counts them."""
    monkeypatch.setattr(cuda_graphs, "enabled", True)
    if request.param == "cpu":

        def apply(coefficients: torch.Tensor, shape: tuple[int, int]) -> bool:
            return cuda_graphs.enabled and torch.is_grad_enabled() and coefficients.requires_grad

        monkeypatch.setattr(Recording, "made", 0)
        monkeypatch.setattr("s2ft_diffusion.tuner.delta.graphs_apply", apply)
        monkeypatch.setattr("s2ft_diffusion.tuner.delta.current_stream", lambda device: 0)
        monkeypatch.setattr(GraphedTransform, "_record", lambda self, device, run: Recording(run))
    return request.param


def test_not_without_a_gpu() -> None:
    assert not graphs_apply(torch.zeros(4, 2, requires_grad=True), (32, 32))


@pytest.fixture
def eager(monkeypatch):
    """Runs something without graphs."""

    def run(call):
        with monkeypatch.context() as patched:
            patched.setattr(cuda_graphs, "enabled", False)
            return call()

    return run


def graphs(model: nn.Module) -> list[GraphedTransform]:
    """The layers' graphs, all of which must be there."""
    found = [known for layer in model for known in layer.s2ft_delta["default"]._graphed.values()]
    assert len(found) == len(model)
    assert all(isinstance(known, GraphedTransform) for known in found)
    return found


def adapted(device: str, dtype: torch.dtype = torch.float32, **options) -> nn.Sequential:
    """Three layers, two of one shape, with adapters at random places."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 33), nn.Linear(33, 48), nn.Linear(48, 33)).to(device, dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coefficients", ["complex", "real"])
def test_same_as_without(device, eager, dtype, coefficients) -> None:
    model = adapted(device, dtype, coefficients=coefficients)
    x = torch.randn(7, 48, device=device, dtype=dtype)
    expected = eager(lambda: result(model, x))
    for _ in range(2):  # the first time they are not worth recording
        assert_same(result(model, x), expected)
    recorded = graphs(model)
    for _ in range(2):
        assert_same(result(model, x), expected)
    assert all(a is b for a, b in zip(graphs(model), recorded, strict=True))
    assert recorded[0].workspace is recorded[2].workspace
    assert recorded[0].workspace is not recorded[1].workspace
    assert recorded[0].shared is recorded[1].shared


def test_follows_what_changes(device, eager) -> None:
    """Coefficients, scale, places and the type: nothing recorded outlives them."""
    model = adapted(device)
    x = torch.randn(7, 48, device=device)
    layer = model[0]
    changes = (
        lambda: layer.s2ft_delta["default"].coefficients.data.mul_(1.5),
        lambda: layer.set_scale("default", 0.5),
        lambda: place(layer),
        lambda: setattr(layer.s2ft_delta["default"].coefficients, "data", torch.randn(45, 2, device=device)),
    )
    for change in changes:
        result(model, x)
        before = result(model, x)
        graphs(model)
        change()
        for _ in range(3):
            found = result(model, x)
            assert (found[0] - before[0]).abs().max() > 1e-3
            assert_same(found, eager(lambda: result(model, x)))
    model.to(torch.bfloat16)
    assert not any(layer.s2ft_delta["default"]._graphed for layer in model)
    for _ in range(3):
        assert_same(result(model, x.bfloat16()), eager(lambda: result(model, x.bfloat16())))


def test_buffers_that_are_moved_under_it(device) -> None:
    """Offloading puts other memory under a buffer: what is recorded reads none of the buffers' own."""
    model = adapted(device)
    x = torch.randn(7, 48, device=device)
    for _ in range(2):
        expected = result(model, x)
    recorded = graphs(model)
    for layer in model:
        rearrangement = layer.s2ft_delta["default"]._graphed[torch.float32].index.rearrangement
        read = [t for axis in (rearrangement._known_rows, rearrangement._known_columns) for t in vars(axis).values()]
        assert not {t.data_ptr() for t in read} & {b.data_ptr() for b in layer.buffers()}
    for buffer in model.buffers():
        old = buffer.data
        buffer.data = buffer.data.clone()
        old.fill_(-1)
    assert_same(result(model, x), expected)
    assert all(a is b for a, b in zip(graphs(model), recorded, strict=True))


def test_training_is_the_same(device, eager) -> None:
    """Two forward passes before a backward one, accumulated gradients, checkpointing, and an optimizer's steps."""

    def train() -> list[torch.Tensor]:
        model = adapted(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        recorded = None
        for step in range(4):
            torch.manual_seed(step)
            x, z, w = torch.randn(3, 7, 48, device=device).unbind()
            (model(x).square().sum() - model(z).abs().sum()).backward()
            checkpoint(model, w.requires_grad_(), use_reentrant=step % 2 == 0).square().sum().backward()
            with torch.no_grad():  # a look at how it goes
                model(x)
            optimizer.step()
            optimizer.zero_grad()
            if cuda_graphs.enabled:
                assert recorded is None or all(a is b for a, b in zip(graphs(model), recorded, strict=True))
                recorded = graphs(model)
        return [p.detach() for p in trained]

    assert_same(train(), eager(train))


def test_gradient_of_a_gradient(device, eager) -> None:
    model = adapted(device)
    x = torch.randn(7, 48, device=device)

    def penalised() -> list[torch.Tensor]:
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = model(x).square().sum()
        grads = torch.autograd.grad(loss, trained, create_graph=True)
        return list(torch.autograd.grad(loss + sum(g.square().sum() for g in grads), trained))

    for _ in range(2):
        result(model, x)
    assert_same(penalised(), eager(penalised))
    assert not graphs(model)[0].workspace.grad.requires_grad


def test_a_copy_is_its_own(device, eager) -> None:
    model = adapted(device)
    x = torch.randn(7, 48, device=device)
    for _ in range(2):
        expected = result(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    for _ in range(3):
        assert_same(result(twin, x), eager(lambda: result(twin, x)))
    assert_same(result(model, x), expected)


def test_threads_do_not_meet(device, eager) -> None:
    """Two trainings at once, of layers of one shape."""
    models = [adapted(device), adapted(device)]
    for parameter in models[1].parameters():
        parameter.data.mul_(2)
    x = torch.randn(7, 48, device=device)
    expected = [eager(lambda m=m: result(m, x)) for m in models]
    wrong = []

    def work(number: int) -> None:
        for _ in range(60):
            found = result(models[number], x)
            wrong.extend(i for i, (a, b) in enumerate(zip(found, expected[number], strict=True)) if off(a, b))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def off(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_where_it_does_not_pay(device) -> None:
    """A frozen adapter, and a layer whose places change at every call."""
    model = adapted(device)
    x = torch.randn(7, 48, device=device)
    for _ in range(3):
        for layer in model:
            place(layer)
        result(model, x)
    model.requires_grad_(False)
    for _ in range(3):
        model(x.requires_grad_()).sum().backward()
    known = [graph for layer in model for graph in layer.s2ft_delta["default"]._graphed.values()]
    assert not any(isinstance(graph, GraphedTransform) for graph in known)


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_inside_another_graph(device) -> None:
    """Who records a whole step is not in the way of it."""
    model = adapted(device)
    x = torch.randn(7, 48, device=device)
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
