// Zipf's label smoothing: the weights of classes from the votes of the network's positions. Each position votes for its
// largest class. The rank of a class is 1 + the number of classes with more votes. Most classes have no votes and share
// one rank, so a histogram of the numbers of votes suffices to rank. Included by sources compiled once per instruction
// set, like simd.h.
#pragma once

#include "../losses/zipf_ls.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {

// Scratch of a thread: the votes of each class, the classes with votes, and, for each number of votes, how many classes
// have it and their Zipf weight.
struct VoteScratch {
    uint32_t *votes, *voted, *classes_with;
    ZipfWeight* weights;
};

// The number of classes with votes, and whether there is a NaN.
struct Votes {
    int64_t voted;
    bool nan;
};

FKD_INLINE void vote(const VoteScratch& scratch, int64_t index, int64_t& voted) {
    if (scratch.votes[index]++ == 0) scratch.voted[voted++] = uint32_t(index);
}

// For positions that are contiguous, as in a map of logits (C, H, W): each lane has a position, and a few vectors go
// through the classes together, so that each cache line is read once.
template <class A>
FKD_NOINLINE bool vote_side_by_side(const Matrix& dense, int64_t positions, int64_t classes, A* staging,
                                    const VoteScratch& scratch, int64_t& voted) {
    constexpr int kTogether = 4;
    constexpr int64_t w = kLanes<A>;
    bool nan = false;
    const Matrix by_class = {dense.data, dense.dtype, dense.col_stride, 1};
    for (int64_t start = 0; start < positions; start += kTogether * w) {
        const int64_t rest = positions - start, n = rest < kTogether * w ? rest : kTogether * w, whole = n / w;
        const SomeLanes<A> last = {{}, int(n - whole * w)};
        Vec<A> best[kTogether];
        Mask<A> at[kTogether] = {}, bad = {};
        for (int k = 0; k < kTogether; ++k)
            best[k] = splat<A>(-INFINITY);
        for (int64_t j = 0; j < classes; ++j) {
            const A* x = read(by_class, j, start, n, staging);
#pragma GCC unroll 4
            for (int k = 0; k < kTogether; ++k) {
                if (k > whole) break;
                const Vec<A> v = k < whole ? load(x + k * w) : load(x + k * w, last);
                const Mask<A> larger = v > best[k];
                best[k] = larger ? v : best[k];
                at[k] = larger ? Mask<A>{} + typename Simd<A>::Int(j) : at[k];
                bad |= v != v;
            }
        }
        for (int64_t l = 0; l < n; ++l)
            vote(scratch, at[l / w][l % w], voted);
        for (int l = 0; l < w; ++l)
            nan |= bad[l] != 0;
    }
    return nan;
}

template <class A>
FKD_INLINE Votes count_votes(const Matrix& dense, int64_t positions, int64_t classes, void* block,
                             const VoteScratch& scratch) {
    A* const staging = static_cast<A*>(block);
    Votes out = {0, false};
    __builtin_memset(scratch.votes, 0, size_t(classes) * sizeof(uint32_t));
    __builtin_memset(scratch.classes_with, 0, size_t(positions + 1) * sizeof(uint32_t));
    if (dense.row_stride == 1 && dense.col_stride != 1) {
        out.nan = vote_side_by_side<A>(dense, positions, classes, staging, scratch, out.voted);
    } else {
        for (int64_t i = 0; i < positions; ++i) {
            const int64_t index = argmax<A>(dense, i, classes, staging, -1, &out.nan);
            vote(scratch, index < 0 ? 0 : index, out.voted); // the first class if none is above -inf
        }
    }
    for (int64_t i = 0; i < out.voted; ++i)
        ++scratch.classes_with[scratch.votes[scratch.voted[i]]];
    return out;
}

// Computes weights[v], the Zipf weight of a class with v votes, for each number of votes that occurs and 0. The first
// `kept` of `voted` count; the weights are relative to the best of them.
inline void vote_weights(int64_t kept, int64_t positions, double power, const VoteScratch& scratch) {
    uint32_t most = 0;
    for (int64_t i = 0; i < kept; ++i) {
        const uint32_t of = scratch.votes[scratch.voted[i]];
        most = of > most ? of : most;
    }
    int64_t more = 0, best = 0; // classes with more than v votes
    for (int64_t v = positions; v > 0; --v) {
        if (v == most) best = more + 1;
        if (best && scratch.classes_with[v]) scratch.weights[v] = zipf_weight(double(best) / double(more + 1), power);
        more += scratch.classes_with[v];
    }
    scratch.weights[0] = zipf_weight(best ? double(best) / double(more + 1) : 1, power);
}

} // namespace FKD_ISA
} // namespace fused_kd
