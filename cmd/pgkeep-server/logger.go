package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"go.temporal.io/server/common/log"
	"go.temporal.io/server/common/log/tag"
)

// logger lets a Temporal server log to slog. Its Panic and Fatal end nothing:
// they log, and report to broken, so that the one who started the server can
// stop it in order.
type logger struct {
	slog   *slog.Logger
	broken chan<- error
}

var (
	_ log.Logger      = logger{}
	_ log.WithLogger  = logger{}
	_ log.SLogWrapper = logger{}
)

func (l logger) Debug(msg string, tags ...tag.Tag)  { l.log(slog.LevelDebug, msg, tags) }
func (l logger) Info(msg string, tags ...tag.Tag)   { l.log(slog.LevelInfo, msg, tags) }
func (l logger) Error(msg string, tags ...tag.Tag)  { l.log(slog.LevelError, msg, tags) }
func (l logger) DPanic(msg string, tags ...tag.Tag) { l.log(slog.LevelError, msg, tags) }
func (l logger) Panic(msg string, tags ...tag.Tag)  { l.end(msg, tags) }
func (l logger) Fatal(msg string, tags ...tag.Tag)  { l.end(msg, tags) }

// Warn logs a warning, but for those that an operator can do nothing about: at
// every start that there is no HTTP port, which is so on purpose, and at every
// look into a workflow that the Web UI reads long pages.
func (l logger) Warn(msg string, tags ...tag.Tag) {
	level := slog.LevelWarn
	if strings.HasPrefix(msg, "HTTP API port has not been set") || strings.HasPrefix(msg, "GetHistory page size is larger") {
		level = slog.LevelDebug
	}
	l.log(level, msg, tags)
}

// With returns a logger that adds tags to everything.
func (l logger) With(tags ...tag.Tag) log.Logger {
	l.slog = slog.New(l.slog.Handler().WithAttrs(attrs(tags)))
	return l
}

// SLog returns what l logs to.
func (l logger) SLog() *slog.Logger { return l.slog }

func (l logger) log(level slog.Level, msg string, tags []tag.Tag) {
	// Reading a tag costs, and most lines are not wanted.
	if l.slog.Enabled(context.Background(), level) {
		l.slog.LogAttrs(context.Background(), level, msg, attrs(tags)...)
	}
}

func (l logger) end(msg string, tags []tag.Tag) {
	l.log(slog.LevelError, msg, tags)
	err := errors.New(msg)
	for _, t := range tags {
		err = fmt.Errorf("%w, %s %v", err, t.Key(), t.Value())
	}
	select {
	case l.broken <- fmt.Errorf("temporal server: %w", err):
	default: // the first word of it is enough
	}
}

func attrs(tags []tag.Tag) []slog.Attr {
	list := make([]slog.Attr, len(tags))
	for i, t := range tags {
		list[i] = slog.Any(t.Key(), t.Value())
	}
	return list
}
