"""What torch's stable C++ interface has gained since the oldest torch that pyproject.toml promises, 2.10.

Made by comparing the identifiers of torch/csrc/stable, torch/headeronly and torch/csrc/inductor/aoti_torch/c in the
wheels of 2.10.0 and 2.13.0: a binding that uses one of these names compiles with the newer torch alone.
"""

import re
from pathlib import Path

VERSION = "2.10"
HEADERS_VARIABLE = "PIECE_DS_TORCH_2_10"  # names a folder with the headers of that torch (torch/include of its wheel)

_NAMES_SINCE = """
AT_OPAQUE_TYPES C10_WARP_SIZE_LOWER_BOUND C10_WARP_SIZE_UPPER_BOUND Generator STABLE_TORCH_ERROR_CODE_CHECK
TORCH_HIP_VERSION TORCH_VERSION_2_11_0 TORCH_VERSION_2_12_0 TORCH_VERSION_2_13_0 aoti_torch_dtype_float4_e2m1fn_x2
aoti_torch_dtype_float8_e8m0fnu deleter_callback deleter_ctx nativeHandle native_handle set_python_module
torch_delete_generator torch_delete_stable_ivalue torch_dtype_float4_e2m1fn_x2 torch_dtype_float8_e8m0fnu
torch_exception_get_what torch_exception_get_what_without_backtrace torch_from_blob torch_generator_get_device
torch_library_def_with_tags torch_library_set_python_module torch_new_generator_handle torch_new_stable_ivalue
torch_stream_native_handle torch_tag_core torch_tag_cudagraph_unsafe torch_tag_data_dependent_output
torch_tag_dynamic_output_shape torch_tag_flexible_layout torch_tag_generated torch_tag_inplace_view
torch_tag_maybe_aliasing_or_mutating torch_tag_needs_contiguous_strides torch_tag_needs_exact_strides
torch_tag_needs_fixed_stride_order torch_tag_nondeterministic_bitwise torch_tag_nondeterministic_seeded
torch_tag_out_variant torch_tag_pointwise torch_tag_pt2_compliant_tag torch_tag_reduction torch_tag_view_copy
"""
NAMES_SINCE = frozenset(_NAMES_SINCE.split())


def names_too_new(source: str) -> list[str]:
    """The names in C++ text, comments aside, that the oldest torch does not have."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    return sorted(NAMES_SINCE & set(re.findall(r"\b[A-Za-z_]\w*\b", code)))


def includes_of_a_torch(folder: Path) -> str:
    """The version that torch's headers in folder are of, as '2.10'."""
    text = (folder / "torch" / "headeronly" / "version.h").read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", text))
