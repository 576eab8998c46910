// Stable descending order of a row of keys. Scalar code, compiled once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_kd {

// Bytes of scratch that order_descending wants for n keys: two words a key, and counters.
size_t order_scratch_bytes(int64_t n);

// The indices of the keys from the largest to the smallest, the lower index first among equal ones (0 and -0 are
// equal); keys must not be NaN. The result lies in the scratch. `keys` may lie at the scratch's end (order_keys).
const uint32_t* order_descending(const float* keys, int64_t n, void* scratch);
const uint32_t* order_descending(const double* keys, int64_t n, void* scratch);

} // namespace fused_kd
