# nvcc, and how CUDA files are compiled: included by CMakeLists.txt. Without nvcc, NVCC is false and there are no rules.
#
# nvcc runs once for a file. In nvcc/<folder>/ of the build folder it leaves, beside one another:
#
#   <name>.o            the host's code, that of every architecture, and the PTX of the newest
#   <name>.<arch>.ptx   what ptxas compiles, for each architecture; and what it makes of it, <name>.<arch>.cubin
#   <name>.log          what nvcc said, with the resources that ptxas gives each kernel
#
# The CUDA part, `make cuda-check` and the tests all take these. CUDA_OBJECTS are the objects of csrc; the target cuda_objects
# makes them.
set(MADKERNELS_CUDA_ARCHS "80;90a" CACHE STRING "GPU architectures to build for; PTX of the newest serves newer GPUs")

# Packages of pip have nvcc too.
ask_python(NVIDIA_FOLDERS "import importlib.util as u; s = u.find_spec('nvidia'); \
print(*(s.submodule_search_locations or [] if s else []), sep=';')" "the folders of the nvidia packages are not known")
list(TRANSFORM NVIDIA_FOLDERS APPEND "/*/bin")
file(GLOB NVIDIA_FOLDERS ${NVIDIA_FOLDERS})
find_program(NVCC nvcc PATHS ENV PATH ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda ${NVIDIA_FOLDERS} PATH_SUFFIXES bin
             NO_DEFAULT_PATH)
if(NOT NVCC)
  return()
endif()
# nvcc says in which folders it itself, its headers and its libraries lie; found on PATH it may be a script that calls it.
execute_process(COMMAND ${NVCC} --dryrun -ccbin ${CMAKE_CXX_COMPILER} -x cu -c /dev/null ERROR_VARIABLE NVCC_SAYS
                RESULT_VARIABLE nvcc_failed)
if(nvcc_failed)
  message(STATUS "${NVCC} does not run: ${NVCC_SAYS}")
  set(NVCC "")
  return()
endif()

list(SORT MADKERNELS_CUDA_ARCHS COMPARE NATURAL)
set(CUDA_CODE "")
foreach(arch ${MADKERNELS_CUDA_ARCHS})
  if(NOT arch MATCHES "^(8[0-9]|9[0-9]|1[0-9][0-9])[af]?$")
    message(FATAL_ERROR "MADKERNELS_CUDA_ARCHS has \"${arch}\"; expected a list like 80;90a, of 80 and later")
  endif()
  list(APPEND CUDA_CODE -gencode arch=compute_${arch},code=sm_${arch})
  string(REGEX REPLACE "[af]$" "" NEWEST ${arch})
endforeach()
list(APPEND CUDA_CODE -gencode arch=compute_${NEWEST},code=compute_${NEWEST})
string(JOIN "," CUDA_BUILT_FOR ${MADKERNELS_CUDA_ARCHS})

# nvcc_objects(<result> FILES <.cu files> [OPTIONS <of nvcc>]): rules for the files; the objects' paths are the result.
function(nvcc_objects result)
  cmake_parse_arguments(PARSE_ARGV 1 of "" "" "FILES;OPTIONS")
  set(source ${CMAKE_SOURCE_DIR}/csrc)
  set(objects "")
  foreach(file ${of_FILES})
    cmake_path(ABSOLUTE_PATH file)
    cmake_path(GET file PARENT_PATH folder)
    cmake_path(GET folder FILENAME folder)
    cmake_path(GET file STEM name)
    set(made nvcc/${folder}/${name})
    set(code "")
    foreach(arch ${MADKERNELS_CUDA_ARCHS})
      list(APPEND code ${made}.${arch}.ptx ${made}.${arch}.cubin)
    endforeach()
    add_custom_command(
      OUTPUT ${made}.o ${code} ${made}.log
      COMMAND ${Python_EXECUTABLE} ${source}/nvcc_once.py ${made}.o ${CUDA_BUILT_FOR}
              ${NVCC} --options-file=${source}/nvcc.options -I ${source} "-DMADKERNELS_CUDA_ARCHS=\"${CUDA_BUILT_FOR}\""
              -ccbin ${CMAKE_CXX_COMPILER} -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas=-v ${CUDA_CODE} ${of_OPTIONS}
              -MD -MF ${made}.d -MT ${made}.o -c ${file}
      DEPENDS ${file} ${source}/nvcc.options ${source}/nvcc_once.py
      DEPFILE ${made}.d
      COMMENT "Compiling ${folder}/${name}.cu with nvcc"
      VERBATIM)
    list(APPEND objects ${CMAKE_CURRENT_BINARY_DIR}/${made}.o)
  endforeach()
  set(${result} ${objects} PARENT_SCOPE)
endfunction()

file(GLOB CUDA_FILES CONFIGURE_DEPENDS csrc/*/*.cu)
nvcc_objects(CUDA_OBJECTS FILES ${CUDA_FILES})
add_custom_target(cuda_objects DEPENDS ${CUDA_OBJECTS})
