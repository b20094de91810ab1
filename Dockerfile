# docker build -t hift_ds .    docker run --gpus all --shm-size 8g --ulimit memlock=-1 -v $PWD:/data hift_ds train run.yaml
# memlock: optimizer states wait in page-locked host memory. Nothing is compiled, so the runtime image is enough.
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime
ENV PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HOME=/data/.cache/huggingface
WORKDIR /opt/hift_ds
COPY pyproject.toml setup.py README.md constraints.txt ./
COPY hift_ds hift_ds
COPY model_zoo model_zoo
COPY ds_configs ds_configs
RUN pip install --no-cache-dir '.[train]'
WORKDIR /data
ENTRYPOINT ["hift-ds"]
CMD ["--help"]
