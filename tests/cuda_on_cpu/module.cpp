// The Python module: what bindings_cuda.cpp has, and what the tests choose.
#include <pybind11/pybind11.h>

#include "cuda_runtime.h"

void bind_cuda(pybind11::module_& m);

PYBIND11_MODULE(cuda_on_cpu, m) {
    bind_cuda(m);
    m.def("run_backwards", [](bool backwards) { emulated::backwards = backwards; });
    m.def("ruin_context", [](int error) { emulated::ruined = cudaError_t(error); });
    m.def("limit_shared", [](size_t bytes) { emulated::shared_on_request = bytes; });
    m.def("launches", [] { return emulated::launches; });
}
