"""The language demonstration: `make demo` and `make serve`."""
