// The factor of a stored gradient, and the factor left for the backward pass.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace fused_kd {
namespace FKD_ISA {

// The largest power of two <= count; 1 for 0.
FKD_HD int64_t power_below(int64_t count) {
    int64_t power = 1;
    while (power <= count / 2)
        power *= 2;
    return power;
}

// The gradient is stored divided by the number of rows, so the backward pass has no work for an incoming gradient of 1.
// Float16 would underflow: it is also multiplied by a power of two near the divisor, which the backward pass divides
// out without rounding (see fused_kd/ops.py).
FKD_HD double kept_power(DType dtype, int64_t divisor) {
    return dtype == kFloat16 ? double(power_below(divisor)) : 1.0;
}

FKD_HD double stored_scale(DType dtype, double scale, int64_t divisor) {
    return scale * kept_power(dtype, divisor) / double(divisor);
}

FKD_HD double stored_norm(DType dtype, double scale, int64_t divisor) {
    return 1.0 / (scale * kept_power(dtype, divisor));
}

} // namespace FKD_ISA
} // namespace fused_kd
