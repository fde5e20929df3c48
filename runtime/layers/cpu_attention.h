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

constexpr int TILE = 8;       // queries that share one walk over the keys
constexpr int STRETCH = 8;    // tiles of keys that share one look for the best score
constexpr float MASKED = -INFINITY;

struct Span {  // visible positions [from, to)
    int from, to;
};

// What a query has seen so far of one unit: sums of weights and of weighted values, relative to its best score.
struct Seen {
    float best;
    Vec weight;
    float values[256];
};

// Up to STRETCH tiles of keys that lie one after another in a text. It begins at the same places for whoever looks.
struct Stretch {
    int num_tiles;
    int64_t at[STRETCH];                 // of unit 0, in the layer's blocks
    int first[STRETCH], count[STRETCH];  // which keys of a tile exist; other slots may hold anything, even no numbers
    const Ints *shown[STRETCH];          // by query, which keys it sees; null: all do all
    Ints masks[STRETCH][TILE];
};

// In which order a query's sums are made depends on places in the text alone, never on how many queries share the walk:
// so a row's context is the same, bit by bit, whatever else is in its pass. What hides how long an addition takes are
// sums of other tiles and of other queries.

// N tiles of keys of one unit, from tile `i` of a stretch on, times Q queries: their scores. Meanwhile the same keys of
// `ahead` are fetched, if that is to be.
template <int Q, int N, bool FETCH, typename Kv>
void score(const float *const *queries, int D, const Kv *unit, const Stretch &stretch, int i, const Kv *ahead_unit,
           const Stretch *ahead, float (*scores)[STRETCH * LANES]) {
    const Kv *keys[N], *later[N];
    for (int n = 0; n < N; n++) {
        keys[n] = unit + stretch.at[i + n];
        later[n] = FETCH && i + n < ahead->num_tiles ? ahead_unit + ahead->at[i + n] : keys[n];
    }
    Vec sums[N][Q] = {};
    for (int d = 0; d < D; d++)
        for (int n = 0; n < N; n++) {
            if (FETCH) __builtin_prefetch(later[n] + d * LANES);
            const Vec key = load(keys[n] + d * LANES);
            for (int q = 0; q < Q; q++) sums[n][q] += queries[q][d] * key;
        }
    for (int n = 0; n < N; n++)
        for (int q = 0; q < Q; q++) {
            const Ints *shown = stretch.shown[i + n];
            store(scores[q] + (i + n) * LANES, !shown ? sums[n][q] : shown[q] ? sums[n][q] : splat(MASKED));
        }
}

// N vectors of the values' width, of all tiles of a stretch, times the weights of Q queries, added to what these have
// seen. Meanwhile the same of `ahead` is fetched, if that is to be.
template <int Q, int N, bool FETCH, typename Kv>
void mix(const Kv *unit, int D, int d, const Stretch &stretch, const float (*weights)[STRETCH * LANES],
         const Kv *ahead_unit, const Stretch *ahead, Seen *seen) {
    Vec sums[Q][N];
    for (int q = 0; q < Q; q++)
        for (int n = 0; n < N; n++) sums[q][n] = load(seen[q].values + d + n * LANES);
    for (int i = 0; i < stretch.num_tiles; i++) {
        const int64_t offset = LANES * D + d;
        const Kv *values = unit + stretch.at[i] + offset;
        const Kv *later = FETCH && i < ahead->num_tiles ? ahead_unit + ahead->at[i] + offset : values;
        const auto add = [&](int j) {
            for (size_t at = 0; at < N * LANES * sizeof(Kv) && FETCH; at += 64)
                __builtin_prefetch((const char *)(later + j * D) + at);
            Vec value[N];
            for (int n = 0; n < N; n++) value[n] = load(values + j * D + n * LANES);
            for (int q = 0; q < Q; q++)
                for (int n = 0; n < N; n++) sums[q][n] += weights[q][i * LANES + j] * value[n];
        };
        if (stretch.count[i] == LANES)
            for (int j = 0; j < LANES; j++) add(j);
        else
            for (int j = 0; j < stretch.count[i]; j++) add(stretch.first[i] + j);
    }
    for (int q = 0; q < Q; q++)
        for (int n = 0; n < N; n++) store(seen[q].values + d + n * LANES, sums[q][n]);
}

// A stretch of one unit's keys to Q queries: scores, then, relative to the best score yet, weights and values (the
// online softmax of FlashAttention, arXiv 2205.14135). `ahead` are the tiles that come next, if they are not at hand. A
// function of its own: drawn into its caller, it would lack registers.
template <int Q, bool FETCH, typename Kv>
__attribute__((noinline)) void take(const float *const *queries, int D, const Kv *unit, const Stretch &stretch,
                                    const Kv *ahead_unit, const Stretch *ahead, Seen *seen) {
    constexpr int KEYS = Q == 1 ? 8 : Q <= 3 ? 4 : Q <= 7 ? 2 : 1;
    float weights[Q][STRETCH * LANES];
    int i = 0;
    for (; i + KEYS <= stretch.num_tiles; i += KEYS)
        score<Q, KEYS, FETCH>(queries, D, unit, stretch, i, ahead_unit, ahead, weights);
    for (; i < stretch.num_tiles; i++) score<Q, 1, FETCH>(queries, D, unit, stretch, i, ahead_unit, ahead, weights);
    for (int q = 0; q < Q; q++) {
        Vec tops = load(weights[q]);
        for (i = 1; i < stretch.num_tiles; i++) {
            const Vec more = load(weights[q] + i * LANES);
            tops = more > tops ? more : tops;
        }
        const float top = largest(tops);
        if (top > seen[q].best) {
            const float factor = seen[q].best == MASKED ? 0.0f : std::exp(seen[q].best - top);
            seen[q].weight *= factor;
            for (int e = 0; e < D; e++) seen[q].values[e] *= factor;
            seen[q].best = top;
        }
        for (i = 0; i < stretch.num_tiles; i++) {
            const Vec given = load(weights[q] + i * LANES);
            Vec weight = exponential(given - seen[q].best);
            if (stretch.shown[i]) weight = given > MASKED ? weight : Vec{};
            seen[q].weight += weight;
            store(weights[q] + i * LANES, weight);
        }
    }
    int d = 0;
    for (; d + 2 * LANES <= D; d += 2 * LANES)
        mix<Q, 2, FETCH>(unit, D, d, stretch, weights, ahead_unit, ahead, seen);
    for (; d + LANES <= D; d += LANES) mix<Q, 1, FETCH>(unit, D, d, stretch, weights, ahead_unit, ahead, seen);
    for (; d < D; d++)
        for (int q = 0; q < Q; q++)
            for (i = 0; i < stretch.num_tiles; i++)
                for (int j = stretch.first[i]; j < stretch.first[i] + stretch.count[i]; j++)
                    seen[q].values[d] += weights[q][i * LANES + j] * widen(unit[stretch.at[i] + (LANES + j) * D + d]);
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

// Some queries of one segment, and the keys they see, stretch by stretch.
struct Queries {
    const Pass *pass;
    const Strides *strides;
    int b, from, num = 0;  // those [from, from + num) of the segment's rows times G
    int window;
    int position[TILE];
    Tree tree;
    bool branches;

    Queries() = default;
    Queries(const Pass &pass, const Strides &strides, int b, int from, int G, int layer_window)
        : pass(&pass), strides(&strides), b(b), from(from), window(pass.windows[b]) {
        const int start = pass.row_starts[b], count = pass.row_starts[b + 1] - start;
        num = count * G - from < TILE ? count * G - from : TILE;
        if (layer_window > 0 && (window == 0 || layer_window < window)) window = layer_window;
        for (int q = 0; q < num; q++) position[q] = pass.ends[b] - (count - (from + q) / G);
        branches = pass.masks && find_branches(start + from / G, from % G, G);
        find_spans();
    }

    // The next stretch; false where there is none left.
    bool fill(Stretch &stretch) {
        const int P = pass->block_size, sinks = pass->sinks[b];
        const int32_t *table = pass->tables[b];
        const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        while (span < num_spans && at >= spans[span].to) start_span(span + 1);
        if (span == num_spans) return false;
        const Span all = spans[span];
        int i = 0;
        for (; at < all.to && (i == 0 || at % (STRETCH * LANES) != 0); i++, at += LANES) {
            const int first = at < all.from ? all.from - at : 0;
            const int count = (at + LANES <= all.to ? LANES : all.to - at) - first;
            stretch.at[i] = table[at / P] * strides->block + at % P / LANES * strides->tile;
            stretch.first[i] = first, stretch.count[i] = count;
            const bool whole = count == LANES && at + LANES - 1 <= shared &&
                               (window == 0 || of_sinks() || at >= last - window + 1);
            stretch.shown[i] = whole ? nullptr : stretch.masks[i];
            for (int q = 0; q < num && !whole; q++) {
                const Ints where = lane + at;
                const bool node = branches && tree.masks[q];
                Ints &shown = stretch.masks[i][q];
                shown = (where >= all.from) & (where < all.to) & (where <= (node ? tree.start - 1 : position[q]));
                if (window > 0) shown &= (where > position[q] - window) | (where < sinks);
                if (node && !of_sinks()) shown |= tree.shown(q, at, lane);
            }
        }
        stretch.num_tiles = i;
        return true;
    }

    // Whether the stretch filled last is of sinks that a window has left: they are met with queries turned as if it
    // followed right upon them.
    bool of_sinks() const { return split && span == 0; }

  private:
    Span spans[2];
    int num_spans = 0, span = 0, at = 0;
    int last, shared;  // slots up to `shared` are of no tree, and after no query
    bool split;

    void find_spans() {
        int first = position[0];
        last = position[0];
        for (int q = 1; q < num; q++) {
            first = position[q] < first ? position[q] : first;
            last = position[q] > last ? position[q] : last;
        }
        const int sinks = pass->sinks[b];
        int low = window > 0 && first - window + 1 > 0 ? first - window + 1 : 0;
        split = sinks > 0 && window > 0 && last - window + 1 > sinks;
        if (split) {
            spans[num_spans++] = {0, sinks};
            low = low > sinks ? low : sinks;
        } else if (sinks > 0) {
            low = 0;
        }
        spans[num_spans++] = {low, last + 1};
        shared = first;
        if (branches) {
            spans[num_spans - 1].to = tree.end();
            shared = shared < tree.start ? shared : tree.start - 1;
        }
        start_span(0);
    }

    void start_span(int which) {
        span = which;
        if (span < num_spans) at = spans[span].from / LANES * LANES;
    }

    // Those that are nodes of a tree, and where in the text they stand; whether there is any.
    bool find_branches(int row, int g, int G) {
        tree.start = pass->tree_starts[b];
        bool any = false;
        for (int q = 0; q < TILE; q++) {
            uint64_t mask = q < num ? pass->masks[row + (g + q) / G] : 0;
            tree.masks[q] = mask;
            if (!mask) continue;
            any = true;
            const int depth = __builtin_popcountll(mask);
            position[q] = tree.start - 1 + depth;
            // a window hides the ancestors farthest away: the lowest bits
            for (int hidden = window > 0 ? depth - window : 0; hidden > 0; hidden--) tree.masks[q] &= tree.masks[q] - 1;
        }
        return any;
    }
};

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

// qkv [T, all units, G + 2, D] -> blocks, from the first of these units on; context [T, all units, G, D]
template <typename In, typename Kv, typename Out>
void attend(const Pass &pass, const In *qkv, Kv *blocks, const Strides &strides, const Units &units, int G,
            int layer_window, float scale, Out *context) {
    static thread_local std::vector<float> rotated, rotated_sinks;
    static thread_local std::vector<Seen> seen;
    const int D = pass.head_dim, P = pass.block_size, T = pass.num_rows, U = units.to - units.from;
    const bool sinks = pass.sink_cos != nullptr;
    qkv += size_t(units.from) * (G + 2) * D;
    context += size_t(units.from) * G * D;
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
    const auto from_there = [&](int b, int from) {  // the queries at this place, or the first after it
        for (; b < pass.num_segments; b++, from = 0)
            if (from < (pass.row_starts[b + 1] - pass.row_starts[b]) * G)
                return Queries(pass, strides, b, from, G, layer_window);
        return Queries();
    };
    seen.resize(size_t(U) * TILE);
    Stretch stretches[2];
    Stretch *now = stretches, *next = stretches + 1;
    Queries queries = from_there(0, 0), others;
    bool more = queries.num > 0 && queries.fill(*now);
    while (more) {
        const int start = pass.row_starts[queries.b], Q = queries.num;
        const size_t first = (size_t(start) * G + queries.from) * D;
        for (int i = 0; i < U * Q; i++) {
            seen[i].best = MASKED;
            seen[i].weight = Vec{};
            std::memset(seen[i].values, 0, sizeof(float) * D);
        }
        bool same = true;
        while (same) {
            const float *heads = (queries.of_sinks() && sinks ? rotated_sinks : rotated).data() + first;
            // keys outermost, so that memory is read in its own order
            same = queries.fill(*next);
            if (!same) {
                others = from_there(queries.b, queries.from + TILE);
                more = others.num > 0 && others.fill(*next);
            }
            const bool fetch = same ? queries.from == 0 : more && others.from == 0;
            for (int u = 0; u < U; u++) {
                const float *rows[TILE];
                for (int q = 0; q < Q; q++) rows[q] = heads + (size_t(u) * T * G + q) * D;
                const bool last = u + 1 == U;
                const Kv *unit = blocks + u * strides.unit;
                const Stretch *ahead = last ? (fetch ? next : nullptr) : queries.from == 0 ? now : nullptr;
                const Kv *ahead_unit = last ? blocks : unit + strides.unit;
                by_count(Q, [&](auto n) {
                    if (ahead)
                        take<n.value, true>(rows, D, unit, *now, ahead_unit, ahead, seen.data() + u * Q);
                    else
                        take<n.value, false>(rows, D, unit, *now, ahead_unit, ahead, seen.data() + u * Q);
                });
            }
            std::swap(now, next);
        }
        for (int u = 0; u < U; u++)
            for (int q = 0; q < Q; q++) {
                const Seen &all = seen[u * Q + q];
                const float inverse = 1.0f / total(all.weight);
                const int row = start + (queries.from + q) / G, g = (queries.from + q) % G;
                Out *to = context + ((size_t(row) * units.all + u) * G + g) * D;
                int d = 0;
                for (; d + LANES <= D; d += LANES) store(to + d, load(all.values + d) * inverse);
                for (; d < D; d++) narrow(all.values[d] * inverse, to + d);
            }
        queries = others;
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
