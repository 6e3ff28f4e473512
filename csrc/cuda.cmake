# The CUDA part of the extension, madkernels._C_cuda: included by CMakeLists.txt.
#
# It holds the kernels (*.cu, no torch headers, flags in nvcc.options) and, compiled a second time with MADKERNELS_CUDA, the
# entries of the ops that have such kernels. It links against a torch without CUDA too: a stand-in with the name of torch's
# own libtorch_cuda.so gives the one symbol that such a torch lacks. Only that name stays in the result, and where torch has
# CUDA its library is loaded already; elsewhere the CUDA part is never loaded.
set(MADKERNELS_CUDA auto CACHE STRING "Build the CUDA part: auto (where nvcc is found and torch has CUDA), on or off")
set(MADKERNELS_CUDA_ARCHS "80;90a" CACHE STRING "GPU architectures to build for; PTX of the newest serves newer GPUs")

if(NOT MADKERNELS_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "MADKERNELS_CUDA is \"${MADKERNELS_CUDA}\"; it takes auto, on or off")
endif()
if(MADKERNELS_CUDA STREQUAL off)
  return()
endif()
find_program(NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
ask_python(TORCH_CUDA "import torch; print(torch.version.cuda or '')" "torch does not say its CUDA version")
if(MADKERNELS_CUDA STREQUAL auto AND NOT (NVCC AND TORCH_CUDA))
  message(STATUS "No CUDA part: nvcc is \"${NVCC}\", the CUDA version of torch \"${TORCH_CUDA}\"")
  return()
endif()
if(NOT NVCC)
  message(FATAL_ERROR "MADKERNELS_CUDA=on, but there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: install the \
CUDA toolkit, or set CUDA_HOME, or build with MADKERNELS_CUDA=off.")
endif()

list(SORT MADKERNELS_CUDA_ARCHS COMPARE NATURAL)
foreach(arch ${MADKERNELS_CUDA_ARCHS})
  if(NOT arch MATCHES "^(8[0-9]|9[0-9]|1[0-9][0-9])[af]?$")
    message(FATAL_ERROR "MADKERNELS_CUDA_ARCHS has \"${arch}\"; expected a list like 80;90a, of 80 and later")
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
  string(REGEX REPLACE "[af]$" "" NEWEST ${arch})
endforeach()
list(APPEND CMAKE_CUDA_ARCHITECTURES ${NEWEST}-virtual)
set(CMAKE_CUDA_COMPILER ${NVCC})
set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # another toolkit's runtime may be loaded beside it
enable_language(CUDA)

file(GLOB CUDA_KERNELS CONFIGURE_DEPENDS csrc/*/*.cu)
entries_of(CUDA_ENTRIES "${CUDA_KERNELS}")

add_library(cuda_kernels OBJECT ${CUDA_KERNELS})
target_include_directories(cuda_kernels PRIVATE csrc)
target_compile_options(cuda_kernels PRIVATE --options-file=${CMAKE_SOURCE_DIR}/csrc/nvcc.options)
string(JOIN "," CUDA_BUILT_FOR ${MADKERNELS_CUDA_ARCHS})
target_compile_definitions(cuda_kernels PRIVATE MADKERNELS_CUDA_ARCHS="${CUDA_BUILT_FOR}")
set_target_properties(cuda_kernels PROPERTIES CUDA_VISIBILITY_PRESET hidden)
set_source_files_properties(${CUDA_KERNELS} PROPERTIES OBJECT_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/nvcc.options)

add_library(cuda_entries OBJECT ${CUDA_ENTRIES})
target_compile_definitions(cuda_entries PRIVATE MADKERNELS_CUDA USE_CUDA)
target_link_libraries(cuda_entries PRIVATE flags torch_stable)

file(CONFIGURE OUTPUT torch_cuda.cpp CONTENT "extern \"C\" __attribute__((visibility(\"default\")))
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
add_library(torch_cuda_stand_in SHARED ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda.cpp)
set_target_properties(torch_cuda_stand_in PROPERTIES OUTPUT_NAME torch_cuda)

pybind11_add_module(_C_cuda MODULE NO_EXTRAS csrc/module_cuda.cpp)
target_link_libraries(_C_cuda PRIVATE flags cuda_kernels cuda_entries torch_stable torch_cuda_stand_in)
set_source_files_properties(csrc/module_cuda.cpp PROPERTIES COMPILE_DEFINITIONS
  "MADKERNELS_VERSION=\"${MADKERNELS_VERSION}\";MADKERNELS_NVCC=\"${CMAKE_CUDA_COMPILER_VERSION}\";\
MADKERNELS_CUDA_ARCHS=\"${CUDA_BUILT_FOR}\";MADKERNELS_CUDA_PTX=\"${NEWEST}\"")
install(TARGETS _C_cuda LIBRARY DESTINATION .)
