"""The pictures of the study: which runs are drawn, as what, and where."""

from bench.continual.real.grid import SWEEPS, TASKS
from bench.continual.real.pictures import RECIPES, frontier_figure, recipes_figure
from bench.continual.real.runs import Record


def run(name: str, rate: float, learned: float, rise: float, *, task: str = TASKS[0], seed: str = "1") -> Record:
    return {"name": name, "task": task, "rate": f"{rate:g}", "seed": seed, "learned": f"{learned}", "rise": f"{rise}"}


RUNS = [
    run("full", 3e-5, 1.4, 0.01),
    run("full", 1e-4, 1.3, 0.05),
    run("full", 3e-4, 1.5, 2.0),  # learns less again: not drawn
    run("full", 3e-5, 1.45, 0.02, seed="2"),
    run("full, scaled steps + KL", 1e-4, 1.25, 0.005, task=TASKS[1]),
    run("magnitude 1 %, scaled steps", 1e-3, 1.35, 0.03),
]


def test_every_recipe_is_a_sweep_of_the_grid() -> None:
    assert RECIPES.keys() <= {sweep.name for sweep in SWEEPS}
    assert len({style.label for style in RECIPES.values()}) == len(RECIPES)


def test_the_picture_of_recipes_has_a_line_for_each_seed_and_nothing_else() -> None:
    first, second = recipes_figure(RUNS).axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in first.lines if line.get_marker() == "o"]
    assert drawn == [([1.4, 1.3], [0.01, 0.05]), ([1.45], [0.02])]
    assert {line.get_label() for line in first.lines if line.get_marker() != "None"} == {"full fine-tuning"}
    assert [line.get_label() for line in second.lines if line.get_marker() == "^"] == ["--recipe full"]
    assert (first.get_title(), second.get_title()) == TASKS[:2]


def test_the_picture_of_all_methods_has_those_that_the_recipes_leave_out() -> None:
    (legend,) = frontier_figure(RUNS).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["full", "full, scaled steps + KL", "magnitude 1 %, scaled steps"]


def test_a_task_without_a_recipes_run_is_an_empty_panel() -> None:
    (panel,) = recipes_figure([run("magnitude 1 %, scaled steps", 1e-3, 1.35, 0.03)]).axes
    assert [line.get_marker() for line in panel.lines] == ["None"]
