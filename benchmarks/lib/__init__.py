"""What benchmarks share: harness, gate, model shapes, instruments, the renderer."""
