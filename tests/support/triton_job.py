"""Run every case through the Triton kernels in Triton's interpreter, on the CPU; prints {op: [number of cases,
failures]} as JSON. With the argument "few", at few sizes.

A process of its own: TRITON_INTERPRET is read when the kernels are imported, and would change every other test's.
"""

import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"
warnings.simplefilter("ignore")  # numpy's, of the overflows that the cases are about

from gpu_cases import FEW_SIZES, SIZES, cases, run_cases  # noqa: E402

from piece_ds.kernels.provider import OPS  # noqa: E402

if __name__ == "__main__":
    sizes = FEW_SIZES if "few" in sys.argv else SIZES
    print(json.dumps(run_cases(OPS.__getitem__, cases(sizes), "cpu")))
