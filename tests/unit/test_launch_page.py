"""The figures and examples of launch/README.md are the planner's, and what its files say can be read."""

import re
import subprocess
from collections.abc import Iterator

import pytest
import yaml
from support.launches import ROOT

from piece_ds.models.loading import empty_model
from piece_ds.plan.memory import MOMENTS, memory_terms, total
from piece_ds.plan.setting import Setting
from piece_ds.plan.shapes import known_config, shape_of
from piece_ds.plan.traffic import transfers

PAGE = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d[\d.]*B)(, parameters offloaded)? \| (\d+) \| (\d) \|((?: [\d.]+ \|){4})$", re.MULTILINE)


def figures() -> Iterator[tuple[str, Setting, list[float]]]:
    for model, offloaded, ranks, zero, values in ROW.findall(PAGE):
        setting = Setting(
            update_mode="compact",
            world=int(ranks),
            zero=int(zero),
            dtype="bf16",
            offload_param=bool(offloaded),
            offload_optimizer=bool(offloaded),
        )
        yield model, setting, [float(value) for value in values.split("|")[:-1]]


def test_the_table_is_the_planners() -> None:
    rows = list(figures())
    assert len(rows) == 12
    shapes = {model: shape_of(empty_model(known_config(model))) for model in {model for model, *_ in rows}}
    for model, setting, shown in rows:
        terms = [term for term in memory_terms(shapes[model], setting) if not term.is_estimate]
        training = max(total(terms, moment) for moment in MOMENTS[1:])
        statistics = sum(term.size for term in terms if term.name == "statistics")
        received = sum(t.received for t in transfers(shapes[model], setting) if t.collective != "all-to-all")
        planned = [value / 1e9 for value in (training, total(terms, MOMENTS[0]), statistics, received)]
        assert shown == pytest.approx(planned, abs=0.5 if planned[-1] > 30 else 0.06, rel=0.01), (model, setting)


def test_every_file_it_names_is_there() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "launch" / name).exists(), name


def test_the_examples_are_well_formed() -> None:
    kinds = [part["kind"] for part in yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())]
    assert kinds == ["Service", "Job"]
    subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sbatch"], check=True)
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "launch" / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    assert all((ROOT / name).exists() for names in copied for name in names.split())
