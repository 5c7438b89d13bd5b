// Attention of whole tiles of rows on tensor cores, for bf16 and heads of D = 64 or 128 dimensions: up to 64 rows of one
// sequence a block, 16 of them a warp, and 64 of what they see at a time. As in FlashAttention-2 (Dao, 2023) the scores stay in
// registers; as in the kernels for single rows, what the backward pass needs of the forward pass is computed again.
//
// A product is `mma.m16n8k16` of PTX. With group = lane / 4 and part = lane % 4, a lane holds of the left operand rows group and
// group + 8, columns 2 part, 2 part + 1 and those 8 further; of the right one the same rows of k and column group; of the sum
// rows group and group + 8, columns 2 part and 2 part + 1. Two sums side by side are thus a left operand of 16 columns.

static constexpr int TILE = 64;
static constexpr unsigned NOWHERE = ~0u;

struct Tile {
    unsigned row, count;
};

static __device__ __forceinline__ unsigned both(float low, float high) {
    __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&packed);
}

static __device__ __forceinline__ unsigned both_at(const bf16* at) { return *reinterpret_cast<const unsigned*>(at); }

struct Left {
    unsigned at[4];

    __device__ Left() {}
    // Of two sums side by side.
    __device__ Left(const float one[4], const float next[4])
        : at{both(one[0], one[1]), both(one[2], one[3]), both(next[0], next[1]), both(next[2], next[3])} {}
};

static __device__ __forceinline__ void add_product(float sum[4], const Left& a, unsigned low, unsigned high) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(low), "r"(high));
}

// 64 rows in shared memory, so far apart that eight of them lie in different banks.
template <int D>
struct Rows {
    static constexpr int far = D + 8;
    bf16 at[TILE * far];

    // Row `r` comes from `place(r)`, zeros where that is null. By all 128 threads.
    template <typename F>
    __device__ void load(F place) {
        for (int n = threadIdx.x; n < TILE * (D / 8); n += 128) {
            int row = n / (D / 8), part = n % (D / 8);
            const bf16* from = place(row);
            uint4 raw = make_uint4(0, 0, 0, 0);
            if (from) raw = reinterpret_cast<const uint4*>(from)[part];
            *reinterpret_cast<uint4*>(at + row * far + part * 8) = raw;
        }
    }
};

// Of 16 rows of a matrix in memory the left operands for all D columns; zeros for rows that are null.
template <int D>
struct Own {
    Left at[D / 16];

    __device__ void load(const bf16* upper, const bf16* lower, int part) {
        #pragma unroll
        for (int k = 0; k < D / 16; k++) {
            int column = k * 16 + part * 2;
            at[k].at[0] = upper ? both_at(upper + column) : 0;
            at[k].at[1] = lower ? both_at(lower + column) : 0;
            at[k].at[2] = upper ? both_at(upper + column + 8) : 0;
            at[k].at[3] = lower ? both_at(lower + column + 8) : 0;
        }
    }

    // `sum = own rowsᵀ` for the eight rows from `first` on.
    __device__ void times(float sum[4], const Rows<D>& rows, int first, int group, int part) const {
        const bf16* row = rows.at + (first + group) * Rows<D>::far + part * 2;
        sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        #pragma unroll
        for (int k = 0; k < D / 16; k++) add_product(sum, at[k], both_at(row + k * 16), both_at(row + k * 16 + 8));
    }
};

// 16 rows of D columns of sums.
template <int D>
struct Sums {
    float at[D / 8][4];

    __device__ void clear() {
        #pragma unroll
        for (int n = 0; n < D / 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) at[n][i] = 0.0f;
    }

    // `+= left rows` for the 16 rows from `first` on.
    __device__ void add(const Left& left, const Rows<D>& rows, int first) {
        int lane = threadIdx.x % 32;
        // Four squares of eight: rows and rows + 8 of these eight columns, and of the next ones.
        const bf16* own = rows.at + (first + lane % 16) * Rows<D>::far + lane / 16 * 8;
        #pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            unsigned b[4], address = static_cast<unsigned>(__cvta_generic_to_shared(own + n * 8));
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                         : "r"(address));
            add_product(at[n], left, b[0], b[1]);
            add_product(at[n + 1], left, b[2], b[3]);
        }
    }

    __device__ void scale(float upper, float lower) {
        #pragma unroll
        for (int n = 0; n < D / 8; n++) at[n][0] *= upper, at[n][1] *= upper, at[n][2] *= lower, at[n][3] *= lower;
    }

    // To two rows in memory, unless they are null.
    __device__ void store(bf16* upper, bf16* lower, int part) const {
        #pragma unroll
        for (int n = 0; n < D / 8; n++) {
            int column = n * 8 + part * 2;
            if (upper) *reinterpret_cast<unsigned*>(upper + column) = both(at[n][0], at[n][1]);
            if (lower) *reinterpret_cast<unsigned*>(lower + column) = both(at[n][2], at[n][3]);
        }
    }
};

// The two rows of a tile that a lane holds parts of, in one head, and what they see.
template <int D>
struct Pair {
    unsigned row[2];
    Sight sees[2];
    int head;

    __device__ Pair(const Tile& tile, const Sight* sights, int head) : head(head) {
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            unsigned nth = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
            row[r] = nth < tile.count ? tile.row + nth : NOWHERE;
            sees[r] = sights && nth < tile.count ? sights[tile.row + nth] : Sight{0, 0, 0};
        }
    }
    // Null where the tile has no such row. Two rows of `x` are `far` apart.
    template <typename T>
    __device__ T* in(T* x, int far, int r) const {
        return row[r] == NOWHERE ? nullptr : x + (size_t)row[r] * far + head * D;
    }
    __device__ bool sees_place(int r, unsigned place) const { return place >= sees[r].from && place < sees[r].to; }
};

// The places that the rows of a tile see, 64 at a time.
template <int D>
struct Seen {
    const unsigned* locations;
    unsigned from, to;
    int key;

    __device__ Seen(const Tile& tile, const Sight* sights, const unsigned* locations, int key)
        : locations(locations + sights[tile.row].first), from(sights[tile.row].from),
          to(sights[tile.row + tile.count - 1].to), key(key) {}

    __device__ void load_one(Rows<D>& rows, const bf16* x, int far, unsigned start) const {
        rows.load([&](int row) { return start + row < to ? x + (size_t)locations[start + row] * far + key * D : nullptr; });
    }

    // Keys and values from place `start` on; all warps are done with those before.
    __device__ void load(Rows<D>& k_at, const bf16* k, int k_far, Rows<D>& v_at, const bf16* v, int v_far, unsigned start) const {
        __syncthreads();
        load_one(k_at, k, k_far, start);
        load_one(v_at, v, v_far, start);
        __syncthreads();
    }
};

// A block a tile and query head.
template <int D>
static __device__ void attend_tiles(bf16* out, const bf16* q, const bf16* k, const bf16* v, const unsigned* locations,
                                    const Sight* sights, const Tile* tiles, int queries, int keys, int v_far, float scale) {
    __shared__ __align__(16) Rows<D> k_at;
    __shared__ __align__(16) Rows<D> v_at;
    Tile tile = tiles[blockIdx.x];
    int head = blockIdx.y, key = head / (queries / keys), group = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
    Pair<D> pair(tile, sights, head);
    Seen<D> seen(tile, sights, locations, key);
    Own<D> own;
    own.load(pair.in(q, queries * D, 0), pair.in(q, queries * D, 1), part);
    Sums<D> sums;
    sums.clear();
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    for (unsigned start = seen.from; start < seen.to; start += TILE) {
        seen.load(k_at, k, keys * D, v_at, v, v_far, start);
        float scores[TILE / 8][4], now[2] = {most[0], most[1]};
        #pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            own.times(scores[n], k_at, n * 8, group, part);
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                bool sees = pair.sees_place(i / 2, start + n * 8 + part * 2 + i % 2);
                scores[n][i] = sees ? scores[n][i] * scale : -INFINITY;
                now[i / 2] = fmaxf(now[i / 2], scores[n][i]);
            }
        }
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            #pragma unroll
            for (int far = 1; far <= 2; far *= 2) now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffff, now[r], far));
        }
        float kept[2] = {fall(most[0], now[0]), fall(most[1], now[1])};
        sums.scale(kept[0], kept[1]);
        #pragma unroll
        for (int r = 0; r < 2; r++) most[r] = now[r], total[r] *= kept[r];
        #pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[n][i] = fall(scores[n][i], most[i / 2]);
                total[i / 2] += scores[n][i];
            }
        #pragma unroll
        for (int n = 0; n < TILE / 8; n += 2) sums.add(Left(scores[n], scores[n + 1]), v_at, n * 8);
    }
    #pragma unroll
    for (int r = 0; r < 2; r++)
        #pragma unroll
        for (int far = 1; far <= 2; far *= 2) total[r] += __shfl_xor_sync(0xffffffff, total[r], far);
    sums.scale(1.0f / total[0], 1.0f / total[1]);
    sums.store(pair.in(out, queries * D, 0), pair.in(out, queries * D, 1), part);
}

// The gradient of the queries, and `stats` as the kernel for single rows writes them. A block a tile and query head.
template <int D>
static __device__ void attend_backward_queries_tiles(bf16* dq, float2* stats, const bf16* dy, const bf16* q, const bf16* k,
                                                     const bf16* v, const unsigned* locations, const Sight* sights,
                                                     const Tile* tiles, int queries, int keys, int v_far, int far,
                                                     float scale) {
    __shared__ __align__(16) Rows<D> k_at;
    __shared__ __align__(16) Rows<D> v_at;
    Tile tile = tiles[blockIdx.x];
    int head = blockIdx.y, key = head / (queries / keys), group = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
    Pair<D> pair(tile, sights, head);
    Seen<D> seen(tile, sights, locations, key);
    Own<D> own, own_dy;
    own.load(pair.in(q, queries * D, 0), pair.in(q, queries * D, 1), part);
    own_dy.load(pair.in(dy, queries * D, 0), pair.in(dy, queries * D, 1), part);
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, slopes[2] = {0.0f, 0.0f};
    for (unsigned start = seen.from; start < seen.to; start += TILE) {
        seen.load(k_at, k, keys * D, v_at, v, v_far, start);
        #pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float scores[4], slope[4];
            own.times(scores, k_at, n * 8, group, part);
            own_dy.times(slope, v_at, n * 8, group, part);
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                if (!pair.sees_place(i / 2, start + n * 8 + part * 2 + i % 2)) continue;
                float score = scores[i] * scale, now = fmaxf(most[i / 2], score);
                float kept = fall(most[i / 2], now), weight = __expf(score - now);
                most[i / 2] = now;
                total[i / 2] = total[i / 2] * kept + weight;
                slopes[i / 2] = slopes[i / 2] * kept + weight * slope[i];
            }
        }
    }
    float log_total[2], mean[2];
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        #pragma unroll
        for (int away = 1; away <= 2; away *= 2) {
            float other = __shfl_xor_sync(0xffffffff, most[r], away), now = fmaxf(most[r], other);
            float kept = fall(most[r], now), added = fall(other, now);
            total[r] = total[r] * kept + __shfl_xor_sync(0xffffffff, total[r], away) * added;
            slopes[r] = slopes[r] * kept + __shfl_xor_sync(0xffffffff, slopes[r], away) * added;
            most[r] = now;
        }
        log_total[r] = most[r] + __logf(total[r]);
        mean[r] = slopes[r] / total[r];
        if (part == 0 && pair.row[r] != NOWHERE) stats[(size_t)pair.row[r] * queries + head] = make_float2(log_total[r], mean[r]);
    }
    Sums<D> sums;
    sums.clear();
    for (unsigned start = seen.from; start < seen.to; start += TILE) {
        seen.load(k_at, k, keys * D, v_at, v, v_far, start);
        #pragma unroll
        for (int n = 0; n < TILE / 8; n += 2) {
            float d[2][4];
            #pragma unroll
            for (int side = 0; side < 2; side++) {
                float scores[4], slope[4];
                own.times(scores, k_at, (n + side) * 8, group, part);
                own_dy.times(slope, v_at, (n + side) * 8, group, part);
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    bool sees = pair.sees_place(i / 2, start + (n + side) * 8 + part * 2 + i % 2);
                    float weight = __expf(scores[i] * scale - log_total[i / 2]);
                    d[side][i] = sees ? weight * (slope[i] - mean[i / 2]) * scale : 0.0f;
                }
            }
            sums.add(Left(d[0], d[1]), k_at, n * 8);
        }
    }
    sums.store(pair.in(dq, far, 0), pair.in(dq, far, 1), part);
}

// The gradients of keys and values of whole sequences. A block a tile of keys and key head; the other way round than above
// the own rows are keys, and the columns of scores queries.
template <int D>
static __device__ void attend_backward_keys_tiles(bf16* dk, bf16* dv, const bf16* dy, const bf16* q, const bf16* k, const bf16* v,
                                                  const float2* stats, const unsigned* until, const Tile* tiles, int queries,
                                                  int keys, int v_far, int far, float scale) {
    __shared__ __align__(16) Rows<D> q_at;
    __shared__ __align__(16) Rows<D> dy_at;
    __shared__ float2 stats_at[TILE];
    Tile tile = tiles[blockIdx.x];
    int key = blockIdx.y, sharing = queries / keys, group = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
    Pair<D> pair(tile, nullptr, key);
    unsigned seen_until[2];
    #pragma unroll
    for (int r = 0; r < 2; r++) seen_until[r] = pair.row[r] == NOWHERE ? 0 : until[pair.row[r]];
    Own<D> own_k, own_v;
    own_k.load(pair.in(k, keys * D, 0), pair.in(k, keys * D, 1), part);
    own_v.load(pair.in(v, v_far, 0), pair.in(v, v_far, 1), part);
    Sums<D> sum_k, sum_v;
    sum_k.clear();
    sum_v.clear();
    unsigned last = until[tile.row + tile.count - 1];
    for (unsigned start = tile.row; start < last; start += TILE) {
        for (int head = key * sharing; head < (key + 1) * sharing; head++) {
            auto at = [&](int row) { return (size_t)(start + row) * queries + head; };
            __syncthreads();
            q_at.load([&](int row) { return start + row < last ? q + at(row) * D : nullptr; });
            dy_at.load([&](int row) { return start + row < last ? dy + at(row) * D : nullptr; });
            if (threadIdx.x < TILE && start + threadIdx.x < last) stats_at[threadIdx.x] = stats[at(threadIdx.x)];
            __syncthreads();
            #pragma unroll
            for (int n = 0; n < TILE / 8; n += 2) {
                float weights[2][4], d[2][4];
                #pragma unroll
                for (int side = 0; side < 2; side++) {
                    float slope[4];
                    own_k.times(weights[side], q_at, (n + side) * 8, group, part);
                    own_v.times(slope, dy_at, (n + side) * 8, group, part);
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int column = (n + side) * 8 + part * 2 + i % 2;
                        unsigned row = start + column;
                        bool sees = row >= pair.row[i / 2] && row < seen_until[i / 2];
                        float2 stat = stats_at[column];
                        float weight = sees ? __expf(weights[side][i] * scale - stat.x) : 0.0f;
                        weights[side][i] = weight;
                        d[side][i] = sees ? weight * (slope[i] - stat.y) * scale : 0.0f;
                    }
                }
                sum_v.add(Left(weights[0], weights[1]), dy_at, n * 8);
                sum_k.add(Left(d[0], d[1]), q_at, n * 8);
            }
        }
    }
    sum_k.store(pair.in(dk, far, 0), pair.in(dk, far, 1), part);
    sum_v.store(pair.in(dv, far, 0), pair.in(dv, far, 1), part);
}

#define TILES(D) \
    extern "C" __global__ void __launch_bounds__(128) attend_tiles_##D##_bf16( \
        bf16* out, const bf16* q, const bf16* k, const bf16* v, const unsigned* locations, const Sight* sights, const Tile* tiles, \
        int queries, int keys, int v_far, float scale) { \
        attend_tiles<D>(out, q, k, v, locations, sights, tiles, queries, keys, v_far, scale); \
    } \
    extern "C" __global__ void __launch_bounds__(128) attend_backward_queries_tiles_##D##_bf16( \
        bf16* dq, float2* stats, const bf16* dy, const bf16* q, const bf16* k, const bf16* v, const unsigned* locations, \
        const Sight* sights, const Tile* tiles, int queries, int keys, int v_far, int far, float scale) { \
        attend_backward_queries_tiles<D>(dq, stats, dy, q, k, v, locations, sights, tiles, queries, keys, v_far, far, scale); \
    } \
    extern "C" __global__ void __launch_bounds__(128) attend_backward_keys_tiles_##D##_bf16( \
        bf16* dk, bf16* dv, const bf16* dy, const bf16* q, const bf16* k, const bf16* v, const float2* stats, \
        const unsigned* until, const Tile* tiles, int queries, int keys, int v_far, int far, float scale) { \
        attend_backward_keys_tiles<D>(dk, dv, dy, q, k, v, stats, until, tiles, queries, keys, v_far, far, scale); \
    }

TILES(64)
TILES(128)
