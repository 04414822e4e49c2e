// The kernels as functions of the host: `run_NAME(blocks, threads, seed, parameters)`, with pointers to each parameter
// as cuLaunchKernel takes them.
#define HOST_COMPILED
#include "kernels.cu"

template <class T>
static T& at(void* place) {
  return *(T*)place;
}

extern "C" void run_select_tokens(int blocks, int threads, unsigned seed, void** p) {
  host::launch(blocks, threads, seed, [=] {
    select_tokens(at<const float*>(p[0]), at<int>(p[1]), at<Rules*>(p[2]), at<const Place*>(p[3]), at<Choice*>(p[4]),
                  at<double*>(p[5]), at<u64*>(p[6]));
  });
}

extern "C" void run_advance_rows(int blocks, int threads, unsigned seed, void** p) {
  host::launch(blocks, threads, seed, [=] {
    advance_rows(at<const Choice*>(p[0]), at<Place*>(p[1]), at<Record*>(p[2]), at<long long*>(p[3]), at<int>(p[4]),
                 at<const u32*>(p[5]), at<u32*>(p[6]), at<u32*>(p[7]), at<int>(p[8]), at<int>(p[9]),
                 at<const Table*>(p[10]), at<int>(p[11]));
  });
}

extern "C" int size_of_rules() { return sizeof(Rules); }
extern "C" int size_of_choice() { return sizeof(Choice); }
extern "C" int size_of_place() { return sizeof(Place); }
extern "C" int size_of_record() { return sizeof(Record); }
extern "C" int size_of_table() { return sizeof(Table); }
