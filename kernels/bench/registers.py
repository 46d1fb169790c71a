"""Registers of every CUDA C++ kernel, the blocks that a multiprocessor holds, and the bytes they have on their way.

python kernels/bench/registers.py [--architecture 90] [--nvdisasm PATH]

Needs nvcc and nvdisasm (of the toolkit, or the one that Triton brings); no GPU. Prints a table in Markdown, a line a
kernel: its variants' registers, what the largest allows, and the widest variant's loads from device memory that one
thread issues before the next branch. By Little's law an H100 wants some 20 KB on their way in a multiprocessor, an
H200 28 KB.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

from piece_ds.ops.build_specs import BUILD_SPECS, CSRC

REGISTERS, THREADS, GRANULE = 65536, 2048, 8  # of a multiprocessor; registers are given out by 8 a thread
BLOCK_OF = {"histogram_kernel": 512, "prefix_kernel": 512}


def main() -> None:
    options = _options()
    print("| kernel | variants | registers | blocks of threads | bytes a thread | KB in flight |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            command = ["nvcc", *BUILD_SPECS["cuda"].nvcc_args, "-std=c++17", f"-I{CSRC / 'include'}", "-Xptxas", "-v"]
            command += [f"-arch=sm_{options.architecture}", "-cubin", str(source), "-o", cubin.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            disassemble = [options.nvdisasm, "-c", cubin.name]
            code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
        for line in _rows(report, code):
            print(line)


def _rows(report: str, code: str) -> list[str]:
    registers: dict[str, list[int]] = defaultdict(list)
    for name, number in re.findall(r"function '(\w+)'.*?Used (\d+) registers", report, re.DOTALL):
        registers[_kernel(name)].append(int(number))
    in_flight: dict[str, int] = defaultdict(int)
    for section in re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1:]:
        kernel = _kernel(section)
        in_flight[kernel] = max(in_flight[kernel], _bytes_before_a_branch(section))
    rows = []
    for kernel, numbers in registers.items():
        threads = BLOCK_OF.get(kernel, 256)
        given = -(-max(numbers) // GRANULE) * GRANULE
        blocks = min(REGISTERS // (given * threads), THREADS // threads)
        kilobytes = blocks * threads * in_flight[kernel] / 1000
        rows.append(
            f"| `{kernel}` | {len(numbers)} | {min(numbers)}-{max(numbers)} | {blocks} x {threads} "
            f"| {in_flight[kernel]} | {kilobytes:.0f} |"
        )
    return rows


def _kernel(mangled: str) -> str:
    """Return the kernel's own name in a mangled one: the part with its length before it."""
    found = re.search(r"\d+([a-z][a-z_]*_kernel)", mangled)
    assert found is not None, mangled[:80]
    return found.group(1)


def _bytes_before_a_branch(section: str) -> int:
    """Return the most bytes that one thread loads from device memory between two labels or branches."""
    most = current = 0
    for line in section.splitlines():
        if re.match(r"\s*\.L_", line) or re.search(r"\b(BRA|EXIT|BAR|WARPSYNC)\b", line):
            current = 0
        elif load := re.search(r"\bLDG\.E((?:\.\w+)*)", line):
            width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", load.group(1))
            current += {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width.group(1)] if width else 4
            most = max(most, current)
    return most


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--nvdisasm", default=_nvdisasm())
    return parser.parse_args()


def _nvdisasm() -> str:
    found = shutil.which("nvdisasm")
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    return found


if __name__ == "__main__":
    main()
