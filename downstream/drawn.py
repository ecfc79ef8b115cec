"""Drawn scenes with a class for each pixel: nothing to download.

    image, annotation = Scenes("training", short_side=180)[7]        # PIL images of 240 x 180 pixels
"""
import random

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from harness.shapes import SHAPES, TEXTURES, coordinates, draw_background, draw_shape, to_image


class Scenes(Dataset):
    """Two to five of shapes.py's shapes in front of a dark background, which is a class of its own; a shape may hide
    what was drawn before it. A scene is a function of (seed, split, index) at any size, with an aspect ratio of 4:3."""
    classes = ["background", *SHAPES]
    count = {"training": 2_000, "validation": 200}

    def __init__(self, split, short_side, seed=0):
        self.split, self.short_side, self.seed = split, short_side, seed

    def __len__(self):
        return self.count[self.split]

    def __getitem__(self, index):
        rng = random.Random(f"{self.seed} scenes {self.split} {index}")
        x, y = coordinates(self.short_side, round(4 / 3 * self.short_side))
        pixels, mask = draw_background(rng, x, y), np.ones((y.size, x.size), dtype=np.uint8)
        for _ in range(rng.randint(2, 5)):
            shape, texture = rng.randrange(len(SHAPES)), rng.randrange(len(TEXTURES))
            colours, inside = draw_shape(rng, x, y, shape, texture, radii=(0.2, 0.45))
            pixels = colours * inside + pixels * (1 - inside)
            mask[inside[..., 0] > 0.5] = 2 + shape
        return to_image(pixels), Image.fromarray(mask)
