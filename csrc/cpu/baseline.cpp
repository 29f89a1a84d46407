// The kernels for the compiler's default instruction set.
#include "includes.h"

#define FASTKD_ISA baseline
#define FASTKD_ISA_NAMESPACE on_baseline
#include "kernels.inl"
