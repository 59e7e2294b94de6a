// Template mixing on the CPU against plain loops, for every instruction set that this machine has.
//
//   mixing_test [seed]
//
// With small integers every sum is exact, so results must be equal to the last bit.  Operands lie at the edge of
// forbidden pages with NaN between their rows; results in the midst of a pattern that must survive around them.
#include <vector>

#include "checks.h"
#include "memory.h"

namespace effens::test {
namespace {

using cpu::Engine;
using cpu::Mixing;

struct Rooms {
  Room coefficients, templates, lines, noise, grad, result, partial;
};

// [rows, columns] in rows `row` apart.
template <class T>
struct Rows {
  int64_t rows, columns, row;
  T* data;

  Rows(Room& room, Random& random, int64_t rows, int64_t columns, int64_t row)
      : rows(rows), columns(columns), row(row) {
    data = room.place<T>(extent(), random.chance(70));
    std::fill(data, data + extent(), poison<T>());
  }
  int64_t extent() const { return rows * columns == 0 ? 0 : (rows - 1) * row + columns; }
  T& operator()(int64_t i, int64_t j) const { return data[i * row + j]; }
  void fill(Random& random) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) (*this)(i, j) = narrow<T>(double(random.below(7) - 3));
  }
  // One result, which is then as if it had not been written.
  void compare(int64_t i, int64_t j, double expected, const char* name) {
    T& element = (*this)(i, j);
    CHECK(widen(element) == widen(narrow<T>(expected)), "%s[%ld, %ld] is %g, should be %g", name, long(i), long(j),
          widen(element), expected);
    element = poison<T>();
  }
  void untouched(const char* name) const {
    int64_t written = 0;
    for (int64_t i = 0; i < extent(); ++i) written += !same_bits(data[i], poison<T>());
    CHECK(written == 0, "%ld elements of %s were written that should not", long(written), name);
  }
};

template <class T>
using SumsOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Some columns of each line of matrices.
template <class T, class Scale>
void check_lines(const Engine& engine, Rooms& rooms, Random& random, Mixing p, Scale scale) {
  const int64_t lines = 1 + random.below(4), columns = 1 + random.below(100), before = random.below(20);
  const int64_t from = before + columns + random.below(20), to = columns + random.below(20);
  Rows<T> x(rooms.lines, random, p.templates, lines * from, lines * from),
      mixed(rooms.result, random, p.members, lines * to, lines * to);
  x.fill(random);
  p.templates_data = x.data + before, p.template_row = x.row, p.lines = lines, p.template_line = from;
  p.mixed = mixed.data, p.mixed_row = mixed.row, p.mixed_line = to;
  engine.mix(p, 0, columns);
  for (int64_t m = 0; m < p.members; ++m)
    for (int64_t l = 0; l < lines; ++l)
      for (int64_t j = 0; j < columns; ++j) {
        double sum = 0;
        for (int64_t t = 0; t < p.templates; ++t) sum += scale(m, t) * widen(x(t, l * from + before + j));
        mixed.compare(m, l * to + j, sum, "mixed");
      }
  mixed.untouched("mixed");
}

template <class T>
void check(const Engine& engine, Rooms& rooms, Random& random, int64_t members, int64_t templates, int64_t columns) {
  const int64_t pad = random.chance(50) ? random.below(20) : 0;
  const bool transposed = random.chance(40);
  Rows<T> c(rooms.coefficients, random, transposed ? templates : members, transposed ? members : templates,
            (transposed ? members : templates) + random.below(3));
  Rows<T> x(rooms.templates, random, templates, columns, columns + pad),
      g(rooms.grad, random, members, columns, columns + pad);
  c.fill(random), x.fill(random), g.fill(random);
  auto scale = [&](int64_t m, int64_t t) { return widen(transposed ? c(t, m) : c(m, t)); };
  // A range of columns is all that a call may touch.
  const int64_t first = random.chance(50) ? 0 : random.below(columns), last = first + 1 + random.below(columns - first);
  Mixing p;
  p.dtype = Traits<T>::dtype;
  p.members = members, p.templates = templates, p.columns = columns;
  p.coefficients = c.data, p.coefficient_row = transposed ? 1 : c.row, p.coefficient_col = transposed ? c.row : 1;
  p.templates_data = x.data, p.template_row = x.row;
  std::snprintf(current, sizeof(current), "%s %d mixing: m=%ld t=%ld n=%ld of %ld to %ld, rows %ld apart%s",
                engine.name, int(p.dtype), long(members), long(templates), long(columns), long(first), long(last),
                long(x.row), transposed ? ", coefficients transposed" : "");
  {
    const bool noisy = random.chance(50);
    Rows<T> mixed(rooms.result, random, members, columns, columns + pad),
        sigma(rooms.lines, random, 1, noisy ? columns : 0, columns),
        noise(rooms.noise, random, members, columns, columns);
    sigma.fill(random), noise.fill(random);
    for (int64_t m = 0; m < members && noisy; ++m) std::copy_n(&noise(m, first), last - first, &mixed(m, first));
    p.mixed = mixed.data, p.mixed_row = mixed.row;
    p.sigma = noisy ? sigma.data : nullptr;
    engine.mix(p, first, last);
    p.sigma = nullptr;
    for (int64_t m = 0; m < members; ++m)
      for (int64_t j = first; j < last; ++j) {
        double sum = noisy ? widen(sigma(0, j)) * widen(noise(m, j)) : 0.0;
        for (int64_t t = 0; t < templates; ++t) sum += scale(m, t) * widen(x(t, j));
        mixed.compare(m, j, sum, "mixed");
      }
    mixed.untouched("mixed");
  }
  check_lines<T>(engine, rooms, random, p, scale);
  const int need = int(random.below(3));  // both, or one
  Rows<T> dx(rooms.result, random, templates, columns, columns);
  Rows<SumsOf<T>> dc(rooms.partial, random, members, templates, templates);
  p.grad = g.data, p.grad_row = g.row, p.grad_templates = need == 1 ? nullptr : dx.data;
  engine.mix_backward(p, first, last, need == 2 ? nullptr : dc.data);
  for (int64_t t = 0; t < templates && need != 1; ++t)
    for (int64_t j = first; j < last; ++j) {
      double sum = 0;
      for (int64_t m = 0; m < members; ++m) sum += scale(m, t) * widen(g(m, j));
      dx.compare(t, j, sum, "dtemplates");
    }
  for (int64_t m = 0; m < members && need != 2; ++m)
    for (int64_t t = 0; t < templates; ++t) {
      double sum = 0;
      for (int64_t j = first; j < last; ++j) sum += widen(g(m, j)) * widen(x(t, j));
      dc.compare(m, t, sum, "dcoefficients");
    }
  dx.untouched("dtemplates");
  dc.untouched("dcoefficients");
}

template <class T>
void check_type(const Engine& engine, Rooms& rooms, Random& random) {
  const int64_t few[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 25, 40},
                columns[] = {1, 2, 15, 16, 17, 33, 47, 48, 49, 97, 200};
  for (int64_t members : few)
    for (int64_t templates : few) check<T>(engine, rooms, random, members, templates, random.of(columns));
  for (int64_t n : {503, 505, 1007, 1009, 2017, 5000})  // around chunks
    for (int k = 0; k < 6; ++k) check<T>(engine, rooms, random, random.of(few), random.of(few), n);
}

}  // namespace
}  // namespace effens::test

int main(int count, char** arguments) {
  using namespace effens::test;
  const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : uint64_t(std::random_device{}());
  std::printf("random data: repeat with mixing_test %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::signal(SIGSEGV, fault);
  std::signal(SIGBUS, fault);
  static Rooms rooms;
  for (const effens::cpu::Engine* const* e = effens::cpu::engines(); *e; ++e) {
    if (!(*e)->supported()) {
      std::printf("%s: this processor does not have it\n", (*e)->name);
      continue;
    }
    Random random{std::mt19937_64(seed)};
    const int64_t before = checks;
    check_type<float>(**e, rooms, random);
    check_type<double>(**e, rooms, random);
    check_type<bf16>(**e, rooms, random);
    check_type<f16>(**e, rooms, random);
    std::printf("%s: %ld results compared\n", (*e)->name, long(checks - before));
  }
  return report();
}
