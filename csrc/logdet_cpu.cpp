// logdet_spd on a CPU: one matrix, unblocked, every inner loop along a row so that the compiler vectorises it without
// reordering a sum. Compiled once for each instruction set, named by VARIANT. Large matrices go to LAPACK instead.
#include <math.h>

#include "empssl.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

template <typename T>
static void axpy(int64_t n, T factor, const T* __restrict x, T* __restrict y) {
    for (int64_t i = 0; i < n; ++i) y[i] -= factor * x[i];
}

// A = U^T U; W = U^-T, lower triangular; A^-1 = W^T W. scratch holds U and W, 2 k^2 numbers.
template <typename T>
void JOIN(logdet_spd_, VARIANT)(const T* A, int64_t k, T* logdet, T* inverse, T* scratch) {
    T *U = scratch, *W = scratch + k * k;
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = i; j < k; ++j) U[i * k + j] = A[j * k + i];                // the lower triangle, transposed
    double sum = 0;
    for (int64_t j = 0; j < k; ++j) {
        T* row = U + j * k;
        const T pivot = row[j];
        if (!(pivot > 0) || !isfinite(pivot)) {
            *logdet = (T)NAN;
            for (int64_t i = 0; i < k * k; ++i) inverse[i] = (T)NAN;
            return;
        }
        sum += log((double)pivot);
        const T root = sqrt(pivot), scale = 1 / root;
        row[j] = root;
        for (int64_t i = j + 1; i < k; ++i) row[i] *= scale;
        for (int64_t i = j + 1; i < k; ++i) axpy(k - i, row[i], row + i, U + i * k + i);
    }
    *logdet = (T)sum;
    for (int64_t i = 0; i < k; ++i) {
        T* row = W + i * k;
        for (int64_t j = 0; j < i; ++j) row[j] = 0;
        for (int64_t j = 0; j < i; ++j) axpy(j + 1, U[j * k + i], W + j * k, row);
        const T scale = 1 / U[i * k + i];
        for (int64_t j = 0; j < i; ++j) row[j] *= scale;
        row[i] = scale;
    }
    for (int64_t i = 0; i < k; ++i) {
        T* row = inverse + i * k;
        for (int64_t j = 0; j <= i; ++j) row[j] = 0;
        for (int64_t r = i; r < k; ++r) axpy(i + 1, -W[r * k + i], W + r * k, row);
    }
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = i + 1; j < k; ++j) inverse[i * k + j] = inverse[j * k + i];
}

template void JOIN(logdet_spd_, VARIANT)(const float*, int64_t, float*, float*, float*);
template void JOIN(logdet_spd_, VARIANT)(const double*, int64_t, double*, double*, double*);
