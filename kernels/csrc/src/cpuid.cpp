#include "luthier/cpuid.hpp"

#include <stdexcept>

#include "kernels.hpp"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace luthier {

#if defined(__x86_64__)
namespace {

// Linux lets a process use tiles once it has asked (its Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace
#endif

bool supports(Isa isa) {
  if (isa == Isa::plain) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("fma")) return false;
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::avx512 || !avx512) return avx512;
  if (isa == Isa::avx512_bf16 || !__builtin_cpu_supports("avx512bf16")) return __builtin_cpu_supports("avx512bf16");
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
#else
  return false;
#endif
}

namespace detail {

const Kernels& kernels_of(Isa isa) {
  if (!supports(isa)) throw std::invalid_argument("this processor lacks the instruction set asked for");
#if defined(__x86_64__)
  if (isa == Isa::amx_bf16) return kernels_amx_bf16;
  if (isa == Isa::avx512_bf16) return kernels_avx512_bf16;
  if (isa == Isa::avx512) return kernels_avx512;
  if (isa == Isa::avx2) return kernels_avx2;
#endif
  return kernels_plain;
}

}  // namespace detail
}  // namespace luthier
