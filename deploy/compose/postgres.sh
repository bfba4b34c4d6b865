#!/bin/sh
# Runs once, when the data directory is new: the role that pgkeep connects as,
# and something worth a backup.
set -eu
PGKEEP_PASSWORD=$(cat /etc/postgres-setup/pgkeep.password)
export PGKEEP_PASSWORD
psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
\getenv password PGKEEP_PASSWORD
CREATE ROLE pgkeep LOGIN CREATEDB BYPASSRLS PASSWORD :'password';
GRANT pg_read_all_data TO pgkeep;

CREATE TABLE orders (id bigint PRIMARY KEY, customer text NOT NULL, cents bigint NOT NULL, at timestamptz NOT NULL);
INSERT INTO orders
SELECT i, 'customer ' || i % 997, (i * 7919) % 100000, timestamptz '2026-01-01' + i * interval '1 minute'
FROM generate_series(1, 100000) AS i;
SQL
