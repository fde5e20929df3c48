// From hidden states to tokens, and drafts that follow one another without leaving the call.
//
//     token ids ──embed──> h ── the stack ──> h ──head──> logits ──draw──> token ids
//         ^                                                                    │
//         └──────────────────────────── the next position ─────────────────────┘
//
// Letters: T rows, E width, V vocabulary entries here.

#pragma once

#include "cpu_pass.h"

// How each row's token is drawn: the best of logits, or of logits / temperature + noise, as runtime/sampling/sampler.py
// says.
struct Draws {
    const float *factors;  // [T] 1 / temperature, 0 for the best of logits
    const int32_t *keys;   // [T, 2] of the noise
};

// Requests that draft on, each from its own position. Those that stop sooner come later.
struct Chain {
    int32_t num_requests, num_depths, block_size, head_dim, form;
    const int32_t *counts;           // [requests] drafts that are still to be made
    const int32_t *positions;        // [requests] of the first token that is fed
    const int32_t *const *tables;    // [requests] block ids
    const float *cos, *sin;          // [positions, D]
    const float *factors;            // [requests] as in Draws
    const int32_t *keys;             // [depths, requests, 2]
    int32_t *token_ids;              // [depths + 1, requests]: the first row is fed first, the others are set
};

namespace {

// log x for x > 0: the exponent apart, and on [sqrt 1/2, sqrt 2] a series in (x - 1) / (x + 1).
Vec series(Vec s) {
    const Vec q = s * s;
    return 2.0f * s * (1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
}
Vec logarithm(Vec x) {
    Ints bits;
    std::memcpy(&bits, &x, sizeof bits);
    const Ints exponent = (bits - 0x3f3504f3) >> 23;  // 0 from sqrt 1/2 on
    bits -= exponent << 23;
    Vec m;
    std::memcpy(&m, &bits, sizeof m);
    return series((m - 1.0f) / (m + 1.0f)) + __builtin_convertvector(exponent, Vec) * 0.69314718056f;
}

// Gumbel noise of sixteen tokens: sampler.py's, but for the last bits of its logarithms.
Vec noise(const int32_t *mixed, const int32_t *key) {
    Words x;
    std::memcpy(&x, mixed, sizeof x);
    x ^= uint32_t(key[0]);
    x *= 0x7feb352du, x ^= x >> 15;
    x ^= uint32_t(key[1]);
    x *= 0x846ca68bu, x ^= x >> 16;
    x *= 0x7feb352du, x ^= x >> 15;
    const Ints bits = (Ints)(x & 0x7fffffffu);
    const Vec v = (__builtin_convertvector(bits, Vec) + 0.5f) * 4.656612873077393e-10f;
    // log(1 - v): near 0, where winners come from, without the difference
    const Vec near = series(-v / (2.0f - v)), rest = 1.0f - v;
    const Vec far = logarithm(rest > 5.9604645e-8f ? rest : splat(5.9604645e-8f));
    return -logarithm(-(v < 0.25f ? near : far));
}

template <typename W, typename Kv>
struct Ended {
    const Run<W, Kv> &run;
    const Ends &ends;

    // logits [T, V] of this rank, from h [T, E], to which delta is added unless it is null
    void head(float *h, const float *delta, float *logits) const {
        run.norm(h, delta, ends.final_norm);
        run.multiply(run.room.x.data(), run.E, ends.head, logits, ends.head.outputs, false, nullptr);
        run.me.meet();
    }

    // The token of each row, the same on every rank; of equal ones the lowest. `found` [T, 2 per rank] is room.
    void draw(const float *logits, const Draws &draws, float *found, int32_t *token_ids) const {
        const int V = ends.head.outputs, size = run.stack.ranks ? run.stack.ranks->size : 1;
        const int rank = run.stack.ranks ? run.stack.ranks->rank : 0;
        const auto rows = run.me.part(run.T);
        for (int t = rows.from; t < rows.to; t++) {
            const auto [score, id] = best(logits + int64_t(t) * V, V, draws.factors[t], draws.keys + 2 * t);
            if (size == 1) token_ids[t] = ends.first_token + id;
            float *mine = found + int64_t(t) * 2 * size;
            std::memset(mine, 0, sizeof(float) * 2 * size);
            mine[2 * rank] = score, mine[2 * rank + 1] = float(ends.first_token + id);
        }
        run.me.meet();
        if (size == 1) return;
        run.sum(found, int64_t(run.T) * 2 * size);
        for (int t = rows.from; t < rows.to; t++) {
            const float *all = found + int64_t(t) * 2 * size;
            int winner = 0;
            for (int r = 1; r < size; r++)
                if (all[2 * r] > all[2 * winner]) winner = r;
            token_ids[t] = int32_t(all[2 * winner + 1]);
        }
        run.me.meet();
    }

    struct Best {
        float score;
        int id;
    };

    Best best(const float *logits, int V, float factor, const int32_t *key) const {
        const int32_t *mixed = ends.mixed_ids + ends.first_token;
        const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        Vec top = splat(-INFINITY);
        Ints where = Ints{};
        int v = 0;
        for (; v + LANES <= V; v += LANES) {
            Vec score = load(logits + v);
            if (factor > 0.0f) score = score * factor + noise(mixed + v, key);
            const Ints more = score > top;
            top = more ? score : top;
            where = more ? lane + v : where;
        }
        Best found{-INFINITY, 0};
        for (int i = 0; i < LANES && v > 0; i++)
            if (top[i] > found.score || (top[i] == found.score && where[i] < found.id)) found = {top[i], where[i]};
        if (v < V) {
            int32_t last[LANES] = {};
            if (factor > 0.0f) std::memcpy(last, mixed + v, sizeof(int32_t) * (V - v));
            const Vec added = factor > 0.0f ? noise(last, key) : Vec{};
            for (int i = 0; v + i < V; i++) {
                const float score = factor > 0.0f ? logits[v + i] * factor + added[i] : logits[v + i];
                if (score > found.score) found = {score, v + i};
            }
        }
        return found;
    }
};

// Where the ends keep what is on its way.
struct EndsRoom {
    std::vector<float> h, delta, A, logits, found, cos, sin;
    std::vector<int32_t> starts, ends, none;

    void fit(int T, int E, int V, int layers, int D, int ranks) {
        Room<float>::at_least(h, size_t(T) * E), Room<float>::at_least(delta, size_t(T) * E);
        Room<float>::at_least(A, size_t(T) * E * layers), Room<float>::at_least(logits, size_t(T) * V);
        Room<float>::at_least(found, size_t(T) * 2 * ranks);
        Room<float>::at_least(cos, size_t(T) * D), Room<float>::at_least(sin, size_t(T) * D);
        Room<float>::at_least(starts, T + 1), Room<float>::at_least(ends, T), Room<float>::at_least(none, T);
    }
};

inline EndsRoom &ends_room() {
    static thread_local EndsRoom room;
    return room;
}

inline int ranks_of(const Stack &stack) { return stack.ranks ? stack.ranks->size : 1; }

// The token that follows each of T rows h [T, E], which has passed the stack.
template <typename W, typename Kv>
void choose(Team &team, const Stack &stack, const Ends &ends, int T, float *h, const Draws &draws, int32_t *token_ids) {
    EndsRoom &room = ends_room();
    room.fit(T, stack.width, ends.head.outputs, 0, 0, ranks_of(stack));
    Pass pass{};
    pass.num_rows = T;
    together<W, Kv>(team, stack, pass, [&](const auto &run) {
        const Ended<W, Kv> ended{run, ends};
        ended.head(h, nullptr, room.logits.data());
        ended.draw(room.logits.data(), draws, room.found.data(), token_ids);
    });
}

template <typename W, typename Kv>
void draft_on(Team &team, const Stack &stack, const Ends &ends, const Chain &chain) {
    EndsRoom &room = ends_room();
    int layers = 1;
    for (int g = 0; g < stack.num_groups; g++) layers = std::max(layers, stack.groups[g].num_layers);
    const int B = chain.num_requests, D = chain.head_dim;
    room.fit(B, stack.width, ends.head.outputs, layers, D, ranks_of(stack));
    for (int b = 0; b <= B; b++) room.starts[b] = b;
    Pass pass{};
    pass.block_size = chain.block_size, pass.head_dim = D, pass.tables = chain.tables;
    pass.row_starts = room.starts.data(), pass.ends = room.ends.data();
    pass.sinks = pass.windows = room.none.data();
    pass.cos = room.cos.data(), pass.sin = room.sin.data();
    for (int depth = 0, T = B; depth < chain.num_depths; depth++) {
        while (T > 0 && chain.counts[T - 1] <= depth) T--;
        if (T == 0) return;
        pass.num_rows = pass.num_segments = T;
        for (int b = 0; b < T; b++) {
            const int position = chain.positions[b] + depth;
            room.ends[b] = position + 1;
            std::memcpy(room.cos.data() + int64_t(b) * D, chain.cos + int64_t(position) * D, sizeof(float) * D);
            std::memcpy(room.sin.data() + int64_t(b) * D, chain.sin + int64_t(position) * D, sizeof(float) * D);
        }
        const int32_t *fed = chain.token_ids + int64_t(depth) * B;
        const Draws draws{chain.factors, chain.keys + int64_t(depth) * B * 2};
        together<W, Kv>(team, stack, pass, [&](const auto &run) {
            const Ended<W, Kv> ended{run, ends};
            run.embed(ends, fed, room.h.data());
            run.whole(Form(chain.form), room.h.data(), room.delta.data(), room.A.data(), &ends.head);
            ended.head(room.h.data(), room.delta.data(), room.logits.data());
            ended.draw(room.logits.data(), draws, room.found.data(), chain.token_ids + int64_t(depth + 1) * B);
        });
    }
}

}  // namespace
