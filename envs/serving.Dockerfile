# An image that serves the checkpoint at /model: vLLM's own, and the wheel of this package, built in it so that the CPU
# kernel fits its Python. From the repository's root: docker build -f envs/serving.Dockerfile -t armor-serving .
ARG BASE=vllm/vllm-openai:v0.32.0

FROM ${BASE} AS wheel
COPY pyproject.toml setup.py README.md LICENSE /source/
COPY armor /source/armor
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM ${BASE}
COPY --from=wheel /wheels /wheels
RUN python3 -m pip install --no-cache-dir /wheels/*.whl
EXPOSE 8000
ENTRYPOINT ["armor", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000", "--served-model-name", "armor"]
