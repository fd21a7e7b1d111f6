// Times a file of attention kernels without torch: what a change to csrc/attention_mma.cu is worth, in a
// second, and whether it still gives the same. See README.md for the command.
//
//   ./mine FILE     writes its output and gradient of the first buffers to FILE where there is none, else
//                   prints how far they are from those, ||a - b|| / ||b||
#include KERNELS

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace sae {
namespace cuda {                                              // of attention_fp32.cu, which is not timed
const char* attention_forward_fp32(const Attention&, void*) { return "no fp32 here"; }
const char* attention_backward_fp32(const Attention&, void*) { return "no fp32 here"; }
}  // namespace cuda
}  // namespace sae

static void check(const char* error) {
  if (error) std::exit((std::fprintf(stderr, "%s\n", error), 1));
}
static void check(cudaError_t error) { check(error ? cudaGetErrorString(error) : nullptr); }

template <class T>
T* allocate(size_t n) {
  void* p;
  check(cudaMalloc(&p, n * sizeof(T)));
  check(cudaMemset(p, 0xff, n * sizeof(T)));                  // NaN, until it is written
  return static_cast<T*>(p);
}

// About normal: the sum of four uniform numbers.
__global__ void draw(uint16_t* p, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    uint32_t x = uint32_t(i) * 2654435761u + seed;
    float sum = 0.f;
    for (int k = 0; k < 4; ++k) {
      x = (x ^ x >> 16) * 0x7feb352du;
      x = (x ^ x >> 15) * 0x846ca68bu;
      sum += (x >> 8) * (1.f / 16777216.f) - 0.5f;
    }
    p[i] = uint16_t(__float_as_uint(1.7f * sum) >> 16);
  }
}

template <class F>
float microseconds(F call, int sets) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < 9; ++round) {
    check(cudaEventRecord(start));
    for (int i = 0; i < 3 * sets; ++i) call(i % sets);
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, start, end));
    times.push_back(ms * 1e3f / (3 * sets));
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

static double distance(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
  const auto value = [](uint16_t bits) {
    const uint32_t u = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return double(f);
  };
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(value(a[i]) - value(b[i]), 2);
    norm += std::pow(value(b[i]), 2);
  }
  return std::sqrt(difference / norm);
}

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s FILE\n", argv[0]), 2;
  std::vector<uint16_t> found;
  for (const int side : {16, 32}) {                           // 256 and 512 pixels
    const int B = side == 16 ? 16 : 4, N = 5 + side * side, H = 20, sets = 4;        // more than the L2 cache
    const size_t n = size_t(B) * N * H * 64;
    std::vector<float> angles;
    for (int i = 0; i < side * 16; ++i) angles.insert(angles.end(), {std::cos(0.1f * i), std::sin(0.1f * i)});
    float* table = allocate<float>(angles.size());
    check(cudaMemcpy(table, angles.data(), angles.size() * sizeof(float), cudaMemcpyHostToDevice));

    std::vector<sae::Attention> all;
    for (int i = 0; i < sets; ++i) {
      uint16_t *qkv = allocate<uint16_t>(3 * n), *dout = allocate<uint16_t>(n);
      draw<<<1024, 256>>>(qkv, 3 * n, 1 + i);
      draw<<<1024, 256>>>(dout, n, 100 + i);
      all.push_back({sae::Type::bf16, B, N, H, 5, side, side, table, table, qkv, dout, allocate<uint16_t>(n),
                     allocate<uint16_t>(3 * n), allocate<float>(n / 64), allocate<float>(n / 64)});
    }
    const auto forward = [&](int i) { check(sae::cuda::attention_forward(all[i], nullptr)); };
    const auto backward = [&](int i) { check(sae::cuda::attention_backward(all[i], nullptr)); };
    for (int i = 0; i < sets; ++i) forward(i), backward(i);
    check(cudaDeviceSynchronize());
    found.resize(found.size() + 4 * n);
    uint16_t* const out = &found[found.size() - 4 * n];
    check(cudaMemcpy(out, all[0].out, n * sizeof(uint16_t), cudaMemcpyDeviceToHost));
    check(cudaMemcpy(out + n, all[0].dqkv, 3 * n * sizeof(uint16_t), cudaMemcpyDeviceToHost));
    const float f = microseconds(forward, sets), b = microseconds(backward, sets);
    std::printf("B %2d N %4d H %d: forward %6.1f us, backward %6.1f us\n", B, N, H, f, b);
  }

  std::vector<uint16_t> before(found.size());
  if (FILE* file = std::fopen(argv[1], "rb")) {
    if (std::fread(before.data(), 2, before.size(), file) != before.size()) check("FILE is too short");
    std::printf("distance from %s: %.1e\n", argv[1], distance(found, before));
  } else if (FILE* file = std::fopen(argv[1], "wb")) {
    if (std::fwrite(found.data(), 2, found.size(), file) != found.size()) check("FILE cannot be written");
  }
}
