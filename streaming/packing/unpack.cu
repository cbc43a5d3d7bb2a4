// Decodes packed weights (codec.py, Note: seven exponents and an escape).
//
// A lane reads 8 bytes in each round and writes 16. It computes on bytes and nibbles of a register at once: three bits of
// eight values become eight nibbles, and __byte_perm looks up four of them in a table of eight bytes.

#include "format.cuh"

// Bit i of a byte becomes the lowest bit of nibble i.
__device__ static u32 spread(u32 bits) {
    bits = (bits | bits << 12) & 0x000F000Fu;
    bits = (bits | bits << 6) & 0x03030303u;
    return (bits | bits << 3) & 0x11111111u;
}

__device__ static u32 nibbles(u32 lowest, u32 middle, u32 highest) {
    return spread(lowest) | spread(middle) << 1 | spread(highest) << 2;
}

// Two values from two low bytes and two high bytes: interleave, and rotate each right by one bit.
__device__ static u32 pair(u32 low, u32 high, u32 bytes) {
    u32 rotated = __byte_perm(low, high, bytes);
    return (rotated >> 1 & 0x7FFF7FFFu) | (rotated & 0x00010001u) << 15;
}

template <int REST_PLANES>
__device__ static void unpack(const u8* packed, uint4* out, const Format& form) {
    const u32 lane = threadIdx.x % LANES;
    const u32 group = blockIdx.x * WARPS + threadIdx.x / LANES;
    const u32 first = group * (ROUNDS * LANES);
    if (first >= form.chunks) return;
    const uint2 table = *(const uint2*)packed;
    const u8* escapes = packed + form.escapes + ((const u32*)(packed + form.starts))[group];
    for (u32 round = 0; round < ROUNDS; ++round) {
        const u32 chunk = first + round * LANES + lane;
        const bool inside = chunk < form.chunks;
        u32 bits[6] = {};
        uint2 low = {};
        if (inside) {
            low = ((const uint2*)(packed + form.low))[chunk];
            for (int plane = 0; plane < REST_PLANES + 3; ++plane) bits[plane] = packed[form.planes[plane] + chunk];
        }
        const u32* index_bits = bits + REST_PLANES;
        const u32 index = nibbles(index_bits[0], index_bits[1], index_bits[2]);
        u32 exponents[2] = {__byte_perm(table.x, table.y, index & 0xFFFFu), __byte_perm(table.x, table.y, index >> 16)};

        u32 escaped = index_bits[0] & index_bits[1] & index_bits[2];
        const Sum sum = sum_over_lanes(__popc(escaped));
        const u8* next = escapes + sum.before;
        while (escaped) {
            const u32 place = __ffs(escaped) - 1;
            const u32 shift = place % 4 * 8;
            const u32 mask = 0xFFu << shift;
            const u32 exponent = (u32)*next++ << shift;
            // No index that is known only when it runs: registers have none.
            if (place < 4) exponents[0] = (exponents[0] & ~mask) | exponent;
            else exponents[1] = (exponents[1] & ~mask) | exponent;
            escaped &= escaped - 1;
        }
        escapes += sum.all;
        if (!inside) continue;

        if (REST_PLANES) {
            const u32 rest = nibbles(bits[0], bits[1], bits[2]);
            exponents[0] = exponents[0] << 3 | __byte_perm(0x03020100u, 0x07060504u, rest & 0xFFFFu);
            exponents[1] = exponents[1] << 3 | __byte_perm(0x03020100u, 0x07060504u, rest >> 16);
        }
        uint4 values;
        values.x = pair(low.x, exponents[0], 0x5140);
        values.y = pair(low.x, exponents[0], 0x7362);
        values.z = pair(low.y, exponents[1], 0x5140);
        values.w = pair(low.y, exponents[1], 0x7362);
        out[chunk] = values;
    }
}

extern "C" __global__ void unpack_bfloat16(const u8* packed, uint4* out, Format form) { unpack<0>(packed, out, form); }
extern "C" __global__ void unpack_float16(const u8* packed, uint4* out, Format form) { unpack<3>(packed, out, form); }
