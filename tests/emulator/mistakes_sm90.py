"""Mistakes as people make them with transaction barriers, bulk copies and asynchronous products, one
at a time, each of which the emulator has to catch; see mistakes.py."""

from .mistakes import Mistake

KERNEL = "attention_forward_sm90.h"
BACKWARD = "attention_backward_sm90.h"
TILE = "attention_tile_sm90.h"
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
        TILE,
        "parity(int(n / kStages & 1))",
        "parity(int(~n / kStages & 1))",
        says="deadlock",
    ),
    Mistake(
        "a phase that never turns",
        TILE,
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
        TILE,
        "arrive_expecting(full, rows * kHeadDim * 2);",
        "arrive_expecting(full, rows * kHeadDim);",
    ),
    Mistake(
        "more bytes announced than come",
        TILE,
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
        "      pin(s);\n      fence_products();\n      issue_rows",
        "      pin(s);\n      issue_rows",
        says="no wgmma.fence",
    ),
    Mistake(
        "no fence before the last values",
        KERNEL,
        "    pin(weights);\n    fence_products();\n    issue_columns",
        "    pin(weights);\n    issue_columns",
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
        "      state.probabilities(s, alpha);\n      pack_fragments<T>(weights, s);\n"
        "      wait_products<0>();\n",
    ),
    Mistake(
        "products that nobody commits",
        TILE,
        "step > 0);\n  }\n  commit_products();\n}\n// o =",
        "step > 0);\n  }\n}\n// o =",
    ),
    Mistake(
        "products that nobody waits for",
        KERNEL,
        "    wait_products<0>();\n    pin(state.o);\n    release(memory.v_empty(v.index));\n    const",
        "    release(memory.v_empty(v.index));\n    const",
    ),
    Mistake(
        "old numbers in the first product",
        TILE,
        "* kPanelRowBytes + within), step > 0);",
        "* kPanelRowBytes + within), true);",
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
        TILE,
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
        TILE,
        "kConsumer = kGroups == 3 ? 160 : 240;",
        "kConsumer = kGroups == 3 ? 168 : 240;",
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
        TILE,
        "const bool odd = lane & 1, upper = lane & 2;",
        "const bool odd = lane & 2, upper = lane & 1;",
    ),
    # ---- the backward
    Mistake(
        "backward, no wait for c",
        BACKWARD,
        "    wait_barrier(memory.full(0, now.index), now.parity);\n",
        "",
        caught="random",
    ),
    Mistake(
        "backward, no wait for d",
        BACKWARD,
        "    wait_barrier(memory.full(1, now.index), now.parity);\n",
        "",
        caught="random",
    ),
    Mistake(
        "backward, no wait for a",
        BACKWARD,
        "    wait_barrier(memory.owned_full(0), 0);\n",
        "",
        caught="random",
    ),
    Mistake(
        "backward, a tile fetched into one that is read",
        BACKWARD,
        "    wait_barrier(memory.empty(stage.index), stage.parity ^ 1);\n    FASTATTN_UNROLL\n",
        "    FASTATTN_UNROLL\n",
    ),
    Mistake(
        "backward, the wrong phase awaited",
        BACKWARD,
        "    wait_barrier(memory.empty(stage.index), stage.parity ^ 1);\n    for",
        "    wait_barrier(memory.empty(stage.index), stage.parity);\n    for",
        says="deadlock",
    ),
    Mistake(
        "backward, numbers of rows written over those in use",
        BACKWARD,
        "    wait_barrier(memory.empty(stage.index), stage.parity ^ 1);\n    for",
        "    for",
    ),
    Mistake(
        "backward, a barrier that does not expect the numbers of rows",
        BACKWARD,
        "kOfKeys ? 2 : 1);  // with c",
        "1);  // with c",
    ),
    Mistake(
        "backward, numbers of rows announced before all lanes have written",
        BACKWARD,
        "    sync_warp();\n    if (lane == 0) arrive(memory.full(0, stage.index));\n",
        "    if (lane == 0) arrive(memory.full(0, stage.index));\n",
        caught="thread",
        says="data race",
    ),
    Mistake(
        "backward, numbers of rows handed back while lanes read them",
        BACKWARD,
        "    sync_warp();  // all lanes have read its lse and delta\n",
        "",
        caught="thread",
        says="data race",
    ),
    Mistake(
        "backward, the walk read before it is there",
        BACKWARD,
        "memory.init(call.c);\n  sync_threads();\n",
        "memory.init(call.c);\n",
        caught="thread",
        says="data race",
    ),
    Mistake(
        "backward, a tile handed back before it has been read",
        BACKWARD,
        "      wait_products<0>();\n      if (!kFirst) release_last(n);\n",
        "      if (!kFirst) release_last(n);\n      wait_products<0>();\n",
    ),
    Mistake(
        "backward, a tile never handed back",
        BACKWARD,
        "      wait_products<0>();\n      if (!kFirst) release_last(n);\n",
        "      wait_products<0>();\n",
        says="deadlock",
    ),
    Mistake(
        "backward, no fence before ds . c",
        BACKWARD,
        "    fence_products();\n    issue_columns<T>(sum, w,",
        "    issue_columns<T>(sum, w,",
        says="no wgmma.fence",
    ),
    Mistake(
        "backward, s read before it is there",
        BACKWARD,
        "wait_products<kFirst ? 1 : 2>();",
        "wait_products<3>();",
    ),
    Mistake(
        "backward, dp read before it is there",
        BACKWARD,
        "      wait_products<1>();\n      pin(dp);\n",
        "      pin(dp);\n",
    ),
    Mistake(
        "backward, ds packed while p is read",
        BACKWARD,
        "      differentiate(now.index);\n      wait_products<0>();\n      pin(dv);\n",
        "      differentiate(now.index);\n      pack_fragments<T>(w, dp);\n"
        "      wait_products<0>();\n      pin(dv);\n",
    ),
    Mistake(
        "backward, products that nobody waits for",
        BACKWARD,
        "    issue_sum(walk.total);\n    wait_products<0>();\n",
        "    issue_sum(walk.total);\n",
    ),
    Mistake(
        "backward, old numbers in the first sum",
        BACKWARD,
        "walked(0, last.index), n > 1);",
        "walked(0, last.index), true);",
    ),
    Mistake(
        "backward, every group of rows the first one's",
        BACKWARD,
        "(first - walk.first) * kPanelRowBytes",
        "0 * kPanelRowBytes",
    ),
    Mistake(
        "backward, one head for the whole group",
        BACKWARD,
        "return first_head + n / steps;",
        "return first_head;",
    ),
    Mistake(
        "backward, numbers beyond the last row",
        BACKWARD,
        "const bool exists = start + r < c.p.q_len;",
        "const bool exists = start + r <= c.p.q_len;",
    ),
    Mistake(
        "backward, no room for the walk",
        BACKWARD,
        " + sizeof(Sm90Walk);",
        ";",
    ),
    Mistake(
        "backward, the mask off by one",
        BACKWARD,
        "8 * t + e >= end)",
        "8 * t + e > end)",
    ),
]
MISTAKES = [mistake._replace(program="check_sm90") for mistake in MISTAKES]
