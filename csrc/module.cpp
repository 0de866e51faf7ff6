// fastris._C: importing it registers the kernels; its attributes say how it was built.
#include <Python.h>

#include "cpu/assign_matrix.h"

#include <cstdint>

#ifndef FASTRIS_CUDA_ARCHS
#define FASTRIS_CUDA_ARCHS ""
#endif

namespace {

constexpr char kAssignMatrixDoc[] =
    "assign_matrix(cost: bytes, rows: int, cols: int, maximize: bool) -> (status, row_ind, col_ind)\n\n"
    "fastris.assignment of one fp64 matrix in row-major order: its status, and the pairs as int64 in two bytearrays.";

int64_t* indices(PyObject* bytes) { return reinterpret_cast<int64_t*>(PyByteArray_AsString(bytes)); }

// Leaves out the rows without a column.
bool to_pairs(PyObject* row_ind, PyObject* col_ind, int64_t rows) {
  int64_t *row = indices(row_ind), *col = indices(col_ind), found = 0;
  for (int64_t i = 0; i < rows; ++i) {
    row[found] = i;
    col[found] = col[i];
    found += col[i] >= 0;
  }
  const auto bytes = static_cast<Py_ssize_t>(found * 8);
  return PyByteArray_Resize(row_ind, bytes) == 0 && PyByteArray_Resize(col_ind, bytes) == 0;
}

PyObject* assign_matrix(PyObject*, PyObject* arguments) {
  PyObject* cost = nullptr;
  long long rows = 0, cols = 0;
  int maximize = 0;
  if (!PyArg_ParseTuple(arguments, "SLLp", &cost, &rows, &cols, &maximize)) return nullptr;
  constexpr long long most = 1LL << 30;
  if (rows < 0 || cols < 0 || rows >= most || cols >= most || PyBytes_Size(cost) != rows * cols * 8) {
    PyErr_SetString(PyExc_ValueError, "assign_matrix: cost must be rows x cols doubles, fewer than 2^30 to a side");
    return nullptr;
  }
  PyObject* row_ind = PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(rows * 8));
  PyObject* col_ind = PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(rows * 8));
  int32_t status = 0;
  if (row_ind != nullptr && col_ind != nullptr) {
    const auto* from = reinterpret_cast<const double*>(PyBytes_AsString(cost));
    int64_t* to = indices(col_ind);
    bool enough_memory = true;
    Py_BEGIN_ALLOW_THREADS;
    try {
      status = fastris::assign_matrix(from, rows, cols, maximize != 0, to);
    } catch (...) {  // nothing else can be wanting
      enough_memory = false;
    }
    Py_END_ALLOW_THREADS;
    if (!enough_memory) PyErr_NoMemory();
    if (enough_memory && to_pairs(row_ind, col_ind, rows)) return Py_BuildValue("(iNN)", status, row_ind, col_ind);
  }
  Py_XDECREF(row_ind);
  Py_XDECREF(col_ind);
  return nullptr;
}

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {
      {"assign_matrix", assign_matrix, METH_VARARGS, kAssignMatrixDoc}, {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "CUDA_ARCHS", FASTRIS_CUDA_ARCHS) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
