// The ranking without a loss, for tests and benchmarks. Compiled once per instruction set.
#include "rank.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {

void argsort_descending(const ArgsortArgs& args) {
    const int threads = useful_threads(args.threads, args.rows, args.classes);
    share_out(threads, args.rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            uint32_t* const scratch = static_cast<uint32_t*>(thread_scratch(sizeof(uint32_t) * size_t(args.classes)));
            int64_t* const order = args.order + row * args.classes;
            rank_descending(args.keys + row * args.classes, args.classes, scratch,
                            [=](uint32_t index, int64_t rank)
                                __attribute__((always_inline)) { order[rank] = int64_t(index); });
        }
    });
}

} // namespace FKD_ISA
} // namespace fused_kd
