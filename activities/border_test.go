package activities_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/testsuite"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A failure that is not UTF-8 cannot be sent: the server would never hear of it.
func TestFailuresAreText(t *testing.T) {
	for name, text := range map[string]string{
		"cut within a letter":                  "x" + strings.Repeat("é", 2000),
		"said by a server of another encoding": "FATAL: r\xf4le inconnu",
	} {
		t.Run(name, func(t *testing.T) {
			broken := func(context.Context) (*repo.Repo, error) {
				return nil, fail.Hint(errors.New(text), text)
			}
			h := &activities.Host{Logical: map[string]*backup.Logical{"main": {Name: "main", Open: broken}}}
			var suite testsuite.WorkflowTestSuite
			env := suite.NewTestActivityEnvironment()
			env.RegisterActivity(h)
			_, err := env.ExecuteActivity(h.Preflight, activities.Job{Cluster: "main", ID: "20261122T013000Z-4f2a9c01"})
			var app *temporal.ApplicationError
			if !errors.As(err, &app) || !utf8.ValidString(app.Message()) {
				t.Errorf("err = %.60q, want an application error in UTF-8", err)
			}
			if !utf8.ValidString(activities.AdviceOf(err)) {
				t.Errorf("advice is not UTF-8")
			}
		})
	}
}
