"""One run of launch/train.py: from settings to results."""

from piece_ds.cli.train_hub import push_run, remote_of_run
from piece_ds.config.settings import Settings
from piece_ds.preflight.preflight import preflight
from piece_ds.report.results import RunResults
from piece_ds.runtime.deterministic import deterministic_run
from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.text import printable
from piece_ds.training.run import Stream
from piece_ds.training.run_folder import RunFolder
from piece_ds.training.stream import run_stream


def train(settings: Settings, compared_to: RunFolder | None = None) -> tuple[RunResults, RunFolder]:
    """Check everything that can be checked without the weights, then run the stream.

    Args:
        settings: of the run.
        compared_to: finished run of the same base model, tasks and evaluation: the base model is not judged again.
    Returns:
        The results and the run's folder.
    Raises:
        UserError: see preflight() and remote_of_run(). Nothing has been written by then.
        MachineError: with --push_to_hub, the Hub did not take what the run has written.
    """
    inputs = preflight(settings)
    assert inputs.claim is not None
    assert inputs.reporters is not None
    stream = Stream(
        settings=inputs.settings,
        tokenizer=inputs.tokenizer,
        tasks=inputs.tasks,
        scorers=inputs.scorers,
        general=inputs.general,
        dtype=inputs.dtype,
        claim=inputs.claim,
        eval_batch_size=inputs.arguments.per_device_eval_batch_size,
        seed=inputs.arguments.seed,
        reporters=inputs.reporters,
        baseline=inputs.baseline,
        general_importance=inputs.general_importance,
        judged=inputs.judged,
        compared_to=compared_to,
    )
    remote = remote_of_run(inputs.arguments, settings.method.method)
    with deterministic_run(inputs.settings.output.deterministic):
        results, folder = run_stream(stream), inputs.claim.folder
    if remote is not None and is_main():
        print(printable(push_run(folder.root, remote, private=bool(inputs.arguments.hub_private_repo))))
    return results, folder
