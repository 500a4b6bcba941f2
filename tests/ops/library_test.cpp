// The kernels' library, called through its C interface alone and compared with the formulas of the
// operators, written out in double: for systems whose machine code can be run here (emulated) but
// not their Python. tools/wheels.py compiles it for each and runs it as
//
//   library_test LIBRARY
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <vector>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include "problem.h"

namespace {

typedef int32_t (*Run)(const Problem*);
typedef int32_t (*Ask)();

struct Library {
  explicit Library(const char* path) {
#if defined(_WIN32)
    const HMODULE handle = LoadLibraryA(path);
#define MMLITE_FIND(name) reinterpret_cast<void*>(GetProcAddress(handle, name))
#else
    void* const handle = dlopen(path, RTLD_NOW);
#define MMLITE_FIND(name) dlsym(handle, name)
#endif
    if (!handle) {
      printf("%s cannot be loaded\n", path);
      exit(1);
    }
    version = reinterpret_cast<Ask>(MMLITE_FIND("mmlite_interface"));
    best_isa = reinterpret_cast<Ask>(MMLITE_FIND("mmlite_best_isa"));
    forward = reinterpret_cast<Run>(MMLITE_FIND("mmlite_forward"));
    backward = reinterpret_cast<Run>(MMLITE_FIND("mmlite_backward"));
    if (!version || !best_isa || !forward || !backward || version() != kInterface) {
      printf("%s has another interface\n", path);
      exit(1);
    }
  }

  Ask version, best_isa;
  Run forward, backward;
};

// One tensor, packed: what the formulas read, in double, and what the kernels read.
struct Array {
  std::vector<double> exact;
  std::vector<char> bytes;
  int dtype = kFloat32;
};

int size_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

void store(int dtype, double number, char* to) {
  const float single = static_cast<float>(number);
  const _Float16 half = static_cast<_Float16>(number);
  uint32_t bits;
  memcpy(&bits, &single, 4);
  const uint16_t brain = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  switch (dtype) {
    case kFloat64: memcpy(to, &number, 8); break;
    case kFloat32: memcpy(to, &single, 4); break;
    case kFloat16: memcpy(to, &half, 2); break;
    default: memcpy(to, &brain, 2);
  }
}

double load(int dtype, const char* from) {
  double number;
  float single;
  _Float16 half;
  uint16_t brain;
  switch (dtype) {
    case kFloat64: memcpy(&number, from, 8); return number;
    case kFloat32: memcpy(&single, from, 4); return single;
    case kFloat16: memcpy(&half, from, 2); return half;
  }
  memcpy(&brain, from, 2);
  const uint32_t bits = static_cast<uint32_t>(brain) << 16;
  memcpy(&single, &bits, 4);
  return single;
}

Array zeros(int64_t count, int dtype) {
  Array array;
  array.dtype = dtype;
  array.exact.assign(count, 0);
  array.bytes.assign(count * size_of(dtype), 0);
  return array;
}

uint64_t random_state = 1;

// Uniform numbers that the dtype holds exactly.
Array uniform(int64_t count, int dtype, double low, double high) {
  Array array = zeros(count, dtype);
  for (int64_t i = 0; i < count; ++i) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    char* const at = array.bytes.data() + i * size_of(dtype);
    store(dtype, low + (high - low) * static_cast<double>(random_state >> 11) / 9007199254740992.0, at);
    array.exact[i] = load(dtype, at);
  }
  return array;
}

typedef Operator Variant;

struct Case {
  Case(Variant variant, int dtype, int64_t queries, int64_t dim)
      : variant(variant), dtype(dtype), queries(queries), dim(dim) {
    const int point_dtype = dtype == kFloat64 ? kFloat64 : kFloat32;
    for (int level = 0; level < kLevels; ++level) tokens += kShapes[2 * level] * kShapes[2 * level + 1];
    value = uniform(kBatch * tokens * kHeads * dim, dtype, -1, 1);
    grad_output = uniform(kBatch * queries * kHeads * dim, dtype, -1, 1);
    // Some lie outside of the map, some so near its border that only part of a sample is inside.
    locations = uniform(kBatch * queries * kHeads * kLevels * kPoints * 2, point_dtype, -0.3, 1.3);
    if (variant == kStandard) {
      weights = uniform(kBatch * queries * kHeads * kLevels * kPoints, point_dtype, 0, 1);
    } else {
      query = uniform(kBatch * queries * kHeads * dim, dtype, -2, 2);
    }
    if (variant == kKeyAware) key = uniform(value.exact.size(), dtype, -1, 1);
  }

  // Bilinear, zero outside of the map.
  double sample(const std::vector<double>& rows, int64_t b, int64_t m, int level, double x, double y,
                int64_t d) const {
    const int64_t height = kShapes[2 * level], width = kShapes[2 * level + 1];
    int64_t start = 0;
    for (int l = 0; l < level; ++l) start += kShapes[2 * l] * kShapes[2 * l + 1];
    x = x * width - 0.5;
    y = y * height - 0.5;
    double sum = 0;
    for (int64_t i = static_cast<int64_t>(floor(y)), n = 0; n < 2; ++i, ++n) {
      for (int64_t j = static_cast<int64_t>(floor(x)), k = 0; k < 2; ++j, ++k) {
        if (i < 0 || i >= height || j < 0 || j >= width) continue;
        const int64_t row = (b * tokens + start + i * width + j) * kHeads + m;
        sum += (1 - fabs(y - i)) * (1 - fabs(x - j)) * rows[row * dim + d];
      }
    }
    return sum;
  }

  // What the operator computes for one query of one head.
  void attend(int64_t b, int64_t q, int64_t m, double* output) const {
    const int64_t row = (b * queries + q) * kHeads + m, points = kLevels * kPoints;
    std::vector<double> weight(points);
    for (int64_t i = 0; i < points; ++i) {
      if (variant == kStandard) {
        weight[i] = weights.exact[row * points + i];
        continue;
      }
      const double* const at = &locations.exact[(row * points + i) * 2];
      const std::vector<double>& keys = variant == kKeyAware ? key.exact : value.exact;
      double logit = 0;
      for (int64_t d = 0; d < dim; ++d) {
        logit += query.exact[row * dim + d] * sample(keys, b, m, i / kPoints, at[0], at[1], d);
      }
      weight[i] = exp(logit / sqrt(static_cast<double>(dim)));
    }
    double sum = 0;
    for (const double w : weight) sum += w;
    if (variant == kStandard) sum = 1;
    for (int64_t d = 0; d < dim; ++d) {
      output[d] = 0;
      for (int64_t i = 0; i < points; ++i) {
        const double* const at = &locations.exact[(row * points + i) * 2];
        output[d] += weight[i] / sum * sample(value.exact, b, m, i / kPoints, at[0], at[1], d);
      }
    }
  }

  void for_each_row(const std::function<void(int64_t, int64_t, int64_t)>& body) const {
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t q = 0; q < queries; ++q) {
        for (int64_t m = 0; m < kHeads; ++m) body(b, q, m);
      }
    }
  }

  std::vector<double> output() const {
    std::vector<double> output(kBatch * queries * kHeads * dim);
    for_each_row([&](int64_t b, int64_t q, int64_t m) {
      attend(b, q, m, &output[((b * queries + q) * kHeads + m) * dim]);
    });
    return output;
  }

  // The sum of output * grad_output, whose gradient the backward pass computes.
  double loss() const {
    const std::vector<double> out = output();
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * grad_output.exact[i];
    return sum;
  }

  // By central differences.
  std::vector<double> gradient(Array* of) const {
    constexpr double kStep = 1e-6;
    std::vector<double> gradient;
    for (double& number : of->exact) {
      const double original = number;
      number = original + kStep;
      const double above = loss();
      number = original - kStep;
      gradient.push_back((above - loss()) / (2 * kStep));
      number = original;
    }
    return gradient;
  }

  Rows rows(Array& array, int64_t length, int64_t width) const {
    if (array.bytes.empty()) return {nullptr, 0, 0, 0};
    return {array.bytes.data(), length * kHeads * width, kHeads * width, width};
  }

  Problem problem(int isa, int threads) {
    const int64_t points = kLevels * kPoints;
    Problem p;
    memset(&p, 0, sizeof p);
    p.batch = kBatch, p.tokens = tokens, p.queries = queries, p.heads = kHeads, p.dim = dim;
    p.levels = kLevels, p.points = kPoints, p.spatial_shapes = kShapes;
    p.query = rows(query, queries, dim);
    p.key = rows(key, tokens, dim);
    p.value = rows(value, tokens, dim);
    p.locations = rows(locations, queries, 2 * points);
    p.weights = rows(weights, queries, points);
    p.op = variant, p.dtype = dtype, p.point_dtype = locations.dtype;
    p.isa = isa, p.threads = threads;
    return p;
  }

  static constexpr int64_t kBatch = 2, kHeads = 2, kLevels = 2, kPoints = 3;
  static constexpr int64_t kShapes[4] = {5, 7, 3, 2};

  const Variant variant;
  const int dtype;
  const int64_t queries, dim;
  int64_t tokens = 0;
  Array query, key, value, locations, weights, grad_output;
};
constexpr int64_t Case::kShapes[4];

int passed = 0, failed = 0;

void compare(const char* what, const Case& c, int isa, const std::vector<double>& expected,
             const Array& got, double tolerance) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double number = load(got.dtype, got.bytes.data() + i * size_of(got.dtype));
    largest = fmax(largest, fabs(expected[i]));
    // A NaN must count.
    if (!(fabs(number - expected[i]) <= error)) error = fabs(number - expected[i]);
    if (isnan(number)) error = INFINITY;
  }
  const bool fits = error <= tolerance * fmax(largest, 1);
  ++(fits ? passed : failed);
  if (!fits) {
    printf("%s: variant %d, dtype %d, isa %d, %d queries of %d: off by %g, where %g is allowed\n",
           what, c.variant, c.dtype, isa, static_cast<int>(c.queries), static_cast<int>(c.dim),
           error, tolerance * fmax(largest, 1));
  }
}

void run(const Library& library, Variant variant, int dtype, int64_t queries, int64_t dim) {
  Case c(variant, dtype, queries, dim);
  const double tolerance = dtype == kFloat64   ? 1e-12
                           : dtype == kFloat32 ? 1e-5
                           : dtype == kFloat16 ? 2e-3
                                               : 1.6e-2;
  const std::vector<double> expected = c.output();
  for (int isa = 0; isa <= library.best_isa(); ++isa) {
    for (int threads = 1; threads <= 3; threads += 2) {
      Array output = zeros(expected.size(), dtype);
      Problem p = c.problem(isa, threads);
      p.output = c.rows(output, queries, dim);
      if (library.forward(&p) != kOk) ++failed;
      compare("output", c, isa, expected, output, tolerance);
    }
  }
  // Central differences are for small cases, and half precision differs in its rounding alone.
  if ((dtype != kFloat32 && dtype != kFloat64) || queries > 10) return;
  struct Gradient {
    const char* name;
    Grad bit;
    Array* of;
    Rows Problem::*rows;
    int64_t length, width;
    std::vector<double> expected;
  };
  const int64_t points = Case::kLevels * Case::kPoints;
  std::vector<Gradient> gradients = {
      {"grad_query", kGradQuery, &c.query, &Problem::grad_query, queries, dim, {}},
      {"grad_key", kGradKey, &c.key, &Problem::grad_key, c.tokens, dim, {}},
      {"grad_value", kGradValue, &c.value, &Problem::grad_value, c.tokens, dim, {}},
      {"grad_locations", kGradLocations, &c.locations, &Problem::grad_locations, queries, 2 * points, {}},
      {"grad_weights", kGradWeights, &c.weights, &Problem::grad_weights, queries, points, {}},
  };
  for (Gradient& gradient : gradients) gradient.expected = c.gradient(gradient.of);
  for (int isa = 0; isa <= library.best_isa(); ++isa) {
    Problem p = c.problem(isa, 3);
    p.grad_output = c.rows(c.grad_output, queries, dim);
    std::vector<Array> got;
    for (const Gradient& gradient : gradients) got.push_back(zeros(gradient.expected.size(), dtype));
    for (size_t i = 0; i < got.size(); ++i) {
      if (!got[i].bytes.empty()) p.grads |= gradients[i].bit;
      p.*gradients[i].rows = c.rows(got[i], gradients[i].length, gradients[i].width);
    }
    if (library.backward(&p) != kOk) ++failed;
    for (size_t i = 0; i < got.size(); ++i) {
      compare(gradients[i].name, c, isa, gradients[i].expected, got[i],
              dtype == kFloat64 ? 1e-7 : 1e-4);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return printf("usage: library_test LIBRARY\n"), 2;
  const Library library(argv[1]);
  for (const Variant variant : {kStandard, kKeyAwareShared, kKeyAware}) {
    for (const int dtype : {kFloat32, kBfloat16, kFloat16, kFloat64}) {
      for (const int64_t dim : {1, 5, 16, 32, 48}) {
        // Few queries read the rows where they are, many read a packed copy.
        if (dim <= 16) run(library, variant, dtype, 3, dim);
        run(library, variant, dtype, 80, dim);
      }
    }
  }
  printf("best isa %d: %d passed, %d failed\n", library.best_isa(), passed, failed);
  return failed != 0;
}
