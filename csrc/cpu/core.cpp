// Common parts of the kernels, compiled once for any processor: scratch, threads and reductions.
#include "core.h"

#include "../common/scales.h"
#include "../losses/row_losses.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_kd {

#define FKD_DECLARE(isa)                                                                                               \
    namespace isa {                                                                                                    \
    extern const Kernels kKernels;                                                                                     \
    }
FKD_DECLARE(baseline)
#if defined(FKD_WITH_AVX2)
FKD_DECLARE(avx2)
#endif
#if defined(FKD_WITH_AVX512)
FKD_DECLARE(avx512)
#endif

std::vector<const Kernels*> runnable_kernels() {
    std::vector<const Kernels*> found;
#if defined(FKD_WITH_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found.push_back(&avx512::kKernels);
#endif
#if defined(FKD_WITH_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kKernels);
#endif
    found.push_back(&baseline::kKernels);
    return found;
}

const Kernels* kernels_named(const char* name) {
    static const std::vector<const Kernels*> runnable = runnable_kernels();
    for (const Kernels* each : runnable)
        if (std::strcmp(name, each->name) == 0) return each;
    return nullptr;
}

void* thread_scratch(size_t bytes) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffer;
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = (bytes + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(64, buffer.size);
        if (!buffer.data) {
            buffer.size = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.data;
}

namespace {

// The OpenMP runtime that PyTorch has loaded, whichever it is and whatever compiler builds this. A second runtime would
// have its own threads, which compete for the cores. Clang's OpenMP would load one, and so would GCC's if PyTorch has
// its libgomp under another name. So nothing is linked and no pragma is used. Instead, look up the function that a GCC
// pragma becomes, where PyTorch itself finds it. libgomp, libomp and libiomp5 all have it.
struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    int (*thread_num)();
    int (*num_threads)();
};

const OpenMp& openmp() {
    static const OpenMp found = [] {
        void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        // In the linker's order: PyTorch uses a preloaded runtime, for example libiomp5, before its own.
        const auto find = [=](const char* name) {
            void* const everyone = dlsym(RTLD_DEFAULT, name);
            return everyone || !torch ? everyone : dlsym(torch, name);
        };
        OpenMp out = {reinterpret_cast<decltype(OpenMp::parallel)>(find("GOMP_parallel")),
                      reinterpret_cast<decltype(OpenMp::thread_num)>(find("omp_get_thread_num")),
                      reinterpret_cast<decltype(OpenMp::num_threads)>(find("omp_get_num_threads"))};
        if (!out.thread_num || !out.num_threads) out.parallel = nullptr;
        return out;
    }();
    return found;
}

// A team's work, and the exception of the first thread that failed: no exception may leave an OpenMP thread. The
// rounding mode and the flushing of subnormals belong to a thread (torch.set_flush_denormal sets the calling one's), so
// all threads take the caller's during the work.
struct TeamWork {
    void (*work)(const void*, int, int);
    const void* data;
    std::fenv_t of_caller = {};
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;

    void share(int thread, int threads) noexcept {
        std::fenv_t own;
        std::fegetenv(&own);
        std::fesetenv(&of_caller);
        try {
            work(data, thread, threads);
        } catch (...) {
            if (!failed.test_and_set()) error = std::current_exception();
        }
        std::fesetenv(&own);
    }
};

} // namespace

std::string openmp_runtime() {
    Dl_info info = {};
    const bool known = openmp().parallel && dladdr(reinterpret_cast<void*>(openmp().parallel), &info);
    return known && info.dli_fname ? info.dli_fname : "";
}

void in_team(int threads, void (*work)(const void*, int, int), const void* data) {
    if (threads <= 1 || !openmp().parallel) return work(data, 0, 1);
    TeamWork team = {work, data};
    std::fegetenv(&team.of_caller);
    const auto run = [](void* team) {
        // The team may have fewer threads than requested.
        static_cast<TeamWork*>(team)->share(openmp().thread_num(), openmp().num_threads());
    };
    openmp().parallel(run, &team, unsigned(threads), 0);
    if (team.error) std::rethrow_exception(team.error);
}

int useful_threads(int threads, int64_t rows, int64_t classes) {
    // Waking a thread costs a few microseconds, as much as some ten thousand logits.
    const int64_t worth = 1 + rows * classes / 16384;
    return int(std::max<int64_t>(1, std::min<int64_t>({int64_t(threads), rows, worth})));
}

namespace {

// The number of rows that count towards a mean, or the first row with a class index out of range.
struct Counted {
    int64_t rows, bad_row;
};

Counted count_rows(const Matrix& target, int64_t rows, int64_t classes, int64_t ignore_index) {
    Counted counted = {rows, -1};
    if (target.dtype != kInt64) return counted;
    const int64_t* indices = static_cast<const int64_t*>(target.data);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t y = indices[row * target.row_stride];
        if (y == ignore_index)
            --counted.rows;
        else if (y < 0 || y >= classes)
            return {0, row};
    }
    return counted;
}

// The sums of the rows' probabilities, for kernels to write. Rows that do not count stay at 1.
std::vector<double> label_sums(const Matrix& target, int64_t rows) {
    return std::vector<double>(size_t(target.dtype == kInt64 ? 0 : rows), 1.0);
}

// The first row of probabilities that do not sum to 1, or -1. Labels in half precision miss 1 by up to half a per cent;
// a NaN affects only its own row. fused_kd/core/row_errors.py has the same check.
int64_t no_probabilities(const std::vector<double>& sums) {
    for (size_t row = 0; row < sums.size(); ++row)
        if (std::abs(sums[row] - 1.0) > 0.02) return int64_t(row);
    return -1;
}

void put(void* to, DType dtype, int64_t i, double x) {
    if (dtype == kFloat64)
        static_cast<double*>(to)[i] = x;
    else
        static_cast<float*>(to)[i] = float(x);
}

// Sums in the rows' order, so the bits do not depend on the number of threads.
void reduce_parts(const std::vector<double>& parts, int kinds, int64_t rows, double divisor, Reduction reduction,
                  DType dtype, void* loss_out, void* parts_out) {
    if (reduction == kNone) {
        for (int64_t row = 0; row < rows; ++row) {
            double loss = 0;
            for (int k = 0; k < kinds; ++k) {
                loss += parts[size_t(kinds * row + k)];
                put(parts_out, dtype, k * rows + row, parts[size_t(kinds * row + k)]);
            }
            put(loss_out, dtype, row, loss);
        }
        return;
    }
    double loss = 0;
    for (int k = 0; k < kinds; ++k) {
        double sum = 0;
        for (int64_t row = 0; row < rows; ++row)
            sum += parts[size_t(kinds * row + k)];
        put(parts_out, dtype, k, sum / divisor);
        loss += sum / divisor;
    }
    put(loss_out, dtype, 0, loss);
}

template <class A>
std::vector<A> reciprocals(int64_t n) {
    std::vector<A> values(size_t(n), A(1));
    for (int64_t r = 0; r < n; ++r)
        values[size_t(r)] /= A(r + 1);
    return values;
}

// Asks for large pages for a large gradient: fewer TLB entries, and fewer page faults if the memory is new. It does not
// matter who owns the memory, because all of it is about to be written.
void advise_large_pages(void* data, DType dtype, int64_t elements) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t(2) << 20;
    const int64_t bytes = elements * common::element_size(dtype);
    const uintptr_t start = reinterpret_cast<uintptr_t>(data), end = start + uintptr_t(bytes);
    const uintptr_t first = (start + page - 1) / page * page, last = end / page * page;
    if (data && last > first + page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)dtype, (void)elements;
#endif
}

// Results of DIST's earlier passes, for the last pass over the rows.
struct FromBefore {
    std::vector<char> columns;
    std::vector<double> statistics;
};

// Computes what the columns add to DIST's gradient, for the row kernel to use, and returns the sum of their
// correlations. First, the row kernel computes the origins of the rows' softmaxes.
double dist_columns(const Kernels& kernels, RowArgs& args, FromBefore& kept) {
    std::vector<SoftmaxOrigin> origins(size_t(2 * args.rows));
    RowArgs rows = args;
    rows.only_origins = rows.gradient.data != nullptr; // the last pass then computes the losses
    rows.gradient.data = nullptr;
    rows.origins = origins.data();
    if (rows.only_origins) {
        kept.statistics.resize(size_t(kStatisticsFields * args.rows));
        rows.statistics = args.statistics = kept.statistics.data();
    }
    kernels.row_losses(rows);
    kept.columns.resize(size_t(5 * rows.classes) * (rows.accumulate == kFloat64 ? sizeof(double) : sizeof(float)));
    args.columns = kept.columns.data();
    std::vector<double> correlations(size_t(rows.classes));
    kernels.dist_columns({rows.student, rows.teacher, origins.data(), rows.rows, rows.classes,
                          common::all_classes(rows), rows.hyper, kept.columns.data(), correlations.data(),
                          rows.accumulate, rows.threads, rows.column_factor});
    double sum = 0;
    for (double correlation : correlations)
        sum += correlation;
    return sum;
}

bool has_columns(const RowArgs& args, const Counted& counted) {
    return args.loss & common::kColumns && args.hyper.gamma != 0 && counted.rows > 0;
}

// Writes the columns' part of the loss to each row that counts. `classes` is the number of all columns.
void put_column_part(const RowArgs& args, double correlations, int64_t classes) {
    const double temperature = args.hyper.temperature;
    const double part = args.hyper.gamma * temperature * temperature * (1 - correlations / double(classes));
    for (int64_t row = 0; row < args.rows; ++row)
        if (common::row_counts(args, row)) args.parts[3 * row + 1] = (args.factors ? args.factors[row] : 1) * part;
}

struct Stored {
    Gradient& gradient;
    const Matrix& logits;
};

// Common work of all losses around their kernels, which `run` calls: count, scale and reduce.
template <class Run>
int64_t run_loss(LossArgs& args, int64_t num_classes, int kinds, const LossOutputs& out,
                 std::initializer_list<Stored> stored, const Run& run) {
    const Counted counted = count_rows(args.target, args.rows, num_classes, args.ignore_index);
    if (counted.bad_row >= 0) return counted.bad_row;
    const int64_t divisor = out.reduction == kMean ? std::max<int64_t>(counted.rows, 1) : 1;
    void* const* norm = out.norms;
    for (const auto& [gradient, logits] : stored) {
        if (void* const to = *norm++)
            put(to, args.accumulate, 0, common::stored_norm(logits.dtype, gradient.scale, divisor));
        gradient.scale = common::stored_scale(logits.dtype, gradient.scale, divisor);
        advise_large_pages(gradient.data, logits.dtype, args.rows * (args.classes + gradient.padding));
    }
    std::vector<double> parts(size_t(kinds * args.rows)), sums = label_sums(args.target, args.rows);
    args.parts = parts.data();
    args.label_sums = sums.empty() ? nullptr : sums.data();
    run(counted);
    reduce_parts(parts, kinds, args.rows, double(divisor), out.reduction, args.accumulate, out.loss, out.parts);
    return no_probabilities(sums);
}

} // namespace

int64_t row_loss(const Kernels& kernels, RowArgs args, const LossOutputs& out) {
    return run_loss(args, args.classes, 3, out, {{args.gradient, args.student}}, [&](const Counted& counted) {
        FromBefore kept;
        const bool coupled = has_columns(args, counted);
        const double correlations = coupled ? dist_columns(kernels, args, kept) : 0;
        if (!coupled || args.gradient.data) kernels.row_losses(args);
        if (coupled) put_column_part(args, correlations, args.classes);
    });
}

int64_t row_stage(const Kernels& kernels, RowArgs args) {
    const Piece& piece = *args.piece;
    const Matrix target = {piece.target, kInt64, 1, 0};
    const bool probabilities = args.target.dtype != kInt64, last = piece.stage == kGradient;
    const Counted counted = count_rows(target, args.rows, piece.num_classes, probabilities ? -1 : args.ignore_index);
    if (counted.bad_row >= 0) return counted.bad_row;
    std::vector<double> sums = label_sums(args.target, args.rows);
    args.label_sums = last && probabilities ? sums.data() : nullptr;
    FromBefore kept;
    const bool coupled = has_columns(args, counted);
    double correlations = 0;
    if (coupled && piece.stage >= kSums) correlations = dist_columns(kernels, args, kept);
    kernels.row_losses(args);
    if (piece.stage == kSums) std::fill_n(piece.out + (kSumsFields - 1) * args.rows, args.rows, correlations);
    if (coupled && last) {
        correlations = 0;
        for (int64_t i = 0; i < piece.pieces; ++i)
            correlations += piece.sums[((i + 1) * kSumsFields - 1) * args.rows];
        put_column_part(args, correlations, piece.num_classes);
    }
    return no_probabilities(sums);
}

int64_t uskd(const Kernels& kernels, UskdArgs args, const double* batch_sums, const LossOutputs& out) {
    const auto run = [&](const Counted&) {
        for (int k = 0; k < 2; ++k)
            args.mean[k] = batch_sums[k] / std::max(batch_sums[2], 1.0);
        const std::vector<float> singles = reciprocals<float>(args.accumulate == kFloat64 ? 0 : args.classes);
        const std::vector<double> doubles = reciprocals<double>(args.accumulate == kFloat64 ? args.classes : 0);
        args.reciprocals = singles.empty() ? static_cast<const void*>(doubles.data()) : singles.data();
        kernels.uskd(args);
    };
    return run_loss(args, args.classes, 4, out,
                    {{args.student_gradient, args.student}, {args.weak_gradient, args.weak}}, run);
}

int64_t zipf_ls(const Kernels& kernels, ZipfArgs args, const LossOutputs& out) {
    return run_loss(args, args.classes, 2, out, {{args.gradient, args.student}},
                    [&](const Counted&) { kernels.zipf_ls(args); });
}

int64_t topk_loss(const Kernels& kernels, TopKArgs args, const LossOutputs& out) {
    const std::unique_ptr<bool[]> bad(new bool[size_t(args.rows)]());
    args.bad = bad.get();
    const int64_t bad_row = run_loss(args, common::all_classes(args), 3, out, {{args.gradient, args.student}},
                                     [&](const Counted&) { kernels.topk_rows(args); });
    if (bad_row >= 0) return bad_row;
    const bool* const end = args.bad + args.rows;
    const bool* const found = std::find(static_cast<const bool*>(args.bad), end, true);
    return found == end ? -1 : args.rows + (found - args.bad);
}

int64_t uskd_batch_sums(const Kernels& kernels, TargetProbsArgs args, double* sums) {
    const Counted counted = count_rows(args.target, args.rows, args.classes, args.ignore_index);
    if (counted.bad_row >= 0) return counted.bad_row;
    std::vector<double> values(size_t(2 * args.rows));
    args.values = values.data();
    kernels.target_probs(args);
    sums[0] = sums[1] = 0;
    for (int64_t row = 0; row < args.rows; ++row)
        for (int k = 0; k < 2; ++k)
            sums[k] += values[size_t(2 * row + k)];
    sums[2] = double(counted.rows);
    return -1;
}

} // namespace fused_kd
