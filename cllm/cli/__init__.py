"""Thin commands: they read options, call the library and print."""
