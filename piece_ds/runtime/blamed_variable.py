"""Find the environment variable that made a library fail: libraries read many, and most end in a traceback."""

import os

# Of the libraries that a run imports. Their own checks are theirs; which variable it was is said here.
_PREFIXES = (
    *("TORCH", "PYTORCH", "GLOO", "NCCL", "CUDA", "TRITON", "ATEN", "OMP_", "MKL_", "KMP_", "NUMEXPR", "MPL", "RAYON"),
    *("HF_", "TRANSFORMERS", "TOKENIZERS", "DATASETS", "ACCELERATE", "DS_", "DEEPSPEED", "WANDB", "MLFLOW", "COMET"),
    *("XDG_", "TMPDIR", "TEMP", "TMP"),
)
_SHORTEST = 3  # characters of a value that an error's text may be searched for


def why_environment(error: BaseException) -> str | None:
    """Return which variable an error is about, and what to do, in one line; None if it names none.

    It is for errors before a run begins: later ones may name a value by chance.
    """
    said = " ".join(str(error).split())[:200]
    if isinstance(error, Warning):
        return f"warnings are errors here, and a library has one of its own ({said}): unset PYTHONWARNINGS, or drop -W"
    text = str(error)
    for name, value in sorted(os.environ.items()):
        if not name.startswith(_PREFIXES):
            continue
        # Paths stand in the text of many errors; only the system's are about them.
        is_told = len(value) >= _SHORTEST and (os.sep not in value or isinstance(error, OSError))
        if name in text or (is_told and value in text):
            return f"{name} is {value[:80]!r}, at which a library fails ({said}): mend it, or unset it"
    return None
