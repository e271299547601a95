"""A short run of the fuzzer, always the same one; `python -m tests.fuzz_adapter_file` runs for as long as one likes."""

from __future__ import annotations

import pytest

from tests.fuzz_adapter_file import DATA, fuzz, new_model, try_file

FOUND = sorted((DATA / "fuzz").glob("*.safetensors"))


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_files_that_once_broke_something(path) -> None:
    model = new_model()
    assert try_file(path, model, {name: tensor.clone() for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("count", [400, pytest.param(5_000, marks=pytest.mark.slow)])
def test_mutated_adapter_files(tmp_path, count) -> None:
    outcomes, broken = fuzz(tmp_path, seed=0, files=count)
    assert not broken, [path.with_suffix(".txt").read_text(encoding="utf-8") for path in broken[:3]]
    assert outcomes.total() == count
    assert min(outcomes["refused"], outcomes["used"]) > 0
