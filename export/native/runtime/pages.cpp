#include "runtime/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)

// From the allocator, and not a byte more than was asked for: the sanitizer sees what reaches beyond.
Pages::Pages(size_t bytes, bool, bool) : bytes_(bytes) {
  constexpr size_t kMax = size_t(1) << 34;
  if (bytes > kMax || posix_memalign(reinterpret_cast<void**>(&start_), 64, std::max(bytes, size_t(1))))
    throw std::bad_alloc();
  memset(start_, 0, bytes);
}

Pages::~Pages() { free(start_); }

void Pages::release(size_t, size_t) {}

void Pages::touch(size_t, size_t) {}

#else

Pages::Pages(size_t bytes, bool huge, bool sparse) : bytes_(bytes) {
  constexpr size_t kHuge = size_t(2) << 20;
  const size_t alignment = huge ? kHuge : 4096;
  mapped_ = (bytes + 2 * alignment - 1) / alignment * alignment;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
  if (sparse) flags |= MAP_NORESERVE;  // Linux refuses a single piece that is larger than memory and swap
#endif
  void* found = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (found == MAP_FAILED) {
    mapped_ = 0;
    throw std::bad_alloc();
  }
  const uintptr_t aligned = (uintptr_t(found) + alignment - 1) / alignment * alignment;
  const size_t before = aligned - uintptr_t(found);
  if (before) munmap(found, before);
  mapped_ -= before;
  start_ = reinterpret_cast<uint8_t*>(aligned);
#if defined(MADV_HUGEPAGE)
  if (huge) madvise(start_, mapped_, MADV_HUGEPAGE);
#endif
}

Pages::~Pages() {
  if (start_) munmap(start_, mapped_);
}

void Pages::release(size_t first, size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
  if (begin < end) madvise(start_ + begin, end - begin, MADV_DONTNEED);
}

void Pages::touch(size_t first, size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t begin = first / page * page, end = std::min((first + bytes + page - 1) / page * page, mapped_);
#if defined(MADV_POPULATE_WRITE)
  if (begin >= end || madvise(start_ + begin, end - begin, MADV_POPULATE_WRITE) == 0) return;
#endif
  for (size_t at = begin; at < end; at += page) {  // systems without it
    volatile uint8_t* byte = start_ + at;
    *byte = *byte;
  }
}

#endif
