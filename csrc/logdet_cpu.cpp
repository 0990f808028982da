// logdet_spd on a CPU: one matrix by the symmetric sweep operator (see logdet_cuda.cu), in the
// place of its inverse. Every inner loop goes along a row, so that the compiler vectorises it
// without reordering a sum. Compiled once for each instruction set up to AVX2, named
// by VARIANT. Large matrices go to LAPACK instead.
#include <math.h>

#include "empssl.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

template <typename T>
void JOIN(logdet_spd_, VARIANT)(const T* A, int64_t k, T* logdet, T* inverse,
                                T* __restrict column) {
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j <= i; ++j) inverse[i * k + j] = A[i * k + j];
    }
    double sum = 0;
    for (int64_t p = 0; p < k; ++p) {
        const T pivot = inverse[p * k + p];
        if (!(pivot > 0) || !isfinite(pivot)) {
            *logdet = (T)NAN;
            for (int64_t i = 0; i < k * k; ++i) inverse[i] = (T)NAN;
            return;
        }
        sum += log((double)pivot);
        // Take the pivot's row and column out and leave zeros. With -1 for the pivot itself, one
        // formula serves all elements.
        for (int64_t i = 0; i < k; ++i) {
            T& element = i < p ? inverse[p * k + i] : inverse[i * k + p];
            column[i] = i == p ? T(-1) : element;
            element = 0;
        }
        const T scale = 1 / pivot;
        for (int64_t i = 0; i < k; ++i) {
            const T factor = column[i] * scale;
            T* __restrict row = inverse + i * k;
            for (int64_t j = 0; j <= i; ++j) row[j] -= factor * column[j];
        }
    }
    *logdet = (T)sum;
    // All pivots are swept, so this is minus the inverse, and its lower triangle alone.
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            inverse[j * k + i] = inverse[i * k + j] = -inverse[i * k + j];
        }
    }
}

template void JOIN(logdet_spd_, VARIANT)(const float*, int64_t, float*, float*, float*);
template void JOIN(logdet_spd_, VARIANT)(const double*, int64_t, double*, double*, double*);
