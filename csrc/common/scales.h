// What a gradient is multiplied with when it is stored, and the factor left for the backward pass.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace fused_kd {
namespace FKD_ISA {

// The largest power of two that is not above a count; 1 for 0.
FKD_HD int64_t power_below(int64_t count) {
    int64_t power = 1;
    while (power <= count / 2)
        power *= 2;
    return power;
}

// Divided by the number of rows now, an incoming gradient of 1 leaves nothing to do. Float16 would underflow: there a
// power of two next to the divisor is multiplied in and left to the backward pass, which thus rounds nothing
// (see fused_kd/ops.py).
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
