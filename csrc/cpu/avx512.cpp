// The kernels for x86-64-v4 processors (AVX-512).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include "includes.h"

#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FASTKD_ISA avx512
#define FASTKD_ISA_NAMESPACE on_avx512
#include "kernels.inl"
#endif
