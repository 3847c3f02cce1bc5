# The one image: operator, store and every command are the one binary.
#
#   docker build -t ghcr.io/vasto-io/vasto:0.1.0 .
#
# The first build compiles RocksDB; later ones find it in BuildKit's cache.

# The version in rust-toolchain.toml, on the Debian that the last stage is made of.
ARG RUST_VERSION=1.95.0

FROM rust:${RUST_VERSION}-slim-bookworm AS build
ARG RUST_VERSION
# Not what rust-toolchain.toml adds for developers.
ENV RUSTUP_TOOLCHAIN=${RUST_VERSION}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libclang-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# What the workspace consists of, and nothing else: data folders and targets stay outside.
COPY Cargo.toml Cargo.lock ./
COPY .cargo .cargo
COPY crds crds
COPY client client
COPY store store
COPY operator operator
COPY gateway gateway
COPY cli cli
COPY tests tests
# Line tables stay out of the image, names of functions in it, so that a backtrace can be read.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --package vasto \
    && strip --strip-debug -o /vasto target/release/vasto

FROM gcr.io/distroless/cc-debian12:nonroot
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="vasto" \
      org.opencontainers.image.description="A distributed key-value store over RocksDB and its operator" \
      org.opencontainers.image.url="https://github.com/vasto-io/vasto" \
      org.opencontainers.image.source="https://github.com/vasto-io/vasto" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /vasto /usr/local/bin/vasto
COPY LICENSE /usr/share/doc/vasto/LICENSE
# distroless' `nonroot`, by number so that Kubernetes can tell that it isn't root.
USER 65532:65532
# Operator, store, and health with metrics.
EXPOSE 6379 8278 8279 8280 8281 8282
ENTRYPOINT ["vasto"]
