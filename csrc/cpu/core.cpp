// What the kernels share and is compiled once, for any processor: scratch, thread count, and the reductions.
#include "core.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>

namespace fused_kd {

#define FKD_DECLARE(isa)                                                                                               \
    namespace isa {                                                                                                    \
    extern const Kernels kKernels;                                                                                     \
    }
FKD_DECLARE(baseline)
#if defined(FKD_WITH_AVX2)
FKD_DECLARE(avx2)
#endif
#if defined(FKD_WITH_AVX512)
FKD_DECLARE(avx512)
#endif

std::vector<const Kernels*> runnable_kernels() {
    std::vector<const Kernels*> found;
#if defined(FKD_WITH_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found.push_back(&avx512::kKernels);
#endif
#if defined(FKD_WITH_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kKernels);
#endif
    found.push_back(&baseline::kKernels);
    return found;
}

void* thread_scratch(size_t bytes) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffer;
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = (bytes + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(64, buffer.size);
        if (!buffer.data) {
            buffer.size = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.data;
}

int useful_threads(int threads, int64_t rows, int64_t classes) {
    // Waking a thread costs a few microseconds, as much as some ten thousand logits.
    const int64_t worth = 1 + rows * classes / 16384;
    return int(std::max<int64_t>(1, std::min<int64_t>({int64_t(threads), rows, worth})));
}

int64_t nkd(const Kernels& kernels, NkdArgs args, const NkdOutputs& out) {
    int64_t counted = args.rows;
    if (args.target.dtype == kInt64) {
        const int64_t* target = static_cast<const int64_t*>(args.target.data);
        for (int64_t row = 0; row < args.rows; ++row) {
            const int64_t y = target[row * args.target.row_stride];
            if (y == args.ignore_index)
                --counted;
            else if (y < 0 || y >= args.classes)
                return row;
        }
    }
    const double divisor = out.reduction == kMean ? double(std::max<int64_t>(counted, 1)) : 1.0;
    // Divided now, an incoming gradient of 1 leaves nothing to do. Float16 would underflow, so there a power of two
    // next to the divisor is multiplied in and left to `norm`, which thus rounds nothing (see fused_kd/ops.py).
    const double power = args.student.dtype == kFloat16 ? std::exp2(std::floor(std::log2(divisor))) : 1.0;
    const double norm = 1.0 / (args.gradient_scale * power);
    args.gradient_scale *= power / divisor;
    std::vector<double> parts(size_t(3 * args.rows));
    args.parts = parts.data();
    kernels.nkd(args);

    const auto put = [&](void* to, int64_t i, double x) {
        if (args.accumulate == kFloat64)
            static_cast<double*>(to)[i] = x;
        else
            static_cast<float*>(to)[i] = float(x);
    };
    put(out.norm, 0, norm);
    if (out.reduction == kNone) {
        for (int64_t row = 0; row < args.rows; ++row) {
            const double* p = parts.data() + 3 * row;
            put(out.loss, row, p[0] + p[1] + p[2]);
            for (int k = 0; k < 3; ++k)
                put(out.parts, k * args.rows + row, p[k]);
        }
    } else {
        double sums[3] = {0, 0, 0}; // in the rows' order, so the same bits whatever the number of threads
        for (int64_t row = 0; row < args.rows; ++row)
            for (int k = 0; k < 3; ++k)
                sums[k] += parts[size_t(3 * row + k)];
        put(out.loss, 0, (sums[0] + sums[1] + sums[2]) / divisor);
        for (int k = 0; k < 3; ++k)
            put(out.parts, k, sums[k] / divisor);
    }
    return -1;
}

} // namespace fused_kd
