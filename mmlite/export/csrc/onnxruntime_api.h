// The part of ONNX Runtime's stable C interface that a library of operators needs. The runtime's
// Python wheel has no headers; these declarations are our own, so that the library builds without.
//
// The interface is a table of functions that only ever grows at its end, and a structure of
// callbacks whose `version` says how much of it is there. Both were last extended in what is used
// here by version 17 (ONNX Runtime 1.17). Where a build has onnxruntime_c_api.h, onnxruntime.cpp
// compares the two.
#ifndef MMLITE_ONNXRUNTIME_API_H
#define MMLITE_ONNXRUNTIME_API_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && !defined(_WIN64)
#define MMLITE_ORT_CALL __stdcall
#else
#define MMLITE_ORT_CALL
#endif

namespace mmlite {
namespace ort {

constexpr uint32_t kApiVersion = 17;
constexpr char kOldestRuntime[] = "1.17";

// What only the runtime knows the inside of.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;

struct Api;

struct ApiBase {
  const Api*(MMLITE_ORT_CALL* GetApi)(uint32_t version);
  const char*(MMLITE_ORT_CALL* GetVersionString)();
};

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType { kFloat = 1, kInt64 = 7 };
enum Characteristic { kRequired = 0, kOptional = 1 };

// Places in the table of functions.
enum Function {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelContextGetInputCount = 88,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelContextParallelFor = 274,
};

// The table; a call is api->call<Status*(...)>(kPlace)(...).
struct Api {
  void(MMLITE_ORT_CALL* functions[kKernelContextParallelFor + 1])();

  template <class Signature>
  Signature* call(Function place) const {
    return reinterpret_cast<Signature*>(functions[place]);
  }
};

// Callbacks of one operator, in the runtime's order.
struct CustomOp {
  uint32_t version;
  void*(MMLITE_ORT_CALL* CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(MMLITE_ORT_CALL* GetName)(const CustomOp*);
  const char*(MMLITE_ORT_CALL* GetExecutionProviderType)(const CustomOp*);
  ElementType(MMLITE_ORT_CALL* GetInputType)(const CustomOp*, size_t index);
  size_t(MMLITE_ORT_CALL* GetInputTypeCount)(const CustomOp*);
  ElementType(MMLITE_ORT_CALL* GetOutputType)(const CustomOp*, size_t index);
  size_t(MMLITE_ORT_CALL* GetOutputTypeCount)(const CustomOp*);
  void(MMLITE_ORT_CALL* KernelCompute)(void* kernel, KernelContext*);
  void(MMLITE_ORT_CALL* KernelDestroy)(void* kernel);
  Characteristic(MMLITE_ORT_CALL* GetInputCharacteristic)(const CustomOp*, size_t index);
  Characteristic(MMLITE_ORT_CALL* GetOutputCharacteristic)(const CustomOp*, size_t index);
  int(MMLITE_ORT_CALL* GetInputMemoryType)(const CustomOp*, size_t index);
  int(MMLITE_ORT_CALL* GetVariadicInputMinArity)(const CustomOp*);
  int(MMLITE_ORT_CALL* GetVariadicInputHomogeneity)(const CustomOp*);
  int(MMLITE_ORT_CALL* GetVariadicOutputMinArity)(const CustomOp*);
  int(MMLITE_ORT_CALL* GetVariadicOutputHomogeneity)(const CustomOp*);
  Status*(MMLITE_ORT_CALL* CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status*(MMLITE_ORT_CALL* KernelComputeV2)(void* kernel, KernelContext*);
  Status*(MMLITE_ORT_CALL* InferOutputShapeFn)(const CustomOp*, void* context);
  int(MMLITE_ORT_CALL* GetStartVersion)(const CustomOp*);
  int(MMLITE_ORT_CALL* GetEndVersion)(const CustomOp*);
};

}  // namespace ort
}  // namespace mmlite

#endif
