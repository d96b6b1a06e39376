"""The vLLM plugin: quantization config, linear method, differences between vLLM versions."""
