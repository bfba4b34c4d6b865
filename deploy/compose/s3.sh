#!/bin/sh
# Starts the S3 server of docker-compose.yml with the credentials that setup.sh made.
set -eu
ROOT_ACCESS_KEY=pgkeep
ROOT_SECRET_KEY=$(cat /etc/s3/secret)
export ROOT_ACCESS_KEY ROOT_SECRET_KEY
mkdir -p /data/pgkeep # a bucket is a directory
# Without keep-alive the server closes each connection after one answer.
exec versitygw --port :9000 --cert /etc/s3/server.crt --key /etc/s3/server.key --region us-east-1 --quiet --keep-alive posix /data
