"""The encoders of the embedded world: a small CLIP and a small self-supervised ViT, trained on rendered pictures."""

from pathlib import Path

FOLDER = Path(__file__).parent
CLIP_FOLDER = FOLDER / "clip"
DINO_FOLDER = FOLDER / "dino"
