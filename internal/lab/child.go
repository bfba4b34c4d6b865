package lab

import (
	"os/exec"
	"runtime"
	"syscall"
)

// startChild starts cmd as a process that gets the signal when this one ends,
// however it ends. The channel is closed when the child has gone.
func startChild(cmd *exec.Cmd, death syscall.Signal) (exited <-chan struct{}, err error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setpgid = true // Ctrl-C on the terminal is for us alone
	// The signal comes when the thread that started the child ends: so that
	// thread is kept until the child has gone.
	cmd.SysProcAttr.Pdeathsig = death
	started := make(chan error)
	gone := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait() // how it ended is in its log
			close(gone)
		}
	}()
	return gone, <-started
}
