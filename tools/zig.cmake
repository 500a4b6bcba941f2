# Cross-compiles with the clang of the PyPI package ziglang, which carries every system's C library:
#
#   cmake -DCMAKE_TOOLCHAIN_FILE=tools/zig.cmake -DZIG=.../ziglang/zig -DZIG_TARGET=aarch64-linux-gnu.2.17
#
# tools/wheels.py knows the targets.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG ZIG_TARGET)
string(REGEX MATCH "^([^-]+)-([^-]+)" _ "${ZIG_TARGET}")
set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
set(system ${CMAKE_MATCH_2})  # the next match overwrites it
if(system MATCHES "^macos")
  set(CMAKE_SYSTEM_NAME Darwin)
  # CMake insists on them; nothing here uses the first, and zig brings what the second would.
  set(CMAKE_INSTALL_NAME_TOOL true)
  set(CMAKE_OSX_SYSROOT "" CACHE STRING "")
elseif(system STREQUAL "windows")
  set(CMAKE_SYSTEM_NAME Windows)
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
set(CMAKE_CXX_COMPILER ${ZIG} c++ -target ${ZIG_TARGET})
set(CMAKE_SHARED_LINKER_FLAGS_INIT -s)
# There are no paths to rewrite when it is installed, for which CMake has no tool.
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
