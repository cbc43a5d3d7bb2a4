// What the kernels need of CUDA, on threads of the host: a warp is 32 of them, which exchange values at a barrier. Warps
// run one after another, so that memory of a block is the same for all blocks.

#include <barrier>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static

struct alignas(8) uint2 {
    unsigned int x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct Index {
    unsigned int x;
};

thread_local Index threadIdx, blockIdx;

static constexpr int WARP = 32;
// Two turns: one is not written to before everybody has read it, as there is a barrier of the other in between.
static unsigned int exchanged[2][WARP];
thread_local unsigned int turn;
static std::barrier<> everybody(WARP);

static unsigned int exchange(unsigned int value, unsigned int from) {
    turn ^= 1;
    exchanged[turn][threadIdx.x % WARP] = value;
    everybody.arrive_and_wait();
    return exchanged[turn][from];
}

static unsigned int __shfl_sync(unsigned int, unsigned int value, unsigned int from) { return exchange(value, from); }

static unsigned int __shfl_up_sync(unsigned int, unsigned int value, unsigned int distance) {
    const unsigned int lane = threadIdx.x % WARP;
    return exchange(value, lane >= distance ? lane - distance : lane);
}

static void __syncwarp() { everybody.arrive_and_wait(); }

static unsigned int atomicAdd(unsigned int* place, unsigned int more) {
    return __atomic_fetch_add(place, more, __ATOMIC_RELAXED);
}

static unsigned int __byte_perm(unsigned int low, unsigned int high, unsigned int selector) {
    const std::uint64_t bytes = (std::uint64_t)high << 32 | low;
    unsigned int found = 0;
    for (int place = 0; place < 4; ++place) {
        const unsigned int wanted = selector >> 4 * place & 0xF;
        const unsigned int byte = bytes >> 8 * (wanted & 7) & 0xFF;
        found |= (wanted & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << 8 * place;
    }
    return found;
}

static int __popc(unsigned int bits) { return __builtin_popcount(bits); }
static int __ffs(unsigned int bits) { return __builtin_ffs((int)bits); }
