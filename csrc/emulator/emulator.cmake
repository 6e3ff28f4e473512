# The CUDA kernels on the emulator: included by CMakeLists.txt, for the tests only. No CUDA header is needed.
#
#   emulated_ops       the ops with their CUDA kernels, as torch.ops.madkernels_emulated
#   device_tests       the device vocabulary's tests; device_tests_asan the same under AddressSanitizer
#
# The optimiser is on, without contraction of products and sums: what the compiler fuses would differ from place to place.
file(GLOB EMULATED_KERNELS CONFIGURE_DEPENDS csrc/*/*.cu)
list(FILTER EMULATED_KERNELS EXCLUDE REGEX "/(cuda_errors|cuda_rate|launch)\\.cu$")
file(GLOB DEVICE_TESTS CONFIGURE_DEPENDS tests/device/*.cu)
set_source_files_properties(${EMULATED_KERNELS} ${DEVICE_TESTS} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
entries_of(EMULATED_ENTRIES "${EMULATED_KERNELS}")

add_library(emulated INTERFACE)
target_include_directories(emulated INTERFACE csrc)
target_compile_definitions(emulated INTERFACE MADKERNELS_EMULATED)
target_compile_options(emulated INTERFACE -Wall -Wextra -Wno-unknown-pragmas -O2 -g1 -ffp-contract=off)
if(MADKERNELS_SANITIZE)
  target_compile_options(emulated INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1)
  target_link_options(emulated INTERFACE -fsanitize=address,undefined)
endif()
set(EMULATOR csrc/emulator/emulator.cpp csrc/emulator/fiber.cpp)

add_library(emulated_ops MODULE EXCLUDE_FROM_ALL ${EMULATED_KERNELS} ${EMULATED_ENTRIES} ${EMULATOR}
            csrc/emulator/emulated_ops.cpp)
set_target_properties(emulated_ops PROPERTIES PREFIX "")
target_link_libraries(emulated_ops PRIVATE emulated torch_stable)

foreach(kind "" _asan)
  add_executable(device_tests${kind} EXCLUDE_FROM_ALL ${DEVICE_TESTS} ${EMULATOR})
  target_link_libraries(device_tests${kind} PRIVATE emulated)
endforeach()
target_compile_options(device_tests_asan PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=undefined)
target_link_options(device_tests_asan PRIVATE -fsanitize=address,undefined)
