// The CPU core's interface for the bindings.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fused_kd {

// The builds of the kernels that this processor can run, best first.
std::vector<const Kernels*> runnable_kernels();
// The one of that name, or null.
const Kernels* kernels_named(const char* name);

// The file of the OpenMP runtime that the kernels use. Empty if there is none; then they use one thread.
std::string openmp_runtime();

struct LossOutputs {
    Reduction reduction;
    void *loss, *parts; // of the accumulating dtype
    void* norms[2];     // one per gradient; null if not wanted
};

// Run a loss and reduce its rows. Return -1, or the first row with a class index out of range or probabilities that do
// not sum to 1. The outputs are invalid then.
int64_t row_loss(const Kernels& kernels, RowArgs args, const LossOutputs& out);
// One call of a staged run: the kernel's arguments, with a piece.
int64_t row_stage(const Kernels& kernels, RowArgs args);
int64_t uskd(const Kernels& kernels, UskdArgs args, const double* batch_sums, const LossOutputs& out);
int64_t zipf_ls(const Kernels& kernels, ZipfArgs args, const LossOutputs& out);
// Also returns rows + i, if the kept classes of row i are invalid (TopKArgs::bad).
int64_t topk_loss(const Kernels& kernels, TopKArgs args, const LossOutputs& out);

// Over the rows that count: the sums of p_1^2 and p_2^2 (or of p_1 and p_2), and the number of rows.
int64_t uskd_batch_sums(const Kernels& kernels, TargetProbsArgs args, double* sums);

} // namespace fused_kd
