#include "runtime/errors.h"

#include <cstdarg>
#include <cstdio>
#include <new>
#include <string>

namespace {

thread_local std::string message;

}  // namespace

void throw_error(int code, const char* format, ...) {
  char text[256];
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
    message = error.what();
    return error.code;
  } catch (const std::bad_alloc&) {
    message = "there is not enough memory";
    return JAXGPT_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    message = error.what();
    return JAXGPT_FAILED;
  }
}

const char* error_message() { return message.c_str(); }
