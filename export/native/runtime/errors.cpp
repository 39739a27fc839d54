#include "runtime/errors.h"

#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <new>

namespace {

constexpr size_t kLongest = 256;  // bytes of a message, its end counted; the rest is left out

thread_local char message[kLongest];  // an array, as there may be no memory where there was none for the engine

void keep(const char* text) { snprintf(message, sizeof message, "%s", text); }

}  // namespace

void throw_error(int code, const char* format, ...) {
  char text[kLongest];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw EngineError(code, text);
}

int caught_code() {
  try {
    throw;
  } catch (const EngineError& error) {
    keep(error.what());
    return error.code;
  } catch (const std::bad_alloc&) {
    keep("there is not enough memory");
    return JAXGPT_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    keep(error.what());
    return JAXGPT_FAILED;
  }
}

const char* error_message() { return message; }
