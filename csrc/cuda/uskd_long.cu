// USKD of rows that stay in memory, up to what a block can rank.
#include "rank_long.h"
#include "streamed_row.h"
#include "uskd_in_block.h"

namespace fused_kd {
namespace cuda {
namespace {

template <class Ranking, int kType>
struct LongBlock {
    StreamedRow<float, kType> row; // here, and not in registers, which the ranking needs
    InBlock<Ranking> rest;
};

template <int kThreads, int kItems, int kType>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kThreads, false)) rank_streamed_row(RowsArguments args) {
    FKD_DYNAMIC_SHARED(memory);
    using Ranking = LongRanking<kThreads, kItems>;
    const UskdCall& call = args.call;
    auto& shared = *reinterpret_cast<LongBlock<Ranking, kType>*>(memory);
    if (threadIdx.x == 0) shared.row = StreamedRow<float, kType>(call.student, call.weak, blockIdx.x, call.classes);
    __syncthreads();
    uskd_row_in_block<Ranking>(args, blockIdx.x, shared.row, shared.rest);
}

} // namespace

const char* rank_long_rows(const Place& place, const RowsArguments& args, int arrangement) {
    int i = kShortCount;
#define FKD_TRY(threads, items)                                                                                        \
    if (arrangement == i++) {                                                                                          \
        return with_type(type_of(args.call.student, args.call.weak), [&](auto type) {                                  \
            constexpr int kType = decltype(type)::value;                                                               \
            using Shared = LongBlock<LongRanking<threads, items>, kType>;                                              \
            static_assert(sizeof(Shared) <= shared_bound({threads, items, false}), "see arrangements.h");              \
            return launch_in_block<Shared>(rank_streamed_row<threads, items, kType>, threads, place, args);            \
        });                                                                                                            \
    }
    FKD_FOR_EACH_LONG(FKD_TRY)
#undef FKD_TRY
    return "no such arrangement";
}

} // namespace cuda
} // namespace fused_kd
