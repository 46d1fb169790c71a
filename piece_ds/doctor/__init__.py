"""Check whether this machine can do what a run needs: programs, devices, kernels, folders, collectives, a tiny run."""

from piece_ds.doctor.findings import BAD, GOOD, NOTE, Finding
from piece_ds.doctor.machine import examine

__all__ = ["BAD", "GOOD", "NOTE", "Finding", "examine"]
