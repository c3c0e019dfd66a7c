# flash_attn._C, and its stub for type checkers and editors.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module OPTIONAL_COMPONENTS Development.SABIModule)
if(NOT nanobind_ROOT AND NOT SKBUILD)
  execute_process(COMMAND ${Python_EXECUTABLE} -m nanobind --cmake_dir
                  OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
find_package(nanobind CONFIG REQUIRED)
file(GLOB binding_sources CONFIGURE_DEPENDS python/bindings/*.cpp src/cuda/driver/*.cpp)
nanobind_add_module(_C STABLE_ABI NB_STATIC ${binding_sources})
target_link_libraries(_C PRIVATE flash_attn_internal ${CMAKE_DL_LIBS})
target_include_directories(_C PRIVATE src)
if(NOT APPLE)
  target_link_options(_C PRIVATE LINKER:--exclude-libs,ALL)  # another extension may embed another flash_attn
endif()
if(FLASH_ATTN_INSTALL)
  install(TARGETS _C LIBRARY DESTINATION flash_attn COMPONENT python)
endif()

# The stub is made by importing the module, which a build for another machine, or one with sanitizers, cannot do.
if(NOT CMAKE_CROSSCOMPILING AND NOT FLASH_ATTN_SANITIZE)
  nanobind_add_stub(_C_stub MODULE _C OUTPUT _C.pyi PYTHON_PATH $<TARGET_FILE_DIR:_C>
                    PATTERN_FILE ${PROJECT_SOURCE_DIR}/python/bindings/stub.pat DEPENDS _C)
  if(FLASH_ATTN_INSTALL)
    install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_C.pyi DESTINATION flash_attn COMPONENT python)
  endif()
endif()
