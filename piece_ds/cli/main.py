"""The parser of the `piece_ds` command: which commands there are, and which function runs each."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from piece_ds import __version__
from piece_ds.cli.commands import LAUNCHED
from piece_ds.cli.completion import SHELLS, CompletionAction
from piece_ds.runtime.errors import UserError

_MEANING = (
    "Continual fine-tuning that trains only the weights that matter for a task, and keeps what the task changed as a "
    "file. Begin with: piece_ds train --model_name_or_path smollm2-135m --train_file rows.jsonl --output_dir runs/mine "
    "--recipe mask"
)


class FlagError(UserError):
    """A flag that no command has, one without its value, or a value that it does not take."""


class _Parser(argparse.ArgumentParser):
    """Argument parser that reports what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise FlagError(f"{message} ({self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="piece_ds", description=_MEANING)
    parser.add_argument("--version", action="version", version=f"piece_ds {__version__}")
    parser.add_argument(
        "--completion", action=CompletionAction, choices=SHELLS, help="print a script that completes flags in a shell"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, meaning) in LAUNCHED.items():
        commands.add_parser(name, help=meaning, add_help=False)
    delta = commands.add_parser("delta", help="task deltas: list, apply, revert, scale, merge, export ...")
    _add_delta_commands(delta.add_subparsers(metavar="COMMAND", required=True))
    _add_plan(commands.add_parser("plan", help="memory and traffic of a run, from a model's shapes alone"))
    _add_doctor(commands.add_parser("doctor", help="whether this machine can do what a run needs"))
    _add_hub(commands)
    masks = commands.add_parser("masks", help="where the selected weights of mask files lie, and how much they overlap")
    masks.add_argument("masks", metavar="MASK", nargs="+", help="a mask.safetensors file")
    masks.set_defaults(run="piece_ds.cli.masks:masks")
    _add_report(commands.add_parser("report", help="compare runs: a table, and a page with figures"))
    return parser


def _add_delta_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """A DELTA is a delta file, a task's folder, or a run's folder: all its tasks in order."""

    def add(name: str, text: str, model: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text}. {_add_delta_commands.__doc__}")
        if model:
            command.add_argument("model", metavar="MODEL_FOLDER", help="transformers folder with safetensors files")
            command.add_argument("--trust_remote_code", action="store_true", help="run the model's own Python files")
        command.add_argument("deltas", metavar="DELTA", nargs="+")
        command.set_defaults(run=f"piece_ds.cli.delta:{name}_deltas")
        return command

    # What changes nothing, and what changes a model.
    add("list", "One line per delta", model=False)
    add("inspect", "Where a delta lies and how far it moves", model=False)
    for name, text in (("apply", "Put deltas on a model"), ("revert", "Take a model's last deltas off")):
        target = add(name, text).add_mutually_exclusive_group(required=True)
        target.add_argument("--output", metavar="FOLDER", help="write a changed copy here")
        target.add_argument("--in_place", action="store_true", help="change MODEL_FOLDER, file by file")
    _add_algebra(commands, add)
    _add_hub(commands)

    # What writes another file.
    compose = add("compose", "One delta that equals a stack", model=False)
    compose.add_argument("--output", metavar="FILE", required=True)
    compose.add_argument("--without_previous", action="store_true", help="6 bytes a value in 16 bits; no revert")
    _add_coding(compose)
    export = add("export", "A delta in another tool's layout", model=False)
    export.add_argument("--format", choices=["vllm", "peft", "piece-peft"], required=True)
    export.add_argument("--model", "--model_name_or_path", metavar="MODEL_FOLDER", help="the base; needed for peft")
    export.add_argument("--trust_remote_code", action="store_true", help="run the model's own Python files")
    export.add_argument("--output", metavar="PATH", required=True)


def _add_hub(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """Add the commands that reach the Hub. They stand under `delta`, and under `piece_ds` itself."""

    # push: deltas, with a card.
    push = commands.add_parser(
        "push",
        help="Publish deltas on the Hub",
        description="Deltas, a card and a manifest as one commit. The token is the one that huggingface_hub finds.",
    )
    push.add_argument("source", metavar="RUN_OR_DELTA", help="a run's folder, a task's folder, or a delta file")
    push.add_argument("repository", metavar="hf://USER/NAME", help="made if it is missing")
    push.add_argument("--with_masks", action="store_true", help="the mask beside each delta too")
    push.add_argument(
        "--with_general_statistics",
        action="store_true",
        help="the run's statistics of general text too: 4 or 8 bytes a weight, which other runs take instead of a pass",
    )
    push.add_argument("--private", action="store_true", help="make a private repository; a public one is refused")
    push.add_argument("--revision", metavar="BRANCH", help="made if it is missing; default: main")
    push.add_argument("--create_pr", action="store_true", help="open a pull request instead of changing the branch")
    push.add_argument("--base_model", metavar="HUB_ID", help="the base on the Hub; default: the run's, if it is there")
    push.add_argument("--base_revision", metavar="REVISION", help="of the base on the Hub, for the card")
    push.add_argument(
        "--datasets", metavar="ID,ID", help="Hub ids of the data, for the card; default: the tasks' names"
    )
    push.set_defaults(run="piece_ds.cli.delta_hub:push")

    # pull: a folder that apply takes.
    pull = commands.add_parser(
        "pull",
        help="Bring published deltas into a folder",
        description="Every file is compared with the repository's manifest; the folder appears whole or not at all.",
    )
    pull.add_argument("repository", metavar="hf://USER/NAME")
    pull.add_argument("--output", metavar="FOLDER", required=True, help="nothing there yet, or an empty folder")
    pull.add_argument("--revision", help="a branch, tag or commit; default: main")
    pull.add_argument(
        "--model",
        "--model_name_or_path",
        metavar="MODEL_FOLDER",
        help="check also that the deltas go on this model as it is",
    )
    pull.add_argument("--trust_remote_code", action="store_true", help="run the model's own Python files")
    pull.set_defaults(run="piece_ds.cli.delta_hub:pull")


def _add_algebra(commands: "argparse._SubParsersAction[_Parser]", add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that compute a new delta or model from others."""

    # merge: a model, or one delta.
    merge = add("merge", "A plain copy of a model with deltas on it: a stack, or tasks merged into one change")
    merge.add_argument(
        "--output", metavar="PATH", required=True, help="a folder for the model, or F.safetensors for the delta alone"
    )
    merge.add_argument(
        "--how",
        choices=["replace", "linear", "lines", "ties", "dare"],
        default="replace",
        help="replace: a stack, the last value stands; the others merge changes; default: %(default)s",
    )
    merge.add_argument("--weights", metavar="W,W", help="one number a delta; default: 1 / number of deltas each")
    merge.add_argument("--density", type=float, default=1.0, help="ties: share of largest changes; dare: share drawn")
    merge.add_argument("--scale", type=float, default=1.0, help="the merged change is multiplied by it")
    merge.add_argument("--depth", metavar="FIRST,LAST", help="lines: factors of the first and last block; default: 0,1")
    merge.add_argument("--seed", type=int, default=42, help="of dare's draws; default: %(default)s")
    _add_coding(merge)

    # scale and prune: part of one delta.
    scale = add("scale", "A delta whose changes are multiplied by ALPHA; any other is reached from it", model=False)
    scale.add_argument("--alpha", type=float, required=True, help="0 is the base, 1 the task")
    scale.add_argument("--output", metavar="FILE", required=True)
    _add_coding(scale)
    prune = add("prune", "A delta with only its largest changes", model=False)
    prune.add_argument("--keep", metavar="SHARE", type=float, required=True, help="of the selected elements, in (0, 1]")
    prune.add_argument(
        "--by",
        choices=["change", "relative", "loss"],
        default="change",
        help="|change|, |change| / |weight|, or by how much each lowers the loss on rows of --train_file",
    )
    prune.add_argument(
        "--model",
        "--model_name_or_path",
        metavar="MODEL_FOLDER",
        help="with --by loss: the base that the delta goes on",
    )
    prune.add_argument("--train_file", metavar="FILE", help="with --by loss: rows, as training takes them")
    prune.add_argument("--rows", type=int, default=256, help="with --by loss: the first N; default: %(default)s")
    prune.add_argument("--batch_size", type=int, default=8, help="with --by loss; default: %(default)s")
    prune.add_argument("--trust_remote_code", action="store_true", help="run the model's own Python files")
    prune.add_argument("--output", metavar="FILE", required=True)
    _add_coding(prune)

    # diff: two models, so it is not built by add().
    diff = commands.add_parser("diff", help="A delta of two model folders", description="From MODEL_A to MODEL_B.")
    diff.add_argument("model", metavar="MODEL_A", help="transformers folder with safetensors files")
    diff.add_argument("other", metavar="MODEL_B", help="of the same architecture and dtype")
    diff.add_argument("--ratio", type=float, help="keep the largest changes: a share of the model; default: all")
    diff.add_argument("--trust_remote_code", action="store_true", help="run the model's own Python files")
    diff.add_argument("--output", metavar="FILE", required=True)
    _add_coding(diff)

    # These functions are in a module of their own.
    diff.set_defaults(run="piece_ds.cli.delta_algebra:diff_models")
    merge.set_defaults(run="piece_ds.cli.delta_algebra:merge_models")
    scale.set_defaults(run="piece_ds.cli.delta_algebra:scale_deltas")
    prune.set_defaults(run="piece_ds.cli.delta_algebra:prune_deltas")


def _add_coding(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--coding",
        choices=["indices", "gaps", "smallest"],
        default="indices",
        help="indices, which every program of the format reads; gaps: positions in 1 to 2 bytes; smallest: values "
        "packed too, half the file; default: %(default)s",
    )


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.description = "Bytes per rank and traffic per optimizer step, computed from shapes; nothing is loaded."
    plan.add_argument(
        "--model", "--model_name_or_path", help="a model folder, its config.json, a Hub id, or 1.5B, 8B, 70B, 405B"
    )
    plan.add_argument("--world", type=int, default=1, help="ranks")
    plan.add_argument("--zero", type=int, default=3, choices=[0, 1, 2, 3], help="ZeRO stage")
    plan.add_argument("--update_mode", default="compact", choices=["compact", "masked", "full", "lora"])
    plan.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    plan.add_argument("--ratio", type=float, default=0.001, help="selected elements / elements of the model")
    plan.add_argument("--method", default="piece-s", choices=["piece-s", "piece-f"], help="what statistics are kept")
    plan.add_argument("--offload_optimizer", action="store_true", help="masters and moments on the CPU")
    plan.add_argument("--offload_param", action="store_true", help="parameters on the CPU (stage 3)")
    plan.add_argument("--tokens", type=int, default=2048, help="tokens of a micro-batch on one rank")
    plan.add_argument(
        "--general_tokens",
        type=int,
        default=0,
        help="tokens of general text beside a micro-batch on one rank, for --general_kl (train's --general_share "
        "decides their rows)",
    )
    plan.add_argument("--accumulation", type=int, default=1, help="micro-batches per optimizer step")
    plan.add_argument("--lora_rank", type=int, default=32, help="of update_mode lora, on all Linear layers")
    plan.add_argument("--selected_gradient", default="auto", choices=["auto", "dense"], help="of update_mode compact")
    plan.add_argument("--table", action="store_true", help="1.5B to 405B at 1, 8, 64 and 512 ranks, as Markdown")
    plan.set_defaults(run="piece_ds.cli.plan:plan")


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.description = (
        "Versions, compilers, GPUs, kernels, folders, collectives over local processes, and a tiny run of statistics, "
        "mask and step whose unselected weights must keep their bits. Exit code 1 where a run would fail."
    )
    doctor.add_argument("--folder", default=".", help="where runs would write; default: %(default)s")
    doctor.add_argument("--ranks", type=int, default=2, help="processes of the self-test; default: %(default)s")
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    doctor.set_defaults(run="piece_ds.cli.doctor:doctor")


def _add_report(report: argparse.ArgumentParser) -> None:
    report.description = (
        "Runs of one stream side by side, finished or not; those that differ in their seed alone become one row, with "
        "95 %% confidence intervals."
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="an output folder of launch/train.py")
    report.add_argument("--output", metavar="FILE", default="comparison.html", help="the page; default: %(default)s")
    report.set_defaults(run="piece_ds.cli.report:report")
