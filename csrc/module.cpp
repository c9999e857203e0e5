#include <Python.h>

// `import torchrnn._C` loads this library, and loading it runs the static registrations of the ops files.
// The module itself is empty: Python reaches the ops through torch.ops.torchrnn.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "torchrnn._C";
  definition.m_size = -1;  // No state per interpreter.
  return PyModule_Create(&definition);
}
