"""Run every case through the emulated CUDA kernels; prints {op: [number of cases, failures]} as JSON.

With the argument "few", every case only at the sizes at the edges of a warp and a block.

A process of its own, because a kernel that does what a GPU would not forgive ends it.
"""

import json
import sys
from itertools import islice

from emulated_cuda import load
from gpu_cases import EDGES, LARGE, SIZES, cases, run_cases
from guarded_memory import guarded

# Every setting at the sizes that hurt, a few at several blocks of some kernels and past one block of every kernel.
EVERY_NTH_LARGE = 11

if __name__ == "__main__":
    functions = load()
    chosen = [*cases(EDGES), *islice(cases(SIZES[-1:]), 0, None, 3)] if "few" in sys.argv else list(cases(SIZES))
    chosen += islice(cases(LARGE[:1]), 0, None, EVERY_NTH_LARGE)
    print(json.dumps(run_cases(functions.__getitem__, chosen, "cpu", guarded)))
