// Makes the library an importable Python module, which is how torch's builders load it. It has nothing inside: ops
// register themselves when it is loaded, and Python reaches the rest through ctypes.
#pragma once

// Python's stable ABI of 3.11, so that one wheel serves every later Python.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#define PIECE_JOIN_(a, b) a##b
#define PIECE_JOIN(a, b) PIECE_JOIN_(a, b)
#define PIECE_TEXT_(a) #a
#define PIECE_TEXT(a) PIECE_TEXT_(a)

PyMODINIT_FUNC PIECE_JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, PIECE_TEXT(TORCH_EXTENSION_NAME), nullptr, -1, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
