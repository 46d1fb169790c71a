"""Results of the statistics jobs, in a test."""

from typing import Any

from support.jobs import result_of


def statistics_result(job: Any, name: str, ranks: int) -> dict[Any, Any]:
    """One case's result. Jobs of one and three ranks also read the files that the job of two wrote."""
    job("statistics_job", 2)
    folder = () if ranks == 2 else (str(job.folder("statistics_job", 2)),)
    return result_of(job("statistics_job", ranks, *folder), name)
