// What kernels/device.cuh stands for in the emulation: the kernel's source is compiled as C++ with -DEFFENS_EMULATION
// (and -Wno-unknown-pragmas, for `#pragma unroll`) and runs on this host, where whatever it does wrong is a Fault.
#pragma once

#include <tuple>
#include <utility>

#include "copy_async.h"
#include "cuda.h"
#include "global.h"
#include "order.h"
#include "shared.h"
#include "tensor_core.h"
#include "types.h"
#include "warp.h"

namespace effens::device {

using stream_t = void*;
using emulation::Order, emulation::set_order;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            stream_t, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {std::forward<Arguments>(arguments)...}};
  emulation::run({name, grid, block, dynamic_shared_bytes, &call, sizeof(call), [](const void* p) {
                    const Call& c = *static_cast<const Call*>(p);
                    std::apply(c.kernel, c.parameters);
                  }});
}

}  // namespace effens::device
