// Packs weights (codec.py, Note: seven exponents and an escape). The kernels run one after another:
//  1. count: how often each exponent is there;
//  2. choose: the seven commonest of them, and how many values escape, from which the host knows how much is packed;
//  3. escapes: how many each group has; the host has them summed up to the numbers of escapes before each group;
//  4. pack: writes all the rest, each byte between the parts too.

#include "format.cuh"

// Groups that a warp counts.
#define COUNTED_GROUPS 8
// Counters of each exponent that a warp has: lanes that add to the same one take turns.
#define COPIES 4
#define EXPONENTS 256

// What is known of a tensor before it is packed; at first zeros.
struct Exponents {
    u32 counts[EXPONENTS];
    u8 table[8];
    u32 escaped, unused;
};

// Eight values, each rotated left by one bit, so that its exponent comes first: their low bytes, and their high bytes.
struct Chunk {
    uint2 low, high;
};

__device__ static u32 rotated(u32 pair) { return (pair << 1 & 0xFFFEFFFEu) | (pair >> 15 & 0x00010001u); }

__device__ static Chunk chunk_of(uint4 values) {
    const u32 x = rotated(values.x), y = rotated(values.y), z = rotated(values.z), w = rotated(values.w);
    Chunk chunk;
    chunk.low.x = __byte_perm(x, y, 0x6420);
    chunk.low.y = __byte_perm(z, w, 0x6420);
    chunk.high.x = __byte_perm(x, y, 0x7531);
    chunk.high.y = __byte_perm(z, w, 0x7531);
    return chunk;
}

template <int BITS>
__device__ static u32 exponent_of(const Chunk& chunk, u32 place) {
    const u32 four = place < 4 ? chunk.high.x : chunk.high.y;
    return (four >> place % 4 * 8 & 0xFFu) >> (8 - BITS);
}

// -- count and choose -------------------------------------------------------------------------------------------------

template <int BITS>
__device__ static void count(const uint4* values, u32 chunks, Exponents* found) {
    __shared__ u32 counters[WARPS][COPIES << BITS];
    const u32 lane = threadIdx.x % LANES;
    u32* own = counters[threadIdx.x / LANES];
    for (u32 place = lane; place < COPIES << BITS; place += LANES) own[place] = 0;
    __syncwarp();
    u32 chunk = (blockIdx.x * WARPS + threadIdx.x / LANES) * (COUNTED_GROUPS * ROUNDS * LANES) + lane;
    for (u32 group = 0; group < COUNTED_GROUPS; ++group) {
        // All are on their way before the first is counted.
        uint4 loaded[ROUNDS];
#pragma unroll
        for (u32 round = 0; round < ROUNDS; ++round) {
            if (chunk + round * LANES < chunks) loaded[round] = values[chunk + round * LANES];
        }
#pragma unroll
        for (u32 round = 0; round < ROUNDS; ++round, chunk += LANES) {
            if (chunk >= chunks) continue;
            const Chunk eight = chunk_of(loaded[round]);
            for (u32 place = 0; place < 8; ++place) {
                atomicAdd(own + exponent_of<BITS>(eight, place) * COPIES + lane % COPIES, 1u);
            }
        }
    }
    __syncwarp();
    for (u32 exponent = lane; exponent < 1u << BITS; exponent += LANES) {
        u32 sum = 0;
        for (u32 copy = 0; copy < COPIES; ++copy) sum += own[exponent * COPIES + copy];
        if (sum) atomicAdd(found->counts + exponent, sum);
    }
}

extern "C" __global__ void count_bfloat16(const uint4* values, u32 chunks, Exponents* found) {
    count<8>(values, chunks, found);
}
extern "C" __global__ void count_float16(const uint4* values, u32 chunks, Exponents* found) {
    count<5>(values, chunks, found);
}

// One block, with a thread for each exponent. Of two that are equally common the smaller one comes first.
extern "C" __global__ void choose(Exponents* found) {
    const u32 own = threadIdx.x;
    const u32 count = found->counts[own];
    u32 rank = 0;
    for (u32 other = 0; other < EXPONENTS; ++other) {
        const u32 others = found->counts[other];
        rank += others > count || (others == count && other < own);
    }
    if (rank < TABLE) found->table[rank] = own;
    else if (count) atomicAdd(&found->escaped, count);
}

// -- escapes and pack -------------------------------------------------------------------------------------------------

// The index of each exponent, in memory of this warp.
__device__ static const u8* indices_by_exponent(const Exponents* found) {
    __shared__ u32 indices[WARPS][EXPONENTS / 4];
    const u32 lane = threadIdx.x % LANES;
    u32* own = indices[threadIdx.x / LANES];
    for (u32 place = lane; place < EXPONENTS / 4; place += LANES) own[place] = TABLE * 0x01010101u;
    __syncwarp();
    if (lane < TABLE) ((u8*)own)[found->table[lane]] = lane;
    __syncwarp();
    return (const u8*)own;
}

// The indices of eight values, as nibbles.
template <int BITS>
__device__ static u32 indices_of(const Chunk& chunk, const u8* by_exponent) {
    u32 nibbles = 0;
    for (u32 place = 0; place < 8; ++place) nibbles |= by_exponent[exponent_of<BITS>(chunk, place)] << place * 4;
    return nibbles;
}

// The lowest bit of nibble i becomes bit i of a byte.
__device__ static u32 gathered(u32 nibbles) {
    u32 bits = nibbles & 0x11111111u;
    bits = (bits | bits >> 3) & 0x03030303u;
    bits = (bits | bits >> 6) & 0x000F000Fu;
    return (bits | bits >> 12) & 0xFFu;
}

// The lowest three bits of four bytes, as nibbles.
__device__ static u32 rests_of(u32 high) {
    u32 rests = high & 0x07070707u;
    rests = (rests | rests >> 4) & 0x00FF00FFu;
    return (rests | rests >> 8) & 0xFFFFu;
}

// The number of escapes of a group, where that of the group behind it begins.
template <int BITS>
__device__ static void escapes(const uint4* values, const Exponents* found, u8* packed, const Format& form) {
    const u32 lane = threadIdx.x % LANES;
    const u32 group = blockIdx.x * WARPS + threadIdx.x / LANES;
    const u32 first = group * (ROUNDS * LANES);
    if (first >= form.chunks) return;
    const u8* by_exponent = indices_by_exponent(found);
    u32 own = 0;
#pragma unroll
    for (u32 round = 0; round < ROUNDS; ++round) {
        const u32 chunk = first + round * LANES + lane;
        if (chunk >= form.chunks) continue;
        const u32 indices = indices_of<BITS>(chunk_of(values[chunk]), by_exponent);
        own += __popc(indices & indices >> 1 & indices >> 2 & 0x11111111u);
    }
    const u32 all = sum_over_lanes(own).all;
    if (lane) return;
    u32* starts = (u32*)(packed + form.starts);
    if (group == 0) starts[0] = 0;
    if (first + ROUNDS * LANES < form.chunks) starts[group + 1] = all;
}

__device__ static void clear(u8* packed, u32 begin, u32 end) {
    for (u32 place = begin + threadIdx.x % LANES; place < end; place += LANES) packed[place] = 0;
}

// Zeros between the parts.
template <int BITS>
__device__ static void clear_padding(u8* packed, u32 groups, const Format& form) {
    const int planes = 8 - BITS + 3;
    clear(packed, form.low + form.chunks * 8, form.planes[0]);
    for (int plane = 0; plane < planes; ++plane) {
        clear(packed, form.planes[plane] + form.chunks, plane + 1 < planes ? form.planes[plane + 1] : form.starts);
    }
    clear(packed, form.starts + groups * 4, form.escapes);
}

template <int BITS>
__device__ static void pack(const uint4* values, const Exponents* found, u8* packed, const Format& form) {
    const u32 lane = threadIdx.x % LANES;
    const u32 group = blockIdx.x * WARPS + threadIdx.x / LANES;
    const u32 first = group * (ROUNDS * LANES);
    if (first >= form.chunks) return;
    if (group == 0 && lane < form.low) packed[lane] = lane < TABLE ? found->table[lane] : 0;
    if (first + ROUNDS * LANES >= form.chunks) clear_padding<BITS>(packed, group + 1, form);
    const u8* by_exponent = indices_by_exponent(found);
    u8* next = packed + form.escapes + ((const u32*)(packed + form.starts))[group];
    for (u32 round = 0; round < ROUNDS; ++round) {
        const u32 chunk = first + round * LANES + lane;
        Chunk eight = {};
        u32 escaped = 0;
        if (chunk < form.chunks) {
            eight = chunk_of(values[chunk]);
            ((uint2*)(packed + form.low))[chunk] = eight.low;
            if (BITS < 8) {
                const u32 rests = rests_of(eight.high.x) | rests_of(eight.high.y) << 16;
                for (int bit = 0; bit < 8 - BITS; ++bit) packed[form.planes[bit] + chunk] = gathered(rests >> bit);
            }
            const u32 indices = indices_of<BITS>(eight, by_exponent);
            for (int bit = 0; bit < 3; ++bit) packed[form.planes[8 - BITS + bit] + chunk] = gathered(indices >> bit);
            escaped = gathered(indices & indices >> 1 & indices >> 2);
        }
        const Sum sum = sum_over_lanes(__popc(escaped));
        for (u8* own = next + sum.before; escaped; escaped &= escaped - 1) {
            *own++ = exponent_of<BITS>(eight, __ffs(escaped) - 1);
        }
        next += sum.all;
    }
}

extern "C" __global__ void escapes_bfloat16(const uint4* values, const Exponents* found, u8* packed, Format form) {
    escapes<8>(values, found, packed, form);
}
extern "C" __global__ void escapes_float16(const uint4* values, const Exponents* found, u8* packed, Format form) {
    escapes<5>(values, found, packed, form);
}

extern "C" __global__ void pack_bfloat16(const uint4* values, const Exponents* found, u8* packed, Format form) {
    pack<8>(values, found, packed, form);
}
extern "C" __global__ void pack_float16(const uint4* values, const Exponents* found, u8* packed, Format form) {
    pack<5>(values, found, packed, form);
}
