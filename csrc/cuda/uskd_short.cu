// USKD of rows that a block holds in registers.
#include "held_row.h"
#include "rank_short.h"
#include "uskd_in_block.h"

namespace fused_kd {
namespace cuda {
namespace {

template <int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kThreads, true)) rank_held_row(RowsArguments args) {
    FKD_DYNAMIC_SHARED(memory);
    using Ranking = ShortRanking<kThreads, kItems>;
    const HeldRow<kThreads, kItems> row(args.call, blockIdx.x);
    uskd_row_in_block<Ranking>(args, blockIdx.x, row, *reinterpret_cast<InBlock<Ranking>*>(memory));
}

} // namespace

const char* rank_short_rows(const Place& place, const RowsArguments& args, int arrangement) {
    int i = 0;
#define FKD_TRY(threads, items)                                                                                        \
    if (arrangement == i++) {                                                                                          \
        using Shared = InBlock<ShortRanking<threads, items>>;                                                          \
        static_assert(sizeof(Shared) <= shared_bound({threads, items, true}), "see arrangements.h");                   \
        return launch_in_block<Shared>(rank_held_row<threads, items>, threads, place, args);                           \
    }
    FKD_FOR_EACH_SHORT(FKD_TRY)
#undef FKD_TRY
    return "no such arrangement";
}

} // namespace cuda
} // namespace fused_kd
