// What the kernels that pack and those that unpack share (codec.py, Note: seven exponents and an escape).
//
// A warp has a group of 2048 values, in 8 rounds of 256; a lane has 8 neighbours in each round, which are a chunk.
//
// The host's C++ compiler compiles these files too, for the tests, with CUDA's functions emulated.

#pragma once

typedef unsigned char u8;
typedef unsigned int u32;

#define ROUNDS 8
#define LANES 32
#define WARPS 8
#define TABLE 7

// Where the parts of a packed tensor begin, in bytes; 8 values are one chunk.
struct Format {
    u32 chunks, low, planes[6], starts, escapes;
};

// How much lower lanes have in sum, and all lanes.
struct Sum {
    u32 before, all;
};

__device__ static Sum sum_over_lanes(u32 own) {
    const u32 lane = threadIdx.x % LANES;
    u32 until = own;
    for (u32 distance = 1; distance < LANES; distance *= 2) {
        const u32 other = __shfl_up_sync(0xFFFFFFFFu, until, distance);
        if (lane >= distance) until += other;
    }
    return {until - own, __shfl_sync(0xFFFFFFFFu, until, LANES - 1)};
}
