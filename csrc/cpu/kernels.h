// What the CPU core offers: plain structures and a table of the kernels of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtypes.h"
#include "../common/hyper_parameters.h"

namespace fused_kd {

enum Reduction { kNone = 0, kSum = 1, kMean = 2 };

// A matrix, or a vector when col_stride is unused; strides count elements, so offsets are 64-bit throughout.
struct Matrix {
    const void* data;
    DType dtype;
    int64_t row_stride, col_stride;
};

// A row's softmax is exp((x - origin) scale) times `by`; a row that does not count has by < 0.
struct SoftmaxOrigin {
    double origin, scale, by;
};

// What a staged run of a row loss does in a call. Its columns are a piece of each row's classes; what the other pieces
// have found comes in, and goes out to them, as doubles (pieces, fields, rows).
enum Stage { kMoments = 0, kStatistics = 1, kSums = 2, kGradient = 3 };
constexpr int kMomentsFields = 6;     // RowMoments of the student's logits and of the teacher's
constexpr int kStatisticsFields = 21; // Statistics of row_blocks.h
constexpr int kSumsFields = 12;       // PointwiseSums of row_losses.h, and the correlations of DIST's columns

struct Piece {
    Stage stage;
    const int64_t* target;            // (rows): the target class, of probabilities the largest's
    int64_t first_class, num_classes; // where these columns begin in the row, and how many classes that has
    int64_t pieces;
    const double *moments, *statistics, *sums; // those of all pieces, this one among them
    double* out;                               // (fields, rows) of this stage; not of the last
};

// The rows of a batch, of which every kernel of a loss is told.
struct BatchArgs {
    Matrix student;
    Matrix target; // class indices (kInt64), or probabilities
    int64_t rows, classes;
    int64_t ignore_index;
    DType accumulate; // kFloat32 or kFloat64
    int threads;
};

// What every loss has besides.
struct LossArgs : BatchArgs {
    HyperParameters hyper;
    const double* factors; // (2, rows), of USKD (3, rows): a row's parts and each of its gradients are multiplied by
                           // them, and 0 is a row that does not count; null for 1
    double* parts;         // (rows, 2 to 4), the last of them CE; 0 for rows that do not count
    double* label_sums;    // (rows): of the probabilities of rows that count; null for class indices
};

namespace FKD_ISA {

// Whether a row counts: its class is not the one to be ignored, and it does not weigh 0.
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
    Matrix teacher; // that of a loss without one is not read
    int loss;       // its number, see RowNeed of row_losses.h
    bool standardize;
    Gradient gradient;           // may be the student's logits
    SoftmaxOrigin* origins;      // (rows, 2), the student's and the teacher's; null when they are not wanted
    bool only_origins;           // and nothing else is but the statistics
    double* statistics;          // (rows, kStatisticsFields) from a call with only_origins to the next; else null
    const void* columns;         // of a pointwise loss that the columns of the batch add to, else null: see ColumnArgs
    const double* column_factor; // their gradient is multiplied by it, with factors
    const Piece* piece;          // of a staged run; else null, and `classes` are all of a row's
};

// From all rows of softmaxes p and q to DIST's term of their columns: T^2 gamma (1 - mean of the C correlations).
struct ColumnArgs {
    Matrix student, teacher;
    const SoftmaxOrigin* origins;
    int64_t rows, classes, num_classes; // the columns at hand, and all that a row has
    HyperParameters hyper;              // gamma and the temperature
    void* columns;        // (4, classes), of the accumulating dtype: mean p, mean q, and of the gradient of column_j
                          // = by_q (q - mean q) + by_p (p - mean p), by_q and by_p times the column factor
    double* correlations; // of each column
    DType accumulate;
    int threads;
    const double* column_factor; // null for the number of counted rows, each of which is given the whole term
};

// Its parts are target, non_target, weak and ce.
struct UskdArgs : LossArgs {
    Matrix weak;
    double mean[2];
    int rank; // Rank of row_math.h
    bool square;
    const void* reciprocals; // 1 / rank for every rank, of the accumulating dtype
    Gradient student_gradient, weak_gradient;
};

// Its parts are divergence and ce.
struct ZipfArgs : LossArgs {
    Matrix dense;                    // of a batch row: the logits of its positions, which are the rows
    int64_t dense_stride, positions; // from batch row to batch row
    Gradient gradient;
};

// What a call on some columns of rows with a top-k teacher gives the calls on the others, and what it gets of all: (5 +
// kept, rows) doubles. They are of the classes that are neither kept nor the target the largest logit, the sums of
// exponentials relative to it at T and at 1, and the sum of logits; then the student's logits of the target and of the
// kept classes, in their order and 0 where another call has the class.
struct TopKPiece {
    int64_t first_class, num_classes; // where these columns begin in the row, and how many classes that has
    const double* all;                // null in the first of both calls, which writes its own
    double* own;
};
constexpr int kTopKFields = 5; // beside those of the kept classes

// A row loss whose teacher is some classes of each row: (rows, kept) log-probabilities and indices, of which -1 is
// none. Its target has class indices.
struct TopKArgs : LossArgs {
    Matrix log_probs, indices;
    int64_t kept;
    int rest; // TopKRest of topk_losses.h
    int loss; // its number, as of RowArgs
    Gradient gradient;
    bool* bad;    // (rows): an index is none, or twice there, or all are pads where the rest is 0; nothing is written
    double* sums; // (rows): of the kept probabilities, 0 where the rest is 0 or a row does not count; null: unwanted
    const TopKPiece* piece; // of a run on some columns at a time; else null, and `classes` are all of a row's
};

namespace FKD_ISA {

// All classes of a row, of which the columns at hand are some where it lies apart.
template <class Args>
FKD_HD int64_t all_classes(const Args& args) {
    return args.piece ? args.piece->num_classes : args.classes;
}

} // namespace FKD_ISA

struct TargetProbsArgs : BatchArgs {
    bool square;
    double* values; // (rows, 2): p_k^2, or p_k, of a row's targets; 0 where there is none
};

struct ScaleArgs {
    const void* gradient;
    void* out; // may be the gradient
    DType dtype;
    const void* grad_output; // per row, at a stride that may be 0
    DType grad_output_dtype;
    int64_t grad_output_stride;
    double norm;
    int64_t rows, classes;
    int threads;
};

struct ArgsortArgs {
    const float* keys; // (rows, classes), contiguous, as is the order
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

// Scratch of the calling thread, at least that large, 64-byte aligned. It grows and stays: a few rows per thread.
void* thread_scratch(size_t bytes);

// Calls work(data, thread, threads) for every thread of a team of up to so many, and returns when all are done, or
// throws what one of them has thrown.
void in_team(int threads, void (*work)(const void*, int, int), const void* data);

// How many of the threads are worth waking for so much work.
int useful_threads(int threads, int64_t rows, int64_t classes);

} // namespace fused_kd
