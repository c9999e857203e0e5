#include <Python.h>

#include <limits>

#include "cuda/dispatch.h"

// As csrc/module.cpp, for `import torchrnn._C_cuda`. There are two libraries because torch without CUDA lacks
// what this one calls. Here the module is not empty: torchrnn.explain asks it which path a call takes. Paths,
// dtypes, cells and activations are their codes.
namespace torchrnn {
namespace cuda {
namespace {

// path(*, device, forced, dtype, cell, activation, steps, batch, hidden, directions, projected, tf32)
//   -> (path, why, why the path that is forced does not serve the call, or None)
// The device is to be the current one.
PyObject* path(PyObject*, PyObject* arguments, PyObject* named) {
  static const char* kNames[] = {"device", "forced", "dtype",      "cell",      "activation", "steps",
                                 "batch",  "hidden", "directions", "projected", "tf32",       nullptr};
  int device, forced, dtype, cell, activation, projected, tf32;
  long long steps, batch, hidden, directions;
  if (!PyArg_ParseTupleAndKeywords(arguments, named, "$iiiiiLLLLpp", const_cast<char**>(kNames), &device,
                                   &forced, &dtype, &cell, &activation, &steps, &batch, &hidden, &directions,
                                   &projected, &tf32))
    return nullptr;
  const auto ask = [&]<typename Acc>(ForwardScan<Acc> p) {
    p.dtype = Dtype(dtype), p.cell = Cell(cell), p.activation = Activation(activation);
    p.steps = steps, p.batch = batch, p.hidden = hidden, p.directions = directions;
    p.projected = projected, p.tf32 = tf32;
    p.cell_clip = p.proj_clip = std::numeric_limits<Acc>::infinity();
    return choose(p, device, Path(forced));
  };
  const Choice choice =
      Dtype(dtype) == Dtype::kFloat64 ? ask(ForwardScan<double>{}) : ask(ForwardScan<float>{});
  return Py_BuildValue("(isz)", int(choice.path), choice.why, choice.why_not);
}

// rows(device, dtype) -> [(path, why), ...]: the rows of the table that admit them, in order.
PyObject* rows(PyObject*, PyObject* arguments) {
  int device, dtype;
  if (!PyArg_ParseTuple(arguments, "ii", &device, &dtype)) return nullptr;
  PyObject* list = PyList_New(0);
  for (const PathRow& row : kTable) {
    if (list == nullptr || !row.admits(compute_capability(device), Dtype(dtype))) continue;
    PyObject* item = Py_BuildValue("(is)", int(row.path), row.why);
    if (item == nullptr || PyList_Append(list, item) < 0) Py_CLEAR(list);
    Py_XDECREF(item);
  }
  return list;
}

PyMethodDef kFunctions[] = {
    {"path", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(path)), METH_VARARGS | METH_KEYWORDS,
     nullptr},
    {"rows", rows, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace cuda
}  // namespace torchrnn

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "torchrnn._C_cuda";
  definition.m_size = -1;  // No state per interpreter.
  definition.m_methods = torchrnn::cuda::kFunctions;
  return PyModule_Create(&definition);
}
