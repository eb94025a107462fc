// The entry point that ONNX Runtime calls: registers our operators in a session.
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "ort_abi.h"
#include "ort_op.h"
#include "qgraph_ops.h"

namespace qgraph {
namespace {

constexpr const char* kDomain = "ai.qgraph";

ort::OrtCustomOpDomain* create_domain(const ort::OrtApi& api) {
  ort::OrtCustomOpDomain* domain = nullptr;
  check(api, api.CreateCustomOpDomain()(kDomain, &domain));
  std::vector<const ort::OrtCustomOp*> ops = matmul_ops(&api);
  for (const ort::OrtCustomOp* op : gather_ops(&api)) ops.push_back(op);
  for (const ort::OrtCustomOp* op : hadamard_ops(&api)) ops.push_back(op);
  for (const ort::OrtCustomOp* op : ops) check(api, api.CustomOpDomain_Add()(domain, op));
  return domain;
}

ort::OrtStatus* too_old(const ort::OrtApiBase& base) {
  const ort::OrtApi* first = base.GetApi(1);
  if (first == nullptr) return nullptr;  // not an ONNX Runtime that we could talk to
  const std::string text = std::string("qgraph's operators need ONNX Runtime 1.") +
                           std::to_string(ort::kApiVersion) + " or newer; this is " +
                           base.GetVersionString() + ". Run: pip install -U onnxruntime";
  return first->CreateStatus()(ort::kNotImplemented, text.c_str());
}

}  // namespace
}  // namespace qgraph

QG_EXPORT qgraph::ort::OrtStatus* RegisterCustomOps(qgraph::ort::OrtSessionOptions* options,
                                                    const qgraph::ort::OrtApiBase* base) {
  using namespace qgraph;
  const ort::OrtApi* api = base->GetApi(ort::kApiVersion);
  try {
    if (api == nullptr) return too_old(*base);
    if (isa_problem() != nullptr) throw std::runtime_error(isa_problem());
    // Sessions share the domain; the runtime does not own it, and it lives as long as the process.
    static ort::OrtCustomOpDomain* const domain = create_domain(*api);
    return api->AddCustomOpDomain()(options, domain);
  } catch (const std::exception& e) {
    return api == nullptr ? nullptr : api->CreateStatus()(ort::kFail, e.what());
  }
}
