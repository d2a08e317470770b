// A .pte of ours in a process without Python and torch, as an app of a phone has it: memory, load time and speed, as one line of JSON.
// Built and called by executorch_native.py.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

using executorch::aten::Tensor;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::BackendOptions;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::LoadBackendOptionsMap;

namespace {

// llama::update_cache_with_indices.out of the library needs torch: the wheel has it only for export.
Tensor& update_cache_with_indices(
    KernelRuntimeContext&, const Tensor& value, Tensor& cache, int64_t, const Tensor& indices, Tensor& out) {
  const auto heads = value.size(0), tokens = value.size(1), slots = cache.size(1);
  const size_t row = value.size(2) * value.size(3) * sizeof(float);
  const auto* from = static_cast<const char*>(value.const_data_ptr());
  auto* to = static_cast<char*>(cache.mutable_data_ptr());
  const auto* slot = indices.const_data_ptr<int64_t>();
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t token = 0; token < tokens; ++token)
      std::memcpy(to + (head * slots + slot[head * tokens + token]) * row, from + (head * tokens + token) * row, row);
  return out;
}

EXECUTORCH_LIBRARY(llama, "update_cache_with_indices.out", update_cache_with_indices);

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double mib(const std::string& name) {  // of /proc/self/status
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind(name + ":", 0) == 0) return std::atol(line.c_str() + name.size() + 1) / 1024.0;
  return 0;
}

int64_t largest(const Tensor& logits) {
  const auto* values = logits.const_data_ptr<float>();
  int64_t best = 0;
  for (int64_t index = 1; index < logits.numel(); ++index)
    if (values[index] > values[best]) best = index;
  return best;
}

void check(Error error, const char* what) {
  if (error == Error::Ok) return;
  std::fprintf(stderr, "%s failed: 0x%x\n", what, static_cast<unsigned>(error));
  std::exit(1);
}

}  // namespace

int main(int count, char** words) {
  if (count != 6) {
    std::fprintf(stderr, "MODEL.pte CHUNK DECODED PACKED_WEIGHTS_OR_- TOKEN,TOKEN,...\n");
    return 2;
  }
  const int chunk = std::atoi(words[2]), decoded = std::atoi(words[3]);
  const std::string packed = words[4];
  std::vector<int64_t> ids;
  for (char* word = std::strtok(words[5], ","); word != nullptr; word = std::strtok(nullptr, ",")) ids.push_back(std::atoll(word));

  const double started = seconds();
  Module module(words[1], Module::LoadMode::Mmap);
  BackendOptions<2> options;
  LoadBackendOptionsMap map;
  if (packed != "-") {  // pages of a file instead of memory of its own, and packed once for all starts
    char path[executorch::runtime::kMaxOptionValueLength] = {};
    packed.copy(path, sizeof(path) - 1);
    check(options.set_option("weight_cache_enabled", true), "weight_cache_enabled");
    check(options.set_option("packed_cache_path", static_cast<const char*>(path)), "packed_cache_path");
    check(map.set_options("XnnpackBackend", options.view()), "options");
  }
  check(module.load_method("forward", nullptr, nullptr, packed == "-" ? nullptr : &map), "loading");
  const double load_s = seconds() - started, loaded_mib = mib("VmRSS");

  int64_t position = 0, next = 0;
  auto feed = [&](std::vector<int64_t> tokens) {
    auto input = from_blob(tokens.data(), {1, static_cast<int>(tokens.size())}, executorch::aten::ScalarType::Long);
    auto start = from_blob(&position, {1}, executorch::aten::ScalarType::Long);
    auto result = module.execute("forward", {input, start});
    check(result.error(), "running");
    position += tokens.size();
    next = largest(result->at(0).toTensor());
  };
  const double prompt_at = seconds();
  for (size_t at = 0; at < ids.size(); at += chunk)
    feed({ids.begin() + at, ids.begin() + std::min(ids.size(), at + chunk)});
  const double prompt_s = seconds() - prompt_at, prompt_mib = mib("VmRSS"), file_mib = mib("RssFile");
  const double decode_at = seconds();
  std::string greedy;
  for (int step = 0; step < decoded; ++step) {
    greedy += (step ? "," : "") + std::to_string(next);
    feed({next});
  }
  const double decode_s = seconds() - decode_at;
  std::printf(
      "{\"load_s\": %.2f, \"loaded_mib\": %.0f, \"prompt_mib\": %.0f, \"prompt_file_mib\": %.0f, \"end_mib\": %.0f, \"peak_mib\": %.0f, "
      "\"prefill_tok_s\": %.1f, \"decode_tok_s\": %.2f, \"greedy\": [%s]}\n",
      load_s, loaded_mib, prompt_mib, file_mib, mib("VmRSS"), mib("VmHWM"), ids.size() / prompt_s, decoded / decode_s,
      greedy.c_str());
}
