// The Python module: the bindings of bindings_cuda.cpp, and the stand-ins' functions as in
// tests/cuda_on_cpu/module.cpp.
//
// It includes the source that it binds, so that pybind11, the slowest part, is compiled once.
#include "python/bindings_cuda.cpp"

extern "C" {
void ptx_run_backwards(bool);
void ptx_ruin(int);
void ptx_limit_shared(size_t);
long ptx_launches();
}

PYBIND11_MODULE(cuda_on_cpu, m) {
    bind_cuda(m);
    m.def("run_backwards", &ptx_run_backwards);
    m.def("ruin_context", &ptx_ruin);
    m.def("limit_shared", &ptx_limit_shared);
    m.def("launches", &ptx_launches);
}
