// logdet_spd on a GPU: one block a matrix, which never leaves shared memory between the load and the store.
#include <cuda_runtime.h>

#include "empssl.h"

namespace {

enum { THREADS = 256 };

__host__ __device__ int64_t padded(int64_t k) { return k | 1; }         // odd: a column's elements fall in all banks
int64_t shared_bytes(int64_t k, int64_t element) { return (k * padded(k) + k) * element; }

// L takes the place of A's lower triangle; W = L^-1 grows, transposed, in the upper one, its diagonal apart; A^-1 = W^T W.
template <typename T>
__global__ void __launch_bounds__(THREADS) logdet_spd_kernel(const T* A, int k, T* logdet, T* inverse) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int ld = (int)padded(k);
    T *S = (T*)memory, *diagonal = S + k * ld;                          // (k, ld), (k,): 1 / L[i][i]
    A += (int64_t)blockIdx.x * k * k;
    inverse += (int64_t)blockIdx.x * k * k;
    for (int e = threadIdx.x; e < k * k; e += THREADS) {
        const int i = e / k, j = e % k;
        S[i * ld + j] = j <= i ? A[e] : T(0);
    }
    __syncthreads();
    for (int j = 0; j < k; ++j) {
        const T pivot = S[j * ld + j];
        if (!(pivot > 0) || !isfinite(pivot)) {                         // the same for every thread of the block
            if (threadIdx.x == 0) logdet[blockIdx.x] = T(nan(""));
            for (int e = threadIdx.x; e < k * k; e += THREADS) inverse[e] = T(nan(""));
            return;
        }
        const T scale = T(1) / sqrt(pivot);
        if (threadIdx.x == 0) diagonal[j] = scale;
        for (int i = j + 1 + threadIdx.x; i < k; i += THREADS) S[i * ld + j] *= scale;
        __syncthreads();
        const int rest = k - j - 1;
        for (int e = threadIdx.x; e < rest * rest; e += THREADS) {
            const int i = j + 1 + e / rest, l = j + 1 + e % rest;
            if (l <= i) S[i * ld + l] -= S[i * ld + j] * S[l * ld + j];
        }
        __syncthreads();
    }
    if (threadIdx.x < 32) {                                             // the pivots still stand on the diagonal
        double sum = 0;
        for (int j = threadIdx.x; j < k; j += 32) sum += log((double)S[j * ld + j]);
        for (int lane = 16; lane; lane /= 2) sum += __shfl_down_sync(~0u, sum, lane);
        if (threadIdx.x == 0) logdet[blockIdx.x] = T(sum);
    }
    for (int j = 0; j < k; ++j) {                                       // row j of W, then its share of the rows below
        for (int c = threadIdx.x; c < j; c += THREADS) S[c * ld + j] *= diagonal[j];
        __syncthreads();
        const int rest = k - j - 1;
        for (int e = threadIdx.x; e < rest * (j + 1); e += THREADS) {
            const int i = j + 1 + e % rest, c = e / rest;
            S[c * ld + i] -= S[i * ld + j] * (c < j ? S[c * ld + j] : diagonal[j]);
        }
        __syncthreads();
    }
    for (int e = threadIdx.x; e < k * k; e += THREADS) {
        const int i = e / k, l = e % k;
        if (l > i) continue;
        T product = diagonal[i] * (l < i ? S[l * ld + i] : diagonal[i]);
        for (int r = i + 1; r < k; ++r) product += S[i * ld + r] * S[l * ld + r];
        inverse[i * k + l] = product;
        inverse[l * k + i] = product;
    }
}

}  // namespace

int64_t logdet_spd_cuda_largest(int64_t element_bytes) {
    int device = 0, limit = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return 0;
    int64_t k = 0;
    while (shared_bytes(k + 1, element_bytes) <= limit) ++k;
    return k;
}

template <typename T>
const char* logdet_spd_cuda(const T* A, int64_t n, int64_t k, T* logdet, T* inverse, void* stream) {
    if (n == 0) return nullptr;
    const int64_t most = shared_bytes(logdet_spd_cuda_largest(sizeof(T)), sizeof(T));   // as in patches_cuda.cu
    cudaFuncSetAttribute(logdet_spd_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)most);
    cudaGetLastError();
    logdet_spd_kernel<T><<<(unsigned)n, THREADS, shared_bytes(k, sizeof(T)), (cudaStream_t)stream>>>(A, (int)k, logdet, inverse);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* logdet_spd_cuda(const float*, int64_t, int64_t, float*, float*, void*);
template const char* logdet_spd_cuda(const double*, int64_t, int64_t, double*, double*, void*);
