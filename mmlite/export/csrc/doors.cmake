# The doors of inference runtimes to the CPU kernels: a library for each, which holds the kernels
# itself. ONNX Runtime's needs nothing to build. OpenVINO's is built where its package is found, for
# that version of it: in OpenVINO_DIR, or that of the wheel which the Python of the build has.
# Included by the CMakeLists.txt of the project, behind the kernels.
set(door_sources ${CMAKE_SOURCE_DIR}/mmlite/export/csrc)
get_target_property(kernel_sources mmlite_cpu SOURCES)

function(add_door name)
  set(door mmlite_${name})
  add_library(${door} SHARED
    ${door_sources}/${name}.cpp ${door_sources}/attention.cpp ${kernel_sources})
  add_dependencies(${door} mmlite_cpu)  # whose objects these are
  set_options(${door})
  target_include_directories(${door} PRIVATE ${sources})
  target_link_libraries(${door} PRIVATE Threads::Threads)
  # In a process with several libraries that hold the kernels, each calls its own.
  if(UNIX AND NOT APPLE)
    target_link_options(${door} PRIVATE -Wl,-Bsymbolic)
  endif()
  if(MMLITE_SANITIZE)
    target_link_options(${door} PRIVATE -fsanitize=address,undefined)
  endif()
  if(NOT SKBUILD OR SKBUILD_STATE STREQUAL "editable")
    set_target_properties(${door} PROPERTIES
      RUNTIME_OUTPUT_DIRECTORY ${CMAKE_SOURCE_DIR}/mmlite/export
      LIBRARY_OUTPUT_DIRECTORY ${CMAKE_SOURCE_DIR}/mmlite/export)
  endif()
  install(TARGETS ${door} LIBRARY DESTINATION mmlite/export RUNTIME DESTINATION mmlite/export)
endfunction()

add_door(onnxruntime)

# A wheel gets the extension only where it is asked for: it fits one version of OpenVINO.
if(NOT OpenVINO_DIR AND (NOT SKBUILD OR SKBUILD_STATE STREQUAL "editable"))
  set(python ${Python_EXECUTABLE} python3 python)
  list(GET python 0 python)
  execute_process(
    COMMAND ${python} -c "import openvino.utils as utils; print(utils.get_cmake_path())"
    OUTPUT_VARIABLE wheel_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(OpenVINO_ROOT ${wheel_dir})
endif()
find_package(OpenVINO QUIET COMPONENTS Runtime ONNX)
if(OpenVINO_FOUND)
  find_package(TBB QUIET HINTS ${OpenVINO_DIR})
endif()
if(OpenVINO_FOUND AND TARGET TBB::tbb)
  message(STATUS "Building the extension for OpenVINO ${OpenVINO_VERSION}")
  add_door(openvino)
  target_link_libraries(mmlite_openvino PRIVATE
    openvino::runtime openvino::frontend::onnx TBB::tbb)
  # In an environment the packages lie side by side.
  set_target_properties(mmlite_openvino PROPERTIES INSTALL_RPATH "$ORIGIN/../../openvino/libs")
endif()
