// Four lanes, for processors without AVX2 and other architectures (NEON on Arm).
#include "cpu_kernels.h"
#include <cmath>
#include <cstring>
#define SAE_ISA generic
#define SAE_NAME "generic"
#define SAE_LANES 4
#define SAE_KERNELS kCpuGeneric
#include "cpu_isa.h"
