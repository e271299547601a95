"""Mutated adapter files, led by which lines of the readers each of them reaches (atheris, which is libFuzzer).

    pip install atheris
    python -m tests.long.fuzz_coverage corpus/ -max_total_time=3600

Mutations are libFuzzer's own and those of `tests.fuzz_adapter_file` in turn. `corpus/` keeps what reached something
new, a file that breaks something is written to `crash-*`; whatever else is on the command line is libFuzzer's.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["s2ft_diffusion.adapters"]):
    from s2ft_diffusion.adapters import file, format, packing, reading, weights  # noqa: F401

import torch

from tests.fuzz_adapter_file import mutated, new_model, seeds, try_file

LONGEST = 1 << 16  # bytes


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    if seed % 2:
        return atheris.Mutate(data, longest)
    return mutated(data, random.Random(seed))[:longest]


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary), new_model()
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        started = folder / "seeds"
        started.mkdir()
        for number, data in enumerate(seeds(folder)):
            (started / str(number)).write_bytes(data)
        path = folder / "file.safetensors"

        def test(data: bytes) -> None:
            path.write_bytes(data)
            try_file(path, model, base)

        for argument in sys.argv[1:]:
            if not argument.startswith("-"):
                Path(argument).mkdir(parents=True, exist_ok=True)
        atheris.Setup([*sys.argv, str(started), f"-max_len={LONGEST}"], test, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
