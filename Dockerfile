# docker build -t gyrostat .
# docker run -p 8088:8088 -v gyrostat:/data -v "$PWD/config:/data/config:ro" gyrostat
# It listens on every interface, so its configuration has to name keys ([http] keys).
FROM rust:1.95-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# gemm and candle's kernels are Rust; `ring` and `esaxx` need a C and a C++ compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --release --locked --bin gyrostat \
    && cp target/release/gyrostat /gyrostat

FROM debian:bookworm-slim
# curl for the health check, certificates for model downloads and upstream services, pip for the default model.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 gyrostat \
    && useradd --uid 10001 --gid gyrostat --home-dir /data --no-create-home gyrostat \
    && install -d -o gyrostat -g gyrostat /data
COPY --from=build /gyrostat /usr/local/bin/gyrostat
USER 10001:10001
WORKDIR /data
VOLUME /data
# The store and the downloaded model live in the volume.
ENV HOME=/data \
    GYROSTAT_HTTP__BIND=0.0.0.0:8088 \
    GYROSTAT_STORE__PATH=/data/store
EXPOSE 8088
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["curl", "--fail", "--silent", "--output", "/dev/null", "http://127.0.0.1:8088/readyz"]
CMD ["gyrostat", "serve"]
