// The exchange between the pieces of a row in a staged run (Piece in kernels.h). Included only by row_losses.cpp.
#pragma once

#include "row_blocks.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

struct PieceSums {
    PointwiseSums own;   // without the target
    double correlations; // the sum over DIST's columns, the same for all rows (core.cpp)
};
static_assert(sizeof(PieceSums) == kSumsFields * sizeof(double), "all that crosses between stages is double");
static_assert(2 * sizeof(RowMoments) == kMomentsFields * sizeof(double), "all that crosses between stages is double");

// The results of a row's pieces, one T per piece: the fields from `first` on, in `from` (pieces, fields, rows).
template <class T>
const T* of_pieces(const double* from, int64_t fields, int64_t first, const RowArgs& args, int64_t row, double* room) {
    constexpr int64_t size = sizeof(T) / sizeof(double);
    for (int64_t i = 0; i < args.piece->pieces; ++i)
        for (int64_t field = 0; field < size; ++field)
            room[i * size + field] = from[(i * fields + first + field) * args.rows + row];
    return reinterpret_cast<const T*>(room);
}

// Writes a result of this piece to its fields from `first` on.
template <class T>
void put(const T& found, int64_t first, const RowArgs& args, int64_t row) {
    const double* const from = reinterpret_cast<const double*>(&found);
    for (size_t field = 0; field < sizeof(T) / sizeof(double); ++field)
        args.piece->out[(first + int64_t(field)) * args.rows + row] = from[field];
}

// The moments of the student's logits (which = 0) or the teacher's.
inline RowMoments merged_moments(const RowArgs& args, int64_t row, int64_t which, double* room) {
    const int64_t first = which * kMomentsFields / 2;
    return merge(of_pieces<RowMoments>(args.piece->moments, kMomentsFields, first, args, row, room),
                 args.piece->pieces);
}

inline PointwiseSums merged_sums(const RowArgs& args, int64_t row, double* room) {
    const PieceSums* const found = of_pieces<PieceSums>(args.piece->sums, kSumsFields, 0, args, row, room);
    PointwiseSums out = {};
    for (int64_t i = 0; i < args.piece->pieces; ++i) {
        const PointwiseSums& own = found[i].own;
        for (int k = 0; k < 3; ++k) {
            out.of[k] += own.of[k];
            out.slopes[k] += own.slopes[k];
            out.centred[k] += own.centred[k];
        }
        out.z += own.z;
        out.column += own.column;
    }
    return out;
}

} // namespace
} // namespace FKD_ISA
} // namespace fused_kd
