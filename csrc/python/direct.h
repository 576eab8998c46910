// Calls of ordinary tensors, whole: direct.cpp.
#pragma once

#include <Python.h>

namespace fused_kd {

// False where Python has raised.
bool bind_direct(PyObject* module);

} // namespace fused_kd
