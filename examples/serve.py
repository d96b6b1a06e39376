"""Complete a prompt with vLLM, with the small LLaMA that ships quantized while it loads.

    python -m examples.serve

vLLM finds the plugin by itself, in every environment where blockdialect is installed.
"""

from __future__ import annotations

from pathlib import Path

from vllm import LLM, SamplingParams

MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"


def main() -> None:
    """Print a completion in W4A4; a packed checkpoint needs no `quantization`."""
    engine = LLM(
        str(MODEL),
        quantization="blockdialect",
        max_model_len=128,
        enforce_eager=True,
        gpu_memory_utilization=0.4,  # on CPUs of main memory; the default wants nearly all of it
    )
    greedy = SamplingParams(temperature=0, max_tokens=24)
    [answer] = engine.generate(["import os\n\nclass "], greedy)
    print(answer.prompt + answer.outputs[0].text)


if __name__ == "__main__":
    main()
