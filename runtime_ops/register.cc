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

using Ops = std::vector<const ort::OrtCustomOp*>;

ort::OrtCustomOpDomain* create_domain(const ort::OrtApi& api, const char* name, const Ops& ops) {
  ort::OrtCustomOpDomain* domain = nullptr;
  check(api, api.CreateCustomOpDomain()(name, &domain));
  for (const ort::OrtCustomOp* op : ops) check(api, api.CustomOpDomain_Add()(domain, op));
  return domain;
}

ort::OrtCustomOpDomain* model_domain(const ort::OrtApi& api) {
  Ops ops = matmul_ops(&api);
  for (const ort::OrtCustomOp* op : gather_ops(&api)) ops.push_back(op);
  for (const ort::OrtCustomOp* op : hadamard_ops(&api)) ops.push_back(op);
  return create_domain(api, "ai.qgraph", ops);
}

// Operators that no saved model holds.
ort::OrtCustomOpDomain* calibration_domain(const ort::OrtApi& api) {
  return create_domain(api, "ai.qgraph.calibration", observe_ops(&api));
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
    // Sessions share the domains; the runtime does not own them, and they live as long as the
    // process.
    static ort::OrtCustomOpDomain* const model = model_domain(*api);
    static ort::OrtCustomOpDomain* const calibration = calibration_domain(*api);
    check(*api, api->AddCustomOpDomain()(options, model));
    return api->AddCustomOpDomain()(options, calibration);
  } catch (const std::exception& e) {
    return api == nullptr ? nullptr : api->CreateStatus()(ort::kFail, e.what());
  }
}
