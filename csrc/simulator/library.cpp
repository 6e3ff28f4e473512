#include "simulator/library.h"

#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>

namespace madkernels::simulator {
namespace {

std::map<std::string, std::unique_ptr<Module>>& modules() {
  static std::map<std::string, std::unique_ptr<Module>> all;
  return all;
}

}  // namespace

void add_module(const std::string& path) {
  if (modules().count(path) != 0) return;
  std::ifstream file(path);
  if (!file) throw std::runtime_error("there is no PTX at " + path);
  std::stringstream text;
  text << file.rdbuf();
  add_module(path, text.str());
}

void add_module(const std::string& path, const std::string& text) { modules()[path] = std::make_unique<Module>(path, text); }

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& [path, module] : modules()) names.insert(names.end(), module->kernels().begin(), module->kernels().end());
  return names;
}

Kernel* find_kernel(const std::string& name) {
  static std::map<std::string, std::unique_ptr<Kernel>> decoded;
  std::unique_ptr<Kernel>& kernel = decoded[name];
  if (kernel) return kernel.get();
  for (const auto& [path, module] : modules()) {
    for (const std::string& own : module->kernels()) {
      if (own != name) continue;
      kernel = std::make_unique<Kernel>(decode(*module, name));
      return kernel.get();
    }
  }
  return nullptr;
}

}  // namespace madkernels::simulator
