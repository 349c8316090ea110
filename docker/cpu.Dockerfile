# SPDX-License-Identifier: Apache-2.0
# Development and tests without a GPU, small models. From the repository root:
#   docker build -f docker/cpu.Dockerfile -t lava-sglang:cpu .
FROM python:3.11-slim-bookworm

# g++: torch.compile, Triton and compiled extensions build at run time. make: the Makefile.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lava-sglang
COPY pyproject.toml README.md LICENSE ./
COPY lava_sglang lava_sglang
COPY kernels kernels
COPY patches patches
COPY docker/install.sh docker/install.sh
RUN --mount=type=cache,target=/root/.cache/pip docker/install.sh /opt/venv sglang,test
ENV PATH=/opt/venv/bin:$PATH

COPY Makefile ./
COPY docker docker
COPY benchmarks benchmarks
COPY tests tests

EXPOSE 30000
CMD ["python", "-m", "pytest", "tests/unit"]
