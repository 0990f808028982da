// What the kernels are handed: plain pointers and sizes, checked by empssl_support/ops.py and again by bindings.cpp.
#pragma once

#include <stdint.h>

enum OutType { OUT_FLOAT32, OUT_BFLOAT16, OUT_FLOAT16 };

struct PatchJob {
    const uint8_t* images;                  // (N, 3, H, W), any strides, in elements
    int64_t N, H, W, stride_n, stride_c, stride_h, stride_w;
    const int64_t* index;                   // (b,)
    const float* params;                    // (n, b, K), contiguous
    int64_t n, b, s;
    void* out;                              // (n*b, s, s, 3), contiguous: channels-last
    OutType out_type;
};

// CPU: patches [from, to), with one thread's scratch memory of patch_scratch_floats(job) floats.
int64_t patch_scratch_floats(const PatchJob& job);
void extract_patches_baseline(const PatchJob& job, int64_t from, int64_t to, float* scratch);
void extract_patches_avx2(const PatchJob& job, int64_t from, int64_t to, float* scratch);
void extract_patches_avx512(const PatchJob& job, int64_t from, int64_t to, float* scratch);

// CPU: one symmetric positive definite matrix; only its lower triangle is read. NaN where it is not one.
template <typename T> void logdet_spd_baseline(const T* A, int64_t k, T* logdet, T* inverse, T* column);
template <typename T> void logdet_spd_avx2(const T* A, int64_t k, T* logdet, T* inverse, T* column);

// CUDA: launched on `stream` of the current device, nothing is synchronised. Null on success, else what went wrong.
const char* extract_patches_cuda(const PatchJob& job, void* stream);
int64_t extract_patches_cuda_largest();                     // largest s whose patch fits the current device's shared memory
template <typename T>
const char* logdet_spd_cuda(const T* A, int64_t n, int64_t k, T* logdet, T* inverse, void* stream);
int64_t logdet_spd_cuda_largest(int64_t element_bytes);     // largest k that fits the current device's shared memory
