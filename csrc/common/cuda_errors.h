// What can go wrong with a GPU, said once and clearly. No CUDA header: launchers and entries both include this.
#pragma once

#include <string>

namespace madkernels {

// Why kernels cannot run on the device: too old, or not built for it. Empty if they can. Needs a working driver.
std::string device_problem(int device);

// Makes `device` the current one, of the runtime linked into this library too. Throws its device_problem.
void use_device(int device);

// Around every launch, with the kernel's name. Both throw std::runtime_error; the first where an earlier call left an error.
void check_before_launch(const char* kernel);
void check_after_launch(const char* kernel);

}  // namespace madkernels
