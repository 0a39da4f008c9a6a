# The repository with its environment, for CPUs:
#   docker build -t opt-rlhf .
#   docker run --rm -v "$PWD/outputs:/opt-rlhf/outputs" opt-rlhf              # make demo
#   docker run --rm -v "$PWD/outputs:/opt-rlhf/outputs" opt-rlhf make demo OUT=outputs/second
# For NVIDIA GPUs name one of PyTorch's CUDA builds. It brings CUDA's libraries; the host needs the driver and
# NVIDIA's container toolkit:
#   docker build --build-arg TORCH=cu130 -t opt-rlhf:cu130 .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/outputs:/opt-rlhf/outputs" opt-rlhf:cu130
FROM python:3.11-slim-bookworm

# DeepSpeed compiles its optimizer for CPUs at its first use, with g++ and ninja
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make ninja-build \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt-rlhf
ENV PIP_NO_CACHE_DIR=1
ARG TORCH=cpu

# the environment first: a change of the code does not install it again
COPY Makefile requirements.txt ./
RUN make .venv/ready TORCH="$TORCH"

COPY . .
CMD ["make", "demo"]
