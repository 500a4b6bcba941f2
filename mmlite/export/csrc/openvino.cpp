// The door to OpenVINO: an extension for Core::add_extension. Its operators, and their inputs, are
// those of onnxruntime.cpp; it reads them from ONNX models and from OpenVINO's own.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <stdexcept>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include "attention.h"
#include "parallel.h"

namespace mmlite {
namespace {

// Has the signature of OpenMP's entry point, in whose place it is: the kernels' tasks run on the
// threads of the request.
void run_on_runtime(void (*body)(void*), void* data, unsigned threads, unsigned) {
  tbb::parallel_for(0u, threads, [&](unsigned) { body(data); }, tbb::simple_partitioner());
}

Tensor tensor_of(const ov::Tensor& from) {
  Tensor tensor;
  tensor.data = from.data();
  tensor.shape.assign(from.get_shape().begin(), from.get_shape().end());
  return tensor;
}

// Level sizes: the CPU plugin narrows the integers of a model to 32 bits.
std::vector<int64_t> integers(const ov::Tensor& from) {
  const size_t count = from.get_size();
  if (from.get_element_type() == ov::element::i64) {
    const int64_t* const data = from.data<const int64_t>();
    return std::vector<int64_t>(data, data + count);
  }
  if (from.get_element_type() != ov::element::i32) {
    throw std::invalid_argument("spatial_shapes must be int64 or int32; got " +
                                from.get_element_type().to_string());
  }
  const int32_t* const data = from.data<const int32_t>();
  return std::vector<int64_t>(data, data + count);
}

// Which inputs are what; -1 for none.
struct Inputs {
  int query, value, sizes, locations, weights, key;
};

class Attention : public ov::op::Op {
 public:
  using Op::Op;

  virtual Inputs inputs() const = 0;

  void validate_and_infer_types() override {
    const Inputs in = inputs();
    const ov::PartialShape value = get_input_partial_shape(in.value);
    const ov::PartialShape locations = get_input_partial_shape(in.locations);
    NODE_VALIDATION_CHECK(this, value.rank().compatible(4), "value must be (B, S, M, D)");
    NODE_VALIDATION_CHECK(this, locations.rank().compatible(6),
                          "sampling_locations must be (B, Q, M, L, P, 2)");
    NODE_VALIDATION_CHECK(this, get_input_element_type(in.sizes).is_dynamic() ||
                                    get_input_element_type(in.sizes).is_integral_number(),
                          "spatial_shapes must hold integers");
    ov::PartialShape output = ov::PartialShape::dynamic(3);
    if (value.rank().is_static()) {
      output[0] = value[0];
      if (value[2].is_static() && value[3].is_static()) output[2] = value[2] * value[3];
    }
    if (locations.rank().is_static()) output[1] = locations[1];
    set_output_type(0, get_input_element_type(in.value), output);
  }

  bool visit_attributes(ov::AttributeVisitor&) override { return true; }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& from) const override {
    const Inputs in = inputs();
    const auto tensor = [&](int index) {
      return index >= 0 && index < static_cast<int>(from.size()) ? tensor_of(from[index])
                                                                 : Tensor();
    };
    Call call = {};
    call.query = tensor(in.query);
    call.value = tensor(in.value);
    const std::vector<int64_t> sizes = integers(from[in.sizes]);
    call.spatial_shapes.data = sizes.data();
    call.spatial_shapes.shape = tensor(in.sizes).shape;
    call.locations = tensor(in.locations);
    call.weights = tensor(in.weights);
    call.key = tensor(in.key);
    call.op = in.weights >= 0 ? kStandard : call.key.data ? kKeyAware : kKeyAwareShared;
    const ov::element::Type type = from[in.value].get_element_type();
    if (type == ov::element::f32) {
      call.dtype = kFloat32;
    } else if (type == ov::element::bf16) {
      call.dtype = kBfloat16;
    } else if (type == ov::element::f16) {
      call.dtype = kFloat16;
    } else {
      throw std::invalid_argument("value must be float32, bfloat16 or float16; got " +
                                  type.to_string());
    }
    for (size_t i = 0; i < from.size(); ++i) {
      if (static_cast<int>(i) != in.sizes && from[i].get_element_type() != type) {
        throw std::invalid_argument("input " + std::to_string(i) + " must be " + type.to_string() +
                                    " as value is; got " + from[i].get_element_type().to_string());
      }
    }
    const std::vector<int64_t> shape = output_shape(call);
    outputs[0].set_shape(ov::Shape(shape.begin(), shape.end()));
    run(call, outputs[0].data(), tbb::this_task_arena::max_concurrency());
    return true;
  }
};

class KeyAwareDeformAttn : public Attention {
 public:
  OPENVINO_OP("KeyAwareDeformAttn", "mmlite", Attention);

  KeyAwareDeformAttn() = default;
  explicit KeyAwareDeformAttn(const ov::OutputVector& arguments) : Attention(arguments) {
    constructor_validate_and_infer_types();
  }

  Inputs inputs() const override { return {0, 1, 2, 3, -1, 4}; }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& args) const override {
    return std::make_shared<KeyAwareDeformAttn>(args);
  }
};

class MSDeformAttn : public Attention {
 public:
  OPENVINO_OP("MSDeformAttn", "mmlite", Attention);

  MSDeformAttn() = default;
  explicit MSDeformAttn(const ov::OutputVector& arguments) : Attention(arguments) {
    constructor_validate_and_infer_types();
  }

  Inputs inputs() const override { return {-1, 0, 1, 2, 3, -1}; }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& args) const override {
    return std::make_shared<MSDeformAttn>(args);
  }
};

std::vector<ov::Extension::Ptr> extensions() {
  set_gomp_parallel(run_on_runtime);
  return {
      std::make_shared<ov::OpExtension<KeyAwareDeformAttn>>(),
      std::make_shared<ov::OpExtension<MSDeformAttn>>(),
      std::make_shared<ov::frontend::onnx::OpExtension<KeyAwareDeformAttn>>("KeyAwareDeformAttn",
                                                                            kDomain),
      std::make_shared<ov::frontend::onnx::OpExtension<MSDeformAttn>>("MSDeformAttn", kDomain),
  };
}

}  // namespace
}  // namespace mmlite

OPENVINO_CREATE_EXTENSIONS(mmlite::extensions());
