// The part of ONNX Runtime's stable C ABI that our operators use, declared here by position.
//
// Why not the official header: a wheel must build from a source checkout alone, and one library
// must run on every ONNX Runtime from 1.17 on. The ABI makes that possible: OrtApi is a table of
// function pointers that only ever grows at its end, so a slot keeps its number for ever, and
// OrtCustomOp starts with the version that tells the runtime how many of its fields to read.
// tests/contract/test_ort_abi.py checks the numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qgraph::ort {

// 17 has everything we need (shape inference, ParallelFor). Never ask for the runtime's newest: a
// later runtime would then read fields past the end of our OrtCustomOp.
constexpr uint32_t kApiVersion = 17;

// Opaque to us.
struct OrtAllocator;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtMemoryInfo;
struct OrtOpAttr;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

enum OrtErrorCode : int {
  kOk = 0,
  kFail = 1,
  kInvalidArgument = 2,
  kRuntimeException = 6,
  kNotImplemented = 9,
};

// 23 and up are newer than version 17 and differ from onnx.TensorProto; we do not use them.
enum OrtElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
};

enum OrtCharacteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum OrtMemoryType : int { kDefault = 0 };
enum OrtAttributeType : int { kAttributeInt = 1, kAttributeFloat = 3 };
enum OrtAllocatorType : int { kDeviceAllocator = 0 };

// One operator, as the runtime sees it. Fields in the runtime's order; the number on the right is
// the `version` from which it reads them. Derive from it and keep state behind it.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const struct OrtApi*, const OrtKernelInfo*);  // 1
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  OrtElementType (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  OrtElementType (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);  // 8
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtMemoryType (*GetInputMemoryType)(const OrtCustomOp*, size_t index);  // 13
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);                    // 14
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  // With these two set, CreateKernel and KernelCompute above are not called, and errors have texts.
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const struct OrtApi*, const OrtKernelInfo*,
                               void** kernel);  // 16
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  // The runtime ignores the returned status and, up to 1.23, crashes if the node has an input with
  // an empty name: drop trailing optional inputs instead of naming them "".
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);  // 17
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};
static_assert(sizeof(OrtCustomOp) == 22 * sizeof(void*), "fields of OrtCustomOp at version 17");

// A position in the function table and the signature found there. A status of null means success.
// Left out on purpose: KernelContext_GetScratchBuffer (277) crashes on CPU before 1.23; use an
// allocator.
#define QG_ORT_FUNCTIONS(X)                                                                      \
  X(0, CreateStatus, OrtStatus*, (OrtErrorCode, const char*))                                    \
  X(2, GetErrorMessage, const char*, (const OrtStatus*))                                         \
  X(26, CreateCustomOpDomain, OrtStatus*, (const char*, OrtCustomOpDomain**))                    \
  X(27, CustomOpDomain_Add, OrtStatus*, (OrtCustomOpDomain*, const OrtCustomOp*))                \
  X(28, AddCustomOpDomain, OrtStatus*, (OrtSessionOptions*, OrtCustomOpDomain*))                 \
  X(51, GetTensorMutableData, OrtStatus*, (OrtValue*, void**))                                   \
  X(57, CreateTensorTypeAndShapeInfo, OrtStatus*, (OrtTensorTypeAndShapeInfo**))                 \
  X(58, SetTensorElementType, OrtStatus*, (OrtTensorTypeAndShapeInfo*, OrtElementType))          \
  X(59, SetDimensions, OrtStatus*, (OrtTensorTypeAndShapeInfo*, const int64_t*, size_t))         \
  X(60, GetTensorElementType, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, OrtElementType*))   \
  X(61, GetDimensionsCount, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t*))             \
  X(62, GetDimensions, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int64_t*, size_t))         \
  X(63, GetSymbolicDimensions, OrtStatus*,                                                       \
    (const OrtTensorTypeAndShapeInfo*, const char**, size_t))                                    \
  X(65, GetTensorTypeAndShape, OrtStatus*, (const OrtValue*, OrtTensorTypeAndShapeInfo**))       \
  X(69, CreateCpuMemoryInfo, OrtStatus*, (OrtAllocatorType, OrtMemoryType, OrtMemoryInfo**))     \
  X(75, AllocatorAlloc, OrtStatus*, (OrtAllocator*, size_t, void**))                             \
  X(76, AllocatorFree, OrtStatus*, (OrtAllocator*, void*))                                       \
  X(85, KernelInfoGetAttribute_float, OrtStatus*, (const OrtKernelInfo*, const char*, float*))   \
  X(86, KernelInfoGetAttribute_int64, OrtStatus*, (const OrtKernelInfo*, const char*, int64_t*)) \
  X(88, KernelContext_GetInputCount, OrtStatus*, (const OrtKernelContext*, size_t*))             \
  X(89, KernelContext_GetOutputCount, OrtStatus*, (const OrtKernelContext*, size_t*))            \
  X(90, KernelContext_GetInput, OrtStatus*, (const OrtKernelContext*, size_t, const OrtValue**)) \
  X(91, KernelContext_GetOutput, OrtStatus*,                                                     \
    (OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**))                             \
  X(93, ReleaseStatus, void, (OrtStatus*))                                                       \
  X(94, ReleaseMemoryInfo, void, (OrtMemoryInfo*))                                               \
  X(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo*))                       \
  X(132, ReleaseAllocator, void, (OrtAllocator*))                                                \
  X(230, KernelInfo_GetInputCount, OrtStatus*, (const OrtKernelInfo*, size_t*))                  \
  X(244, KernelInfo_GetNodeName, OrtStatus*, (const OrtKernelInfo*, char*, size_t*))             \
  X(249, KernelInfoGetConstantInput_tensor, OrtStatus*,                                          \
    (const OrtKernelInfo*, size_t, int*, const OrtValue**))                                      \
  X(253, KernelContext_GetAllocator, OrtStatus*,                                                 \
    (const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**))                             \
  X(267, ShapeInferContext_GetInputCount, OrtStatus*, (const OrtShapeInferContext*, size_t*))    \
  X(268, ShapeInferContext_GetInputTypeShape, OrtStatus*,                                        \
    (const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**))                          \
  X(269, ShapeInferContext_GetAttribute, OrtStatus*,                                             \
    (const OrtShapeInferContext*, const char*, const OrtOpAttr**))                               \
  X(270, ShapeInferContext_SetOutputTypeShape, OrtStatus*,                                       \
    (const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*))                     \
  X(271, SetSymbolicDimensions, OrtStatus*, (OrtTensorTypeAndShapeInfo*, const char**, size_t))  \
  X(272, ReadOpAttr, OrtStatus*, (const OrtOpAttr*, OrtAttributeType, void*, size_t, size_t*))   \
  X(274, KernelContext_ParallelFor, OrtStatus*,                                                  \
    (const OrtKernelContext*, void (*)(void*, size_t), size_t total, size_t batches, void*))

// The runtime's function table. `api->CreateStatus()(code, text)` calls slot 0.
struct OrtApi {
  using Function = void (*)();

#define QG_ORT_ACCESSOR(slot, name, result, arguments)                                           \
  auto name() const {                                                                            \
    return reinterpret_cast<result(*) arguments>(reinterpret_cast<const Function*>(this)[slot]); \
  }
  QG_ORT_FUNCTIONS(QG_ORT_ACCESSOR)
#undef QG_ORT_ACCESSOR
};

// What RegisterCustomOps is given. GetApi returns null for a version newer than the runtime.
struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

}  // namespace qgraph::ort
