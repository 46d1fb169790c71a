"""Package metadata lives in pyproject.toml; this file names the version and, where asked, compiles ahead of time.

PIECE_DS_BUILD_OPS=1 compiles the kernels into the package: for the CPU, and for CUDA where torch has it and nvcc is
there. Without it they are compiled on first use. The build must see the torch and DeepSpeed that will run the result:

    PIECE_DS_BUILD_OPS=1 pip install --no-build-isolation .
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ARCHITECTURES = "8.0;9.0;10.0"  # A100, H100 and H200, B200


def ahead_of_time() -> dict[str, Any]:
    """What setup() needs to compile the kernels."""
    sys.path.insert(0, str(Path(__file__).parent))
    # DeepSpeed's own list begins with architectures that nvcc 13 does not know and that lack instructions used here.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    try:
        import torch
        from torch.utils import cpp_extension

        from piece_ds.ops.builder import PieceCPUBuilder, PieceCUDABuilder, use_toolkit_of_nvcc
    except ImportError as error:
        raise SystemExit(
            f"PIECE_DS_BUILD_OPS=1 needs torch and deepspeed in this environment ({error}): install them, "
            "then this with --no-build-isolation"
        ) from error
    builders = [PieceCPUBuilder()]
    use_toolkit_of_nvcc()
    if torch.version.cuda and cpp_extension.CUDA_HOME:
        builders.append(PieceCUDABuilder())
    extensions = [builder.builder() for builder in builders]
    for extension in extensions:  # setuptools takes no absolute path
        extension.sources = [os.path.relpath(source, Path(__file__).parent) for source in extension.sources]
        extension.py_limited_api = True
    # One wheel for every Python from 3.11 on; torch's ABI is stable too, see build_specs.py.
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(version="0.1.0", **(ahead_of_time() if os.environ.get("PIECE_DS_BUILD_OPS") == "1" else {}))
