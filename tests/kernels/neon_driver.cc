// Runs requests on every instruction set of this CPU, for tests/kernels/test_neon.py: there is no
// Python for the emulated CPU. Usage: neon_driver requests responses
//
// A request is int64 numbers, each buffer behind its size (-1: a null pointer):
//   kind, number of arguments, arguments, number of inputs, inputs, number of outputs, their sizes
// and the response is the outputs' bytes, for one instruction set after the other. Standard output
// gets the instruction set in use, then each with the rows that its kernels put side by side.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/kernel.h"
#include "qgraph_ops.h"

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "neon_driver: %s\n", what);
  std::exit(2);
}

// Memory that ends where the process may not read on.
class Fenced {
 public:
  explicit Fenced(int64_t nbytes) : nbytes_(nbytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    body_ = (nbytes + page - 1) / page * page;
    size_ = body_ + page;
    void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(p != MAP_FAILED, "no memory");
    base_ = static_cast<uint8_t*>(p);
    require(mprotect(base_ + body_, page, PROT_NONE) == 0, "no fence");
  }
  ~Fenced() { munmap(base_, size_); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  uint8_t* data() const { return base_ + body_ - nbytes_; }
  int64_t nbytes() const { return nbytes_; }

 private:
  int64_t nbytes_, body_, size_;
  uint8_t* base_;
};

using Buffers = std::vector<std::unique_ptr<Fenced>>;

struct Request {
  int64_t kind;
  std::vector<int64_t> arguments;
  Buffers inputs;

  template <typename T>
  const T* input(size_t i) const {
    return inputs.at(i) ? reinterpret_cast<const T*>(inputs[i]->data()) : nullptr;
  }
};

template <typename T>
T* at(const Buffers& buffers, size_t i) {
  return reinterpret_cast<T*>(buffers.at(i)->data());
}

void matmul(const Request& r, const qgraph::Kernels& kernels, const Buffers& outputs) {
  const auto& a = r.arguments;
  QgMatMul problem{};
  problem.isa = static_cast<int32_t>(kernels.isa);
  problem.format = static_cast<int32_t>(a.at(0));
  problem.m = a.at(1), problem.n = a.at(2), problem.k = a.at(3);
  problem.group = a.at(4);
  problem.activation_bits = a.at(5), problem.activation_block = a.at(6);
  problem.scales_are_float16 = static_cast<int32_t>(a.at(7));
  problem.task_order = static_cast<int32_t>(a.at(8));
  problem.codes = r.input<uint8_t>(0);
  problem.scales = r.input<void>(1);
  problem.zero_points = r.input<uint8_t>(2);
  problem.x = r.input<float>(3);
  problem.bias = r.input<float>(4);
  problem.y = at<float>(outputs, 0);
  const int64_t nbytes = qg_matmul_scratch(&problem);
  require(nbytes >= 0, "the kernels do not take these sizes");
  const Fenced scratch((nbytes + 3) / 4 * 4);
  problem.scratch = scratch.data();
  require(qg_matmul(&problem) == QG_OK, "qg_matmul failed");
}

void quantize(const Request& r, const qgraph::Kernels& kernels, const Buffers& outputs) {
  const auto& a = r.arguments;
  qgraph::QuantizeTask task{};
  task.x = r.input<float>(0);
  task.m = a.at(0), task.k = a.at(1), task.padded = a.at(2);
  task.block = a.at(3), task.unit = a.at(4);
  task.levels = static_cast<int>(a.at(5));
  task.codes = at<int8_t>(outputs, 0);
  task.scales = at<float>(outputs, 1);
  task.negative_sums = at<int32_t>(outputs, 2);
  task.last = kernels.blocks.count(task.m);
  kernels.quantize(task);
}

void hadamard(const Request& r, const qgraph::Kernels& kernels, const Buffers& outputs) {
  const auto& a = r.arguments;
  qgraph::HadamardTask task{};
  task.x = r.input<float>(0);
  task.y = at<float>(outputs, 0);
  task.factor = r.input<float>(1);
  task.factor_size = a.at(0), task.block = a.at(1), task.last = a.at(2);
  kernels.hadamard(task);
}

void search(const Request& r, const qgraph::Kernels& kernels, const Buffers& outputs) {
  const auto& a = r.arguments;
  const int32_t status =
      qg_rtn_search(static_cast<int32_t>(kernels.isa), r.input<float>(0), a.at(0), a.at(1), a.at(2),
                    static_cast<int32_t>(a.at(3)), static_cast<int32_t>(a.at(4)),
                    static_cast<int32_t>(a.at(5)), r.input<float>(1), at<uint8_t>(outputs, 0),
                    at<float>(outputs, 1), at<uint8_t>(outputs, 2), at<double>(outputs, 3));
  require(status == QG_OK, "qg_rtn_search failed");
}

using Operation = void (*)(const Request&, const qgraph::Kernels&, const Buffers&);
constexpr Operation kOperations[] = {matmul, quantize, hadamard, search};

class File {
 public:
  File(const char* path, const char* mode) : file_(std::fopen(path, mode)) {
    require(file_ != nullptr, path);
  }
  ~File() { require(std::fclose(file_) == 0, "a file cannot be closed"); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool read(int64_t* value) { return std::fread(value, sizeof *value, 1, file_) == 1; }
  int64_t number() {
    int64_t value;
    require(read(&value), "a request is cut short");
    return value;
  }
  std::unique_ptr<Fenced> buffer() {
    const int64_t nbytes = number();
    if (nbytes < 0) return nullptr;
    auto result = std::make_unique<Fenced>(nbytes);
    const size_t count = static_cast<size_t>(nbytes);
    require(std::fread(result->data(), 1, count, file_) == count, "a buffer is cut short");
    return result;
  }
  void write(const Fenced& buffer) {
    const size_t count = static_cast<size_t>(buffer.nbytes());
    require(std::fwrite(buffer.data(), 1, count, file_) == count, "the disk is full");
  }

 private:
  std::FILE* file_;
};

}  // namespace

int main(int argc, char** argv) {
  require(argc == 3, "expected two paths: requests, responses");
  require(qg_isa_problem() == nullptr, "QGRAPH_ISA cannot be obeyed");
  std::vector<const qgraph::Kernels*> all;
  std::printf("%s", qg_isa_name(qg_cpu_isa()));
  for (int32_t isa = 0; qg_isa_name(isa) != nullptr; ++isa) {
    if (!qg_isa_is_supported(isa)) continue;
    all.push_back(qgraph::kernels_for(static_cast<qgraph::Isa>(isa)));
    require(all.back() != nullptr, "an instruction set without kernels");
    require(std::strcmp(all.back()->name, qg_isa_name(isa)) == 0, "kernels of another name");
    std::printf(" %s %d", qg_isa_name(isa), all.back()->blocks.rows);
  }
  std::printf("\n");

  File requests(argv[1], "rb"), responses(argv[2], "wb");
  for (Request r; requests.read(&r.kind); r = Request()) {
    require(r.kind >= 0 && r.kind < 4, "a request of no known kind");
    r.arguments.resize(static_cast<size_t>(requests.number()));
    for (int64_t& argument : r.arguments) argument = requests.number();
    r.inputs.resize(static_cast<size_t>(requests.number()));
    for (auto& input : r.inputs) input = requests.buffer();
    std::vector<int64_t> sizes(static_cast<size_t>(requests.number()));
    for (int64_t& size : sizes) size = requests.number();
    for (const qgraph::Kernels* kernels : all) {
      Buffers outputs;
      for (int64_t size : sizes) outputs.push_back(std::make_unique<Fenced>(size));
      kOperations[r.kind](r, *kernels, outputs);
      for (const auto& output : outputs) responses.write(*output);
    }
  }
  return 0;
}
