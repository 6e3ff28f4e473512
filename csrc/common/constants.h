// Constants of more than one kernel. A: float or double.
#pragma once

namespace madkernels {

template <class A>
constexpr A kLog2e = static_cast<A>(1.442695040888963407359924681L);
template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_inff());
template <class A>
constexpr A kLn2 = static_cast<A>(0.693147180559945309417232121L);

}  // namespace madkernels
