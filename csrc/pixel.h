// The arithmetic of one patch, shared by the CPU and the CUDA kernel: what the CPU tests prove, the GPU runs.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define EMPSSL_FN __host__ __device__ __forceinline__
#else
#define EMPSSL_FN static inline
#endif

// Columns of a patch's parameters; empssl.COLUMNS has the same order.
enum { TOP, LEFT, HEIGHT, WIDTH, FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE, K };

enum { BLUR_RADIUS = 6, BLUR_TAPS = 2 * BLUR_RADIUS + 1 };

// True where the crop is whole pixels inside its H x W image and the order a code; false for NaN.
EMPSSL_FN bool patch_is_valid(const float* p, int64_t H, int64_t W) {
    return p[TOP] >= 0 && p[LEFT] >= 0 && p[HEIGHT] >= 1 && p[WIDTH] >= 1 && p[TOP] + p[HEIGHT] <= (float)H &&
           p[LEFT] + p[WIDTH] <= (float)W && p[TOP] == floorf(p[TOP]) && p[LEFT] == floorf(p[LEFT]) &&
           p[HEIGHT] == floorf(p[HEIGHT]) && p[WIDTH] == floorf(p[WIDTH]) &&
           p[ORDER] >= 0 && p[ORDER] < 24;
}

// One output pixel of a resize by the antialiased triangle filter reads input pixels [first, last) of the crop, with
// weights triangle(j) / (their sum).
struct Taps {
    double centre, inverse_support;
    int first, last;
};

EMPSSL_FN Taps taps_of(int i, int length, int s) {
    double scale = (double)length / s, support = scale < 1 ? 1 : scale;
    Taps t;
    t.centre = (i + 0.5) * scale;
    t.inverse_support = 1 / support;
    t.first = (int)floor(t.centre - support + 0.5);
    t.last = (int)floor(t.centre + support + 0.5);
    if (t.first < 0) t.first = 0;
    if (t.last > length) t.last = length;
    return t;
}

EMPSSL_FN float triangle(const Taps& t, int j) {
    double w = 1 - fabs(j + 0.5 - t.centre) * t.inverse_support;
    return w > 0 ? (float)w : 0.0f;
}

EMPSSL_FN float clamp01(float x) { return x < 0 ? 0.0f : x > 1 ? 1.0f : x; }

// ITU-R 601 luma, torchvision's weights.
EMPSSL_FN float grey_of(float r, float g, float b) { return 0.2989f * r + 0.587f * g + 0.114f * b; }

EMPSSL_FN float blend(float x, float other, float factor) { return clamp01(factor * x + (1 - factor) * other); }

// One channel after the hue has been turned: k = hue + (5, 3 or 1) for (red, green, blue), in sixths of the circle.
EMPSSL_FN float hue_channel(float value, float chroma, float k) {
    k = k >= 12 ? k - 12 : k;
    k = k >= 6 ? k - 6 : k;
    float m = k < 4 - k ? k : 4 - k;
    return value - chroma * clamp01(m);
}

// The shift as `rotate_hue` wants it: sixths of the circle, in [0, 6).
EMPSSL_FN float hue_sixths(float shift) {
    float x = 6 * (shift - floorf(shift));
    return x < 6 ? x : 0.0f;
}

EMPSSL_FN void rotate_hue(float& r, float& g, float& b, float sixths) {
    float high = r > g ? r : g, low = r < g ? r : g;
    high = high > b ? high : b;
    low = low < b ? low : b;
    float chroma = high - low;
    bool red = high == r, green = high == g;
    float difference = red ? g - b : green ? b - r : r - g;
    float offset = red ? 0.0f : green ? 2.0f : 4.0f;
    float hue = chroma > 0 ? offset + difference / (chroma > 0 ? chroma : 1.0f) : 0.0f;      // [-1, 5)
    hue += sixths;                                                                           // [-1, 11)
    r = hue_channel(high, chroma, hue + 5);                                                  // arguments in [0, 16)
    g = hue_channel(high, chroma, hue + 3);
    b = hue_channel(high, chroma, hue + 1);
}

EMPSSL_FN float solarized(float x) { return x >= (float)(128.0 / 255.0) ? 1 - x : x; }

// Where a tap that falls outside s pixels reads: mirrored about the border pixels, as often as needed.
EMPSSL_FN int reflected(int i, int s) {
    if (i >= 0 && i < s) return i;
    if (s == 1) return 0;
    int period = 2 * (s - 1);
    i %= period;
    if (i < 0) i += period;
    return i < s ? i : period - i;
}

EMPSSL_FN void blur_taps(float sigma, float* weight) {
    float sum = 0;
    for (int t = 0; t < BLUR_TAPS; ++t) {
        float x = (t - BLUR_RADIUS) / sigma;
        weight[t] = expf(-0.5f * x * x);
        sum += weight[t];
    }
    for (int t = 0; t < BLUR_TAPS; ++t) weight[t] /= sum;
}

// The code of an order (0..23) as the four operations 0..3 in the order of itertools.permutations(range(4)).
EMPSSL_FN void unpack_order(int code, int* operation) {
    int left[4] = {0, 1, 2, 3};
    int block = 6;
    for (int place = 0; place < 3; ++place) {
        int pick = code / block;
        code %= block;
        operation[place] = left[pick];
        for (int i = pick; i < 3; ++i) left[i] = left[i + 1];
        block /= 3 - place;
    }
    operation[3] = left[0];
}
