"""Results of the statistics jobs, in a test."""

from typing import Any

from support.jobs import result_of
from support.statistics_cases import EVERY, PLAIN, THREE_RANKS


def statistics_result(job: Any, name: str, ranks: int) -> dict[Any, Any]:
    """One case's result. Jobs of one and three ranks also read the files that the job of two wrote."""
    job("statistics_job", 2)
    folder = () if ranks == 2 else (str(job.folder("statistics_job", 2)),)
    rest = (EVERY,) if ranks == 3 and name in PLAIN and name not in THREE_RANKS else ()
    return result_of(job("statistics_job", ranks, *folder, *rest), name)
