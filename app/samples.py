"""The app's sample adapters, made anew: two subjects of the embedded world, trained as the demo trains.

python -m app.samples
python -m app.samples --base toybox-flow mittens
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from demo import demo_prompts, train
from s2ft_diffusion import toybox
from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS

from .server import DEMO_ADAPTERS

SUBJECTS = ("mittens", "widget")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", default=list(SUBJECTS), help="names of toybox subjects")
    parser.add_argument("--base", choices=toybox.NAMES, default="toybox")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/samples"))
    args = parser.parse_args()
    for name in args.subjects:
        subject = ALL_SUBJECTS[name]
        sample = ["--validation_prompt", demo_prompts(subject)[0], "--num_validation_images", "1"]
        only_at_the_end = ["--validation_epochs", "1000000"]
        base = ["--pretrained_model_name_or_path", args.base]
        report = train(subject, args.work_dir / args.base / name, [*base, *sample, *only_at_the_end])
        file = DEMO_ADAPTERS / f"{name}{args.base.removeprefix('toybox')}.safetensors"
        shutil.copyfile(report["adapter"], file)
        print(f"{file}: {report['adapter_bytes']:,} bytes")


if __name__ == "__main__":
    main()
