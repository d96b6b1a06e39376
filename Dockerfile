# BlockDialect on vLLM's official image.
FROM vllm/vllm-openai:v0.32.0
COPY . /opt/blockdialect
RUN uv pip install --system --no-cache /opt/blockdialect && blockdialect verify
