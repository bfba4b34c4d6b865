//go:build browser

// Debian's chromium takes 300 MB of disk: make chaos installs and runs it.

package report_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"html"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/report"
)

// A view is what a browser makes of the page.
type view struct {
	Width, Needs   int      // of the window, and of what is in it; pixels
	Out            []string // what reaches beyond the window, and cannot be scrolled to
	Page           string   // colour of the page
	Pale           []string // texts that are hard to read on what is behind them, with their contrast
	Sections, Rows int
	Drawn          int // parts of drawings that can be seen
}

// looks is run beside the page, not in it: the page has no script, and lets none
// run. The rule for contrast is that of WCAG 2.2, 1.4.3.
const looks = `
const parse = c => c.match(/[\d.]+/g).map(Number);
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
onload = () => {
	const all = [];
	for (const frame of document.querySelectorAll('iframe')) {
		const doc = frame.contentDocument, win = frame.contentWindow, root = doc.documentElement;
		const v = {Width: root.clientWidth, Needs: root.scrollWidth, Out: [], Pale: [], Page: win.getComputedStyle(doc.body).backgroundColor,
			Sections: doc.querySelectorAll('section').length, Rows: doc.querySelectorAll('tr').length, Drawn: 0};
		const behind = e => { for (; e; e = e.parentElement) { const c = parse(win.getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c } return [255, 255, 255] };
		for (const e of doc.body.querySelectorAll('*')) {
			const box = e.getBoundingClientRect();
			if (box.right > root.clientWidth + 1 && !e.closest('.scroll') && box.width > 0) v.Out.push(e.tagName + ' ' + e.textContent.slice(0, 40));
			if (['rect', 'circle', 'path', 'line'].includes(e.tagName) && box.width + box.height > 0) v.Drawn++;
			if (e.closest('svg') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
			const a = light(parse(win.getComputedStyle(e).color)), b = light(behind(e)), contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
			if (contrast < 4.5) v.Pale.push(contrast.toFixed(2) + ' ' + e.textContent.slice(0, 40));
		}
		all.push(v);
	}
	document.getElementById('seen').textContent = JSON.stringify(all);
};`

// In a real browser the page fits a telephone and a screen, by day and by night.
func TestThePageInABrowser(t *testing.T) {
	var page bytes.Buffer
	if err := report.Write(&page, facts()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "frames.html")
	frame := func(width int) string {
		return fmt.Sprintf(`<iframe width=%d height=900 style="border:0" srcdoc="%s"></iframe>`, width, html.EscapeString(page.String()))
	}
	text := "<!DOCTYPE html><meta charset=utf-8>" + frame(390) + frame(1280) + "<pre id=seen></pre><script>" + looks + "</script>"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for scheme, c := range map[string]struct{ setting, page string }{
		"light": {"1", "rgb(246, 248, 250)"},
		"dark":  {"0", "rgb(13, 17, 23)"},
	} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			chromium := exec.CommandContext(ctx, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
				"--disable-sync", "--disable-dev-shm-usage", "--user-data-dir="+filepath.Join(dir, scheme), "--blink-settings=preferredColorScheme="+c.setting, "--dump-dom", "file://"+file)
			chromium.Env = append(os.Environ(), "HOME="+dir)
			out, err := chromium.Output()
			if err != nil {
				t.Fatalf("chromium (Debian's package of that name): %v", err)
			}
			found := regexp.MustCompile(`(?s)<pre id="seen">(.*?)</pre>`).FindSubmatch(out)
			var seen []view
			if len(found) == 0 {
				t.Fatalf("chromium dumped %d bytes without an answer", len(out))
			}
			if err := json.Unmarshal([]byte(html.UnescapeString(string(found[1]))), &seen); err != nil || len(seen) != 2 {
				t.Fatalf("%v in %s", err, found[1])
			}
			for i, width := range []int{390, 1280} {
				v := seen[i]
				if v.Width < width-20 || v.Width > width || v.Needs > v.Width || len(v.Out) > 0 {
					t.Errorf("in %d pixels, %d are needed; out of sight: %s", v.Width, v.Needs, strings.Join(v.Out, "; "))
				}
				if v.Page != c.page {
					t.Errorf("the page is %s, want %s", v.Page, c.page)
				}
				if len(v.Pale) > 0 {
					t.Errorf("hard to read at %d pixels: %s", width, strings.Join(v.Pale, "; "))
				}
				if v.Sections < 3 || v.Rows < 50 || v.Drawn < 50 {
					t.Errorf("%d sections, %d rows and %d parts of drawings are seen", v.Sections, v.Rows, v.Drawn)
				}
			}
		})
	}
}
