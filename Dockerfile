# BlockDialect on vLLM's official image.
FROM vllm/vllm-openai:v0.32.0
COPY . /tmp/blockdialect
RUN pip install --no-cache-dir /tmp/blockdialect && rm -rf /tmp/blockdialect && blockdialect verify
