// Memory straight from the system: weights, the KV cache and scratch, on huge pages where asked for.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

// Memory that is zero at first, in pages of 2 MB where the system has them.
class Pages {
 public:
  Pages() = default;
  // sparse: most of it will not be written; the system counts what is, and not what was asked for.
  Pages(size_t bytes, bool huge, bool sparse = false);
  ~Pages();
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    swap(other);
    return *this;
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(start_);
  }
  size_t bytes() const { return bytes_; }
  // Gives bytes back to the system, as far as whole pages lie in them; they are zero or as before afterwards.
  void release(size_t first, size_t bytes);
  // Lets the system back a part with memory now; what is there stays.
  void touch(size_t first, size_t bytes);
  void swap(Pages& other) {
    std::swap(start_, other.start_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
  }

 private:
  uint8_t* start_ = nullptr;
  size_t bytes_ = 0, mapped_ = 0;
};
