# The web app on an NVIDIA GPU. It listens beyond the container, so it needs a password:
#   docker build -t lvdm-app .
#   docker run --gpus all -p 7860:7860 -v lvdm-data:/data -e LVDM_APP_AUTH=user:password lvdm-app
# The base image has the CUDA runtime; torch's wheels bring cuBLAS, cuDNN and the rest.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Ubuntu's archive keeps no old versions: a pin would break the build at their next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt /src && rm -rf /src

RUN useradd --create-home --uid 1001 app && install -d -o app /data
USER 1001
WORKDIR /data
VOLUME /data
EXPOSE 7860
ENTRYPOINT ["lvdm-app", "--host", "0.0.0.0"]
