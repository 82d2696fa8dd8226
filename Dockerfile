# The demo and the tests on a CPU. Which package index pip asks is the builder's own configuration, never written here:
#   docker build --secret id=pip,src=$HOME/.config/pip/pip.conf -t tiny-llama2-zh .
# A pip.conf with an index of PyTorch's CPU wheels keeps gigabytes of CUDA out; without the secret pip takes its default.
#   docker run --rm -v "$PWD/out:/app/out" tiny-llama2-zh
#   docker run --rm tiny-llama2-zh bash runs/test.sh
FROM python:3.12-slim
WORKDIR /app
ENV VIRTUAL_ENV=/usr/local PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements.txt requirements-dev.txt ./
ARG REQUIREMENTS=requirements-dev.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf pip install -r "$REQUIREMENTS"
COPY . .
CMD ["bash", "runs/demo.sh"]
