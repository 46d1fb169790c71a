"""lm-evaluation-harness on a model in memory: its numbers by hand, TRACE's tasks as in a run, nothing disturbed."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.launches import make_rows, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from piece_ds.demo.model import make_tokenizer
from piece_ds.evaluation.generate import generate_texts
from piece_ds.evaluation.harness import check_harness, run_harness
from piece_ds.evaluation.scorers import get_scorer
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy

pytest.importorskip("lm_eval")

YAML = """task: tiny_choice
custom_dataset: !function tiny.load
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: ["A", "B"]
doc_to_target: label
metric_list:
  - metric: acc
"""
LOAD = """import datasets
def load(**_):
    rows = [{"question": f"{7 * i}=", "label": i % 2} for i in range(9)]
    return {"test": datasets.Dataset.from_list(rows)}
"""


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(4)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, initializer_range=0.5, attention_dropout=0.2, **shape)).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness")
    (path / "tiny.yaml").write_text(YAML)
    (path / "tiny.py").write_text(LOAD)
    return path


def by_hand(model: LlamaForCausalLM) -> float:
    """Accuracy of the likelier of two letters after " ", which the harness puts before an answer."""
    tokenizer, right = make_tokenizer(64), 0
    for index in range(9):
        found = []
        for letter in "AB":
            ids = torch.tensor([tokenizer(f"{7 * index}= {letter}")["input_ids"]])
            logits = model(ids).logits[0].log_softmax(dim=-1)
            found.append(logits[-3:-1].gather(1, ids[0, -2:, None]).sum().item())
        right += found.index(max(found)) == index % 2
    return right / 9


def test_results_are_the_models_and_nothing_is_disturbed(llama: LlamaForCausalLM, folder: Path) -> None:
    expected = by_hand(llama.eval())
    llama.train()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    tokenizer = make_tokenizer(64)
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    found = run_harness(llama, tokenizer, "tiny_choice", str(folder), None, 4, "cpu")
    assert found == {"tiny_choice acc": pytest.approx(expected)}
    assert 0 < expected < 1
    assert llama.training
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_tasks_of_trace_are_scored_as_in_a_run(
    llama: LlamaForCausalLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(3, 6, ("many words here", "a few"))
    write_rows(tmp_path / "Py150" / "test.json", rows)
    monkeypatch.setenv("TRACE_DIR", str(tmp_path))
    tokenizer = make_tokenizer(1024)
    found = run_harness(llama, tokenizer, "trace_py150", str(folder), 4, 4, "cpu")
    prompts, golds = [row["prompt"] for row in rows[:4]], [row["answer"] for row in rows[:4]]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    outputs = generate_texts(llama, ids, tokenizer, 256, 4, "cpu").texts
    assert found == {"trace_py150 score": pytest.approx(get_scorer("code").score(outputs, golds, prompts)["score"])}
    assert found["trace_py150 score"] > 0


def test_unknown_tasks_and_folders_are_refused(folder: Path) -> None:
    check_harness("tiny_choice, trace_fomc,trace", str(folder))
    with pytest.raises(UserError, match=r"no task 'tiny_chioce'\. Did you mean 'tiny_choice'"):
        check_harness("tiny_chioce", str(folder))
    with pytest.raises(UserError, match="no such folder"):
        check_harness("tiny_choice", str(folder / "none"))
