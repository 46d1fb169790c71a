"""CPU tensors whose memory ends where the process may not read: an access beyond the end ends the process."""

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0


def guarded(tensor: Tensor) -> Tensor:
    """A copy of tensor that ends at a page nobody may touch; its memory is never given back."""
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes == 0:
        return tensor.clone()
    pages = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _libc.mmap(None, pages + mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert _libc.mprotect(start + pages, mmap.PAGESIZE, _PROT_NONE) == 0
    memory = (ctypes.c_char * num_bytes).from_address(start + pages - num_bytes)
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
