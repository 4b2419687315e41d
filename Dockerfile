# halfbyte on a CPU, built from its wheel; a user without rights; what lasts is in two volumes, the cache and your files.
#   docker build -t halfbyte .        # where PyTorch's index cannot be reached: --build-arg TORCH_INDEX=https://pypi.org/simple
#   docker run --rm -it -v halfbyte-cache:/cache -v "$PWD":/work halfbyte train smollm2-135m orders.jsonl
#   docker run --rm -p 127.0.0.1:8765:8765 -e HALFBYTE_API_KEY -v halfbyte-cache:/cache -v "$PWD":/work halfbyte studio --host 0.0.0.0
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
COPY --from=build /wheels /wheels
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/halfbyte \
 && /opt/halfbyte/bin/python -m pip install --no-cache-dir --index-url "$TORCH_INDEX" 'torch>=2.9' \
 && /opt/halfbyte/bin/python -m pip install --no-cache-dir "$(echo /wheels/*.whl)[serve,gguf]" \
 && rm -r /wheels
RUN useradd --create-home --uid 1000 halfbyte \
 && mkdir /cache /work \
 && chown halfbyte:halfbyte /cache /work
ENV PATH=/opt/halfbyte/bin:$PATH HALFBYTE_CACHE=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /work
VOLUME ["/cache", "/work"]
EXPOSE 8765 8000
ENTRYPOINT ["halfbyte"]
CMD ["--help"]
