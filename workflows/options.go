package workflows

import (
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"
)

// Every timeout and retry policy of pgkeep is in this file. Each function
// returns options of its own: nothing is shared.

// quick is for work that ends in seconds: a few queries, a small object. It is
// the first to run on a host, and tells when nobody serves the host's queue.
func quick(host, summary string) workflow.ActivityOptions {
	return workflow.ActivityOptions{
		TaskQueue:              HostQueue(host),
		Summary:                summary,
		ScheduleToStartTimeout: 5 * time.Minute, // no worker on that host
		StartToCloseTimeout:    3 * time.Minute,
		ScheduleToCloseTimeout: 15 * time.Minute,
		RetryPolicy:            &temporal.RetryPolicy{InitialInterval: 2 * time.Second, MaximumInterval: time.Minute},
	}
}

// few is for requests that may be many: to list an archive of years, to store
// what is missing in it. A schedule does all of it again soon.
func few(host, summary string) workflow.ActivityOptions {
	opt := quick(host, summary)
	opt.StartToCloseTimeout, opt.ScheduleToCloseTimeout = 20*time.Minute, time.Hour
	opt.RetryPolicy.MaximumAttempts = 5
	return opt
}

// glance is for a look at what may be down, where a schedule looks again soon and
// there is something to tell meanwhile.
func glance(host, summary string) workflow.ActivityOptions {
	opt := quick(host, summary)
	opt.StartToCloseTimeout, opt.ScheduleToCloseTimeout = time.Minute, 5*time.Minute
	opt.RetryPolicy.MaximumAttempts = 3
	return opt
}

// expiring is for reading and removing what may be many objects. What is cut goes
// on with the next try, and a schedule does all of it again.
func expiring(host, summary string) workflow.ActivityOptions {
	opt := long(host, summary)
	opt.ScheduleToStartTimeout = 5 * time.Minute
	opt.RetryPolicy.MaximumAttempts = 5
	return opt
}

// patient is for small work near the end of a backup: hours of it are not thrown
// away because a server is restarted.
func patient(host, summary string) workflow.ActivityOptions {
	opt := quick(host, summary)
	opt.ScheduleToStartTimeout, opt.ScheduleToCloseTimeout = 0, 12*time.Hour
	opt.WaitForCancellation = true // published or not: nobody says cancelled before that is known
	return opt
}

// long is for work that moves a whole cluster. A lost worker is noticed by its
// silence, not by the clock; restarts of workers do not use up attempts.
func long(host, summary string) workflow.ActivityOptions {
	return workflow.ActivityOptions{
		TaskQueue:              HostQueue(host),
		Summary:                summary,
		StartToCloseTimeout:    24 * time.Hour,
		ScheduleToCloseTimeout: 48 * time.Hour,
		HeartbeatTimeout:       30 * time.Second,
		WaitForCancellation:    true, // it ends programs and leaves things in order
		RetryPolicy:            &temporal.RetryPolicy{InitialInterval: 5 * time.Second, MaximumInterval: 5 * time.Minute},
	}
}

// copying is dump for all of a cluster, which begins anew when it is cut, and may
// be told to read slowly: nobody knows how long it takes.
func copying(host, summary string) workflow.ActivityOptions {
	opt := dump(host, summary)
	opt.StartToCloseTimeout, opt.ScheduleToCloseTimeout = 14*24*time.Hour, 28*24*time.Hour
	return opt
}

// dump is long, and not repeated lightly: Temporal itself may be away for some
// minutes, and the silence of a healthy worker meanwhile is not its death.
func dump(host, summary string) workflow.ActivityOptions {
	opt := long(host, summary)
	opt.HeartbeatTimeout = 3 * time.Minute
	return opt
}

// testing is long for the steps of a restore test. One that fails again and again
// ends the test, and not the backup: the next test comes soon.
func testing(host, summary string) workflow.ActivityOptions {
	opt := long(host, summary)
	opt.RetryPolicy.MaximumAttempts = 10
	return opt
}

// watching adds to options that a lost worker is noticed by its silence.
func watching(opt workflow.ActivityOptions) workflow.ActivityOptions {
	opt.HeartbeatTimeout = 30 * time.Second
	return opt
}

// cleanup is for what must be tried at the end, however it came, and must not
// keep a workflow open on behalf of a host that never comes back.
func cleanup(host, summary string) workflow.ActivityOptions {
	opt := quick(host, summary)
	opt.ScheduleToStartTimeout, opt.ScheduleToCloseTimeout = 0, 10*time.Minute
	return opt
}

// telling is for news of a run that is over. Whoever waits for the next one must
// not wait long for somebody's webhook, nor for somebody to call it.
func telling(queue string, taken time.Duration, summary string) workflow.ActivityOptions {
	opt := quick("", summary)
	opt.TaskQueue = queue
	opt.ScheduleToStartTimeout, opt.StartToCloseTimeout, opt.ScheduleToCloseTimeout = taken, time.Minute, 10*time.Minute
	return opt
}

// removing is cleanup for what may be large. A worker that restarts comes in time;
// one that does not removes what it finds when it is back.
func removing(host, summary string) workflow.ActivityOptions {
	opt := watching(cleanup(host, summary))
	opt.ScheduleToStartTimeout, opt.StartToCloseTimeout, opt.ScheduleToCloseTimeout = 10*time.Minute, 30*time.Minute, time.Hour
	return opt
}
