# The CUDA part of the extension, madkernels._C_cuda: included by CMakeLists.txt.
#
# It holds the kernels (compiled by nvcc.cmake) and, compiled a second time with MADKERNELS_CUDA, the entries of the ops that
# have such kernels. It links against a torch without CUDA too: a stand-in with the name of torch's own libtorch_cuda.so gives
# the one symbol that such a torch lacks. Only that name stays in the result, and where torch has CUDA its library is loaded
# already; elsewhere the CUDA part is never loaded.
set(MADKERNELS_CUDA auto CACHE STRING "Build the CUDA part: auto (where nvcc is found and torch has CUDA), on or off")

if(NOT MADKERNELS_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "MADKERNELS_CUDA is \"${MADKERNELS_CUDA}\"; it takes auto, on or off")
endif()
if(MADKERNELS_CUDA STREQUAL off)
  return()
endif()
ask_torch(TORCH_CUDA cuda)
if(MADKERNELS_CUDA STREQUAL auto AND NOT (NVCC AND TORCH_CUDA))
  message(STATUS "No CUDA part: nvcc is \"${NVCC}\", the CUDA version of torch \"${TORCH_CUDA}\"")
  return()
endif()
if(NOT NVCC)
  message(FATAL_ERROR "MADKERNELS_CUDA=on, but there is no nvcc on PATH, in CUDA_HOME, in /usr/local/cuda or among the \
packages of ${Python_EXECUTABLE}: install the CUDA toolkit or madkernels[cuda-build], or set CUDA_HOME, or build with \
MADKERNELS_CUDA=off.")
endif()

# The CUDA runtime, linked statically: another toolkit's may be loaded beside it. The libraries of pip lie in another folder
# than nvcc says.
string(REGEX MATCH "TOP=([^\n]*)" top "${NVCC_SAYS}")
set(top "${CMAKE_MATCH_1}")
string(REGEX MATCHALL "-L[^\"\n]+" folders "${NVCC_SAYS}")
list(TRANSFORM folders REPLACE "^-L" "")
find_library(CUDART libcudart_static.a NO_CACHE HINTS ${folders} ${top}/lib64 ${top}/lib)
if(NOT CUDART)
  message(FATAL_ERROR "MADKERNELS_CUDA: there is no libcudart_static.a with ${NVCC}: it was looked for in ${folders};${top}/lib")
endif()
execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE nvcc_says COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "V([0-9.]+)" NVCC_VERSION "${nvcc_says}")
set(NVCC_VERSION ${CMAKE_MATCH_1})

entries_of(CUDA_ENTRIES "${CUDA_FILES}")
add_library(cuda_entries OBJECT ${CUDA_ENTRIES})
target_compile_definitions(cuda_entries PRIVATE MADKERNELS_CUDA USE_CUDA)
target_link_libraries(cuda_entries PRIVATE flags torch_stable)

file(CONFIGURE OUTPUT torch_cuda.cpp CONTENT "extern \"C\" __attribute__((visibility(\"default\")))
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
add_library(torch_cuda_stand_in SHARED ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda.cpp)
set_target_properties(torch_cuda_stand_in PROPERTIES OUTPUT_NAME torch_cuda)

pybind11_add_module(_C_cuda MODULE NO_EXTRAS csrc/module_cuda.cpp ${CUDA_OBJECTS})
target_link_libraries(_C_cuda PRIVATE flags cuda_entries torch_stable torch_cuda_stand_in ${CUDART} dl rt pthread)
target_link_options(_C_cuda PRIVATE -Wl,--exclude-libs,ALL)
set_source_files_properties(csrc/module_cuda.cpp PROPERTIES COMPILE_DEFINITIONS
  "MADKERNELS_VERSION=\"${MADKERNELS_VERSION}\";MADKERNELS_NVCC=\"${NVCC_VERSION}\";\
MADKERNELS_CUDA_ARCHS=\"${CUDA_BUILT_FOR}\";MADKERNELS_CUDA_PTX=\"${NEWEST}\"")
install(TARGETS _C_cuda LIBRARY DESTINATION .)
