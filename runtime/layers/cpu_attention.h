// Attention of a packed pass over paged KV: rotate, write, attend; and KV rows moved to other slots.
//
// Letters: T rows of a packed pass, B segments (requests) of it, U attention units here, G query heads per unit, D head
// width, P tokens of a block.
//
// A block holds P tokens in tiles of sixteen; keys lie transposed, so that sixteen keys are one vector:
//
//     block  |  tile 0: unit 0, unit 1, ...  |  tile 1: ...  |        unit  |  key [D][16]  |  value [16][D]  |

#pragma once

#include "cpu_vectors.h"

#include <vector>

// One packed pass, the same for every layer. Row t of segment b stands at position
// ends[b] - (row_starts[b + 1] - t), and sees the positions up to its own that are below sinks[b] or within windows[b].
// A row with a mask is a node of a draft tree: it lies there, but stands at tree_starts[b] - 1 + bits of its mask, and
// sees slot tree_starts[b] + i if bit i is set, and no other of the tree.
struct Pass {
    int32_t num_rows, num_segments, block_size, head_dim;
    const int32_t *row_starts;     // [B + 1]
    const int32_t *ends;           // [B]
    const int32_t *sinks;          // [B]
    const int32_t *windows;        // [B], 0: everything
    const int32_t *const *tables;  // [B] block ids by position / P
    const float *cos, *sin;        // [T, D], sines signed for the half they meet
    const float *sink_cos, *sink_sin;  // [T, D] for queries that look at sinks from a window; null if no segment has one
    const uint64_t *masks;             // [T], 0 for rows of no tree; null if there is none
    const int32_t *tree_starts;        // [B]
};

namespace {

constexpr int TILE = 8;  // queries that share one walk over the keys
constexpr float MASKED = -INFINITY;

struct Span {  // visible positions [from, to)
    int from, to;
};

float largest(Vec v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}

// What a query has seen so far of one unit: sums of weights and of weighted values, relative to its best score.
struct Seen {
    float best;
    Vec weight;
    float values[256];
};

// Sixteen keys of one unit to Q queries: scores, then, relative to the best score yet, weights and values (the online
// softmax of FlashAttention, arXiv 2205.14135). `count` of the keys from `first` on exist; slots outside may hold
// anything, even no numbers.
template <int Q, typename Kv>
void take(const float *const *queries, int D, const Kv *keys, const Ints *shown, int first, int count, Seen *seen) {
    const Kv *values = keys + LANES * D;
    constexpr int WAYS = Q <= 2 ? 4 : Q <= 4 ? 2 : 1;  // few queries: more sums at once, or additions wait for one another
    Vec sums[WAYS][Q] = {};
    int d = 0;
    for (; d + WAYS <= D; d += WAYS)
        for (int w = 0; w < WAYS; w++) {
            const Vec key = load(keys + (d + w) * LANES);
            for (int q = 0; q < Q; q++) sums[w][q] += queries[q][d + w] * key;
        }
    for (; d < D; d++) {
        const Vec key = load(keys + d * LANES);
        for (int q = 0; q < Q; q++) sums[0][q] += queries[q][d] * key;
    }
    float weights[Q][LANES];
    for (int q = 0; q < Q; q++) {
        Vec score = sums[0][q];
        for (int w = 1; w < WAYS; w++) score += sums[w][q];
        if (shown) score = shown[q] ? score : splat(MASKED);
        const float top = largest(score);
        if (top > seen[q].best) {
            const float factor = seen[q].best == MASKED ? 0.0f : std::exp(seen[q].best - top);
            seen[q].weight *= factor;
            for (int e = 0; e < D; e++) seen[q].values[e] *= factor;
            seen[q].best = top;
        }
        Vec weight = Vec{};
        if (top != MASKED) {
            weight = exponential(score - seen[q].best);
            if (shown) weight = shown[q] ? weight : Vec{};
        }
        seen[q].weight += weight;
        store(weights[q], weight);
    }
    values += first * D;
    constexpr int PAIRS = Q <= 2 ? 2 : 1;
    for (d = 0; d + 2 * LANES <= D; d += 2 * LANES) {
        Vec a[PAIRS][Q] = {}, b[PAIRS][Q] = {};
        int j = 0;
        for (; j + PAIRS <= count; j += PAIRS)
            for (int w = 0; w < PAIRS; w++) {
                const Vec va = load(values + (j + w) * D + d), vb = load(values + (j + w) * D + d + LANES);
                for (int q = 0; q < Q; q++) {
                    const float weight = weights[q][first + j + w];
                    a[w][q] += weight * va, b[w][q] += weight * vb;
                }
            }
        for (; j < count; j++) {
            const Vec va = load(values + j * D + d), vb = load(values + j * D + d + LANES);
            for (int q = 0; q < Q; q++) a[0][q] += weights[q][first + j] * va, b[0][q] += weights[q][first + j] * vb;
        }
        for (int q = 0; q < Q; q++) {
            for (int w = 1; w < PAIRS; w++) a[0][q] += a[w][q], b[0][q] += b[w][q];
            float *sum = seen[q].values + d;
            store(sum, load(sum) + a[0][q]), store(sum + LANES, load(sum + LANES) + b[0][q]);
        }
    }
    for (; d < D; d++)
        for (int q = 0; q < Q; q++)
            for (int j = 0; j < count; j++) seen[q].values[d] += weights[q][first + j] * widen(values[j * D + d]);
}

// Where KV lies, in elements.
struct Strides {
    int64_t block, tile, unit;
};

// Queries of a tile that are nodes of a draft tree, by their masks, of which windows have cut the bits they hide.
struct Tree {
    int start;
    uint64_t masks[TILE];

    // Slots beyond those that any of them sees.
    int end() const {
        uint64_t all = 0;
        for (uint64_t mask : masks) all |= mask;
        return start + (all ? 64 - __builtin_clzll(all) : 0);
    }
    // Which of the slots j .. j + 15 query q sees.
    Ints shown(int q, int j, Ints lane) const {
        const int shift = j - start;
        if (shift <= -LANES || shift >= 64) return Ints{};
        const uint64_t word = shift < 0 ? masks[q] << -shift : masks[q] >> shift;
        return ((Ints{} + int(word & 0xffff)) >> lane & 1) != 0;
    }
};

// Q queries of one segment against all keys they see, of all units. Keys outermost, so that memory is read in its own
// order.
template <typename Kv>
void attend_tile(const Pass &pass, int b, const Kv *blocks, const Strides &strides, int U,
                 const float *queries, const float *at_sinks, int64_t query_stride, const int *position, int Q,
                 int window, const Tree *tree, Seen *seen) {
    const int D = pass.head_dim, P = pass.block_size;
    const int32_t *table = pass.tables[b];
    int first = position[0], last = position[0];
    for (int q = 1; q < Q; q++) {
        first = position[q] < first ? position[q] : first;
        last = position[q] > last ? position[q] : last;
    }
    const int sinks = pass.sinks[b];
    Span spans[2];
    int num_spans = 0;
    int low = window > 0 && first - window + 1 > 0 ? first - window + 1 : 0;
    // once a window has left the sinks, they are met with queries turned as if it followed right upon them
    const bool split = sinks > 0 && window > 0 && last - window + 1 > sinks;
    if (split) {
        spans[num_spans++] = {0, sinks};
        low = low > sinks ? low : sinks;
    } else if (sinks > 0) {
        low = 0;
    }
    spans[num_spans++] = {low, last + 1};
    int shared = first;  // slots up to here are of no tree, and after no query
    if (tree) {
        spans[num_spans - 1].to = tree->end();
        shared = shared < tree->start ? shared : tree->start - 1;
    }

    for (int i = 0; i < U * Q; i++) {
        seen[i].best = MASKED;
        seen[i].weight = Vec{};
        std::memset(seen[i].values, 0, sizeof(float) * D);
    }
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int s = 0; s < num_spans; s++) {
        const bool sink_part = split && s == 0;
        const float *heads = sink_part && at_sinks ? at_sinks : queries;
        for (int j = spans[s].from / LANES * LANES; j < spans[s].to; j += LANES) {
            const int begin = j < spans[s].from ? spans[s].from - j : 0;
            const int count = (j + LANES <= spans[s].to ? LANES : spans[s].to - j) - begin;
            const bool whole = count == LANES && j + LANES - 1 <= shared &&
                               (window == 0 || sink_part || j >= last - window + 1);
            Ints shown[TILE];
            for (int q = 0; q < Q && !whole; q++) {
                const Ints at = lane + j;
                const bool node = tree && tree->masks[q];
                shown[q] = (at >= spans[s].from) & (at < spans[s].to) & (at <= (node ? tree->start - 1 : position[q]));
                if (window > 0) shown[q] &= (at > position[q] - window) | (at < sinks);
                if (node && !sink_part) shown[q] |= tree->shown(q, j, lane);
            }
            const Kv *tile = blocks + table[j / P] * strides.block + j % P / LANES * strides.tile;
            for (int u = 0; u < U; u++, tile += strides.unit) {
                const float *rows[TILE];
                for (int q = 0; q < Q; q++) rows[q] = heads + u * query_stride + q * D;
                by_count(Q, [&](auto n) {
                    take<n.value>(rows, D, tile, whole ? nullptr : shown, begin, count, seen + u * Q);
                });
            }
        }
    }
    for (int i = 0; i < U * Q; i++) {
        float total = 0;
        for (int lane_i = 0; lane_i < LANES; lane_i++) total += seen[i].weight[lane_i];
        const float inverse = 1.0f / total;
        for (int d = 0; d < D; d++) seen[i].values[d] *= inverse;
    }
}

// The part of a tile's queries that is of a tree, and where in the text these stand; whether there is any.
bool branch(const Pass &pass, int b, int row, int g, int G, int Q, int window, int *position, Tree *tree) {
    tree->start = pass.tree_starts[b];
    bool any = false;
    for (int q = 0; q < TILE; q++) {
        uint64_t mask = q < Q ? pass.masks[row + (g + q) / G] : 0;
        tree->masks[q] = mask;
        if (!mask) continue;
        any = true;
        const int depth = __builtin_popcountll(mask);
        position[q] = tree->start - 1 + depth;
        // a window hides the ancestors farthest away: the lowest bits
        for (int hidden = window > 0 ? depth - window : 0; hidden > 0; hidden--) tree->masks[q] &= tree->masks[q] - 1;
    }
    return any;
}

template <typename In, typename Out>
void copy(const In *from, int count, Out *to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; i++) narrow(widen(from[i]), to + i);
}

template <typename T>
void rotate(const T *x, const float *cos, const float *sin, int D, float scale, float *out) {
    const int half = D / 2;
    int d = 0;
    for (; d + LANES <= half; d += LANES) {
        const Vec a = load(x + d), b = load(x + d + half);
        store(out + d, (a * load(cos + d) + b * load(sin + d)) * scale);
        store(out + d + half, (b * load(cos + d + half) + a * load(sin + d + half)) * scale);
    }
    for (; d < half; d++) {
        const float a = widen(x[d]), b = widen(x[d + half]);
        out[d] = (a * cos[d] + b * sin[d]) * scale;
        out[d + half] = (b * cos[d + half] + a * sin[d + half]) * scale;
    }
}

// Units [from, to) of all those in a row.
struct Units {
    int from, to, all;
};

// qkv [T, all units, G + 2, D] -> blocks of U of these units, context [T, all units, G, D]
template <typename In, typename Kv, typename Out>
void attend(const Pass &pass, const In *qkv, Kv *blocks, const Strides &strides, const Units &units, int G,
            int layer_window, float scale, Out *context) {
    static thread_local std::vector<float> rotated, rotated_sinks;
    static thread_local std::vector<Seen> seen;
    const int D = pass.head_dim, P = pass.block_size, T = pass.num_rows, U = units.to - units.from;
    const bool sinks = pass.sink_cos != nullptr;
    qkv += size_t(units.from) * (G + 2) * D;
    context += size_t(units.from) * G * D;
    blocks += units.from * strides.unit;
    rotated.resize(size_t(T) * U * G * D);
    if (sinks) rotated_sinks.resize(rotated.size());
    float key[256];
    for (int b = 0; b < pass.num_segments; b++)
        for (int t = pass.row_starts[b]; t < pass.row_starts[b + 1]; t++) {
            const int position = pass.ends[b] - (pass.row_starts[b + 1] - t);
            const float *cos = pass.cos + size_t(t) * D, *sin = pass.sin + size_t(t) * D;
            const int64_t tile_at = pass.tables[b][position / P] * strides.block + position % P / LANES * strides.tile;
            for (int u = 0; u < U; u++) {
                const In *heads = qkv + (size_t(t) * units.all + u) * (G + 2) * D;
                for (int g = 0; g < G; g++) {
                    const size_t at = ((size_t(u) * T + t) * G + g) * D;
                    rotate(heads + g * D, cos, sin, D, scale, rotated.data() + at);
                    if (sinks)
                        rotate(heads + g * D, pass.sink_cos + size_t(t) * D, pass.sink_sin + size_t(t) * D, D, scale,
                               rotated_sinks.data() + at);
                }
                rotate(heads + G * D, cos, sin, D, 1.0f, key);
                Kv *tile = blocks + tile_at + u * strides.unit;
                for (int d = 0; d < D; d++) narrow(key[d], tile + d * LANES + position % LANES);
                Kv *value = tile + (LANES + position % LANES) * D;
                const In *from = heads + (G + 1) * D;
                copy(from, D, value);
            }
        }
    seen.resize(size_t(U) * TILE);
    for (int b = 0; b < pass.num_segments; b++) {
        const int start = pass.row_starts[b], count = pass.row_starts[b + 1] - start;
        int window = pass.windows[b];
        if (layer_window > 0 && (window == 0 || layer_window < window)) window = layer_window;
        for (int from = 0; from < count * G; from += TILE) {
            const int Q = count * G - from < TILE ? count * G - from : TILE;
            int position[TILE];
            for (int q = 0; q < Q; q++) position[q] = pass.ends[b] - (count - (from + q) / G);
            Tree tree;
            const bool branches = pass.masks && branch(pass, b, start + from / G, from % G, G, Q, window, position, &tree);
            const size_t at = (size_t(start) * G + from) * D;
            attend_tile(pass, b, blocks, strides, U, rotated.data() + at,
                        sinks ? rotated_sinks.data() + at : nullptr, int64_t(T) * G * D, position, Q, window,
                        branches ? &tree : nullptr, seen.data());
            for (int u = 0; u < U; u++)
                for (int q = 0; q < Q; q++) {
                    const int row = start + (from + q) / G, g = (from + q) % G;
                    copy(seen[u * Q + q].values, D, context + ((size_t(row) * units.all + u) * G + g) * D);
                }
        }
    }
}

// KV of all units from slot to slot of a group's pages, one row after another: a row may be moved to where an earlier
// one came from.
template <typename Kv>
void move_rows(Kv *blocks, const Strides &strides, int U, int D, int P, const int32_t *from, const int32_t *to,
               int count) {
    for (int i = 0; i < count; i++) {
        const int a = from[i] % LANES, b = to[i] % LANES;
        const Kv *source = blocks + from[i] / P * strides.block + from[i] % P / LANES * strides.tile;
        Kv *target = blocks + to[i] / P * strides.block + to[i] % P / LANES * strides.tile;
        for (int u = 0; u < U; u++, source += strides.unit, target += strides.unit) {
            for (int d = 0; d < D; d++) target[d * LANES + b] = source[d * LANES + a];
            std::memcpy(target + (LANES + b) * D, source + (LANES + a) * D, sizeof(Kv) * D);
        }
    }
}

}  // namespace
