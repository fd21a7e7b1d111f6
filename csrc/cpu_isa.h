// All CPU kernels for one instruction set, in namespace SAE_ISA. The files that include this one define
//   SAE_ISA      the namespace        SAE_LANES    floats to a vector: 16, 8 or 4
//   SAE_NAME     its name as text     SAE_KERNELS  the table of cpu_kernels.h to fill
//   SAE_BF16_PAIRS, where the processor multiplies pairs of bf16
//
// No function may be shared between instruction sets, not even an inline one of the standard library: the
// linker keeps one copy of it, and that copy could be one that the processor cannot run.
namespace sae {
namespace SAE_ISA {

#include "cpu_simd.h"
#include "noise.h"
#include "cpu_attention.h"
#include "cpu_gaussian.h"
#include "cpu_norm.h"

constexpr char kName[] = SAE_NAME;

}  // namespace SAE_ISA

extern const CpuKernels SAE_KERNELS;
const CpuKernels SAE_KERNELS = {
    SAE_ISA::kName,
    SAE_ISA::attention_scratch,
    SAE_ISA::attention_forward,
    SAE_ISA::attention_backward,
    SAE_ISA::reparameterize_forward,
    SAE_ISA::reparameterize_backward,
    SAE_ISA::squared_error_forward,
    SAE_ISA::squared_error_backward,
    SAE_ISA::group_norm_moments,
    SAE_ISA::group_norm_forward,
    SAE_ISA::group_norm_sums,
    SAE_ISA::group_norm_backward};

}  // namespace sae
