#include <Python.h>

// As csrc/module.cpp, for `import torchrnn._C_cuda`. There are two libraries because torch without CUDA lacks
// what this one calls.
PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "torchrnn._C_cuda";
  definition.m_size = -1;  // No state per interpreter.
  return PyModule_Create(&definition);
}
