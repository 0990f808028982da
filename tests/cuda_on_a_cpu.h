// What csrc/*_cuda.cu need of CUDA, on a CPU: the threads of a block are fibers that take turns, in an order drawn anew after each
// barrier. So a missing barrier, a barrier that not all threads reach, and a store past the shared memory show on any machine;
// shared memory holds 1e30 before it is written. Used by tests/test_cuda_on_a_cpu.py.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __align__(bytes) alignas(bytes)
#define __shared__ static

struct uint4 { uint32_t x, y, z, w; };
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};              // to the nearest, ties to even
}

inline __half __float2half(float x) {                                           // of |x| < 2, all that a patch holds
    if (x != x) return {0x7fff};
    const float size = fabsf(x);
    const int exponent = size < 6.1035156e-5f ? -14 : ilogbf(size);
    const float steps = nearbyintf(ldexpf(size, 10 - exponent));                // in units of the last place
    const int bits = size < 6.1035156e-5f ? (int)steps : (int)steps - 1024 + (exponent + 15) * 1024;
    return {(uint16_t)(bits | (signbit(x) ? 0x8000 : 0))};
}

typedef const char* cudaError_t;                                                // what went wrong, or null
typedef void* cudaStream_t;
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
static const cudaError_t cudaSuccess = nullptr;

struct Place { unsigned x; };
inline Place threadIdx, blockIdx, blockDim;

namespace on_a_cpu {

enum { SHARED = 227 * 1024, GUARD = 4096, STACK = 64 * 1024, WARP = 32, UNWRITTEN = 0x71 };       // an H100's shared memory for one block
enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    State state;
    int line;                                                                   // of the barrier at which it waits
    char slot[8];                                                               // what it offers to a shuffle
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline const void* body;
inline void (*call)(const void*);
inline cudaError_t error;
inline std::mt19937 chance;
alignas(16) inline unsigned char shared[SHARED + GUARD];

inline void wait(State state, int line) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.state = state;
    fiber.line = line;
    swapcontext(&fiber.context, &scheduler);
}

inline void start() {
    call(body);
    wait(DONE, 0);
}

// Runs a block to its end, from barrier to barrier.
inline cudaError_t run_block(unsigned threads) {
    std::vector<unsigned> turns(threads);
    std::iota(turns.begin(), turns.end(), 0);
    const auto release = [&](unsigned first, unsigned last, State state) {
        bool all = true;
        for (unsigned t = first; t < last; ++t) all = all && fibers[t].state == state && fibers[t].line == fibers[first].line;
        for (unsigned t = first; all && t < last; ++t) fibers[t].state = READY;
        return all;
    };
    for (;;) {
        std::shuffle(turns.begin(), turns.end(), chance);
        for (unsigned t : turns)
            if (fibers[t].state == READY) {
                threadIdx.x = t;
                swapcontext(&scheduler, &fibers[t].context);
            }
        bool released = false;
        for (unsigned warp = 0; warp < threads; warp += WARP) released |= release(warp, warp + WARP, AT_WARP);
        if (released || release(0, threads, AT_BLOCK)) continue;
        for (unsigned t : turns)
            if (fibers[t].state != DONE) return "some threads wait at a barrier that others never reach";
        return nullptr;
    }
}

template <typename Body>
void launch(const Body& kernel, unsigned blocks, unsigned threads, int64_t bytes, cudaStream_t) {
    error = bytes > SHARED ? "more shared memory than a block has" : nullptr;
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    body = &kernel;
    blockDim.x = threads;
    call = [](const void* body) { (*(const Body*)body)(); };
    for (blockIdx.x = 0; blockIdx.x < blocks && !error; ++blockIdx.x) {
        memset(shared, UNWRITTEN, sizeof shared);
        for (unsigned t = 0; t < threads; ++t) {
            getcontext(&fibers[t].context);
            fibers[t].context.uc_stack.ss_sp = fibers[t].stack.data();
            fibers[t].context.uc_stack.ss_size = STACK;
            fibers[t].state = READY;
            makecontext(&fibers[t].context, start, 0);
        }
        error = run_block(threads);
        for (int64_t i = bytes; i < SHARED + GUARD && !error; ++i)
            if (shared[i] != UNWRITTEN) error = "a store past the shared memory";
    }
}

}  // namespace on_a_cpu

#define __syncthreads() on_a_cpu::wait(on_a_cpu::AT_BLOCK, __LINE__)

template <typename T>
T __shfl_down_sync(unsigned, T x, unsigned lanes) {
    const unsigned t = threadIdx.x, from = t % on_a_cpu::WARP + lanes < on_a_cpu::WARP ? t + lanes : t;
    memcpy(on_a_cpu::fibers[t].slot, &x, sizeof x);
    on_a_cpu::wait(on_a_cpu::AT_WARP, 0);
    memcpy(&x, on_a_cpu::fibers[from].slot, sizeof x);
    on_a_cpu::wait(on_a_cpu::AT_WARP, 0);
    return x;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = on_a_cpu::SHARED, cudaSuccess; }
struct cudaFuncAttributes { size_t sharedSizeBytes; };
template <typename Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, Kernel*) { return of->sharedSizeBytes = 2048, cudaSuccess; }
template <typename Kernel> cudaError_t cudaFuncSetAttribute(Kernel*, int, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return on_a_cpu::error; }
inline const char* cudaGetErrorString(cudaError_t error) { return error; }
