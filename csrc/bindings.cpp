// The private module _empssl: it hands pointers and sizes from Python to the kernels, and releases
// the GIL. It checks again what would lead a pointer out of its memory: sizes and, on a CPU, each
// index and crop. It includes no header of torch, so that one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "empssl.h"
#include "pixel.h"

namespace py = pybind11;

namespace {

// ---- instruction sets ----

#if defined(EMPSSL_X86)
enum Isa { BASELINE, AVX2, AVX512 };

Isa best_isa() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? AVX2 : BASELINE;
}

Isa isa = best_isa();
#define EMPSSL_PICK(name) \
    (isa == AVX512 ? name##_avx512 : isa == AVX2 ? name##_avx2 : name##_baseline)
// Wider vectors are no faster here.
#define EMPSSL_PICK_LOGDET(T) (isa == BASELINE ? logdet_spd_baseline<T> : logdet_spd_avx2<T>)
#else
#define EMPSSL_PICK(name) name##_baseline
#define EMPSSL_PICK_LOGDET(T) logdet_spd_baseline<T>
#endif

std::string isa_name(const std::string& op) {
#if defined(EMPSSL_X86)
    if (isa == BASELINE) return "baseline";
    return isa == AVX512 && op == "extract_patches" ? "avx512" : "avx2";
#else
    return "baseline";
#endif
}

// For tests: run a narrower instruction set than the machine has. False where the machine lacks it.
bool use_isa(const std::string& name) {
#if defined(EMPSSL_X86)
    const char* names[] = {"baseline", "avx2", "avx512"};
    for (Isa wanted : {BASELINE, AVX2, AVX512}) {
        if (name == names[wanted] && wanted <= best_isa()) {
            isa = wanted;
            return true;
        }
    }
    return false;
#else
    return name == "baseline";
#endif
}

// ---- checks and threads ----

void require(bool condition, const char* sentence) {
    if (!condition) throw std::invalid_argument(sentence);
}

// work(from, to) over [0, count) in blocks, on up to `threads` threads, this one among them. Each
// takes the next block when it is done with one.
template <typename Work>
void in_parallel(int64_t count, int64_t block, int threads, const Work& work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto loop = [&] {
        try {
            for (int64_t from; (from = next.fetch_add(block)) < count;) {
                work(from, std::min(from + block, count));
            }
        } catch (...) {
            failed = true;
        }
    };
    const int64_t blocks = (count + block - 1) / block;
    const int64_t wanted = std::max<int64_t>(std::min<int64_t>(threads, blocks) - 1, 0);
    std::vector<std::thread> others;
    others.reserve((size_t)wanted);
    try {
        while ((int64_t)others.size() < wanted) others.emplace_back(loop);
    } catch (const std::system_error&) {
        // There are no more threads to be had; those that there are do the work.
    }
    loop();
    for (auto& other : others) other.join();
    if (failed) throw std::bad_alloc();  // nothing else can go wrong in a kernel
}

// ---- extract_patches ----

PatchJob patch_job(uintptr_t images, std::vector<int64_t> shape, std::vector<int64_t> strides,
                   uintptr_t index, uintptr_t params, int64_t n, int64_t b, int64_t s,
                   uintptr_t out, int out_type) {
    require(shape.size() == 4 && strides.size() == 4 && shape[1] == 3,
            "images must be (N, 3, H, W)");
    require(shape[0] >= 0 && shape[2] >= 1 && shape[3] >= 1 && shape[2] < (1 << 20) &&
                shape[3] < (1 << 20),
            "image size out of range");
    require(n >= 0 && b >= 0 && s >= 1 && s <= (1 << 14), "patch sizes out of range");
    require(n * b == 0 || (images && index && params && out), "null pointer");
    require(out_type >= OUT_FLOAT32 && out_type <= OUT_FLOAT16, "unknown output type");
    PatchJob job;
    job.images = (const uint8_t*)images;
    job.N = shape[0];
    job.H = shape[2];
    job.W = shape[3];
    job.stride_n = strides[0];
    job.stride_c = strides[1];
    job.stride_h = strides[2];
    job.stride_w = strides[3];
    job.index = (const int64_t*)index;
    job.params = (const float*)params;
    job.n = n;
    job.b = b;
    job.s = s;
    job.out = (void*)out;
    job.out_type = (OutType)out_type;
    return job;
}

void extract_patches_cpu(uintptr_t images, std::vector<int64_t> shape, std::vector<int64_t> strides,
                         uintptr_t index, uintptr_t params, int64_t n, int64_t b, int64_t s,
                         uintptr_t out, int out_type, int threads) {
    const PatchJob job = patch_job(images, shape, strides, index, params, n, b, s, out, out_type);
    py::gil_scoped_release released;
    for (int64_t j = 0; n && j < b; ++j) {
        require(job.index[j] >= 0 && job.index[j] < job.N, "index reaches outside the images");
    }
    for (int64_t i = 0; i < n * b; ++i) {
        require(patch_is_valid(job.params + i * K, job.H, job.W),
                "a crop is not whole pixels inside its image, or an order is no code below 24");
    }
    in_parallel(n * b, 16, threads, [&](int64_t from, int64_t to) {
        // The calling thread keeps its memory from call to call; the others make theirs anew.
        static thread_local std::vector<float> scratch;
        const size_t floats = (size_t)patch_scratch_floats(job);
        if (scratch.size() < floats) scratch.resize(floats);
        EMPSSL_PICK(extract_patches)(job, from, to, scratch.data());
    });
}

// ---- logdet_spd ----

template <typename T>
void logdet_cpu(const T* A, int64_t n, int64_t k, T* logdet, T* inverse, int threads) {
    in_parallel(n, 1, threads, [&](int64_t from, int64_t to) {
        std::vector<T> column((size_t)k);
        for (int64_t i = from; i < to; ++i) {
            const int64_t start = i * k * k;
            EMPSSL_PICK_LOGDET(T)(A + start, k, logdet + i, inverse + start, column.data());
        }
    });
}

void check_logdet(uintptr_t A, int64_t n, int64_t k, uintptr_t logdet, uintptr_t inverse) {
    require(n >= 0 && k >= 1 && k <= (1 << 14), "matrix sizes out of range");
    require(n == 0 || (A && logdet && inverse), "null pointer");
}

void logdet_spd_cpu(uintptr_t A, int64_t n, int64_t k, uintptr_t logdet, uintptr_t inverse,
                    bool is_double, int threads) {
    check_logdet(A, n, k, logdet, inverse);
    py::gil_scoped_release released;
    if (is_double) {
        logdet_cpu((const double*)A, n, k, (double*)logdet, (double*)inverse, threads);
    } else {
        logdet_cpu((const float*)A, n, k, (float*)logdet, (float*)inverse, threads);
    }
}

// ---- the same on a GPU ----

#ifdef EMPSSL_CUDA
void raise_on(const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

void extract_patches_gpu(uintptr_t images, std::vector<int64_t> shape, std::vector<int64_t> strides,
                         uintptr_t index, uintptr_t params, int64_t n, int64_t b, int64_t s,
                         uintptr_t out, int out_type, uintptr_t stream) {
    const PatchJob job = patch_job(images, shape, strides, index, params, n, b, s, out, out_type);
    require(n * b < (1ll << 31), "too many patches for one launch");
    py::gil_scoped_release released;
    raise_on(extract_patches_cuda(job, (void*)stream));
}

template <typename T>
const char* logdet_gpu(uintptr_t A, int64_t n, int64_t k, uintptr_t logdet, uintptr_t inverse,
                       uintptr_t stream) {
    return logdet_spd_cuda((const T*)A, n, k, (T*)logdet, (T*)inverse, (void*)stream);
}

void logdet_spd_gpu(uintptr_t A, int64_t n, int64_t k, uintptr_t logdet, uintptr_t inverse,
                    bool is_double, uintptr_t stream) {
    check_logdet(A, n, k, logdet, inverse);
    require(n < (1ll << 31), "too many matrices for one launch");
    py::gil_scoped_release released;
    raise_on(is_double ? logdet_gpu<double>(A, n, k, logdet, inverse, stream)
                       : logdet_gpu<float>(A, n, k, logdet, inverse, stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_empssl, m) {
    m.doc() = "Kernels of EMP-SSL. Use them through empssl.extract_patches and empssl.coding_rate.";
    m.def("extract_patches_cpu", &extract_patches_cpu);
    m.def("logdet_spd_cpu", &logdet_spd_cpu);
    m.def("isa", &isa_name);
    m.def("use_isa", &use_isa);
#ifdef EMPSSL_CUDA
    m.def("extract_patches_cuda", &extract_patches_gpu);
    m.def("extract_patches_cuda_largest", &extract_patches_cuda_largest);
    m.def("logdet_spd_cuda", &logdet_spd_gpu);
    m.def("logdet_spd_cuda_largest", &logdet_spd_cuda_largest);
    m.attr("cuda") = true;
    m.attr("cuda_architectures") = EMPSSL_CUDA_ARCHITECTURES;
#else
    m.attr("cuda") = false;
#endif
}
