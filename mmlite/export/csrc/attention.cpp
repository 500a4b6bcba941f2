#include "attention.h"

#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

extern "C" int32_t mmlite_forward(const Problem* problem);
extern "C" int32_t mmlite_best_isa();

namespace mmlite {
namespace {

typedef std::vector<int64_t> Shape;

std::string text(const Shape& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + ")";
}

void expect(bool fits, const std::string& sentence) {
  if (!fits) throw std::invalid_argument(sentence);
}

void expect_shape(const char* name, const Tensor& tensor, const Shape& shape) {
  expect(tensor.shape == shape, std::string(name) + " must have shape " + text(shape) + "; got " +
                                    text(tensor.shape));
}

// Strides of a packed tensor whose row of one head has `row` elements.
Rows rows(const void* data, int64_t second, int64_t heads, int64_t row) {
  return {const_cast<void*>(data), second * heads * row, heads * row, row};
}

}  // namespace

Shape output_shape(const Call& call) {
  const Shape& value = call.value.shape;
  const Shape& locations = call.locations.shape;
  expect(value.size() == 4, "value must be (B, S, M, D); got shape " + text(value));
  expect(locations.size() == 6 && locations[5] == 2 && locations[3] > 0 && locations[4] > 0,
         "sampling_locations must be (B, Q, M, L, P, 2) with a level and a point at least; got "
         "shape " + text(locations));
  expect(locations[0] == value[0] && locations[2] == value[2],
         "sampling_locations has batch " + std::to_string(locations[0]) + " and " +
             std::to_string(locations[2]) + " heads, but value has batch " +
             std::to_string(value[0]) + " and " + std::to_string(value[2]) + " heads");
  if (call.op == kStandard) {
    expect_shape("attention_weights", call.weights, Shape(locations.begin(), locations.end() - 1));
  } else {
    expect_shape("query", call.query, {value[0], locations[1], value[2], value[3]});
    if (call.op == kKeyAware) expect_shape("key", call.key, value);
  }
  const Shape& sizes = call.spatial_shapes.shape;
  const int64_t count = std::accumulate(sizes.begin(), sizes.end(), int64_t{1},
                                        [](int64_t a, int64_t b) { return a * b; });
  expect(count == 2 * locations[3],
         "spatial_shapes must be " + std::to_string(locations[3]) +
             " pairs (h, w), as sampling_locations has " + std::to_string(locations[3]) +
             " levels; got shape " + text(sizes));
  return {value[0], locations[1], value[2] * value[3]};
}

void run(const Call& call, void* output, int threads) {
  output_shape(call);
  const Shape& value = call.value.shape;
  const Shape& locations = call.locations.shape;
  Problem p = {};
  p.batch = value[0];
  p.tokens = value[1];
  p.heads = value[2];
  p.dim = value[3];
  p.queries = locations[1];
  p.levels = locations[3];
  p.points = locations[4];
  p.spatial_shapes = static_cast<const int64_t*>(call.spatial_shapes.data);
  const int64_t points = p.levels * p.points;
  p.query = rows(call.query.data, p.queries, p.heads, p.dim);
  p.key = rows(call.key.data, p.tokens, p.heads, p.dim);
  p.value = rows(call.value.data, p.tokens, p.heads, p.dim);
  p.locations = rows(call.locations.data, p.queries, p.heads, 2 * points);
  p.weights = rows(call.weights.data, p.queries, p.heads, points);
  p.output = rows(output, p.queries, p.heads, p.dim);
  p.op = call.op;
  p.dtype = call.dtype;
  p.point_dtype = call.dtype;
  p.isa = mmlite_best_isa();
  p.threads = threads;

  switch (mmlite_forward(&p)) {
    case kOk:
      return;
    case kBadShapes: {
      const Shape sizes(p.spatial_shapes, p.spatial_shapes + 2 * p.levels);
      throw std::invalid_argument("spatial_shapes " + text(sizes) + " does not stand for the " +
                                  std::to_string(p.tokens) + " tokens of value");
    }
    case kTooLarge:
      throw std::invalid_argument("value has too many tokens for the CPU kernels: " +
                                  std::to_string(p.tokens) + " of " + std::to_string(p.dim) +
                                  " numbers a head");
    case kNoMemory:
      throw std::bad_alloc();
    default:
      throw std::invalid_argument("the CPU kernels serve heads of 1 to 256 numbers; these have " +
                                  std::to_string(p.dim));
  }
}

}  // namespace mmlite
