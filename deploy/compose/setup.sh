#!/bin/sh
# Makes, once, what an administrator gives to a real installation: a certificate for
# the S3 server, and passwords. Each service sees only the volume with its own. The
# configuration is copied at every start, so that a change of
# deploy/compose/pgkeep.yaml counts after "docker compose up -d".
set -eu
umask 077
pgkeep=/etc/pgkeep s3=/setup/s3 postgres=/setup/postgres

secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

if [ ! -e "$pgkeep/done" ]; then
	tmp=$(mktemp -d)
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
		-subj "/CN=pgkeep compose" -keyout "$tmp/ca.key" -out "$pgkeep/ca.pem"
	openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
		-subj "/CN=s3" -addext "subjectAltName=DNS:s3" -keyout "$s3/server.key" -out "$tmp/server.csr"
	openssl x509 -req -in "$tmp/server.csr" -CA "$pgkeep/ca.pem" -CAkey "$tmp/ca.key" -CAcreateserial \
		-copy_extensions copy -days 3650 -out "$s3/server.crt"
	rm -r "$tmp" # nobody needs the authority's key again

	secret > "$pgkeep/s3.secret"
	cp "$pgkeep/s3.secret" "$s3/secret"

	secret > "$pgkeep/postgres.password"
	secret > "$postgres/superuser.password"
	cp "$pgkeep/postgres.password" "$postgres/pgkeep.password"
	chmod 755 "$postgres"
	chmod 644 "$postgres"/* # the user postgres of another image; only its container has this volume

	: > "$pgkeep/done"
fi
cp /setup/pgkeep.yaml "$pgkeep/pgkeep.yaml"
