"""The native engine, called through ctypes; its C++ lies in export/native/."""
