"""Mistakes as people make them in kernels, one at a time, each of which the emulator has to catch.

A mistake replaces text of one file. ``caught`` is what finds it: "lazy", "eager" or "random", a way
in which copies complete (under AddressSanitizer), or "thread", ThreadSanitizer. Others may too.
"""

from typing import NamedTuple


class Mistake(NamedTuple):
    name: str
    file: str  # of csrc/cuda
    old: str
    new: str
    caught: str = "lazy"
    says: str = ""  # a part of what is reported
    program: str = "check"  # that it is noticed in
    into: str = ""  # the one .cu file that gets it, where a header would take it to several


FORWARD = "attention_forward.h"
BACKWARD = "attention_backward.h"
TILE = "attention_tile.h"


def cluster(name: str, old: str, new: str, caught: str = "lazy", says: str = "") -> Mistake:
    """In what rows in clusters share; noticed in one of the kernels that do."""
    return Mistake(name, "rows.h", old, new, caught, says, "check_rows", "softmax_forward")


def wide_sums(name: str, old: str, new: str, caught: str = "lazy", says: str = "") -> Mistake:
    """In the sums of dweight and dbias beside rows that shared memory holds."""
    return Mistake(name, "layer_norm_backward.cu", old, new, caught, says, "check_rows")


MISTAKES = [
    # ---- waiting for copies
    Mistake(
        "no wait for V",
        FORWARD,
        "    wait_copies<0>();\n    sync_threads();  // V has",
        "    sync_threads();  // V has",
    ),
    Mistake(
        "a wait that leaves one group too many",
        FORWARD,
        "    wait_copies<0>();\n    sync_threads();  // K has",
        "    wait_copies<1>();\n    sync_threads();  // K has",
    ),
    Mistake(
        "copies that nobody commits",
        BACKWARD,
        "p.dout_aligned);\n  commit_copies();\n  wait_copies<0>();",
        "p.dout_aligned);\n  wait_copies<0>();",
    ),
    Mistake(
        "a copy left behind at the end",
        FORWARD,
        "  commit_copies();  // it may be all that there is to wait for\n",
        "",
        says="ends with a copy that it never waited for",
    ),
    Mistake(
        "the next tile fetched into the one in use",
        BACKWARD,
        "walked + n % kStages * 2 * Tile<kN, kHeadDim>::kBytes};\n  };\n  const auto v_tile",
        "walked + n / 2 % kStages * 2 * Tile<kN, kHeadDim>::kBytes};\n  };\n  const auto v_tile",
    ),
    # ---- barriers
    Mistake(
        "no barrier before K is overwritten",
        FORWARD,
        "    sync_threads();  // V has arrived, and nobody reads K any more\n",
        "",
    ),
    Mistake(
        "no barrier before V is overwritten",
        FORWARD,
        "    sync_threads();  // K has arrived, and nobody reads V any more\n",
        "",
        caught="thread",
        says="data race",
    ),
    Mistake(
        "no barrier before tiles of the backward are overwritten",
        BACKWARD,
        "    sync_threads();  // these tiles have arrived, and nobody reads the last ones any more\n"
        "    if (kStages > 1 && n + 1 < total)",
        "    if (kStages > 1 && n + 1 < total)",
    ),
    Mistake(
        "no barrier of the warp before its rows are stored",
        FORWARD,
        "factor[2 * r + 1]);\n  sync_warp();",
        "factor[2 * r + 1]);",
        caught="thread",
        says="data race",
    ),
    Mistake(
        "a reduction that reads before all have written",
        "rows.h",
        "    if (lane == 0) store_shared(shared + warp, value);\n    sync_threads();\n",
        "    if (lane == 0) store_shared(shared + warp, value);\n",
        program="check_rows",
        into="softmax_forward",
    ),
    Mistake(
        "a reduction that overwrites the last result",
        "rows.h",
        "    sync_threads();  // the last result has been read\n    if (lane == 0) store_shared(",
        "    if (lane == 0) store_shared(",
        caught="thread",
        says="data race",
        program="check_rows",
        into="softmax_forward",
    ),
    Mistake(
        "a barrier that only some threads reach",
        "softmax.h",
        "    sync_threads();  // the last result has been read\n",
        "    if (exists) sync_threads();\n",
        says="divergent",
        program="check_rows",
        into="softmax_forward",
    ),
    Mistake(
        "a barrier behind which a thread has left",
        "layer_norm_backward.cu",
        "  sync_threads();\n  if (line > 1 || column >= c.width) return;",
        "  if (line > 1 || column >= c.width) return;\n  sync_threads();",
        says="barrier",
        program="check_rows",
    ),
    # ---- collectives
    Mistake(
        "a shuffle that some lanes skip",
        FORWARD,
        "    all = quad_sum(all);\n",
        "    if (state.row(n) < p.q_len) all = quad_sum(all);\n",
        says="divergent",
    ),
    Mistake(
        "a shuffle over too few lanes",
        TILE,
        "  x += shuffle_xor(x, 1);\n",
        "",
    ),
    Mistake(
        "matrices loaded by half a warp",
        BACKWARD,
        "    multiply_rows<T, 1, kN>(dp, v, warp_row, dout_tile(n));",
        "    if (thread_x() % 32 < 16) multiply_rows<T, 1, kN>(dp, v, warp_row, dout_tile(n));",
        says="divergent",
    ),
    # ---- addresses
    Mistake(
        "the wrong stride",
        TILE,
        "head + int64_t(first + r) * v.stride[2]",
        "head + int64_t(first + r) * v.stride[1]",
    ),
    Mistake(
        "rows beyond the last fetched too",
        TILE,
        "return first + r < rows ? head",
        "return first + r <= rows ? head",
        says="out of global memory",
    ),
    Mistake(
        "no room for V",
        FORWARD,
        "size_t(kM + 2 * kN) * kHeadDim * 2;",
        "size_t(kM + kN) * kHeadDim * 2;",
        says="out of shared memory",
    ),
    Mistake(
        "columns beyond the row read 16 bytes at a time",
        "rows.h",
        "  if (aligned && column + kPack<T> <= width) return *rein",
        "  if (aligned) return *rein",
        program="check_rows",
        into="softmax_forward",
    ),
    Mistake(
        "16 bytes at an address that is not aligned to them",
        "rows.h",
        "    if (sizes[i] > 1 && v.stride[i] % kPack<T> != 0) return false;\n",
        "",
        program="check_rows",
        into="softmax_forward",
    ),
    Mistake(
        "a store beyond the end of the output",
        BACKWARD,
        "      if (j < p.k_len) row[j",
        "      if (j <= p.k_len) row[j",
    ),
    Mistake(
        "rows that share banks",
        TILE,
        "const int swizzle = kChunks % 8 == 0 ? row & 7 : (row >> 1) & 3;",
        "const int swizzle = 0;",
        says="bank conflict",
    ),
    Mistake(
        "rows stored in an order in which lanes share banks",
        TILE,
        "const int r = at / kAcross, n = at % kAcross,",
        "const int r = at % kCopied, n = at / kCopied ^ (r & 7),",
        says="bank conflict: attention_backward",
        into="attention_backward",
    ),
    Mistake(
        "two blocks that write one row of partial sums",
        "layer_norm_backward.cu",
        "store_weights<T>(c, first_row, begin",
        "store_weights<T>(c, first_row / 2, begin",
        caught="thread",
        program="check_rows",
    ),
    # ---- sums beside a wide row
    wide_sums(
        "sums that begin as whatever lay there",
        "column += stride, ++k) store_sums(zeros, k);",
        "column += stride, ++k) continue;",
    ),
    wide_sums(
        "room for the row alone",
        "plan_for(wide_sums, kRowParts + kSumParts<T>)",
        "plan_for(wide_sums, kRowParts)",
        says="out of shared memory",
    ),
    wide_sums(
        "sums in the place of the row",
        "group.place(k, kParts, kRowParts + part)",
        "group.place(k, kParts, part)",
    ),
    wide_sums(
        "sums of a pack that lie together",
        "kept + group.place(k, kParts, kRowParts + part)",
        "kept + group.place(k, kParts, kRowParts) + (part - thread_x()) + kSumParts<T> * thread_x()",
        says="2 ways",
    ),
    wide_sums(
        "partial sums by block, not by cluster",
        "store_weights<T>(c, group.first_row(), column",
        "store_weights<T>(c, block_x(), column",
    ),
    # ---- clusters
    cluster(
        "a number of another block read before the block is there",
        "    sync_cluster();\n    return load_remote",
        "    return load_remote",
        says="may not have started",
    ),
    cluster(
        "a number overwritten before other blocks have read it",
        "    turn ^= 1;\n",
        "",
    ),
    cluster(
        "a number of another block overwritten while it is read",
        "    turn ^= 1;\n",
        "",
        caught="thread",
        says="data race",
    ),
    cluster(
        "a block that ends while others read its memory",
        "    if (blocks > 1) sync_cluster();\n",
        "",
        says="of the cluster has ended",
    ),
    cluster(
        "a barrier of the cluster that one block skips",
        "    if (blocks > 1) sync_cluster();\n",
        "    if (rank == 0) sync_cluster();\n",
        says="ends while others wait for it at the barrier of the cluster",
    ),
    cluster(
        "a barrier of the cluster for some of the threads",
        "    if (blocks > 1) sync_cluster();\n",
        "    if (blocks > 1 && thread_x() < 32) sync_cluster();\n",
        says="threads of the cluster have ended",
    ),
    cluster(
        "two barriers for the threads of a cluster",
        "    if (thread_x() == 0) store_shared(own, value);\n    sync_cluster();\n",
        "    if (thread_x() == 0) {\n      store_shared(own, value);\n      sync_cluster();\n"
        "    } else {\n      sync_cluster();\n    }\n",
        says="divergent",
    ),
    cluster(
        "a block that is not of the cluster",
        "thread_x() & (blocks - 1)",
        "thread_x() & (2 * blocks - 1)",
        says="mapa: block",
    ),
    cluster(
        "a remote address beyond the end",
        "load_remote(own, ",
        "load_remote(own + plan.bytes / 4, ",
        says="ld.shared::cluster: out of shared memory",
    ),
    cluster(
        "a cluster whose blocks all take the first one's part",
        "rank * kWideThreads + thread_x()",
        "thread_x()",
    ),
    cluster(
        "clusters that walk on as if they were blocks",
        "kWide ? grid_x() / blocks",
        "kWide ? grid_x()",
    ),
    cluster(
        "room for less than a block's part of the row",
        "size_t((packs + together - 1) / together)",
        "size_t(packs / together)",
        says="out of shared memory",
    ),
    cluster(
        "neighbouring threads whose numbers share banks",
        "(k * parts + part) * kWideThreads + thread_x()",
        "(k * kWideThreads + thread_x()) * parts + part",
        says="2 ways",
    ),
    # ---- arithmetic
    Mistake(
        "the mask off by one",
        FORWARD,
        "p.sees(i, j)",
        "p.sees(i, j - 1)",
    ),
    Mistake(
        "old results not rescaled",
        FORWARD,
        "      sum[n] *= alpha;\n",
        "",
    ),
    Mistake(
        "dropout by the tile's column",
        BACKWARD,
        "!p.dropout.on || p.dropout.keeps(b, h, i, j);",
        "!p.dropout.on || p.dropout.keeps(b, h, i, j - first_key);",
    ),
]
