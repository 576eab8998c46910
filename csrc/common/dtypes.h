// Dtypes of tensors.
#pragma once

#include "compile.h"

namespace fused_kd {

enum DType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kInt64 = 4 };

namespace FKD_ISA {

FKD_HD constexpr int element_size(DType dtype) {
    return dtype == kFloat64 || dtype == kInt64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

} // namespace FKD_ISA
} // namespace fused_kd
