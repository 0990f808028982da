// extract_patches on a GPU: one block a patch, whose pixels stay in registers from the crop to the
// store. Shared memory serves the blur, and makes 16-byte stores of the pixels. A patch of invalid
// index, crop or order becomes NaN, since finding out on the host would cost a synchronisation.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "empssl.h"
#include "pixel.h"

namespace {

enum {
    WARP = 32,
    PIXELS = 4,    // of a thread: i = threadIdx.x + q * blockDim.x for q in 0..3, row after row
    LARGEST = 64,  // side; beyond, a patch is too large for one block
    MOST_THREADS = LARGEST * LARGEST / PIXELS
};

int threads_of(int64_t s) {
    const int threads = (int)((s * s + PIXELS - 1) / PIXELS);
    return (threads + WARP - 1) / WARP * WARP;
}

int64_t shared_bytes(int64_t s) { return 3 * s * s * (int64_t)sizeof(float); }

// A thread's pixels. Those beyond the patch, which the last threads have, are black until the mean
// grey is taken, so that they add nothing to it, and are never stored.
struct Pixels {
    float r[PIXELS], g[PIXELS], b[PIXELS];

    template <typename Change>
    __device__ void operator()(const Change& change) {
#pragma unroll
        for (int q = 0; q < PIXELS; ++q) change(r[q], g[q], b[q]);
    }
};

// Where pixel i of a patch lies. A division of whole numbers takes twenty instructions. This one is
// of floats, and exact: i is below 4096, and the half that is added keeps the quotient a 128th from
// the next whole number.
__device__ void find(int i, int s, int& row, int& column) {
    row = (int)(((float)i + 0.5f) * (1.0f / (float)s));
    column = i - row * s;
}

// The taps of each row or column of the patch, flipped if it is. Each is read as 16 bytes at once.
struct alignas(16) Axis {
    Taps taps[LARGEST];
};

// Once a block at most, as a patch has one contrast: a second call would overwrite `part` while
// other threads still read it.
__device__ float mean_grey(const Pixels& x, int pixels) {
    __shared__ float part[MOST_THREADS / WARP];
    float sum = 0;
#pragma unroll
    for (int q = 0; q < PIXELS; ++q) sum += grey_of(x.r[q], x.g[q], x.b[q]);
    // Over the warp, whose first lane ends with the sum, and then over all warps.
    for (int lanes = WARP / 2; lanes; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = sum;
    __syncthreads();
    float total = 0;
    // Every thread adds them in the same order, so that all have the same mean.
    for (int warp = 0; warp < blockDim.x / WARP; ++warp) total += part[warp];
    return total / pixels;
}

// x / 255 as exactly as a division gives it.
__device__ float of_255(float x) {
    const float quotient = x * (1 / 255.0f);
    return fmaf(fmaf(-255.0f, quotient, x), 1 / 255.0f, quotient);
}

__device__ void crop(const PatchJob& job, const uint8_t* corner, const float* p, const Axis& down,
                     const Axis& across, Pixels& x) {
    const int s = (int)job.s;
    const float down_step = tap_step((int)p[HEIGHT], s);
    const float across_step = tap_step((int)p[WIDTH], s);
#pragma unroll
    for (int q = 0; q < PIXELS; ++q) {
        int row, column;
        find(threadIdx.x + q * blockDim.x, s, row, column);
        x.r[q] = x.g[q] = x.b[q] = 0;
        if (row >= s) continue;
        const Taps v = down.taps[row];
        const Taps h = across.taps[column];
        // Row by row of the input, so that rounding grows with the crop's sides, not with its area.
        // There are two taps as a rule: unrolling would cost more than it saves.
        const uint8_t* line = corner + v.first * job.stride_h + h.first * job.stride_w;
#pragma unroll 1
        for (int u = 0; u < v.count; ++u, line += job.stride_h) {
            float r = 0, g = 0, b = 0;
            const uint8_t* at = line;
#pragma unroll 1
            for (int t = 0; t < h.count; ++t, at += job.stride_w) {
                const float w = tap_weight(h.start, across_step, t);
                r += w * at[0];
                g += w * at[job.stride_c];
                b += w * at[2 * job.stride_c];
            }
            const float w = tap_weight(v.start, down_step, u);
            x.r[q] += w * r;
            x.g[q] += w * g;
            x.b[q] += w * b;
        }
        const float scale = v.inverse_sum * h.inverse_sum;
        x.r[q] = of_255(x.r[q] * scale);
        x.g[q] = of_255(x.g[q] * scale);
        x.b[q] = of_255(x.b[q] * scale);
    }
}

// The blur in one direction. Tap t of the pixel at `place` of a line reads that line at
// mirror[place + t]. As those are other threads' pixels, `plane` (s, s, 3) is in shared memory.
template <bool DOWN>
__device__ void blur_along(const float* weight, const int* mirror, int s, float* plane, Pixels& x) {
    // The weights are there, and nobody reads the plane any more.
    __syncthreads();
#pragma unroll
    for (int q = 0; q < PIXELS; ++q) {
        const int i = threadIdx.x + q * blockDim.x;
        if (i >= s * s) continue;
        plane[3 * i] = x.r[q];
        plane[3 * i + 1] = x.g[q];
        plane[3 * i + 2] = x.b[q];
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < PIXELS; ++q) {
        int row, column;
        find(threadIdx.x + q * blockDim.x, s, row, column);
        if (row >= s) continue;
        float r = 0, g = 0, b = 0;
        for (int t = 0; t < BLUR_TAPS; ++t) {
            const int i = DOWN ? mirror[row + t] * s + column : row * s + mirror[column + t];
            const float* from = plane + 3 * i;
            r += weight[t] * from[0];
            g += weight[t] * from[1];
            b += weight[t] * from[2];
        }
        x.r[q] = r;
        x.g[q] = g;
        x.b[q] = b;
    }
}

__device__ void blur(float sigma, int s, float* plane, Pixels& x) {
    __shared__ float unscaled[BLUR_TAPS];
    __shared__ float weight[BLUR_TAPS];
    __shared__ int mirror[LARGEST + 2 * BLUR_RADIUS];
    if (threadIdx.x < BLUR_TAPS) unscaled[threadIdx.x] = blur_weight(sigma, threadIdx.x);
    for (int i = threadIdx.x; i < s + 2 * BLUR_RADIUS; i += blockDim.x) {
        mirror[i] = reflected(i - BLUR_RADIUS, s);
    }
    __syncthreads();
    if (threadIdx.x < BLUR_TAPS) {
        float sum = 0;
        for (int t = 0; t < BLUR_TAPS; ++t) sum += unscaled[t];
        weight[threadIdx.x] = unscaled[threadIdx.x] / sum;
    }
    blur_along<false>(weight, mirror, s, plane, x);
    blur_along<true>(weight, mirror, s, plane, x);
    __syncthreads();  // the plane is free again
}

__device__ void convert(float x, float* out) { *out = x; }
__device__ void convert(float x, __nv_bfloat16* out) { *out = __float2bfloat16(x); }
__device__ void convert(float x, __half* out) { *out = __float2half(x); }

// Channels-last, by way of shared memory: 16 bytes a store where the patch's place and size allow.
template <typename Out>
__device__ void store(const Pixels& x, int pixels, Out* staged, Out* out) {
#pragma unroll
    for (int q = 0; q < PIXELS; ++q) {
        const int i = threadIdx.x + q * blockDim.x;
        if (i >= pixels) continue;
        convert(x.r[q], staged + 3 * i);
        convert(x.g[q], staged + 3 * i + 1);
        convert(x.b[q], staged + 3 * i + 2);
    }
    __syncthreads();
    const int count = 3 * pixels;
    const int in_a_word = sizeof(uint4) / sizeof(Out);
    if (count % in_a_word == 0 && (uintptr_t)out % sizeof(uint4) == 0) {
        for (int j = threadIdx.x; j < count / in_a_word; j += blockDim.x) {
            ((uint4*)out)[j] = ((const uint4*)staged)[j];
        }
    } else {
        for (int j = threadIdx.x; j < count; j += blockDim.x) out[j] = staged[j];
    }
}

template <typename Out>
__global__ void __launch_bounds__(MOST_THREADS)
    extract_patches_kernel(const __grid_constant__ PatchJob job) {
    extern __shared__ __align__(16) unsigned char memory[];  // shared_bytes(s): see blur and store
    __shared__ float p[K];
    __shared__ Axis down, across;
    const int64_t patch = blockIdx.x;
    const int s = (int)job.s;
    const int pixels = s * s;
    if (threadIdx.x < K) p[threadIdx.x] = job.params[patch * K + threadIdx.x];
    __syncthreads();
    const int64_t image = job.index[patch % job.b];
    Pixels x = {};
    if (image >= 0 && image < job.N && patch_is_valid(p, job.H, job.W)) {
        // The first s threads find the taps of the rows, the next those of the columns.
        for (int i = threadIdx.x; i < 2 * s; i += blockDim.x) {
            const int place = i < s ? i : i - s;
            if (i < s) {
                down.taps[place] = taps_of<int>(place, (int)p[HEIGHT], s);
            } else {
                const Taps taps = taps_of<int>(place, (int)p[WIDTH], s);
                across.taps[p[FLIP] > 0 ? s - 1 - place : place] = taps;
            }
        }
        __syncthreads();
        const uint8_t* corner = job.images + image * job.stride_n +
                                (int64_t)p[TOP] * job.stride_h + (int64_t)p[LEFT] * job.stride_w;
        crop(job, corner, p, down, across, x);
        const auto each = [&](const auto& change) { x(change); };
        recolour(p, each, [&] { return mean_grey(x, pixels); });
        if (p[SIGMA] > 0) blur(p[SIGMA], s, (float*)memory, x);
        finish(p, each);
    } else {
        x([](float& r, float& g, float& b) { r = g = b = nanf(""); });
    }
    store(x, pixels, (Out*)memory, (Out*)job.out + patch * 3 * pixels);
}

template <typename Out>
cudaError_t launch(const PatchJob& job, cudaStream_t stream) {
    // Allow the shared memory that any size needs, at every launch: so host threads that launch
    // different sizes do not undo each other's settings.
    const int64_t most = shared_bytes(extract_patches_cuda_largest());
    const cudaError_t error =
        cudaFuncSetAttribute(extract_patches_kernel<Out>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, (int)most);
    if (error != cudaSuccess) return error;
    const unsigned patches = (unsigned)(job.n * job.b);
    const int threads = threads_of(job.s);
    extract_patches_kernel<Out><<<patches, threads, shared_bytes(job.s), stream>>>(job);
    return cudaGetLastError();
}

}  // namespace

int64_t extract_patches_cuda_largest() {
    const auto of_a_block = cudaDevAttrMaxSharedMemoryPerBlockOptin;
    int device = 0, limit = 0;
    cudaFuncAttributes kernel;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&limit, of_a_block, device) != cudaSuccess ||
        cudaFuncGetAttributes(&kernel, extract_patches_kernel<float>) != cudaSuccess)
        return 0;
    int64_t s = LARGEST;
    while (s > 0 && shared_bytes(s) + (int64_t)kernel.sharedSizeBytes > limit) --s;
    return s;
}

const char* extract_patches_cuda(const PatchJob& job, void* stream) {
    if (job.n * job.b == 0) return nullptr;
    cudaError_t error;
    if (job.out_type == OUT_FLOAT32) {
        error = launch<float>(job, (cudaStream_t)stream);
    } else if (job.out_type == OUT_BFLOAT16) {
        error = launch<__nv_bfloat16>(job, (cudaStream_t)stream);
    } else {
        error = launch<__half>(job, (cudaStream_t)stream);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
