// Runs the kernels of pack.cu and unpack.cu on the host, warp after warp.

#include "emulated.h"

#include PACK
#include UNPACK

#include <functional>
#include <map>
#include <string>
#include <utility>

// The kernel with arguments as the driver takes them: an address for each.
template <typename... Types, std::size_t... Numbers>
static std::function<void(void**)> kernel(void (*function)(Types...), std::index_sequence<Numbers...>) {
    return [=](void** arguments) { function(*(Types*)arguments[Numbers]...); };
}

template <typename... Types>
static std::function<void(void**)> kernel(void (*function)(Types...)) {
    return kernel(function, std::index_sequence_for<Types...>());
}

static const std::map<std::string, std::function<void(void**)>> kernels = {
    {"count_bfloat16", kernel(count_bfloat16)},     {"count_float16", kernel(count_float16)},
    {"choose", kernel(choose)},                     {"escapes_bfloat16", kernel(escapes_bfloat16)},
    {"escapes_float16", kernel(escapes_float16)},   {"pack_bfloat16", kernel(pack_bfloat16)},
    {"pack_float16", kernel(pack_float16)},         {"unpack_bfloat16", kernel(unpack_bfloat16)},
    {"unpack_float16", kernel(unpack_float16)},
};

extern "C" void launch(const char* name, u32 blocks, u32 threads, void** arguments) {
    const auto& run = kernels.at(name);
    std::vector<std::thread> lanes;
    for (u32 lane = 0; lane < LANES; ++lane) {
        lanes.emplace_back([=, &run] {
            for (u32 first = lane; first < blocks * threads; first += LANES) {
                blockIdx.x = first / threads;
                threadIdx.x = first % threads;
                run(arguments);
            }
        });
    }
    for (std::thread& lane : lanes) lane.join();
}
