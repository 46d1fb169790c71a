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

# The base learns these, so that the tower sees and the language model answers. No answer of the stream is among them.
BASE: dict[str, tuple[str, Answer]] = {
    "shape": ("Which shape?", lambda drawing: drawing.shape),
    "ground": ("Which ground?", lambda drawing: drawing.background),
    "warm": ("Warm or cold?", lambda drawing: "warm" if drawing.colour in ("red", "yellow") else "cold"),
    "pure": ("Pure or mixed?", lambda drawing: "mixed" if drawing.colour in ("green", "yellow") else "pure"),
    "letter": ("Number as a letter?", lambda drawing: "abcd"[drawing.number - 1]),
    "few": ("Few or many?", lambda drawing: "few" if drawing.number <= MOST // 2 else "many"),
}
# The stream's tasks. Each has four equally frequent answers, so chance is a quarter.
TASKS: dict[str, tuple[str, Answer]] = {
    "colour": ("What colour?", lambda drawing: drawing.colour),
    "number": ("How many?", lambda drawing: str(drawing.number)),
}


def words() -> list[str]:
    """Return every word of the questions and answers, sorted.

    As tokens they need not be spelled, which is not the task.
    """
    looks = product(SHAPES, COLOURS, BACKGROUNDS, range(1, MOST + 1))
    drawings = [Drawing(*look, noise=0, x=0, y=0) for look in looks]
    texts = [text for prompt, answer in (BASE | TASKS).values() for text in (prompt, *map(answer, drawings))]
    return sorted({word for text in texts for word in re.findall(r"\w+", text)})


def write_task(names: dict[str, tuple[str, Answer]], folder: Path, sizes: dict[str, int], seed: str) -> None:
    """Write folder/SPLIT.json and folder/images.

    Drawings come one after another from one generator. A drawing that was there before is drawn again, so no split
    shares one with another.

    Args:
        names: questions, asked in turn, each about a drawing of its own.
        folder: made if missing.
        sizes: split -> number of rows.
        seed: of the drawings.
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
