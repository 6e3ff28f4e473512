// The GPU's rate of the operation that bounds the scan: the floor that benchmarks state speeds against.
#pragma once

namespace madkernels {

// float32 evaluations of 2^x a second by the special-function units of the whole GPU, in registers. A kernel that evaluates
// a part of them by polynomials may pass this. Waits for the device.
double cuda_exp2_rate(int device);

}  // namespace madkernels
