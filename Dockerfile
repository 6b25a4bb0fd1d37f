# SAM 2 with LoRA adapters on a CUDA machine: training, the tools, the page to click on. No weights or data are in it.
#
#   docker build -t sam2-lora .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/project" sam2-lora \
#       python -m sam2_lora_ext.train -c severstal_lora
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/project" -p 127.0.0.1:8000:8000 sam2-lora \
#       python /opt/sam2_lora_ext/tools/serve.py --checkpoint steel.pt --images strips --host 0.0.0.0
#
# The base is the CUDA runtime alone, of the version that torch's wheels are built for; cuBLAS, cuDNN and NCCL come with
# torch. The digest is that of the tag's list of platforms: a new one is printed by
# `docker buildx imagetools inspect nvidia/cuda:13.0.2-base-ubuntu24.04`.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Ubuntu's archive keeps one version of a package, so a pinned one could not be installed a month later.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# The large layer first: it stays the same until a pinned version changes.
WORKDIR /opt/sam2_lora_ext
COPY requirements.txt requirements-sam2.txt ./
RUN pip install --no-cache-dir -r requirements.txt \
    && SAM2_BUILD_CUDA=0 pip install --no-cache-dir --no-deps --no-build-isolation --require-hashes \
        -r requirements-sam2.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && python -m compileall -q sam2_lora_ext tools \
    && python -c 'import torch, torchvision, training.train, sam2_lora_ext.host' \
    && useradd --no-log-init --create-home --uid 10001 --user-group steel \
    && mkdir /project \
    && chown steel:steel /project \
    && chmod 1777 /home/steel

# A home that any user of `docker run --user` may write caches to, and a name for a number that has none.
ENV HOME=/home/steel \
    LOGNAME=steel
USER steel
WORKDIR /project
EXPOSE 8000
CMD ["python", "-m", "sam2_lora_ext.train", "--help"]
