"""Many adapters on one pipeline: the memory of each further one that is loaded and not in use.

    python -m benchmarks.crowd --adapters 100 --json docs/results/crowd.json

Memory is the process's resident set, before and after loading; the adapters' files are distinct.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch

from .measure import parser, report
from .pipelines import around, write_s2ft
from .shapes import SHAPES, build, inputs


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is not what is held
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=[name for name in SHAPES if name.startswith("sd15")], default="sd15")
    arguments.add_argument("--n", type=int, default=8000)
    arguments.add_argument("--adapters", type=int, default=100)
    args = arguments.parse_args()
    pipe = around(build(args.shape, args.device)).to(args.device)
    batch = inputs(args.shape, 1, SHAPES[args.shape].pixels, args.device, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        files = [write_s2ft(pipe, Path(folder) / str(i), args.n, seed=i) for i in range(args.adapters)]
        size = statistics.mean(path.stat().st_size for path in files)
        names = [pipe.load_s2ft_weights(files[0])]  # the layers themselves come with the first
        with torch.no_grad():
            pipe.unet(**batch)
        before, begun = resident_bytes(), time.perf_counter()
        names += [pipe.load_s2ft_weights(path) for path in files[1:]]
        seconds = time.perf_counter() - begun
        each = (resident_bytes() - before) / (args.adapters - 1)
    row = {
        "adapters": args.adapters,
        "file, bytes": round(size),
        "memory of a further one, bytes": round(each),
        "/ file": round(each / size, 3),
        "loading one, s": round(seconds / (args.adapters - 1), 3),
    }
    report("crowd", args, [row])


if __name__ == "__main__":
    main()
