#!/bin/sh
# Runs once, when the data directory is new: something worth a backup, and the role
# that pgkeep connects as. To back up it needs to read everything; to restore it
# needs to make databases, and to act for those who own things in them.
set -eu
PGKEEP_PASSWORD=$(cat /etc/postgres-setup/pgkeep.password)
export PGKEEP_PASSWORD
psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
\getenv password PGKEEP_PASSWORD
CREATE ROLE shop;
CREATE ROLE pgkeep LOGIN CREATEDB BYPASSRLS PASSWORD :'password';
GRANT pg_read_all_data, pg_monitor, shop TO pgkeep;

ALTER DATABASE shop OWNER TO shop;
SET ROLE shop;
CREATE TABLE orders (id bigint PRIMARY KEY, customer text NOT NULL, cents bigint NOT NULL, at timestamptz NOT NULL);
INSERT INTO orders
SELECT i, 'customer ' || i % 997, (i * 7919) % 100000, timestamptz '2026-01-01' + i * interval '1 minute'
FROM generate_series(1, 100000) AS i;
SQL
