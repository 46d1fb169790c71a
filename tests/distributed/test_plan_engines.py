"""The planner's sums are what engines of two ranks hold and send, at every stage, dtype and offload."""

from collections.abc import Callable
from functools import cache

import pytest
from support.jobs import Results, result_of, run_job
from support.plan_job import FAST, NUM_RANKS, SETTINGS, make_plan_model

from piece_ds.plan.memory import MOMENTS, memory_terms, total
from piece_ds.plan.shapes import ModelShape, shape_of
from piece_ds.plan.traffic import transfers

TOLERANCE = 0.05
TIERS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SETTINGS]


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Results]:
    """What the fast settings, or the others, held and sent; each job runs once."""
    return cache(
        lambda fast: run_job(
            "support.plan_job",
            NUM_RANKS,
            tmp_path_factory.mktemp("plan"),
            *(n for n in SETTINGS if (n in FAST) is fast),
        )
    )


@pytest.fixture
def measured(measure: Callable[[bool], Results], name: str) -> Results:
    return measure(name in FAST)


@pytest.fixture
def shape(name: str) -> ModelShape:
    return _shape(name.rpartition("-")[0] if "moe" in name or "deepseek" in name else "")


@cache
def _shape(name: str) -> ModelShape:
    return shape_of(make_plan_model(name))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", TIERS)
def test_bytes_of_all_tensors(measured: Results, shape: ModelShape, name: str, moment: str) -> None:
    """On a CPU the accelerator's memory and the host's are one."""
    terms = [term for term in memory_terms(shape, SETTINGS[name]) if not term.is_estimate]
    planned = total(terms, moment) + total(terms, moment, on_host=True)
    held = result_of(measured, name)[moment]
    assert abs(planned / held - 1) <= TOLERANCE, f"planned {planned}, held {held}: {planned / held - 1:+.1%}"


@pytest.mark.parametrize("name", TIERS)
def test_bytes_of_statistics(measured: Results, shape: ModelShape, name: str) -> None:
    (term,) = (term for term in memory_terms(shape, SETTINGS[name]) if term.name == "statistics")
    assert abs(term.size / result_of(measured, name)["statistics_bytes"] - 1) < 1e-3


@pytest.mark.parametrize("name", TIERS)
def test_elements_of_all_collectives(measured: Results, shape: ModelShape, name: str) -> None:
    result = result_of(measured, name)
    sent = {**result["sent"], "all-to-all": result["statistics_sent"]}
    planned: dict[str, float] = {}
    for transfer in transfers(shape, SETTINGS[name]):
        planned[transfer.collective] = planned.get(transfer.collective, 0) + transfer.elements
    noticeable = {collective for collective, elements in sent.items() if elements > 0.01 * shape.total}
    assert noticeable == planned.keys()
    for collective, elements in planned.items():
        assert abs(elements / sent[collective] - 1) <= TOLERANCE, f"{collective}: {elements} of {sent[collective]}"
