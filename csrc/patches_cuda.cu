// extract_patches on a GPU: one block a patch, staged in shared memory from the crop to the store. One read of the image,
// one write of the patch. A patch whose index or crop is invalid becomes NaN: finding out on the host would cost a
// synchronisation.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "empssl.h"
#include "pixel.h"

namespace {

enum { THREADS = 256 };

__device__ float block_sum(float x) {
    __shared__ float part[THREADS / 32];
    for (int lane = 16; lane; lane /= 2) x += __shfl_down_sync(~0u, x, lane);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < THREADS / 32; ++warp) sum += part[warp];              // every thread, in one order
    __syncthreads();
    return sum;
}

__device__ void crop(const PatchJob& job, const uint8_t* image, const float* p, float* plane) {
    const int s = (int)job.s, pixels = s * s;
    for (int i = threadIdx.x; i < pixels; i += THREADS) {
        const int y = i / s, x = i % s;
        const Taps down = taps_of(y, (int)p[HEIGHT], s);
        const Taps across = taps_of(p[FLIP] > 0 ? s - 1 - x : x, (int)p[WIDTH], s);
        float sum[3] = {0, 0, 0}, down_sum = 0, across_sum = 0;
        for (int u = down.first; u < down.last; ++u) {
            const float w = triangle(down, u);
            down_sum += w;
            const uint8_t* row = image + ((int64_t)p[TOP] + u) * job.stride_h + (int64_t)p[LEFT] * job.stride_w;
            float line[3] = {0, 0, 0};              // row by row, so that rounding grows with the sides, not with the area
            across_sum = 0;
            for (int v = across.first; v < across.last; ++v) {
                const float weight = triangle(across, v);
                across_sum += weight;
                for (int c = 0; c < 3; ++c) line[c] += weight * row[c * job.stride_c + v * job.stride_w];
            }
            for (int c = 0; c < 3; ++c) sum[c] += w * line[c];
        }
        for (int c = 0; c < 3; ++c) plane[c * pixels + i] = sum[c] / across_sum / down_sum / 255.0f;
    }
}

// Each thread touches only its own pixels, so a barrier is needed for the contrast's mean alone.
__device__ void jitter(const float* p, float* r, float* g, float* b, int pixels) {
    int order[4];
    unpack_order((int)p[ORDER], order);
    for (int step = 0; step < 4; ++step) {
        if (order[step] == 0 && p[BRIGHTNESS] != 1) {
            const float f = p[BRIGHTNESS];
            for (int i = threadIdx.x; i < pixels; i += THREADS) {
                r[i] = clamp01(f * r[i]);
                g[i] = clamp01(f * g[i]);
                b[i] = clamp01(f * b[i]);
            }
        } else if (order[step] == 1 && p[CONTRAST] != 1) {
            float sum = 0;
            for (int i = threadIdx.x; i < pixels; i += THREADS) sum += grey_of(r[i], g[i], b[i]);
            const float f = p[CONTRAST], mean = block_sum(sum) / pixels;
            for (int i = threadIdx.x; i < pixels; i += THREADS) {
                r[i] = blend(r[i], mean, f);
                g[i] = blend(g[i], mean, f);
                b[i] = blend(b[i], mean, f);
            }
        } else if (order[step] == 2 && p[SATURATION] != 1) {
            const float f = p[SATURATION];
            for (int i = threadIdx.x; i < pixels; i += THREADS) {
                const float grey = grey_of(r[i], g[i], b[i]);
                r[i] = blend(r[i], grey, f);
                g[i] = blend(g[i], grey, f);
                b[i] = blend(b[i], grey, f);
            }
        } else if (order[step] == 3 && p[HUE] != 0) {
            const float sixths = hue_sixths(p[HUE]);
            for (int i = threadIdx.x; i < pixels; i += THREADS) rotate_hue(r[i], g[i], b[i], sixths);
        }
    }
}

__device__ void blur(float sigma, float* plane, int s, float* spare) {
    float weight[BLUR_TAPS];
    blur_taps(sigma, weight);
    for (int c = 0; c < 3; ++c) {
        float* x = plane + c * s * s;
        __syncthreads();
        for (int i = threadIdx.x; i < s * s; i += THREADS) {
            const int row = i / s, column = i % s;
            float sum = 0;
#pragma unroll
            for (int t = 0; t < BLUR_TAPS; ++t) sum += weight[t] * x[row * s + reflected(column + t - BLUR_RADIUS, s)];
            spare[i] = sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < s * s; i += THREADS) {
            const int row = i / s, column = i % s;
            float sum = 0;
#pragma unroll
            for (int t = 0; t < BLUR_TAPS; ++t) sum += weight[t] * spare[reflected(row + t - BLUR_RADIUS, s) * s + column];
            x[i] = sum;
        }
    }
}

__device__ float convert(float x, float*) { return x; }
__device__ __nv_bfloat16 convert(float x, __nv_bfloat16*) { return __float2bfloat16(x); }
__device__ __half convert(float x, __half*) { return __float2half(x); }

// Channels-last, 16 bytes a store where the patch's place allows it.
template <typename Out>
__device__ void store(const float* plane, int pixels, Out* out, bool wide) {
    enum { WIDE = 16 / sizeof(Out) };
    const int count = 3 * pixels;
    if (wide) {
        for (int i = threadIdx.x * WIDE; i < count; i += THREADS * WIDE) {
            alignas(16) Out values[WIDE];
#pragma unroll
            for (int j = 0; j < WIDE; ++j) values[j] = convert(plane[(i + j) % 3 * pixels + (i + j) / 3], (Out*)nullptr);
            *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<const uint4*>(values);
        }
    } else {
        for (int i = threadIdx.x; i < count; i += THREADS) out[i] = convert(plane[i % 3 * pixels + i / 3], (Out*)nullptr);
    }
}

template <typename Out>
__global__ void __launch_bounds__(THREADS) extract_patches_kernel(const __grid_constant__ PatchJob job) {
    extern __shared__ float plane[];                                                // (4, s, s): r, g, b, spare
    const int64_t patch = blockIdx.x;
    const int s = (int)job.s, pixels = s * s;
    float *r = plane, *g = r + pixels, *b = g + pixels, *spare = b + pixels;
    __shared__ float p[K];
    if (threadIdx.x < K) p[threadIdx.x] = job.params[patch * K + threadIdx.x];
    __syncthreads();
    const int64_t image = job.index[patch % job.b];
    if (image >= 0 && image < job.N && patch_is_valid(p, job.H, job.W)) {
        crop(job, job.images + image * job.stride_n, p, plane);
        jitter(p, r, g, b, pixels);
        if (p[GREY] > 0)
            for (int i = threadIdx.x; i < pixels; i += THREADS) r[i] = g[i] = b[i] = grey_of(r[i], g[i], b[i]);
        if (p[SIGMA] > 0) blur(p[SIGMA], plane, s, spare);
        const bool solarize = p[SOLARIZE] > 0;
        for (int i = threadIdx.x; i < pixels; i += THREADS)
            for (int c = 0; c < 3; ++c) {
                const float x = plane[c * pixels + i];
                plane[c * pixels + i] = (solarize ? solarized(x) : x) * 2 - 1;
            }
    } else {
        for (int i = threadIdx.x; i < 3 * pixels; i += THREADS) plane[i] = nanf("");
    }
    __syncthreads();
    const int64_t start = patch * 3 * pixels;
    Out* out = (Out*)job.out + start;
    store(plane, pixels, out, (3 * pixels * sizeof(Out)) % 16 == 0 && (uintptr_t)job.out % 16 == 0);
}

int64_t shared_bytes(int64_t s) { return 4 * (int64_t)sizeof(float) * s * s; }

template <typename Out>
cudaError_t launch(const PatchJob& job, cudaStream_t stream) {
    const int64_t most = extract_patches_cuda_largest();    // allowed once and for all sizes: threads may launch different ones
    cudaFuncSetAttribute(extract_patches_kernel<Out>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes(most));
    cudaGetLastError();                                     // where that failed, the launch says so
    extract_patches_kernel<Out><<<(unsigned)(job.n * job.b), THREADS, shared_bytes(job.s), stream>>>(job);
    return cudaGetLastError();
}

}  // namespace

int64_t extract_patches_cuda_largest() {
    int device = 0, limit = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return 0;
    const int64_t fixed = 512;                              // the kernel's static shared memory, rounded up
    int64_t s = 64;                                         // beyond, a block's patch is too large to be worth it
    while (s > 0 && shared_bytes(s) + fixed > limit) --s;
    return s;
}

const char* extract_patches_cuda(const PatchJob& job, void* stream) {
    if (job.n * job.b == 0) return nullptr;
    cudaError_t error = job.out_type == OUT_FLOAT32    ? launch<float>(job, (cudaStream_t)stream)
                        : job.out_type == OUT_BFLOAT16 ? launch<__nv_bfloat16>(job, (cudaStream_t)stream)
                                                       : launch<__half>(job, (cudaStream_t)stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
