// The CPU engine's interface: one batched matrix product with work on load and on store.  Torch-free.
//
//   C[g] = act( (sum_r A'[g, r] B'[g, r]) * c_scale[g] + bias[g] ),   A' = A * act'(saved) * a_scale,  B' = B * b_scale
//
// or, to go on backwards, C[g] = (the sum) * act'(kept[g]).  Or each product of the sum is weighed, and its inner
// products with a matrix are kept, on its way out of the registers (`Fold`).
//
// Every linear op of the package is one or two of these (docs/architecture.md).  A product is cut into independent
// tasks whose results do not depend on how many threads run them; but the parts of a `Fold` are the plan's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace effens::cpu {

enum class DType : int { f32, f64, bf16, f16 };

// The codes of effens_kernels/ops/_activations.py.
enum class Activation : int { none = 0, relu = 1, gelu = 2, silu = 3, tanh = 4 };

// A strided matrix per output g and summand r.  Strides count elements; 0 shares, any value is allowed.
struct Operand {
  const void* data = nullptr;
  int64_t batch = 0, reduce = 0, row = 0, col = 0;
  // Optional, where there is one output or one summand: matrices in any order, number index[g] or index[r].
  const int64_t* index = nullptr;
};

struct Output {
  void* data = nullptr;
  int64_t batch = 0, row = 0, col = 1;
  const int64_t* index = nullptr;  // optional: the number of the matrix of g
};

// One factor per column or row of a matrix, next to each other in memory.
struct Scale {
  const void* data = nullptr;
  int64_t batch = 0, reduce = 0;
};

// With P_r = A'[r] B[r] and the matrix W, instead of C:
//
//   sum = sum_r rows_r * P_r * columns_r     row_dots_r[m] = sum_n columns_r[n] W[m, n] P_r[m, n]
//                                            column_dots_r[n] = sum_m rows_r[m] W[m, n] P_r[m, n]
//
// Results are of the type of sums.  The dots come in as many parts as the plan has blocks, which add up to them.
struct Fold {
  Operand w;  // w.col == 1
  Scale rows, columns;
  void* sum = nullptr;          // [m, n], optional
  void* row_dots = nullptr;     // [col_blocks, reduces, m]
  void* column_dots = nullptr;  // [row_blocks, reduces, n]
};

struct Gemm {
  DType dtype = DType::f32;          // of every operand and output; sums are float, or double for f64
  int64_t batches = 1, reduces = 1;  // outputs g, summands r per output
  int64_t m = 0, n = 0, k = 0;
  Operand a, b;                         // A [m, k], B [k, n]
  Activation slope = Activation::none;  // operand transform: A * slope(saved), saved laid out as A's shape
  Operand saved;
  Scale a_scale, b_scale, c_scale;  // along k of A (without row_sums), and columns of B and of the sum
  Output c;                         // C [m, n]
  Output preactivation;             // optional: the sum and bias before the activation
  Activation activation = Activation::none;
  const void* bias = nullptr;  // optional, [n] per g
  int64_t bias_batch = 0;
  bool accumulate = false;                // C and row_sums are added to: f32 and f64, c.col == 1, no bias, no function
  Activation c_slope = Activation::none;  // where activation is none: the result times c_slope(kept), of C's shape
  Output kept;
  void* row_sums = nullptr;  // optional: sum of A' over k (and r), [m] per g: the bias gradient
  int64_t row_sums_batch = 0;
  const Fold* fold = nullptr;  // optional; batches is 1, and row_sums are [m] per r
  bool columns_first = false;  // tasks of all g for one column block follow each other: for a B that they share
};

// How one Gemm is cut: tasks are numbered g-major, then column blocks, then row blocks; or column blocks first.
struct Plan {
  int64_t row_block = 0, row_blocks = 0, col_block = 0, col_blocks = 0;
  int64_t tasks() const { return row_blocks * col_blocks; }  // per g
};

// Rows mixed linearly (mix.inl), or that backwards.  Strides count elements; columns are contiguous.
struct Mixing {
  DType dtype = DType::f32;
  int64_t members = 0, templates = 0, columns = 0;
  const void* coefficients = nullptr;  // [members, templates]
  int64_t coefficient_row = 0, coefficient_col = 0;
  const void* templates_data = nullptr;  // [templates, columns]
  int64_t template_row = 0;
  void* mixed = nullptr;  // forward: [members, columns]
  int64_t mixed_row = 0;
  int64_t lines = 1, template_line = 0, mixed_line = 0;  // forward: so many such lines of each row, so far apart
  const void* sigma = nullptr;  // forward, optional: [columns]; sigma times what is in `mixed` is added, of one line
  const void* grad = nullptr;   // backward: of `mixed`
  int64_t grad_row = 0;
  void* grad_templates = nullptr;  // [templates, columns], contiguous; optional
};

// What an ensemble of classifiers predicts (predict.inl), or that backwards.  Strides count elements; results and their
// gradients are contiguous, of the type of sums.
struct Prediction {
  DType dtype = DType::f32;
  int64_t members = 0, rows = 0, classes = 0;
  const void* logits = nullptr;  // [members, rows, classes]
  int64_t member = 0, row = 0, class_ = 0;
  void *mean = nullptr, *variance = nullptr;  // [rows, classes]; backward reads the mean
  void *entropy = nullptr, *expected_entropy = nullptr, *mutual_information = nullptr, *disagreement = nullptr;
  // Backward; each optional.
  const void *grad_mean = nullptr, *grad_variance = nullptr;
  const void *grad_entropy = nullptr, *grad_expected = nullptr, *grad_mutual = nullptr;
  void* grad_logits = nullptr;  // [members, rows, classes], contiguous
};

// The same of an ensemble of regression models (predict_regression.inl).
struct RegressionPrediction {
  DType dtype = DType::f32;
  int64_t members = 0, columns = 0;
  const void* means = nullptr;  // [members, columns]
  int64_t mean_member = 0, mean_column = 0;
  const void* variances = nullptr;  // optional
  int64_t variance_member = 0, variance_column = 0;
  void *mean = nullptr, *variance = nullptr, *aleatoric = nullptr, *epistemic = nullptr;  // backward reads the mean
  // Backward; each optional.
  const void *grad_mean = nullptr, *grad_variance = nullptr, *grad_aleatoric = nullptr, *grad_epistemic = nullptr;
  void *grad_means = nullptr, *grad_variances = nullptr;  // [members, columns], contiguous
};

// What a step of an optimizer takes, the same for all numbers of a member; by name in
// effens_kernels/ops/optimizer_step/coefficients.py, and what for in update.inl.
struct SgdStep {
  double active, sign, weight_decay, momentum, kept, fresh, lr;
};
struct AdamWStep {
  double active, sign, decay, grad_share, kept, square_share, inverse_root, eps, step_size;
};

// A step by one of these rules, in place, on numbers that lie next to each other and belong to one member.
struct Update {
  DType dtype = DType::f32;
  const SgdStep* sgd = nullptr;
  const AdamWStep* adamw = nullptr;
  bool nesterov = false;
  void* param = nullptr;
  const void* grad = nullptr;
  void* state[3] = {};  // sgd: momentum buffer; adamw: averages of g and g^2, and the largest of the latter; optional
};

// One instruction set's compiled engine.
struct Engine {
  const char* name;
  bool (*supported)();
  Plan (*plan)(const Gemm&, int threads);
  void (*run)(const Gemm&, const Plan&, int64_t first_task, int64_t last_task);
  // A' of output g written out as [k, ld] with the m values of each k contiguous, and its row sums.  For two products
  // that read the same transformed operand while it is in cache.
  void (*transform)(const Gemm&, int64_t g, void* to, int64_t ld);
  // to[i] = sum of parts[j * stride + i] over j < count: from the type of sums to dtype.
  void (*add_up)(DType, const void* parts, int64_t count, int64_t stride, void* to, int64_t n);
  // For a range of columns.  `partial`: what it adds to the coefficients' gradient, [members, templates] of the type of
  // sums; null where that is not wanted.
  void (*mix)(const Mixing&, int64_t first, int64_t last);
  void (*mix_backward)(const Mixing&, int64_t first, int64_t last, void* partial);
  // For a range of rows, or of columns.
  void (*predict)(const Prediction&, int64_t first, int64_t last);
  void (*predict_backward)(const Prediction&, int64_t first, int64_t last);
  void (*predict_regression)(const RegressionPrediction&, int64_t first, int64_t last);
  void (*predict_regression_backward)(const RegressionPrediction&, int64_t first, int64_t last);
  void (*update)(const Update&, int64_t count);
};

extern const Engine engine_baseline;
#if defined(__x86_64__)
extern const Engine engine_avx2, engine_avx512, engine_avx512_bf16, engine_amx;
#endif

// The engine in use: the best supported one, or what EFFENS_CPU_ISA or set_engine named.
const Engine& engine();
// False (and nothing changes) for a name that is unknown or that this processor cannot run.
bool set_engine(const char* name);
// All compiled engines, worst first; terminated by a null name.
const Engine* const* engines();

// Asks the system to back fresh memory of 4 MiB and more by large pages, where it offers them (Linux, as NumPy does): a
// new result of tens of MiB is otherwise faulted in page by page, which takes longer than to compute it.
void prefer_large_pages(void* data, size_t bytes);

// Per-thread memory that grows and is kept; `slot` < scratch_slots.
constexpr int scratch_slots = 8, slot_shared_operand = 5, slot_other_operand = 6, slot_mixed = 7;  // 0 to 4: engine's
void* scratch(int slot, size_t bytes);

}  // namespace effens::cpu
