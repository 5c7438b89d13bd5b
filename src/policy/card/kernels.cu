// The decoder's own kernels on a card: whatever a layer does between two matrix products, one launch each.
// Numbers are T (f32 or bf16), sums are f32. Tensors are contiguous; shapes as in card.rs.

#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;

static __device__ __forceinline__ float wide(float x) { return x; }
static __device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ void put(float* out, float x) { *out = x; }
static __device__ __forceinline__ void put(bf16* out, float x) { *out = __float2bfloat16(x); }

// Sums over groups of `width` neighbouring lanes; every lane of a group gets it.
template <int width>
static __device__ __forceinline__ float sum_of(float x) {
    for (int far = width / 2; far > 0; far /= 2) x += __shfl_xor_sync(0xffffffff, x, far);
    return x;
}

static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// ---- norms: a warp a row, four rows a block ----

static __device__ __forceinline__ int warp_row() { return blockIdx.x * 4 + threadIdx.y; }

template <typename T>
static __device__ float inverse_rms(const T* x, int columns, float epsilon) {
    float squares = 0.0f;
    for (int c = threadIdx.x; c < columns; c += 32) squares += wide(x[c]) * wide(x[c]);
    return rsqrtf(sum_of<32>(squares) / columns + epsilon);
}

template <typename T>
static __device__ void rms_norm(T* y, const T* x, const T* weight, int rows, int columns, float epsilon) {
    int row = warp_row();
    if (row >= rows) return;
    x += (size_t)row * columns;
    y += (size_t)row * columns;
    float scale = inverse_rms(x, columns, epsilon);
    for (int c = threadIdx.x; c < columns; c += 32) put(y + c, wide(x[c]) * scale * wide(weight[c]));
}

// `onto` is added where `added` is set.
template <typename T>
static __device__ void rms_norm_backward(T* dx, const T* dy, const T* x, const T* weight, const T* onto, int rows, int columns,
                                         int added, float epsilon) {
    int row = warp_row();
    if (row >= rows) return;
    size_t at = (size_t)row * columns;
    x += at, dy += at, dx += at, onto += added ? at : 0;
    float scale = inverse_rms(x, columns, epsilon);
    float dot = 0.0f;
    for (int c = threadIdx.x; c < columns; c += 32) dot += wide(dy[c]) * wide(weight[c]) * wide(x[c]);
    float shrink = sum_of<32>(dot) * scale * scale / columns;
    for (int c = threadIdx.x; c < columns; c += 32) {
        float d = scale * (wide(dy[c]) * wide(weight[c]) - wide(x[c]) * shrink);
        put(dx + c, added ? d + wide(onto[c]) : d);
    }
}

// ---- elementwise: a thread an element; `far` is the distance between two rows of what may be columns of a wider matrix ----

static __device__ __forceinline__ int element() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <typename T>
static __device__ void swiglu(T* y, const T* gate, const T* up, int count, int columns, int far) {
    int at = element();
    if (at >= count) return;
    size_t from = (size_t)(at / columns) * far + at % columns;
    float x = wide(gate[from]);
    put(y + at, x * sigmoid(x) * wide(up[from]));
}

// The gradients of gate and up, side by side: `[rows, 2 · columns]`.
template <typename T>
static __device__ void swiglu_backward(T* out, const T* dy, const T* gate, const T* up, int count, int columns, int far) {
    int at = element();
    if (at >= count) return;
    size_t from = (size_t)(at / columns) * far + at % columns;
    float d = wide(dy[at]), x = wide(gate[from]), s = sigmoid(x);
    T* row = out + (size_t)(at / columns) * 2 * columns + at % columns;
    put(row, d * wide(up[from]) * s * (1.0f + x * (1.0f - s)));
    put(row + columns, d * x * s);
}

// Turns each head's halves; `cos` and `sin` are `[rows, half]`. A thread a pair, so that `y` may be `x`.
template <typename T>
static __device__ void turn(T* y, const T* x, const float* cos, const float* sin, int count, int heads, int half, int y_far,
                            int x_far, float sign) {
    int at = element();
    if (at >= count) return;
    int i = at % half, head = at / half % heads, row = at / half / heads;
    int column = head * 2 * half + i;
    x += (size_t)row * x_far + column;
    y += (size_t)row * y_far + column;
    float c = cos[row * half + i], s = sign * sin[row * half + i], a = wide(x[0]), b = wide(x[half]);
    put(y, a * c - b * s);
    put(y + half, b * c + a * s);
}

// Rows to places of a store.
template <typename T>
static __device__ void place_rows(T* store, const T* rows, const unsigned* places, int count, int columns, int far) {
    int at = element();
    if (at >= count) return;
    int row = at / columns, column = at % columns;
    store[(size_t)places[row] * columns + column] = rows[(size_t)row * far + column];
}

// ---- attention: eight lanes a key, N of its dimensions each ----
// Lane `lane % 8` of a group holds dimensions `N · (lane % 8)` and on; a head may have fewer than 8 N.

template <int N, typename T>
struct Slice {
    float at[N];
    __device__ void clear() {
        for (int n = 0; n < N; n++) at[n] = 0.0f;
    }
    __device__ void load(const T* head, int part, int dim) {
        if (sizeof(T) * N % 16 == 0 && dim == 8 * N) {
            // Whole heads of such a width lie on 16 bytes.
            const uint4* from = reinterpret_cast<const uint4*>(head + part * N);
            uint4 raw[sizeof(T) * N / 16 ? sizeof(T) * N / 16 : 1];
            for (int n = 0; n < sizeof(T) * N / 16; n++) raw[n] = from[n];
            const T* each = reinterpret_cast<const T*>(raw);
            for (int n = 0; n < N; n++) at[n] = wide(each[n]);
        } else {
            for (int n = 0; n < N; n++) at[n] = part * N + n < dim ? wide(head[part * N + n]) : 0.0f;
        }
    }
    __device__ void store(T* head, int part, int dim, float scale) const {
        for (int n = 0; n < N; n++)
            if (part * N + n < dim) put(head + part * N + n, at[n] * scale);
    }
    __device__ float dot(const Slice& other) const {
        float sum = 0.0f;
        for (int n = 0; n < N; n++) sum += at[n] * other.at[n];
        return sum_of<8>(sum);
    }
    __device__ void add(float by, const Slice& other) {
        for (int n = 0; n < N; n++) at[n] += by * other.at[n];
    }
    __device__ void scale(float by) {
        for (int n = 0; n < N; n++) at[n] *= by;
    }
    // Over the warp's four groups.
    __device__ void sum_groups() {
        for (int n = 0; n < N; n++) {
            at[n] += __shfl_xor_sync(0xffffffff, at[n], 8);
            at[n] += __shfl_xor_sync(0xffffffff, at[n], 16);
        }
    }
};

// Where a row's keys are: places `from` to `to` of those that `locations` lists from `first` on.
struct Sight {
    unsigned first, from, to;
};

// `exp(a − b)`, 0 for a = −∞ even where b is.
static __device__ __forceinline__ float fall(float a, float b) { return a == -INFINITY ? 0.0f : __expf(a - b); }

// A block a row and query head; its warps share the row's keys. Two rows of values are `v_far` apart. Softmax as it goes
// (Milakov and Gimelshein, 2018).
template <int N, typename T>
static __device__ void attend(T* out, const T* q, const T* k, const T* v, const unsigned* locations, const Sight* sights,
                              int queries, int keys, int dim, int v_far, float scale) {
    int row = blockIdx.x, head = blockIdx.y, key = head / (queries / keys);
    int group = threadIdx.x / 8, part = threadIdx.x % 8, groups = blockDim.x / 8;
    Sight sight = sights[row];
    Slice<N, T> own, sum, k_at, v_at;
    own.load(q + ((size_t)row * queries + head) * dim, part, dim);
    sum.clear();
    float most = -INFINITY, total = 0.0f;
    // All lanes of a warp go round equally often: they add up together.
    for (unsigned start = sight.from; start < sight.to; start += groups) {
        unsigned place = start + group;
        bool seen = place < sight.to;
        size_t at = locations[sight.first + (seen ? place : sight.from)];
        k_at.load(k + (at * keys + key) * dim, part, dim);
        v_at.load(v + at * v_far + key * dim, part, dim);
        float score = own.dot(k_at) * scale;
        if (!seen) score = -INFINITY;
        float now = fmaxf(most, score), kept = fall(most, now), weight = fall(score, now);
        most = now;
        total = total * kept + weight;
        sum.scale(kept);
        sum.add(weight, v_at);
    }
    // What the groups have found, as one.
    extern __shared__ float shared[];
    float *mosts = shared, *totals = mosts + groups, *sums = totals + groups;
    if (part == 0) mosts[group] = most, totals[group] = total;
    for (int n = 0; n < N; n++) sums[group * 8 * N + part * N + n] = sum.at[n];
    __syncthreads();
    if (group > 0) return;
    float whole = -INFINITY, weights = 0.0f;
    for (int g = 0; g < groups; g++) whole = fmaxf(whole, mosts[g]);
    sum.clear();
    for (int g = 0; g < groups; g++) {
        float share = fall(mosts[g], whole);
        weights += share * totals[g];
        for (int n = 0; n < N; n++) sum.at[n] += share * sums[g * 8 * N + part * N + n];
    }
    sum.store(out + ((size_t)row * queries + head) * dim, part, dim, 1.0f / weights);
}

// The gradient of the queries. A warp a row and query head, four of them a block. `stats` gets each one's log of the sum of
// its weights and the mean of the gradient under them, which the other half needs. Two rows of gradients are `far` apart.
template <int N, typename T>
static __device__ void attend_backward_queries(T* dq, float2* stats, const T* dy, const T* q, const T* k, const T* v,
                                               const unsigned* locations, const Sight* sights, int rows, int queries, int keys,
                                               int dim, int v_far, int far, float scale) {
    int pair = warp_row();
    if (pair >= rows * queries) return;
    int row = pair / queries, head = pair % queries, key = head / (queries / keys);
    int group = threadIdx.x / 8, part = threadIdx.x % 8;
    Sight sight = sights[row];
    size_t own_at = (size_t)pair * dim;
    Slice<N, T> own, own_dy, k_at, v_at, sum;
    own.load(q + own_at, part, dim);
    own_dy.load(dy + own_at, part, dim);
    sum.clear();
    float most = -INFINITY, total = 0.0f, slopes = 0.0f;
    for (unsigned start = sight.from; start < sight.to; start += 4) {
        unsigned place = start + group;
        bool seen = place < sight.to;
        size_t at = locations[sight.first + (seen ? place : sight.from)];
        k_at.load(k + (at * keys + key) * dim, part, dim);
        v_at.load(v + at * v_far + key * dim, part, dim);
        float score = own.dot(k_at) * scale, slope = own_dy.dot(v_at);
        if (!seen) score = -INFINITY;
        float now = fmaxf(most, score), kept = fall(most, now), weight = fall(score, now);
        most = now;
        total = total * kept + weight;
        slopes = slopes * kept + weight * slope;
    }
    for (int far = 8; far <= 16; far *= 2) {
        float other = __shfl_xor_sync(0xffffffff, most, far), now = fmaxf(most, other);
        float kept = fall(most, now), added = fall(other, now);
        total = total * kept + __shfl_xor_sync(0xffffffff, total, far) * added;
        slopes = slopes * kept + __shfl_xor_sync(0xffffffff, slopes, far) * added;
        most = now;
    }
    float log_total = most + __logf(total), mean = slopes / total;
    if (threadIdx.x == 0) stats[pair] = make_float2(log_total, mean);
    for (unsigned start = sight.from; start < sight.to; start += 4) {
        unsigned place = start + group;
        bool seen = place < sight.to;
        size_t at = locations[sight.first + (seen ? place : sight.from)];
        k_at.load(k + (at * keys + key) * dim, part, dim);
        v_at.load(v + at * v_far + key * dim, part, dim);
        float weight = __expf(own.dot(k_at) * scale - log_total), slope = own_dy.dot(v_at);
        sum.add(seen ? weight * (slope - mean) * scale : 0.0f, k_at);
    }
    sum.sum_groups();
    if (group == 0) sum.store(dq + (size_t)row * far + head * dim, part, dim, 1.0f);
}

// The gradients of keys and values of whole sequences. A warp a row and key head; `until` is behind the last row that sees
// the row, and all from the row itself on do.
template <int N, typename T>
static __device__ void attend_backward_keys(T* dk, T* dv, const T* dy, const T* q, const T* k, const T* v, const float2* stats,
                                            const unsigned* until, int rows, int queries, int keys, int dim, int v_far, int far,
                                            float scale) {
    int pair = warp_row();
    if (pair >= rows * keys) return;
    int row = pair / keys, key = pair % keys, sharing = queries / keys;
    int group = threadIdx.x / 8, part = threadIdx.x % 8;
    Slice<N, T> own_k, own_v, q_at, dy_at, sum_k, sum_v;
    own_k.load(k + (size_t)pair * dim, part, dim);
    own_v.load(v + (size_t)row * v_far + key * dim, part, dim);
    sum_k.clear();
    sum_v.clear();
    int count = ((int)until[row] - row) * sharing;
    for (int start = 0; start < count; start += 4) {
        bool seen = start + group < count;
        int nth = seen ? start + group : 0;
        size_t from = (size_t)(row + nth / sharing) * queries + key * sharing + nth % sharing;
        q_at.load(q + from * dim, part, dim);
        dy_at.load(dy + from * dim, part, dim);
        float2 stat = stats[from];
        float weight = __expf(own_k.dot(q_at) * scale - stat.x), slope = own_v.dot(dy_at);
        sum_v.add(seen ? weight : 0.0f, dy_at);
        sum_k.add(seen ? weight * (slope - stat.y) * scale : 0.0f, q_at);
    }
    sum_k.sum_groups();
    sum_v.sum_groups();
    if (group == 0) {
        size_t at = (size_t)row * far + key * dim;
        sum_k.store(dk + at, part, dim, 1.0f);
        sum_v.store(dv + at, part, dim, 1.0f);
    }
}

// ---- log-probabilities: a block a row of logits ----

// Both of all threads' sums, or of the greatest and the sum, by way of shared memory.
template <typename F>
static __device__ float over_block(float x, F join, float* shared) {
    for (int far = 16; far > 0; far /= 2) x = join(x, __shfl_xor_sync(0xffffffff, x, far));
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[0];
    for (int warp = 1; warp < blockDim.x / 32; warp++) x = join(x, shared[warp]);
    return x;
}

// `log p` of each row's target and the entropy in nats; the logits become probabilities where `kept` is set.
template <typename T>
static __device__ void logprobs(T* logits, float* chosen, float* entropies, const unsigned* targets, int columns, int kept,
                                float by) {
    __shared__ float shared[32];
    T* row = logits + (size_t)blockIdx.x * columns;
    auto greater = [](float a, float b) { return fmaxf(a, b); };
    auto plus = [](float a, float b) { return a + b; };
    float most = -INFINITY;
    for (int c = threadIdx.x; c < columns; c += blockDim.x) most = fmaxf(most, wide(row[c]) * by);
    most = over_block(most, greater, shared);
    float total = 0.0f, below = 0.0f;
    for (int c = threadIdx.x; c < columns; c += blockDim.x) {
        float far = wide(row[c]) * by - most, weight = __expf(far);
        total += weight;
        below += weight * far;
    }
    total = over_block(total, plus, shared);
    below = over_block(below, plus, shared);
    if (threadIdx.x == 0) {
        chosen[blockIdx.x] = wide(row[targets[blockIdx.x]]) * by - most - logf(total);
        entropies[blockIdx.x] = logf(total) - below / total;
    }
    if (!kept) return;
    __syncthreads();
    for (int c = threadIdx.x; c < columns; c += blockDim.x) put(row + c, __expf(wide(row[c]) * by - most) / total);
}

// ---- by name ----

#define KERNEL(name, type, parameters, ...) \
    extern "C" __global__ void name##_##type parameters { name(__VA_ARGS__); }

#define EACH(T, type) \
    KERNEL(rms_norm, type, (T * y, const T* x, const T* w, int rows, int columns, float e), y, x, w, rows, columns, e) \
    KERNEL(rms_norm_backward, type, \
           (T * dx, const T* dy, const T* x, const T* w, const T* onto, int rows, int columns, int added, float e), dx, dy, x, w, \
           onto, rows, columns, added, e) \
    KERNEL(swiglu, type, (T * y, const T* gate, const T* up, int count, int columns, int far), y, gate, up, count, columns, far) \
    KERNEL(swiglu_backward, type, (T * out, const T* dy, const T* gate, const T* up, int count, int columns, int far), out, dy, \
           gate, up, count, columns, far) \
    KERNEL(turn, type, \
           (T * y, const T* x, const float* cos, const float* sin, int count, int heads, int half, int y_far, int x_far, float sign), \
           y, x, cos, sin, count, heads, half, y_far, x_far, sign) \
    KERNEL(place_rows, type, (T * store, const T* rows, const unsigned* places, int count, int columns, int far), store, rows, \
           places, count, columns, far) \
    KERNEL(logprobs, type, (T * logits, float* chosen, float* entropies, const unsigned* targets, int columns, int kept, float by), \
           logits, chosen, entropies, targets, columns, kept, by) \
    ATTENTION(1, T, type) ATTENTION(2, T, type) ATTENTION(4, T, type) ATTENTION(8, T, type) ATTENTION(16, T, type) \
    ATTENTION(32, T, type)

#define ATTENTION(N, T, type) \
    extern "C" __global__ void attend_##N##_##type(T* out, const T* q, const T* k, const T* v, const unsigned* locations, \
                                                   const Sight* sights, int queries, int keys, int dim, int v_far, float scale) { \
        attend<N, T>(out, q, k, v, locations, sights, queries, keys, dim, v_far, scale); \
    } \
    extern "C" __global__ void attend_backward_queries_##N##_##type( \
        T* dq, float2* stats, const T* dy, const T* q, const T* k, const T* v, const unsigned* locations, const Sight* sights, \
        int rows, int queries, int keys, int dim, int v_far, int far, float scale) { \
        attend_backward_queries<N, T>(dq, stats, dy, q, k, v, locations, sights, rows, queries, keys, dim, v_far, far, scale); \
    } \
    extern "C" __global__ void attend_backward_keys_##N##_##type(T* dk, T* dv, const T* dy, const T* q, const T* k, const T* v, \
                                                                 const float2* stats, const unsigned* until, int rows, \
                                                                 int queries, int keys, int dim, int v_far, int far, \
                                                                 float scale) { \
        attend_backward_keys<N, T>(dk, dv, dy, q, k, v, stats, until, rows, queries, keys, dim, v_far, far, scale); \
    }

EACH(float, f32)
EACH(bf16, bf16)

#include "tiles.cuh"
