"""Triton without a GPU: its JIT binds, specialises, caches and compiles, and launches run on the interpreter."""
