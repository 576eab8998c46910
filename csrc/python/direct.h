// Direct calls of ordinary CPU tensors; see direct.cpp.
#pragma once

#include <Python.h>

namespace fused_kd {

// Return false if a Python exception is set.
bool bind_direct(PyObject* module);

} // namespace fused_kd
