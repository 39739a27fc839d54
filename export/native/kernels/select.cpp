// Which instruction sets this machine has.
#include <string.h>

#include <string>

#include "kernels/kernels.h"
#include "runtime/errors.h"

#if defined(__x86_64__)
#include <cpuid.h>

namespace {

// F16C, which not every compiler's __builtin_cpu_supports knows by name.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

}  // namespace
#endif

const Kernels* const* kernels_here() {
  static const Kernels* found[4] = {};
  static const bool once = [] {
    int n = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
      found[n++] = avx512_kernels();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) found[n++] = avx2_kernels();
#endif
#if defined(__aarch64__)
    if (const Kernels* neon = neon_kernels()) found[n++] = neon;
#endif
    found[n] = portable_kernels();
    return true;
  }();
  (void)once;
  return found;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* const* k = kernels_here(); *k; k++)
    if (!name || !strcmp(name, (*k)->name)) return *k;
  return nullptr;
}

const char* kernel_names() {
  static const std::string names = [] {
    std::string all;
    for (const Kernels* const* k = kernels_here(); *k; k++) all += (all.empty() ? "" : " ") + std::string((*k)->name);
    return all;
  }();
  return names.c_str();
}

const Kernels* require_kernels(const char* name) {
  const Kernels* kernels = find_kernels(name);
  if (!kernels)
    throw_error(JAXGPT_BAD_ARGUMENT, "instruction set %s is not there; expected one of: %s", name ? name : "",
                kernel_names());
  return kernels;
}
