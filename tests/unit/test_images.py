"""Rows with images: how files are found, what missing and broken ones do, and when pixels are read."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import MllamaProcessor, PaliGemmaProcessor, ProcessorMixin
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from piece_ds.config.arguments import DataArguments
from piece_ds.data.general_rows import load_general
from piece_ds.data.image_collate import check_processor, make_collator
from piece_ds.data.image_rows import ImagePrompt
from piece_ds.data.images import ImageFolder, read_image
from piece_ds.data.tasks import Task, load_task_stream
from piece_ds.demo.model import make_tokenizer
from piece_ds.demo.vision.models import FAMILIES, make_processor
from piece_ds.runtime.errors import UserError


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return make_processor("qwen3-vl")


def draw(path: Path, size: tuple[int, int] = (24, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def load(tmp_path: Path, processor: ProcessorMixin, rows: list[Any], **settings: Any) -> Task:
    (tmp_path / "t.json").write_text(json.dumps(rows))
    return load_task_stream(DataArguments(train_file=str(tmp_path / "t.json"), **settings), processor)[0]


def row(image: object, **more: object) -> dict[str, object]:
    return {"prompt": "what?", "answer": "red", "image": image, **more}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("x/y/a.png", "x/y/a.png"),
        ("y/b.png", "y/b.png"),
        ("/data1/elsewhere/x/y/a.png", "x/y/a.png"),
        ("a.png", "x/y/a.png"),
        ("C:\\pictures\\y\\b.png", "y/b.png"),
        ("none.png", None),
    ],
)
def test_a_path_is_found_by_itself_by_its_tail_or_by_its_name_in_a_subfolder(
    tmp_path: Path, given: str, found: str | None
) -> None:
    draw(tmp_path / "x" / "y" / "a.png")
    draw(tmp_path / "y" / "b.png")
    path = ImageFolder(str(tmp_path), "rows.json").find(given)
    assert path == (None if found is None else tmp_path / found)


def test_without_a_folder_paths_are_relative_to_the_file_and_no_subfolder_is_searched(tmp_path: Path) -> None:
    near, below = draw(tmp_path / "a.png"), draw(tmp_path / "sub" / "b.png")
    folder = ImageFolder(None, str(tmp_path / "rows.json"))
    assert (folder.find("a.png"), folder.find(str(below)), folder.find("b.png")) == (near, below, None)


def test_a_name_that_two_subfolders_have_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "x" / "a.png"), draw(tmp_path / "y" / "a.png")
    with pytest.raises(UserError, match=r"holds a\.png more than once"):
        ImageFolder(str(tmp_path), "rows.json").find("a.png")


def test_a_template_that_fails_or_drops_the_question_is_refused_with_its_row(
    tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "a.png")
    for template, message in (
        ("{{ messages[9].role }}", "row 1: the tokenizer's chat template cannot render the row"),
        ("{{ raise_exception('no images') }}", "row 1: .*no images"),
        ("<|image_pad|>", "row 1: the processor's chat template does not write the question"),
    ):
        monkeypatch.setattr(processor, "chat_template", template)
        with pytest.raises(UserError, match=message):
            load(tmp_path, processor, [row("a.png")])


def test_a_missing_image_is_refused_with_its_row_and_file(tmp_path: Path, processor: ProcessorMixin) -> None:
    draw(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"t\.json row 2: no image gone\.png below"):
        load(tmp_path, processor, [row("a.png"), row("gone.png")])


def test_a_file_that_is_no_image_is_refused_at_the_start(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "a.png").write_text("not found, said the server")
    with pytest.raises(UserError, match=r"t\.json row 1: the image .*a\.png cannot be read \(no image file\)"):
        load(tmp_path, processor, [row("a.png")])


def cut_short(path: Path) -> Path:
    draw(path, (300, 300))
    path.write_bytes(path.read_bytes()[:-40])
    return path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_breaks_off_is_refused_when_it_is_met(
    tmp_path: Path, processor: ProcessorMixin, num_workers: int
) -> None:
    """Also from a worker, whose traceback is no part of what a user reads."""
    from piece_ds.runtime.process import message_of

    cut_short(tmp_path / "a.png")
    task = load(tmp_path, processor, [row("a.png")])
    batches = DataLoader(task.train, batch_size=1, collate_fn=make_collator(processor), num_workers=num_workers)
    with pytest.raises(UserError) as caught:
        next(iter(batches))
    message = message_of(caught.value)
    assert message.startswith(f"{tmp_path}/t.json row 1: the image {tmp_path}/a.png cannot be read")
    assert "Traceback" not in message


def test_bad_images_are_skipped_and_counted_where_asked(
    tmp_path: Path, processor: ProcessorMixin, caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path / "a.png"), cut_short(tmp_path / "b.png")
    rows = [row("b.png"), row("a.png", answer="x"), row("gone.png"), row(None, answer="y")]
    with caplog.at_level(logging.WARNING):
        task = load(tmp_path, processor, rows, skip_bad_images=True)
    assert [r["where"].split()[-1] for r in task.train] == ["2", "4"]
    assert task.answers == ["x", "y"]
    assert "2 of 4 rows left out for their images" in caplog.text
    with pytest.raises(UserError, match="no row has an image that can be read"):
        load(tmp_path, processor, rows[:1], skip_bad_images=True)


@pytest.mark.parametrize("image", [{"bytes": "x"}, ["a.png", "b.png"], 3])
def test_an_image_that_is_no_path_is_refused(tmp_path: Path, processor: ProcessorMixin, image: object) -> None:
    with pytest.raises(UserError, match=r"t\.json row 1: image must be the path of one file"):
        load(tmp_path, processor, [row(image)])


def test_pixels_are_read_when_a_batch_is_made(
    tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "a.png")
    task = load(tmp_path, processor, [row("a.png")])
    draw(tmp_path / "a.png", (40, 24))  # another picture since: what the batch holds is this one
    assert make_collator(processor)(list(task.train))["image_grid_thw"].tolist() == [[1, 6, 10]]


def test_the_answer_alone_is_in_the_loss_and_ends_with_eos(tmp_path: Path, processor: ProcessorMixin) -> None:
    draw(tmp_path / "a.png")
    task = load(tmp_path, processor, [row("a.png"), row(None)])
    batch = make_collator(processor)(list(task.train))
    for labels, ids in zip(batch["labels"], batch["input_ids"], strict=True):
        assert processor.tokenizer.decode(labels[labels != -100]) == "red</s>"
        assert ids[labels != -100].tolist() == labels[labels != -100].tolist()
    assert batch["mm_token_type_ids"].sum() == (batch["input_ids"] == 259).sum() == 9
    assert batch["attention_mask"].sum(dim=1).tolist() == [9 + 2 + 5 + 1 + 4, 5 + 1 + 4]


def test_a_batch_without_an_image_gets_a_blank_one_that_no_label_sees(processor: ProcessorMixin) -> None:
    rows = [{"input_ids": [1, 7, 8], "labels": [-100, -100, 8]}]
    batch = make_collator(processor)(rows)
    assert batch["input_ids"].shape[0] == 2
    assert batch["image_grid_thw"].shape == (1, 3)
    assert batch["labels"][batch["labels"] != -100].tolist() == [8]
    prompts = make_collator(processor).prompts(rows)
    assert prompts["input_ids"][0].tolist()[-2:] == [1, 7]
    # Padded to the longest, which is the blank image's: no column is padding in every row.
    assert prompts["attention_mask"].any(dim=0).all()
    assert prompts["attention_mask"].sum(dim=1)[0] == 2
    assert "labels" not in prompts


def test_several_answers_are_all_gold_and_the_most_frequent_is_trained(
    tmp_path: Path, processor: ProcessorMixin
) -> None:
    draw(tmp_path / "a.png")
    rows = [row("a.png", answer=["two", "2", "2"]), row("a.png", answer=["b", "a"]), row("a.png")]
    task = load(tmp_path, processor, rows)
    assert task.answers == ["2", "b", "red"]
    assert task.references == [["two", "2", "2"], ["b", "a"], ["red"]]
    with pytest.raises(UserError, match="answer is an empty list"):
        load(tmp_path, processor, [row("a.png", answer=[])])


def test_general_rows_may_have_images(tmp_path: Path, processor: ProcessorMixin) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "g.jsonl").write_text(json.dumps(row("a.png")))
    general = load_general(str(tmp_path / "g.jsonl"), processor, 64)
    assert general[0]["image"] == str(tmp_path / "a.png")


def test_a_processor_without_chat_template_is_refused() -> None:
    plain = make_processor("llava")
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ImagePrompt(plain)


def test_one_beginning_of_sequence_is_added_at_most() -> None:
    """Templates that write BOS themselves, and tokenizers that add it."""
    processor = make_processor("llava")
    prompt = ImagePrompt(processor)
    assert prompt.options("<s>hello") == {"add_special_tokens": False}
    assert prompt.options("hello") == {}
    assert torch.tensor(prompt.ids("<s>a")).tolist().count(1) == 1


def other_processor(family: str) -> ProcessorMixin:
    """Processors that also give a number for every token, which says what it may look at."""
    tokenizer, token = make_tokenizer(256), {"mllama": "<|image|>", "paligemma": "<image>"}[family]
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    template = make_processor("llava").chat_template.replace("<image>", token)
    size = {"height": 24, "width": 24}
    if family == "mllama":
        return MllamaProcessor(MllamaImageProcessorPil(size=size), tokenizer, chat_template=template)
    images = SiglipImageProcessorPil(size=size)
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, tokenizer, chat_template=template)


@pytest.mark.parametrize(("family", "name"), [("mllama", "cross_attention_mask"), ("paligemma", "token_type_ids")])
def test_processors_whose_numbers_for_an_answer_are_not_known_are_refused(family: str, name: str) -> None:
    """With zeros Mllama would hide the image from an answer, and PaliGemma would let it be read from itself."""
    with pytest.raises(UserError, match=f"gives {name} for every token"):
        check_processor(other_processor(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_that_give_nothing_more_or_mark_images_are_taken(family: str) -> None:
    check_processor(make_processor(family))


def test_an_image_is_read_upright_and_in_colour(tmp_path: Path) -> None:
    """A camera that was turned says so beside the pixels (EXIF orientation 6: a quarter to the right)."""
    image = Image.new("L", (2, 1))
    image.putpixel((0, 0), 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=turned)
    found = read_image(tmp_path / "turned.png", "row 1")
    assert (found.mode, found.size) == ("RGB", (1, 2))
    assert [found.getpixel((0, y)) for y in (0, 1)] == [(255, 255, 255), (0, 0, 0)]
