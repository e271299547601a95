"""The toybox world: a seeded procedural renderer of one object in one place, 64x64 pixels, anti-aliased.

Every picture is a pure function of a `Scene`. Objects are lists of polygons in unit coordinates (x right, y down, the
object inside [-1, 1]^2), so that pose is one matrix applied to points, and are drawn `SUPERSAMPLING` times larger than
the result before an exact box reduction.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from .objects import EMBLEMS, FRONT, OBJECTS, TOP, WEARABLES, Shape

RESOLUTION = 64
SUPERSAMPLING = 4
CANVAS = RESOLUTION * SUPERSAMPLING
INK = (28, 26, 34)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 40),
    "orange": (246, 134, 24),
    "yellow": (250, 216, 40),
    "green": (36, 150, 62),
    "blue": (40, 88, 214),
    "purple": (130, 58, 176),
    "pink": (250, 150, 190),
    "brown": (122, 74, 38),
    "white": (244, 244, 240),
    "black": (52, 52, 58),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS: dict[str, str] = {
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "desert": "in the desert",
    "city": "in the city",
    "kitchen": "in the kitchen",
    "space": "in space",
    "sea": "under water",
    "sunset": "at sunset",
    "meadow": "in a meadow",
}
CLASSES = tuple(OBJECTS)


@dataclass(frozen=True)
class Scene:
    """What one picture shows.

    `x`, `y` are offsets of the object's centre from the picture's, as a share of the picture's side; `size` is half the
    object's extent as a share of the side; `rotation` is in degrees. `seed` draws the background's details.
    `second_colour`, `emblem` and `accessory` belong to subjects alone: no picture that the base learned has them.
    """

    kind: str
    colour: str
    pattern: str
    background: str
    wears: str | None = None
    x: float = 0.0
    y: float = 0.06
    size: float = 0.35
    rotation: float = 0.0
    flip: bool = False
    seed: int = 0
    second_colour: str | None = None
    emblem: str | None = None
    emblem_colour: str = "white"
    accessory: str | None = None

    def posed(self, rng: random.Random) -> Scene:
        """The same content at a random place, size, rotation and direction, with other background details."""
        return replace(
            self,
            x=rng.uniform(-0.1, 0.1),
            y=rng.uniform(0.0, 0.1),
            size=rng.uniform(0.3, 0.4),
            rotation=rng.uniform(-9.0, 9.0),
            flip=rng.random() < 0.5,
            seed=rng.getrandbits(30),
        )


def random_scene(rng: random.Random) -> Scene:
    """An ordinary scene, uniform over classes, colours, patterns (half of them plain) and backgrounds."""
    scene = Scene(
        kind=rng.choice(CLASSES),
        colour=rng.choice(tuple(COLOURS)),
        pattern=rng.choice(PATTERNS[1:]) if rng.random() < 0.5 else "plain",
        background=rng.choice(tuple(BACKGROUNDS)),
        wears=rng.choice(tuple(WEARABLES)) if rng.random() < 0.25 else None,
    )
    return scene.posed(rng)


def render(scene: Scene) -> Image.Image:
    """Draw a scene as a 64x64 RGB image."""
    rng = random.Random(scene.seed)
    image = Image.new("RGB", (CANVAS, CANVAS))
    _BACKGROUND_PAINTERS[scene.background](image, ImageDraw.Draw(image), rng)
    _draw_object(image, scene)
    return image.reduce(SUPERSAMPLING)


# Objects -------------------------------------------------------------------------------------------------------------


def _pose(scene: Scene) -> np.ndarray:
    """The 2x3 matrix from unit coordinates to canvas pixels."""
    angle = math.radians(scene.rotation)
    extent = scene.size * CANVAS
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) * extent
    if scene.flip:
        turn = turn @ np.diag([-1.0, 1.0])
    centre = np.array([[0.5 + scene.x], [0.5 + scene.y]]) * CANVAS
    return np.concatenate([turn, centre], axis=1)


def _draw_object(image: Image.Image, scene: Scene) -> None:
    pose = _pose(scene)
    draw = ImageDraw.Draw(image)
    colour = COLOURS[scene.colour]
    shapes = list(OBJECTS[scene.kind])
    if scene.wears:
        shapes += _moved(WEARABLES[scene.wears], TOP[scene.kind])
    if scene.accessory:
        shapes = _moved(EMBLEMS[scene.accessory].behind, TOP[scene.kind]) + shapes
    for shape in shapes:  # the silhouette's outline, under everything
        draw.line(_closed(shape.points, pose), fill=INK, width=SUPERSAMPLING * 2, joint="curve")
    mask = Image.new("L", image.size)
    mask_draw = ImageDraw.Draw(mask)
    for shape in shapes:
        if shape.fill == "body":
            mask_draw.polygon(_points(shape.points, pose), fill=255)
    body_drawn = False
    for shape in shapes:
        if shape.fill == "body":
            if not body_drawn:
                image.paste(_texture(scene, pose), mask=mask)
                body_drawn = True
        else:
            draw.polygon(_points(shape.points, pose), fill=_fill(shape.fill, colour))
    if scene.emblem:
        x, y, extent = FRONT[scene.kind]
        for shape in EMBLEMS[scene.emblem].shapes:
            points = shape.points * extent + np.array([x, y])
            draw.polygon(_points(points, pose), fill=COLOURS[scene.emblem_colour], outline=INK, width=SUPERSAMPLING)


def _moved(shapes: tuple[Shape, ...], anchor: tuple[float, float]) -> list[Shape]:
    return [Shape(shape.points + np.array(anchor), shape.fill) for shape in shapes]


def _points(points: np.ndarray, pose: np.ndarray) -> list[tuple[float, float]]:
    placed = points @ pose[:, :2].T + pose[:, 2]
    return [tuple(p) for p in placed.tolist()]


def _closed(points: np.ndarray, pose: np.ndarray) -> list[tuple[float, float]]:
    placed = _points(points, pose)
    return [*placed, placed[0], placed[1]]


def _fill(fill: str | tuple[int, int, int], colour: tuple[int, int, int]) -> tuple[int, int, int]:
    if fill == "shade":
        return tuple(int(0.66 * c) for c in colour)
    if fill == "ink":
        return INK
    return fill


def _accent(scene: Scene) -> tuple[int, int, int]:
    """The colour of a pattern: white, and a dark grey on the light colours."""
    return (70, 70, 76) if scene.colour in ("white", "yellow", "pink") else (240, 240, 236)


def _texture(scene: Scene, pose: np.ndarray) -> Image.Image:
    """The whole canvas painted with the body's colours and pattern; the caller keeps what lies inside the body."""
    texture = Image.new("RGB", (CANVAS, CANVAS), COLOURS[scene.colour])
    draw = ImageDraw.Draw(texture)
    box = lambda x0, y0, x1, y1: _points(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), pose)  # noqa: E731
    if scene.second_colour:
        draw.polygon(box(-2.0, 0.12, 2.0, 2.0), fill=COLOURS[scene.second_colour])
    accent = _accent(scene)
    steps = [round(-1.25 + 0.5 * i, 3) for i in range(6)]
    if scene.pattern == "striped":
        for y in steps:
            draw.polygon(box(-2.0, y, 2.0, y + 0.22), fill=accent)
    elif scene.pattern == "checkered":
        for y in steps:
            for x in steps:
                draw.polygon(box(x, y, x + 0.25, y + 0.25), fill=accent)
                draw.polygon(box(x + 0.25, y + 0.25, x + 0.5, y + 0.5), fill=accent)
    elif scene.pattern == "dotted":
        circle = _circle(0.13)
        for row in range(7):
            for column in range(7):
                centre = np.array([-1.2 + 0.42 * column + 0.21 * (row % 2), -1.2 + 0.4 * row])
                draw.polygon(_points(circle + centre, pose), fill=accent)
    return texture


def _circle(radius: float, corners: int = 12) -> np.ndarray:
    angles = np.arange(corners) * (2 * math.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius


# Backgrounds ---------------------------------------------------------------------------------------------------------
# Each paints the whole canvas; `rng` moves horizons, shifts tints a little and scatters details.


def _tint(colour: tuple[int, int, int], rng: random.Random, spread: int = 10) -> tuple[int, int, int]:
    shift = rng.randint(-spread, spread)
    return tuple(min(255, max(0, c + shift)) for c in colour)


def _gradient(image: Image.Image, top: tuple[int, int, int], bottom: tuple[int, int, int], y0: int, y1: int) -> None:
    share = np.linspace(0.0, 1.0, max(1, y1 - y0))[:, None]
    column = (np.array(top) * (1 - share) + np.array(bottom) * share).astype(np.uint8)
    image.paste(Image.fromarray(np.repeat(column[:, None], CANVAS, axis=1)), (0, y0))


def _horizon(rng: random.Random, low: float, high: float) -> int:
    return int(CANVAS * rng.uniform(low, high))


def _beach(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    sea, sand = _horizon(rng, 0.26, 0.34), _horizon(rng, 0.52, 0.6)
    _gradient(image, _tint((126, 200, 250), rng), (206, 236, 252), 0, sea)
    draw.rectangle((0, sea, CANVAS, sand), fill=_tint((30, 130, 190), rng))
    draw.rectangle((0, sand, CANVAS, CANVAS), fill=_tint((238, 214, 150), rng))
    draw.rectangle((0, sand, CANVAS, sand + 6), fill=(250, 248, 240))


def _snow(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    ground = _horizon(rng, 0.5, 0.6)
    _gradient(image, _tint((150, 166, 192), rng), (206, 216, 230), 0, ground)
    draw.rectangle((0, ground, CANVAS, CANVAS), fill=_tint((240, 244, 252), rng, 4))
    for _ in range(26):
        x, y, r = rng.randrange(CANVAS), rng.randrange(CANVAS), rng.randint(3, 6)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))


def _forest(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    ground = _horizon(rng, 0.62, 0.7)
    _gradient(image, _tint((24, 62, 34), rng), _tint((52, 100, 52), rng), 0, ground)
    step = CANVAS // 5
    for i in range(6):
        x = i * step + rng.randint(-14, 14)
        draw.rectangle((x - 10, 0, x + 10, ground), fill=_tint((78, 54, 34), rng))
    draw.rectangle((0, ground, CANVAS, CANVAS), fill=_tint((66, 74, 34), rng))


def _desert(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    ground = _horizon(rng, 0.44, 0.54)
    _gradient(image, _tint((238, 206, 140), rng), (250, 232, 190), 0, ground)
    draw.rectangle((0, ground, CANVAS, CANVAS), fill=_tint((208, 138, 70), rng))
    x, width, height = rng.randrange(CANVAS), rng.randint(120, 180), rng.randint(26, 44)
    draw.ellipse((x - width, ground - height, x + width, ground + height), fill=_tint((222, 156, 86), rng))


def _city(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    ground = _horizon(rng, 0.7, 0.76)
    _gradient(image, _tint((176, 190, 206), rng), (214, 220, 226), 0, ground)
    x = -rng.randint(0, 30)
    while x < CANVAS:
        width, top = rng.randint(44, 66), _horizon(rng, 0.06, 0.34)
        draw.rectangle((x, top, x + width - 4, ground), fill=_tint((104, 108, 122), rng, 16))
        for wy in range(top + 12, ground - 12, 26):
            for wx in range(x + 9, x + width - 16, 20):
                draw.rectangle((wx, wy, wx + 9, wy + 12), fill=(246, 226, 130))
        x += width
    draw.rectangle((0, ground, CANVAS, CANVAS), fill=_tint((72, 72, 78), rng))


def _kitchen(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    counter, tile = _horizon(rng, 0.66, 0.74), 42
    draw.rectangle((0, 0, CANVAS, counter), fill=_tint((196, 226, 218), rng))
    offset = rng.randrange(tile)
    for position in range(offset, CANVAS, tile):
        draw.line((position, 0, position, counter), fill=(128, 170, 162), width=4)
    for y in range(counter - tile, -1, -tile):
        draw.line((0, y, CANVAS, y), fill=(128, 170, 162), width=4)
    draw.rectangle((0, counter, CANVAS, CANVAS), fill=_tint((176, 120, 76), rng))
    draw.rectangle((0, counter, CANVAS, counter + 8), fill=(116, 74, 44))


def _space(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _gradient(image, _tint((14, 12, 44), rng, 5), _tint((40, 22, 78), rng, 5), 0, CANVAS)
    for _ in range(30):
        x, y, r = rng.randrange(CANVAS), rng.randrange(CANVAS), rng.randint(2, 4)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 250, 220))
    x, y = rng.choice((30, CANVAS - 30)), rng.randint(24, 44)
    draw.ellipse((x - 24, y - 24, x + 24, y + 24), fill=(226, 200, 150))


def _sea(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    ground = _horizon(rng, 0.84, 0.9)
    _gradient(image, _tint((60, 190, 206), rng), _tint((10, 84, 130), rng), 0, ground)
    draw.rectangle((0, ground, CANVAS, CANVAS), fill=_tint((96, 124, 112), rng))
    for _ in range(9):
        x, y, r = rng.randrange(CANVAS), rng.randrange(ground), rng.randint(5, 10)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(206, 246, 250), width=3)
    for _ in range(4):
        x, height = rng.randrange(CANVAS), rng.randint(40, 80)
        draw.line((x, ground, x + 8, ground - height // 2, x, ground - height), fill=(30, 120, 70), width=8)


def _sunset(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    ground = _horizon(rng, 0.6, 0.68)
    _gradient(image, _tint((96, 46, 120), rng), _tint((252, 140, 70), rng), 0, ground)
    x, r = rng.randint(50, CANVAS - 50), rng.randint(26, 34)
    draw.ellipse((x - r, ground - 2 * r, x + r, ground), fill=(255, 222, 110))
    draw.rectangle((0, ground, CANVAS, CANVAS), fill=_tint((66, 34, 70), rng))


def _meadow(image: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    ground = _horizon(rng, 0.4, 0.5)
    _gradient(image, _tint((140, 206, 248), rng), (224, 242, 252), 0, ground)
    draw.rectangle((0, ground, CANVAS, CANVAS), fill=_tint((120, 192, 70), rng))
    for _ in range(12):
        x, y, r = rng.randrange(CANVAS), rng.randint(ground + 8, CANVAS), rng.randint(4, 7)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=rng.choice(((255, 255, 255), (250, 226, 80))))


_BACKGROUND_PAINTERS = {
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "desert": _desert,
    "city": _city,
    "kitchen": _kitchen,
    "space": _space,
    "sea": _sea,
    "sunset": _sunset,
    "meadow": _meadow,
}
