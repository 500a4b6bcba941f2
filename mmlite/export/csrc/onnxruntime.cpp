// The door to ONNX Runtime: a library for SessionOptions::RegisterCustomOpsLibrary (in Python
// register_custom_ops_library). It links to nothing: the runtime hands over its functions.
//
//   KeyAwareDeformAttn(query, value, spatial_shapes, sampling_locations, [key]) -> output
//   MSDeformAttn(value, spatial_shapes, sampling_locations, attention_weights) -> output
//
// float32 tensors, spatial_shapes int64, in the domain "mmlite"; layouts as in attention.h.
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "attention.h"
#include "onnxruntime_api.h"
#include "parallel.h"

#if defined(__has_include)
#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#define MMLITE_SAME_PLACE(name, place)                                      \
  static_assert(offsetof(OrtApi, name) == mmlite::ort::place * sizeof(void*), \
                #name " has another place in ONNX Runtime's table of functions")
MMLITE_SAME_PLACE(CreateStatus, kCreateStatus);
MMLITE_SAME_PLACE(CreateCustomOpDomain, kCreateCustomOpDomain);
MMLITE_SAME_PLACE(CustomOpDomain_Add, kCustomOpDomainAdd);
MMLITE_SAME_PLACE(AddCustomOpDomain, kAddCustomOpDomain);
MMLITE_SAME_PLACE(GetTensorMutableData, kGetTensorMutableData);
MMLITE_SAME_PLACE(GetDimensionsCount, kGetDimensionsCount);
MMLITE_SAME_PLACE(GetDimensions, kGetDimensions);
MMLITE_SAME_PLACE(GetTensorTypeAndShape, kGetTensorTypeAndShape);
MMLITE_SAME_PLACE(KernelContext_GetInputCount, kKernelContextGetInputCount);
MMLITE_SAME_PLACE(KernelContext_GetInput, kKernelContextGetInput);
MMLITE_SAME_PLACE(KernelContext_GetOutput, kKernelContextGetOutput);
MMLITE_SAME_PLACE(ReleaseStatus, kReleaseStatus);
MMLITE_SAME_PLACE(ReleaseTensorTypeAndShapeInfo, kReleaseTensorTypeAndShapeInfo);
MMLITE_SAME_PLACE(KernelContext_ParallelFor, kKernelContextParallelFor);
static_assert(offsetof(OrtCustomOp, GetEndVersion) ==
                  offsetof(mmlite::ort::CustomOp, GetEndVersion),
              "ONNX Runtime's OrtCustomOp has another layout");
#endif
#endif

#if defined(_WIN32)
#define MMLITE_EXPORT extern "C" __declspec(dllexport)
#else
#define MMLITE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace mmlite {
namespace {

using namespace ort;

const Api* api = nullptr;

// What the runtime refused.
struct Refused {
  Status* status;
};

void check(Status* status) {
  if (status) throw Refused{status};
}

Status* status_of(ErrorCode code, const std::string& sentence) {
  return api->call<Status*(ErrorCode, const char*)>(kCreateStatus)(code, sentence.c_str());
}

// ---------------------------------------------------------------- threads

// Those of the machine that this process may use. The runtime does not tell how many its pool has;
// a pool with fewer takes the shares one after the other.
int num_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count ? static_cast<int>(count) : 1;
}

// The call that this thread is in: the kernels' tasks run on the runtime's own threads.
thread_local KernelContext* current_context = nullptr;

struct Team {
  void (*body)(void*);
  void* data;
};

void MMLITE_ORT_CALL run_share(void* team, size_t) {
  static_cast<Team*>(team)->body(static_cast<Team*>(team)->data);
}

// Has the signature of OpenMP's entry point, in whose place it is.
void run_on_runtime(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team team{body, data};
  typedef Status*(ParallelFor)(const KernelContext*, void (*)(void*, size_t), size_t, size_t,
                               void*);
  Status* const status = api->call<ParallelFor>(kKernelContextParallelFor)(
      current_context, run_share, threads, threads, &team);
  if (!status) return;
  api->call<void(Status*)>(kReleaseStatus)(status);
  body(data);
}

// ---------------------------------------------------------------- tensors

Tensor tensor_of(const Value* value) {
  Tensor tensor;
  void* data = nullptr;
  check(api->call<Status*(const Value*, void**)>(kGetTensorMutableData)(value, &data));
  tensor.data = data;
  ShapeInfo* info = nullptr;
  check(api->call<Status*(const Value*, ShapeInfo**)>(kGetTensorTypeAndShape)(value, &info));
  size_t rank = 0;
  Status* status =
      api->call<Status*(const ShapeInfo*, size_t*)>(kGetDimensionsCount)(info, &rank);
  if (!status) {
    tensor.shape.resize(rank);
    status = api->call<Status*(const ShapeInfo*, int64_t*, size_t)>(kGetDimensions)(
        info, tensor.shape.data(), rank);
  }
  api->call<void(ShapeInfo*)>(kReleaseTensorTypeAndShapeInfo)(info);
  check(status);
  return tensor;
}

// An optional input that the node has not is an empty tensor.
Tensor input(const KernelContext* context, size_t index) {
  size_t count = 0;
  check(api->call<Status*(const KernelContext*, size_t*)>(kKernelContextGetInputCount)(context,
                                                                                        &count));
  const Value* value = nullptr;
  if (index < count) {
    check(api->call<Status*(const KernelContext*, size_t, const Value**)>(kKernelContextGetInput)(
        context, index, &value));
  }
  return value ? tensor_of(value) : Tensor();
}

void* output(KernelContext* context, const std::vector<int64_t>& shape) {
  Value* value = nullptr;
  check(api->call<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(
      kKernelContextGetOutput)(context, 0, shape.data(), shape.size(), &value));
  void* data = nullptr;
  check(api->call<Status*(Value*, void**)>(kGetTensorMutableData)(value, &data));
  return data;
}

// ---------------------------------------------------------------- operators

Call key_aware(const KernelContext* context) {
  Call call = {};
  call.query = input(context, 0);
  call.value = input(context, 1);
  call.spatial_shapes = input(context, 2);
  call.locations = input(context, 3);
  call.key = input(context, 4);
  call.op = call.key.data ? kKeyAware : kKeyAwareShared;
  return call;
}

Call standard(const KernelContext* context) {
  Call call = {};
  call.value = input(context, 0);
  call.spatial_shapes = input(context, 1);
  call.locations = input(context, 2);
  call.weights = input(context, 3);
  call.op = kStandard;
  return call;
}

template <Call (*kRead)(const KernelContext*)>
Status* MMLITE_ORT_CALL compute(void*, KernelContext* context) {
  try {
    Call call = kRead(context);
    call.dtype = kFloat32;
    void* const data = output(context, output_shape(call));
    current_context = context;
    run(call, data, num_threads());
    return nullptr;
  } catch (const Refused& refused) {
    return refused.status;
  } catch (const std::invalid_argument& error) {
    return status_of(kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return status_of(kFail, error.what());
  }
}

// An operator, with what the runtime asks about it. Nothing is kept between calls, so that its
// kernel is a pointer to anything.
struct Attention : CustomOp {
  Attention(const char* its_name, size_t its_inputs, size_t its_sizes, size_t its_required,
            Status*(MMLITE_ORT_CALL* its_compute)(void*, KernelContext*))
      : CustomOp(), name(its_name), inputs(its_inputs), sizes(its_sizes), required(its_required) {
    version = kApiVersion;
    CreateKernelV2 = [](const CustomOp* op, const Api*, const KernelInfo*, void** kernel) {
      *kernel = const_cast<CustomOp*>(op);
      return static_cast<Status*>(nullptr);
    };
    KernelComputeV2 = its_compute;
    KernelDestroy = [](void*) {};
    GetName = [](const CustomOp* op) { return self(op).name; };
    GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const CustomOp* op) { return self(op).inputs; };
    GetInputType = [](const CustomOp* op, size_t i) { return i == self(op).sizes ? kInt64 : kFloat; };
    GetInputCharacteristic = [](const CustomOp* op, size_t i) {
      return i < self(op).required ? kRequired : kOptional;
    };
    GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
    GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
    GetOutputType = [](const CustomOp*, size_t) { return kFloat; };
    GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
    GetStartVersion = [](const CustomOp*) { return kDomainVersion; };
    GetEndVersion = [](const CustomOp*) { return kDomainVersion; };
  }

  static const Attention& self(const CustomOp* op) { return *static_cast<const Attention*>(op); }

  const char* name;
  size_t inputs;
  size_t sizes;     // which input is spatial_shapes
  size_t required;  // inputs that a node must have
};

CustomOpDomain* make_domain() {
  static const Attention kda("KeyAwareDeformAttn", 5, 2, 4, compute<key_aware>);
  static const Attention msda("MSDeformAttn", 4, 1, 4, compute<standard>);
  CustomOpDomain* domain = nullptr;
  check(api->call<Status*(const char*, CustomOpDomain**)>(kCreateCustomOpDomain)(kDomain, &domain));
  for (const CustomOp* op : {static_cast<const CustomOp*>(&kda), static_cast<const CustomOp*>(&msda)}) {
    check(api->call<Status*(CustomOpDomain*, const CustomOp*)>(kCustomOpDomainAdd)(domain, op));
  }
  return domain;
}

Status* add_operators(SessionOptions* options, const ApiBase* base) {
  api = base->GetApi(kApiVersion);
  if (!api) {
    api = base->GetApi(1);
    return status_of(kFail, std::string("mmlite's operators need ONNX Runtime ") + kOldestRuntime +
                                " or later; this is " + base->GetVersionString());
  }
  set_gomp_parallel(run_on_runtime);
  try {
    // One for all sessions: it has to live as long as the last of them.
    static CustomOpDomain* const domain = make_domain();
    check(api->call<Status*(SessionOptions*, CustomOpDomain*)>(kAddCustomOpDomain)(options,
                                                                                   domain));
    return nullptr;
  } catch (const Refused& refused) {
    return refused.status;
  }
}

}  // namespace
}  // namespace mmlite

// The runtime calls this when the library is registered.
MMLITE_EXPORT mmlite::ort::Status* MMLITE_ORT_CALL
RegisterCustomOps(mmlite::ort::SessionOptions* options, const mmlite::ort::ApiBase* base) {
  return mmlite::add_operators(options, base);
}
