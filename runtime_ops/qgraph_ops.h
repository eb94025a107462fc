// The library's plain C interface, called from Python through ctypes (qgraph/native.py).
//
// Nothing here throws, nothing but open tables is kept, and every function may be called from
// several threads at once. Functions that can be refused return a QgStatus.
#pragma once

#include <stdint.h>

#define QG_ABI_VERSION 6

#define QG_EXPORT extern "C" __attribute__((visibility("default")))

enum QgStatus { QG_OK = 0, QG_INVALID_ARGUMENT = 1, QG_ISA_NOT_AVAILABLE = 2 };

enum QgFormat { QG_INT4 = 0, QG_TERNARY = 1 };

// How rtn_search quantizes.
enum QgRtnMode {
  QG_ASYMMETRIC = 0,        // codes 0 .. 2^bits - 1 with a zero point
  QG_SYMMETRIC = 1,         // codes -2^(bits-1) .. 2^(bits-1) - 1, positive scale
  QG_SYMMETRIC_SIGNED = 2,  // likewise, and the scale may be negative: uses the lowest code fully
};

// Changes whenever a function below changes.
QG_EXPORT int32_t qg_abi_version(void);

// Instruction sets: the one in use, a name for each number (null past the last), and which can run.
QG_EXPORT int32_t qg_cpu_isa(void);
QG_EXPORT const char* qg_isa_name(int32_t isa);
QG_EXPORT int32_t qg_isa_is_supported(int32_t isa);
// Why the environment variable QGRAPH_ISA cannot be obeyed, or null.
QG_EXPORT const char* qg_isa_problem(void);

// Quantizes w [rows, cols] in groups of `group` along each row (the last may be short) and writes
// codes [rows, cols], scales and (asymmetric only) zero_points [rows, ceil(cols / group)], and the
// sum of importance * (w - quantized)^2 of each row. importance [cols] may be null (all ones).
// bits is 2, 3, 4, 7 or 8. isa is a number from above, or -1 for the one in use.
// kernels/rtn_search.h says how.
QG_EXPORT int32_t qg_rtn_search(int32_t isa, const float* w, int64_t rows, int64_t cols,
                                int64_t group, int32_t bits, int32_t mode, int32_t scale_is_float16,
                                const float* importance, uint8_t* codes, float* scales,
                                uint8_t* zero_points, double* row_error);

// Codes for w [rows, cols] under a Gram matrix: kernels/feedback.h says how qg_feedback rounds,
// kernels/descent.h how qg_descent improves what is there. Scales and zero points lie as above, but
// zero points are floats (whole numbers) and there is always one: 0 where codes are symmetric.
struct QgRounding {
  int32_t isa;  // -1 for the one in use
  int32_t bits;
  int32_t codes_are_signed;
  int32_t scale_is_float16;
  int64_t rows, cols, group;
  uint8_t* codes;
  float* scales;
  float* zero_points;
  float low, high;  // the range of codes, within that of `bits`
};

// order [cols], factor [cols, cols], energies [cols] and row_cost [rows] as in kernels/rounding.h
// (both of the last null, or neither); scratch has 32 * cols floats.
QG_EXPORT int32_t qg_feedback(const struct QgRounding* grid, const float* w, const int32_t* order,
                              const float* factor, const float* energies, double* row_cost,
                              float* scratch);

// gram [cols, cols], group_sums [groups, cols] (sums of its rows), gradient [rows, cols] =
// (w - quantized) * gram, which is kept up to date; scratch has cols floats.
QG_EXPORT int32_t qg_descent(const struct QgRounding* grid, const float* gram,
                             const float* group_sums, float* gradient, int32_t fits_scales,
                             int32_t fits_zero_points, int32_t sweeps, float* scratch);

// Packs codes [rows, cols] of 2, 4 or 8 bits into bytes [rows, ceil(cols * bits / 8)], the first
// code in the lowest bits. Only the low bits of each code are used; a short last byte is filled
// with zeros.
QG_EXPORT int32_t qg_pack(const uint8_t* codes, int64_t rows, int64_t cols, int32_t bits,
                          uint8_t* packed);

// Adds the finite values of x [n] to counts [65536], by the upper 16 bits of their pattern, and
// writes the smallest and the largest of them to extremes [2] (inf and -inf where there are none).
// Returns how many values were NaN or infinite; their buckets are zero before and after.
QG_EXPORT int64_t qg_count_floats(const float* x, int64_t n, int64_t* counts, float* extremes);

// For each of several grids the sum over i of
//     weight[i] * (outside * t^3 - within * clamp(t, -1/2, 1/2)^3 + step * n),
// n = at[i] * inverse rounded, half to even, within [low, high], and t = at[i] * inverse - n.
// Eight sums, of the edges i = j modulo 8, are added pairwise: every instruction set gives the same
// bits. at and weight have `edges` numbers, a multiple of 8; the others `ranges`.
struct QgRangeErrors {
  const double* at;
  const double* weight;
  int64_t edges, ranges;
  const double* grids;  // [3, ranges]: inverse, low and high
  double outside, within, step;
  double* errors;
};

QG_EXPORT int32_t qg_range_errors(int32_t isa, const struct QgRangeErrors* task);

// A table for nodes ai.qgraph.calibration::Observe whose attribute `table` is the key that this
// returns (0 where there is no memory): each run adds to counts [65536] what qg_count_floats would,
// and to totals [2] how many values were not finite and how many there were. The memory is the
// caller's until the table is closed.
QG_EXPORT int64_t qg_table_open(int64_t* counts, int64_t* totals);
QG_EXPORT int32_t qg_table_close(int64_t key);

// y [m, n] = x [m, k] * weights^T + bias on the calling thread, as the operators compute it; the
// layout of the weights is in qgraph/ops/layout.py. scratch has qg_matmul_scratch bytes. For tests
// and benchmarks: `task_order` 0 runs the tasks in order, 1 in reverse.
struct QgMatMul {
  int32_t isa;     // -1 for the one in use
  int32_t format;  // QgFormat
  int64_t m, n, k;
  int64_t group, activation_bits, activation_block;
  const uint8_t* codes;
  const void* scales;  // INT4 [tiles, groups, 16]; ternary float [tiles * 16]
  int32_t scales_are_float16;
  int32_t task_order;
  const uint8_t* zero_points;  // INT4 [tiles, groups, 16] or null
  const float* x;
  const float* bias;  // [n] or null
  float* y;
  void* scratch;
};

QG_EXPORT int32_t qg_matmul(const struct QgMatMul* problem);
// -1 where the sizes are not valid.
QG_EXPORT int64_t qg_matmul_scratch(const struct QgMatMul* problem);

// Probes for benchmarks: read `nbytes` in one stream; `rounds` rounds of int8 dot products as fast
// as the instruction set can. Both return the number of operations (bytes read, multiply-adds).
QG_EXPORT int64_t qg_probe_read(const uint8_t* data, int64_t nbytes, int32_t* sink);
QG_EXPORT int64_t qg_probe_dot(int32_t isa, int64_t rounds, int32_t* sink);
