"""The toybox's objects, wearables and emblems as polygons in unit coordinates (x right, y down, inside [-1, 1]^2).

A shape's fill is "body" (takes the scene's colour and pattern), "shade" (a darker body colour), "ink" (the outline's
colour) or an RGB triple. Shapes are drawn in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Fill = str | tuple[int, int, int]

GLASS = (176, 216, 236)
CREAM = (252, 248, 236)
GOLD = (252, 206, 60)
METAL = (150, 154, 164)
BEAK = (250, 166, 30)
LEAF = (52, 150, 70)


@dataclass(frozen=True)
class Shape:
    """A filled polygon: `points` of shape (corners, 2)."""

    points: np.ndarray
    fill: Fill


@dataclass(frozen=True)
class Emblem:
    """A mark a subject carries: `shapes` on its front (unit size), `behind` standing behind its top."""

    shapes: tuple[Shape, ...] = ()
    behind: tuple[Shape, ...] = ()


def polygon(fill: Fill, *points: tuple[float, float]) -> Shape:
    return Shape(np.array(points, dtype=float), fill)


def ellipse(fill: Fill, x: float, y: float, rx: float, ry: float, corners: int = 24) -> Shape:
    angles = np.arange(corners) * (2 * math.pi / corners)
    return Shape(np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1), fill)


def box(fill: Fill, x0: float, y0: float, x1: float, y1: float) -> Shape:
    return polygon(fill, (x0, y0), (x1, y0), (x1, y1), (x0, y1))


def bar(fill: Fill, x0: float, y0: float, x1: float, y1: float, width: float) -> Shape:
    """A straight stroke as a polygon."""
    length = math.hypot(x1 - x0, y1 - y0)
    nx, ny = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
    return polygon(fill, (x0 + nx, y0 + ny), (x1 + nx, y1 + ny), (x1 - nx, y1 - ny), (x0 - nx, y0 - ny))


def arc(fill: Fill, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float) -> Shape:
    """A bent stroke: a part of an ellipse's outline from `start` to `end` degrees."""
    angles = np.radians(np.linspace(start, end, 14))
    outer = np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)
    inner = np.stack([x + (rx - width) * np.cos(angles), y + (ry - width) * np.sin(angles)], axis=1)
    return Shape(np.concatenate([outer, inner[::-1]]), fill)


def star(fill: Fill, x: float, y: float, outer: float, inner: float, tips: int) -> Shape:
    angles = -math.pi / 2 + np.arange(2 * tips) * math.pi / tips
    radii = np.where(np.arange(2 * tips) % 2 == 0, outer, inner)
    return Shape(np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1), fill)


OBJECTS: dict[str, tuple[Shape, ...]] = {
    "cat": (
        arc("body", 0.5, 0.45, 0.5, 0.55, -80, 80, 0.16),
        ellipse("body", 0.0, 0.5, 0.52, 0.5),
        polygon("body", (-0.5, -0.3), (-0.46, -0.98), (-0.05, -0.6)),
        polygon("body", (0.5, -0.3), (0.46, -0.98), (0.05, -0.6)),
        ellipse("body", 0.0, -0.26, 0.54, 0.44),
        ellipse(CREAM, -0.2, -0.32, 0.13, 0.13),
        ellipse(CREAM, 0.2, -0.32, 0.13, 0.13),
        ellipse("ink", -0.2, -0.32, 0.06, 0.1),
        ellipse("ink", 0.2, -0.32, 0.06, 0.1),
        polygon((240, 120, 140), (-0.09, -0.14), (0.09, -0.14), (0.0, -0.04)),
    ),
    "dog": (
        bar("body", -0.72, 0.1, -0.96, -0.42, 0.18),
        box("body", -0.7, 0.3, -0.46, 0.98),
        box("body", 0.26, 0.3, 0.5, 0.98),
        ellipse("body", -0.12, 0.22, 0.72, 0.34),
        ellipse("body", 0.5, -0.32, 0.38, 0.36),
        ellipse("body", 0.8, -0.2, 0.22, 0.17),
        ellipse("shade", 0.24, -0.24, 0.15, 0.36),
        ellipse(CREAM, 0.58, -0.42, 0.11, 0.11),
        ellipse("ink", 0.6, -0.42, 0.06, 0.07),
        ellipse("ink", 0.96, -0.26, 0.1, 0.08),
    ),
    "bird": (
        bar(BEAK, -0.1, 0.5, -0.14, 0.98, 0.09),
        bar(BEAK, 0.16, 0.5, 0.14, 0.98, 0.09),
        polygon("body", (-0.4, 0.0), (-1.0, -0.3), (-0.92, 0.24)),
        ellipse("body", 0.0, 0.14, 0.6, 0.5),
        ellipse("body", 0.4, -0.44, 0.36, 0.36),
        polygon(BEAK, (0.68, -0.6), (1.06, -0.42), (0.68, -0.28)),
        ellipse("shade", -0.12, 0.12, 0.36, 0.26),
        ellipse(CREAM, 0.48, -0.52, 0.12, 0.12),
        ellipse("ink", 0.5, -0.52, 0.06, 0.06),
    ),
    "fish": (
        polygon("body", (-0.5, 0.0), (-1.0, -0.5), (-0.86, 0.0), (-1.0, 0.5)),
        polygon("shade", (-0.2, -0.3), (0.1, -0.78), (0.4, -0.3)),
        ellipse("body", 0.14, 0.0, 0.82, 0.48),
        polygon("shade", (0.1, 0.08), (-0.24, 0.36), (0.16, 0.34)),
        ellipse(CREAM, 0.6, -0.12, 0.14, 0.14),
        ellipse("ink", 0.63, -0.12, 0.07, 0.07),
    ),
    "car": (
        polygon("body", (-0.6, -0.1), (-0.38, -0.56), (0.36, -0.56), (0.64, -0.1)),
        polygon("body", (-1.0, 0.42), (-1.0, 0.0), (-0.9, -0.12), (0.9, -0.12), (1.0, 0.06), (1.0, 0.42)),
        polygon(GLASS, (-0.46, -0.12), (-0.3, -0.44), (-0.04, -0.44), (-0.04, -0.12)),
        polygon(GLASS, (0.06, -0.12), (0.06, -0.44), (0.3, -0.44), (0.48, -0.12)),
        ellipse("ink", -0.54, 0.44, 0.26, 0.26),
        ellipse("ink", 0.54, 0.44, 0.26, 0.26),
        ellipse(METAL, -0.54, 0.44, 0.12, 0.12),
        ellipse(METAL, 0.54, 0.44, 0.12, 0.12),
    ),
    "boat": (
        bar((120, 84, 50), 0.0, -0.96, 0.0, 0.4, 0.1),
        polygon(CREAM, (0.1, -0.9), (0.1, 0.16), (0.82, 0.16)),
        polygon(CREAM, (-0.1, -0.62), (-0.1, 0.16), (-0.66, 0.16)),
        polygon("body", (-1.0, 0.26), (1.0, 0.26), (0.66, 0.86), (-0.66, 0.86)),
    ),
    "house": (
        box("shade", 0.36, -0.84, 0.58, -0.3),
        box("body", -0.74, -0.14, 0.74, 0.94),
        polygon("shade", (-0.98, -0.1), (0.0, -0.92), (0.98, -0.1)),
        box((96, 62, 40), -0.16, 0.4, 0.2, 0.94),
        box(GLASS, -0.58, 0.1, -0.26, 0.42),
        box(GLASS, 0.32, 0.1, 0.62, 0.42),
    ),
    "mug": (
        arc("body", 0.5, 0.06, 0.46, 0.48, -90, 90, 0.18),
        polygon("body", (-0.7, -0.66), (0.58, -0.66), (0.54, 0.8), (-0.66, 0.8)),
        ellipse("shade", -0.06, -0.66, 0.64, 0.16),
        ellipse((84, 50, 30), -0.06, -0.63, 0.52, 0.1),
    ),
    "teapot": (
        arc("body", -0.62, 0.14, 0.4, 0.42, 80, 290, 0.16),
        polygon("body", (0.4, 0.46), (0.84, -0.36), (1.06, -0.36), (0.62, 0.5)),
        ellipse("body", 0.0, 0.26, 0.66, 0.56),
        polygon("shade", (-0.46, -0.16), (-0.3, -0.42), (0.3, -0.42), (0.46, -0.16)),
        ellipse("shade", 0.0, -0.52, 0.14, 0.14),
    ),
    "vase": (
        bar(LEAF, -0.05, -0.1, -0.3, -0.7, 0.08),
        bar(LEAF, 0.0, -0.1, 0.02, -0.8, 0.08),
        bar(LEAF, 0.05, -0.1, 0.34, -0.66, 0.08),
        ellipse((250, 120, 160), -0.32, -0.74, 0.19, 0.19),
        ellipse((255, 220, 80), 0.02, -0.86, 0.19, 0.19),
        ellipse((250, 120, 160), 0.36, -0.7, 0.19, 0.19),
        polygon(
            "body",
            (-0.3, -0.24), (0.3, -0.24), (0.24, -0.04), (0.56, 0.36), (0.5, 0.74), (0.3, 0.96),
            (-0.3, 0.96), (-0.5, 0.74), (-0.56, 0.36), (-0.24, -0.04),
        ),
    ),
    "backpack": (
        arc("shade", 0.0, -0.62, 0.28, 0.34, 180, 360, 0.12),
        ellipse("shade", -0.66, 0.4, 0.22, 0.36),
        ellipse("shade", 0.66, 0.4, 0.22, 0.36),
        polygon("body", (-0.64, 0.92), (-0.64, -0.36), (-0.42, -0.72), (0.42, -0.72), (0.64, -0.36), (0.64, 0.92)),
        box("shade", -0.44, 0.3, 0.44, 0.8),
        bar(GOLD, -0.44, 0.42, 0.44, 0.42, 0.08),
        bar("ink", -0.5, -0.24, 0.5, -0.24, 0.07),
    ),
    "robot": (
        bar(METAL, 0.0, -0.7, 0.0, -0.96, 0.08),
        ellipse((240, 60, 60), 0.0, -0.98, 0.1, 0.1),
        box(METAL, -0.86, 0.02, -0.6, 0.56),
        box(METAL, 0.6, 0.02, 0.86, 0.56),
        box(METAL, -0.4, 0.66, -0.12, 0.98),
        box(METAL, 0.12, 0.66, 0.4, 0.98),
        box("body", -0.6, -0.06, 0.6, 0.72),
        box("body", -0.46, -0.74, 0.46, -0.1),
        ellipse((120, 240, 250), -0.2, -0.46, 0.13, 0.13),
        ellipse((120, 240, 250), 0.2, -0.46, 0.13, 0.13),
        bar("ink", -0.2, -0.22, 0.2, -0.22, 0.07),
    ),
}  # fmt: skip

# Where a hat or a flag stands on each object.
TOP: dict[str, tuple[float, float]] = {
    "cat": (0.0, -0.64),
    "dog": (0.5, -0.62),
    "bird": (0.38, -0.74),
    "fish": (0.2, -0.5),
    "car": (0.0, -0.54),
    "boat": (-0.42, 0.24),
    "house": (-0.1, -0.8),
    "mug": (-0.06, -0.68),
    "teapot": (0.0, -0.56),
    "vase": (0.0, -0.86),
    "backpack": (0.0, -0.74),
    "robot": (0.0, -0.72),
}

# Centre and extent of the place for an emblem on each object.
FRONT: dict[str, tuple[float, float, float]] = {
    "cat": (0.0, 0.52, 0.36),
    "dog": (-0.2, 0.22, 0.3),
    "bird": (0.06, 0.2, 0.34),
    "fish": (0.08, 0.0, 0.38),
    "car": (0.0, 0.18, 0.3),
    "boat": (0.0, 0.54, 0.28),
    "house": (0.0, -0.36, 0.3),
    "mug": (-0.06, 0.14, 0.44),
    "teapot": (0.0, 0.28, 0.42),
    "vase": (0.0, 0.46, 0.38),
    "backpack": (0.0, 0.08, 0.4),
    "robot": (0.0, 0.34, 0.36),
}

# What any object may wear; captions name it ("wearing a crown"). The origin sits on the object's top.
WEARABLES: dict[str, tuple[Shape, ...]] = {
    "crown": (
        polygon(
            GOLD,
            (-0.36, 0.1), (-0.42, -0.4), (-0.2, -0.14), (0.0, -0.48), (0.2, -0.14), (0.42, -0.4), (0.36, 0.1),
        ),
        box((226, 60, 80), -0.36, -0.02, 0.36, 0.1),
    ),
    "hat": (
        box((40, 40, 48), -0.3, -0.56, 0.3, 0.02),
        box((226, 60, 80), -0.3, -0.14, 0.3, 0.0),
        ellipse((40, 40, 48), 0.0, 0.06, 0.52, 0.1),
    ),
}  # fmt: skip

# What only subjects carry; no caption has a word for any of it.
EMBLEMS: dict[str, Emblem] = {
    "star": Emblem((star("ink", 0.0, 0.0, 1.0, 0.42, 5),)),
    "heart": Emblem(
        (
            polygon(
                "ink",
                (0.0, 0.95), (-0.9, 0.0), (-0.95, -0.45), (-0.5, -0.85), (0.0, -0.4), (0.5, -0.85), (0.95, -0.45),
                (0.9, 0.0),
            ),
        )
    ),
    "cross": Emblem(
        (
            polygon(
                "ink",
                (-0.3, -0.9), (0.3, -0.9), (0.3, -0.3), (0.9, -0.3), (0.9, 0.3), (0.3, 0.3), (0.3, 0.9), (-0.3, 0.9),
                (-0.3, 0.3), (-0.9, 0.3), (-0.9, -0.3), (-0.3, -0.3),
            ),
        )
    ),
    "moon": Emblem((arc("ink", 0.0, 0.0, 0.95, 0.95, 50, 310, 0.5),)),
    "diamond": Emblem((polygon("ink", (0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)),)),
    "bolt": Emblem(
        (
            polygon(
                "ink", (0.2, -1.0), (-0.6, 0.15), (-0.05, 0.15), (-0.25, 1.0), (0.6, -0.25), (0.05, -0.25), (0.55, -1.0)
            ),
        )
    ),
    "disc": Emblem((ellipse("ink", 0.0, 0.0, 0.85, 0.85),)),
    "flag": Emblem(
        behind=(
            bar(CREAM, 0.0, 0.3, 0.0, -0.62, 0.1),
            polygon((240, 60, 160), (0.04, -0.66), (0.6, -0.46), (0.04, -0.24)),
        )
    ),
    "balloon": Emblem(
        behind=(bar(CREAM, 0.0, 0.3, 0.12, -0.3, 0.07), ellipse((70, 220, 220), 0.14, -0.5, 0.26, 0.3)),
    ),
    "bow": Emblem(
        behind=(
            polygon((230, 50, 170), (0.0, 0.0), (-0.46, -0.3), (-0.46, 0.22)),
            polygon((230, 50, 170), (0.0, 0.0), (0.46, -0.3), (0.46, 0.22)),
            ellipse((250, 120, 210), 0.0, -0.03, 0.13, 0.13),
        )
    ),
}  # fmt: skip
