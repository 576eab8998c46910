// The ways to rank rows; cuda/uskd.cu chooses.
#pragma once

#include "uskd_row.h"

namespace fused_kd {
namespace cuda {

const char* rank_short_rows(const Place& place, const RowsArguments& args, int arrangement);
const char* rank_long_rows(const Place& place, const RowsArguments& args, int arrangement);
const char* rank_rows_sorted(const Place& place, const RowsArguments& args);

// The size of RowsArguments.sorting.
const char* sorted_workspace_bytes(int64_t rows, int classes, DType accumulate, int64_t& bytes);

} // namespace cuda
} // namespace fused_kd
