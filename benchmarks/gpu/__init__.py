"""`make gpu-check`: whether the package does on this machine's GPU what it says. See `__main__.py`."""
