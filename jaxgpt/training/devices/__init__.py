"""Devices: the mesh over them, several processes, precision, memory."""
