#include "ort_op.h"

#include <cstdlib>

namespace qgraph {
namespace {

constexpr int64_t kAlignment = 64;

int64_t element_bytes(ort::OrtElementType type) {
  switch (type) {
    case ort::kUint8:
    case ort::kInt8: return 1;
    case ort::kFloat16: return 2;
    case ort::kFloat:
    case ort::kInt32: return 4;
    case ort::kInt64: return 8;
    default: return 0;
  }
}

// Type and shape, released at the end of the scope.
class TypeAndShape {
 public:
  TypeAndShape(const ort::OrtApi& api, ort::OrtTensorTypeAndShapeInfo* info)
      : api_(api), info_(info) {}
  ~TypeAndShape() { api_.ReleaseTensorTypeAndShapeInfo()(info_); }
  TypeAndShape(const TypeAndShape&) = delete;
  TypeAndShape& operator=(const TypeAndShape&) = delete;

  Dims dims() const {
    size_t rank = 0;
    check(api_, api_.GetDimensionsCount()(info_, &rank));
    Dims found(rank);
    check(api_, api_.GetDimensions()(info_, found.data(), rank));
    return found;
  }

 private:
  const ort::OrtApi& api_;
  ort::OrtTensorTypeAndShapeInfo* info_;
};

Tensor describe(const ort::OrtApi& api, const ort::OrtValue* value) {
  ort::OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, api.GetTensorTypeAndShape()(value, &info));
  const TypeAndShape held(api, info);
  Tensor tensor{value, ort::kUndefined, held.dims(), nullptr};
  check(api, api.GetTensorElementType()(info, &tensor.type));
  void* data = nullptr;
  // There is no slot for reading only; nothing is written.
  check(api, api.GetTensorMutableData()(const_cast<ort::OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

}  // namespace

std::string to_text(const Dims& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

void check(const ort::OrtApi& api, ort::OrtStatus* status) {
  if (status == nullptr) return;
  const std::string text = api.GetErrorMessage()(status);
  api.ReleaseStatus()(status);
  throw std::runtime_error(text);
}

int64_t Tensor::size() const {
  int64_t product = 1;
  for (const int64_t d : dims) product *= d;
  return product;
}

int64_t Tensor::nbytes() const { return size() * element_bytes(type); }

NodeInfo::NodeInfo(const ort::OrtApi& api, const ort::OrtKernelInfo* info, const char* op)
    : api_(api), info_(info) {
  size_t length = 0;
  // The first call only asks for the length; its status may say that there was no room.
  ort::OrtStatus* status = api.KernelInfo_GetNodeName()(info, nullptr, &length);
  if (status != nullptr) api.ReleaseStatus()(status);
  std::string name(length, '\0');
  if (length > 0) check(api, api.KernelInfo_GetNodeName()(info, name.data(), &length));
  while (!name.empty() && name.back() == '\0') name.pop_back();
  where_ = std::string(op) + " '" + name + "'";
}

int64_t NodeInfo::attribute(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  ort::OrtStatus* status = api_.KernelInfoGetAttribute_int64()(info_, name, &value);
  if (status == nullptr) return value;
  api_.ReleaseStatus()(status);
  return otherwise;
}

int64_t NodeInfo::attribute(const char* name) const {
  int64_t value = 0;
  ort::OrtStatus* status = api_.KernelInfoGetAttribute_int64()(info_, name, &value);
  if (status == nullptr) return value;
  api_.ReleaseStatus()(status);
  throw std::invalid_argument(where_ + ": needs the integer attribute " + name);
}

bool NodeInfo::constant(size_t index, Tensor* found) const {
  int is_constant = 0;
  const ort::OrtValue* value = nullptr;
  check(api_, api_.KernelInfoGetConstantInput_tensor()(info_, index, &is_constant, &value));
  if (!is_constant || value == nullptr) return false;
  *found = describe(api_, value);
  return true;
}

Tensor Run::input(size_t index) const {
  const ort::OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetInput()(context_, index, &value));
  if (value == nullptr) throw std::runtime_error("input " + std::to_string(index) + " is absent");
  return describe(api_, value);
}

void* Run::output(const Dims& dims) const {
  ort::OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetOutput()(context_, 0, dims.data(), dims.size(), &value));
  void* data = nullptr;
  check(api_, api_.GetTensorMutableData()(value, &data));
  return data;
}

ScratchMemory::ScratchMemory(const Run& run, int64_t nbytes) : api_(run.api()) {
  if (nbytes <= kOwn) {
    aligned_ = own_;
    return;
  }
  ort::OrtMemoryInfo* info = nullptr;
  check(api_, api_.CreateCpuMemoryInfo()(ort::kDeviceAllocator, ort::kDefault, &info));
  ort::OrtStatus* status = api_.KernelContext_GetAllocator()(run.context(), info, &allocator_);
  api_.ReleaseMemoryInfo()(info);
  check(api_, status);
  status = api_.AllocatorAlloc()(allocator_, static_cast<size_t>(nbytes + kAlignment), &memory_);
  if (status != nullptr || memory_ == nullptr) {
    api_.ReleaseAllocator()(allocator_);
    check(api_, status);
    throw std::runtime_error("no memory for " + std::to_string(nbytes) + " bytes");
  }
  const auto address = reinterpret_cast<uintptr_t>(memory_);
  aligned_ = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

ScratchMemory::~ScratchMemory() {
  if (aligned_ == own_) return;
  ort::OrtStatus* status = api_.AllocatorFree()(allocator_, memory_);
  if (status != nullptr) api_.ReleaseStatus()(status);
  api_.ReleaseAllocator()(allocator_);
}

void RuntimeThreads::run(void (*task)(void*, size_t), size_t count, void* context) {
  check(run_.api(),
        run_.api().KernelContext_ParallelFor()(run_.context(), task, count, 0, context));
}

namespace {

// The first input's shape; its last `replaced` dimensions become one, from attribute `name`.
void infer_with_attribute(const ort::OrtApi& api, ort::OrtShapeInferContext* context,
                          const char* name, size_t replaced, bool keeps_type) {
  // Owned by the context.
  ort::OrtTensorTypeAndShapeInfo* input = nullptr;
  check(api, api.ShapeInferContext_GetInputTypeShape()(context, 0, &input));
  size_t rank = 0;
  check(api, api.GetDimensionsCount()(input, &rank));
  if (rank == 0) return;  // a scalar, or unknown
  ort::OrtElementType type = ort::kFloat;
  if (keeps_type) check(api, api.GetTensorElementType()(input, &type));
  const ort::OrtOpAttr* attribute = nullptr;
  check(api, api.ShapeInferContext_GetAttribute()(context, name, &attribute));
  int64_t last = 0;
  size_t length = 0;
  check(api, api.ReadOpAttr()(attribute, ort::kAttributeInt, &last, sizeof last, &length));
  Dims dims(rank);
  std::vector<const char*> symbols(rank);
  check(api, api.GetDimensions()(input, dims.data(), rank));
  check(api, api.GetSymbolicDimensions()(input, symbols.data(), rank));
  dims.resize(rank - replaced + 1);
  symbols.resize(rank - replaced + 1);
  dims.back() = last;
  symbols.back() = "";
  for (size_t i = 0; i + 1 < dims.size(); ++i) {
    // The runtime would take -1 for a size. An unknown dimension without a name cannot be said.
    if (dims[i] < 0 && (symbols[i] == nullptr || *symbols[i] == '\0')) return;
  }
  ort::OrtTensorTypeAndShapeInfo* made = nullptr;
  check(api, api.CreateTensorTypeAndShapeInfo()(&made));
  const TypeAndShape output(api, made);
  check(api, api.SetTensorElementType()(made, type));
  check(api, api.SetDimensions()(made, dims.data(), dims.size()));
  check(api, api.SetSymbolicDimensions()(made, symbols.data(), symbols.size()));
  check(api, api.ShapeInferContext_SetOutputTypeShape()(context, 0, made));
}

}  // namespace

void infer_last_dimension(const ort::OrtApi& api, ort::OrtShapeInferContext* context,
                          const char* name) {
  infer_with_attribute(api, context, name, 1, true);
}

void infer_more_dimensions(const ort::OrtApi& api, ort::OrtShapeInferContext* context,
                           const char* name) {
  infer_with_attribute(api, context, name, 0, false);
}

void infer_same_shape(const ort::OrtApi& api, ort::OrtShapeInferContext* context) {
  ort::OrtTensorTypeAndShapeInfo* input = nullptr;  // owned by the context
  check(api, api.ShapeInferContext_GetInputTypeShape()(context, 0, &input));
  size_t rank = 0;
  check(api, api.GetDimensionsCount()(input, &rank));
  Dims dims(rank);
  std::vector<const char*> symbols(rank);
  check(api, api.GetDimensions()(input, dims.data(), rank));
  check(api, api.GetSymbolicDimensions()(input, symbols.data(), rank));
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] < 0 && (symbols[i] == nullptr || *symbols[i] == '\0')) return;
  }
  if (rank > 0) check(api, api.ShapeInferContext_SetOutputTypeShape()(context, 0, input));
}

}  // namespace qgraph
