// The CPU engine against plain loops, for every instruction set that this machine has.
//
//   microkernel_test [seed]
//
// With small integers every sum is exact, so results must be equal to the last bit however blocks are cut; activations
// are then checked with real numbers and a bound on the rounding.  Operands lie at the edge of forbidden pages with NaN
// in their gaps, results in the midst of a pattern that must survive around them and vanish within.
#include <ctime>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "memory.h"

namespace effens::test {
namespace {

using cpu::Activation;
using cpu::Engine;
using cpu::Gemm;
using cpu::Plan;

// ------------------------------------------------------------------------------------------------- exact functions

double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::relu:
      return z < 0 ? 0 : z;
    case Activation::gelu:
      return 0.5 * z * (1 + std::erf(z * std::sqrt(0.5)));
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::tanh:
      return std::tanh(z);
    default:
      return z;
  }
}

double slope(Activation activation, double saved) {
  const double p = 1 / (1 + std::exp(-saved));
  switch (activation) {
    case Activation::relu:
      return saved > 0;
    case Activation::gelu:
      return 0.5 * (1 + std::erf(saved * std::sqrt(0.5))) +
             saved * std::exp(-0.5 * saved * saved) / std::sqrt(2 * std::acos(-1.0));
    case Activation::silu:
      return p * (1 + saved * (1 - p));
    case Activation::tanh:
      return 1 - saved * saved;
    default:
      return 1;
  }
}

// ----------------------------------------------------------------------------------------------------- one problem

template <class T>
struct Array {
  Layout layout;
  T* data = nullptr;
  const int64_t* index = nullptr;  // of g, or of r
  bool of_summands = false;

  void place(Room& room, const Layout& to, bool at_end) {
    layout = to;
    data = room.place<T>(to.extent, at_end);
    clear();
  }
  void clear() { std::fill(data, data + layout.extent, poison<T>()); }
  T& operator()(int64_t g, int64_t r, int64_t i, int64_t j) const {
    if (index) (of_summands ? r : g) = index[g + r];
    return data[layout.at(g, r, i, j)];
  }
  cpu::Operand operand() const {
    const int64_t batch = index && of_summands ? 0 : layout.batch, reduce = index && !of_summands ? 0 : layout.reduce;
    return {data + layout.first, batch, reduce, layout.row, layout.col, index};
  }
  cpu::Scale scale() const { return {data, layout.batch, layout.reduce}; }
  cpu::Output output() const { return {data + layout.first, layout.batch, layout.row, layout.col, index}; }
};

struct Rooms {
  Room a, b, saved, kept, c, z, bias, sums, a_scale, b_scale, c_scale, a_index, b_index, c_index;
};

// Numbers of matrices, some twice and some not at all; beyond the last, memory is forbidden.
const int64_t* numbers(Room& room, Random& random, int64_t count) {
  int64_t* to = room.place<int64_t>(count, true);
  for (int64_t i = 0; i < count; ++i) to[i] = random.below(count);
  return to;
}

// Each of them once.
const int64_t* order(Room& room, Random& random, int64_t count) {
  int64_t* to = room.place<int64_t>(count, true);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = random.below(i + 1);
    to[i] = to[at], to[at] = i;
  }
  return to;
}

struct Sizes {
  int64_t batches, reduces, m, n, k;
};

template <class T>
struct Problem {
  Sizes s;
  Gemm gemm;
  bool exact;  // small integers; no function but relu
  Array<T> a, b, saved, kept, c, z, bias, sums, a_scale, b_scale, c_scale;
  std::vector<T> before;  // of C and of the row sums, where they are added to

  Problem(Rooms& rooms, Random& random, const Sizes& sizes, bool exact) : s(sizes), exact(exact) {
    const Activation functions[] = {Activation::none, Activation::relu, Activation::gelu, Activation::silu,
                                    Activation::tanh};
    gemm.dtype = Traits<T>::dtype;
    gemm.batches = s.batches, gemm.reduces = s.reduces, gemm.m = s.m, gemm.n = s.n, gemm.k = s.k;
    gemm.activation = functions[random.below(exact ? 2 : 5)];
    if (random.chance(50)) gemm.slope = functions[random.below(exact ? 2 : 5)];
    auto choose = [&](Room& room, Array<T>& array, int64_t reduces, int64_t rows, int64_t cols, bool output) {
      array.place(room, Layout::random(random, s.batches, reduces, rows, cols, output), random.chance(70));
      for (int64_t g = 0; g < s.batches && !output; ++g)
        for (int64_t r = 0; r < reduces; ++r)
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j)
              array(g, r, i, j) = narrow<T>(exact ? double(random.below(7) - 3) : random.real());
    };
    choose(rooms.a, a, s.reduces, s.m, s.k, false);
    choose(rooms.b, b, s.reduces, s.k, s.n, false);
    if ((s.batches == 1 || s.reduces == 1) && random.chance(40)) {
      a.index = numbers(rooms.a_index, random, s.batches * s.reduces);
      b.index = numbers(rooms.b_index, random, s.batches * s.reduces);
    }
    a.of_summands = b.of_summands = s.batches == 1;
    gemm.a = a.operand(), gemm.b = b.operand();
    if (gemm.slope != Activation::none) {
      choose(rooms.saved, saved, s.reduces, s.m, s.k, false);
      saved.index = a.index, saved.of_summands = a.of_summands;
      gemm.saved = saved.operand();
    }
    if (random.chance(50)) {
      Layout l = Layout::random(random, s.batches, 1, 1, s.n, true);
      l.col = 1, l.batch = random.chance(25) ? 0 : s.n + random.below(3), l.row = l.first = 0;
      l.extent = s.batches * s.n == 0 ? 0 : (s.batches - 1) * l.batch + s.n;
      bias.place(rooms.bias, l, random.chance(70));
      for (int64_t g = 0; g < s.batches; ++g)
        for (int64_t j = 0; j < s.n; ++j)
          bias(g, 0, 0, j) = narrow<T>(exact ? double(random.below(7) - 3) : random.real());
      gemm.bias = bias.data, gemm.bias_batch = l.batch;
    }
    choose(rooms.c, c, 1, s.m, s.n, true);
    if (random.chance(30)) c.index = order(rooms.c_index, random, s.batches);
    gemm.c = c.output();
    const bool plain = random.chance(40);  // the ways of the backward pass
    if (plain) gemm.activation = Activation::none;
    if (plain && random.chance(50)) {
      gemm.c_slope = functions[1 + random.below(exact ? 1 : 4)];
      choose(rooms.kept, kept, 1, s.m, s.n, false);
      kept.index = c.index;
      gemm.kept = kept.output();
    } else if (plain && !bias.data && c.layout.col == 1 && sizeof(T) >= 4) {
      gemm.accumulate = true;
    }
    if (!gemm.accumulate && random.chance(30)) {
      choose(rooms.z, z, 1, s.m, s.n, true);
      z.index = c.index;
      gemm.preactivation = z.output();
    }
    if (random.chance(s.n == 0 ? 80 : 40)) {
      Layout l;
      l.row = 1, l.batch = s.m + random.below(3);
      l.extent = s.batches * s.m == 0 ? 0 : (s.batches - 1) * l.batch + s.m;
      sums.place(rooms.sums, l, random.chance(70));
      gemm.row_sums = sums.data, gemm.row_sums_batch = l.batch;
    }
    auto scaled = [&](Room& room, Array<T>& array, cpu::Scale& to, int64_t reduces, int64_t length) {
      Layout l;
      l.col = 1, l.reduce = random.chance(25) ? 0 : length + random.below(3);
      l.batch = random.chance(25) ? 0 : reduces * l.reduce + length + random.below(3);
      const bool none = s.batches * reduces * length == 0;
      l.extent = none ? 0 : (s.batches - 1) * l.batch + (reduces - 1) * l.reduce + length;
      array.place(room, l, random.chance(70));
      for (int64_t g = 0; g < s.batches; ++g)
        for (int64_t r = 0; r < reduces; ++r)
          for (int64_t j = 0; j < length; ++j)
            array(g, r, 0, j) = narrow<T>(exact ? double(random.below(4) - 1) : random.real());
      to = array.scale();
    };
    if (!gemm.row_sums && random.chance(40)) scaled(rooms.a_scale, a_scale, gemm.a_scale, s.reduces, s.k);
    if (random.chance(30)) scaled(rooms.b_scale, b_scale, gemm.b_scale, s.reduces, s.n);
    if (!gemm.accumulate && random.chance(40)) scaled(rooms.c_scale, c_scale, gemm.c_scale, 1, s.n);
    gemm.columns_first = random.chance(30);
    for (int64_t i = 0; gemm.accumulate && i < s.batches * s.m * (s.n + 1); ++i)
      before.push_back(narrow<T>(exact ? double(random.below(7) - 3) : random.real()));
  }

  // What C[g, i, j] holds before; the row sums are its last column.
  T start(int64_t g, int64_t i, int64_t j) const { return before[size_t((g * s.m + i) * (s.n + 1) + j)]; }

  void describe(const Engine& engine, const char* what) const {
    std::snprintf(current, sizeof(current),
                  "%s %s %s: g=%ld r=%ld m=%ld n=%ld k=%ld, A in %s, B in %s, saved in %s, C in %s, activation %d, "
                  "slope %d, of C %d%s%s%s%s%s%s%s%s%s",
                  engine.name, std::to_string(int(gemm.dtype)).c_str(), what, long(s.batches), long(s.reduces),
                  long(s.m), long(s.n), long(s.k), a.layout.name, b.layout.name, saved.layout.name, c.layout.name,
                  int(gemm.activation), int(gemm.slope), int(gemm.c_slope), gemm.accumulate ? ", added" : "",
                  bias.data ? ", bias" : "", z.data ? ", preactivation" : "", sums.data ? ", row sums" : "",
                  a.index ? ", A and B by number" : "", c.index ? ", C by number" : "",
                  a_scale.data ? ", A scaled" : "", b_scale.data ? ", B scaled" : "", c_scale.data ? ", C scaled" : "");
  }

  void clear_results() {
    c.clear();
    if (z.data) z.clear();
    if (sums.data) sums.clear();
    for (int64_t g = 0; gemm.accumulate && g < s.batches; ++g)
      for (int64_t i = 0; i < s.m; ++i) {
        for (int64_t j = 0; j < s.n; ++j) c(g, 0, i, j) = start(g, i, j);
        if (sums.data) sums(g, 0, i, 0) = start(g, i, s.n);
      }
  }

  // Compares one result with its exact value and marks it as seen.
  void compare(Array<T>& array, int64_t g, int64_t i, int64_t j, double expected, double allowed, const char* name) {
    T& element = array(g, 0, i, j);
    const double actual = widen(element);
    if (exact)
      CHECK(actual == widen(narrow<T>(expected)), "%s[%ld, %ld, %ld] is %g, should be %g", name, long(g), long(i),
            long(j), actual, expected);
    else
      CHECK(std::fabs(actual - expected) <= allowed + 0.51 * Traits<T>::eps * std::fabs(expected) + Traits<T>::tiny,
            "%s[%ld, %ld, %ld] is %.9g, should be %.9g, allowed are %g", name, long(g), long(i), long(j), actual,
            expected, allowed);
    element = poison<T>();
  }

  void untouched(const Array<T>& array, const char* name) {
    int64_t written = 0;
    for (int64_t i = 0; i < array.layout.extent; ++i) written += !same_bits(array.data[i], poison<T>());
    CHECK(written == 0, "%ld elements between those of %s were written", long(written), name);
  }

  // A' and how far its rounding to T may shift it, as [reduces * k] rows of m.
  void check() {
    const int64_t terms = s.reduces * s.k;
    const bool transformed = gemm.slope != Activation::none || a_scale.data || b_scale.data;
    const double unit = Traits<T>::accumulation, stored = (transformed ? Traits<T>::eps : 0) * (b_scale.data ? 2 : 1);
    std::vector<double> left(size_t(s.m * terms)), right(size_t(terms * s.n)), sum(static_cast<size_t>(s.n)), size(sum),
        square(sum);
    for (int64_t g = 0; g < s.batches; ++g) {
      for (int64_t r = 0; r < s.reduces; ++r)
        for (int64_t l = 0; l < s.k; ++l) {
          for (int64_t i = 0; i < s.m; ++i) {
            double v = widen(a(g, r, i, l));
            if (gemm.slope != Activation::none) v *= slope(gemm.slope, widen(saved(g, r, i, l)));
            if (a_scale.data) v *= widen(a_scale(g, r, 0, l));
            left[size_t(i * terms + r * s.k + l)] = v;
          }
          for (int64_t j = 0; j < s.n; ++j)
            right[size_t((r * s.k + l) * s.n + j)] =
                widen(b(g, r, l, j)) * (b_scale.data ? widen(b_scale(g, r, 0, j)) : 1);
        }
      for (int64_t i = 0; i < s.m; ++i) {
        std::fill(sum.begin(), sum.end(), 0), size = square = sum;
        double total = 0, total_size = 0;
        for (int64_t t = 0; t < terms; ++t) {
          const double v = left[size_t(i * terms + t)];
          total += v, total_size += std::fabs(v) + 1;
          for (int64_t j = 0; j < s.n; ++j) {
            const double product = v * right[size_t(t * s.n + j)];
            sum[size_t(j)] += product;
            if (!exact)
              size[size_t(j)] += std::fabs(product) + std::fabs(right[size_t(t * s.n + j)]),
                  square[size_t(j)] += product * product;
          }
        }
        const double growth = 16 + 2 * std::sqrt(double(terms));
        for (int64_t j = 0; j < s.n; ++j) {
          const double add = bias.data ? widen(bias(g, 0, 0, j)) : gemm.accumulate ? widen(start(g, i, j)) : 0;
          const double by = c_scale.data ? widen(c_scale(g, 0, 0, j)) : 1;
          const double value = sum[size_t(j)] * by + add;
          const double allowed = unit * growth * (size[size_t(j)] * std::fabs(by) + 1) +
                                 stored * 4 * std::sqrt(square[size_t(j)]) * std::fabs(by);
          if (z.data) compare(z, g, i, j, value, allowed, "preactivation");
          const double factor = gemm.c_slope == Activation::none ? 1 : slope(gemm.c_slope, widen(kept(g, 0, i, j)));
          compare(c, g, i, j, activate(gemm.activation, value) * factor, 1.2 * allowed + 8 * unit * std::fabs(value),
                  "C");
        }
        if (gemm.accumulate) total += widen(start(g, i, s.n));
        if (sums.data)
          compare(sums, g, i, 0, total, unit * growth * total_size + stored * 4 * std::sqrt(double(terms)), "row_sums");
      }
    }
    untouched(c, "C");
    if (z.data) untouched(z, "preactivation");
    if (sums.data) untouched(sums, "row_sums");
  }

  std::vector<T> results() const {
    std::vector<T> all(c.data, c.data + c.layout.extent);
    if (z.data) all.insert(all.end(), z.data, z.data + z.layout.extent);
    if (sums.data) all.insert(all.end(), sums.data, sums.data + sums.layout.extent);
    return all;
  }
};

// The row_sums array is one row of m per g.
template <class T>
void run_all(const Engine& engine, Problem<T>& p, const Plan& plan) {
  engine.run(p.gemm, plan, 0, p.s.batches * plan.tasks());
}

// However tasks are shared out, and whatever number of threads the plan is for: the same bits.
template <class T>
void check_cuts(const Engine& engine, Problem<T>& p, Random& random) {
  const Plan plan = engine.plan(p.gemm, 1);
  p.clear_results();
  run_all(engine, p, plan);
  const std::vector<T> expected = p.results();
  auto same = [&](const char* how) {
    const std::vector<T> actual = p.results();
    CHECK(std::memcmp(actual.data(), expected.data(), expected.size() * sizeof(T)) == 0, "other bits %s", how);
    p.clear_results();
  };
  p.clear_results();
  for (int64_t task = p.s.batches * plan.tasks(); task-- > 0;) engine.run(p.gemm, plan, task, task + 1);
  same("task by task, last first");
  const Plan wide = engine.plan(p.gemm, 2 + int(random.below(15)));
  const int64_t tasks = p.s.batches * wide.tasks();
  for (int64_t from = 0, to = 0; from < tasks; from = to) {
    to = from + 1 + random.below(tasks - from);
    engine.run(p.gemm, wide, from, to);
  }
  same("by a plan for more threads");
  const int64_t half = random.below(tasks + 1);
  std::thread other([&] { engine.run(p.gemm, wide, 0, half); });
  engine.run(p.gemm, wide, half, tasks);
  other.join();
  same("on two threads at once");
}

// A' as a product's sibling reads it: [k, ld] of each g, and its row sums.
template <class T>
void check_transform(const Engine& engine, Rooms& rooms, Random& random) {
  Problem<T> p(rooms, random, {2, 1, 1 + random.below(70), 3, 1 + random.below(70)}, true);
  p.gemm.a_scale = {}, p.a_scale.data = nullptr;  // it has none
  p.describe(engine, "transform");
  const int64_t ld = p.s.m + random.below(20), count = p.s.k * ld;
  p.clear_results();
  for (int64_t g = 0; g < p.s.batches; ++g) {
    T* to = rooms.c.place<T>(count, true);
    std::fill(to, to + count, poison<T>());
    engine.transform(p.gemm, g, to, ld);
    for (int64_t i = 0; i < p.s.m; ++i) {
      double total = 0;
      for (int64_t l = 0; l < p.s.k; ++l) {
        double v = widen(p.a(g, 0, i, l));
        if (p.gemm.slope != Activation::none) v *= slope(p.gemm.slope, widen(p.saved(g, 0, i, l)));
        total += v;
        CHECK(widen(to[l * ld + i]) == v, "A'[%ld, %ld] is %g, should be %g", long(i), long(l), widen(to[l * ld + i]),
              v);
        to[l * ld + i] = poison<T>();
      }
      if (p.sums.data) p.compare(p.sums, g, i, 0, total, 0, "row_sums");
    }
    int64_t written = 0;
    for (int64_t i = 0; i < count; ++i) written += !same_bits(to[i], poison<T>());
    CHECK(written == 0, "%ld elements between the rows were written", long(written));
  }
  if (p.sums.data) p.untouched(p.sums, "row_sums");
}

template <class T>
void check_type(const Engine& engine, Rooms& rooms, Random& random) {
  auto one = [&](const Sizes& sizes, bool exact, const char* what) {
    Problem<T> p(rooms, random, sizes, exact);
    p.describe(engine, what);
    p.clear_results();
    run_all(engine, p, engine.plan(p.gemm, 1 + int(random.below(4))));
    p.check();
    if (!exact) check_cuts(engine, p, random);
  };
  const int64_t small[] = {0, 1, 2, 6, 7, 13, 14, 15, 16, 31, 32, 33};
  for (int64_t m : small)
    for (int64_t n : small)
      for (int64_t k : small) one({1 + random.below(3), random.below(4), m, n, k}, true, "small");
  const int64_t large[] = {63, 65, 127, 257, 383, 384, 385, 769, 1025},
                narrow_sizes[] = {1, 8, 13, 15, 31, 33, 47, 49, 65, 79};
  for (int64_t size : large) {
    one({1, 1 + random.below(3), size, random.of(narrow_sizes), random.of(narrow_sizes)}, true, "tall");
    one({1, 1 + random.below(3), random.of(narrow_sizes), size, random.of(narrow_sizes)}, true, "wide");
    one({1, 1 + random.below(3), random.of(narrow_sizes), random.of(narrow_sizes), size}, true, "deep");
    one({1, 1, size, random.of(narrow_sizes), random.of(large)}, true, "tall and deep");
    one({1, 1, random.of(narrow_sizes), size, random.of(large)}, true, "wide and deep");
  }
  for (int n = 0; n < 60; ++n)
    one({1 + random.below(2), 1 + random.below(2), 1 + random.below(80), 1 + random.below(80), 1 + random.below(80)},
        false, "real");
  one({2, 2, 150, 70, 800}, false, "real");
  one({1, 1, 70, 300, 800}, false, "real");
  for (int n = 0; n < 40; ++n) check_transform<T>(engine, rooms, random);
}

void check_choice() {
  std::snprintf(current, sizeof(current), "choice of an engine");
  const std::string before = cpu::engine().name;
  CHECK(!cpu::set_engine("no such thing") && !cpu::set_engine(""), "an unknown name was accepted");
  CHECK(before == cpu::engine().name, "a refused name changed the engine");
  CHECK(std::string(cpu::engines()[0]->name) == "baseline" && cpu::engines()[0]->supported(), "no baseline");
  for (const Engine* const* e = cpu::engines(); *e; ++e)
    CHECK(cpu::set_engine((*e)->name) == (*e)->supported(), "%s", (*e)->name);
  cpu::set_engine(before.c_str());
}

}  // namespace
}  // namespace effens::test

int main(int count, char** arguments) {
  using namespace effens::test;
  const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : uint64_t(std::random_device{}());
  std::printf("random data: repeat with microkernel_test %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::signal(SIGSEGV, fault);
  std::signal(SIGBUS, fault);
  check_choice();
  static Rooms rooms;
  for (const effens::cpu::Engine* const* e = effens::cpu::engines(); *e; ++e) {
    if (!(*e)->supported()) {
      std::printf("%s: this processor does not have it\n", (*e)->name);
      continue;
    }
    Random random{std::mt19937_64(seed)};
    const int64_t before = checks;
    const std::clock_t start = std::clock();
    check_type<float>(**e, rooms, random);
    check_type<double>(**e, rooms, random);
    check_type<bf16>(**e, rooms, random);
    check_type<f16>(**e, rooms, random);
    std::printf("%s: %ld results compared in %.1f s\n", (*e)->name, long(checks - before),
                double(std::clock() - start) / CLOCKS_PER_SEC);
  }
  return report();
}
