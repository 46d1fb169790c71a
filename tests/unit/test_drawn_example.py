"""The drawn example: pictures show what their answers say, and no word has to be spelled."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from piece_ds.cli import vision_demo as vision_command
from piece_ds.demo.vision.drawings import BACKGROUNDS, COLOURS, random_drawing
from piece_ds.demo.vision.models import FAMILIES, IMAGE_SIZE, make_processor
from piece_ds.demo.vision.tasks import BASE, TASKS, words, write_task
from piece_ds.runtime.errors import UserError

CELL = IMAGE_SIZE // 3
ENDS_OF_A_CROSS = 6  # pixels that may reach into the next cell


def test_a_picture_shows_its_colour_its_ground_and_its_number_of_shapes() -> None:
    for seed in range(50):
        drawing = random_drawing(Random(seed))
        image, colour = drawing.draw(IMAGE_SIZE), COLOURS[drawing.colour]
        coloured = Counter(
            (x // CELL, y // CELL)
            for x in range(IMAGE_SIZE)
            for y in range(IMAGE_SIZE)
            if image.getpixel((x, y)) == colour
        )
        assert sum(pixels > ENDS_OF_A_CROSS for pixels in coloured.values()) == drawing.number
        assert image.getpixel((IMAGE_SIZE - 1, IMAGE_SIZE - 1))[0] == BACKGROUNDS[drawing.background] + drawing.noise


def test_splits_share_no_picture_and_a_seed_gives_the_same_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_task(BASE, tmp_path / folder, {"train": 24, "test": 12}, "seed")
    rows = {split: json.loads((tmp_path / "a" / f"{split}.json").read_text()) for split in ("train", "test")}
    pictures = {split: {(tmp_path / "a" / row["image"]).read_bytes() for row in rows[split]} for split in rows}
    assert not pictures["train"] & pictures["test"]
    assert all((tmp_path / "b" / row["image"]).read_bytes() in pictures["test"] for row in rows["test"])
    assert json.loads((tmp_path / "b" / "test.json").read_text()) == rows["test"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_one_token(family: str) -> None:
    tokenizer = make_processor(family, words()).tokenizer
    drawings = [random_drawing(Random(seed)) for seed in range(100)]
    for prompt, answer in (BASE | TASKS).values():
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]).replace(" ", "") == prompt.replace(" ", "")
        assert all(len(tokenizer(answer(drawing))["input_ids"]) == 1 for drawing in drawings)


def test_the_streams_answers_are_none_of_the_bases() -> None:
    drawings = [random_drawing(Random(seed)) for seed in range(100)]
    said = {
        kind: {answer(d) for _, answer in questions.values() for d in drawings}
        for kind, questions in (("base", BASE), ("stream", TASKS))
    }
    assert len(said["stream"]) == 8
    assert not said["base"] & said["stream"]


def test_the_drawn_example_takes_no_model_or_data() -> None:
    with pytest.raises(UserError, match="makes its models and data itself"):
        vision_command.main(["--model_name_or_path", "x"])
