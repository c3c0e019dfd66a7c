# flash_attn_add_library(NAME STATIC|SHARED): the library, in that form, of flash_attn_objects.

# What the C++ runtime is called, for those who link the static form with a C compiler: "stdc++;m", "c++;m".
set(FLASH_ATTN_CXX_RUNTIME ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(REMOVE_DUPLICATES FLASH_ATTN_CXX_RUNTIME)
list(FILTER FLASH_ATTN_CXX_RUNTIME INCLUDE REGEX "^(stdc\\+\\+|c\\+\\+|c\\+\\+abi|m)$")

if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  # Who puts the static form into a shared library does not export it: another one may embed another version.
  set(FLASH_ATTN_KEEP_PRIVATE -Wl,--exclude-libs,${CMAKE_STATIC_LIBRARY_PREFIX}flash_attn${CMAKE_STATIC_LIBRARY_SUFFIX})
endif()

function(flash_attn_add_library name form)
  add_library(${name} ${form} $<TARGET_OBJECTS:flash_attn_objects>)
  target_compile_features(${name} PUBLIC cxx_std_20)
  target_include_directories(${name} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>)
  target_link_libraries(${name} PUBLIC Threads::Threads)
  set_target_properties(${name} PROPERTIES
    LINKER_LANGUAGE CXX VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
  if(form STREQUAL "STATIC")
    target_link_options(${name} INTERFACE ${FLASH_ATTN_KEEP_PRIVATE})
  elseif(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # The compiler hides our own functions, but not what it instantiates of the C++ library's templates.
    set(map ${PROJECT_SOURCE_DIR}/cmake/exports.map)
    target_link_options(${name} PRIVATE -Wl,--version-script=${map})
    set_target_properties(${name} PROPERTIES LINK_DEPENDS ${map})
  endif()
endfunction()
