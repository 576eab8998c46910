// The Python module fused_kd._native. It takes addresses, sizes and strides as plain integers, so that it needs no
// PyTorch headers and one build works with every PyTorch; fused_kd/backends/native.py is its only caller.
#include <pybind11/pybind11.h>

#include "cpu/core.h"

namespace py = pybind11;
using namespace fused_kd;

namespace {

const Kernels& kernels_named(const std::string& name) {
    static const std::vector<const Kernels*> runnable = runnable_kernels();
    for (const Kernels* kernels : runnable)
        if (name == kernels->name) return *kernels;
    throw py::value_error("instruction_set: expected one of instruction_sets(), got '" + name + "'");
}

Matrix matrix(uintptr_t data, int dtype, const py::tuple& strides) {
    const int64_t col = strides.size() > 1 ? strides[1].cast<int64_t>() : 1;
    return {reinterpret_cast<const void*>(data), DType(dtype), strides[0].cast<int64_t>(), col};
}

int64_t run_nkd(const std::string& instruction_set, uintptr_t student, int student_dtype,
                const py::tuple& student_strides, uintptr_t teacher, int teacher_dtype,
                const py::tuple& teacher_strides, uintptr_t target, int target_dtype, const py::tuple& target_strides,
                uintptr_t gradient, uintptr_t loss, uintptr_t parts, uintptr_t norm, int accumulate, int64_t rows,
                int64_t classes, double gamma, double temperature, double ce_weight, int64_t ignore_index,
                int reduction, double gradient_scale, int threads) {
    NkdArgs args = {};
    args.student = matrix(student, student_dtype, student_strides);
    args.teacher = matrix(teacher, teacher_dtype, teacher_strides);
    args.target = matrix(target, target_dtype, target_strides);
    args.gradient = reinterpret_cast<void*>(gradient);
    args.rows = rows;
    args.classes = classes;
    args.gamma = gamma;
    args.temperature = temperature;
    args.ce_weight = ce_weight;
    args.ignore_index = ignore_index;
    args.gradient_scale = gradient_scale;
    args.accumulate = DType(accumulate);
    args.threads = threads;
    const NkdOutputs out = {Reduction(reduction), reinterpret_cast<void*>(loss), reinterpret_cast<void*>(parts),
                            reinterpret_cast<void*>(norm)};
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    return nkd(kernels, args, out);
}

void run_scale_gradient(const std::string& instruction_set, uintptr_t gradient, uintptr_t out, int dtype,
                        uintptr_t grad_output, int grad_output_dtype, int64_t grad_output_stride, double norm,
                        int64_t rows, int64_t classes, int threads) {
    const ScaleArgs args = {reinterpret_cast<const void*>(gradient),
                            reinterpret_cast<void*>(out),
                            DType(dtype),
                            reinterpret_cast<const void*>(grad_output),
                            DType(grad_output_dtype),
                            grad_output_stride,
                            norm,
                            rows,
                            classes,
                            threads};
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    kernels.scale_gradient(args);
}

} // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of fused_kd.";
    m.def("instruction_sets", [] {
        py::list names;
        for (const Kernels* kernels : runnable_kernels())
            names.append(kernels->name);
        return names;
    });
    m.def("nkd", &run_nkd);
    m.def("scale_gradient", &run_scale_gradient);
    m.attr("compiler") = FKD_COMPILER;
#if defined(_OPENMP)
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
}
