// What the programs that check kernels share: numbers, comparisons, modes. Arguments of a program:
// lazy, eager or random:SEED. It says what is wrong, and returns 1.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "launch.h"

namespace fastattn {

inline int failures = 0;

inline void expect_close(const std::string& what, const std::vector<double>& got,
                         const std::vector<double>& want, double tolerance) {
  double scale = 1e-3, worst = 0;
  for (double x : want) scale = std::max(scale, std::fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]) / scale;
    worst = error > worst || error != error ? error : worst;
    if (worst != worst) break;
  }
  if (worst <= tolerance) return;
  std::printf("%s: off by %.3g of the largest\n", what.c_str(), worst);
  ++failures;
}

inline std::mt19937 chance(7);

// Memory of exactly the size, with NaNs in it, for AddressSanitizer and for what is not written.
template <typename T>
struct Array {
  size_t size;
  T* data;

  explicit Array(size_t n) : size(n), data(static_cast<T*>(std::malloc(n * sizeof(T)))) {
    std::fill_n(reinterpret_cast<unsigned char*>(data), n * sizeof(T), 0xFF);
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data); }
  void draw(float width = 1) {
    std::normal_distribution<float> normal(0, width);
    for (size_t i = 0; i < size; ++i) data[i] = from_float<T>(normal(chance));
  }
  double operator[](size_t i) const { return to_float(data[i]); }
  std::vector<double> numbers() const {
    std::vector<double> out(size);
    for (size_t i = 0; i < size; ++i) out[i] = to_float(data[i]);
    return out;
  }
};

// Calls problems() in the mode of the arguments, and returns what the program does.
template <typename Problems>
int run_program(int count, char** arguments, Problems problems) {
  const std::string mode = count > 1 ? arguments[1] : "lazy";
  using emulator::Completion;
  if (mode == "eager") emulator::set_options({Completion::kEager, 0});
  if (mode.rfind("random:", 0) == 0)
    emulator::set_options({Completion::kRandom, std::strtoull(mode.c_str() + 7, nullptr, 10)});
  try {
    problems();
    for (const std::string& what : emulator::take_rare()) {
      std::printf("a kernel found its own result broken: %s\n", what.c_str());
      ++failures;
    }
    const auto conflicts = emulator::take_bank_conflicts();
    for (const std::string& line : conflicts) std::printf("bank conflict: %s\n", line.c_str());
    failures += int(conflicts.size());
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return failures ? 1 : 0;
}

}  // namespace fastattn
