"""The rules that keep the house one house, read from the sources alone."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from support import prose
from support.tables import each

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "piece_ds"
LAUNCH = sorted((ROOT / "launch").glob("*.py"))
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if not {"kernels", "csrc"} & set(path.relative_to(PACKAGE).parts)
)

# Imports go down, never up: a unit may import what stands below it, and its own level where the pair is one-way.
LEVELS = [
    {"runtime"},
    {"config", "ops", "state"},
    {"models", "selection"},
    {"data", "zero", "plan", "demo"},
    {"evaluation", "checkpoint", "update"},
    {"methods", "deltas", "report"},
    {"training", "preflight", "doctor"},
    {"cli"},
    # __main__
]

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LAUNCH_LINES = 300, 100, 80


def unit_of(path: Path) -> str:
    """The sub-package or top-level module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level_of(unit: str) -> int:
    return next((level for level, units in enumerate(LEVELS) if unit in units), len(LEVELS))


@cache
def imports_of(path: Path) -> list[tuple[str, int]]:
    """Return (module, line) of every import of piece_ds, inside functions too."""
    return list(_imports_of(path))


def _imports_of(path: Path) -> Iterator[tuple[str, int]]:
    for node in prose.nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


UNITS = {unit_of(module) for module in MODULES}


def units_imported(path: Path) -> set[tuple[str, int]]:
    found = set()
    for module, line in imports_of(path):
        parts = module.split(".")
        if parts[0] == "piece_ds" and len(parts) > 1 and parts[1] in UNITS:
            found.add((parts[1], line))
    return found


INSIDE = [path for path in MODULES if unit_of(path) != "__init__"]


@each(path=INSIDE)
def test_imports_go_down(path: Path) -> None:
    own = level_of(unit_of(path))
    upward = [(unit, line) for unit, line in units_imported(path) if level_of(unit) > own]
    assert not upward


def test_no_two_sub_packages_import_each_other() -> None:
    """Nor any longer circle, nor one through the modules below them."""
    below: dict[str, set[str]] = {}
    for path in (path for path in INSIDE if level_of(unit_of(path)) < len(LEVELS)):
        below.setdefault(unit_of(path), set()).update(unit for unit, _ in units_imported(path) if unit != unit_of(path))

    def visit(unit: str, trail: tuple[str, ...]) -> None:
        assert unit not in trail, " -> ".join((*trail, unit))
        if unit not in clear:
            for other in sorted(below.get(unit, ())):
                visit(other, (*trail, unit))
            clear.add(unit)

    clear: set[str] = set()
    for unit in sorted(below):
        visit(unit, ())


def test_nothing_imports_launch_or_tests() -> None:
    for path in MODULES:
        assert not [module for module, _ in imports_of(path) if module.split(".")[0] in ("launch", "tests", "support")]


@each(path=[*MODULES, *LAUNCH])
def test_every_module_says_why_it_exists(path: Path) -> None:
    assert ast.get_docstring(prose.tree_of(path))


@each(path=[*MODULES, *LAUNCH])
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in prose.nodes_of(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


@each(path=LAUNCH)
def test_launch_scripts_are_short_and_hold_no_tensors(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LAUNCH_LINES
    assert not [module for module, _ in imports_of(path) if module.split(".")[0] in ("torch", "deepspeed", "numpy")]


def test_launch_scripts_hide_no_module_of_others() -> None:
    """The folder of a script is first on Python's path: a select.py there would break the standard library."""
    import sys

    others = sys.stdlib_module_names | {"torch", "deepspeed", "transformers", "datasets", "evaluate", "accelerate"}
    assert not {path.stem for path in LAUNCH} & others


# Objects of DeepSpeed, by the names that the sources give them.
DEEPSPEED_NAMES = {"engine", "optimizer", "model_wrapped", "basic_optimizer"}


@each(path=[p for p in MODULES if unit_of(p) != "zero"])
def test_only_the_door_reads_private_names_of_deepspeed(path: Path) -> None:
    for node in prose.nodes_of(path):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            assert owner not in DEEPSPEED_NAMES, f"line {node.lineno}: {owner}.{node.attr}"
    # zero/ alone also knows DeepSpeed's modules below the top.
    assert not [module for module, _ in imports_of(path) if module.startswith("deepspeed.runtime")]


@each(path=MODULES)
def test_importing_starts_nothing(path: Path) -> None:
    """No call of logging.basicConfig, no device query and no process group at the top level of a module."""
    for node in prose.tree_of(path).body:
        for call in ast.walk(node) if isinstance(node, ast.Expr | ast.Assign) else ():
            if isinstance(call, ast.Call):
                text = ast.unparse(call.func)
                assert not text.startswith(("logging.basicConfig", "torch.cuda", "dist.init", "torch.set_"))


def test_nothing_stands_loose_in_the_package() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    for path in PACKAGE.iterdir():
        if path.is_dir() and path.name not in ("kernels", "csrc", "ds_configs", "__pycache__"):
            assert level_of(path.name) < len(LEVELS), f"{path.name}: no floor of LEVELS has it"


# Private names of the libraries below us, where no public one does the same: a new version may take them away.
PRIVATE_NAMES = {
    # Plain models are made although a TrainingArguments with ZeRO-3 is alive.
    "piece_ds/models/loading.py": {"transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref"},
    # Whether autograd is in a backward pass now: DeepSpeed tells a recomputation by it, and torch has no public word.
    "piece_ds/update/gradients.py": {"torch._C", "torch._C._current_graph_task_id"},
    # Whether the running backward goes on to a leaf: torch's own hooks for several gradients ask the same.
    "piece_ds/update/sampled_backward.py": {"torch._C", "torch._C._will_engine_execute_node"},
    # Whether a script's trainer makes something of its batches before the loss: this is where transformers lets it.
    "piece_ds/training/trainer_loss.py": {"transformers.Trainer._prepare_inputs"},
    # Ranks say where they are through the store that torch.distributed has open already.
    "piece_ds/runtime/rank_status.py": {"torch.distributed.distributed_c10d._get_default_store"},
}


# Functions that exchange a tensor which lies where the group's collectives reach it by other ways.
EXCHANGED_IN_PLACE = {
    "deltas/live_fingerprint.py:_summed",  # its callers' tensor, on the device of the engine's group
    "evaluation/loss.py:evaluate_loss",  # sums on the device that the batches go to
    "runtime/distributed.py:all_reduce_max_",  # the callers' tensor
    "runtime/distributed.py:all_reduce_sum_",
    "training/sequences.py:step",  # losses of the engine
    "update/compact.py:_before_step",  # a gradient of the engine
    "zero/sequence_parallel.py:sequence_loss",  # a loss of the engine
    "zero/stage1_bf16.py:weights",  # weights of the engine
    "zero/weights.py:read_whole",
}
EXCHANGES = {"all_reduce_sum_", "all_reduce_max_", "dist.all_reduce", "dist.all_gather"}


def test_what_ranks_exchange_lies_where_their_group_reaches_it() -> None:
    """On a CPU any place will do; NCCL takes nothing from the host, and no test of a CPU sees it."""
    found = set()
    for path in MODULES:
        for function in (node for node in prose.nodes_of(path) if isinstance(node, ast.FunctionDef)):
            called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
            if called & EXCHANGES and "collective_device" not in called:
                found.add(f"{path.relative_to(PACKAGE)}:{function.name}")
    assert found == EXCHANGED_IN_PLACE


def test_private_names_of_other_libraries_are_on_a_list() -> None:
    for file, names in prose.private_names().items():
        assert names <= PRIVATE_NAMES.get(file, set()), f"{file}: use a public name, or add it here with its reason"


# Calls of our own functions with more than five positional arguments. The number may only fall.
MAX_LONG_CALLS = 33


def test_calls_name_their_arguments() -> None:
    calls = prose.long_calls()
    assert len(calls) <= MAX_LONG_CALLS, "name the arguments of one of these:\n" + "\n".join(
        f"{call.file}:{call.line}: {call.name}() gets {call.num_positional} by position" for call in calls
    )


def test_figures_of_the_house_are_printed() -> None:
    """What was brought to 0 stays there; the other numbers are for comparison over time."""
    figures = prose.figures()
    assert figures["modules loose"] == 0
    assert figures["comments per 100 lines"] > 0
    assert prose.is_imperative("Return the sum.")
    assert not prose.is_imperative("The sum.")
    assert not prose.is_imperative("results with one more task")
