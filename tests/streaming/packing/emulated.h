// What unpack.cu needs of CUDA, on threads of the host: a warp is 32 of them, which exchange values at a barrier.

#include <barrier>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__

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
static unsigned int exchanged[WARP];
static std::barrier<> everybody(WARP);

static unsigned int exchange(unsigned int value, unsigned int from) {
    const unsigned int lane = threadIdx.x % WARP;
    exchanged[lane] = value;
    everybody.arrive_and_wait();
    const unsigned int found = exchanged[from];
    everybody.arrive_and_wait();
    return found;
}

static unsigned int __shfl_sync(unsigned int, unsigned int value, unsigned int from) { return exchange(value, from); }

static unsigned int __shfl_up_sync(unsigned int, unsigned int value, unsigned int distance) {
    const unsigned int lane = threadIdx.x % WARP;
    return exchange(value, lane >= distance ? lane - distance : lane);
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
