"""Ten drawn shapes with ten textures: a labelled data set with nothing to download.

    # A PIL image, drawn from the shape's signed distance
    image, label = Shapes("train", img_size=32)[7]
"""
import math
import random

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


def polygon(*points):
    """The signed distance to a closed polygon, negative inside, as a function of coordinates."""
    a = np.array(points, dtype=np.float32)
    edge = np.roll(a, -1, axis=0) - a                                # V, 2

    def distance(x, y):                                              # H, W
        px, py = x - a[:, :1, None], y - a[:, 1:, None]              # V, H, W: from each corner
        ex, ey = edge[:, :1, None], edge[:, 1:, None]
        # Nearest point of each edge
        t = np.clip((px * ex + py * ey) / (ex ** 2 + ey ** 2), 0, 1)
        away = np.sqrt(((px - t * ex) ** 2 + (py - t * ey) ** 2).min(0))
        above, left = py < 0, px * ey - py * ex > 0
        # Edges that a ray to one side meets
        crossing = (above != np.roll(above, -1, axis=0)) & (left == (ey > 0))
        return np.where(crossing.sum(0) % 2, -away, away)
    return distance


def around(*radii, turn=-math.pi / 2):
    """Corners at equal angles about the centre."""
    return [(r * math.cos(turn + 2 * math.pi * i / len(radii)),
             r * math.sin(turn + 2 * math.pi * i / len(radii))) for i, r in enumerate(radii)]


def heart(t):
    return (0.95 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17)


SHAPES = {  # signed distances, for x to the right and y down, in units of the shape's radius
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.22,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y)),
    "bar": lambda x, y: np.hypot(x, y - np.clip(y, -0.75, 0.75)) - 0.27,
    "triangle": polygon(*around(1, 1, 1)),
    "square": polygon(*around(1, 1, 1, 1, turn=math.pi / 4)),
    "star": polygon(*around(*[1, 0.42] * 5)),
    "plus": polygon((-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                    (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)),
    "heart": polygon(*(heart(2 * math.pi * i / 24) for i in range(24))),
    "arrow": polygon((0, -1), (.8, -.1), (.3, -.1), (.3, 1), (-.3, 1), (-.3, -.1), (-.8, -.1)),
}

# -1 for one tone to 1 for the other; u and v advance by 2 pi a period; none is another one mirrored
TEXTURES = {
    "plain": lambda u, v: 0 * u - 1,
    "rows": lambda u, v: np.sin(v),
    "columns": lambda u, v: np.sin(u),
    "slashes": lambda u, v: np.sin((u + v) * 0.7),
    "checks": lambda u, v: 2 * np.sin(u * 0.7) * np.sin(v * 0.7),
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.7,
    "grid": lambda u, v: 2 * np.maximum(np.cos(u), np.cos(v)) - 1.2,
    "rings": lambda u, v: np.sin(np.hypot(u, v)),
    "waves": lambda u, v: np.sin(v + 1.5 * np.sin(u * 0.7)),
    "fade": lambda u, v: v / 8,
}


DRAWN = {  # of Shapes
    "shapes": {}, "shapes-cue": dict(cue=True),
    "shapes-cue-centred": dict(cue=True, centred=True)}


class Shapes(Dataset):
    """Ten shapes, each filled with one of ten textures, over a darker background. An image is a
    function of (seed, split, index) at any size: drawn from the shape's signed distance, with edges
    as sharp as the pixels allow.

    Texture j belongs to shape j. By default the two are independent; with `cue` they go together in
    "train" and "val", and never in the third split, "conflict". `centred` shapes stand in the
    middle, all else being equal.
    """
    classes = list(SHAPES)
    count = {"train": 10_000, "val": 2_000, "conflict": 2_000}

    def __init__(self, split, img_size, cue=False, seed=0, centred=False):
        self.split, self.img_size, self.cue, self.seed = split, img_size, cue, seed
        self.spread = 0 if centred else 1

    def __len__(self):
        return self.count[self.split]

    def rng(self, index):
        """The one source of an image's draws, the first of which are its shape and texture."""
        return random.Random(f"{self.seed} {self.split} {index}")

    def shape_and_texture(self, index, rng):
        """Which shape, which texture: indices into SHAPES and TEXTURES."""
        shape, other = index % len(SHAPES), rng.randrange(1, len(TEXTURES))
        if self.split == "conflict":
            return shape, (shape + other) % len(TEXTURES)
        return shape, shape if self.cue else rng.randrange(len(TEXTURES))

    def __getitem__(self, index):
        rng = self.rng(index)
        shape, texture = self.shape_and_texture(index, rng)
        x, y = coordinates(self.img_size, self.img_size)
        # Radius, turn and place are bounded so that a classifier needs shape, and ours can learn it
        # in minutes.
        colours, inside = draw_shape(rng, x, y, shape, texture, radii=(0.42, 0.75),
                                     spread=self.spread)
        return to_image(colours * inside + draw_background(rng, x, y) * (1 - inside)), shape


def coordinates(H, W):
    """x (1, W) and y (H, 1) of the pixels' centres, where the shorter side spans -1 to 1."""
    pixel, (x1, y1) = 2 / min(H, W), (W / min(H, W), H / min(H, W))
    x, y = (np.arange(pixel / 2 - end, end, pixel, dtype=np.float32) for end in (x1, y1))
    return x[None, :W], y[:H, None]


def draw_shape(rng, x, y, shape, texture, radii, spread=1):
    """(colours (H, W, 3), coverage (H, W, 1) from 0 to 1) of a shape and its texture, indices into
    SHAPES and TEXTURES, of a radius between two bounds, somewhere within the image; `spread` 0 is
    its middle."""
    radius, turn = rng.uniform(*radii), math.radians(rng.uniform(-40, 40))
    pixel = 2 / min(x.size, y.size)
    room = [axis.size * pixel / 2 - radius for axis in (x, y)]
    dx, dy = (axis - spread * rng.uniform(-far, far) for axis, far in zip((x, y), room))
    dx, dy = dx * math.cos(turn) + dy * math.sin(turn), dy * math.cos(turn) - dx * math.sin(turn)
    inside = 0.5 - list(SHAPES.values())[shape](dx / radius, dy / radius) * radius / pixel

    wave = 2 * math.pi / rng.uniform(0.24, 0.4)                  # 4 to 6.4 pixels a period at 32
    u, v = wave * (dx - rng.uniform(-.1, .1)), wave * (dy - rng.uniform(-.1, .1))
    tone = np.clip(0.5 + list(TEXTURES.values())[texture](u, v), 0, 1)[..., None]
    light, middle = colour(rng, 0.75, 1), colour(rng, 0.45, 0.7)
    return middle * tone + light * (1 - tone), np.clip(inside, 0, 1)[..., None]


def draw_background(rng, x, y):
    """(H, W, 3): from one dark colour to another."""
    dark, darker = colour(rng, 0, 0.25), colour(rng, 0, 0.25)
    slope = (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))[..., None] / 4 + 0.5
    return dark * slope + darker * (1 - slope)


def colour(rng, low, high):
    return np.array([rng.uniform(low, high) for _ in range(3)], dtype=np.float32)


def to_image(pixels):
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
