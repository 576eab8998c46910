"""Triton without a GPU: its own JIT binds, specialises, caches and compiles, and launches on the interpreter."""
