// Package lab starts the real things that pgkeep works with, for tests, the
// demonstration and the measurements: PostgreSQL, an S3 server, a Temporal
// server. What it starts, it stops; and it fails where it cannot start it.
package lab
