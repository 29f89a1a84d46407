// The kernels for x86-64-v3 processors (AVX2).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include "includes.h"

#pragma GCC target("arch=x86-64-v3")
#define FASTKD_ISA avx2
#define FASTKD_ISA_NAMESPACE on_avx2
#include "kernels.inl"
#endif
