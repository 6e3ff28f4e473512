# The simulator, which runs nvcc's PTX on the CPU: included by CMakeLists.txt, for the tests only; nothing here is installed.
#
#   simulator          the machine without kernels: no CUDA is needed for it
#   simulated_ops      the ops with their CUDA kernels, as torch.ops.madkernels_simulated
#   device_tests       the device vocabulary's tests
#   simulator_tests    kernels that are wrong on purpose
#
# The last three are the objects of nvcc's one compilation with a CUDA runtime of ours in the place of NVIDIA's, which takes
# the PTX of the first architecture.
file(GLOB SIMULATOR CONFIGURE_DEPENDS csrc/simulator/*.cpp)
list(FILTER SIMULATOR EXCLUDE REGEX "/(runtime|torch)\\.cpp$")
add_library(simulator SHARED EXCLUDE_FROM_ALL ${SIMULATOR})
set_target_properties(simulator PROPERTIES CXX_VISIBILITY_PRESET default)
target_include_directories(simulator PUBLIC csrc)
# Registers are read as what they were not written as. What the compiler fuses would differ from what the PTX says.
target_compile_options(simulator PRIVATE -Wall -Wextra -O3 -march=native -fno-strict-aliasing -ffp-contract=off -fno-math-errno
                                         -fno-trapping-math)

if(NOT NVCC)
  return()
endif()

list(GET MADKERNELS_CUDA_ARCHS 0 SIMULATED_ARCH)
string(REGEX MATCHALL "-I[^\"\n ]+" CUDA_INCLUDE "${NVCC_SAYS}")
list(TRANSFORM CUDA_INCLUDE REPLACE "^-I" "")

# The objects run on the simulator where `target` is started.
function(simulate target objects)
  list(TRANSFORM objects REPLACE "\\.o$" ".${SIMULATED_ARCH}.ptx" OUTPUT_VARIABLE ptx)
  string(JOIN ":" ptx ${ptx})
  target_sources(${target} PRIVATE ${objects} csrc/simulator/runtime.cpp)
  target_include_directories(${target} SYSTEM PRIVATE ${CUDA_INCLUDE})
  target_compile_definitions(${target} PRIVATE MADKERNELS_PTX="${ptx}")
  target_compile_options(${target} PRIVATE -Wall -Wextra -O1)
  target_link_libraries(${target} PRIVATE simulator)
endfunction()

entries_of(SIMULATED_ENTRIES "${CUDA_FILES}")
add_library(simulated_ops MODULE EXCLUDE_FROM_ALL ${SIMULATED_ENTRIES} csrc/simulator/torch.cpp)
set_target_properties(simulated_ops PROPERTIES PREFIX "")
simulate(simulated_ops "${CUDA_OBJECTS}")
target_compile_definitions(simulated_ops PRIVATE MADKERNELS_CUDA USE_CUDA MADKERNELS_LIBRARY=madkernels_simulated
                                                 MADKERNELS_KEY=CPU)
target_link_libraries(simulated_ops PRIVATE torch_stable)
target_link_options(simulated_ops PRIVATE -Wl,-Bsymbolic)  # its own functions before torch's of the same name

file(GLOB DEVICE_TESTS CONFIGURE_DEPENDS tests/device/*.cu)
nvcc_objects(DEVICE_OBJECTS FILES ${DEVICE_TESTS})
nvcc_objects(WRONG_OBJECTS FILES tests/simulator/test_wrong.cu)
set(HELD_OBJECTS ${CUDA_OBJECTS})
list(FILTER HELD_OBJECTS INCLUDE REGEX "/common/(cuda_errors|launch)\\.o$")
set(MAIN_OBJECT ${DEVICE_OBJECTS})
list(FILTER MAIN_OBJECT INCLUDE REGEX "/main\\.o$")
add_executable(device_tests EXCLUDE_FROM_ALL)
simulate(device_tests "${DEVICE_OBJECTS};${HELD_OBJECTS}")
add_executable(simulator_tests EXCLUDE_FROM_ALL)
simulate(simulator_tests "${WRONG_OBJECTS};${MAIN_OBJECT};${HELD_OBJECTS}")
