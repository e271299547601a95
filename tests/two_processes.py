"""Run by test_trainer under torchrun: trains on two processes and writes down what each rank holds at the end."""

import sys
from pathlib import Path

import train_dreambooth_s2ft as recipe
from s2ft_diffusion.adapters.file import collect_adapter, write_adapter

folder, argv = Path(sys.argv[1]), sys.argv[2:]
held: dict = {}


class Watching(recipe.Checkpoints):
    def __init__(self, accelerator, output_dir, components, limit) -> None:
        assert accelerator.num_processes == 2, accelerator.num_processes
        held.update(rank=accelerator.process_index, components=components)
        super().__init__(accelerator, output_dir, components, limit)


recipe.Checkpoints = Watching
recipe.main(argv)
adapter = collect_adapter(held["components"], "default")
adapter.info.date = "same"
write_adapter(folder / f"rank{held['rank']}", adapter)
