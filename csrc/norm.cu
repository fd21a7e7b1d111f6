// y = silu(group_norm(x)) of channels_last tensors, and its backward. With xhat = (x - mean) rstd and
// u = weight xhat + bias:
//
//   forward    mean and rstd of each group;  y = u sigmoid(u)          reads x twice; writes y, mean, rstd
//   backward   du = dy sigmoid(u) (1 + u (1 - sigmoid(u)))             reads x and dy twice; writes dx
//              dbias = sum du,  dweight = sum du xhat
//              dx = rstd (weight du - mean(weight du) - xhat mean(weight du xhat)), means over the group
//
// Either way there are three steps, the middle one small:
//   1. A block takes a chunk of rows of one sample and writes sums of each of its channels to `partial`:
//      moments_kernel, or sums_kernel in backward.
//   2. A block to a group adds those up in double, always in the same order (no atomics):
//      statistics_kernel, or slopes_kernel in backward; parameters_kernel then adds up the samples.
//   3. A block takes the same chunk again, partly from the L2 cache, and writes the result:
//      forward_kernel, or backward_kernel, which computes du again.
// Eager PyTorch reads x twice and the normalised tensor once, writes it and y, and keeps it for backward;
// here backward needs x and two numbers a group.
//
// Grid of steps 1 and 3: up to 320 threads for 4 to 32 rows a thread (`cut`). A thread takes eight
// neighbouring channels of every `lanes`-th row, so its constants stay in registers and its loads are whole.
// Registers: 96 a thread, two blocks to a multiprocessor. Shared memory: 64 bytes a thread, to join the lanes
// of a channel. Fast where C is a multiple of 8; otherwise a thread loads its channels one by one.
//
// Variance: a thread's deviations are those from its own first value, and pieces join by Chan's formula
// (mean, sum of squared deviations), their means counted from the first row of the chunk. So neither a mean
// far from zero nor one outlier costs digits.
#include "vector.cuh"

namespace sae {
namespace cuda {
namespace {

constexpr int kThreads = 320;                                 // two such blocks leave 96 registers a thread
constexpr int kFinishThreads = 128;
constexpr int kMaxLanes = 32;                                 // rows of a chunk at a time
constexpr int kMinRows = 4, kMaxRows = 32;                    // of a thread
constexpr int64_t kWantedBlocks = 256;                        // at least, if the tensor is large enough
constexpr int kMomentRows = 4, kForwardRows = 4;              // that a thread loads before it works on them
constexpr int kParts = 3;                                     // numbers of a channel of a chunk in `partial`
constexpr float kLog2e = 1.4426950408889634f;

// How the work is cut: a function of the shape alone, so that results do not depend on the device. The shape
// has B in it, so the last bit of a sample's results may depend on the size of its batch.
struct Cut {
  int columns, lanes;                                         // of a block: eights of channels; rows at once
  int tiles;                                                  // blocks side by side in a row
  int rows;                                                   // of a chunk
  int64_t chunks;                                             // of a sample
};
Cut cut(const GroupNorm& a) {
  const int eights = (a.C + kEach - 1) / kEach;
  Cut c;
  c.tiles = (eights + kThreads - 1) / kThreads;
  c.columns = (eights + c.tiles - 1) / c.tiles;
  c.lanes = kThreads / c.columns < kMaxLanes ? kThreads / c.columns : kMaxLanes;
  int64_t rows_of_thread = a.B * a.rows * c.tiles / (c.lanes * kWantedBlocks);
  if (rows_of_thread < kMinRows) rows_of_thread = kMinRows;
  if (rows_of_thread > kMaxRows) rows_of_thread = kMaxRows;
  c.rows = c.lanes * static_cast<int>(rows_of_thread);
  c.chunks = (a.rows + c.rows - 1) / c.rows;
  return c;
}
int64_t blocks(const GroupNorm& a, const Cut& c) { return a.B * c.chunks * c.tiles; }
int threads(const Cut& c) { return c.columns * c.lanes; }

// What a thread works on: of a chunk of `rows` rows the rows lane, lane + lanes, ..., and of them the
// channels channel .. channel + n - 1.
struct Place {
  int64_t sample, chunk;
  int64_t first;                                              // element: the first row's, at `channel`
  int rows, lane, column, channel;
  int n;                                                      // no channels if n <= 0
};
SAE_INLINE Place place(const GroupNorm& a, const Cut& c) {
  Place p;
  const int tile = blockIdx.x % c.tiles;
  const int64_t task = blockIdx.x / c.tiles;
  p.sample = task / c.chunks;
  p.chunk = task % c.chunks;
  const int64_t left = a.rows - p.chunk * c.rows;
  p.rows = left < c.rows ? static_cast<int>(left) : c.rows;
  p.lane = threadIdx.x / c.columns;
  p.column = threadIdx.x % c.columns;
  p.channel = (tile * c.columns + p.column) * kEach;
  p.n = a.C - p.channel < kEach ? a.C - p.channel : kEach;
  p.first = (p.sample * a.rows + p.chunk * c.rows) * a.C + p.channel;
  return p;
}
template <class T, class E>
SAE_INLINE E* at(T* tensor, const GroupNorm& a, const Place& p, int row) {
  return static_cast<E*>(tensor) + p.first + static_cast<int64_t>(row) * a.C;
}
// value(channel, group) for the eight channels of a thread
template <class Value>
SAE_INLINE Eight constants(const GroupNorm& a, const Place& p, Value value) {
  const int width = a.C / a.groups;
  int g = p.channel / width, next = (g + 1) * width;
  Eight e{};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (p.channel + j == next) ++g, next += width;
    if (j < p.n) e.v[j] = value(p.channel + j, g);
  }
  return e;
}
SAE_INLINE float sigmoid(float u) { return fast_divide(1.f, 1.f + fast_exp2(-kLog2e * u)); }

// Shared memory: two numbers of each channel of each lane, [2, lanes, columns * 8].
SAE_INLINE float* lane_values(const Cut& c, int which, int lane) {
  return shared_memory<float>() + (which * c.lanes + lane) * c.columns * kEach;
}
SAE_INLINE void put(const Cut& c, const Place& p, int which, const Eight& e) {
  float4* to = reinterpret_cast<float4*>(lane_values(c, which, p.lane) + p.column * kEach);
  to[0] = float4{e.v[0], e.v[1], e.v[2], e.v[3]};
  to[1] = float4{e.v[4], e.v[5], e.v[6], e.v[7]};
}
// Those of a chunk, in `partial` [B, chunks, kParts, C]: [C].
SAE_INLINE float* partial(const GroupNorm& a, const Cut& c, const Place& p, int which) {
  return a.partial + ((p.sample * c.chunks + p.chunk) * kParts + which) * a.C;
}

// Step 1 of forward. A thread, over its rows of eight channels:
//   shift = its first row
//   for the others, four at a time: d = x - shift;  sum += d;  square += d^2
//   mean = shift - the chunk's first row + sum / count;  square -= sum^2 / count
// Then, channel by channel, the lanes join by Chan's formula:
//   partial = the chunk's first row, the mean less that, the sum of squared deviations from the mean
template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads, 2) moments_kernel(const GroupNorm a, const Cut c) {
  const Place p = place(a, c);
  if (p.n > 0) {
    Eight shift{}, sum{}, square{};
    if (p.lane < p.rows) shift = load<kFast>(at<const void, const T>(a.x, a, p, p.lane), p.n);
    for (int row = p.lane + c.lanes; row < p.rows; row += kMomentRows * c.lanes) {
      Eight x[kMomentRows];
#pragma unroll
      for (int i = 0; i < kMomentRows; ++i) {
        const int r = row + i * c.lanes;
        x[i] = r < p.rows ? load<kFast>(at<const void, const T>(a.x, a, p, r), p.n) : shift;  // deviates by 0
      }
#pragma unroll
      for (int i = 0; i < kMomentRows; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const float d = x[i].v[j] - shift.v[j];
          sum.v[j] += d;
          square.v[j] = __fmaf_rn(d, d, square.v[j]);
        }
    }
    const Eight origin = load<kFast>(at<const void, const T>(a.x, a, p, 0), p.n);
    const int count = (p.rows - p.lane + c.lanes - 1) / c.lanes;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float mean = count > 0 ? sum.v[j] / static_cast<float>(count) : 0.f;
      square.v[j] = __fmaf_rn(-sum.v[j], mean, square.v[j]);
      shift.v[j] = shift.v[j] - origin.v[j] + mean;
    }
    put(c, p, 0, shift);
    put(c, p, 1, square);
  }
  __syncthreads();

  const int lanes = p.rows < c.lanes ? p.rows : c.lanes;      // that have a row
  const auto count = [&](int lane) { return static_cast<float>((p.rows - lane + c.lanes - 1) / c.lanes); };
  for (int i = threadIdx.x; i < c.columns * kEach; i += blockDim.x) {
    const int channel = p.channel - p.column * kEach + i;
    if (channel >= a.C) break;
    float mean = 0.f, square = 0.f;
    for (int l = 0; l < lanes; ++l) mean += lane_values(c, 0, l)[i] * count(l);
    mean /= static_cast<float>(p.rows);
    for (int l = 0; l < lanes; ++l) {
      const float d = lane_values(c, 0, l)[i] - mean;
      square += __fmaf_rn(d * d, count(l), lane_values(c, 1, l)[i]);
    }
    partial(a, c, p, 0)[channel] = load_one(at<const void, const T>(a.x, a, p, 0) - p.channel + channel);
    partial(a, c, p, 1)[channel] = mean;
    partial(a, c, p, 2)[channel] = square;
  }
}

// Step 2 of forward, a block to a group of a sample: Chan's formula over its channels and chunks.
//   mean = sum of count * chunk mean / n;  square = sum of chunk square + count (chunk mean - mean)^2
//   rstd = 1 / sqrt(square / n + eps)
__global__ void __launch_bounds__(kFinishThreads) statistics_kernel(const GroupNorm a, const Cut c) {
  double* shared = shared_memory<double>();
  const int width = a.C / a.groups, g = blockIdx.x % a.groups;
  const int64_t sample = blockIdx.x / a.groups, entries = c.chunks * width;
  const float* parts = a.partial + sample * c.chunks * kParts * a.C + g * width;
  const auto count = [&](int64_t chunk) {
    const int64_t left = a.rows - chunk * c.rows;
    return static_cast<double>(left < c.rows ? left : c.rows);
  };
  const auto part = [&](int64_t i, int which) -> double {
    return parts[(i / width * kParts + which) * a.C + i % width];
  };
  double mean = 0., square = 0.;
  for (int64_t i = threadIdx.x; i < entries; i += kFinishThreads)
    mean += (part(i, 0) + part(i, 1)) * count(i / width);
  mean = block_sum<kFinishThreads>(mean, shared) / static_cast<double>(a.rows * width);
  for (int64_t i = threadIdx.x; i < entries; i += kFinishThreads) {
    const double d = part(i, 0) + part(i, 1) - mean;
    square += part(i, 2) + d * d * count(i / width);
  }
  square = block_sum<kFinishThreads>(square, shared);
  if (threadIdx.x == 0) {
    a.mean[blockIdx.x] = static_cast<float>(mean);
    a.rstd[blockIdx.x] = static_cast<float>(1. / sqrt(square / static_cast<double>(a.rows * width) + a.eps));
  }
}

// u = (x - mean) scale + bias, scale = rstd weight
struct Affine { Eight mean, scale, bias; };
SAE_INLINE Affine affine(const GroupNorm& a, const Place& p) {
  const float *mean = a.mean + p.sample * a.groups, *rstd = a.rstd + p.sample * a.groups;
  return {constants(a, p, [&](int, int g) { return mean[g]; }),
          constants(a, p, [&](int i, int g) { return rstd[g] * a.weight[i]; }),
          constants(a, p, [&](int i, int) { return a.bias[i]; })};
}

// Step 3 of forward. A thread, over its rows of eight channels, four rows at a time:
//   u = (x - mean) scale + bias;  y = u sigmoid(u)
template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const GroupNorm a, const Cut c) {
  const Place p = place(a, c);
  if (p.n <= 0) return;
  const Affine k = affine(a, p);
  for (int row = p.lane; row < p.rows; row += kForwardRows * c.lanes) {
    Eight x[kForwardRows];
#pragma unroll
    for (int i = 0; i < kForwardRows; ++i) {
      const int r = row + i * c.lanes;
      if (r < p.rows) x[i] = load<kFast>(at<const void, const T>(a.x, a, p, r), p.n);
    }
#pragma unroll
    for (int i = 0; i < kForwardRows; ++i) {
      if (row + i * c.lanes >= p.rows) break;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const float u = __fmaf_rn(x[i].v[j] - k.mean.v[j], k.scale.v[j], k.bias.v[j]);
        x[i].v[j] = u * sigmoid(u);
      }
      store<kFast>(at<void, T>(a.y, a, p, row + i * c.lanes), x[i], p.n);
    }
  }
}

// work(row, x, dy) of each row of a thread. The loads of two rows are in one block of code, with no condition
// between them: otherwise nvcc waits for the first row before it loads the second.
template <class T, bool kFast, class Work>
SAE_INLINE void for_rows(const GroupNorm& a, const Cut& c, const Place& p, Work work) {
  const auto load_row = [&](const void* tensor, int row) {
    return load<kFast>(at<const void, const T>(tensor, a, p, row), p.n);
  };
  int row = p.lane;
  for (; row + c.lanes < p.rows; row += 2 * c.lanes) {
    const Eight x0 = load_row(a.x, row), dy0 = load_row(a.dy, row);
    const Eight x1 = load_row(a.x, row + c.lanes), dy1 = load_row(a.dy, row + c.lanes);
    work(row, x0, dy0);
    work(row + c.lanes, x1, dy1);
  }
  if (row < p.rows) work(row, load_row(a.x, row), load_row(a.dy, row));
}

SAE_INLINE float silu_gradient(float dy, float u) {
  const float sigma = sigmoid(u);
  return dy * sigma * __fmaf_rn(u, 1.f - sigma, 1.f);
}

// Step 1 of backward. A thread, over its rows of eight channels, two rows at a time:
//   u = (x - mean) scale + bias;  du = dy silu'(u);  sum += du;  product += du (x - mean)
// Then, channel by channel, the lanes are added up: partial = sum, product.
template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const GroupNorm a, const Cut c) {
  const Place p = place(a, c);
  if (p.n > 0) {
    const Affine k = affine(a, p);
    Eight sum{}, product{};
    for_rows<T, kFast>(a, c, p, [&](int, const Eight& x, const Eight& dy) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const float d = x.v[j] - k.mean.v[j];
        const float du = silu_gradient(dy.v[j], __fmaf_rn(d, k.scale.v[j], k.bias.v[j]));
        sum.v[j] += du;
        product.v[j] = __fmaf_rn(du, d, product.v[j]);
      }
    });
    put(c, p, 0, sum);
    put(c, p, 1, product);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < c.columns * kEach; i += blockDim.x) {
    const int channel = p.channel - p.column * kEach + i;
    if (channel >= a.C) break;
    float sum = 0.f, product = 0.f;
    for (int l = 0; l < c.lanes; ++l) {
      sum += lane_values(c, 0, l)[i];
      product += lane_values(c, 1, l)[i];
    }
    partial(a, c, p, 0)[channel] = sum;
    partial(a, c, p, 1)[channel] = product;
  }
}

// Step 2 of backward, a block to a group of a sample:
//   of each channel, over the chunks: sum du, and sum du xhat = rstd sum du (x - mean), for parameters_kernel
//   over the group: offset = rstd mean(weight du), slope = rstd^2 mean(weight du xhat)
// Threads t, t + width, ... take the chunks of channel t % width in turn; where a group is wider than the
// block a thread takes many channels.
__global__ void __launch_bounds__(kFinishThreads) slopes_kernel(const GroupNorm a, const Cut c) {
  const int width = a.C / a.groups, g = blockIdx.x % a.groups;
  const int lanes = width < kFinishThreads ? kFinishThreads / width : 1;
  const int64_t sample = blockIdx.x / a.groups;
  double *sum = shared_memory<double>(), *product = sum + lanes * width, *shared = product + lanes * width;
  const float* parts = a.partial + sample * c.chunks * kParts * a.C + g * width;
  const int lane = threadIdx.x / width;
  for (int i = threadIdx.x % width; lane < lanes && i < width; i += kFinishThreads) {
    double s = 0., q = 0.;
    for (int64_t chunk = lane; chunk < c.chunks; chunk += lanes) {
      s += parts[chunk * kParts * a.C + i];
      q += parts[(chunk * kParts + 1) * a.C + i];
    }
    sum[lane * width + i] = s;
    product[lane * width + i] = q;
  }
  __syncthreads();

  const double rstd = a.rstd[blockIdx.x];
  double du = 0., du_xhat = 0.;
  for (int i = threadIdx.x; i < width; i += kFinishThreads) {
    double s = 0., q = 0.;
    for (int l = 0; l < lanes; ++l) {
      s += sum[l * width + i];
      q += product[l * width + i];
    }
    q *= rstd;
    a.sums[(sample * 2 + 0) * a.C + g * width + i] = s;
    a.sums[(sample * 2 + 1) * a.C + g * width + i] = q;
    du += a.weight[g * width + i] * s;
    du_xhat += a.weight[g * width + i] * q;
  }
  du = block_sum<kFinishThreads>(du, shared);
  du_xhat = block_sum<kFinishThreads>(du_xhat, shared);
  if (threadIdx.x == 0) {                                     // dx = scale du - (offset + slope (x - mean))
    const double count = static_cast<double>(a.rows * width);
    a.slope[(sample * 2 + 0) * a.groups + g] = static_cast<float>(rstd * du / count);
    a.slope[(sample * 2 + 1) * a.groups + g] = static_cast<float>(rstd * rstd * du_xhat / count);
  }
}

// dbias and dweight, a thread to a channel: the sums over the samples.
__global__ void __launch_bounds__(kFinishThreads) parameters_kernel(const GroupNorm a) {
  const int i = blockIdx.x * kFinishThreads + threadIdx.x;
  if (i >= a.C) return;
  double dbias = 0., dweight = 0.;
  for (int64_t b = 0; b < a.B; ++b) {
    dbias += a.sums[2 * b * a.C + i];
    dweight += a.sums[(2 * b + 1) * a.C + i];
  }
  a.dbias[i] = static_cast<float>(dbias);
  a.dweight[i] = static_cast<float>(dweight);
}

// Step 3 of backward. A thread, over its rows of eight channels, two rows at a time:
//   u = (x - mean) scale + bias;  du = dy silu'(u);  dx = scale du - (offset + slope (x - mean))
template <class T, bool kFast>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const GroupNorm a, const Cut c) {
  const Place p = place(a, c);
  if (p.n <= 0) return;
  const Affine k = affine(a, p);
  const float* slopes = a.slope + p.sample * 2 * a.groups;
  const Eight offset = constants(a, p, [&](int, int g) { return slopes[g]; });
  const Eight slope = constants(a, p, [&](int, int g) { return slopes[a.groups + g]; });
  for_rows<T, kFast>(a, c, p, [&](int row, const Eight& x, Eight dy) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float d = x.v[j] - k.mean.v[j];
      const float du = silu_gradient(dy.v[j], __fmaf_rn(d, k.scale.v[j], k.bias.v[j]));
      dy.v[j] = __fmaf_rn(k.scale.v[j], du, -__fmaf_rn(d, slope.v[j], offset.v[j]));
    }
    store<kFast>(at<void, T>(a.dx, a, p, row), dy, p.n);
  });
}

constexpr size_t kFinishShared = kFinishThreads * sizeof(double);
size_t lane_memory(const Cut& c) { return 2 * threads(c) * kEach * sizeof(float); }

}  // namespace

int64_t norm_partials(const GroupNorm& a) { return a.B * cut(a).chunks * kParts * a.C; }

const char* group_norm_silu_forward(const GroupNorm& a, void* stream) {
  const Cut c = cut(a);
  const bool fast = a.C % kEach == 0;
  const char* error =
      SAE_LAUNCH(moments_kernel, a.type, fast, blocks(a, c), threads(c), lane_memory(c), stream, a, c);
  if (!error) error = launch(statistics_kernel, a.B * a.groups, kFinishThreads, kFinishShared, stream, a, c);
  if (error) return error;
  return SAE_LAUNCH(forward_kernel, a.type, fast, blocks(a, c), threads(c), 0, stream, a, c);
}

const char* group_norm_silu_backward(const GroupNorm& a, void* stream) {
  const Cut c = cut(a);
  const bool fast = a.C % kEach == 0;
  const int width = a.C / a.groups;
  const int entries = width < kFinishThreads ? kFinishThreads / width * width : width;
  const size_t shared = 2 * entries * sizeof(double) + kFinishShared;
  const int parameter_blocks = (a.C + kFinishThreads - 1) / kFinishThreads;
  const char* error =
      SAE_LAUNCH(sums_kernel, a.type, fast, blocks(a, c), threads(c), lane_memory(c), stream, a, c);
  if (!error) error = launch(slopes_kernel, a.B * a.groups, kFinishThreads, shared, stream, a, c);
  if (!error) error = launch(parameters_kernel, parameter_blocks, kFinishThreads, 0, stream, a);
  if (error) return error;
  return SAE_LAUNCH(backward_kernel, a.type, fast, blocks(a, c), threads(c), 0, stream, a, c);
}

}  // namespace cuda
}  // namespace sae
