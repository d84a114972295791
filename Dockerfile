# The API in a container; docs/deployment.md has the commands. Not built where it was written.
#
#     docker build -t querybridge .
#     docker build -t querybridge:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg TORCH_INDEX= .

ARG BASE=debian:trixie-slim
FROM ${BASE}

# where torch comes from; empty: from where pip is set up to look, which has the builds for CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/querybridge
COPY pyproject.toml constraints.txt README.md LICENSE querybridge.py ./
COPY scripts/environment.sh scripts/
COPY qformer qformer
COPY adapters adapters
COPY serve serve

# the same steps as ./scripts/quickstart.sh and ./scripts/test.sh take
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN export QUERYBRIDGE_TORCH_INDEX="${TORCH_INDEX}" PIP_NO_CACHE_DIR=1 \
    && source scripts/environment.sh \
    && prepare_environment run

RUN useradd --create-home querybridge \
    && install -d -o querybridge -g querybridge /home/querybridge/.cache /home/querybridge/.cache/querybridge
USER querybridge
WORKDIR /home/querybridge
VOLUME /home/querybridge/.cache/querybridge
EXPOSE 8000

HEALTHCHECK --start-period=5m CMD \
    /opt/querybridge/.venv/bin/python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["/opt/querybridge/.venv/bin/querybridge", "serve", "--host", "0.0.0.0"]
