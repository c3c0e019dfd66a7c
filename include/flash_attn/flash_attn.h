/* FlashAttention-Plus in C: the C++ API of flash_attn.hpp, one function per call, plain structs.
 *
 *   int64_t shape[4] = {batch, seqlen, nheads, headdim};
 *   flash_attn_tensor q = flash_attn_view(q_data, FLASH_ATTN_F32, 4, shape);   (k, v, out likewise)
 *   flash_attn_options options;
 *   flash_attn_options_init(&options, sizeof options);
 *   options.causal = 1;
 *   flash_attn_forward_args args;
 *   flash_attn_forward_args_init(&args, sizeof args);
 *   args.q = &q, args.k = &k, args.v = &v, args.out = &out, args.options = &options;
 *   if (flash_attn_forward(&args) != FLASH_ATTN_OK) puts(flash_attn_last_error());
 *
 * Shapes and meanings are those of flash_attn.hpp. Structs with a `struct_size` grow at their end only: a program built
 * against an older header keeps working with a newer library. Every function may be called from any thread. */
#ifndef FLASH_ATTN_FLASH_ATTN_H
#define FLASH_ATTN_FLASH_ATTN_H

#include <stddef.h>
#include <stdint.h>

#include "flash_attn/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a function returns; the words are in flash_attn_last_error(). Unless it is FLASH_ATTN_OK (or the library ran out
 * of memory, or has a defect), nothing was written. */
enum {
  FLASH_ATTN_OK = 0,
  FLASH_ATTN_INVALID_ARGUMENT = 1, /* a shape, a value, a device, overlapping memory, a null pointer */
  FLASH_ATTN_TYPE_MISMATCH = 2,    /* a dtype */
  FLASH_ATTN_NOT_SUPPORTED = 3,    /* well-formed, but no backend (or not the chosen one) serves it */
  FLASH_ATTN_INTERNAL = 4,         /* a defect of the library */
  FLASH_ATTN_OUT_OF_MEMORY = 5,
  FLASH_ATTN_DEVICE_FAILURE = 6 /* a driver or a launch failed; outputs may be half written */
};

enum {
  FLASH_ATTN_F16 = 0,
  FLASH_ATTN_BF16 = 1,
  FLASH_ATTN_F32 = 2,
  FLASH_ATTN_F64 = 3,
  FLASH_ATTN_I32 = 4,
  FLASH_ATTN_I64 = 5
};

#define FLASH_ATTN_MAX_DIMS 5

/* A strided view of memory that the caller owns; this struct never changes. Strides are in elements. */
typedef struct flash_attn_tensor {
  void* data;
  int32_t dtype;       /* FLASH_ATTN_F16 ... */
  int32_t device_type; /* DLPack's DLDeviceType: 1 is the CPU */
  int32_t device_index;
  int32_t ndim;
  int64_t shape[FLASH_ATTN_MAX_DIMS];
  int64_t stride[FLASH_ATTN_MAX_DIMS];
} flash_attn_tensor;

/* A contiguous tensor in the CPU's memory. An ndim outside [0, 5] or a null `shape` gives one that is refused. */
FLASH_ATTN_API flash_attn_tensor flash_attn_view(const void* data, int32_t dtype, int32_t ndim, const int64_t* shape);

/* Memory of a device, ordered on a stream. All null: the backend takes the device's own pool. */
typedef struct flash_attn_allocator {
  void* (*allocate)(void* context, int32_t device_type, int32_t device_index, int64_t bytes, void* stream);
  void (*release)(void* context, int32_t device_type, int32_t device_index, void* memory, void* stream);
  void* context;
} flash_attn_allocator;

/* What forward and backward share. Null tensors are absent. */
typedef struct flash_attn_options {
  uint32_t struct_size;

  /* Sequences: int32 tensors. */
  const flash_attn_tensor* cu_seqlens_q;    /* (batch+1) */
  const flash_attn_tensor* cu_seqlens_k;    /* (batch+1) */
  const flash_attn_tensor* seqused_q;       /* (batch) */
  const flash_attn_tensor* seqused_k;       /* (batch) */
  const flash_attn_tensor* leftpad_k;       /* (batch) */
  const flash_attn_tensor* cache_batch_idx; /* (batch) */
  const flash_attn_tensor* block_table;     /* (batch, max_blocks) */
  int64_t max_seqlen_q;                     /* -1: as long as it takes */
  int64_t max_seqlen_k;                     /* -1 */

  /* Scores. */
  double softmax_scale;                  /* read if has_softmax_scale; else headdim^-1/2 */
  int32_t has_softmax_scale;             /* 0 */
  int32_t causal;                        /* 0 */
  int64_t window_left;                   /* -1: no limit */
  int64_t window_right;                  /* -1: no limit */
  int64_t attention_chunk;               /* 0: off */
  double softcap;                        /* 0: off */
  const flash_attn_tensor* alibi_slopes; /* fp32 (nheads) or (batch, nheads) */
  const flash_attn_tensor* bias;         /* (batch|1, nheads|1, seqlen_q|1, seqlen_k) */
  const flash_attn_tensor* sink;         /* (nheads) */

  /* Dropout. */
  double dropout_p; /* 0: off */
  uint64_t dropout_seed;
  uint64_t dropout_offset;

  /* Run. */
  const char* backend;        /* null: FLASH_ATTENTION_BACKEND, else the best that serves the call */
  int32_t positive_empty_lse; /* 0: the lse of a row that sees nothing is -inf; 1: +inf */
  int32_t deterministic;      /* 0; CPU backends always are */

  /* Devices: fields of the second release. */
  void* stream;                           /* of q's device (cudaStream_t, ...); null: its default stream */
  flash_attn_allocator allocator;         /* of workspace on q's device */
  const flash_attn_tensor* dropout_state; /* int64 (2) on q's device: (seed, offset), instead of the two above */
  int64_t used_k;                         /* -1; that many keys of every sequence, instead of seqused_k */
} flash_attn_options;

typedef struct flash_attn_forward_args {
  uint32_t struct_size;
  const flash_attn_tensor* q;        /* (batch, seqlen_q, nheads, headdim) | (total_q, nheads, headdim) */
  const flash_attn_tensor* k;        /* (batch, seqlen_k, nheads_k, headdim) | (total_k, nheads_k, headdim) | pages */
  const flash_attn_tensor* v;        /* as k, with headdim_v */
  const flash_attn_tensor* out;      /* as q, with headdim_v: written whole */
  const flash_attn_tensor* lse;      /* optional, fp32 (batch, nheads, seqlen_q) | (nheads, total_q): written whole */
  const flash_attn_options* options; /* optional */

  /* Keys that join a cache at seqused_k before attention, and rotary embedding (NewKeys, Rotary): optional. */
  const flash_attn_tensor* new_k;          /* (batch, seqlen_new, nheads_k, headdim) | (total_new, nheads_k, headdim) */
  const flash_attn_tensor* new_v;          /* as new_k, with headdim_v; k and v are written to */
  const flash_attn_tensor* cu_seqlens_new; /* int32 (batch+1): new_k and new_v are packed */
  const flash_attn_tensor* rotary_cos;     /* (seqlen_rotary, rotary_dim / 2), dtype of q or fp32 */
  const flash_attn_tensor* rotary_sin;     /* as rotary_cos */
  const flash_attn_tensor* rotary_positions; /* int32 (batch): instead of seqused_k */
  int32_t rotary_interleaved;                /* 0: pairs (i, i + rotary_dim / 2); 1: (2 i, 2 i + 1) */
  int32_t reserved;                          /* 0 */
} flash_attn_forward_args;

typedef struct flash_attn_backward_args {
  uint32_t struct_size;
  const flash_attn_tensor* dout; /* as out */
  const flash_attn_tensor* q;
  const flash_attn_tensor* k;
  const flash_attn_tensor* v;
  const flash_attn_tensor* out;
  const flash_attn_tensor* lse;
  const flash_attn_tensor* dq; /* as q, k, v: written whole */
  const flash_attn_tensor* dk;
  const flash_attn_tensor* dv;
  const flash_attn_tensor* dlse;     /* optional, fp32, as lse */
  const flash_attn_tensor* dbias;    /* optional, fp32, as bias: written whole */
  const flash_attn_tensor* dsink;    /* optional, fp32 (nheads): written whole */
  const flash_attn_options* options; /* optional */
} flash_attn_backward_args;

/* Set the defaults above and struct_size; `size` is sizeof the struct. */
FLASH_ATTN_API int flash_attn_options_init(flash_attn_options* options, size_t size);
FLASH_ATTN_API int flash_attn_forward_args_init(flash_attn_forward_args* args, size_t size);
FLASH_ATTN_API int flash_attn_backward_args_init(flash_attn_backward_args* args, size_t size);

FLASH_ATTN_API int flash_attn_forward(const flash_attn_forward_args* args);
FLASH_ATTN_API int flash_attn_backward(const flash_attn_backward_args* args);

/* What the call would do, in words: the problem, each backend's answer, the plan. Writes at most `capacity` bytes to
 * `text`, always ended by a zero byte if capacity > 0; `needed` (optional) receives the bytes of the whole. */
FLASH_ATTN_API int flash_attn_explain_forward(const flash_attn_forward_args* args, char* text, size_t capacity,
                                              size_t* needed);
FLASH_ATTN_API int flash_attn_explain_backward(const flash_attn_backward_args* args, char* text, size_t capacity,
                                               size_t* needed);

/* Words of this thread's last failure, "" if its last call succeeded; valid until its next call. Never null. */
FLASH_ATTN_API const char* flash_attn_last_error(void);

FLASH_ATTN_API const char* flash_attn_version(void);

/* Threads of the CPU backends; n <= 0 restores the default. flash_attn_num_threads returns 0 on failure. */
FLASH_ATTN_API int flash_attn_num_threads(void);
FLASH_ATTN_API int flash_attn_set_num_threads(int n);

/* Lets the host run the library's tasks: `run` must call task(context, i) once for each i in [0, n), on any threads,
 * and return after the last. A null `run` restores the library's own threads. */
typedef void (*flash_attn_task)(void* context, int64_t i);
typedef void (*flash_attn_parallel_for)(void* host, int64_t n, flash_attn_task task, void* context);
FLASH_ATTN_API int flash_attn_set_parallel_for(flash_attn_parallel_for run, void* host);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ATTN_FLASH_ATTN_H */
