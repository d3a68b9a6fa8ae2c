# With the CUDA libraries that PyPI's torch brings:
#   docker build --tag repr .
#   docker run --gpus all --shm-size 8g --volume "$PWD/runs:/home/repr/runs" repr repr.fit
# For CPUs alone, add --build-arg TORCH_INDEX=URL with the index of CPU wheels that PyTorch's installation page names.
FROM python:3.11-slim AS build
COPY pyproject.toml README.md LICENSE NOTICE /source/
COPY repr /source/repr
COPY conf /source/conf
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
# compile=true needs a compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=""
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
# Extras, such as [s3,hf].
ARG EXTRAS=""
COPY --from=build /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)$EXTRAS"
RUN useradd --create-home --uid 1000 repr && mkdir /home/repr/runs && chown 1000 /home/repr/runs
USER 1000
WORKDIR /home/repr
ENTRYPOINT ["python", "-m"]
CMD ["repr.fit", "--help"]
