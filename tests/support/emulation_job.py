"""Run every case through the emulated CUDA kernels; prints {op: [number of cases, failures]} as JSON.

A process of its own, because a kernel that does what a GPU would not forgive ends it.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from emulated_cuda import load
from gpu_cases import LARGE, SIZES, cases, run_cases
from guarded_memory import guarded

# Every setting at the sizes that hurt, a few at a size past one block of every kernel.
EVERY_NTH_LARGE = 11

if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        functions = load(Path(folder))
    chosen = [*cases(SIZES), *list(cases(LARGE[:1]))[::EVERY_NTH_LARGE]]
    print(json.dumps(run_cases(functions.__getitem__, chosen, "cpu", guarded)))
