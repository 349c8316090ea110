# SPDX-License-Identifier: Apache-2.0
# SGLang's own image with the plugin beside it. From the repository root:
#   docker build -f docker/cuda.Dockerfile -t lava-sglang:cuda .
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.23
FROM ${SGLANG_IMAGE}

# The image's Python may be marked as managed by the distribution (PEP 668).
ENV PIP_BREAK_SYSTEM_PACKAGES=1

WORKDIR /opt/lava-sglang
COPY pyproject.toml README.md LICENSE ./
COPY lava_sglang lava_sglang
COPY kernels kernels
COPY patches patches
COPY docker/install.sh docker/install.sh
RUN --mount=type=cache,target=/root/.cache/pip docker/install.sh --into python3

# Not here: Python would import the sources in place of the installed package.
WORKDIR /workspace
EXPOSE 30000
CMD ["python3", "-m", "sglang.launch_server", "--help"]
