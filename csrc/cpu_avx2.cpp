// For AVX2, whatever the compiler's flags are; used where the processor has it.
#include "cpu_kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define SAE_ISA avx2
#define SAE_NAME "avx2"
#define SAE_LANES 8
#define SAE_KERNELS kCpuAvx2
#include "cpu_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
