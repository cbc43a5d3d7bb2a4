// Runs the kernels of unpack.cu on the host, warp after warp.

#include "emulated.h"

#include UNPACK

template <typename Kernel>
static void run(Kernel kernel, const u8* packed, u8* out, const Format* form) {
    const u32 warps = (form->chunks + ROUNDS * LANES - 1) / (ROUNDS * LANES);
    std::vector<std::thread> lanes;
    for (u32 lane = 0; lane < LANES; ++lane) {
        lanes.emplace_back([=] {
            // As many warps as blocks of a grid have, also those that have nothing to do.
            for (u32 warp = 0; warp < (warps + WARPS - 1) / WARPS * WARPS; ++warp) {
                blockIdx.x = warp / WARPS;
                threadIdx.x = warp % WARPS * LANES + lane;
                kernel(packed, (uint4*)out, *form);
            }
        });
    }
    for (std::thread& lane : lanes) lane.join();
}

extern "C" void run_bfloat16(const u8* packed, u8* out, const Format* form) { run(unpack_bfloat16, packed, out, form); }
extern "C" void run_float16(const u8* packed, u8* out, const Format* form) { run(unpack_float16, packed, out, form); }
