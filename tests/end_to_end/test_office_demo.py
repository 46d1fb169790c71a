"""The comparison of the embedded default, on a tiny model in place of the one that is fetched."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.launches import CONFIGS, ROOT, environment, make_model_folder, succeeded


def test_the_comparison_ends_with_its_table_and_answers_in_words(tmp_path: Path) -> None:
    """One process, six runs: the figures of the table are those of the result files."""
    model, out = make_model_folder(tmp_path / "model"), tmp_path / "out"
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests"))
    run = subprocess.run(
        [sys.executable, "-m", "support.office_job", model, "--deepspeed", CONFIGS / "zero2.json", "--output_dir", out],
        env={**environment(), "PYTHONPATH": paths, "PIECE_DS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    text = succeeded(run).stdout
    table, answers = text.split("Learned against forgotten")[1].split("What the model answers")
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    folders = {"recommended": out, "recommended without KL": out / "without-kl"}
    for name in ("seqft", "lora"):
        folders |= {name: out / name, f"{name} + KL": out / f"{name}-kl"}
    for name, folder in folders.items():
        summary = json.loads((folder / "results.json").read_text())["matrix"]["summary"]
        assert f"{summary['general_loss_change']:+.3f}" in rows[name]
        assert f"{100 * summary['score_learning']:.1f} %" in rows[name]

    # The base model is judged once, and every run has what it was found to do.
    assert run.stderr.count("evaluation, before: dates") == 1
    before = [
        json.loads((folder / "results.json").read_text())["matrix"]["loss"]["before"] for folder in folders.values()
    ]
    assert None not in before[0]
    assert before == [before[0]] * 6
    for task in ("dates", "orders", "queries"):
        answers_before = {(folder / "predictions/before" / f"{task}.jsonl").read_text() for folder in folders.values()}
        assert len(answers_before) == 1
        rows_of_task = json.loads((out / "material" / "tasks" / task / "test.json").read_text())
        assert rows_of_task[0]["answer"] in answers
    (written,) = (tmp_path / "cache" / "general_text").glob("self-*.jsonl")
    assert len(written.read_text().splitlines()) > 100
    assert (out / "report.html").is_file()
    assert (out / "figures" / "frontier.png").read_bytes().startswith(b"\x89PNG")
