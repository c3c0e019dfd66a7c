# Install: headers, library, CMake package, pkg-config file (component cpp); the tool (component cli).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/FlashAttnPlus)
install(TARGETS flash_attn EXPORT FlashAttnPlusTargets COMPONENT cpp
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/flash_attn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(EXPORT FlashAttnPlusTargets NAMESPACE FlashAttnPlus:: DESTINATION ${package_dir} COMPONENT cpp)
configure_package_config_file(cmake/FlashAttnPlusConfig.cmake.in FlashAttnPlusConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(FlashAttnPlusConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/FlashAttnPlusConfig.cmake ${PROJECT_BINARY_DIR}/FlashAttnPlusConfigVersion.cmake
        DESTINATION ${package_dir} COMPONENT cpp)

# The pkg-config file finds its prefix from where it lies. A static library also names what it needs itself.
set(pc_dir ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH pc_to_prefix /prefix/${pc_dir} /prefix)
set(pc_libs)
if(NOT BUILD_SHARED_LIBS)
  list(TRANSFORM FLASH_ATTN_CXX_RUNTIME PREPEND -l OUTPUT_VARIABLE runtime)
  list(JOIN runtime " " runtime)
  set(pc_libs " ${FLASH_ATTN_KEEP_PRIVATE} ${runtime} -pthread")
endif()
configure_file(cmake/flash-attn-plus.pc.in flash-attn-plus.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/flash-attn-plus.pc DESTINATION ${pc_dir} COMPONENT cpp)

if(FLASH_ATTN_CLI)
  install(TARGETS flash-attn RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT cli)
endif()
