"""The app's sample adapters, made anew: two subjects of the embedded world, trained as the demo trains.

python -m app.samples
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from demo import demo_prompts, train
from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS

from .server import DEMO_ADAPTERS

SUBJECTS = ("widget", "salty")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", default=list(SUBJECTS), help="names of toybox subjects")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/samples"))
    args = parser.parse_args()
    for name in args.subjects:
        subject = ALL_SUBJECTS[name]
        sample = ["--validation_prompt", demo_prompts(subject)[0], "--num_validation_images", "1"]
        only_at_the_end = ["--validation_epochs", "1000000"]
        report = train(subject, args.work_dir / name, [*sample, *only_at_the_end])
        shutil.copyfile(report["adapter"], DEMO_ADAPTERS / f"{name}.safetensors")
        print(f"{DEMO_ADAPTERS / name}.safetensors: {report['adapter_bytes']:,} bytes")


if __name__ == "__main__":
    main()
