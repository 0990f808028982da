// What the kernels are handed: plain pointers and sizes. empssl_support/ops.py checks what they
// describe, and bindings.cpp checks again what would lead a pointer out of its memory.
#pragma once

#include <stdint.h>

enum OutType { OUT_FLOAT32, OUT_BFLOAT16, OUT_FLOAT16 };

// n patches of each of b images; patch i belongs to image index[i % b].
struct PatchJob {
    const uint8_t* images;  // (N, 3, H, W)
    int64_t N, H, W;
    int64_t stride_n, stride_c, stride_h, stride_w;  // of images, in elements; any will do
    const int64_t* index;                            // (b,)
    const float* params;                             // (n, b, K), contiguous
    int64_t n, b, s;
    void* out;  // (n*b, s, s, 3), contiguous: channels-last
    OutType out_type;
};

// ---- CPU, for each instruction set ----

// Cuts patches [from, to). `scratch` is memory of this thread's own, patch_scratch_floats(job)
// floats of it.
void extract_patches_baseline(const PatchJob& job, int64_t from, int64_t to, float* scratch);
void extract_patches_avx2(const PatchJob& job, int64_t from, int64_t to, float* scratch);
void extract_patches_avx512(const PatchJob& job, int64_t from, int64_t to, float* scratch);
int64_t patch_scratch_floats(const PatchJob& job);

// The log-determinant and the inverse of one symmetric positive definite matrix A (k, k), of which
// only the lower triangle is read. Both are NaN where A is not one. `column` is memory for k
// numbers.
template <typename T>
void logdet_spd_baseline(const T* A, int64_t k, T* logdet, T* inverse, T* column);
template <typename T>
void logdet_spd_avx2(const T* A, int64_t k, T* logdet, T* inverse, T* column);

// ---- CUDA ----
// Both launch on `stream` of the current device, and synchronise nothing. They return null, or what
// went wrong.

const char* extract_patches_cuda(const PatchJob& job, void* stream);
template <typename T>  // n matrices
const char* logdet_spd_cuda(const T* A, int64_t n, int64_t k, T* logdet, T* inverse, void* stream);

// The largest s of a patch, which is at most 64 for one block's threads, and the largest k of a
// matrix, that fit the current device's shared memory.
int64_t extract_patches_cuda_largest();
int64_t logdet_spd_cuda_largest(int64_t element_bytes);
