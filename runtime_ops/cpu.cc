// Compiled without instruction set flags: this decides whether the others may run.
#include "cpu.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qgraph {
namespace {

#if defined(__x86_64__)
// Clang's __builtin_cpu_supports has no name for it.
bool has_float16_conversion() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#elif defined(__aarch64__)
// Elsewhere nobody says, and the answer is no.
bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

struct Choice {
  Isa isa;
  const char* problem;
};

Choice choose() {
  Isa best = Isa::kScalar;
  for (int i = 0; i < kIsaCount; ++i) {
    if (is_supported(static_cast<Isa>(i))) best = static_cast<Isa>(i);
  }
  const char* cap = std::getenv("QGRAPH_ISA");
  if (cap == nullptr || *cap == '\0') return {best, nullptr};
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::strcmp(cap, isa_name(isa)) != 0) continue;
    // A cap that the CPU does not reach leaves its best; one that it has limits it.
    return {is_supported(isa) ? isa : best, nullptr};
  }
  return {best,
          "the environment variable QGRAPH_ISA must be scalar, avx2, avx512vnni, neon or neondot"};
}

const Choice& choice() {
  static const Choice once = choose();
  return once;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512Vnni: return "avx512vnni";
    case Isa::kNeon: return "neon";
    case Isa::kNeonDot: return "neondot";
  }
  return nullptr;
}

bool is_supported(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return true;
#if defined(__x86_64__)
    // These look at the operating system's support for the registers as well.
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             has_float16_conversion();
    case Isa::kAvx512Vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
    case Isa::kNeon: return true;  // part of every 64-bit ARM CPU
    case Isa::kNeonDot: return has_dot_product();
#endif
    default: return false;
  }
}

Isa best_isa() { return choice().isa; }

const char* isa_problem() { return choice().problem; }

}  // namespace qgraph
