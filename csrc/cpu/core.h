// The CPU core as the bindings see it.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fused_kd {

// The builds of the kernels that this processor can run, best first.
std::vector<const Kernels*> runnable_kernels();

// The file of the OpenMP runtime whose threads the kernels use; empty where there is none and they use one thread.
std::string openmp_runtime();

struct LossOutputs {
    Reduction reduction;
    void *loss, *parts; // of the accumulating dtype
    void* norms[2];     // one per gradient; null where nobody asks for it
};

// These run a loss and reduce its rows. They return -1, or the first row whose class index is out of range or whose
// probabilities do not sum to 1, what is written being of no use then.
int64_t row_loss(const Kernels& kernels, RowArgs args, const LossOutputs& out);
// A call of a staged run: `args` as for the kernel, with its piece.
int64_t row_stage(const Kernels& kernels, RowArgs args);
int64_t uskd(const Kernels& kernels, UskdArgs args, const double* batch_sums, const LossOutputs& out);
int64_t zipf_ls(const Kernels& kernels, ZipfArgs args, const LossOutputs& out);
// A row whose kept classes are none is told as `rows` and its number.
int64_t topk_loss(const Kernels& kernels, TopKArgs args, const LossOutputs& out);

// Over the rows that count: the sums of p_1^2 and p_2^2 (or p_1, p_2), and their number.
int64_t uskd_batch_sums(const Kernels& kernels, TargetProbsArgs args, double* sums);

} // namespace fused_kd
