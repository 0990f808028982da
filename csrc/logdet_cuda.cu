// logdet_spd on a GPU: one block a matrix, which stays in shared memory from the load to the store.
//
// The symmetric sweep operator (Goodnight, 1979): sweeping each pivot in turn makes A into -A^-1 in
// its own place, and the pivots that are met are the squares of the Cholesky factor's diagonal, so
// that the log-determinant is the sum of their logarithms. Sweeping p replaces
//     A[p][p]  by  -1 / A[p][p]
//     A[i][p]  by  A[i][p] / A[p][p]
//     A[i][j]  by  A[i][j] - A[i][p] A[p][j] / A[p][p]
#include <cuda_runtime.h>

#include "empssl.h"

namespace {

enum { WARP = 32, WARPS = 8, THREADS = WARP * WARPS };

// The length of a row in shared memory: odd, so that a column's elements fall in all banks.
__host__ __device__ int64_t padded(int64_t k) { return k | 1; }

int64_t shared_bytes(int64_t k, int64_t element) { return (k * padded(k) + 2 * k) * element; }

template <typename T>
__global__ void __launch_bounds__(THREADS)
    logdet_spd_kernel(const T* A, int k, T* logdet, T* inverse) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int ld = (int)padded(k);
    T* S = (T*)memory;        // (k, ld); what lies above its diagonal is carried along, never used
    T* column = S + k * ld;   // (k,)
    T* pivots = column + k;   // (k,)
    A += (int64_t)blockIdx.x * k * k;
    inverse += (int64_t)blockIdx.x * k * k;

    // A warp takes a row, and its lanes take the columns.
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    for (int i = warp; i < k; i += WARPS) {
        for (int j = lane; j < k; j += WARP) S[i * ld + j] = A[i * k + j];
    }
    for (int p = 0; p < k; ++p) {
        // Take the pivot's row and column out and leave zeros. With -1 for the pivot itself, one
        // formula serves all elements.
        __syncthreads();
        for (int i = threadIdx.x; i < k; i += THREADS) {
            T& element = i < p ? S[p * ld + i] : S[i * ld + p];
            if (i == p) pivots[p] = element;
            column[i] = i == p ? T(-1) : element;
            element = 0;
        }
        __syncthreads();
        const T pivot = pivots[p];
        // Not positive definite: every thread of the block finds that and leaves.
        if (!(pivot > 0) || !isfinite(pivot)) {
            if (threadIdx.x == 0) logdet[blockIdx.x] = T(nan(""));
            for (int e = threadIdx.x; e < k * k; e += THREADS) inverse[e] = T(nan(""));
            return;
        }
        const T scale = T(1) / pivot;
        for (int j = lane; j < k; j += WARP) {
            const T factor = column[j] * scale;
            // From the row where this warp's 32 columns meet the diagonal; what that changes above
            // the diagonal does not count.
            for (int i = j - lane + warp; i < k; i += WARPS) S[i * ld + j] -= column[i] * factor;
        }
    }
    __syncthreads();
    for (int i = warp; i < k; i += WARPS) {
        for (int j = lane; j < k; j += WARP) {
            inverse[i * k + j] = -(j <= i ? S[i * ld + j] : S[j * ld + i]);
        }
    }
    if (warp == 0) {
        double sum = 0;
        for (int p = lane; p < k; p += WARP) sum += log((double)pivots[p]);
        for (int lanes = WARP / 2; lanes; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
        if (lane == 0) logdet[blockIdx.x] = T(sum);
    }
}

}  // namespace

int64_t logdet_spd_cuda_largest(int64_t element_bytes) {
    const auto of_a_block = cudaDevAttrMaxSharedMemoryPerBlockOptin;
    int device = 0, limit = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&limit, of_a_block, device) != cudaSuccess)
        return 0;
    int64_t k = 0;
    while (shared_bytes(k + 1, element_bytes) <= limit) ++k;
    return k;
}

template <typename T>
const char* logdet_spd_cuda(const T* A, int64_t n, int64_t k, T* logdet, T* inverse, void* stream) {
    if (n == 0) return nullptr;
    // Allow the shared memory that any size needs, at every launch: so host threads that launch
    // different sizes do not undo each other's settings.
    const int64_t most = shared_bytes(logdet_spd_cuda_largest(sizeof(T)), sizeof(T));
    cudaError_t error = cudaFuncSetAttribute(
        logdet_spd_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)most);
    if (error == cudaSuccess) {
        const int64_t bytes = shared_bytes(k, sizeof(T));
        logdet_spd_kernel<T>
            <<<(unsigned)n, THREADS, bytes, (cudaStream_t)stream>>>(A, (int)k, logdet, inverse);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* logdet_spd_cuda(const float*, int64_t, int64_t, float*, float*, void*);
template const char* logdet_spd_cuda(const double*, int64_t, int64_t, double*, double*, void*);
