// The CPU core as the bindings see it.
#pragma once

#include <vector>

#include "kernels.h"

namespace fused_kd {

// The builds of the kernels that this processor can run, best first.
std::vector<const Kernels*> runnable_kernels();

struct NkdOutputs {
    Reduction reduction;
    void *loss, *parts, *norm; // of the accumulating dtype
};

// Runs NKD and reduces its rows. Returns -1, or the first row whose class index is out of range, nothing being written.
int64_t nkd(const Kernels& kernels, NkdArgs args, const NkdOutputs& out);

} // namespace fused_kd
