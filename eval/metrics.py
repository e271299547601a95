"""The numbers of a comparison, as pure functions over features and distances.

Features are rows of unit length, (n, dim); distances a matrix or a vector of LPIPS (Zhang et al., 2018). Definitions as
in DreamBooth (Ruiz et al., CVPR 2023, Sec. 4.2), which S2FT's Table 3 follows.
"""

from __future__ import annotations

import torch


def mean_pairwise_cosine(generated: torch.Tensor, real: torch.Tensor) -> float:
    """DINO and CLIP-I: the mean cosine over all pairs of a generated (n, dim) and a real image (m, dim)."""
    return float((generated @ real.T).mean())


def mean_cosine_among(features: torch.Tensor) -> float:
    """The mean cosine over all pairs of different images (n, dim): DINO and CLIP-I of the RealImages row.

    Raises ValueError for fewer than two.
    """
    return mean_among(features @ features.T)


def mean_matched_cosine(images: torch.Tensor, texts: torch.Tensor) -> float:
    """CLIP-T: the mean cosine of each image (n, dim) with its own prompt (n, dim)."""
    return float((images * texts).sum(dim=1).mean())


def mean_among(matrix: torch.Tensor) -> float:
    """The mean of a symmetric (n, n) matrix off its diagonal; of LPIPS distances, the diversity of a set of images.

    Raises ValueError for fewer than two.
    """
    count = len(matrix)
    if count < 2:
        raise ValueError(f"At least two images are needed to compare them with each other, got {count}.")
    return float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1)))


def mean_shift(before: torch.Tensor, after: torch.Tensor) -> float:
    """Drift in CLIP-I: the mean cosine distance of images (n, dim) from those of the base at the same seeds."""
    return float(1 - (before * after).sum(dim=1).mean())
