"""Environment of the tests that run vLLM, set before anything imports it."""

import os

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default a share of the machine's memory
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: seconds, not a minute
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "GLOO_SOCKET_IFNAME": "lo",
    }
)
