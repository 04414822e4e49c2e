// The kernels as functions of the host: `run_NAME(blocks, threads, seed, parameters)`, with pointers to each parameter
// as cuLaunchKernel takes them.
#define HOST_COMPILED
#include "kernels.cu"

extern "C" void run_select_tokens(int blocks, int threads, unsigned seed, void** p) {
  host::launch(blocks, threads, seed, [=] {
    select_tokens(*(const float**)p[0], *(int*)p[1], *(Rules**)p[2], *(Choice**)p[3], *(double**)p[4], *(u64**)p[5]);
  });
}

extern "C" int size_of_rules() { return sizeof(Rules); }
extern "C" int size_of_choice() { return sizeof(Choice); }
