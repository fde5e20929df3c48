// Products of rows with a weight matrix, for weights that are read faster than a library is called.
//
// Letters: R rows, I inputs, O outputs.
//
// A weight lies in tiles of sixteen outputs, in the order in which it is read, once:
//
//     float     | tile 0: input 0 [16], input 1 [16], ... | tile 1: ...
//     bfloat16  | tile 0: inputs 0, 1 [16][2], inputs 2, 3 [16][2], ... | tile 1: ...     pairs, as the processor's dot product wants
//
// O is padded to whole tiles with zeros, and for bfloat16 I to whole pairs.
//
// Weights come from memory, each once in a pass, and multiplying must not wait for them: while one line is used, the one
// that will be is fetched, from the matrix after this one where this one ends.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu_vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

struct Matrix {
    const void *weight;  // in tiles
    const float *bias;   // [O] or null
    int32_t inputs, outputs;
};

namespace {

constexpr int64_t AHEAD = 64 << 10;  // bytes: several times what arrives while a line is on its way
constexpr int LINE = 64;

// What a thread reads: these bytes, and then those.
struct Reading {
    const char *end;
    const char *then;  // null: nothing

    const char *ahead(const void *at) const {
        const char *later = (const char *)at + AHEAD;
        return later < end ? later : then ? then + (later - end) : nullptr;
    }
};


// One step down a tile: the inputs that lie side by side, times the same of R rows.
template <typename W>
struct Step;

template <>
struct Step<float> {
    static constexpr int INPUTS = 1;
    template <int R, int N>
    static void add(const float *const *tiles, const float *x, int64_t stride, Vec (&sums)[N][R]) {
        Vec weights[N];
        for (int n = 0; n < N; n++) weights[n] = load(tiles[n]);
        for (int r = 0; r < R; r++) {
            const Vec given = splat(x[r * stride]);
            for (int n = 0; n < N; n++) sums[n][r] += weights[n] * given;
        }
    }
};

template <>
struct Step<Bf16> {
    static constexpr int INPUTS = 2;
    template <int R, int N>
    static void add(const Bf16 *const *tiles, const Bf16 *x, int64_t stride, Vec (&sums)[N][R]) {
#if defined(__AVX512BF16__)
        __m512i weights[N];
        for (int n = 0; n < N; n++) weights[n] = _mm512_loadu_si512(tiles[n]);
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, x + r * stride, 4);
            const __m512i given = _mm512_set1_epi32(pair);
            for (int n = 0; n < N; n++)
                sums[n][r] = (Vec)_mm512_dpbf16_ps((__m512)sums[n][r], (__m512bh)weights[n], (__m512bh)given);
        }
#else
        Vec even[N], odd[N];
        for (int n = 0; n < N; n++) {
            Words words;
            std::memcpy(&words, tiles[n], sizeof words);
            const Words low = words << 16, high = words & 0xffff0000u;
            std::memcpy(&even[n], &low, sizeof low), std::memcpy(&odd[n], &high, sizeof high);
        }
        for (int r = 0; r < R; r++) {
            const Vec first = splat(widen(x[r * stride])), second = splat(widen(x[r * stride + 1]));
            for (int n = 0; n < N; n++) sums[n][r] += even[n] * first + odd[n] * second;
        }
#endif
    }
};

inline int num_tiles(const Matrix &matrix) { return (matrix.outputs + LANES - 1) / LANES; }

template <typename W>
int num_steps(const Matrix &matrix) {
    return (matrix.inputs + Step<W>::INPUTS - 1) / Step<W>::INPUTS;
}

template <typename W>
const W *tile_at(const Matrix &matrix, int tile) {
    return (const W *)matrix.weight + int64_t(tile) * num_steps<W>(matrix) * Step<W>::INPUTS * LANES;
}

// R rows times N tiles. Enough sums at once that none waits for another. `ahead` is fetched, if given: as many bytes as
// these tiles have.
template <int R, int N, typename W>
void tiles_product(const W *x, int64_t x_stride, const Matrix &matrix, int tile, float *y, int64_t y_stride, bool add,
                   const char *ahead) {
    constexpr int INPUTS = Step<W>::INPUTS;
    const int steps = num_steps<W>(matrix);
    const W *tiles[N];
    for (int n = 0; n < N; n++) tiles[n] = tile_at<W>(matrix, tile + n);
    Vec sums[N][R] = {};
    const auto walk = [&](auto fetch) {
        for (int i = 0; i < steps; i++) {
            for (int n = 0; n < N && fetch(); n++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
            Step<W>::template add<R, N>(tiles, x + i * INPUTS, x_stride, sums);
            for (int n = 0; n < N; n++) tiles[n] += INPUTS * LANES;
        }
    };
    if (ahead)
        walk(std::true_type{});
    else
        walk(std::false_type{});
    for (int n = 0; n < N; n++) {
        const int first = (tile + n) * LANES, left = matrix.outputs - first;
        if (left <= 0) return;
        for (int r = 0; r < R; r++) {
            float *to = y + r * y_stride + first;
            float values[LANES];
            store(values, sums[n][r]);
            if (left >= LANES) {
                Vec sum = sums[n][r];
                if (matrix.bias) sum += load(matrix.bias + first);
                if (add) sum += load(to);
                store(to, sum);
            } else {
                for (int o = 0; o < left; o++)
                    to[o] = (add ? to[o] : 0.0f) + (matrix.bias ? matrix.bias[first + o] : 0.0f) + values[o];
            }
        }
    }
}

// y [R, O] = x [R, I] times the matrix, plus what is in y if `add`, for the outputs of tiles [tile, end). Rows of x hold
// whole pairs. Where rows are many, a few tiles of the matrix meet all of them before the next, so that each is read from
// memory once. `then`: what this thread reads next, if known.
template <typename W>
void product(const W *x, int64_t x_stride, int rows, const Matrix &matrix, float *y, int64_t y_stride, bool add,
             int tile, int end, const W *then = nullptr) {
    constexpr int ROWS = 6;  // times four tiles: 24 of the processor's 32 vectors
    const int parts = (rows + ROWS - 1) / ROWS, part = (rows + parts - 1) / parts;
    const Reading reading{(const char *)tile_at<W>(matrix, end), (const char *)then};
    while (tile < end) {
        const int tiles = end - tile < 4 ? 1 : 4;
        for (int row = 0; row < rows; row += part) {
            const W *from = x + row * x_stride;
            float *to = y + row * y_stride;
            const char *ahead = reading.ahead(tile_at<W>(matrix, tile));
            by_count(rows - row < part ? rows - row : part, [&](auto count) {
                constexpr int R = count.value;
                if constexpr (R <= ROWS) {
                    if (tiles == 1)
                        tiles_product<R, 1>(from, x_stride, matrix, tile, to, y_stride, add, ahead);
                    else
                        tiles_product<R, 4>(from, x_stride, matrix, tile, to, y_stride, add, ahead);
                }
            });
        }
        tile += tiles;
    }
}

}  // namespace
