raise ImportError(
    "This folder only holds the package dialect_kernels; OpenAI's triton_kernels is not installed."
)
