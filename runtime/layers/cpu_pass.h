// A pass through all layers of a small model in one call: between products as small as these, a library's own call, and
// Python's around it, take longer than the product.
//
// Letters: T rows, E width, U attention units of a group here, G query heads per unit, D head width, F feed-forward
// units of a layer here, L layers of a group.
//
//     group     U units in all; layer l has those from first_unit on
//     exact     for each layer:  A = attention(norm(h += delta));  delta = mlp(norm(h += A))
//     grouped   all layers' attention from one norm(h += delta), then, as runtime/spec/layer_parallel.py says:
//               `attention`  for each layer:  delta = mlp(norm(h += delta + A_l))
//               `block`      h += sum A_l;    delta = sum mlp_l(norm(h))
//
// A team of threads does each stage together: products by their outputs, attention by its units, norms by rows. Ranks
// that share memory add A and delta up in the pass; where they do not, each half of a layer is a call of its own.

#pragma once

#include <algorithm>

#include "cpu_attention.h"
#include "cpu_products.h"
#include "cpu_rows.h"
#include "cpu_team.h"

struct Layer {
    Matrix qkv;      // [units * (G + 2) * D, E]
    Matrix out;      // [E, units * G * D]
    Matrix gate_up;  // [2F, E]
    Matrix down;     // [E, F]
    int32_t first_unit, num_units;
};

struct Group {
    const Layer *layers;
    void *blocks;  // the group's KV
    int64_t block_stride, tile_stride, unit_stride;
    int32_t num_layers, num_units, queries, window;
};

enum Form : int32_t { EXACT, ATTENTION, BLOCK };

struct Stack {
    const Group *groups;
    Ranks *ranks;  // null: alone, or not to be added up here
    int32_t num_groups, width;
    float eps, scale;
};

// What is around the layers.
struct Ends {
    const void *embedding;  // [ids here + 1, E] of W, the last row zeros
    const float *final_norm;  // [E]
    Matrix head;              // [V, E]
    const int32_t *mixed_ids;  // of all tokens: what noise is made from; null where nothing is sampled
    int32_t first_embedding, num_embeddings, first_token;  // of this rank
    int32_t splits;  // whether other ranks have embeddings too
};

namespace {

constexpr int MANY_ROWS = 48;  // from these on, threads share rows of the feed-forward block, not its units
constexpr int ROW_BLOCK = 48;  // whose units stay in a core's cache

// Where a pass keeps what is on its way; as large as the largest so far, of whoever began it.
template <typename W>
struct Room {
    std::vector<W> x, context, active;
    std::vector<float> qkv, gate_up;

    void fit(const Stack &stack, const Pass &pass) {
        const size_t T = pass.num_rows;
        size_t heads = 0, mixed = 0, ff = 0;
        for (const Group *group = stack.groups; group < stack.groups + stack.num_groups; group++) {
            const size_t width = size_t(group->num_units) * pass.head_dim;
            heads = std::max(heads, width * (group->queries + 2)), mixed = std::max(mixed, width * group->queries);
            for (int l = 0; l < group->num_layers; l++) ff = std::max(ff, size_t(group->layers[l].down.inputs));
        }
        at_least(x, T * stack.width), at_least(qkv, T * heads), at_least(context, T * mixed);
        at_least(gate_up, T * 2 * ff), at_least(active, T * ff);
    }

    template <typename T>
    static void at_least(std::vector<T> &values, size_t size) {
        if (values.size() < size) values.resize(size);
    }
};

// One thread's view of a pass. All of a team call the same in the same order; each function ends with a meeting.
template <typename W, typename Kv>
struct Run {
    const Stack &stack;
    const Pass &pass;
    Room<W> &room;
    const Member me;
    const int T = pass.num_rows, E = stack.width;

    auto part_of(const Matrix &matrix) const { return me.part(num_tiles(matrix)); }

    // `then`: the matrix after this one, if known.
    void multiply(const W *x, int64_t x_stride, const Matrix &matrix, float *y, int64_t y_stride, bool add,
                  const Matrix *then) const {
        const auto part = part_of(matrix);
        product(x, x_stride, T, matrix, y, y_stride, add, part.from, part.to,
                then ? tile_at<W>(*then, part_of(*then).from) : nullptr);
    }

    // A [L or 1, T, E]: attention of layers [from, to) of a group over x [T, E], each alone or, if `summed`, all in one.
    void attention(const Group &group, int from, int to, bool summed, float *A) const {
        const Layer *layers = group.layers;
        const int D = pass.head_dim, G = group.queries;
        int first = 0, U = 0;  // a rank may hold no unit of a layer
        for (int l = from; l < to; l++) {
            if (U == 0) first = layers[l].first_unit;
            U += layers[l].num_units;
        }
        const int64_t heads = int64_t(U) * (G + 2) * D, mixed = int64_t(U) * G * D;
        float *qkv = room.qkv.data();
        W *context = room.context.data();
        // where a layer's heads begin among those of all: queries, key, value in qkv; queries in context
        const auto place = [&](int l) {
            return int64_t(layers[l].num_units ? layers[l].first_unit - first : 0);
        };
        const auto units = me.part(U);
        Kv *blocks = (Kv *)group.blocks + (first + units.from) * group.unit_stride;
        const Strides strides{group.block_stride, group.tile_stride, group.unit_stride};
        for (int l = from; l < to; l++)
            multiply(room.x.data(), E, layers[l].qkv, qkv + place(l) * (G + 2) * D, heads, false,
                     l + 1 < to ? &layers[l + 1].qkv : &layers[from].out);
        me.meet();
        if (units.from < units.to)
            attend(pass, qkv, blocks, strides, {units.from, units.to, U}, G, group.window, stack.scale, context);
        me.meet();
        for (int l = from; l < to; l++) {
            float *into = A + (summed ? 0 : int64_t(l - from) * T * E);
            multiply(context + place(l) * G * D, mixed, layers[l].out, into, E, summed && l > from,
                     l + 1 < to ? &layers[l + 1].out : &layers[from].gate_up);
        }
        me.meet();
    }

    // delta [T, E] is set, or added to
    void mlp(const Layer &layer, bool add, float *delta, const Matrix *then = nullptr) const {
        if (T >= MANY_ROWS) return mlp_by_rows(layer, add, delta, then);
        const int F = layer.down.inputs;
        float *gate_up = room.gate_up.data();
        W *active = room.active.data();
        multiply(room.x.data(), E, layer.gate_up, gate_up, 2 * F, false, &layer.down);
        me.meet();
        const auto part = me.part(F, LANES);
        for (int t = 0; t < T; t++)
            gate(gate_up + int64_t(t) * 2 * F, F, part.from, part.to, active + int64_t(t) * F);
        me.meet();
        multiply(active, F, layer.down, delta, E, add, then);
        me.meet();
    }

    // The same where each thread has rows enough of its own: what is between two products stays in its cache, and nobody
    // waits.
    void mlp_by_rows(const Layer &layer, bool add, float *delta, const Matrix *then) const {
        const int F = layer.down.inputs;
        const auto rows = me.part(T);
        float *gate_up = room.gate_up.data() + int64_t(rows.from) * 2 * F;
        W *active = room.active.data() + int64_t(rows.from) * F;
        for (int t = rows.from; t < rows.to; t += ROW_BLOCK) {
            const int count = std::min(ROW_BLOCK, rows.to - t);
            const Matrix &next = t + ROW_BLOCK < rows.to || !then ? layer.gate_up : *then;
            product(room.x.data() + int64_t(t) * E, E, count, layer.gate_up, gate_up, 2 * F, false, 0,
                    num_tiles(layer.gate_up), tile_at<W>(layer.down, 0));
            swiglu(gate_up, count, F, active);
            product(active, F, count, layer.down, delta + int64_t(t) * E, E, add, 0, num_tiles(layer.down),
                    tile_at<W>(next, 0));
        }
        me.meet();
    }

    // h [T, E] of token ids [T]
    template <typename Id>
    void embed(const Ends &ends, const Id *token_ids, float *h) const {
        const auto rows = me.part(T);
        for (int t = rows.from; t < rows.to; t++) {
            int64_t row = token_ids[t] - ends.first_embedding;
            if (row < 0 || row >= ends.num_embeddings) row = ends.num_embeddings;
            copy((const W *)ends.embedding + row * E, E, h + int64_t(t) * E);
        }
        me.meet();
        if (ends.splits) sum(h, int64_t(T) * E);
    }

    // room.x = norm(h += delta), times the weight [E] if there is one
    void norm(float *h, const float *delta, const float *weight = nullptr) const {
        const auto rows = me.part(T);
        const int64_t at = int64_t(rows.from) * E;
        add_rms(h + at, delta ? delta + at : nullptr, rows.to - rows.from, E, stack.eps, room.x.data() + at, weight);
        me.meet();
    }

    // The sum over ranks, in place.
    void sum(float *values, int64_t count) const {
        if (!stack.ranks) return;
        if (me.index == 0) add_up(*stack.ranks, values, count);
        me.meet();
    }

    void exact(const Group &group, int l, float *h, const float *last, float *delta, float *A, const Matrix *then) const {
        norm(h, last);
        attention(group, l, l + 1, true, A);
        sum(A, int64_t(T) * E);
        norm(h, A);
        mlp(group.layers[l], false, delta, then);
        sum(delta, int64_t(T) * E);
    }

    void block(const Group &group, float *h, const float *last, float *delta, float *A, const Matrix *then) const {
        norm(h, last);
        attention(group, 0, group.num_layers, true, A);
        sum(A, int64_t(T) * E);
        norm(h, A);
        for (int l = 0; l < group.num_layers; l++)
            mlp(group.layers[l], l > 0, delta, l + 1 < group.num_layers ? &group.layers[l + 1].gate_up : then);
        sum(delta, int64_t(T) * E);
    }

    void side_by_side(const Group &group, float *h, const float *last, float *delta, float *A, const Matrix *then) const {
        const int64_t size = int64_t(T) * E;
        norm(h, last);
        attention(group, 0, group.num_layers, false, A);
        sum(A, group.num_layers * size);
        for (int l = 0; l < group.num_layers; l++) {
            float *A_l = A + l * size;
            if (l > 0) {
                const auto part = me.part(size, LANES);
                for (int64_t i = part.from; i < part.to; i++) A_l[i] += delta[i];
                me.meet();
            }
            norm(h, A_l);
            mlp(group.layers[l], false, delta, l + 1 < group.num_layers ? &group.layers[l + 1].gate_up : then);
            sum(delta, size);
        }
    }

    // The whole stack. h [T, E] changes; delta [T, E], to be added to it, is set; A [most layers, T, E] is room. `after`
    // is the matrix that comes next.
    void whole(Form form, float *h, float *delta, float *A, const Matrix *after) const {
        const float *last = nullptr;
        for (const Group *group = stack.groups; group < stack.groups + stack.num_groups; group++, last = delta) {
            const Matrix *then = group + 1 < stack.groups + stack.num_groups ? &group[1].layers->qkv : after;
            if (form == EXACT || group->num_layers == 1)
                for (int l = 0; l < group->num_layers; l++, last = delta)
                    exact(*group, l, h, last, delta, A, l + 1 < group->num_layers ? &group->layers[l + 1].qkv : then);
            else if (form == BLOCK)
                block(*group, h, last, delta, A, then);
            else
                side_by_side(*group, h, last, delta, A, then);
        }
    }
};

// `part(run)` by every thread of the team.
template <typename W, typename Kv, typename Part>
void together(Team &team, const Stack &stack, const Pass &pass, Part &&part) {
    static thread_local Room<W> room;
    Room<W> &ours = room;
    ours.fit(stack, pass);
    team.run([&](int index) { part(Run<W, Kv>{stack, pass, ours, {team, index}}); });
}

}  // namespace
