# Four images: pgkeep (the last, and the default), setup, server and s3.
#
#     docker build -t pgkeep .
#     docker build -t pgkeep-server --target server .
#
# The images they begin with are pinned by tag. To pin them for ever, append the
# digest that "docker buildx imagetools inspect NAME" prints: NAME@sha256:...
ARG GO_IMAGE=golang:1.26.8-bookworm
ARG DEBIAN_IMAGE=debian:12.12-slim

FROM ${GO_IMAGE} AS go
ENV CGO_ENABLED=0 GOFLAGS="-trimpath -buildvcs=false" GOTOOLCHAIN=local
WORKDIR /src

FROM ${DEBIAN_IMAGE} AS base
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent pgkeep

FROM go AS build-s3
COPY tools ./
RUN go build -ldflags "-s -w" -o /out/ github.com/versity/versitygw/cmd/versitygw

# The S3 server of the tests and of docker-compose.yml.
FROM base AS s3
COPY --from=build-s3 /out/versitygw /usr/local/bin/
COPY deploy/compose/s3.sh /usr/local/bin/
RUN install -d -m 700 -o pgkeep -g pgkeep /data
USER 10001:10001
EXPOSE 9000
ENTRYPOINT ["s3.sh"]

FROM go AS build-server
COPY cmd/pgkeep-server/go.mod cmd/pgkeep-server/go.sum ./
RUN go mod download
COPY cmd/pgkeep-server ./
ARG VERSION=unknown
RUN go build -ldflags "-s -w -X main.version=${VERSION}" -o /out/pgkeep-server .

# Temporal and its Web UI in one process.
FROM base AS server
COPY --from=build-server /out/pgkeep-server /usr/local/bin/
RUN install -d -m 700 -o pgkeep -g pgkeep /var/lib/pgkeep-server
USER 10001:10001
EXPOSE 7233 8233
ENTRYPOINT ["pgkeep-server"]
CMD ["--db", "/var/lib/pgkeep-server/temporal.db"]

FROM go AS build-pgkeep
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=unknown
RUN go build -ldflags "-s -w -X main.version=${VERSION}" -o /out/pgkeep ./cmd/pgkeep

# pgkeep itself: command line and worker, with the client programs of PostgreSQL.
# They must be of the server's major version or a newer one; those of Debian 12
# are 15. For others add the packages of https://apt.postgresql.org.
FROM base AS common
ARG PG_MAJOR=15
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates tzdata postgresql-client-${PG_MAJOR} \
 && rm -rf /var/lib/apt/lists/* \
 && install -d -m 700 -o pgkeep -g pgkeep /etc/pgkeep /var/lib/pgkeep /var/lib/pgkeep/spool
COPY --from=build-pgkeep /out/pgkeep /usr/local/bin/

# What docker-compose.yml runs first, to make a certificate and passwords.
FROM common AS setup
RUN install -d -m 700 -o pgkeep -g pgkeep /setup/postgres /setup/s3
COPY deploy/compose/setup.sh deploy/compose/pgkeep.yaml /setup/
USER 10001:10001
ENTRYPOINT ["sh", "/setup/setup.sh"]

FROM common AS pgkeep
USER 10001:10001
ENTRYPOINT ["pgkeep"]
CMD ["worker"]
