// A program that runs layer norm and softmax on small problems and compares with the definition in
// float64, as check.cpp does attention.
#include "check.h"

using namespace fastattn;

namespace {

View rows_view(void* data, int64_t width) {
  View v;
  v.data = data;
  v.stride[2] = width;
  return v;
}

template <typename T>
void check_layer_norm(DType dtype, int rows, int width, bool rms, bool residual,
                      const Device& device) {
  if (failures) return;  // one is enough to know
  const std::string name = "layer norm of " + std::to_string(width);
  const size_t n = size_t(rows) * width;
  Array<T> x(n), add(n), weight(width), bias(width), y(n), sum(n), dy(n), dnew(n), dx(n), dadd(n),
      dweight(width), dbias(width);
  Array<float> mean(rows), rstd(rows), partials(size_t(12) * 2 * width);
  x.draw();
  add.draw();
  weight.draw();
  bias.draw();
  dy.draw();
  dnew.draw();
  LayerNormParams p{};
  p.dtype = p.weight_dtype = p.bias_dtype = dtype;
  p.rows = {1, 1, rows};
  p.width = width;
  p.x = rows_view(x.data, width);
  if (residual) p.residual = rows_view(add.data, width);
  p.weight = weight.data;
  p.bias = rms ? nullptr : bias.data;
  p.y = y.data;
  p.new_residual = residual ? sum.data : nullptr;
  p.mean = rms ? nullptr : mean.data;
  p.rstd = rstd.data;
  p.eps = 1e-5;
  p.rms = rms;
  layer_norm_forward(p, device);

  std::vector<double> want(n), want_dx(n), want_dweight(width), want_dbias(width);
  for (int r = 0; r < rows; ++r) {
    const auto h = [&](int j) { return residual ? sum[r * width + j] : x[r * width + j]; };
    double m = 0, var = 0, mean_g = 0, mean_gx = 0;
    if (!rms)
      for (int j = 0; j < width; ++j) m += h(j) / width;
    for (int j = 0; j < width; ++j) var += (h(j) - m) * (h(j) - m) / width;
    const double factor = 1 / std::sqrt(var + 1e-5);
    for (int j = 0; j < width; ++j) {
      const double hat = (h(j) - m) * factor, g = dy[r * width + j] * weight[j];
      want[r * width + j] = hat * weight[j] + (rms ? 0 : bias[j]);
      want_dweight[j] += dy[r * width + j] * hat;
      want_dbias[j] += dy[r * width + j];
      mean_g += rms ? 0 : g / width;
      mean_gx += g * hat / width;
    }
    for (int j = 0; j < width; ++j) {
      const double hat = (h(j) - m) * factor, g = dy[r * width + j] * weight[j];
      want_dx[r * width + j] =
          factor * (g - mean_g - hat * mean_gx) + (residual ? dnew[r * width + j] : 0);
    }
  }
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 1e-2;
  expect_close(name + ", y", y.numbers(), want, tolerance);

  p.x = rows_view(residual ? sum.data : x.data, width);
  p.residual = View{};
  LayerNormGrads g{};
  g.dy = rows_view(dy.data, width);
  if (residual) g.dnew_residual = rows_view(dnew.data, width);
  g.dx = dx.data;
  g.dresidual = residual ? dadd.data : nullptr;
  g.dweight = dweight.data;
  g.dbias = rms ? nullptr : dbias.data;
  layer_norm_backward(p, g, partials.data, 12, device);
  expect_close(name + ", dx", dx.numbers(), want_dx, tolerance);
  if (residual) expect_close(name + ", dresidual", dadd.numbers(), want_dx, tolerance);
  expect_close(name + ", dweight", dweight.numbers(), want_dweight, tolerance);
  if (!rms) expect_close(name + ", dbias", dbias.numbers(), want_dbias, tolerance);
}

template <typename T>
void check_softmax(DType dtype, int rows, int width, int inner, bool log, const Device& device) {
  if (failures) return;  // one is enough to know
  const std::string name = "softmax of " + std::to_string(width) + " x " + std::to_string(inner);
  const size_t n = size_t(rows) * width * inner;
  Array<T> x(n), y(n), dy(n), dx(n);
  x.draw(2);
  dy.draw();
  View view = rows_view(x.data, int64_t(width) * inner);
  view.stride[3] = inner;
  SoftmaxParams p{};
  p.x_dtype = p.y_dtype = dtype;
  p.rows = {1, 1, rows};
  p.width = width;
  p.inner = inner;
  p.x = view;
  p.y = y.data;
  p.scale = 0.5;
  p.log = log;
  softmax_forward(p, device);
  SoftmaxGrads g{};
  g.x_dtype = g.y_dtype = dtype;
  g.rows = p.rows;
  g.width = width;
  g.inner = inner;
  g.y = g.dy = view;
  g.y.data = y.data;
  g.dy.data = dy.data;
  g.dx = dx.data;
  g.scale = 0.5;
  g.log = log;
  softmax_backward(g, device);

  std::vector<double> want(n), want_dx(n);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < inner; ++c) {
      const auto at = [&](int j) { return (size_t(r) * width + j) * inner + c; };
      double top = -1e30, total = 0, dot = 0;
      for (int j = 0; j < width; ++j) top = std::max(top, 0.5 * x[at(j)]);
      for (int j = 0; j < width; ++j) total += std::exp(0.5 * x[at(j)] - top);
      for (int j = 0; j < width; ++j) {
        const double s = 0.5 * x[at(j)] - top - std::log(total);
        want[at(j)] = log ? s : std::exp(s);
        dot += (log ? 1 : y[at(j)]) * dy[at(j)];
      }
      for (int j = 0; j < width; ++j)
        want_dx[at(j)] =
            0.5 * (log ? dy[at(j)] - std::exp(y[at(j)]) * dot : y[at(j)] * (dy[at(j)] - dot));
    }
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 1e-2;
  expect_close(name + ", y", y.numbers(), want, tolerance);
  expect_close(name + ", dx", dx.numbers(), want_dx, tolerance);
}

}  // namespace

int main(int count, char** arguments) {
  Device device, roomy, clusters, roomy_clusters;
  device.shared_bytes = 16 << 10;  // so that rows of a few thousand are too wide for it
  roomy.shared_bytes = 200 << 10;
  clusters.shared_bytes = 33 << 10;  // for one block; two or four hold them
  clusters.capability = 90;
  roomy_clusters = clusters;
  roomy_clusters.shared_bytes = 66 << 10;  // for the sums of a layer norm's backward too
  for (Device* d : {&device, &roomy, &clusters, &roomy_clusters}) {
    d->multiprocessors = 3;
    d->max_blocks = 4;  // so that blocks walk
  }
  roomy.multiprocessors = 2;
  return run_program(count, arguments, [&] {
    check_layer_norm<float>(DType::kFloat32, 9, 70, false, true, device);
    check_layer_norm<bf16>(DType::kBFloat16, 13, 1000, false, false, device);
    check_layer_norm<bf16>(DType::kBFloat16, 5, 4096, true, true, device);
    check_layer_norm<float>(DType::kFloat32, 3, 10001, false, false, device);
    check_layer_norm<float>(DType::kFloat32, 3, 10001, false, true, roomy);
    check_softmax<float>(DType::kFloat32, 9, 70, 1, false, device);
    check_softmax<bf16>(DType::kBFloat16, 5, 3000, 1, true, device);
    check_softmax<float>(DType::kFloat32, 3, 9001, 1, false, device);
    check_softmax<float>(DType::kFloat32, 3, 9001, 1, true, roomy);
    check_softmax<f16>(DType::kFloat16, 2, 45, 37, false, device);
    emulator::take_launches();
    check_layer_norm<bf16>(DType::kBFloat16, 2, 10001, false, true, clusters);
    check_layer_norm<bf16>(DType::kBFloat16, 1, 20003, true, false, clusters);
    check_softmax<float>(DType::kFloat32, 3, 9001, 1, false, clusters);
    check_softmax<bf16>(DType::kBFloat16, 1, 18001, 1, true, clusters);
    if (failures) return;
    const auto launches = emulator::take_launches();
    for (const char* name :
         {"layer_norm_forward", "layer_norm_backward", "softmax_forward", "softmax_backward"})
      if (std::count(launches.begin(), launches.end(), std::string(name) + ", clusters") != 1) {
        std::printf("%s: not by clusters\n", name);
        ++failures;
      }
    check_layer_norm<float>(DType::kFloat32, 3, 9001, false, true, roomy_clusters);
    const auto more = emulator::take_launches();
    const auto ran = [&](const char* name) {
      return std::count(more.begin(), more.end(), std::string(name)) > 0;
    };
    if (!failures &&
        (!ran("layer_norm_backward, clusters") || ran("layer_norm_backward, weights"))) {
      std::printf("layer_norm_backward: not by clusters that read a row once\n");
      ++failures;
    }
  });
}
