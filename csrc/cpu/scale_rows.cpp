// The backward pass: the stored gradient times the incoming gradient and the stored norm. A 0 stays 0. Also the table
// of the kernels. Compiled once per instruction set.
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

template <class A>
void scale_rows(const ScaleArgs& args) {
    const int threads = useful_threads(args.threads, args.rows, args.classes);
    const int64_t row_bytes = args.classes * element_size(args.dtype);
    const Matrix gradient = {args.gradient, args.dtype, args.classes, 1};
    const Matrix factors = {args.grad_output, args.grad_output_dtype, args.grad_output_stride, 1};
    share_out(threads, args.rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            A staging[kBlock<A>], one[1];
            const A factor = A(double(*read(factors, row, 0, 1, one)) * args.norm);
            if (factor == 1 && args.out == args.gradient) continue;
            const bool finite = is_finite(factor);
            char* out = static_cast<char*>(args.out) + row * row_bytes;
            for (int64_t j = 0; j < args.classes; j += kBlock<A>) {
                const int64_t n = block_length<A>(args.classes, j);
                const A* g = read(gradient, row, j, n, staging);
                const bool direct = args.dtype == dtype_of<A>();
                A* target = direct ? reinterpret_cast<A*>(out) + j : staging;
                // A separate loop for factors that would turn 0 into NaN: compilers do not vectorize the comparison.
                if (finite)
                    for (int64_t i = 0; i < n; ++i)
                        target[i] = g[i] * factor;
                else
                    for (int64_t i = 0; i < n; ++i)
                        target[i] = g[i] == 0 ? g[i] : g[i] * factor;
                if (!direct) write(staging, n, out + j * element_size(args.dtype), args.dtype);
            }
        }
    });
}

void scale_gradient(const ScaleArgs& args) {
    args.dtype == kFloat64 ? scale_rows<double>(args) : scale_rows<float>(args);
}

} // namespace

#define FKD_STRINGIFY(x) #x
#define FKD_NAME(x) FKD_STRINGIFY(x)
extern const Kernels kKernels;
const Kernels kKernels = {FKD_NAME(FKD_ISA), row_losses, dist_columns,   target_probs,      uskd,
                          zipf_ls,           topk_rows,  scale_gradient, argsort_descending};

} // namespace FKD_ISA
} // namespace fused_kd
