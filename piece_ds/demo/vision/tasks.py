"""Questions about drawings. The base asks about kinds of everything, the stream about colour and number."""

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random

from piece_ds.demo.vision.drawings import BACKGROUNDS, COLOURS, MOST, SHAPES, Drawing, random_drawing
from piece_ds.demo.vision.models import IMAGE_SIZE

Answer = Callable[[Drawing], str]

# What the base learns, so that a tower sees and a language model answers; none of the stream's answers is among these.
BASE: dict[str, tuple[str, Answer]] = {
    "shape": ("Which shape?", lambda drawing: drawing.shape),
    "ground": ("Which ground?", lambda drawing: drawing.background),
    "warm": ("Warm or cold?", lambda drawing: "warm" if drawing.colour in ("red", "yellow") else "cold"),
    "pure": ("Pure or mixed?", lambda drawing: "mixed" if drawing.colour in ("green", "yellow") else "pure"),
    "letter": ("Number as a letter?", lambda drawing: "abcd"[drawing.number - 1]),
    "few": ("Few or many?", lambda drawing: "few" if drawing.number <= MOST // 2 else "many"),
}
# The stream's tasks: four answers each, equally frequent, so that chance is a quarter.
TASKS: dict[str, tuple[str, Answer]] = {
    "colour": ("What colour?", lambda drawing: drawing.colour),
    "number": ("How many?", lambda drawing: str(drawing.number)),
}


def words() -> list[str]:
    """Return every word of the questions and their answers, sorted: spelling is no part of what is to be learned."""
    looks = product(SHAPES, COLOURS, BACKGROUNDS, range(1, MOST + 1))
    drawings = [Drawing(*look, noise=0, x=0, y=0) for look in looks]
    texts = [text for prompt, answer in (BASE | TASKS).values() for text in (prompt, *map(answer, drawings))]
    return sorted({word for text in texts for word in re.findall(r"\w+", text)})


def write_task(names: dict[str, tuple[str, Answer]], folder: Path, sizes: dict[str, int], seed: str) -> None:
    """folder/SPLIT.json and folder/images: sizes[SPLIT] questions of names in turn, each about a drawing of its own.

    Drawings are drawn one after another from one generator; a drawing that was there before is drawn again, so that
    no split shares one with another.
    """
    random, seen = Random(seed), set()
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    questions = list(names.values())
    for split, size in sizes.items():
        rows: list[dict[str, str]] = []
        while len(rows) < size:
            drawing = random_drawing(random)
            if drawing in seen:
                continue
            seen.add(drawing)
            prompt, answer = questions[len(rows) % len(questions)]
            path = images / f"{split}-{len(rows):05d}.png"
            drawing.draw(IMAGE_SIZE).save(path)
            rows.append({"prompt": prompt, "answer": answer(drawing), "image": f"images/{path.name}"})
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
