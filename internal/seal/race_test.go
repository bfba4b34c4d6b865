//go:build race

package seal_test

import (
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/pgkeep/pgkeep/internal/seal"
)

// The race detector is told what the compressor reads. The test runs itself as the
// program that has the race.
func TestARaceForWhatIsCompressedIsSeen(t *testing.T) {
	const beProgram = "PGKEEP_SEAL_TEST_RACE"
	if os.Getenv(beProgram) != "" {
		c, err := seal.NewCompressor()
		if err != nil {
			t.Fatal(err)
		}
		src := make([]byte, 8192)
		var wg sync.WaitGroup
		wg.Go(func() { c.Append(nil, src) })
		src[4096] = 1
		wg.Wait()
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestARaceForWhatIsCompressedIsSeen$")
	cmd.Env = append(os.Environ(), beProgram+"=1")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "DATA RACE") {
		t.Errorf("%v\n%s", err, out)
	}
}
