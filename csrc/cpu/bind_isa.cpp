// Which instruction set the CPU engine uses, seen and set from Python.
#include <string>

#include "../common/tensor.h"
#include "engine.h"

namespace effens::cpu {
namespace {

std::string cpu_isa() {
  return engine().name;
}

std::string cpu_isa_supported() {
  std::string names;
  for (const Engine* const* e = engines(); *e; ++e)
    if ((*e)->supported()) names += (names.empty() ? "" : ",") + std::string((*e)->name);
  return names;
}

void cpu_set_isa(std::string isa) {
  STD_TORCH_CHECK(set_engine(isa.c_str()), "cpu_set_isa: isa should be one of ", cpu_isa_supported(), ", got ", isa);
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_supported() -> str");
  m.def("cpu_set_isa(str isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&effens::cpu::cpu_isa));
  m.impl("cpu_isa_supported", TORCH_BOX(&effens::cpu::cpu_isa_supported));
  m.impl("cpu_set_isa", TORCH_BOX(&effens::cpu::cpu_set_isa));
}
