// The kernels that can be launched, by name.
#pragma once

#include <string>
#include <vector>

#include "simulator/program.h"

namespace madkernels::simulator {

// Files of PTX, once each.
void add_module(const std::string& path);
void add_module(const std::string& path, const std::string& text);
std::vector<std::string> kernel_names();
// Decoded at its first use; nullptr where no module has it.
Kernel* find_kernel(const std::string& name);

}  // namespace madkernels::simulator
