// What every operator shares: errors that name the node, tensors, scratch memory, ONNX Runtime's
// threads, and the callbacks. Exceptions never leave a callback.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "matmul.h"
#include "ort_abi.h"

namespace qgraph {

using Dims = std::vector<int64_t>;

std::string to_text(const Dims& dims);

// Throws what a status says, and releases it.
void check(const ort::OrtApi& api, ort::OrtStatus* status);

struct Tensor {
  const ort::OrtValue* value;
  ort::OrtElementType type;
  Dims dims;
  const void* data;

  int64_t size() const;
  int64_t nbytes() const;
};

// At creation: attributes and constants of a node.
class NodeInfo {
 public:
  NodeInfo(const ort::OrtApi& api, const ort::OrtKernelInfo* info, const char* op);

  int64_t attribute(const char* name, int64_t otherwise) const;
  int64_t attribute(const char* name) const;  // throws where it is absent
  // False where the input is not constant.
  bool constant(size_t index, Tensor* found) const;
  const std::string& where() const { return where_; }  // MatMulInt4 'name'

 private:
  const ort::OrtApi& api_;
  const ort::OrtKernelInfo* info_;
  std::string where_;
};

// One run of a node.
class Run {
 public:
  Run(const ort::OrtApi& api, ort::OrtKernelContext* context) : api_(api), context_(context) {}

  Tensor input(size_t index) const;
  void* output(const Dims& dims) const;
  const ort::OrtApi& api() const { return api_; }
  ort::OrtKernelContext* context() const { return context_; }

 private:
  const ort::OrtApi& api_;
  ort::OrtKernelContext* context_;
};

// Memory aligned to 64 bytes, for the length of a run: the object's own where little is needed, as
// with one row of activations, and otherwise from the runtime's allocator, which takes a few calls.
class ScratchMemory {
 public:
  static constexpr int64_t kOwn = 12 << 10;

  ScratchMemory(const Run& run, int64_t nbytes);
  ~ScratchMemory();
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;
  void* get() const { return aligned_; }

 private:
  const ort::OrtApi& api_;
  ort::OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
  void* aligned_ = nullptr;
  alignas(64) uint8_t own_[kOwn];
};

// The session's own threads; the library starts none.
class RuntimeThreads : public Executor {
 public:
  explicit RuntimeThreads(const Run& run) : run_(run) {}
  void run(void (*task)(void*, size_t), size_t count, void* context) override;

 private:
  const Run& run_;
};

// The output is of the first input's type and shape, with the last dimension from attribute `name`.
void infer_last_dimension(const ort::OrtApi& api, ort::OrtShapeInferContext* context,
                          const char* name);

// The output is float, of the first input's shape and a last dimension from attribute `name`.
void infer_more_dimensions(const ort::OrtApi& api, ort::OrtShapeInferContext* context,
                           const char* name);

// The output is as the first input.
void infer_same_shape(const ort::OrtApi& api, ort::OrtShapeInferContext* context);

// The callbacks of an operator. Node: Node(const NodeInfo&), void run(const Run&) const, and
// static kName, kInputs (element types; kUndefined takes any) and infer(api, context). The output
// is of type `kType`; so is the first input where kInputs says float. The runtime chooses among the
// operators of one name by these types.
template <typename Node, ort::OrtElementType kType = ort::kFloat>
struct Op : ort::OrtCustomOp {
  // A kernel keeps the table of the runtime that made it.
  struct Kernel {
    const ort::OrtApi& api;
    Node node;
  };

  Op() : ort::OrtCustomOp{} {
    using ort::OrtCustomOp;
    version = ort::kApiVersion;
    GetName = [](const OrtCustomOp*) { return Node::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* {
      return "CPUExecutionProvider";
    };
    GetInputType = [](const OrtCustomOp*, size_t i) {
      return i == 0 && Node::kInputs[0] == ort::kFloat ? kType : Node::kInputs[i];
    };
    GetInputTypeCount = [](const OrtCustomOp*) {
      return sizeof(Node::kInputs) / sizeof(Node::kInputs[0]);
    };
    GetOutputType = [](const OrtCustomOp*, size_t) { return kType; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ort::kDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = create;
    KernelComputeV2 = compute;
    InferOutputShapeFn = infer;
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
  }

  static ort::OrtStatus* create(const ort::OrtCustomOp*, const ort::OrtApi* api,
                                const ort::OrtKernelInfo* info, void** kernel) {
    try {
      *kernel = new Kernel{*api, Node(NodeInfo(*api, info, Node::kName))};
      return nullptr;
    } catch (const std::exception& e) {
      return api->CreateStatus()(ort::kInvalidArgument, e.what());
    }
  }

  static ort::OrtStatus* compute(void* kernel, ort::OrtKernelContext* context) {
    const Kernel& k = *static_cast<const Kernel*>(kernel);
    try {
      k.node.run(Run(k.api, context));
      return nullptr;
    } catch (const std::exception& e) {
      return k.api.CreateStatus()(ort::kInvalidArgument, e.what());
    }
  }

  // The runtime passes no table here and ignores the status.
  static ort::OrtStatus* infer(const ort::OrtCustomOp*, ort::OrtShapeInferContext* context) {
    try {
      Node::infer(*shape_api, context);
    } catch (const std::exception&) {
      // The shape stays unknown; creation or the first run will say what is wrong.
    }
    return nullptr;
  }

  static inline const ort::OrtApi* shape_api = nullptr;
};

// The operators of this library, ready for a runtime's table.
std::vector<const ort::OrtCustomOp*> matmul_ops(const ort::OrtApi* api);
std::vector<const ort::OrtCustomOp*> gather_ops(const ort::OrtApi* api);
std::vector<const ort::OrtCustomOp*> hadamard_ops(const ort::OrtApi* api);
std::vector<const ort::OrtCustomOp*> observe_ops(const ort::OrtApi* api);

}  // namespace qgraph
