#include "simulator/control.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "simulator/instructions.h"
#include "simulator/library.h"
#include "simulator/machine.h"

namespace madkernels::simulator {
namespace {

bool is_barrier(const Instruction& in) { return in.flow == Flow::kBarrier || in.run == &sync_warp; }

struct LeftOut {
  Instruction* at = nullptr;
  Instruction was;
};
LeftOut left_out;

// Text that lives until the next of its kind.
const char* kept(std::string text) {
  static std::string latest;
  latest = std::move(text);
  return latest.c_str();
}

Schedule schedule_named(const std::string& name) {
  constexpr const char* kNames[] = {"order", "reverse", "warps", "lanes"};
  for (int i = 0; i < 4; i++) {
    if (name == kNames[i]) return static_cast<Schedule>(i);
  }
  throw std::runtime_error("MADKERNELS_SIMULATED_SCHEDULE has \"" + name + "\"; it takes order, reverse, warps or lanes");
}

Kernel& kernel_named(const char* name) {
  Kernel* const kernel = find_kernel(name);
  if (kernel == nullptr) throw std::runtime_error(std::string("there is no kernel ") + name);
  return *kernel;
}

}  // namespace

Settings settings_of_environment() {
  Settings settings;
  if (const char* const schedule = std::getenv("MADKERNELS_SIMULATED_SCHEDULE")) {
    const std::string text = schedule;
    const size_t colon = text.find(':');
    settings.schedule = schedule_named(text.substr(0, colon));
    if (colon != std::string::npos) settings.seed = std::stoull(text.substr(colon + 1));
  }
  const char* const races = std::getenv("MADKERNELS_SIMULATED_RACES");
  settings.races = races != nullptr && std::strcmp(races, "1") == 0;
  return settings;
}

}  // namespace madkernels::simulator

using namespace madkernels::simulator;

void simulator_set_schedule(int schedule, uint64_t seed) {
  machine().settings.schedule = static_cast<Schedule>(schedule), machine().settings.seed = seed;
}
void simulator_set_races(int looked_for) { machine().settings.races = looked_for != 0; }
void simulator_set_multiprocessors(int count) { machine().settings.multiprocessors = count; }
void simulator_set_shared_bytes(int bytes) { machine().settings.shared_bytes = bytes; }
void simulator_set_most_steps(int64_t steps) { machine().settings.most_steps = steps; }
int64_t simulator_steps() { return machine().steps; }
void simulator_forget_memory() { machine().memory.clear(); }

const char* simulator_kernels() {
  std::string names;
  for (const std::string& name : kernel_names()) names += name + "\n";
  return kept(names);
}

const char* simulator_launched() {
  std::string names;
  for (const auto& [name, count] : machine().launches) names += name + "\n";
  machine().launches.clear();
  return kept(names);
}

const char* simulator_barriers(const char* name) {
  const Kernel& kernel = kernel_named(name);
  std::string lines;
  for (size_t i = 0; i < kernel.code.size(); i++) {
    if (is_barrier(kernel.code[i])) lines += std::to_string(i) + " " + kernel.place_of(kernel.code[i]) + "\n";
  }
  return kept(lines);
}

void simulator_leave_out(const char* name, int barrier) {
  if (left_out.at != nullptr) *left_out.at = left_out.was;
  left_out = {};
  if (barrier < 0) return;
  Instruction& in = kernel_named(name).code.at(static_cast<size_t>(barrier));
  left_out = {&in, in};
  in.flow = Flow::kOn, in.run = [](Warp&, const Instruction&, uint32_t) {};
}

const char* simulator_instructions() {
  std::string names;
  for (const auto& [name, form] : elementwise_instructions()) names += name + "\n";
  return kept(names);
}

const char* simulator_run(const char* ptx, int blocks, int threads, int dynamic_shared, const uint64_t* parameters,
                          const uint64_t* bytes) {
  try {
    const Module module("given.ptx", ptx);
    const Kernel kernel = decode(module, module.kernels().at(0));
    Launch launch{&kernel, {blocks, 1, 1}, {threads, 1, 1}, dynamic_shared, nullptr};
    std::vector<unsigned char> given(static_cast<size_t>(kernel.text.parameter_bytes));
    machine().memory.clear();
    for (size_t i = 0; i < kernel.text.parameters.size(); i++) {
      const Variable& p = kernel.text.parameters[i];
      std::memcpy(given.data() + p.offset, parameters + i, static_cast<size_t>(p.bytes));
      machine().memory.add(reinterpret_cast<const void*>(parameters[i]), bytes[i]);
    }
    launch.parameters = given.data();
    machine().run(launch);
    return "";
  } catch (const std::exception& error) {
    return kept(error.what());
  }
}
