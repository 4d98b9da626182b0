"""Mistakes as people make them with transaction barriers, bulk copies and asynchronous products, one
at a time, each of which the emulator has to catch; see mistakes.py."""

from .mistakes import Mistake

KERNEL = "attention_forward_sm90.h"
PTX = "ptx_sm90.h"
MAPS = "tensor_map.h"

MISTAKES = [
    # ---- transaction barriers
    Mistake(
        "no wait for K",
        KERNEL,
        "      wait_barrier(memory.k_full(k.index), k.parity);\n      turns.take();\n",
        "      turns.take();\n",
        caught="random",  # the copies before it are waited for; only in order do they come first
    ),
    Mistake(
        "no wait for V",
        KERNEL,
        "      wait_barrier(memory.v_full(v.index), v.parity);\n      pin(state.o);\n",
        "      pin(state.o);\n",
    ),
    Mistake(
        "no wait for Q",
        KERNEL,
        "    wait_barrier(memory.q_full(group), q_parity);\n",
        "",
    ),
    Mistake(
        "a tile fetched into one that is read",
        KERNEL,
        "      wait_barrier(memory.k_empty(k.index), k.parity ^ 1);\n",
        "",
    ),
    Mistake(
        "Q fetched over the one in use",
        KERNEL,
        "      wait_barrier(memory.q_empty(group), q_parity ^ 1);\n",
        "",
    ),
    Mistake(
        "the wrong phase awaited",
        KERNEL,
        "parity(int(n / kStages & 1))",
        "parity(int(~n / kStages & 1))",
        says="deadlock",
    ),
    Mistake(
        "a phase that never turns",
        KERNEL,
        "parity(int(n / kStages & 1))",
        "parity(0)",
    ),
    Mistake(
        "the phase of Q not turned",
        KERNEL,
        "    release(memory.q_empty(group));\n    q_parity ^= 1;\n",
        "    release(memory.q_empty(group));\n",
    ),
    Mistake(
        "a tile never handed back",
        KERNEL,
        "      release(memory.v_empty(v.index));\n      state.rescale(alpha);\n",
        "      state.rescale(alpha);\n",
        says="deadlock",
    ),
    Mistake(
        "handed back by every lane",
        KERNEL,
        "    if (lane == 0) arrive(empty);\n",
        "    arrive(empty);\n",
        caught="eager",
    ),
    Mistake(
        "a barrier for one warp too few",
        KERNEL,
        "init_barrier(k_empty(n), kGroups * kWarpgroup / 32);",
        "init_barrier(k_empty(n), kGroups * kWarpgroup / 32 - 1);",
    ),
    Mistake(
        "K handed back before it has been read",
        KERNEL,
        "      wait_products<1>();\n      pin(s);\n      release(memory.k_empty(k.index));\n",
        "      release(memory.k_empty(k.index));\n      wait_products<1>();\n      pin(s);\n",
    ),
    Mistake(
        "V handed back before it has been read",
        KERNEL,
        "      wait_products<0>();\n      pin(state.o);\n      release(memory.v_empty(v.index));\n",
        "      release(memory.v_empty(v.index));\n      wait_products<0>();\n      pin(state.o);\n",
    ),
    Mistake(
        "V handed back before it has been read, for ThreadSanitizer",
        KERNEL,
        "      wait_products<0>();\n      pin(state.o);\n      release(memory.v_empty(v.index));\n",
        "      release(memory.v_empty(v.index));\n      wait_products<0>();\n      pin(state.o);\n",
        caught="thread",
        says="data race",
    ),
    Mistake(
        "fewer bytes announced than come",
        KERNEL,
        "arrive_expecting(full, rows * kHeadDim * 2);",
        "arrive_expecting(full, rows * kHeadDim);",
    ),
    Mistake(
        "more bytes announced than come",
        KERNEL,
        "arrive_expecting(full, rows * kHeadDim * 2);",
        "arrive_expecting(full, rows * kHeadDim * 2 + 16);",
        says="deadlock",
    ),
    Mistake(
        "barriers that the copying unit may not see",
        KERNEL,
        "    fence_async();\n",
        "",
        says="without fence.proxy.async",
    ),
    Mistake(
        "barriers used before they are there",
        KERNEL,
        "  if (thread_x() == 0) memory.init();\n  sync_threads();\n",
        "  if (thread_x() == 0) memory.init();\n",
        caught="thread",
        says="data race",
    ),
    # ---- products
    Mistake(
        "no fence before the scores",
        KERNEL,
        "      pin(s);\n      fence_products();\n      Consumer::issue_scores",
        "      pin(s);\n      Consumer::issue_scores",
        says="no wgmma.fence",
    ),
    Mistake(
        "no fence before the last values",
        KERNEL,
        "    pin(weights);\n    fence_products();\n    state.issue_values",
        "    pin(weights);\n    state.issue_values",
        says="no wgmma.fence",
    ),
    Mistake(
        "scores read before they are there",
        KERNEL,
        "      wait_products<1>();\n",
        "      wait_products<2>();\n",
    ),
    Mistake(
        "results scaled while they are summed",
        KERNEL,
        "      wait_products<0>();\n      pin(state.o);\n      release(memory.v_empty(v.index));\n"
        "      state.rescale(alpha);\n",
        "      state.rescale(alpha);\n      wait_products<0>();\n      pin(state.o);\n"
        "      release(memory.v_empty(v.index));\n",
        says="a register of a product under way was written",
    ),
    Mistake(
        "weights overwritten while they are read",
        KERNEL,
        "      state.probabilities(s, alpha);\n      wait_products<0>();\n",
        "      state.probabilities(s, alpha);\n      Consumer::pack_weights(weights, s);\n"
        "      wait_products<0>();\n",
    ),
    Mistake(
        "products that nobody commits",
        KERNEL,
        "step > 0);\n    }\n    commit_products();\n",
        "step > 0);\n    }\n",
    ),
    Mistake(
        "products that nobody waits for",
        KERNEL,
        "    wait_products<0>();\n    pin(state.o);\n    release(memory.v_empty(v.index));\n    const",
        "    release(memory.v_empty(v.index));\n    const",
    ),
    Mistake(
        "old numbers in the first product",
        KERNEL,
        "panel * kN * kPanelRowBytes + within), step > 0);",
        "panel * kN * kPanelRowBytes + within), true);",
    ),
    # ---- descriptors and maps
    Mistake(
        "a descriptor without the swizzle",
        PTX,
        " | uint64_t(1) << 62;",
        ";",
    ),
    Mistake(
        "a descriptor with the wrong stride",
        PTX,
        "uint64_t(kSwizzleBytes >> 4) << 32",
        "uint64_t(kPanelRowBytes >> 4) << 32",
    ),
    Mistake(
        "a step along the row of the wrong size",
        KERNEL,
        "within = step % 4 * 32;",
        "within = step % 4 * 16;",
    ),
    Mistake(
        "a descriptor beyond the end",
        KERNEL,
        "const uint64_t v_first = tile_descriptor(memory.v(0),",
        "const uint64_t v_first = tile_descriptor(memory.v(2),",
    ),
    Mistake(
        "a tile within the swizzle's pattern",
        KERNEL,
        "{ return base + group * Shape::kQueryBytes; }",
        "{ return base + (group == 1) * 512 + group * Shape::kQueryBytes; }",
        says="1024",
    ),
    Mistake(
        "no room for the barriers",
        KERNEL,
        " + kBarriers * sizeof(Mbarrier);",
        ";",
    ),
    Mistake(
        "a map of the wrong heads",
        KERNEL,
        "    const int kv_head = tile.head / p.group;",
        "    const int kv_head = tile.head % (p.heads / p.group);",
    ),
    Mistake(
        "a map with the strides in the wrong order",
        MAPS,
        "? uint64_t(v.stride[2 - i]) * 2 : 16;",
        "? uint64_t(v.stride[i]) * 2 : 16;",
    ),
    # ---- registers and turns
    Mistake(
        "more registers than there are",
        KERNEL,
        "kConsumerRegisters = kGroups == 3 ? 160 : 240;",
        "kConsumerRegisters = kGroups == 3 ? 168 : 240;",
        says="deadlock",
    ),
    Mistake(
        "a turn never passed on",
        KERNEL,
        "    turns.pass();\n    wait_products<0>();",
        "    wait_products<0>();",
        says="deadlock",
    ),
    Mistake(
        "a turn left over",
        KERNEL,
        "  turns.end();\n",
        "",
        says="arrivals at a named barrier",
    ),
    # ---- arithmetic
    Mistake(
        "the mask off by one",
        KERNEL,
        "8 * t + e >= end)",
        "8 * t + e > end)",
    ),
    Mistake(
        "old results not rescaled",
        KERNEL,
        "      state.rescale(alpha);\n",
        "",
    ),
    Mistake(
        "columns exchanged the wrong way",
        KERNEL,
        "const bool odd = lane & 1, upper = lane & 2;",
        "const bool odd = lane & 2, upper = lane & 1;",
    ),
]
MISTAKES = [mistake._replace(program="check_sm90") for mistake in MISTAKES]
