"""Pictures of one to four shapes of one colour on a grid, and what can be said about each."""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 40)}
SHAPES = ("square", "post", "cross", "bar")
BACKGROUNDS = {"light": 235, "dark": 25}
MOST = 4
_CELLS = 3  # per side


@dataclass(frozen=True)
class Drawing:
    """Content of a picture: shapes of one kind and colour, which fill a grid in reading order, moved by (x, y) pixels.

    In this order the number of shapes can be seen from where they end. Such a small model learns that in few steps.
    """

    shape: str
    colour: str
    background: str
    number: int
    noise: int
    x: int
    y: int

    def draw(self, size: int) -> Image.Image:
        """Return the picture, size x size pixels."""
        level = BACKGROUNDS[self.background] + self.noise
        image = Image.new("RGB", (size, size), (level, level, level))
        pen, cell = ImageDraw.Draw(image), size // _CELLS
        for index in range(self.number):
            row, column = divmod(index, _CELLS)
            _draw_shape(pen, self.shape, COLOURS[self.colour], column * cell + self.x, row * cell + self.y, cell - 3)
        return image


def random_drawing(random: Random) -> Drawing:
    """Return a drawing whose properties are all independent of each other."""
    return Drawing(
        random.choice(SHAPES),
        random.choice(list(COLOURS)),
        random.choice(list(BACKGROUNDS)),
        random.randint(1, MOST),
        random.randint(-15, 15),
        random.randint(0, 2),
        random.randint(0, 2),
    )


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: int, y: int, side: int) -> None:
    end, middle = (x + side, y + side), side // 2
    if shape == "square":
        pen.rectangle([(x, y), end], fill=colour)
    elif shape == "post":
        pen.rectangle([(x + middle - 1, y), (x + middle + 1, y + side)], fill=colour)
    elif shape == "cross":
        pen.line([(x, y), end], fill=colour, width=2)
        pen.line([(x + side, y), (x, y + side)], fill=colour, width=2)
    else:
        pen.rectangle([(x, y + middle - 1), (x + side, y + middle + 1)], fill=colour)
