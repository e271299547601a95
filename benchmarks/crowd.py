"""Many adapters on one pipeline: the memory of each further one that is loaded, beside LoRAs of as many bytes.

    python -m benchmarks.crowd --adapters 100 --json docs/results/crowd.json

Memory is the process's resident set, before and after loading; the S2FT files are distinct. Neither kind is in use but
for the last one.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .measure import CLOCKS, parser, report
from .pipelines import around, write_lora, write_s2ft
from .shapes import SHAPES, build, inputs


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is not what is held
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * 4096


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=[name for name in SHAPES if name.startswith("sd15")], default="sd15")
    arguments.add_argument("--n", type=int, default=8000)
    arguments.add_argument("--adapters", type=int, default=100)
    args = arguments.parse_args()
    clock = CLOCKS[args.clock]
    pipe = around(build(args.shape, args.device)).to(args.device)
    batch = inputs(args.shape, 1, SHAPES[args.shape].pixels, args.device, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        files = [write_s2ft(pipe, Path(folder) / str(i), args.n, seed=i) for i in range(args.adapters)]
        per_rank = write_lora(pipe, Path(folder) / "one", 1).stat().st_size
        rank = max(1, round(files[0].stat().st_size / per_rank))
        lora = write_lora(pipe, Path(folder) / "lora", rank)

        def row(name: str, files: list[Path], load: Callable[[Path, int], object]) -> dict[str, object]:
            load(files[0], 0)  # the layers themselves come with the first
            with torch.no_grad():
                pipe.unet(**batch)
            before, begun = resident_bytes(), clock()
            for number, path in enumerate(files[1:], 1):
                load(path, number)
            seconds = (clock() - begun) / (len(files) - 1)
            each = (resident_bytes() - before) / (len(files) - 1)
            size = statistics.mean(path.stat().st_size for path in files)
            return {
                "adapter": name,
                "adapters": len(files),
                "file, bytes": round(size),
                "memory of a further one, bytes": round(each),
                "/ file": round(each / size, 3),
                "loading one, s": round(seconds, 3),
            }

        rows = [row("S2FT", files, lambda path, _: pipe.load_s2ft_weights(path))]
        pipe.unload_s2ft_weights()
        rows.append(
            row(
                f"LoRA r={rank}",
                [lora] * args.adapters,
                lambda path, number: pipe.load_lora_weights(path, adapter_name=f"lora_{number}"),
            )
        )
    report("crowd", args, rows)


if __name__ == "__main__":
    main()
