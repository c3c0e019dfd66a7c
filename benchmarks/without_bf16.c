// Makes an x86-64 process on Linux see a processor with AVX-512 and without BF16, FP16 and AMX, whatever else it has.
//
//   cc -O2 -shared -fPIC -o build/without_bf16.so benchmarks/without_bf16.c
//   LD_PRELOAD=build/without_bf16.so .venv/bin/python benchmarks/peers.py
//
// PyTorch, oneDNN and MKL each ask CPUID themselves, and not all of them honour a setting. So CPUID is made to fault
// (arch_prctl(ARCH_SET_CPUID, 0), where the processor can), and the handler answers with those bits cleared. Threads
// inherit it. Programs with a handler of their own for SIGSEGV (compilers, say) must not run under it.
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kArchSetCpuid = 0x1012 };

static void answer_cpuid(int signal_number, siginfo_t* info, void* context) {
  (void)info;
  greg_t* const registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* const instruction = (const unsigned char*)registers[REG_RIP];
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) {  // a fault of the program's own
    signal(signal_number, SIG_DFL);
    return;
  }
  uint32_t a = (uint32_t)registers[REG_RAX], b, c = (uint32_t)registers[REG_RCX], d;
  const uint32_t leaf = a, part = c;
  syscall(SYS_arch_prctl, kArchSetCpuid, 1);
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  syscall(SYS_arch_prctl, kArchSetCpuid, 0);
  // 7.0 EDX: AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8. 7.1 EAX: AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA.
  if (leaf == 7 && part == 0) d &= ~(1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
  if (leaf == 7 && part == 1) a &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  const struct sigaction action = {.sa_sigaction = answer_cpuid, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSEGV, &action, NULL);
  if (syscall(SYS_arch_prctl, kArchSetCpuid, 0) != 0) perror("without_bf16: CPUID cannot be made to fault here");
}
