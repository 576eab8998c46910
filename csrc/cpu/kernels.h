// The CPU kernels: their arguments, as plain structures, and a table of the kernels of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtypes.h"
#include "../common/hyper_parameters.h"

namespace fused_kd {

enum Reduction { kNone = 0, kSum = 1, kMean = 2 };

// A matrix, or a vector if col_stride is unused. Strides count elements, in 64 bits.
struct Matrix {
    const void* data;
    DType dtype;
    int64_t row_stride, col_stride;
};

// The softmax of a row is exp((x - origin) scale) times `by`. A row that does not count has by < 0.
struct SoftmaxOrigin {
    double origin, scale, by;
};

// The stages of a row loss in a staged run. Each call has some columns of all rows, a piece; the calls exchange their
// results as doubles (pieces, fields, rows).
enum Stage { kMoments = 0, kStatistics = 1, kSums = 2, kGradient = 3 };
constexpr int kMomentsFields = 6;     // RowMoments of the student's logits, then of the teacher's
constexpr int kStatisticsFields = 21; // Statistics of row_blocks.h
constexpr int kSumsFields = 12;       // PointwiseSums of row_losses.h, and the sum of the columns' correlations

struct Piece {
    Stage stage;
    const int64_t* target;            // (rows): the target class; with probabilities, the largest's
    int64_t first_class, num_classes; // the class of column 0; the whole row's number of classes
    int64_t pieces;
    const double *moments, *statistics, *sums; // of all pieces, including this one
    double* out;                               // (fields, rows) of this stage; the last has none
};

// The rows of a batch: arguments of every loss kernel.
struct BatchArgs {
    Matrix student;
    Matrix target; // class indices (kInt64), or probabilities
    int64_t rows, classes;
    int64_t ignore_index;
    DType accumulate; // kFloat32 or kFloat64
    int threads;
};

// Further arguments of every loss.
struct LossArgs : BatchArgs {
    HyperParameters hyper;
    const double* factors; // (2, rows), for USKD (3, rows): factors of a row's parts and of each of its gradients; a
                           // row with 0 does not count; null for 1
    double* parts;         // (rows, 2 to 4), CE last; 0 for rows that do not count
    double* label_sums;    // (rows): sums of the probabilities of rows that count; null for class indices
};

namespace FKD_ISA {

// Whether a row counts: its class is not ignore_index, and its factor is not 0.
FKD_HD bool row_counts(const BatchArgs& args, int64_t row) {
    const int64_t at = row * args.target.row_stride;
    return args.target.dtype != kInt64 || static_cast<const int64_t*>(args.target.data)[at] != args.ignore_index;
}
FKD_HD bool row_counts(const LossArgs& args, int64_t row) {
    return !(args.factors && args.factors[row] == 0) && row_counts(static_cast<const BatchArgs&>(args), row);
}

} // namespace FKD_ISA

// Where a gradient goes: contiguous, of its logits' dtype, null when it is not wanted; what it is stored times; and how
// many columns follow the classes in each row, which are set to 0.
struct Gradient {
    void* data;
    double scale;
    int64_t padding;
};

struct RowArgs : LossArgs {
    Matrix teacher; // not read by a loss without a teacher
    int loss;       // number of the loss, see RowNeed in row_losses.h
    bool standardize;
    Gradient gradient;           // may be the student's logits
    SoftmaxOrigin* origins;      // (rows, 2), the student's and the teacher's; null if not wanted
    bool only_origins;           // write only the origins and the statistics
    double* statistics;          // (rows, kStatisticsFields), from a call with only_origins for the next; else null
    const void* columns;         // ColumnArgs::columns, if the loss has a term of the batch's columns; else null
    const double* column_factor; // factor of the columns' gradient; only with `factors`
    const Piece* piece;          // in a staged run; else null, and `classes` is the whole row
};

// DIST's term of the columns of the batch's softmaxes p and q: T^2 gamma (1 - mean of the C correlations).
struct ColumnArgs {
    Matrix student, teacher;
    const SoftmaxOrigin* origins;
    int64_t rows, classes, num_classes; // classes: of this call; num_classes: of the whole row
    HyperParameters hyper;              // gamma and the temperature
    void* columns;        // (5, classes), in the accumulating dtype: mean p, mean q, by_q, by_p, rounding. A column's
                          // slope is by_q (q - mean q) + by_p (p - mean p) + rounding, which has what the rounded means
                          // lack; all but the means include the column factor
    double* correlations; // of each column
    DType accumulate;
    int threads;
    const double* column_factor; // null for the number of counted rows, as each row gets the whole term
};

// Parts: target, non_target, weak, ce.
struct UskdArgs : LossArgs {
    Matrix weak;
    double mean[2];
    int rank; // Rank of row_math.h
    bool square;
    const void* reciprocals; // 1 / rank for every rank, in the accumulating dtype
    Gradient student_gradient, weak_gradient;
};

// Parts: divergence, ce.
struct ZipfArgs : LossArgs {
    Matrix dense;                    // the logits of one batch row: a matrix row per position
    int64_t dense_stride, positions; // dense_stride: between batch rows
    Gradient gradient;
};

// Rows with a top-k teacher, on some of their columns per call. The calls exchange (5 + kept, rows) doubles: for the
// rest (topk_losses.h), the largest logit, the sums of exponentials relative to it at T and at 1, and the sum of
// logits; then the student's logits of the target and of the kept classes, in their order, 0 if another call has the
// class.
struct TopKPiece {
    int64_t first_class, num_classes; // the class of column 0; the whole row's number of classes
    const double* all;                // null in the first of both calls, which writes `own`
    double* own;
};
constexpr int kTopKFields = 5; // besides the logits of the kept classes

// A row loss with a top-k teacher: (rows, kept) log-probabilities and class indices; index -1 is a pad. With a piece,
// the target has class indices.
struct TopKArgs : LossArgs {
    Matrix log_probs, indices;
    int64_t kept;
    int rest; // TopKRest of topk_losses.h
    int loss; // number of the loss, as in RowArgs
    Gradient gradient;
    bool* bad;    // (rows): an index is invalid or repeated, or all are pads with kRenormalize; the row has no outputs
    double* sums; // (rows): sums of the kept probabilities, 0 with kRenormalize or if not counted; null if not wanted
    const TopKPiece* piece; // in a run on some columns per call; else null, and `classes` is the whole row
};

namespace FKD_ISA {

// The number of classes of the whole row, of which a piece has only some.
template <class Args>
FKD_HD int64_t all_classes(const Args& args) {
    return args.piece ? args.piece->num_classes : args.classes;
}

} // namespace FKD_ISA

struct TargetProbsArgs : BatchArgs {
    bool square;
    double* values; // (rows, 2): p_k^2, or p_k, of a row's targets; 0 for an absent target
};

struct ScaleArgs {
    const void* gradient;
    void* out; // may be `gradient`
    DType dtype;
    const void* grad_output; // per row, at a stride that may be 0
    DType grad_output_dtype;
    int64_t grad_output_stride;
    double norm;
    int64_t rows, classes;
    int threads;
};

struct ArgsortArgs {
    const float* keys; // (rows, classes), contiguous, like `order`
    int64_t* order;
    int64_t rows, classes;
    int threads;
};

struct Kernels {
    const char* name;
    void (*row_losses)(const RowArgs&);
    void (*dist_columns)(const ColumnArgs&);
    void (*target_probs)(const TargetProbsArgs&);
    void (*uskd)(const UskdArgs&);
    void (*zipf_ls)(const ZipfArgs&);
    void (*topk_rows)(const TopKArgs&);
    void (*scale_gradient)(const ScaleArgs&);
    void (*argsort_descending)(const ArgsortArgs&);
};

// Scratch of the calling thread, at least `bytes`, 64-byte aligned. It grows and is kept: a few rows per thread.
void* thread_scratch(size_t bytes);

// Calls work(data, thread, threads) in each thread of a team of up to `threads`. Returns when all are done. Rethrows a
// thread's exception.
void in_team(int threads, void (*work)(const void*, int, int), const void* data);

// The number of threads worth waking for this much work.
int useful_threads(int threads, int64_t rows, int64_t classes);

} // namespace fused_kd
