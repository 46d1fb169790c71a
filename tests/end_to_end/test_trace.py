"""The eight tasks of the TRACE benchmark go through the main job as they are."""

import json
from pathlib import Path

import pytest
from support.launches import CONFIGS, SHARED, launch, make_model_folder, succeeded

TRACE = SHARED / "trace"
TASKS = ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]


@pytest.mark.slow
@pytest.mark.skipif(
    not TRACE.is_dir(), reason="TRACE is not there: set PIECE_DS_SHARED to the folder that holds trace/"
)
def test_all_tasks_of_trace_go_through_with_a_full_result_matrix(tmp_path: Path) -> None:
    flags = [
        "--deepspeed",
        CONFIGS / "zero3.json",
        "--model_name_or_path",
        make_model_folder(tmp_path / "model"),
        "--task_dir",
        TRACE,
        "--tasks",
        ",".join(TASKS),
        "--output_dir",
        tmp_path / "out",
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        2,
        "--mask_ratio",
        0.01,
        "--importance_batch_size",
        64,
        "--max_prompt_len",
        32,
        "--max_ans_len",
        16,
        "--max_new_tokens",
        2,
        "--max_new_tokens_text",
        4,
        "--max_eval_samples",
        4,
        "--save_model",
        "last",
    ]
    succeeded(launch("deepspeed", 2, "train.py", *flags))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["finished"] == len(TASKS)
    table = results["matrix"]["loss"]
    assert results["matrix"]["tasks"] == TASKS
    assert len(table["after"]) == len(TASKS)
    for measure in ("loss", "score"):
        for row, values in enumerate(results["matrix"][measure]["after"], start=1):
            assert len([value for value in values if value is not None]) == row
    assert set(results["matrix"]["metrics"]) == {"accuracy", "(BLEU-4 + ROUGE-L) / 2", "edit similarity"}
    assert list(results["measures"]["after 20Minuten"]["20Minuten"]) == ["bleu_4", "rouge_l", "sari"]
    assert sorted(path.name for path in (tmp_path / "out").glob("[0-9][0-9]-*")) == [
        f"{index:02d}-{task}" for index, task in enumerate(TASKS)
    ]
