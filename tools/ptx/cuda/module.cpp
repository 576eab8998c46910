// The Python module: what bindings_cuda.cpp has, and what tests/cuda_on_cpu/module.cpp has of its stand-ins.
//
// Includes what it binds: pybind11 takes longer to compile than either.
#include "python/bindings_cuda.cpp"

extern "C" {
void ptx_run_backwards(bool);
void ptx_ruin(int);
long ptx_launches();
}

PYBIND11_MODULE(cuda_on_cpu, m) {
    bind_cuda(m);
    m.def("run_backwards", &ptx_run_backwards);
    m.def("ruin_context", &ptx_ruin);
    m.def("launches", &ptx_launches);
}
