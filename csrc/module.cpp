// fastris._C: importing it registers the kernels; its attributes say how it was built.
#include <Python.h>

#ifndef FASTRIS_CUDA_ARCHS
#define FASTRIS_CUDA_ARCHS ""
#endif

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "CUDA_ARCHS", FASTRIS_CUDA_ARCHS) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
