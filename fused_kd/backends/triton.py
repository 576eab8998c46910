"""Placeholder replaced by the Triton backend."""


def unavailable(device_type: str) -> str | None:
    return "not built yet"
