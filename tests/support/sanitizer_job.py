"""Every op of one CUDA provider once per kind of case, for compute-sanitizer to watch: `sanitizer_job.py cuda|triton`.

Small sizes, since every access is watched; bench/sanitize.sh turns torch's caching of memory off, so that the end of a
tensor is the end of an allocation.
"""

import sys

import torch
from gpu_cases import cases, check

from piece_ds import ops
from piece_ds.ops.schema import SCHEMAS

SIZES_WATCHED = [0, 33, 1025, 8192 + 5]


def main(provider: str) -> None:
    if provider == "triton":
        from piece_ds.kernels.provider import OPS, on_own_device

        functions = {op: on_own_device(OPS[op]) for op in SCHEMAS}
    else:
        ops.load("cuda")
        functions = {op: getattr(torch.ops.piece_ds, op).default for op in SCHEMAS}
    number = dict.fromkeys(SCHEMAS, 0)
    for case in cases(SIZES_WATCHED):
        number[case.op] += 1
        if number[case.op] % 5 == 1:  # kinds follow each other with periods that 5 does not divide
            check(case, functions[case.op], "cuda", shift=number[case.op] % 4)
    torch.cuda.synchronize()
    print(f"{provider}: {sum(-(-count // 5) for count in number.values())} calls")


if __name__ == "__main__":
    main(sys.argv[1])
