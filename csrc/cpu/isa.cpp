// Chooses the instruction set: the best one that the build has and the processor supports, or the one that is pinned.
#include <atomic>

#include "../apet_testing.h"
#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(APET_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(APET_HAVE_NEON_BF16) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace apet::cpu {
namespace {

#if defined(__x86_64__)
// Returns a bit of a register that CPUID fills. __builtin_cpu_supports() does not know the names of these features in
// every compiler that knows their flags: f16c from GCC 11 and clang 18 on, amx-fp16 from GCC 13 on.
enum Register { kEax, kEbx, kEcx, kEdx };
bool cpuid_bit(unsigned leaf, unsigned subleaf, Register of, int bit) {
  unsigned registers[4] = {};
  return __get_cpuid_count(leaf, subleaf, &registers[kEax], &registers[kEbx], &registers[kEcx], &registers[kEdx]) &&
         (registers[of] >> bit & 1);
}
#endif

#if defined(APET_HAVE_AMX) && !defined(APET_TILE_EMULATION)
// Linux requires a process to request permission before it uses tiles, which add 8 KB to the state of a thread.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0 && amx_is_right();
  return permitted;
#else
  return false;
#endif
}

#if defined(APET_HAVE_AMX_FP16)
bool has_amx_fp16() {
  static const bool has = cpuid_bit(7, 1, kEax, 21) && amx_fp16_is_right();
  return has;
}
#endif
#endif

bool available(apet_isa isa) {
  switch (isa) {
    case APET_ISA_GENERIC: return true;
#ifdef APET_HAVE_AVX2
    case APET_ISA_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid_bit(1, 0, kEcx, 29);  // F16C
#endif
#ifdef APET_HAVE_AVX512
    case APET_ISA_AVX512:
      return available(APET_ISA_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef APET_HAVE_AVX512_BF16
    case APET_ISA_AVX512_BF16: return available(APET_ISA_AVX512) && cpuid_bit(7, 1, kEax, 5);
#endif
#ifdef APET_HAVE_AMX
#ifdef APET_TILE_EMULATION
    case APET_ISA_AMX: return amx_is_right();
    case APET_ISA_AMX_FP16: return amx_fp16_is_right();
#else
    case APET_ISA_AMX:  // its tiles, and their products of bfloat16
      return available(APET_ISA_AVX512_BF16) && cpuid_bit(7, 0, kEdx, 24) && cpuid_bit(7, 0, kEdx, 22) &&
             tiles_permitted();
#ifdef APET_HAVE_AMX_FP16
    case APET_ISA_AMX_FP16: return available(APET_ISA_AMX) && has_amx_fp16();
#endif
#endif
#endif
#ifdef APET_HAVE_NEON
    case APET_ISA_NEON: return true;
#endif
#ifdef APET_HAVE_NEON_BF16
#if defined(__linux__)
    case APET_ISA_NEON_BF16: return getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16, which older headers lack
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    case APET_ISA_NEON_BF16: return true;
#endif
#endif
    default: return false;
  }
}

constexpr apet_isa kBestFirst[] = {APET_ISA_NEON_BF16,   APET_ISA_NEON,   APET_ISA_AMX_FP16, APET_ISA_AMX,
                                   APET_ISA_AVX512_BF16, APET_ISA_AVX512, APET_ISA_AVX2};

apet_isa best() {
  static const apet_isa isa = [] {
    for (apet_isa isa : kBestFirst)
      if (available(isa)) return isa;
    return APET_ISA_GENERIC;
  }();
  return isa;
}

std::atomic<int> pinned{APET_ISA_BEST};

}  // namespace

apet_isa isa_in_use() {
  const apet_isa isa = (apet_isa)pinned.load(std::memory_order_relaxed);
  return isa == APET_ISA_BEST ? best() : isa;
}

const Kernels* kernels_for(apet_dtype dtype, apet_isa isa) {
  switch (isa) {
#ifdef APET_HAVE_AVX512_BF16
    case APET_ISA_AVX512_BF16: return avx512_bf16_kernels(dtype);
#endif
#ifdef APET_HAVE_AVX512
    case APET_ISA_AVX512: return avx512_kernels(dtype);
#endif
#ifdef APET_HAVE_AVX2
    case APET_ISA_AVX2: return avx2_kernels(dtype);
#endif
#ifdef APET_HAVE_AMX
    case APET_ISA_AMX: return amx_kernels(dtype);
#endif
#ifdef APET_HAVE_AMX_FP16
    case APET_ISA_AMX_FP16: return amx_fp16_kernels(dtype);
#endif
#ifdef APET_HAVE_NEON
    case APET_ISA_NEON: return neon_kernels(dtype);
#endif
#ifdef APET_HAVE_NEON_BF16
    case APET_ISA_NEON_BF16: return neon_bf16_kernels(dtype);
#endif
    default: return generic_kernels(dtype);
  }
}

}  // namespace apet::cpu

using namespace apet::cpu;

int apet_cpu_has_isa(apet_isa isa) { return isa == APET_ISA_BEST || available(isa); }

const char* apet_isa_name(apet_isa isa) {
  switch (isa) {
    case APET_ISA_GENERIC: return "generic";
    case APET_ISA_AVX2: return "avx2";
    case APET_ISA_AVX512: return "avx512";
    case APET_ISA_AVX512_BF16: return "avx512_bf16";
    case APET_ISA_AMX: return "amx";
    case APET_ISA_AMX_FP16: return "amx_fp16";
    case APET_ISA_NEON: return "neon";
    case APET_ISA_NEON_BF16: return "neon_bf16";
    case APET_ISA_BEST: return "best";
  }
  return "unknown";
}

apet_status apet_cpu_use_isa(apet_isa isa) {
  if (!apet_cpu_has_isa(isa)) return APET_NO_ISA;
  pinned.store(isa, std::memory_order_relaxed);
  return APET_OK;
}
