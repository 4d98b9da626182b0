// Which keys a query sees. The one transcription in C++ of fastattn/spec.py; g++ and nvcc compile
// it.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTATTN_HD __host__ __device__ __forceinline__
#else
#define FASTATTN_HD inline
#endif

namespace fastattn {

// Half-open interval of keys.
struct KeyRange {
  int64_t begin, end;
  FASTATTN_HD bool empty() const { return begin >= end; }
};

// Query i sees key j when i + shift - left <= j <= i + shift + right; -1 is no limit on that side.
struct Mask {
  int64_t left = -1, right = -1, shift = 0;

  // Keys that query i sees out of k_len.
  FASTATTN_HD KeyRange keys_of(int64_t i, int64_t k_len) const {
    int64_t begin = left < 0 ? 0 : i + shift - left;
    int64_t end = right < 0 ? k_len : i + shift + right + 1;
    begin = begin < 0 ? 0 : (begin > k_len ? k_len : begin);
    end = end > k_len ? k_len : (end < begin ? begin : end);
    return {begin, end};
  }
  // Keys that at least one query of [i_begin, i_end) sees.
  FASTATTN_HD KeyRange any_keys(int64_t i_begin, int64_t i_end, int64_t k_len) const {
    const int64_t begin = keys_of(i_begin, k_len).begin;
    const int64_t end = keys_of(i_end - 1, k_len).end;
    return {begin, end < begin ? begin : end};
  }
  // Keys that every query of [i_begin, i_end) sees.
  FASTATTN_HD KeyRange all_keys(int64_t i_begin, int64_t i_end, int64_t k_len) const {
    const int64_t begin = keys_of(i_end - 1, k_len).begin;
    const int64_t end = keys_of(i_begin, k_len).end;
    return {begin, end < begin ? begin : end};
  }
  // Queries that see at least one key of [j_begin, j_end): the same rule read the other way.
  FASTATTN_HD KeyRange any_queries(int64_t j_begin, int64_t j_end, int64_t q_len) const {
    int64_t begin = right < 0 ? 0 : j_begin - shift - right;
    int64_t end = left < 0 ? q_len : j_end - shift + left;
    begin = begin < 0 ? 0 : (begin > q_len ? q_len : begin);
    end = end > q_len ? q_len : (end < begin ? begin : end);
    return {begin, end};
  }
};

}  // namespace fastattn
