/* FLASH_ATTN_API marks what the shared library exports: the functions of flash_attn.hpp and flash_attn.h, and Error,
 * whose type must be one for all libraries of a process so that `catch` finds it. All else is hidden. */
#ifndef FLASH_ATTN_EXPORT_H
#define FLASH_ATTN_EXPORT_H

#if defined(__GNUC__)
#define FLASH_ATTN_API __attribute__((visibility("default")))
#else
#define FLASH_ATTN_API
#endif

#endif /* FLASH_ATTN_EXPORT_H */
