// Errors inside the engine are exceptions with a code of engine.h; at the C interface they become codes and messages.
#pragma once

#include <stdexcept>

#include "engine.h"

struct EngineError : std::runtime_error {
  EngineError(int of, const char* message) : std::runtime_error(message), code(of) {}
  int code;  // JAXGPT_BAD_ARGUMENT ...
};

[[noreturn]] void throw_error(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

template <typename... Pointers>
void require_non_null(const Pointers*... pointers) {
  if ((... || !pointers)) throw_error(JAXGPT_BAD_ARGUMENT, "a pointer that is needed is null");
}

// In a catch block: keeps the message of what was thrown for error_message() and returns its code.
int caught_code();
// The last message of this thread.
const char* error_message();

// Runs the body of a function of the C interface.
template <typename Body>
int guarded(const Body& body) {
  try {
    body();
    return JAXGPT_OK;
  } catch (...) {
    return caught_code();
  }
}
