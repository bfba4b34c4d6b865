# Everything one does with this repository. "make" lists it.

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZTIME ?= 30s

SERVER  := cmd/pgkeep-server
MODULES := . $(SERVER) tools

# Tools are pinned in tools/go.mod; the go command builds and caches them.
tool = $$(go -C tools tool -n $(1))

# The same build everywhere, so that Temporal's server, which is large, is
# compiled once. The race detector alone needs cgo.
export CGO_ENABLED = 0
export GOFLAGS     := $(GOFLAGS) -trimpath

# Options of the program behind a target: make bench-wal ARGS='-replay 20'
ARGS ?=

# The race detector does not look into libraries that only compute: it made the
# tests of the repository take more than twice as long. What zstd reads and writes
# for us, internal/seal tells it. No vet, which "make check" has done; no symbols
# for debuggers, which take half of the time to link.
RACE = -race -vet=off -ldflags=-w \
	-gcflags=github.com/klauspost/compress/...=-race=false -gcflags=crypto/internal/fips140/edwards25519/...=-race=false

.PHONY: help check test fuzz update demo chaos bench bench-wal bench-proof reliability build release reproducible clean setup

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check: ## what needs no service: format, vet, staticcheck, workflowcheck, tidy modules, no skipped test
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	@! grep -rnE '\b[tbf]\.Skip(f|Now)?\(' --include='*_test.go' .
	go vet ./...
	go -C $(SERVER) vet ./...
	go vet -tags browser ./internal/report
	$(call tool,staticcheck) ./...
	tool=$(call tool,staticcheck) && cd $(SERVER) && $$tool ./...
	$(call tool,workflowcheck) ./...
	for m in $(MODULES); do go -C $$m mod tidy -diff || exit; done

test: setup ## every test, on a real PostgreSQL, S3 and Temporal, with the race detector
	CGO_ENABLED=1 tools/scratch go test $(RACE) -timeout 30m ./...
	tools/scratch go -C $(SERVER) test -vet=off -ldflags='-s -w' -timeout 30m ./...
	PGKEEP_TEST_STICKY_CACHE=0 CGO_ENABLED=1 tools/scratch go test $(RACE) -count 1 -timeout 30m ./workflows/... ./worker/...

fuzz: ## every fuzz test for FUZZTIME (30s)
	@grep -roE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' . | sed 's/\/[^/]*:func / /' | \
	while read -r pkg name; do go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$pkg" || exit; done

chaos: setup ## the campaigns that make test runs a little of: kills everywhere, damage, histories, targets (hours)
	go test -timeout 0 -v -run 'Histories|Damage|Memory' ./internal/repo -histories 1500 -damages 1500 -scale 50
	go test -timeout 0 -v -run 'EveryTarget|NoDamage' ./internal/restore -targets 300 -mutations 300
	PGKEEP_TEST_KILLS=all go test -timeout 0 -v -run 'Kill|ManySegments' ./cmd/pgkeep-wal -kill-everywhere -segments 500
	go test -timeout 0 -v ./internal/retention -histories 1000000
	PGKEEP_TEST_EXPIRE_RUNS=1000 PGKEEP_TEST_CHURN_BACKUPS=30 go test -timeout 0 -v ./internal/expire
	PGKEEP_TEST_SCHEDULES=1000 go test -timeout 0 -v -run ManySchedules ./internal/schedule
	@tools/setup chromium
	go test -v -tags browser -run InABrowser ./internal/report
	PGKEEP_TEST_KILLS=all PGKEEP_TEST_DEFECTS=all PGKEEP_TEST_GREEN=50 go test -timeout 0 -v -run 'IsProven|RestoreTest|ADefect|KilledWorker' ./internal/e2e

update: ## write the files that tests compare with the code
	go test $$(grep -rlE --include='*_test.go' 'flag\.Bool\("update"' . | xargs -n1 dirname | sort -u) -update

demo: setup ## back up, verify and restore a database on embedded parts, and show it
	go run ./internal/demo

bench: setup ## storing a dump against zstd -1 -T0; physical backups and restores against Debian's pgBackRest
	@tools/setup pgbackrest
	go run ./internal/bench
	go run ./internal/benchphysical $(ARGS)

bench-wal: setup ## archiving and fetching of WAL, against Debian's pgBackRest and against cp
	@tools/setup pgbackrest
	go run ./internal/benchwal $(ARGS)

bench-proof: setup ## a restore test beside a restore, a replay and pg_amcheck by hand
	go run ./internal/benchproof $(ARGS)

reliability: setup ## what damage to an archive does to a recovery, with pgkeep and with Debian's pgBackRest: docs/reliability.md
	@tools/setup pgbackrest
	go run ./internal/reliability -write docs/reliability.md $(ARGS)

build: ## static programs in bin/
	go build -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/pgkeep ./cmd/pgkeep-wal
	go -C $(SERVER) build -ldflags '-s -w -X main.version=$(VERSION)' -o ../../bin/pgkeep-server .

# Nothing of the machine is in a program: neither paths, nor times, nor the state
# of the working copy beyond VERSION. Temporal's server takes minutes for each new
# architecture: SERVER_ARCHS='amd64 arm64' builds it for both.
ARCHS        ?= amd64 arm64
SERVER_ARCHS ?= amd64
EPOCH        ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
DIST         ?= $(CURDIR)/dist
linux         = GOOS=linux GOARCH=$$arch GOFLAGS='-trimpath -buildvcs=false' go

release: ## static, reproducible programs in tarballs, with checksums and a bill of materials: dist/
	rm -rf $(DIST)
	for arch in $(ARCHS); do $(linux) build -ldflags '-s -w -X main.version=$(VERSION)' -o $(DIST)/$$arch/bin/ ./cmd/pgkeep ./cmd/pgkeep-wal || exit; done
	for arch in $(filter $(ARCHS),$(SERVER_ARCHS)); do $(linux) -C $(SERVER) build -ldflags '-s -w -X main.version=$(VERSION)' -o $(DIST)/$$arch/bin/pgkeep-server . || exit; done
	go -C tools run ./release -dist $(DIST) -source $(CURDIR) -version $(VERSION) -epoch $(EPOCH)
	cat $(DIST)/SHA256SUMS

reproducible: ## whether two copies of the last commit, in other directories and with empty caches, give the same release
	tools/reproducible ARCHS='$(ARCHS)' SERVER_ARCHS='$(SERVER_ARCHS)'

clean: ## remove what the others made
	rm -rf bin dist

setup:
	@tools/setup
