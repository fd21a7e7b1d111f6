// For AVX-512, whatever the compiler's flags are; used where the processor has it.
#include "cpu_kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define SAE_ISA avx512
#define SAE_NAME "avx512"
#define SAE_LANES 16
#define SAE_KERNELS kCpuAvx512
#include "cpu_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
